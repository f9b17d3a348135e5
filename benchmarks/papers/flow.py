"""The flow-gradient paper again: trains its defences, attacks them through the referee, and draws its figures.

    ROBPLUG_DATA=FOLDER python benchmarks/papers/flow.py small
    ROBPLUG_DATA=FOLDER python benchmarks/papers/flow.py paper

FOLDER has the files of MNIST (small) or CIFAR-10 (paper). What is finished is not done again: trained weights, and the
cells of the plan beside this file. Results and figures go to results/ and docs/papers/. The networks begin elsewhere
than those of ``robplug train`` with the recipes beside this file, so that weights differ.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import robplug
from robplug.defenses import Defense
from robplug.plugins import registry
from robplug.referee.plan import read_toml
from robplug.referee.results import Results
from robplug.rng import Rng
from robplug.step import cross_entropy
from robplug.training import fit
from robplug.training_plan import TrainPlan, load_train_plan
from robplug_flow.attack import MultiStep
from robplug_flow.kernels.ops import warp
from robplug_flow.units import to_normalized, to_pixels

sys.path.insert(0, str(Path(__file__).parents[1]))
from schema import Result, Row, surroundings, write

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "papers"


@dataclass(frozen=True)
class Size:
    """What differs between the paper's experiment and the small one.

    Attributes:
        name: of the plan beside this file.
        recipe: the training plan whose defences are replaced.
        at: linf radius of adversarial training.
        adt: flow radius of adversarial deformation training, normalised.
        reach: largest flow along the loss surfaces, normalised.
    """

    name: str
    recipe: str
    at: float
    adt: float
    reach: float


SIZES = {
    "small": Size("flow-small", "flow-small-train", at=0.1, adt=0.03, reach=0.06),
    "paper": Size("flow", "flow-train", at=8 / 255, adt=0.01, reach=0.02),
}
COLOURS = {"standard": "k", "AT": "tab:gray", "IGR": "tab:orange", "ADT": "tab:green", "FGR": "tab:blue"}
WIDTHS = {"400": 0.8, "3000": 0.8, "700": 1.4, "5000": 1.4}
SIDE = 15
SURFACE_IMAGES = 200


def stack(defence: str, size: Size) -> list[Defense]:
    """Returns the defences of a row of table 1, such as ``"FGR 400 + ADT"``; numbers are the paper's lambda."""
    found = []
    for part in defence.split(" + ") if defence != "standard" else []:
        name, _, strength = part.partition(" ")
        if name == "AT":
            found.append(robplug.defense("robplug/at", eps=size.at, steps=7))
        elif name == "ADT":
            found.append(robplug.defense("flow/adt", eps=size.adt, steps=7))
        else:
            found.append(robplug.defense(f"flow/{name.lower()}", strength=float(strength), normalisation="paper"))
    return found


def train(target: dict[str, Any], size: Size) -> str:
    """Trains one target of the plan, if it has no weights yet; returns its name."""
    name, out = target["name"], Path(target["weights"]).parent
    if not Path(target["weights"]).exists():
        recipe: TrainPlan = load_train_plan(HERE / f"{size.recipe}.toml")
        options = recipe.options
        entry = recipe.dataset
        data = robplug.dataset(entry.name, split=entry.split)
        augmented = [d for d in recipe.defenses if d.name == "robplug/crop-flip"]
        defences = [*(robplug.defense(d.name, **d.params) for d in augmented), *stack(name.partition(", ")[2], size)]
        torch.manual_seed(options["seed"])
        fit(network(target), data.head(entry.samples or len(data)), defences, out=out, resume=True, **options)
    return name


def network(target: dict[str, Any]) -> nn.Module:
    """Returns the untrained network of a target."""
    return registry().named_target(target["make"])


def trained(target: dict[str, Any]) -> nn.Module:
    """Returns the trained network of a target."""
    from safetensors.torch import load_file

    model = network(target)
    model.load_state_dict(load_file(target["weights"]))
    return model.eval()


@torch.no_grad()
def surface(model: nn.Module, x: Tensor, y: Tensor, size: Size) -> Tensor:
    """Returns the mean loss, (SIDE, SIDE), along each image's adversarial flow (rows) and a random one (columns).

    Both have displacements of one size; the adversarial flow is that of the multi-step attack at the largest radius.
    """
    threat = robplug.ThreatModel("flow-normalized", size.reach)
    attack = MultiStep(restarts=1, early_stop=False)
    found = attack.run(robplug.target(model), x, y, threat, Rng(0, range(len(x)))).witness
    assert found is not None  # every flow attack shows its flow
    adversarial = to_normalized(found) / size.reach
    random = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).sign()
    axis = torch.linspace(-size.reach, size.reach, SIDE)
    moved = [[warp(x, to_pixels(a * adversarial + b * random)) for b in axis] for a in axis]
    return torch.tensor([[cross_entropy(model(images), y).mean() for images in line] for line in moved])


