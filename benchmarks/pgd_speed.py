"""Time of a PGD step: robplug beside a plain hand-written loop, torchattacks, Foolbox and ART, in one run.

    python benchmarks/pgd_speed.py --data FOLDER

FOLDER has ``mnist/`` (idx files) and ``cifar10/test_jpeg.npz``, ``models/resnet20-12fca82f.th``; without it only the
digits are measured. Each round goes through all contenders in a new order; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.referee.load import load_weights
from robplug.rng import Rng
from robplug.training import fit
from robplug.zoo import digits_cnn, lenet, resnet20
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

STEPS = 20
LOOP = "plain loop"
PEERS = ("torchattacks", "foolbox", "art")
QUARTILES = ("low", "median", "high")


@dataclass
class Case:
    """A network, its images and a radius."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float


def plain_loop(case: Case) -> Tensor:
    """PGD as one writes it by hand: the yardstick."""
    x, x_adv, alpha = case.x, case.x.clone(), 2.5 * case.eps / STEPS
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = F.cross_entropy(case.model(x_adv), case.y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + alpha * gradient.sign()
        x_adv = (x + (x_adv - x).clamp(-case.eps, case.eps)).clamp(0, 1)
    return x_adv


def contenders(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Returns each library called as its users call it, with one and the same PGD."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    alpha = 2.5 * case.eps / STEPS
    target = robplug.target(case.model)
    threat = robplug.ThreatModel("linf", case.eps)
    rng = Rng(0, range(len(case.x)))
    every = robplug.attack("robplug/pgd", steps=STEPS, random_start=False, early_stop=False)
    leaving = robplug.attack("robplug/pgd", steps=STEPS, random_start=False)
    peer = torchattacks.PGD(case.model, eps=case.eps, alpha=alpha, steps=STEPS, random_start=False)
    fmodel = foolbox.PyTorchModel(case.model, bounds=(0, 1))
    fpgd = foolbox.attacks.LinfPGD(rel_stepsize=alpha / case.eps, steps=STEPS, random_start=False)
    estimator = PyTorchClassifier(
        case.model, nn.CrossEntropyLoss(), tuple(case.x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    art = ProjectedGradientDescentPyTorch(
        estimator, eps=case.eps, eps_step=alpha, max_iter=STEPS, batch_size=len(case.x), verbose=False
    )
    x, y = case.x.numpy(), case.y.numpy()
    return {
        LOOP: lambda: plain_loop(case),
        "robplug": lambda: every.run(target, case.x, case.y, threat, rng).x_adv,
        "robplug, broken leave": lambda: leaving.run(target, case.x, case.y, threat, rng).x_adv,
        "torchattacks": lambda: peer(case.x, case.y),
        "foolbox": lambda: fpgd.run(fmodel, case.x, foolbox.criteria.Misclassification(case.y), epsilon=case.eps),
        "art": lambda: torch.from_numpy(art.generate(x, y)),
    }


def digits() -> Case:
    data = robplug.dataset("digits", split="test").head(256)
    model = digits_cnn()
    fit(model, robplug.dataset("digits", split="train"), epochs=10, seed=0, threads=1)
    return Case("digits CNN", model.eval(), data.x, data.y, 0.15)


def mnist(folder: Path) -> Case:
    train = robplug.dataset("mnist", split="train", root=str(folder / "mnist")).head(10_000)
    test = robplug.dataset("mnist", split="test", root=str(folder / "mnist")).head(256)
    model = lenet()
    fit(model, train, epochs=2, seed=0)
    return Case("MNIST LeNet", model.eval(), test.x, test.y, 0.2)


def cifar(folder: Path) -> Case:
    from PIL import Image

    with np.load(folder / "cifar10" / "test_jpeg.npz") as archive:
        blob, offsets, labels = archive["blob"], archive["offsets"], archive["labels"]
    parts = [blob[offsets[i] : offsets[i + 1]].tobytes() for i in range(256)]
    images = np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    model = resnet20(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    load_weights(model, folder / "models" / "resnet20-12fca82f.th")
    return Case("CIFAR ResNet-20", model.eval(), x, torch.from_numpy(labels[:256].astype(np.int64)), 2 / 255)


def measure(case: Case, repeats: int) -> list[Row]:
    runs = contenders(case)
    accuracy = {}
    for name, run in runs.items():
        x_adv = run()
        with torch.no_grad():
            accuracy[name] = float((case.model(x_adv).argmax(1) == case.y).float().mean())
    spread = max(v for k, v in accuracy.items() if k != "robplug, broken leave") - min(accuracy.values())
    if spread > 2 / len(case.x):
        raise SystemExit(f"{case.name}: the contenders do not do the same: {accuracy}; no time is printed")
    times = timed(runs, repeats)
    found = rows(case.name, times, LOOP, scale=1000 / STEPS, unit="ms/step")
    for row in found:
        row.extra = {"robust_accuracy": round(accuracy[row.contender], 4), "batch": len(case.x)}
        if row.contender in PEERS:  # robplug's time over this peer's, round by round
            over = statistics.quantiles([a / b for a, b in zip(times["robplug"], times[row.contender], strict=True)])
            row.extra |= {
                f"robplug_over_it_{name}": round(value, 4) for name, value in zip(QUARTILES, over, strict=True)
            }
    return found


def findings(found: list[Row]) -> list[str]:
    said = []
    for case in dict.fromkeys(row.case for row in found):
        by = {row.contender: row for row in found if row.case == case}
        best = min((by[name] for name in PEERS), key=lambda row: row.ratio)
        leaving = by["robplug, broken leave"]
        low, middle, high = (float(best.extra[f"robplug_over_it_{name}"]) for name in QUARTILES)
        verdict = "WIN" if high <= 1 else "LOSS" if low > 1 else "as fast, within the spread of rounds"
        said.append(
            f"{case}: robplug x{middle:.3f} the fastest peer, {best.contender} ({low:.3f} to {high:.3f}): {verdict}"
        )
        gain = best.ratio / leaving.ratio
        accuracy = leaving.extra["robust_accuracy"]
        said.append(f"{case}: broken samples leave: {gain:.2f} times less time than it at robust accuracy {accuracy}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist/, cifar10/ and models/")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pgd_speed.json")
    options = parser.parse_args()
    heap = keep_heap()
    cases = [digits(), *([mnist(options.data), cifar(options.data)] if options.data else [])]
    found = [row for case in cases for row in measure(case, options.repeats)]
    result = Result(
        benchmark="pgd_speed",
        command=f"python benchmarks/pgd_speed.py{' --data DATA' * bool(options.data)} --repeats {options.repeats}",
        settings={"steps": STEPS, "repeats": options.repeats, "random_start": False, "norm": "linf", "heap": heap},
        rows=found,
        findings=findings(found),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    sys.exit(main())
