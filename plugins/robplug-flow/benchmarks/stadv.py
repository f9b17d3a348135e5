"""flow/stadv on MNIST beside a plain L-BFGS written from the equations, at equal tau and kappa.

    python plugins/robplug-flow/benchmarks/stadv.py --data FOLDER

FOLDER has ``mnist/`` (idx files). A LeNet is trained without defence, and images that it classifies correctly are
attacked, untargeted. The plain L-BFGS is torch's, image by image from no flow, and its last iterate counts. Total
variation is compared over the images that both break.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.rng import Rng
from robplug.training import fit
from robplug.types import ThreatModel
from robplug.zoo import lenet
from robplug_flow import total_variation
from robplug_flow.stadv import StAdv

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, surroundings, write

PLAIN = "plain L-BFGS, last iterate"
SGD, LBFGS = "flow/stadv, sgd", "flow/stadv, lbfgs"


def grid_warp(x: Tensor, flow: Tensor) -> Tensor:
    """Bilinear sampling as one writes it with grid_sample: flow in pixels, (row, column)."""
    height, width = x.shape[2:]
    down = torch.arange(height)[:, None] + flow[:, 0]
    right = torch.arange(width) + flow[:, 1]
    grid = torch.stack([right * (2 / (width - 1)) - 1, down * (2 / (height - 1)) - 1], dim=-1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def flow_loss(flow: Tensor) -> Tensor:
    """The sum over pixels and their four neighbours of sqrt(du^2 + dv^2 + 1e-8); each pair counts twice."""
    down, right = flow[:, :, 1:] - flow[:, :, :-1], flow[:, :, :, 1:] - flow[:, :, :, :-1]
    return sum(2 * (step.square().sum(1) + 1e-8).sqrt().sum() for step in (down, right))  # type: ignore[return-value]


def plain_lbfgs(model: nn.Module, x: Tensor, y: Tensor, tau: float, kappa: float, steps: int) -> Tensor:
    """Returns the flows, (N, 2, H, W) in pixels, that minimise L_adv + tau * L_flow; tau is per pixel."""
    flows = []
    for image, label in zip(x.split(1), y.tolist(), strict=True):
        flow = torch.zeros(1, 2, *x.shape[2:], requires_grad=True)
        optimizer = torch.optim.LBFGS([flow], max_iter=steps, line_search_fn="strong_wolfe")

        def closure(flow: Tensor = flow, image: Tensor = image, label: int = label) -> Tensor:
            logits = model(grid_warp(image, flow).clamp(0, 1))[0]
            others = torch.cat([logits[:label], logits[label + 1 :]])
            loss = (logits[label] - others.max()).clamp(min=-kappa) + tau * flow_loss(flow)
            (flow.grad,) = torch.autograd.grad(loss, flow)
            return loss

        optimizer.step(closure)
        flows.append(flow.detach())
    return torch.cat(flows)


@dataclass
class Found:
    """What a contender found.

    Attributes:
        broken: (N,) bool.
        variation: (N,) total variation in pixels.
        largest: (N,) max |v| in pixels.
        seconds: wall clock.
    """

    broken: Tensor
    variation: Tensor
    largest: Tensor
    seconds: float


@torch.no_grad()
def judged(model: nn.Module, x_adv: Tensor, y: Tensor, flow: Tensor, seconds: float) -> Found:
    """Looks at what was found: predictions are the network's own."""
    broken = model(x_adv).argmax(1) != y
    return Found(broken, total_variation(flow), flow.abs().flatten(1).amax(1), seconds)


def network(folder: Path, images: int) -> nn.Module:
    """Returns a LeNet trained without defence on the first images of MNIST."""
    train = robplug.dataset("mnist", split="train", root=str(folder / "mnist")).head(images)
    torch.manual_seed(0)
    model = fit(lenet(), train, epochs=3, optimizer="adam", lr=0.003, weight_decay=0.0, seed=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def row(name: str, found: Found, plain: Found) -> Row:
    """Returns the total variation over the images that it and the plain L-BFGS break; ratio is that of means."""
    both = found.broken & plain.broken
    if not bool(both.any()):
        raise SystemExit(f"{name}: no image that both break, so nothing to compare; train with more images")
    variation, other = found.variation[both].double(), plain.variation[both].double()
    low, median, high = (float(value) for value in variation.quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
    extra: dict[str, float | int | str] = {
        "success": round(float(found.broken.float().mean()), 4),
        "mean_tv": round(float(variation.mean()), 3),
        "both": int(both.sum()),
        "max_v": round(float(found.largest[found.broken].mean()), 3),
        "seconds": round(found.seconds, 1),
    }
    ratio = round(float(variation.mean() / other.mean()), 4)
    values = {"median": median, "low": low, "high": high, "unit": "TV, px", "ratio": ratio, "relative_to": PLAIN}
    return Row(case="MNIST LeNet", contender=name, extra=extra, **values)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stadv.json")
    options = parser.parse_args()
    model, attack = network(options.data, options.train), StAdv(steps=options.steps)
    test = robplug.dataset("mnist", split="test", root=str(options.data / "mnist")).head(2 * options.images)
    with torch.no_grad():
        right = model(test.x).argmax(1) == test.y
    x, y = test.x[right][: options.images], test.y[right][: options.images]
    tau = attack.tau / ((x.shape[-1] - 1) / 2)  # of pixels

    def ours(optimizer: str) -> Callable[[], Found]:
        def run() -> Found:
            start = time.perf_counter()
            chosen = StAdv(steps=options.steps, optimizer=optimizer)  # type: ignore[arg-type]
            found = chosen.run(robplug.target(model), x, y, ThreatModel("flow"), Rng(0, range(len(x))))
            return judged(model, found.x_adv, y, cast(Tensor, found.witness), time.perf_counter() - start)

        return run

    def plain() -> Found:
        start = time.perf_counter()
        flow = plain_lbfgs(model, x, y, tau, attack.kappa, options.steps)
        return judged(model, grid_warp(x, flow).clamp(0, 1), y, flow, time.perf_counter() - start)

    contenders = {PLAIN: plain, SGD: ours("sgd"), LBFGS: ours("lbfgs")}
    found = {name: run() for name, run in contenders.items()}
    rows = [row(name, one, found[PLAIN]) for name, one in found.items()]
    mine = rows[1]
    won = {"success >= 0.99": float(mine.extra["success"]) >= 0.99, "mean TV <= 1.05x": mine.ratio <= 1.05}
    result = Result(
        benchmark="stadv",
        command="python plugins/robplug-flow/benchmarks/stadv.py --data DATA",
        settings={
            "images": len(x),
            "train": options.train,
            "steps": options.steps,
            "tau_pixel": tau,
            "kappa": attack.kappa,
        },
        rows=rows,
        findings=[f"{SGD}: {what}: {'WIN' if kept else 'LOSS'}" for what, kept in won.items()],
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()
