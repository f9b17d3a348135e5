"""The norm of rotations and translations, and the attacks of ART and Foolbox that look for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from art.attacks.evasion import SpatialTransformation
from art.estimators.classification import PyTorchClassifier
from foolbox.attacks.spatial_attack_transformations import rotate_and_shift
from torch import Tensor, nn

import robplug
from robplug.adapters.motion import MOTION, move_by_art, move_by_foolbox
from robplug.errors import InputError, ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import Target
from robplug.testing.checks import checks_for
from robplug.testing.run import Check, list_checks
from robplug.types import Perturbed, ThreatModel

NORM = "rotation-translation"
FOOLBOX, ART = "foolbox/spatial", "art/spatial-transformation"
GRID = {"num_translations": 3, "num_rotations": 3}


def images(*shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (low + (high - low) * torch.rand(*shape)).to(dtype).clamp(low, high)


def motions() -> Tensor:
    """Returns motions in the box of 2 pixels and 20 degrees, half of them by whole pixels."""
    motion = (torch.rand(6, 3, dtype=torch.float64) * 2 - 1) * torch.tensor([2.0, 2.0, 20.0])
    motion[3:, :2] = torch.tensor([[1.0, -2.0], [0.0, 1.0], [2.0, 0.0]])
    return motion


def moved(x: Tensor, motion: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Returns six images: three moved as Foolbox does it, three as ART does it, each by a motion of its own."""
    ways: list[Callable[[Tensor, list[float]], Tensor]] = [move_by_foolbox] * 3 + [move_by_art] * 3
    parts = [way(x[i : i + 1].float(), motion[i].tolist()) for i, way in enumerate(ways)]
    return torch.cat(parts).clamp(*bounds).to(x.dtype)


def test_distances_by_hand() -> None:
    x = images(1, 3, 8, 8)
    left, down = torch.zeros_like(x), torch.zeros_like(x)
    left[..., :-1], down[..., 1:, :] = x[..., 1:], x[..., :-1, :]

    def distance(x_adv: Tensor, *motion: float) -> float:
        return float(MOTION.distance(x, x_adv, torch.tensor([motion], dtype=torch.float64)))

    assert distance(x, 0.0, 0.0, 0.0) == 0.0
    assert distance(left, 8 / 7, 0.0, 0.0) == 8 / 7  # Foolbox's pixel is 7/8 of one
    assert distance(left, 0.0, -1.0, 0.0) == 1.0  # as ART says it
    assert distance(down, 1.0, 0.0, 0.0) == 1.0
    assert sorted(distance(torch.rot90(x, 1, (2, 3)), 0.0, 0.0, angle) for angle in (-90.0, 90.0)) == [9.0, math.inf]
    assert sorted(distance(torch.rot90(x, 2, (2, 3)), 0.0, 0.0, angle) for angle in (90.0, 180.0)) == [18.0, math.inf]


def test_the_sample_itself_needs_no_witness() -> None:
    x = images(3, 1, 6, 6)
    for witness in (None, torch.full((3, 3), 5.0), torch.full((3, 3), math.nan), torch.zeros(1)):
        distance = MOTION.distance(x, x.clone(), witness)
        assert distance.dtype == torch.float64 and distance.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), (0.0, 255.0)])
