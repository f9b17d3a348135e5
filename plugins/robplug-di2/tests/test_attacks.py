"""The FGSM family against the three libraries: where no diversity is left, they are the same attacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.rng import Rng
from robplug.types import Attack, ThreatModel
from robplug_di2 import InputDiversity
from robplug_di2.attack import DiverseFGSM, MomentumDiverseFGSM

EPS, ALPHA, STEPS = 0.1, 0.02, 8


class AnySize(nn.Module):
    """A small random network of colour images of any size."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=stride)
        self.readout = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(4 * self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def scene(side: int = 20, count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model = AnySize().eval()
    torch.manual_seed(2)
    x = torch.rand(count, 3, side, side)
    return model, x, model(x).argmax(1)


def attacked(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, eps: float = EPS, seed: int = 0, goal: Tensor | None = None
) -> Tensor:
    threat = ThreatModel("linf", eps, targeted=goal is not None)
    return attack.run(robplug.target(model), x, y, threat, Rng(seed, range(len(x))), y_goal=goal).x_adv


def test_without_diversity_it_is_torchattacks_mifgsm() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = scene()
    theirs = torchattacks.MIFGSM(model, eps=EPS, alpha=ALPHA, steps=STEPS, decay=1.0)(x, y)
    ours = attacked(MomentumDiverseFGSM(p=0.0, steps=STEPS, step_size=ALPHA), model, x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert not torch.equal(ours, attacked(DiverseFGSM(p=0.0, steps=STEPS, step_size=ALPHA), model, x, y))


def iterative(library: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """I-FGSM as a library has it."""
    if library == "torchattacks":
        torchattacks = pytest.importorskip("torchattacks")
        return torchattacks.BIM(model, eps=EPS, alpha=ALPHA, steps=STEPS)(x, y)  # type: ignore[no-any-return]
    if library == "foolbox":
        foolbox = pytest.importorskip("foolbox")
        fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=ALPHA, steps=STEPS, random_start=False)
        return attack.run(fmodel, x, y, epsilon=EPS)  # type: ignore[no-any-return]
    pytest.importorskip("art")
    from art.attacks.evasion import BasicIterativeMethod
    from art.estimators.classification import PyTorchClassifier

    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), x.shape[1:], 5, **options)
    attack = BasicIterativeMethod(classifier, eps=EPS, eps_step=ALPHA, max_iter=STEPS, verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "art"])
def test_without_momentum_and_diversity_it_is_ifgsm(library: str) -> None:
    model, x, y = scene()
    theirs = iterative(library, model, x, y)
    for attack in (MomentumDiverseFGSM(p=0.0, momentum=0.0, steps=STEPS, step_size=ALPHA),
                   DiverseFGSM(p=0.0, steps=STEPS, step_size=ALPHA)):  # fmt: skip
        torch.testing.assert_close(attacked(attack, model, x, y), theirs, rtol=0, atol=1e-6)


def test_one_step_without_diversity_is_fgsm() -> None:
    model, x, y = scene()
    fgsm = attacked(robplug.attack("robplug/fgsm"), model, x, y)
    assert torch.equal(attacked(MomentumDiverseFGSM(p=0.0, steps=1, step_size=EPS), model, x, y), fgsm)


def test_without_momentum_it_is_di2_fgsm() -> None:
    model, x, y = scene()
    options = {"steps": STEPS, "step_size": ALPHA}
    one, other = MomentumDiverseFGSM(momentum=0.0, **options), DiverseFGSM(**options)  # type: ignore[arg-type]
    assert torch.equal(attacked(one, model, x, y), attacked(other, model, x, y))


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_with_diversity_it_is_torchattacks_difgsm(momentum: float) -> None:
    """On 10x10 images a resize rate of 0.9 leaves one size and one place, so that nothing is random."""
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = scene(side=10)
    options = {"resize_rate": 0.9, "diversity_prob": 1.0, "decay": momentum}
    theirs = torchattacks.DIFGSM(model, eps=EPS, alpha=ALPHA, steps=STEPS, **options)(x, y)
    attack = MomentumDiverseFGSM(
        p=1.0, ratio=0.9, mode="bilinear", padding="zero", momentum=momentum, steps=STEPS, step_size=ALPHA
    )
    torch.testing.assert_close(attacked(attack, model, x, y), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("eps", "width", "steps"),
    [(15 / 255, 1.0, 18), (16 / 255, 1.0, 20), (8 / 255, 1.0, 10), (0, 1.0, 1), (32, 255, 36)],
)
def test_the_papers_number_of_steps(eps: float, width: float, steps: int) -> None:
    how = MomentumDiverseFGSM()._steps(eps, (0.0, width))
    assert (how.steps, how.step_size) == (steps, width / 255)


