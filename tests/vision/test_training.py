"""Training of networks for pixels and boxes: against plain torch, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import robplug
from robplug.data import IGNORE, Dataset
from robplug.defenses import Defense
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.step import Step, accuracy, cross_entropy
from robplug.tasks import overlap
from robplug.training import fit
from robplug.training_plan import Options, run_train_plan
from robplug.training_setup import split_rows
from robplug.vision.shapes import shapes, shapes_boxes


def with_ignored() -> Dataset:
    """A few shapes; the upper half of each image is ignored, and all of the last one."""
    data = shapes("train", samples=6)
    y = data.y.clone()
    y[:, :32] = IGNORE
    y[5] = IGNORE
    return replace(data, y=y)


def small(name: str) -> nn.Module:
    torch.manual_seed(3)
    return registry().named_target(name, width=4)  # type: ignore[no-any-return]


def test_the_loss_of_an_image_is_the_mean_of_its_labelled_pixels() -> None:
    data, logits = with_ignored(), torch.randn(6, 4, 64, 64)
    losses, shares = cross_entropy(logits, data.y), accuracy(logits, data.y)
    for image in range(5):
        labelled = data.y[image] != IGNORE
        pixels, labels = logits[image][:, labelled].T, data.y[image][labelled]
        torch.testing.assert_close(losses[image], F.cross_entropy(pixels, labels))
        torch.testing.assert_close(shares[image], (pixels.argmax(1) == labels).float().mean())
    assert losses[5] == 0 and shares[5] == 0


def test_training_of_a_segmentation_network_is_that_of_torch() -> None:
    data, model, peer = with_ignored().head(4), small("robplug/fcn-small"), small("robplug/fcn-small")
    optimizer = torch.optim.SGD(peer.parameters(), 0.1, 0.9)
    fit(model, data, "robplug/none", epochs=2, batch_size=4, lr=0.1, weight_decay=0, schedule="constant", device="cpu")
    for _ in range(2):
        optimizer.zero_grad()  # every image has as many labelled pixels, so that both means are one
        F.cross_entropy(peer(data.x), data.y, ignore_index=IGNORE).backward()
        optimizer.step()
    for mine, theirs in zip(model.state_dict().values(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_training_of_a_detector_is_that_of_torch(tmp_path: Path) -> None:
    data, model, peer = shapes_boxes("train", samples=4), small("robplug/ssd-plain"), small("robplug/ssd-plain")
    optimizer = torch.optim.SGD(peer.parameters(), 0.01, 0.9)
    fit(model, data, epochs=2, batch_size=4, lr=0.01, weight_decay=0, schedule="constant", device="cpu", out=tmp_path)
    for _ in range(2):
        optimizer.zero_grad()
        peer.losses(data.x, data.y).mean().backward()
        optimizer.step()
    for mine, theirs in zip(model.state_dict().values(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    history = json.loads((tmp_path / "train.json").read_text())["history"]
    assert [record.keys() for record in history] == [{"epoch", "loss"}] * 2


def test_accuracy_of_pixels_is_recorded(tmp_path: Path) -> None:
    data = shapes("train", samples=10)
    fit(small("robplug/unet-small"), data, epochs=1, lr=1e-9, held_out=0.2, device="cpu", out=tmp_path, batch_size=8)
    model = small("robplug/unet-small")
    record = json.loads((tmp_path / "train.json").read_text())["history"][0]
    assert 0 < record["accuracy"] < 1 and 0 < record["held_out"] < 1
    trained = small("robplug/unet-small")
    trained.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    model.train()
    rest, held = split_rows(10, Options(held_out=0.2))
    with torch.no_grad():
        shares = accuracy(model(data.x[rest]), data.y[rest]).mean()
        held_shares = accuracy(trained.eval()(data.x[held]), data.y[held]).mean()
    assert record["accuracy"] == pytest.approx(float(shares), abs=1e-6)
    assert record["held_out"] == pytest.approx(float(held_shares), abs=1e-6)


@dataclass(frozen=True)
class InputGradient(Defense):
    """Penalises the gradient of the loss in the image, as defences of a user do."""

    def penalty(self, step: Step) -> torch.Tensor:
        seen = step.clean()
        (gradient,) = torch.autograd.grad(seen.loss.sum(), seen.x, create_graph=True)
        return gradient.square().sum()


@pytest.mark.parametrize(("name", "data"), [("fcn-small", shapes), ("ssd-residual", shapes_boxes)])
def test_a_users_penalty_sees_the_loss_of_each_task(name: str, data, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = small(f"robplug/{name}")
    fit(model, data("train", samples=4), ["robplug/none", InputGradient()], epochs=1, device="cpu", out=tmp_path)
    assert json.loads((tmp_path / "train.json").read_text())["history"][0]["InputGradient"] > 0


def test_a_pass_of_a_detector_has_losses_and_no_logits() -> None:
    data, model = shapes_boxes("train", samples=3), small("robplug/ssd-plain").eval()
    step = Step(model, data.x, data.y, Rng(0, range(3)), task="detection")
    seen = step.clean()
    assert seen.logits.shape == (3, 0) and step.right() is None
    torch.testing.assert_close(seen.loss, model.losses(data.x, data.y))


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("fcn-small", shapes, {"defenses": "robplug/at"}, "serve segmentation, got robplug/at, which serves class"),
        ("fcn-small", shapes, {"defenses": "robplug/crop-flip"}, "serve segmentation, got robplug/crop-flip"),
        ("ssd-plain", shapes_boxes, {"defenses": "robplug/at"}, "serve detection, got robplug/at"),
        ("fcn-small", shapes_boxes, {}, "a detector with losses.*got FCN"),
        ("ssd-plain", shapes_boxes, {"held_out": 0.5}, "held_out=0 for detection"),
    ],
)
def test_what_does_not_serve_the_task_is_refused(name, data, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        fit(small(f"robplug/{name}"), data("train", samples=4), device="cpu", **options)


def test_labels_of_another_dtype_are_refused() -> None:
    data = shapes_boxes("train", samples=2)
    with pytest.raises(InputError, match=r"y of float32, got torch.float32 and torch.float64"):
        fit(small("robplug/ssd-plain"), replace(data, y=data.y.double()), device="cpu")


PLAN = """
model = "{model}"
dataset = {{ name = "{data}", params = {{ samples = 500 }} }}
epochs = {epochs}
batch_size = 16
optimizer = "adam"
lr = 0.002
weight_decay = 0
threads = 1
device = "cpu"
out = "{out}"
"""


@pytest.mark.parametrize("model", ["robplug/fcn-small", "robplug/unet-small"])
@pytest.mark.slow
def test_segmentation_networks_read_the_shapes(model: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(model=model, data="shapes", epochs=8, out=tmp_path / "out"))
    weights = run_train_plan(plan, progress=False)
    network, data = registry().named_target(model), robplug.dataset("shapes", samples=100)
    network.load_state_dict(load_file(weights))
    with torch.no_grad():
        found = network.eval()(data.x).argmax(1)
    shares = [((found == k) & (data.y == k)).sum() / ((found == k) | (data.y == k)).sum() for k in range(1, 4)]
    assert torch.stack(shares).mean() > 0.75


@pytest.mark.parametrize("model", ["robplug/ssd-plain", "robplug/ssd-residual"])
@pytest.mark.slow
def test_detectors_find_the_shapes(model: str, tmp_path: Path) -> None:
    """Nine of ten shapes are found with their class by a detection of at least a half; half of these are needed."""
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(model=model, data="shapes-boxes", epochs=16, out=tmp_path / "out"))
    weights = run_train_plan(plan, progress=False)
    network, data = registry().named_target(model), robplug.dataset("shapes-boxes", samples=100)
    network.load_state_dict(load_file(weights))
    found = network.eval().detections(data.x)
    hits, sure, objects = 0, 0, 0
    for detections, boxes in zip(found, data.y, strict=True):
        detections, boxes = detections[detections[:, 4] >= 0.5], boxes[boxes[:, 4] != -1]
        iou = overlap(detections[None, :, :4], boxes[None, :, :4])[0] >= 0.5
        hits += int((iou & (detections[:, None, 5] == boxes[None, :, 4])).any(0).sum())
        sure, objects = sure + len(detections), objects + len(boxes)
    assert hits > 0.9 * objects and sure < 2 * objects