def test_honest_motions_are_believed_in_every_precision(dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    x, motion = images(6, 3, 16, 16, low=bounds[0], high=bounds[1], dtype=dtype), motions()
    distance = MOTION.distance(x, moved(x, motion, bounds), motion)
    assert distance.dtype == torch.float64
    assert torch.equal(distance, (motion / torch.tensor([1.0, 1.0, 10.0])).abs().amax(1))


def test_the_resamplers_are_the_libraries_own() -> None:
    x = images(2, 3, 9, 9)
    classifier = PyTorchClassifier(
        nn.Sequential(nn.Flatten()), nn.CrossEntropyLoss(), (3, 9, 9), 243, clip_values=(0.0, 1.0)
    )
    theirs = torch.from_numpy(SpatialTransformation(classifier)._perturb(x.numpy(), 1, -2, 17.0))
    assert torch.allclose(move_by_art(x, [1.0, -2.0, 17.0]).clamp(0, 1), theirs, atol=1e-6)
    assert (move_by_art(x, [1.0, -2.0, 17.0]) > 1).any(), "splines are meant to overshoot, so that clipping matters"
    import eagerpy

    theirs = rotate_and_shift(eagerpy.astensor(x), translation=(0.3, -1.2), rotation=17.0).raw
    assert torch.equal(move_by_foolbox(x, [0.3, -1.2, 17.0]), theirs)


def test_a_liar_cannot_claim_a_small_motion() -> None:
    x, motion = images(6, 1, 8, 8), motions()
    x_adv = moved(x, motion)
    assert MOTION.distance(x, x_adv, motion).isfinite().all()
    for lie in (0.5 * motion, 0.999 * motion, 0 * motion, -motion, motion.flip(0), motion[:, [1, 0, 2]]):
        assert MOTION.distance(x, x_adv, lie).isinf().all()
    for wrong in (None, motion[:, :2], motion[:5], motion.flatten(), motion[..., None]):
        assert MOTION.distance(x, x_adv, wrong).isinf().all()
    slightly = x_adv.clone()
    slightly[2, 0, 3, 3] += 1e-4
    slightly[4, 0, 3, 3] += 1e-4
    assert MOTION.distance(x, slightly, motion).isinf().tolist() == [i in (2, 4) for i in range(6)]


def test_clipping_excuses_nothing_inside_the_values_of_the_sample() -> None:
    x, still = images(1, 1, 8, 8), torch.zeros(1, 3)
    shifted = move_by_art(x, [1.0, 0.0, 20.0])
    assert MOTION.distance(x, shifted.clamp(0, 1), torch.tensor([[1.0, 0.0, 20.0]])).isfinite()
    for grey in (torch.full_like(x, 0.5), x.clamp(0.3, 0.7), x.clamp(max=0.9), torch.zeros_like(x)):
        assert MOTION.distance(x, grey, still).isinf()
    assert MOTION.distance(x, shifted.clamp(0.2, 0.8), torch.tensor([[1.0, 0.0, 20.0]])).isinf()


def test_a_shift_of_next_to_nothing_does_not_explain_a_black_row() -> None:
    """A spline's samples from outside are 0, however little outside; ART itself shifts by whole pixels only."""
    x, motion = images(1, 1, 8, 8), [1e-9, 0.0, 0.0]
    black = move_by_art(x, motion).clamp(0, 1)
    assert (black[0, 0, 0] < 1e-9).all() and torch.allclose(black[0, 0, 1:], x[0, 0, 1:], atol=1e-5)
    assert MOTION.distance(x, black, torch.tensor([motion], dtype=torch.float64)).isinf()


def test_nothing_is_believed_of_nan() -> None:
    x, motion = images(6, 1, 8, 8), motions()
    x_adv = moved(x, motion)
    x_adv[0, 0, 0, 0], x_adv[3, 0, 0, 0] = math.nan, math.inf
    motion[1, 2], motion[2, 0], motion[4, 0] = math.nan, math.inf, 1e300
    assert MOTION.distance(x, x_adv, motion).isinf().tolist() == [True] * 5 + [False]


def test_what_is_no_image_has_not_been_moved() -> None:
    x = images(2, 9)
    assert MOTION.distance(x, x, None).tolist() == [0.0, 0.0]
    assert MOTION.distance(x, x + 1, torch.zeros(2, 3)).isinf().all()


def test_only_the_libraries_move_in_it() -> None:
    with pytest.raises(ThreatError, match=r"rotation-translation; use foolbox/spatial or art/spatial-transformation"):
        MOTION.ball(images(1, 1, 4, 4), 1.0, (0.0, 1.0))


def test_the_conformance_kit_measures_it_and_asks_for_no_ball() -> None:
    found = {check.name: check.result() for check in list_checks("robplug") if check.spec.name == NORM}
    assert {name for name, result in found.items() if result.status == "passed"} == {"resolves", "name", "allowed"}
    assert {result.status for result in found.values()} == {"passed", "skipped"}
    assert found["project"].message.startswith("it has no ball: expected a norm")


@pytest.mark.parametrize("name", [FOOLBOX, ART])
def test_the_attacks_keep_the_rules_of_all_others(name: str) -> None:
    spec = registry().spec("attack", name)
    results = [Check(spec, function).result() for function in checks_for(spec)]
    failed = {result.check: result.message for result in results if result.status == "failed"}
    assert set(failed) <= {"fields_documented"}, failed  # they are, by the library


# the attacks


@functools.cache
def digits() -> tuple[Target, Tensor, Tensor]:
    target, data = robplug.target("robplug/digits-standard"), robplug.dataset("digits").head(40)
    right = target.predict(data.x) == data.y
    return target, data.x[right], data.y[right]


def attack(name: str, eps: float, rows: slice = slice(None), seed: int = 0, **params: Any) -> Perturbed:
    target, x, y = digits()
    ids = range(len(x))[rows]
    return robplug.attack(name, **params).run(target, x[rows], y[rows], ThreatModel(NORM, eps), Rng(seed, ids))


CASES = [
    pytest.param(FOOLBOX, {}, False, id="foolbox"),
    pytest.param(FOOLBOX, {}, True, id="foolbox-targeted"),
    pytest.param(FOOLBOX, {"grid_search": False, "random_steps": 30}, False, id="foolbox-random"),
    pytest.param(ART, GRID, False, id="art"),
]


@pytest.mark.parametrize(("name", "params", "targeted"), CASES)
def test_the_referee_judges_every_row(name: str, params: dict[str, Any], targeted: bool, tmp_path: Path) -> None:
    plan = {
        "targets": [{"name": "robplug/digits-standard"}],
        "datasets": [{"name": "digits", "samples": 40}],
        "threats": [{"norm": NORM, "eps": [1, 2], "targeted": targeted}],
        "attacks": [{"name": name, **params}],
        "chunk": 16,
    }
    rows = robplug.evaluate(plan, out=tmp_path / "run").rows()
    assert len(rows) == 80
    assert {row["status"] for row in rows} <= {"misclassified", "robust", "broken"}
    for eps in (1, 2):
        broken = [row for row in rows if row["eps"] == eps and row["status"] == "broken"]
        assert broken and all(0 < row["distance"] <= eps * (1 + 1e-6) for row in broken)
        if name == FOOLBOX:
            assert all(row["claim"] == (row["status"] == "broken") for row in rows if row["status"] != "misclassified")
    assert any(row["distance"] > 1 for row in rows), "the larger radius is not used"


@pytest.mark.parametrize(("name", "params"), [(FOOLBOX, {}), (FOOLBOX, {"grid_search": False}), (ART, GRID)])
def test_equal_seeds_give_equal_motions(name: str, params: dict[str, Any]) -> None:
    one, again, other = (attack(name, 1.5, seed=seed, **params) for seed in (3, 3, 4))
    assert torch.equal(one.x_adv, again.x_adv) and torch.equal(one.witness, again.witness)
    assert torch.equal(one.x_adv, other.x_adv) == ("grid_search" not in params)


@pytest.mark.parametrize(("name", "params", "eps"), [(FOOLBOX, {}, 0.5), (ART, GRID, 1.0)])
def test_a_sample_gets_alone_what_it_gets_in_company(name: str, params: dict[str, Any], eps: float) -> None:
    together = attack(name, eps, **params)
    assert len(together.witness.unique(dim=0)) > 3
    for i in range(6):
        alone = attack(name, eps, slice(i, i + 1), **params)
        assert torch.allclose(alone.x_adv, together.x_adv[i : i + 1], atol=1e-6)
        assert torch.equal(alone.witness, together.witness[i : i + 1])


def test_the_radius_is_the_grid_of_foolbox() -> None:
    found = attack(FOOLBOX, 0.5)
    assert set(found.witness[:, :2].flatten().tolist()) <= {-0.5, -0.25, 0.0, 0.25, 0.5}
    assert set(found.witness[:, 2].tolist()) <= {-5.0, -2.5, 0.0, 2.5, 5.0}
    unmoved = (found.witness == 0).all(1)
    assert unmoved.any() and torch.equal(unmoved, ~found.claim)
    assert torch.equal(found.x_adv[unmoved], digits()[1][unmoved])


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, float]]:
    """Collects the motions that ART tries."""
    motions: list[tuple[int, int, float]] = []
    perturb = SpatialTransformation._perturb

    def watched(self: Any, x: Any, down: int, right: int, angle: float) -> Any:
        motions.append((down, right, float(angle)))
        return perturb(self, x, down, right, angle)

    monkeypatch.setattr(SpatialTransformation, "_perturb", watched)
    return motions


