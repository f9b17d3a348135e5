"""The paper on activation sensitivity again: tunes and trains its networks, measures their sensitivity, attacks them.

    ROBPLUG_DATA=FOLDER python benchmarks/papers/nsloss.py small
    ROBPLUG_DATA=FOLDER python benchmarks/papers/nsloss.py paper

FOLDER has MNIST. What is finished is not done again: trials of the tunings, trained weights, and the cells of the
plans. The strengths of the combined penalty stand in its recipe; they are those that the tunings of each chose (small),
or table I's (paper).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import robplug
from robplug.data import Dataset
from robplug.referee.plan import read_toml
from robplug.referee.results import Results
from robplug.zoo import KerasMnistCNN
from robplug_nsloss import LayerSensitivity, layer_sensitivity

sys.path.insert(0, str(Path(__file__).parents[1]))
from schema import Result, Row, surroundings, write

HERE = Path(__file__).parent
ROBPLUG = Path(sys.executable).with_name("robplug")
PLANS = {
    "small": ("nsloss-small", "nsloss-small-targeted", "nsloss-small-probes"),
    "paper": ("nsloss", "nsloss-targeted"),
}
TRAININGS = {"base": None, "jacobian": "jacobian.strength", "nsloss": "nsloss.strength", "combined": None}
"""What each training tunes first."""
RADIUS, DRAWS = 1.0, 5
IMAGES = 1000
"""Test images on which sensitivity is measured."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one network.

    Attributes:
        name: of the network.
        layers: sensitivity of each.
        correct: share of all test images.
    """

    name: str
    layers: list[LayerSensitivity]
    correct: float

    @property
    def raw(self) -> float:
        """The sum that training lowers, NsLoss at radius 1."""
        return sum(layer.change for layer in self.layers)

    def rows(self, base: Measured) -> Iterator[Row]:
        """Yields the rows of a network beside the undefended one."""
        clean, before = round(100 * self.correct, 2), round(100 * base.correct, 2)
        yield _row("clean accuracy", self.name, clean, "%", clean / before)
        yield _row("sensitivity, all layers", self.name, self.raw, "mean |change|, summed", self.raw / base.raw)
        for layer, first in zip(self.layers, base.layers, strict=True):
            extra = {"relative": round(layer.relative, 5), "relative_ratio": round(layer.relative / first.relative, 4)}
            case, unit = f"sensitivity, {layer.name}", "mean |change|"
            yield _row(case, self.name, layer.change, unit, layer.change / first.change, extra)


def _row(case: str, name: str, value: float, unit: str, ratio: float, extra: dict[str, Any] | None = None) -> Row:
    value = round(value, 5)
    return Row(
        case=case,
        contender=name,
        median=value,
        low=value,
        high=value,
        unit=unit,
        ratio=round(ratio, 4),
        relative_to="Standard",
        extra=extra or {},
    )


def train(recipe: Path, tune: str | None) -> Path:
    """Trains a network by its recipe, unless it is there; returns its folder."""
    out = Path(read_toml(recipe)["out"])
    if not (out / "weights.safetensors").exists():
        subprocess.run([ROBPLUG, "train", recipe, *(["--tune", tune] if tune else [])], check=True)
    return out


def measure(name: str, folder: Path, data: Dataset) -> Measured:
    """Measures a trained network on test data."""
    model = KerasMnistCNN().eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    noise = torch.Generator().manual_seed(0)
    layers = layer_sensitivity(model, data.x[:IMAGES], radius=RADIUS, draws=DRAWS, generator=noise)
    with torch.no_grad():
        guessed = torch.cat([model(x).argmax(1) for x in data.x.split(500)])
    return Measured(name, layers, float((guessed == data.y).double().mean()))


def trials(folder: Path) -> dict[str, Path]:
    """Returns the networks of a tuning by name, in the order of their strengths."""
    tried = json.loads((folder / "tune.json").read_text())["trace"]["trials"]
    found = sorted((trial["value"], number) for number, trial in enumerate(tried, start=1))
    return {f"{folder.name} {value:.4g}, one epoch": folder / "tune" / str(number) for value, number in found}


def evaluate(plan: str) -> list[str]:
    """Runs a plan, or what is left of it, copies its tables, and returns what the referee says of each network."""
    path = HERE / f"{plan}.toml"
    subprocess.run([ROBPLUG, "run", path], check=True)
    results = Results(read_toml(path)["out"])
    results.export()
    shutil.copy(results.path / "summary.csv", HERE / "results" / f"{plan}.csv")
    if results.summary().matrices:
        shutil.copy(results.path / "transfer.csv", HERE / "results" / f"{plan}-transfer.csv")
    return [f"{plan}: {line}" for line in verdicts(results)]


def verdicts(results: Results) -> Iterator[str]:
    """Yields the verdict on each network, and a sentence for each of its findings."""
    summary = results.summary()
    for diagnosis in summary.diagnoses:
        subject = summary.subjects[diagnosis.subject]
        name = f"{subject.target}, {'targeted' if subject.targeted else 'untargeted'}"
        adaptive = ", ".join(summary.attack(number).name for number in diagnosis.adaptive) or "none"
        yield f"{name}: {diagnosis.verdict}; checks made: {len(diagnosis.checked)}; adaptive attacks: {adaptive}"
        for found in diagnosis.findings:
            at = "" if found.eps is None else f" at {found.eps:g}"
            yield f"{name}: {found.level}: {found.check}{at}: {found.evidence}"
        for check, reason in diagnosis.unchecked.items():
            yield f"{name}: not made: {check}: {reason}"


def main() -> None:
    """Tunes, trains, measures, attacks and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=PLANS)
    parser.add_argument("--jobs", type=int, default=2, help="plans at a time")
    options = parser.parse_args()
    plans = PLANS[options.size]
    folders = {name: train(HERE / f"{plans[0]}-train-{name}.toml", tune) for name, tune in TRAININGS.items()}
    targets = [target["name"] for target in read_toml(HERE / f"{plans[0]}.toml")["targets"]]
    networks = dict(zip(targets, folders.values(), strict=True)) | trials(folders["nsloss"])
    data = robplug.dataset("mnist", split="test")
    measured = [measure(name, folder, data) for name, folder in networks.items()]
    tunings = {name: json.loads((folders[name] / "tune.json").read_text())["trace"] for name in ("jacobian", "nsloss")}
    with ThreadPoolExecutor(options.jobs) as pool:
        findings = [line for lines in pool.map(evaluate, plans) for line in lines]
    result = Result(
        benchmark=plans[0],
        command=f"ROBPLUG_DATA=FOLDER python benchmarks/papers/nsloss.py {options.size}",
        settings={"images": IMAGES, "radius": RADIUS, "draws": DRAWS, "tunings": tunings},
        rows=[row for one in measured for row in one.rows(measured[0])],
        findings=findings,
        **surroundings(),
    )
    write(result, HERE / "results" / f"{plans[0]}.json")


if __name__ == "__main__":
    main()
