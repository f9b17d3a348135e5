"""robplug's attacks as attacks of torchattacks, tested with torchattacks' own machinery."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robplug.adapters.torchattacks import attack
from robplug.errors import InputError, ThreatError
from robplug.norms import LINF

MEAN, STD = [0.14, 0.11, 0.38], [0.2, 0.2, 0.3]


class Normalised(nn.Module):
    """A network for images in [0, 1] that normalises them itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(normalise(x))


def normalise(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 5)).eval()


@pytest.fixture
def batch(network: nn.Module) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.rand(12, 3, 8, 8)
    return x, network(x).argmax(1)


def test_it_is_an_attack_of_the_library(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    ours = attack("robplug/pgd", network, eps=0.1, steps=5, step_size=0.03, random_start=False, early_stop=False)
    own = torchattacks.PGD(network, eps=0.1, steps=5, alpha=0.03, random_start=False)
    assert isinstance(ours, torchattacks.attack.Attack)
    assert torch.allclose(ours(x, y), own(x, y), atol=1e-6)


def test_draws_differ_between_calls_and_follow_the_seed(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def once(seed: int) -> tuple[Tensor, Tensor]:
        noise = attack("robplug/noise", network, eps=0.1, seed=seed, draws=1)
        return noise(*batch), noise(*batch)

    first, second = once(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, once(0)[0]) and torch.equal(second, once(0)[1])
    assert not torch.equal(first, once(1)[0])


def test_without_labels_the_prediction_is_left(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    made = [attack("robplug/pgd", network, eps=0.1, steps=5) for _ in range(2)]
    assert torch.equal(made[0](x), made[1](x, y))


@pytest.mark.parametrize("mode", ["function", "label", "random", "least-likely"])
def test_targeted_modes(mode: str, network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    goals = {
        "function": (y + 2) % 5,
        "label": (y + 1) % 5,
        "random": None,
        "least-likely": network(x).argmin(1),
    }[mode]
    pgd = attack("robplug/pgd", network, eps=0.4, steps=40)
    if mode == "function":
        pgd.set_mode_targeted_by_function(lambda images, labels: (labels + 2) % 5, quiet=True)
    elif mode == "label":
        pgd.set_mode_targeted_by_label(quiet=True)
    elif mode == "random":
        pgd.set_mode_targeted_random(quiet=True)
        seen = []
        pgd._target_map_function = lambda *given: seen.append(pgd.get_random_target_label(*given)) or seen[-1]
    else:
        pgd.set_mode_targeted_least_likely(quiet=True)
    x_adv = pgd(x, goals if mode == "label" else y)
    goals = seen[0] if mode == "random" else goals
    assert (network(x_adv).argmax(1) == goals).all()
    assert LINF.distance(x, x_adv).max() <= LINF.allowed(0.4, 192, (0.0, 1.0))


def test_back_to_the_default_mode(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    pgd = attack("robplug/pgd", network, eps=0.2)
    pgd.set_mode_targeted_by_label(quiet=True)
    pgd.set_mode_default()
    assert (network(pgd(x, y)).argmax(1) != y).all()


def test_normalised_images_come_back_normalised(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Attacking a network on normalised images is attacking the network that normalises by itself."""
    x, y = batch
    x[0, :, 0] = torch.tensor([0.0, 1.0] * 4)  # the inverse normalisation leaves [0, 1] by a rounding here
    inside = attack("robplug/pgd", Normalised(network), eps=0.1, norm="linf", random_start=False)
    outside = attack("robplug/pgd", network, eps=0.1, norm="linf", random_start=False)
    outside.set_normalization_used(mean=MEAN, std=STD)
    assert torch.allclose(outside(normalise(x), y), normalise(inside(x, y)), atol=1e-5)


def test_images_far_outside_are_refused(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    with pytest.raises(InputError, match="expected x inside the bounds"):
        attack("robplug/pgd", network, eps=0.1)(2 * x, y)


@pytest.mark.parametrize("save_type", ["float", "int"])
def test_save(save_type: str, network: nn.Module, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = batch
    path = tmp_path / "adversarials.pt"
    pgd = attack("robplug/pgd", network, eps=0.1)
    accuracy, l2, _ = pgd.save(
        DataLoader(TensorDataset(x, y), batch_size=5),
        save_path=str(path),
        verbose=False,
        return_verbose=True,
        save_predictions=True,
        save_type=save_type,
    )
    saved = torch.load(path, weights_only=True)
    assert saved["adv_inputs"].dtype == (torch.uint8 if save_type == "int" else torch.float32)
    assert saved["adv_inputs"].shape == x.shape and torch.equal(saved["labels"], y)
    assert accuracy == 100 * float((saved["preds"] == y).float().mean())
    assert l2 > 0
    loaded = next(iter(torchattacks.attack.Attack.load(str(path), batch_size=12, load_predictions=True)))
    if save_type == "float":
        assert torch.equal(network(loaded[0]).argmax(1), saved["preds"])


def test_multi_attack(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    nothing = attack("robplug/pgd", network, eps=0.0, random_start=False)
    strong = attack("robplug/pgd", network, eps=0.2)
    both = torchattacks.MultiAttack([nothing, torchattacks.FGSM(network, eps=0.001), strong])
    x_adv = both(x, y)
    assert (network(x_adv).argmax(1) != y).all()
    assert (network(nothing(x, y)).argmax(1) == y).all()


def test_training_network_is_evaluated_and_put_back(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Dropout(0.9)).train()
    seen: list[bool] = []
    network.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    attack("robplug/pgd", network, eps=0.1, steps=2)(*batch)
    assert network.training and seen and not any(seen)


def test_minimal_attack_takes_no_eps(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    deepfool = attack("foolbox/l2-deep-fool", network)
    assert (network(deepfool(x, y)).argmax(1) != y).all()
    with pytest.raises(ThreatError, match="expected no eps: it looks for the smallest distance"):
        attack("foolbox/l2-deep-fool", network, eps=0.1)


def test_errors(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ThreatError, match="expected eps, its radius, got eps=None"):
        attack("robplug/pgd", network)
    with pytest.raises(ThreatError, match=r"serves \(linf, l2, l1\), got 'l7'"):
        attack("robplug/pgd", network, eps=0.1, norm="l7")
    with pytest.raises(InputError, match="did you mean steps"):
        attack("robplug/pgd", network, eps=0.1, step=3)
    with pytest.raises(ThreatError, match="reaches given classes only"):
        attack("foolbox/gen", network, eps=0.1)(*batch)
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        attack("foolbox/linf-fast-gradient", network, eps=0.1).set_mode_targeted_by_label(quiet=True)


def test_importing_the_adapter_imports_no_library() -> None:
    code = "import sys, robplug.adapters.torchattacks.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
