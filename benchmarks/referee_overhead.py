"""What the referee costs over the attack alone: ResNet-20, 256 images, PGD with 20 steps.

    python benchmarks/referee_overhead.py --data FOLDER

The attack alone is the same robplug PGD on the same correctly classified samples, chunk by chunk; the referee adds the
clean pass, guard, verification, digests and the store. Loading models and data is left out of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import robplug
from pgd_speed import Case, cifar
from robplug.plugins import registry
from robplug.referee.jobs import prepare
from robplug.referee.plan import load_plan
from robplug.referee.run import CleanPredictions, run_cell
from robplug.referee.store import Store
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Attack
from schema import Result, Row, surroundings, write

EPS = 2 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "referee_overhead.json")
    options = parser.parse_args()
    case = cifar(options.data)
    target = robplug.target(case.model)
    attack = robplug.attack("robplug/pgd", steps=20, early_stop=False)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "cifar.npz", x=case.x.numpy(), y=case.y.numpy())
        alone, whole = [], []
        for number in range(options.repeats + 1):
            alone.append(attack_alone(case, target, attack))
            whole.append(with_referee(options.data, Path(folder), number))
    ratios = sorted(b / a for a, b in zip(alone[1:], whole[1:], strict=True))
    ratio = ratios[len(ratios) // 2]
    found = [row("attack alone", alone[1:], 1.0), row("referee", whole[1:], ratio)]
    verdict = "within" if ratio <= 1.05 else "OVER"
    result = Result(
        benchmark="referee_overhead",
        command="python benchmarks/referee_overhead.py --data DATA",
        settings={"steps": 20, "images": 256, "chunk": 64, "eps": EPS, "early_stop": False, "repeats": options.repeats},
        rows=found,
        findings=[f"the referee costs {100 * (ratio - 1):.2f} % over the attack alone: {verdict} 5 %"],
        **surroundings(),
    )
    write(result, options.out)


def row(name: str, values: list[float], ratio: float) -> Row:
    """Returns the row of one contender."""
    ordered = sorted(values)
    low, mid, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return Row(
        case="CIFAR ResNet-20, 256 images, PGD-20",
        contender=name,
        median=mid,
        low=low,
        high=high,
        unit="s",
        ratio=round(ratio, 4),
        relative_to="attack alone",
    )


def attack_alone(case: Case, target: Target, attack: Attack) -> float:
    """Returns the seconds of the attack on the correctly classified samples, in chunks of 64."""
    with torch.no_grad():
        right = torch.cat([case.model(part) for part in case.x.split(64)]).argmax(1) == case.y
    threat = robplug.ThreatModel("linf", EPS)
    start = time.perf_counter()
    for first in range(0, len(case.x), 64):
        part = slice(first, first + 64)
        keep = right[part]
        ids = [first + i for i in keep.nonzero().flatten().tolist()]
        attack.run(target, case.x[part][keep], case.y[part][keep], threat, Rng(0, ids))
    return time.perf_counter() - start


def with_referee(data: Path, folder: Path, number: int) -> float:
    """Returns the seconds of the same through the referee, into a fresh run directory."""
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
    store = Store(folder / f"run{number}")
    start = time.perf_counter()
    list(run_cell(job, 0, plan, store.cell(job.key), CleanPredictions(plan.batch_size)))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
