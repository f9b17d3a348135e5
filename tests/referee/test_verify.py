"""Verdicts on hand-made results."""

from __future__ import annotations

import torch
from torch import nn

import robplug
from robplug.norms import L2, LINF
from robplug.referee.guard import Outcome
from robplug.referee.verify import Batch, verify
from robplug.types import Perturbed, ThreatModel


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
    return verify(target, norm, threat, batch, Outcome(Perturbed(x_adv[batch.attacked])), batch_size=2)


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


def test_an_empty_batch_of_attacked_samples() -> None:
    rows = rows_of(flat([0.1]), flat([0.1]), ThreatModel("linf", 0.1, (-1, 1)), [0])
    assert [row.status for row in rows] == ["misclassified"]
