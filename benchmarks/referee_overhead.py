"""What the referee costs over the attack alone: ResNet-20, 256 images, PGD with 20 steps.

    python benchmarks/referee_overhead.py --data FOLDER

The attack alone is the same robplug PGD, chunk by chunk: on all images, as one runs it without a referee, and on the
correctly classified ones only, which the referee finds by a clean pass of its own and leaves the others out. The
referee adds that pass, guard, verification and the store. Loading model and data is left out of both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import robplug
from pgd_speed import Case, cifar
from robplug.plugins import registry
from robplug.referee.jobs import Job, prepare
from robplug.referee.plan import Plan, load_plan
from robplug.referee.run import CleanPredictions, run_cell
from robplug.referee.store import Store
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Attack
from schema import Result, keep_heap, rows, surroundings, timed, write

EPS = 2 / 255
ALONE, RIGHT = "attack alone on all images", "attack alone on the correctly classified"
PASSES, REFEREE = "two forward passes", "referee"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "referee_overhead.json")
    options = parser.parse_args()
    heap = keep_heap()
    case = cifar(options.data)
    target = robplug.target(case.model)
    attack = robplug.attack("robplug/pgd", steps=20, early_stop=False)
    every = torch.ones(len(case.x), dtype=torch.bool)
    with torch.no_grad():
        right = torch.cat([case.model(part) for part in case.x.split(64)]).argmax(1) == case.y
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "cifar.npz", x=case.x.numpy(), y=case.y.numpy())
        plan, job = prepared(options.data, Path(folder))
        numbers = itertools.count()
        contenders = {
            ALONE: lambda: attack_alone(case, target, attack, every),
            RIGHT: lambda: attack_alone(case, target, attack, right),
            PASSES: lambda: two_passes(case, right),
            REFEREE: lambda: with_referee(plan, job, Path(folder) / f"run{next(numbers)}"),
        }
        times = timed(contenders, options.repeats)
    found = rows("CIFAR ResNet-20, 256 images, PGD-20", times, ALONE)
    result = Result(
        benchmark="referee_overhead",
        command=f"python benchmarks/referee_overhead.py --data DATA --repeats {options.repeats}",
        settings={
            "steps": 20,
            "images": 256,
            "attacked": int(right.sum()),
            "chunk": 64,
            "eps": EPS,
            "heap": heap,
            "early_stop": False,
            "repeats": options.repeats,
        },
        rows=found,
        findings=findings(times),
        **surroundings(),
    )
    write(result, options.out)


def findings(times: dict[str, list[float]]) -> list[str]:
    """Returns what the referee costs over the attack on all images, and over that on those that it attacks."""
    said = []
    for base in (ALONE, RIGHT):
        over = statistics.median(b / a for a, b in zip(times[base], times[REFEREE], strict=True)) - 1
        said.append(
            f"the referee costs {100 * over:+.1f} % over the {base}: {'within' if over <= 0.05 else 'OVER'} 5 %"
        )
    share = statistics.median(b / a for a, b in zip(times[RIGHT], times[PASSES], strict=True))
    said.append(f"the two forward passes that it makes itself are {100 * share:.1f} % of the {RIGHT}")
    return said


def attack_alone(case: Case, target: Target, attack: Attack, wanted: Tensor) -> None:
    """Attacks the samples where ``wanted``, in chunks of 64."""
    threat = robplug.ThreatModel("linf", EPS)
    for first in range(0, len(case.x), 64):
        part = slice(first, first + 64)
        keep = wanted[part]
        ids = [first + i for i in keep.nonzero().flatten().tolist()]
        attack.run(target, case.x[part][keep], case.y[part][keep], threat, Rng(0, ids))


@torch.no_grad()
def two_passes(case: Case, right: Tensor) -> None:
    """Classifies all samples and, once more, those that are attacked."""
    for part, keep in zip(case.x.split(64), right.split(64), strict=True):
        case.model(part)
        case.model(part[keep])


def prepared(data: Path, folder: Path) -> tuple[Plan, Job]:
    """Returns the same as a plan, and its one cell, ready to run."""
    plan, where = load_plan(
        {
            "targets": [
                {
                    "name": "resnet20",
                    "make": "robplug/resnet20",
                    "params": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
                    "weights": str(data / "models" / "resnet20-12fca82f.th"),
                }
            ],
            "datasets": [{"name": "npz", "root": str(folder / "cifar.npz"), "samples": 256}],
            "threats": [{"norm": "linf", "eps": EPS}],
            "attacks": [{"name": "robplug/pgd", "steps": 20, "early_stop": False}],
            "chunk": 64,
        }
    )
    (job,) = prepare(plan, registry(), where)
    return plan, job


def with_referee(plan: Plan, job: Job, folder: Path) -> None:
    """Does the same through the referee, into a fresh run directory."""
    list(run_cell(job, 0, plan, Store(folder), CleanPredictions(plan.batch_size)))


if __name__ == "__main__":
    main()
