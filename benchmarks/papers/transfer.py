"""Transfer of adversarial samples on two cores: trains the networks, runs the plans, compares attacks image by image.

    ROBPLUG_DATA=FOLDER python benchmarks/papers/transfer.py

FOLDER has CIFAR-10, and in ``models/`` the ResNet-20 and ResNet-32 of the common release (``resnet20-12fca82f.th``,
``resnet32-d509ac18.th``). What is finished is not done again. Shares go to ``results/transfer-small*.csv``, paired
comparisons (McNemar's exact test, on the samples that all victims and both sources classify correctly) to
``results/transfer-small-paired.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from robplug.referee.plan import read_toml
from robplug.referee.results import Results

HERE = Path(__file__).parent
ROBPLUG = Path(sys.executable).with_name("robplug")
RELEASED = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
TRAINED = ("vgg", "separable", "plain", "vgg-at")
PLANS = ("", "-ghosts", "-ensembles", "-sweeps", "-peers", "-cw")
PLAIN, DI = "di2/di2-fgsm p=0.0", "di2/di2-fgsm"
MI, MDI = "di2/m-di2-fgsm p=0.0", "di2/m-di2-fgsm"
CW, DCW = "di2/d-cw p=0.0", "di2/d-cw"
PAIRS = {
    "": [(PLAIN, DI), (PLAIN, MI), (DI, MDI), (MI, MDI)],
    "-peers": [(MI, MDI), (MI, "torchattacks/mifgsm"), (MDI, "torchattacks/difgsm")],
    "-ensembles": [(PLAIN, DI), (PLAIN, MI), (DI, MDI), (MI, MDI)],
    "-cw": [(CW, DCW)],
}
"""Attacks on one source to be compared: the former is the baseline."""
BASE, STANDARD = "ResNet-20", "5 ghosts, skip .1"
FEW, MANY = "steps=4", "steps=20"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an attack (by the beginning or part of its name) and its source."""

    source: str
    attack: str


def train(name: str) -> str:
    """Trains a network by its recipe, unless it is there; returns its name."""
    recipe = HERE / f"transfer-train-{name}.toml"
    if not (Path(read_toml(recipe)["out"]) / "weights.safetensors").exists():
        subprocess.run([ROBPLUG, "train", recipe], check=True)
    return name


def fetch() -> None:
    """Copies the released networks to where the plans look for them."""
    models = Path("runs/transfer-small/models")
    models.mkdir(parents=True, exist_ok=True)
    for name, file in RELEASED.items():
        if not (models / f"{name}.th").exists():
            shutil.copy(Path(os.environ["ROBPLUG_DATA"]) / "models" / file, models / f"{name}.th")


def verdicts(rows: list[dict[str, Any]]) -> dict[tuple[str, str, float | None], dict[str, dict[int, bool]]]:
    """Returns, by source, attack and radius, for each victim which samples are broken."""
    found: dict[tuple[str, str, float | None], dict[str, dict[int, bool]]] = {}
    for row in rows:
        place = (row["source"] or row["target"], row["label"], row["eps"])
        found.setdefault(place, {}).setdefault(row["target"], {})[row["sample"]] = row["status"] == "broken"
    return found


def mistakes(rows: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Returns, by target, the samples that it gets wrong before any attack."""
    found: dict[str, set[int]] = {row["target"]: set() for row in rows}
    for row in rows:
        if row["prediction"] != row["y"]:
            found[row["target"]].add(row["sample"])
    return found


def sides(plan: str, results: Results) -> Iterator[tuple[Side, Side]]:
    """Yields what is to be compared in a plan."""
    sources = dict.fromkeys(source for matrix in results.summary().matrices for source in matrix.sources)
    for source in sources:
        for one, other in PAIRS.get(plan, ()):
            yield Side(source, one), Side(source, other)
    if plan == "-ghosts":
        attacks = [results.summary().attack(number).name for number in (1, 2)]
        for attack in attacks:
            for source in sources:
                if source not in (BASE, STANDARD):
                    yield Side(BASE, attack), Side(source, attack)
            if MANY in attack:  # as many passes
                yield Side(BASE, attack), Side(STANDARD, attack.replace(MANY, FEW))
                yield Side("ghost, skip .1", attack), Side(STANDARD, attack.replace(MANY, FEW))


def compare(plan: str, results: Results) -> Iterator[dict[str, Any]]:
    """Yields a row for each comparison, radius and black-box victim."""
    rows, matrices = results.rows(), results.summary().matrices
    found, wrong = verdicts(rows), mistakes(rows)
    victims = matrices[0].victims
    white = {(entry.source, entry.victim) for matrix in matrices for entry in matrix.entries if entry.white_box}
    for one, other in sides(plan, results):
        for eps in dict.fromkeys(eps for _, _, eps in found):
            left, right = found[one.source, one.attack, eps], found[other.source, other.attack, eps]
            out = set().union(*(wrong[model] for model in (one.source, other.source, *victims)))
            for victim in victims:
                if (one.source, victim) in white or (other.source, victim) in white:
                    continue
                pairs = [(left[victim][i], right[victim][i]) for i in left[victim] if i not in out]
                lost, won = pairs.count((True, False)), pairs.count((False, True))
                yield {
                    "plan": f"transfer-small{plan}",
                    "eps": eps,
                    "victim": victim,
                    "baseline": f"{one.source}: {one.attack}",
                    "contender": f"{other.source}: {other.attack}",
                    "samples": len(pairs),
                    "baseline_breaks": sum(a for a, _ in pairs),
                    "contender_breaks": sum(b for _, b in pairs),
                    "only_baseline": lost,
                    "only_contender": won,
                    "p": binomtest(won, won + lost).pvalue if won + lost else 1.0,
                }


def main() -> None:
    """Trains, attacks, compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="trainings and plans at a time, one thread each")
    options = parser.parse_args()
    fetch()
    with ThreadPoolExecutor(options.jobs) as pool:
        for name in pool.map(train, TRAINED):
            print("trained", name, flush=True)
        for plan in pool.map(run, PLANS):
            print("finished", plan, flush=True)
    rows = []
    for plan in PLANS:
        results = Results(read_toml(HERE / f"transfer-small{plan}.toml")["out"])
        results.export()
        shutil.copy(results.path / "transfer.csv", HERE / "results" / f"transfer-small{plan}.csv")
        rows += list(compare(plan, results))
    with (HERE / "results" / "transfer-small-paired.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run(plan: str) -> str:
    """Runs a plan, or what is left of it; returns its name."""
    path = HERE / f"transfer-small{plan}.toml"
    subprocess.run([ROBPLUG, "run", path], check=True)
    return path.name


if __name__ == "__main__":
    main()
