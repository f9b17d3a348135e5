"""AdvProp on the 8x8 digits with 100 training images, beside clean training and its controls, seed by seed.

    python plugins/robplug-advprop/benchmarks/digits.py

A seed draws the training images, the first weights and the order; all contenders of a seed have the same, and make as
many updates. Test images are all others, 1,697.

The recipe was chosen on seeds 100 to 104: learning rate (of .02, .05, .1), epochs (60, 120) and batch size (20, 50) as
best for clean training, then eps (.05, .1, .2) for AdvProp. The seeds of the result were run once. Radii are in units
of the whole range [0, 1]: the paper's 1/255 to 4/255 are for photographs, and grey levels are 1/16 apart here.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor, nn

import robplug
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.rng import Rng
from robplug.step import Step
from robplug.training import fit
from robplug_advprop import keep_only
from robplug_advprop.defense import AdvProp, VanillaMixing

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, surroundings, write

TRAIN = 100
PLAIN, DOUBLE = "clean", "clean, loss doubled"
MIXING, MIXING_MEAN = "vanilla mixing", "vanilla mixing, mean"
ADVPROP, ADVPROP_MEAN = "AdvProp", "AdvProp, mean"
AUXILIARY, AUXILIARY_MEAN = "AdvProp, MBN_adv", "AdvProp, mean, MBN_adv"
COMPARED = (
    (ADVPROP, PLAIN),
    (ADVPROP, DOUBLE),
    (ADVPROP_MEAN, PLAIN),
    (ADVPROP, MIXING),
    (ADVPROP_MEAN, MIXING_MEAN),
    (MIXING, PLAIN),
    (ADVPROP, AUXILIARY),
    (ADVPROP_MEAN, AUXILIARY_MEAN),
)
"""Pairs whose difference is reported: first minus second."""


@dataclass(frozen=True)
class Doubled(Defense):
    """Clean training with twice the loss: the gradient scale of L_c + L_a."""

    def objective(self, step: Step) -> Tensor:
        """Returns twice the mean loss."""
        return 2 * step.clean().loss.mean()


def network() -> nn.Module:
    """Returns three convolutions with batch norm, 8x8 to 4x4, and a linear layer on the mean: 24,154 parameters."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def contenders(eps: float, steps: int) -> dict[str, Defense | None]:
    """Returns the defence of each contender; None is clean training."""
    attack = {"eps": eps, "steps": steps, "step_size": 2 * eps / steps}
    return {
        PLAIN: None,
        DOUBLE: Doubled(),
        MIXING: VanillaMixing(**attack),
        MIXING_MEAN: VanillaMixing(**attack, average=True),
        ADVPROP: AdvProp(**attack, keep="all"),
        ADVPROP_MEAN: AdvProp(**attack, average=True, keep="all"),
    }


def split(seed: int) -> tuple[Dataset, Dataset]:
    """Returns the training and the test images of a seed."""
    data = robplug.dataset("digits", split="all")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.take(order[:TRAIN]), data.take(order[TRAIN:])


def accuracy(model: nn.Module, data: Dataset, eps: float = 0.0) -> float:
    """Returns the accuracy in per cent, clean or under 20 steps of PGD."""
    x = data.x
    if eps:
        threat = robplug.ThreatModel("linf", eps)
        x = robplug.attack("robplug/pgd").run(robplug.target(model), x, data.y, threat, Rng(0, range(len(x)))).x_adv
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == data.y).float().mean())


def measure(seed: int, options: argparse.Namespace) -> list[Row]:
    """Trains all contenders of a seed and returns their rows."""
    train, test = split(seed)
    networks: dict[str, nn.Module] = {}
    how = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr, "seed": seed}
    for name, defense in contenders(options.eps, options.steps).items():
        if options.only and name not in options.only:
            continue
        torch.manual_seed(seed)
        networks[name] = fit(network(), train, [defense] if defense else [], threads=1, **how)
    for name, auxiliary in ((ADVPROP, AUXILIARY), (ADVPROP_MEAN, AUXILIARY_MEAN)):
        if name in networks:
            networks[auxiliary] = keep_only(copy.deepcopy(networks[name]), 1)
            keep_only(networks[name], "main")
    found = []
    for name, model in networks.items():
        clean = accuracy(model, test)
        extra: dict[str, float | int | str] = {
            "pgd": round(accuracy(model, test, options.eps), 2),
            "train": round(accuracy(model, train), 2),
        }
        shape = {"median": clean, "low": clean, "high": clean, "unit": "% clean", "ratio": 1.0, "relative_to": PLAIN}
        found.append(Row(case=f"seed {seed}", contender=name, extra=extra, **shape))
    for row in found:
        row.ratio = round(row.median / found[0].median, 4)
        print(row.case, f"{row.contender:24}", f"{row.median:.2f}", row.extra, flush=True)
    return found


def interval(differences: list[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval, by Student's t."""
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), float(student.ppf(0.975, len(differences) - 1)) * spread


def findings(rows: list[Row]) -> list[str]:
    """Returns the means, and the paired differences with their intervals."""
    names = list(dict.fromkeys(row.contender for row in rows))
    clean = {name: [row.median for row in rows if row.contender == name] for name in names}
    pgd = {name: [float(row.extra["pgd"]) for row in rows if row.contender == name] for name in names}
    said = [
        f"{name}: clean {statistics.mean(clean[name]):.2f} %, PGD {statistics.mean(pgd[name]):.2f} %" for name in names
    ]
    for first, second in COMPARED:
        if first in clean and second in clean:
            mean, half = interval([a - b for a, b in zip(clean[first], clean[second], strict=True)])
            verdict = "above 0" if mean - half > 0 else "below 0" if mean + half < 0 else "not told from 0"
            said.append(f"{first} - {second}: {mean:+.2f} +- {half:.2f} points, {verdict}")
    return said


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in options.seeds for row in measure(seed, options)]
    result = Result(
        benchmark="digits",
        command="python plugins/robplug-advprop/benchmarks/digits.py",
        settings={key: value for key, value in vars(options).items() if key not in ("out", "only")},
        rows=rows,
        findings=findings(rows),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()