def test_art_takes_percent_of_channels_and_rows_and_the_adapter_means_pixels(tried: list[Any]) -> None:
    target, x, _ = digits()
    bare = PyTorchClassifier(target.module.eval(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0))
    SpatialTransformation(bare, max_translation=25.0, num_translations=3, verbose=False).generate(x[:2].numpy())
    assert sorted(set(tried)) == [(0, -2, 0.0), (0, 0, 0.0), (0, 2, 0.0)], "a grey image does not move down"
    tried.clear()
    attack(ART, 2.9, slice(0, 1), **GRID)
    assert {motion[0] for motion in tried} == {motion[1] for motion in tried} == {-2, 0, 2}
    assert {motion[2] for motion in tried} == {-29.0, 0.0, 29.0}


@pytest.mark.parametrize(
    ("eps", "shape", "shifts", "angle"),
    [(0.5, (1, 8, 8), (0, 0), 5.0), (3.0, (3, 8, 12), (2, 3), 30.0), (50.0, (2, 8, 8), (8, 8), 180.0)],
)
def test_art_uses_the_radius_as_far_as_it_can(
    eps: float, shape: tuple[int, ...], shifts: tuple[int, int], angle: float, tried: list[Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))
    x = images(4, *shape)
    found = robplug.attack(ART, **GRID).run(robplug.target(model), x, None, ThreatModel(NORM, eps), Rng(0, range(4)))
    assert tuple(max(abs(motion[axis]) for motion in tried) for axis in (0, 1)) == shifts
    assert max(abs(motion[2]) for motion in tried) == angle
    assert (MOTION.distance(x, found.x_adv, found.witness) <= eps).all()
    assert not torch.equal(found.x_adv, x)


