"""The two papers on mixture batch norm again: trains their networks, and measures them clean, corrupted and attacked.

    ROBPLUG_DATA=FOLDER python benchmarks/papers/advprop.py small
    python benchmarks/papers/advprop.py digits
    ROBPLUG_DATA=FOLDER python benchmarks/papers/advprop.py paper

FOLDER has ``cifar10/`` (small): the binary version, or ``train_jpeg.npz`` and ``test_jpeg.npz`` with the JPEG images
end to end as ``blob``, their ``offsets`` and ``labels``; or ``imagenet/train`` and ``imagenet/test`` (paper). What is
finished is not done again: trained weights, and the cells of the plan. small and paper need the extras ``corruptions``
and ``autoaugment`` of robplug-advprop.

From a network with mixture batch norm two sets of weights are written, ``main`` and ``auxiliary``, which load into the
plain network: MBN_clean and MBN_adv.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robplug
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.referee.plan import read_toml
from robplug.referee.results import Results
from robplug.training import fit
from robplug.training_plan import load_train_plan
from robplug.zoo import resnet20
from robplug_advprop import convert_group_norm, keep_only
from robplug_advprop.corruptions import FAMILIES, corrupt, corruption_names, mean_corruption_error
from robplug_advprop.layers import MixtureBatchNorm

sys.path.insert(0, str(Path(__file__).parents[1]))
from schema import Result, Row, surroundings, write

HERE = Path(__file__).parent
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LAST = 3
"""Epochs by running statistics, and of fine-tuning batch norm alone."""


def cifar_network() -> nn.Module:
    """Returns an untrained ResNet-20."""
    return resnet20(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def digits_network() -> nn.Module:
    """Returns three convolutions with batch norm, 8x8 to 4x4, and a linear layer on the mean: 24,154 parameters."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits_group_norm() -> nn.Module:
    """Returns the network for the digits with group norm."""
    return convert_group_norm(digits_network(), groups=8)


def imagenet_network(layers: int = 50) -> nn.Module:
    """Returns an untrained ResNet of torchvision that normalises its images itself."""
    from torchvision import models

    from robplug.zoo import Normalize

    network = models.get_model(f"resnet{layers}")
    return nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), network)


Phase = tuple[list[Defense], dict[str, Any]]
"""Defences, and options other than the recipe's."""


@dataclass(frozen=True)
class Size:
    """What differs between the experiments.

    Attributes:
        plan: beside this file; ``<plan>-train.toml`` is the recipe.
        network: makes an untrained one.
        trainings: the phases of each training, by the folder of its weights.
        corruptions: test images to be corrupted; None leaves corruptions out.
        clean: test images for clean accuracy.
    """

    plan: str
    network: Callable[[], nn.Module]
    trainings: Callable[[], dict[str, list[Phase]]]
    corruptions: int | None = None
    clean: int | None = None


def advprop_trainings(eps: float, policy: str) -> dict[str, list[Phase]]:
    """Returns chapter 7's trainings; every one has the same random crops."""
    mixed = {"eps": eps, "average": True}
    crops = [robplug.defense("robplug/crop-flip")]
    return {
        "vanilla": [(crops, {})],
        "mixing": [([*crops, robplug.defense("advprop/vanilla", **mixed)], {})],
        "advprop": [([*crops, robplug.defense("advprop/advprop", keep="all", **mixed)], {})],
        "fine-grained": [
            ([*crops, robplug.defense("advprop/fine-grained", sources=[policy, eps], average=True)], {}),
        ],
    }


def ratio_trainings() -> dict[str, list[Phase]]:
    """Returns chapter 6's trainings: ratios of clean images, group norm, running statistics, batch norm alone."""
    attack = {"eps": 0.2, "steps": 5, "step_size": 0.08, "goal": "untargeted", "average": True}
    mixing = {r: robplug.defense("advprop/vanilla", clean_ratio=r, **attack) for r in RATIOS}
    mixture = {r: robplug.defense("advprop/mixture", clean_ratio=r, keep="all", **attack) for r in RATIOS if r}
    running, norm_only = robplug.defense("advprop/running-statistics"), robplug.defense("advprop/batch-norm-only")
    epochs = load_train_plan(HERE / "advprop-digits-train.toml").epochs
    before, last = {"epochs": epochs - LAST}, {"epochs": LAST, "lr": 0.001, "schedule": "constant"}
    group = robplug.defense("advprop/group-norm", groups=8)
    return {
        "clean": [([], {})],
        **{f"bn-{round(100 * r)}": [([one], {})] for r, one in mixing.items()},
        **{f"mbn-{round(100 * r)}": [([one], {})] for r, one in mixture.items()},
        "gn-100": [([group, mixing[1.0]], {})],
        "bn-0-running": [([mixing[0.0]], before), ([mixing[0.0], running], last)],
        "mbn-100-running": [([mixture[1.0]], before), ([mixture[1.0], running], last)],
        "bn-0-tuned": [([mixing[0.0]], {}), ([norm_only], {**last, "lr": 0.01})],
        "clean-tuned": [([], {}), ([norm_only, mixing[0.0]], {**last, "lr": 0.01})],
    }


SIZES = {
    "small": Size("advprop-small", cifar_network, lambda: advprop_trainings(2 / 255, "cifar10"), 300, 2000),
    "digits": Size("advprop-digits", digits_network, ratio_trainings, None, 596),
    "paper": Size("advprop", imagenet_network, lambda: advprop_trainings(4 / 255, "imagenet"), 50_000, 50_000),
}


def prepare_cifar(folder: Path) -> None:
    """Writes the images as archives that the data set ``npz`` reads, if they are not there."""
    for split in ("train", "test"):
        path = folder / f"{split}.npz"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            x, y = _cifar(split)
            np.savez(path, x=x, y=y)


