"""Networks: sizes by hand, shortcuts and normalisation against formulas, shipped weights on the real digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import robplug
from robplug import zoo
from robplug.data import ASSETS
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.rng import Rng


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


_OUT = (64, 128, 256, 256, 512, 512, 512, 512)
_IN = (3, *_OUT[:-1])


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("robplug/digits-cnn", (1, 8, 8), (9 + 1) * 16 + (16 * 9 + 1) * 32 + (512 + 1) * 10),
        ("robplug/lenet", (1, 28, 28), 61_706),  # LeCun et al. count 60,000 with C3 partly connected
        ("robplug/keras-mnist-cnn", (1, 28, 28), 320 + 18_496 + 1_179_776 + 1_290),  # as Keras' summary() lists them
        ("robplug/resnet20", (3, 32, 32), 269_722),  # "0.27M" in He et al. 2016, table 6
        # 9 * in * out weights, out biases, 2 * out of batch norm, for each convolution
        ("robplug/vgg11", (3, 32, 32), sum(9 * i * o + 3 * o for i, o in zip(_IN, _OUT, strict=True)) + 5130),
        ("robplug/resnet18", (3, 32, 32), 11_173_962),  # the common count for CIFAR-10
    ],
)
def test_sizes(name: str, shape: tuple[int, ...], count: int) -> None:
    model = registry().named_target(name)
    assert parameters(model) == count
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_the_keras_example_is_its_layers_in_their_order() -> None:
    """Written down again as a Sequential; dropout acts in train mode, at both places and at its rate."""
    model = zoo.keras_mnist_cnn().eval()
    convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25))
    linear = (nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))
    peer = nn.Sequential(*convolutions, *linear).eval()
    peer.load_state_dict(dict(zip(peer.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(model(x), peer(x))
    for one in (model.train(), peer.train()):
        torch.manual_seed(5)
        drawn = one(x)
        assert not torch.equal(drawn, one(x))
    torch.manual_seed(5)
    assert torch.equal(model(x), drawn)


def test_resnet20_has_the_names_of_the_common_release() -> None:
    names = list(zoo.resnet20((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).state_dict())
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"] and names[-2:] == ["linear.weight", "linear.bias"]
    blocks = {name.rsplit(".", 1)[0] for name in names if name.startswith("layer")}
    parts = ("conv1", "bn1", "conv2", "bn2")
    assert blocks == {f"layer{i}.{j}.{part}" for i in (1, 2, 3) for j in range(3) for part in parts}
    assert len(names) == 2 + 19 + 19 * 5  # linear, convolutions, batch norms


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = zoo.BasicBlock(16, 32, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert (out[:, :8] == 0).all() and (out[:, 24:] == 0).all()


def test_normalisation_is_applied_first_and_is_no_state() -> None:
    torch.manual_seed(0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal, plain = zoo.resnet20(mean, std).eval(), zoo.resnet20().eval()
    plain.load_state_dict(normal.state_dict())
    x = torch.rand(2, 3, 32, 32)
    shifted = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normal(x), plain(shifted))
    with pytest.raises(InputError, match="both mean and std"):
        zoo.resnet20(mean)
    with pytest.raises(InputError, match="std > 0"):
        zoo.resnet20(mean, (1.0, 0.0, 1.0))


def test_shipped_weights_are_small() -> None:
    assert all(path.stat().st_size < 60_000 for path in ASSETS.glob("*.safetensors"))


def test_shipped_weights_on_the_test_digits() -> None:
    data = robplug.dataset("digits", split="test")
    threat = robplug.ThreatModel(norm="linf", eps=0.2)
    pgd = robplug.attack("robplug/pgd", steps=10)
    clean, robust = {}, {}
    for name in ("robplug/digits-standard", "robplug/digits-at"):
        target = robplug.target(name)
        assert not target.module.training
        x_adv = pgd.run(target, data.x, data.y, threat, Rng(0, range(len(data)))).x_adv
        clean[name] = (target.predict(data.x) == data.y).float().mean()
        robust[name] = (target.predict(x_adv) == data.y).float().mean()
    assert clean["robplug/digits-standard"] > 0.97 and clean["robplug/digits-at"] > 0.95
    assert robust["robplug/digits-standard"] < 0.1 and robust["robplug/digits-at"] > 0.6