def test_art_picks_one_motion_for_a_batch_and_the_adapter_one_for_each_sample() -> None:
    target, x, _ = digits()
    bare = PyTorchClassifier(target.module.eval(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0))
    library = SpatialTransformation(bare, max_translation=25.0, max_rotation=20.0, verbose=False, **GRID)
    together = torch.from_numpy(library.generate(x.numpy()))
    motion = torch.tensor([[library.attack_trans_x, library.attack_trans_y, library.attack_rot]]).repeat(len(x), 1)
    assert MOTION.distance(x, together, motion).isfinite().all()
    assert len(attack(ART, 1.0, **GRID).witness.unique(dim=0)) > 3


def test_arts_grid_as_shipped_is_one_corner() -> None:
    found = attack(ART, 2.0)
    assert set(map(tuple, found.witness.tolist())) == {(0.0, 0.0, 0.0), (-2.0, -2.0, -20.0)}


def test_arts_smallest_rotation_blackens_half_of_every_edge() -> None:
    black = move_by_art(torch.ones(1, 1, 16, 16), [0.0, 0.0, 1e-6])[0, 0] < 0.5
    assert all(int(edge.sum()) in (8, 9) for edge in (black[0], black[-1], black[:, 0], black[:, -1]))
    assert not black[1:-1, 1:-1].any()


def test_foolbox_divides_by_the_wrong_side_and_is_refused_what_is_not_square() -> None:
    x = images(1, 1, 8, 16)
    shifted = move_by_foolbox(x, [1.0, 0.0, 0.0])  # 1 / (8 / 2) of a half width of 15 / 2 pixels
    expected = 0.125 * x[..., 1:15] + 0.875 * x[..., 2:16]
    assert torch.allclose(shifted[..., :14], expected, atol=1e-5), "1.875 pixels for one"
    assert MOTION.distance(x, shifted, torch.tensor([[1.0, 0.0, 0.0]])).isinf()
    target = robplug.target(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))
    with pytest.raises(InputError, match=r"square images \(N, C, H, H\) for foolbox/spatial"):
        robplug.attack(FOOLBOX).run(target, x, None, ThreatModel(NORM, 1.0), Rng(0, [0]))


def test_no_rounding_out_of_the_box() -> None:
    """The weights of Foolbox's interpolation add up to 1 but for rounding: an image of 2.64 gets values above."""

    class Dims(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([mean - 2.639, 2.639 - mean], 1)

    bounds = (0.0, 2.64)
    x, threat = torch.full((1, 1, 9, 9), 2.64), ThreatModel(NORM, 0.5, bounds)
    for seed in range(20):
        made = robplug.attack(FOOLBOX, grid_search=False)
        found = made.run(robplug.target(Dims(), bounds=bounds), x, None, threat, Rng(seed, [0]))
        assert found.claim.all() and found.x_adv.max() <= x.max()
        assert MOTION.distance(x, found.x_adv, found.witness) <= 0.5


def test_a_float64_model_is_attacked_in_float32() -> None:
    torch.manual_seed(0)
    target = robplug.target(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    x = images(4, 1, 8, 8, dtype=torch.float64)
    for name, params in ((FOOLBOX, {}), (ART, GRID)):
        found = robplug.attack(name, **params).run(target, x, None, ThreatModel(NORM, 2.0), Rng(0, range(4)))
        distance = MOTION.distance(x, found.x_adv, found.witness)
        assert found.x_adv.dtype == torch.float64 and (distance <= 2.0).all() and (distance > 0).any()
