"""Dense adversaries on two cores: trains networks for two tasks, attacks them through the referee, draws the figures.

    python benchmarks/papers/dag.py

What is finished is not done again: weights, and the cells of the plans ``dag-small*.toml``. Figures and pictures go to
``docs/papers/``, shares of every source and victim to ``results/dag-small*.csv``, and the convergence of every attack
with its perceptibility to ``results/dag-small.json``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dag_pictures import draw_pictures
from matplotlib.figure import Figure

import robplug
from robplug.referee.pictures import read_arrays
from robplug.referee.plan import read_toml
from robplug.referee.quality import quality
from robplug.referee.results import Results
from robplug.referee.rundir import StoredCell, load_run
from robplug.tasks import OVERLAP, PADDING, overlap
from robplug.vision.shapes import HUES

sys.path.insert(0, str(Path(__file__).parents[1]))
from schema import Result, Row, surroundings, write

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "papers"
ROBPLUG = Path(sys.executable).with_name("robplug")
TRAINED = [f"{network}-{subset}" for network in ("fcn", "unet", "plain", "residual") for subset in ("a", "b")]
PLANS = ("", "-rules", "-density", "-peers")
COLOURS = {"FCN": "tab:blue", "U-Net": "tab:orange", "plain": "tab:green", "residual": "tab:red"}
IMAGES, CONTRAST = 128, 0.04
RULES = {"label": "-", "goal": "--"}


def train(name: str) -> str:
    """Trains a network by its recipe, unless it is there; returns its name."""
    recipe = HERE / f"dag-small-train-{name}.toml"
    if not (Path(read_toml(recipe)["out"]) / "weights.safetensors").exists():
        subprocess.run([ROBPLUG, "train", recipe], check=True)
    return name


def run(plan: str) -> Path:
    """Runs a plan, or what is left of it, and keeps its shares; returns its run directory."""
    path = HERE / f"dag-small{plan}.toml"
    subprocess.run([ROBPLUG, "run", path], check=True)
    results = Results(read_toml(path)["out"])
    results.export()
    shutil.copy(results.path / "transfer.csv", HERE / "results" / f"dag-small{plan}.csv")
    return results.path


def trace(cell: StoredCell) -> np.ndarray[Any, Any]:
    """Returns the number of active targets of each image before each step, (N, steps)."""
    files = [cell.path / f"trace-{chunk['index']:05d}.safetensors" for chunk in cell.record["chunks"]]
    return np.concatenate([read_arrays(path, ("trace",))["trace"] for path in files])


def figure(cell: StoredCell) -> tuple[str, float, float]:
    """Returns the name of the figure that is asked for most, before and after the attack, in per cent."""
    name, (before, after) = next(iter(quality(cell, cell.readings[0]).items()))
    return name, 100 * before, 100 * after


def colour_kept(cell: StoredCell) -> float:
    """Returns the share of classes in images whose mean colour under attack is still nearest to the class's own."""
    pixels = robplug.dataset("shapes", samples=IMAGES).y
    prototypes = 0.5 + CONTRAST * torch.tensor([(0, 0, 0), *HUES.values()][:4], dtype=torch.float32)
    kept = []
    for chunk in cell.record["chunks"]:
        arrays = read_arrays(cell.path / f"adversarials-{chunk['index']:05d}.safetensors", ("sample", "x_adv"))
        for sample, image in zip(arrays["sample"].tolist(), torch.from_numpy(arrays["x_adv"]), strict=True):
            for label in pixels[sample].unique()[1:]:  # the first is the background
                mean = image[:, pixels[sample] == label].mean(1)
                kept.append(bool((prototypes - mean).norm(dim=1).argmin() == label))
    return float(np.mean(kept))


def right_scores(cell: StoredCell) -> list[float]:
    """Returns of each box the best score of a detection of its class and place under attack, 0 where there is none."""
    boxes = robplug.dataset("shapes", samples=IMAGES).labels("detection")
    scores: list[float] = []
    for chunk in cell.record["chunks"]:
        arrays = read_arrays(cell.path / f"answers-{chunk['index']:05d}.safetensors", ("sample", "adv"))
        truth, found = boxes[arrays["sample"]], torch.from_numpy(arrays["adv"])
        right = (overlap(truth[..., :4], found[..., :4]) >= OVERLAP) & (truth[:, :, None, 4] == found[:, None, :, 5])
        best = (right * found[:, None, :, 4]).amax(2)
        scores += best[truth[..., 4] != PADDING].tolist()
    return scores


def density(cell: StoredCell) -> float:
    """Returns the overlap from which on the attack drops a proposal for a better one."""
    return float(cell.record["params_in_force"]["nms_threshold"])


def contender(cell: StoredCell) -> str:
    """Returns how the results call an attack."""
    rule = f"rule {cell.record['params_in_force']['rule']}"
    return f"{rule}, nms {density(cell)}" if cell.record["swept"] else rule