def _cifar(split: str) -> tuple[np.ndarray, np.ndarray]:
    packed = Path(os.environ.get("ROBPLUG_DATA", "")) / "cifar10" / f"{split}_jpeg.npz"
    if not packed.exists():
        data = robplug.dataset("cifar10", split=split)
        return data.x.numpy(), data.y.numpy()
    from PIL import Image

    with np.load(packed) as archive:
        blob, offsets, labels = archive["blob"], archive["offsets"], archive["labels"]
    parts = [blob[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    images = [np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts]
    return (np.stack(images).transpose(0, 3, 1, 2) / 255).astype(np.float32), labels.astype(np.int64)


def train(folder: Path, phases: list[Phase], size: Size) -> None:
    """Trains one network, if it has no weights yet."""
    if any(folder.glob("*.safetensors")):
        return
    recipe = load_train_plan(HERE / f"{size.plan}-train.toml")
    entry = recipe.dataset
    root = {"root": entry.root} if entry.root else {}
    data = robplug.dataset(entry.name, split=entry.split, **root)
    torch.manual_seed(recipe.seed)
    model = size.network()
    for defenses, other in phases:
        model = fit(model, data.head(entry.samples or len(data)), defenses, **{**recipe.options, **other})
    folder.mkdir(parents=True, exist_ok=True)
    if any(isinstance(part, MixtureBatchNorm) for part in model.modules()):
        save_file(keep_only(copy.deepcopy(model), 1).state_dict(), folder / "auxiliary.safetensors")
        save_file(keep_only(model, "main").state_dict(), folder / "main.safetensors")
    else:
        save_file(model.state_dict(), folder / "weights.safetensors")
    print("trained", folder.name, flush=True)


def trained(target: dict[str, Any]) -> nn.Module:
    """Returns the trained network of a target of a plan."""
    model: nn.Module = globals()[target["make"].partition(":")[2]]()
    model.load_state_dict(load_file(target["weights"]))
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, data: Dataset) -> Tensor:
    """Returns (N,) bool, which images are classified correctly."""
    return torch.cat([model(x).argmax(1) for x in data.x.split(250)]) == data.y


def corruption_table(models: dict[str, nn.Module], data: Dataset) -> dict[str, dict[str, list[float]]]:
    """Returns the errors of all networks at each severity, by network and corruption; images are corrupted once."""
    found: dict[str, dict[str, list[float]]] = {name: {c: [] for c in corruption_names()} for name in models}
    for corruption in corruption_names():
        for severity in range(1, 6):
            corrupted = corrupt(data, corruption, severity)
            for name, model in models.items():
                found[name][corruption].append(1 - float(right(model, corrupted).float().mean()))
        print("corrupted by", corruption, flush=True)
    return found


@dataclass
class Measured:
    """What was measured of one network.

    Attributes:
        right: (N,) bool, which clean test images are classified correctly.
        errors: under each corruption, at each severity; empty without corruptions.
    """

    right: Tensor
    errors: dict[str, list[float]] = field(default_factory=dict)

    def row(self, name: str, first: str, baseline: Measured) -> Row:
        """Returns the row of a network beside the first one."""
        accuracy = round(100 * float(self.right.float().mean()), 3)
        extra: dict[str, float | int | str] = {
            "only this": int((self.right & ~baseline.right).sum()),
            f"only {first}": int((~self.right & baseline.right).sum()),
        }
        if self.errors:
            extra["mCE"] = round(mean_corruption_error(self.errors, baseline.errors), 2)
            for family in FAMILIES:
                errors = [value for corruption in corruption_names(family) for value in self.errors[corruption]]
                extra[family] = round(100 * (1 - statistics.mean(errors)), 2)
            every = [value for values in self.errors.values() for value in values]
            extra["corrupted"] = round(100 * (1 - statistics.mean(every)), 2)
        return Row(
            case="clean, corrupted",
            contender=name,
            median=accuracy,
            low=accuracy,
            high=accuracy,
            unit="% clean",
            ratio=round(float(self.right.sum() / baseline.right.sum()), 4),
            relative_to=first,
            extra=extra,
        )


def main() -> None:
    """Trains, attacks, corrupts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    options = parser.parse_args()
    size = SIZES[options.size]
    torch.set_num_threads(1 if options.size != "paper" else torch.get_num_threads())
    path = HERE / f"{size.plan}.toml"
    plan = read_toml(path)
    if options.size == "small":
        prepare_cifar(Path(plan["datasets"][0]["root"]))
    for folder, phases in size.trainings().items():
        train(Path(plan["out"]) / "models" / folder, phases, size)
    models = {target["name"]: trained(target) for target in plan["targets"]}
    entry = {key: value for key, value in plan["datasets"][0].items() if key != "samples"}
    data = robplug.dataset(entry.pop("name"), **{"split": "test", **entry})
    found = {name: Measured(right(model, data.head(size.clean or len(data)))) for name, model in models.items()}
    if size.corruptions:
        for name, errors in corruption_table(models, data.head(size.corruptions)).items():
            found[name].errors = errors
    first = next(iter(found))
    result = Result(
        benchmark=size.plan,
        command=f"python benchmarks/papers/advprop.py {options.size}",
        settings={"clean images": size.clean or len(data), "corrupted images": size.corruptions or 0},
        rows=[one.row(name, first, found[first]) for name, one in found.items()],
        findings=[],
        **surroundings(),
    )
    write(result, HERE / "results" / f"{size.plan}.json")
    subprocess.run([Path(sys.executable).with_name("robplug"), "run", path], check=True)
    results = Results(plan["out"])
    results.export()
    shutil.copy(results.path / "summary.csv", HERE / "results" / f"{size.plan}.csv")


if __name__ == "__main__":
    main()