@pytest.mark.parametrize("attack", [DiverseFGSM(), MomentumDiverseFGSM(p=1.0, per_sample=True, draws=2)])
def test_ball_bounds_and_determinism(attack: Attack) -> None:
    model, x, y = scene()
    eps = 15 / 255
    once, again, other = (attacked(attack, model, x, y, eps, seed) for seed in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert float((once - x).abs().max()) == pytest.approx(eps, abs=1e-6)
    assert 0 <= float(once.min()) and float(once.max()) <= 1


@pytest.mark.parametrize("options", [{}, {"resize_back": True, "per_sample": True}])
def test_a_sample_gets_alone_what_it_gets_in_company(options: dict[str, bool]) -> None:
    model, x, y = scene()
    model, x = model.double(), x.double()
    attack = MomentumDiverseFGSM(**options)  # type: ignore[arg-type]
    together = attacked(attack, model, x, y)
    rows = []
    for n in range(len(x)):
        threat = ThreatModel("linf", EPS)
        rows.append(attack.run(robplug.target(model), x[n : n + 1], y[n : n + 1], threat, Rng(0, [n])).x_adv)
    torch.testing.assert_close(together, torch.cat(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True])
def test_equation_7_as_one_would_type_it(targeted: bool) -> None:
    model, x, y = scene()
    labels = (y + 1) % 5 if targeted else y
    rng = Rng(0, range(6))
    diverse = InputDiversity()
    x_adv, velocity = x, torch.zeros_like(x)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        loss = nn.CrossEntropyLoss(reduction="sum")(model(diverse(x_adv, rng)), labels)
        (gradient,) = torch.autograd.grad(-loss if targeted else loss, x_adv)
        velocity = velocity + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        x_adv = (x_adv + ALPHA * velocity.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    attack = MomentumDiverseFGSM(steps=STEPS, step_size=ALPHA)
    found = attacked(attack, model, x, y, goal=labels if targeted else None)
    torch.testing.assert_close(found, x_adv.detach(), rtol=0, atol=1e-6)
    assert not torch.equal(found, attacked(MomentumDiverseFGSM(p=0.0, steps=STEPS, step_size=ALPHA), model, x, y))


def test_a_model_of_one_size_is_told_from_other_errors() -> None:
    _, x, y = scene()
    model = nn.Sequential(nn.Flatten(), nn.Linear(1200, 5))
    with pytest.raises(InputError, match="takes images of 22x22, got one for 20x20; set resize_back=True"):
        attacked(DiverseFGSM(), model, x, y)
    attacked(DiverseFGSM(resize_back=True), model, x, y)
    attacked(DiverseFGSM(ratio=0.8), model, x, y)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attacked(DiverseFGSM(p=0.0), nn.Linear(3, 3), x, y)


def test_samples_of_any_shape_without_diversity() -> None:
    model, x, y = nn.Linear(7, 3), torch.rand(4, 7), torch.zeros(4).long()
    attacked(MomentumDiverseFGSM(p=0.0), model, x, y)
    with pytest.raises(InputError, match=r"images \(N, C, H, W\) to resize, got \(4, 7\)"):
        attacked(MomentumDiverseFGSM(p=1.0), model, x, y)


def test_bad_input_is_named() -> None:
    for options, words in (
        ({"momentum": -1.0}, "momentum >= 0, got -1.0"),
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"draws": 0}, "draws >= 1, got 0"),
        ({"step_size": -0.1}, "step_size >= 0, got -0.1"),
        ({"p": 2.0}, "probability p from 0 to 1, got 2.0"),
    ):
        with pytest.raises(InputError, match=words):
            MomentumDiverseFGSM(**options)  # type: ignore[arg-type]
    model, x, y = scene()
    for threat, words in ((ThreatModel("l2", 1.0), "norm linf, got 'l2'"), (ThreatModel("linf"), "with eps")):
        with pytest.raises(ThreatError, match=words):
            DiverseFGSM().run(robplug.target(model), x, y, threat, Rng(0, range(6)))
