"""Verdicts on hand-made results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import robplug
from robplug.norms import L2, LINF, Measuring
from robplug.referee.guard import Outcome
from robplug.referee.verify import UNCHANGED, Batch, verify
from robplug.types import Perturbed, SampleResult, ThreatModel


class Sign(nn.Module):
    """Class 1 where the mean of the image is above zero; bounds -1 to 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([-mean, mean], 1)


def rows_of(x: torch.Tensor, x_adv: torch.Tensor, threat: ThreatModel, y: list[int], goal: list[int] | None = None):
    target = robplug.target(Sign(), bounds=(-1, 1))
    norm = {"linf": LINF, "l2": L2}[threat.norm]
    goals = None if goal is None else torch.tensor(goal)
    batch = Batch(list(range(len(x))), x, torch.tensor(y), goals, target.predict(x))
    return verify(target, norm, threat, batch, Outcome(Perturbed(x_adv[batch.attacked])), batch_size=2).rows


def flat(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)


def test_untargeted_verdicts() -> None:
    x = flat([0.1, 0.1, 0.1, -0.1, 0.1])
    x_adv = flat([-0.1, 0.05, -0.2, -0.1, -1.3])
    threat = ThreatModel("linf", 0.2, bounds=(-1, 1))
    rows = rows_of(x, x_adv, threat, [1, 1, 1, 1, 1])
    assert [row.status for row in rows] == ["broken", "robust", "invalid", "misclassified", "invalid"]
    assert [row.prediction for row in rows] == [1, 1, 1, 0, 1]
    assert [row.prediction_adv for row in rows] == [0, 1, 0, -1, 0]
    assert abs(rows[0].distance - 0.2) < 1e-7 and rows[0].excess == 0
    assert abs(rows[2].excess - 0.1) < 1e-6
    assert "bounds" in rows[4].note


def test_targeted_verdicts_ask_for_the_goal() -> None:
    x = flat([0.1, 0.1, -0.1])
    rows = rows_of(x, flat([-0.1, 0.05, 0.1]), ThreatModel("linf", 0.2, (-1, 1), targeted=True), [1, 1, 1], [0, 0, 0])
    assert [row.status for row in rows] == ["broken", "robust", "misclassified"]
    assert [row.y_goal for row in rows] == [0, 0, 0]


def test_a_minimal_attack_is_broken_at_any_distance_and_keeps_it() -> None:
    rows = rows_of(flat([0.1, 0.9]), flat([-0.1, -0.9]), ThreatModel("l2", None, (-1, 1)), [1, 1])
    assert [row.status for row in rows] == ["broken", "broken"]
    assert [round(row.distance, 6) for row in rows] == [0.4, 3.6]


@pytest.mark.parametrize(("eps", "said"), [(0.2, True), (None, True), (0.0, False)])
def test_a_robust_sample_that_came_back_unchanged_says_so(eps: float | None, said: bool) -> None:
    """An attack that could not start is no evidence; a ball of radius 0 holds nothing else."""
    rows = rows_of(flat([0.1, 0.1]), flat([0.1, 0.1 + (eps != 0) / 16]), ThreatModel("linf", eps, (-1, 1)), [1, 1])
    assert [row.status for row in rows] == ["robust", "robust"]
    assert [row.note for row in rows] == [UNCHANGED if said else "", ""]


def test_an_unchanged_sample_need_not_be_the_attack_s_doing() -> None:
    """It had broken the sample before, or the sample is another target's."""
    x, threat, target = flat([0.1, 0.1]), ThreatModel("linf", 0.2, (-1, 1)), robplug.target(Sign(), bounds=(-1, 1))
    outcome = Outcome(Perturbed(x.clone()), silent=torch.tensor([True, False]))
    for made in (None, torch.tensor([True, True])):
        batch = Batch([0, 1], x, torch.tensor([1, 1]), None, target.predict(x), made=made)
        rows = verify(target, LINF, threat, batch, outcome, batch_size=2).rows
        assert [row.note for row in rows] == ["", "" if made is not None else UNCHANGED]


def test_an_empty_batch_of_attacked_samples() -> None:
    rows = rows_of(flat([0.1]), flat([0.1]), ThreatModel("linf", 0.1, (-1, 1)), [0])
    assert [row.status for row in rows] == ["misclassified"]


class Shown:
    """Believes the witness, (N, 1), if it is the mean change, and measures twice its size."""

    name = "shown"

    def __init__(self) -> None:
        self.asked = 0

    def distance(self, x: torch.Tensor, x_adv: torch.Tensor, witness: torch.Tensor | None = None) -> torch.Tensor:
        assert witness is not None
        change = (x_adv - x).flatten(1).mean(1)
        return witness[:, 0].abs().double().masked_fill((witness[:, 0] - change).abs() > 1e-6, math.inf)

    def measures(
        self, x: torch.Tensor, x_adv: torch.Tensor, witness: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        assert witness is not None and len(witness) == len(x) == len(x_adv) and bool(x_adv.isfinite().all())
        self.asked += 1
        return {"twice": 2 * witness[:, 0].abs().double(), "rows": torch.full((len(x),), float(len(x))).double()}

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        return eps

    def ball(self, x: torch.Tensor, eps: float | None, bounds: tuple[float, float]) -> Any:
        raise AssertionError("a verdict measures, and never moves in a ball")


def measured(shown: list[float], x_adv: torch.Tensor) -> list[SampleResult]:
    """Verdicts on changes of 0.1 x, of which the fourth is misclassified, under a norm with measures."""
    x = flat([0.1, 0.1, 0.1, -0.1, 0.1])
    target, norm = robplug.target(Sign(), bounds=(-1, 1)), Shown()
    batch = Batch(list(range(5)), x, torch.ones(5, dtype=torch.int64), None, target.predict(x))
    perturbed = Perturbed(x_adv[batch.attacked], torch.tensor(shown).view(-1, 1)[batch.attacked])
    rows = verify(target, norm, ThreatModel("shown", 0.5, (-1, 1)), batch, Outcome(perturbed), batch_size=2).rows
    assert norm.asked == 1
    return rows


def test_measures_of_a_norm_stand_in_the_rows() -> None:
    rows = measured([-0.2, 0.0, -0.7, -0.2, -0.2], flat([-0.1, 0.1, -0.6, -0.3, -0.1]))
    assert [row.status for row in rows] == ["broken", "robust", "invalid", "misclassified", "broken"]
    assert [row.measures.get("twice") for row in rows] == [
        pytest.approx(0.4),
        0.0,
        pytest.approx(1.4),
        None,
        rows[0].measures["twice"],
    ]
    assert [row.measures.get("rows") for row in rows] == [4, 4, 4, None, 4]


def test_what_is_not_believed_is_not_measured() -> None:
    x_adv = flat([-0.1, 0.1, -0.6, -0.3, -0.1])
    x_adv[2, 0, 0, 0] = math.nan
    rows = measured([-0.1, 0.0, -0.7, -0.2, -0.2], x_adv)
    assert [row.status for row in rows] == ["invalid", "robust", "invalid", "misclassified", "broken"]
    assert [row.measures and math.isnan(row.measures["twice"]) for row in rows] == [True, False, True, {}, False]
    assert [row.measures.get("rows") for row in rows][1::3] == [3, 3]


def test_a_norm_need_not_measure_more() -> None:
    assert isinstance(Shown(), Measuring) and not isinstance(L2, Measuring)
    rows = rows_of(flat([0.1]), flat([-0.1]), ThreatModel("linf", 0.2, (-1, 1)), [1])
    assert [row.measures for row in rows] == [{}]