def draw_surfaces(found: dict[str, Tensor], size: Size, path: Path) -> None:
    """Draws figure 3: one map per defence on one scale of colours."""
    columns = 4
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.2 * lines + 0.5), layout="constrained")
    top = max(float(values.max()) for values in found.values())
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    reach = (-size.reach, size.reach, -size.reach, size.reach)
    for place, (name, values) in zip(axes.flat, found.items(), strict=False):
        image = place.imshow(values.numpy(), origin="lower", extent=reach, vmin=0, vmax=top, cmap="magma")
        place.set_title(name, fontsize=9)
    for place in axes[-1]:
        place.set_xlabel("random flow", fontsize=8)
    for place in axes[:, 0]:
        place.set_ylabel("adversarial flow", fontsize=8)
    figure.colorbar(image, ax=axes, label="mean loss", shrink=0.8)
    figure.savefig(path, metadata={"Date": None})


def draw_curves(summary: Any, names: list[str], path: Path) -> None:
    """Draws figure 2: accuracy under the multi-step attack over the radius, and under stAdv over the balance."""
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        defence = name.partition(", ")[2]
        colour = "tab:red" if "+" in defence else COLOURS[defence.partition(" ")[0]]
        width = WIDTHS.get(defence.removesuffix(" + ADT").rpartition(" ")[2], 2.0)
        look = {"color": colour, "linewidth": width, "marker": ".", "label": defence}
        cells = [c for c in summary.cells if summary.subjects[c.subject].target == name]
        by_multi = [c for c in cells if is_by(summary, c, "flow/multi-step") and c.eps]
        multi = sorted((c.eps, c.robust_accuracy.value) for c in by_multi)
        clean = next(c.clean.value for c in cells)
        left.plot([0, *(eps for eps, _ in multi)], [clean, *(value for _, value in multi)], **look)
        right.plot(*zip(*over_balance(summary, cells), strict=True), **look)
    left.set(xlabel="radius, normalised", ylabel="accuracy under flow/multi-step", ylim=(0, 1))
    right.set(xlabel="balance c = 1/tau", ylabel="accuracy under flow/stadv, any distance", xscale="log", ylim=(0, 1))
    left.legend(fontsize=7, ncols=2)
    figure.savefig(path, metadata={"Date": None})


def is_by(summary: Any, cell: Any, name: str) -> bool:
    """Whether a cell is of an attack, whatever its parameters."""
    return bool(summary.attack(cell.attack).name.startswith(name))


def over_balance(summary: Any, cells: list[Any]) -> list[tuple[float, float]]:
    """Returns (c, accuracy under flow/stadv at any distance), c = 1/tau, ascending."""
    found = set()
    for cell in cells:
        if is_by(summary, cell, "flow/stadv"):
            tau = re.search(r"tau=([\d.e-]+)", summary.attack(cell.attack).name)
            assert tau is not None  # the plan has several, so the name says which
            found.add((1 / float(tau[1]), (cell.robust - cell.beyond) / cell.samples))
    return sorted(found)


def main() -> None:
    """Trains, attacks, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    options = parser.parse_args()
    size = SIZES[options.size]
    plan = HERE / f"{size.name}.toml"
    targets = read_toml(plan)["targets"]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name in pool.map(train, targets, [size] * len(targets)):
            print("trained", name, flush=True)
    subprocess.run([Path(sys.executable).with_name("robplug"), "run", plan], check=True)
    results = Results(read_toml(plan)["out"])
    results.export()
    shutil.copy(results.path / "summary.csv", HERE / "results" / f"{size.name}.csv")
    summary = results.summary()
    entry = load_train_plan(HERE / f"{size.recipe}.toml").dataset
    data = robplug.dataset(entry.name, split="test").head(SURFACE_IMAGES)
    PAGES.mkdir(exist_ok=True)
    rows = []
    for prefix in dict.fromkeys(target["name"].partition(", ")[0] for target in targets):
        mine = [target for target in targets if target["name"].startswith(f"{prefix}, ")]
        found = {t["name"].partition(", ")[2]: surface(trained(t), data.x, data.y, size) for t in mine}
        stem = f"{size.name}-{prefix.lower()}"
        draw_surfaces(found, size, PAGES / f"{stem}-surfaces.svg")
        draw_curves(summary, [target["name"] for target in mine], PAGES / f"{stem}-curves.svg")
        rows += [surface_row(prefix, defence, values, found["standard"]) for defence, values in found.items()]
    result = Result(
        benchmark=size.name,
        command=f"ROBPLUG_DATA=DATA python benchmarks/papers/flow.py {options.size}",
        settings={"side": SIDE, "images": len(data), "reach": size.reach, "at": size.at, "adt": size.adt},
        rows=rows,
        findings=[],
        **surroundings(),
    )
    write(result, HERE / "results" / f"{size.name}.json")


def surface_row(prefix: str, defence: str, values: Tensor, standard: Tensor) -> Row:
    """Returns the row of one loss surface: its amplitude, the difference between its highest and lowest point."""
    amplitude = float(values.max() - values.min())
    middle = SIDE // 2
    return Row(
        case=f"loss surface, {prefix}",
        contender=defence,
        median=amplitude,
        low=float(values.min()),
        high=float(values.max()),
        unit="nats",
        ratio=round(amplitude / float(standard.max() - standard.min()), 4),
        relative_to="standard",
        extra={
            "clean": round(float(values[middle, middle]), 4),
            "adversarial": round(float(np.ptp(values[:, middle].numpy())), 4),
            "random": round(float(np.ptp(values[middle].numpy())), 4),
        },
    )


if __name__ == "__main__":
    main()
