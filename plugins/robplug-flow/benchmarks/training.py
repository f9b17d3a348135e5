"""Training on MNIST with the paper's defences: test penalty, and accuracy under flow attacks, seed by seed.

    python plugins/robplug-flow/benchmarks/training.py --data FOLDER

FOLDER has ``mnist/`` (idx files). LeNet, 20,000 images, three epochs of Adam; the budget is 0.03 in the paper's
normalised units, 0.405 pixel. A defence that only hides the gradient shows in the attack without gradients and in
random starts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

import robplug
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.rng import Rng
from robplug.step import Step
from robplug.training import fit
from robplug.types import Attack, ThreatModel
from robplug.zoo import lenet
from robplug_flow.attack import MultiStep, SingleStep
from robplug_flow.defense import FlowGradientRegularization
from robplug_flow.gradient_free import GradientFree

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, surroundings, write

PLAIN, EXACT, DIFFERENCE = "plain", "fgr", "fgr, difference"
STACKS: dict[str, list[str | Defense]] = {
    PLAIN: [],
    EXACT: ["flow/fgr"],
    DIFFERENCE: [FlowGradientRegularization(gradient="difference")],
    "igr": ["flow/igr"],
    "adt": ["flow/adt"],
    "adt + fgr": ["flow/adt", "flow/fgr"],
    "at": ["robplug/at"],
}
ATTACKS: dict[str, Attack] = {
    "single": SingleStep(),
    "multi": MultiStep(restarts=1),
    "random5": MultiStep(random_start=True, restarts=5),
    "free": GradientFree(),
}
EPS = 0.03


def penalty(model: nn.Module, data: Dataset) -> float:
    """Returns the mean squared flow gradient, in normalised units, over a data set."""
    total = 0.0
    for x, y in zip(data.x.split(250), data.y.split(250), strict=True):
        found = FlowGradientRegularization(1.0).penalty(Step(model, x, y, Rng(0, range(len(x)))))
        total += float(found.detach()) * len(x)
    return total / len(data)


def accuracy(model: nn.Module, data: Dataset, attack: Attack | None = None) -> float:
    """Returns the accuracy, clean or under an attack."""
    x = data.x
    if attack is not None:
        threat, target = ThreatModel("flow-normalized", EPS), robplug.target(model)
        parts = zip(x.split(250), data.y.split(250), strict=True)
        found = [
            attack.run(target, a, b, threat, Rng(0, range(250 * i, 250 * i + len(a)))) for i, (a, b) in enumerate(parts)
        ]
        x = torch.cat([one.x_adv for one in found])
    with torch.no_grad():
        return float((model(x).argmax(1) == data.y).float().mean())


def measure(name: str, seed: int, train: Dataset, test: Dataset, free: int, epochs: int, lr: float) -> Row:
    """Trains one network and returns its row; ratio is that of penalties and is set once the plain one is known."""
    torch.manual_seed(seed)
    model = fit(lenet(), train, STACKS[name], epochs=epochs, optimizer="adam", lr=lr, weight_decay=0.0, seed=seed)
    extra: dict[str, float | int | str] = {"clean": round(accuracy(model, test), 4)}
    extra["penalty"] = round(penalty(model, test), 4)
    for attack, made in ATTACKS.items():
        extra[attack] = round(accuracy(model, test.head(free) if attack == "free" else test, made), 4)
    multi = float(extra["multi"])
    values = {"median": multi, "low": multi, "high": multi, "unit": "acc, MS", "ratio": 1.0, "relative_to": PLAIN}
    found = Row(case=f"seed {seed}", contender=name, extra=extra, **values)
    print(found.case, name, extra, flush=True)
    return found


def findings(rows: list[Row]) -> list[str]:
    """Returns, seed by seed, whether what was asked of the penalty holds."""
    said = []
    for case in dict.fromkeys(row.case for row in rows):
        by = {row.contender: row for row in rows if row.case == case}
        if PLAIN not in by or EXACT not in by:
            continue
        plain, exact = by[PLAIN].extra, by[EXACT].extra
        gain = {key: 100 * (float(exact[key]) - float(plain[key])) for key in (*ATTACKS, "clean")}
        kept = by[EXACT].ratio <= 0.5 and gain["multi"] >= 8 and gain["clean"] >= -2
        detail = ", ".join(f"{key} {points:+.1f}" for key, points in gain.items())
        said.append(f"{case}: fgr: penalty x{by[EXACT].ratio:.2f}; points: {detail}: {'WIN' if kept else 'LOSS'}")
        if not (gain["random5"] > 0 and gain["free"] > 0):
            said.append(
                f"{case}: fgr: the gain under gradients is not seen without them or from random starts: masking"
            )
        if DIFFERENCE in by:
            other = by[DIFFERENCE]
            share = float(other.extra["penalty"]) / float(exact["penalty"])
            points = 100 * (float(other.extra["multi"]) - float(exact["multi"]))
            near = "WIN" if share <= 1.1 and points >= -2 else "LOSS"
            said.append(f"{case}: difference beside exact: penalty x{share:.2f}, multi {points:+.1f} points: {near}")
    return said


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/")
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--free", type=int, default=200, help="test images for the attack without gradients")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--defenses", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    options = parser.parse_args()
    root = str(options.data / "mnist")
    train = robplug.dataset("mnist", split="train", root=root).head(options.train)
    test = robplug.dataset("mnist", split="test", root=root).head(options.test)
    rows = []
    for seed in options.seeds:
        cases = [
            measure(name, seed, train, test, options.free, options.epochs, options.lr) for name in options.defenses
        ]
        plain = next((row for row in cases if row.contender == PLAIN), cases[0])
        for row in cases:
            row.ratio = round(float(row.extra["penalty"]) / float(plain.extra["penalty"]), 4)
            row.relative_to = plain.contender
        rows += cases
    settings = {key: getattr(options, key) for key in ("train", "test", "free", "epochs", "lr", "seeds")}
    result = Result(
        benchmark="training",
        command="python plugins/robplug-flow/benchmarks/training.py --data DATA --defenses "
        + shlex.join(options.defenses),
        settings={**settings, "eps_normalized": EPS, "batch_size": 128, "optimizer": "adam"},
        rows=rows,
        findings=findings(rows),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()