def row(cell: StoredCell, control: StoredCell | None, first: float | None) -> Row:
    """Returns the row of an attack on its own network: steps until no target is active, and what it did.

    Args:
        cell: of the attack.
        control: judges the same perturbations with rows and columns in random order.
        first: median number of steps of the first row; None for that row itself.
    """
    active = trace(cell)
    steps = (active > 0).sum(1)
    low, median, high = np.quantile(steps, [0.25, 0.5, 0.75])
    name, before, after = figure(cell)
    largest = 255 * np.array([measures["linf"] for measures in cell.measures if "linf" in measures])
    extra: dict[str, float | int | str] = {
        "figure": name,
        "before": round(before, 2),
        "after": round(after, 2),
        "perceptibility": round(float(np.nanmean(cell.distance)), 5),
        "linf median of 255": round(float(np.median(largest)), 1),
        "linf largest of 255": round(float(largest.max()), 1),
        "targets": round(float(active[:, 0].mean()), 1),
        "mean steps": round(float(steps.mean()), 1),
        "converged": round(float((cell.claim == 1).mean()), 4),
        "colour kept": round(100 * colour_kept(cell), 2),
    }
    if cell.record["task"] == "detection":
        for when, kind in (("before", "clean"), ("after", "adv")):
            found = [scores.get(f"{kind}.found", 0.0) for scores in cell.scores]
            extra[f"boxes found {when}"] = round(100 * sum(found) / sum(one["clean.boxes"] for one in cell.scores), 2)
        scores = np.array(right_scores(cell))
        extra["score of the right class after"] = round(float(np.median(scores)), 3)
        extra["boxes without it after"] = round(100 * float((scores == 0).mean()), 2)
    if control is not None:
        extra["permuted"] = round(figure(control)[2], 2)
    return Row(
        case=cell.target,
        contender=contender(cell),
        median=float(median),
        low=float(low),
        high=float(high),
        unit="steps",
        ratio=round(float(median) / (first or float(median)), 4),
        relative_to="FCN, A, rule label",
        extra=extra,
    )


def rows(runs: list[Path]) -> list[Row]:
    """Returns a row for each attack of the plans."""
    found: list[Row] = []
    for cells in (load_run(path).cells for path in runs):
        for cell in cells:
            if not cell.transferred:
                own = [one for one in cells if one.source == f"{cell.source}, permuted" and one.target == cell.target]
                found.append(row(cell, own[0] if own else None, found[0].median if found else None))
    return found


def draw_convergence(runs: list[Path], path: Path) -> None:
    """Draws figure 2.4: active targets over steps, as a share of all, mean over images."""
    canvas = Figure(figsize=(9.2, 3.6), layout="constrained")
    axes = dict(zip(("segmentation", "detection"), canvas.subplots(1, 2, sharey=True), strict=True))
    for cell in (cell for run in runs for cell in load_run(run).own):
        active = trace(cell)
        share = (active / active[:, :1])[active[:, 0] > 0].mean(0)
        family, rule = cell.target.partition(",")[0], cell.record["params_in_force"]["rule"]
        look = {"color": COLOURS[family], "linestyle": RULES[rule], "linewidth": 1.4}
        label = f"{family}, {rule}" if cell.target.endswith("A") else None
        axes[cell.record["task"]].plot(100 * share, label=label, **look)
    for task, place in axes.items():
        place.set(title=task, xlabel="step", yscale="log", ylim=(0.05, 120))
        place.legend(fontsize=8)
    axes["segmentation"].set_ylabel("active targets, per cent")
    canvas.savefig(path, metadata={"Date": None})


def draw_density(run: Path, path: Path) -> None:
    """Draws figure 2.3: the precision of both networks of a family over the density of the attacked proposals."""
    canvas = Figure(figsize=(9.2, 3.6), layout="constrained")
    for rule, place in zip(RULES, canvas.subplots(1, 2, sharey=True), strict=True):
        curves: dict[tuple[str, str], dict[float, float]] = {}
        for cell in load_run(run).cells:
            family, subset = cell.target.split(", ")
            if cell.record["params_in_force"]["rule"] == rule and cell.source == f"{family}, A":
                curves.setdefault((family, subset), {})[density(cell)] = figure(cell)[2]
        for (family, subset), curve in curves.items():
            look = {"color": COLOURS[family], "marker": ".", "linestyle": "-" if subset == "A" else ":"}
            place.plot(*zip(*sorted(curve.items()), strict=True), label=f"{family}, A to {subset}", **look)
        place.set(title=f"rule {rule}", xlabel="NMS threshold of the attacked proposals", ylim=(0, 100))
        place.legend(fontsize=8)
    canvas.axes[0].set_ylabel("mAP 50, per cent")
    canvas.savefig(path, metadata={"Date": None})


def main() -> None:
    """Trains, attacks, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="trainings and plans at a time, one thread each")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in pool.map(train, TRAINED):
            print("trained", name, flush=True)
        runs = list(pool.map(run, PLANS))
    draw_convergence(runs[:2], PAGES / "dag-small-convergence.svg")
    draw_density(runs[2], PAGES / "dag-small-density.svg")
    result = Result(
        benchmark="dag-small",
        command="python benchmarks/papers/dag.py",
        settings={"images": IMAGES, "size": 64, "training images": 500},
        rows=rows(runs[:3]),  # the peers have no rule, and a table of their own
        findings=draw_pictures(runs[0], PAGES),
        **surroundings(),
    )
    write(result, HERE / "results" / "dag-small.json")


if __name__ == "__main__":
    main()
