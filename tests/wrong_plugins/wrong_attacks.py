"""Attacks that each break one rule of the conformance kit, beside the honest one that they spoil."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from robplug import AttackSpec, Perturbed
from robplug.inputs import check_batch

NAN = float("nan")


@dataclass(frozen=True)
class Honest:
    """One signed step; the pieces are there to be spoiled.

    Attributes:
        share: length of the step as a share of eps.
    """

    share: float = 1.0

    def run(self, target, x, y, threat, rng, *, y_goal=None):
        labels = check_batch(target, x, y, threat, y_goal)
        direction = self.direction(target, x, labels, rng) * (-1 if threat.targeted else 1)
        return Perturbed(self.move(x, direction, threat))

    def direction(self, target, x, labels, rng):
        leaf = x.detach().clone().requires_grad_()
        loss = F.cross_entropy(target.logits(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient.sign()

    def move(self, x, direction, threat):
        eps = self.share * threat.eps
        low, high = threat.bounds
        moved = (x + eps * direction).clamp(x - eps, x + eps)
        return moved.clamp(low, high)


class LeavesBall(Honest):
    def move(self, x, direction, threat):
        return (x + 1.01 * threat.eps * direction).clamp(*threat.bounds)


class LeavesBox(Honest):
    def move(self, x, direction, threat):
        return x + threat.eps * direction


class AssumesUnitBox(Honest):
    def move(self, x, direction, threat):
        return (x + threat.eps * direction).clamp(0, 1)


class WrongDtype(Honest):
    def move(self, x, direction, threat):
        return super().move(x, direction, threat).double()


class Float32Only(Honest):
    def move(self, x, direction, threat):
        return super().move(x, direction, threat).float()


class WrongShape(Honest):
    def move(self, x, direction, threat):
        return super().move(x, direction, threat).flatten(1)


class ReturnsNan(Honest):
    def move(self, x, direction, threat):
        return torch.where(direction == 1, NAN, super().move(x, direction, threat))


class ReturnsGraph(Honest):
    def move(self, x, direction, threat):
        return super().move(x, direction, threat).requires_grad_()


class ReturnsTensor(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        return super().run(target, x, y, threat, rng, y_goal=y_goal).x_adv


class Crashes(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        raise KeyError("a\nkey")


class ReseedsTorch(Honest):
    def direction(self, target, x, labels, rng):
        torch.manual_seed(0)
        return super().direction(target, x, labels, rng)


class DrawsFromNumpy(Honest):
    def direction(self, target, x, labels, rng):
        np.random.rand()
        return super().direction(target, x, labels, rng)


class ReseedsRandom(Honest):
    def direction(self, target, x, labels, rng):
        random.seed(0)
        return super().direction(target, x, labels, rng)


class UsesGlobalNumbers(Honest):
    def direction(self, target, x, labels, rng):
        with torch.random.fork_rng():  # the state is kept, what was drawn is another's
            keep = torch.rand(x.shape[1:]) < 0.9
        return super().direction(target, x, labels, rng) * keep


class SaysDeterministic(Honest):
    def direction(self, target, x, labels, rng):
        return super().direction(target, x, labels, rng) * (rng.uniform(x.shape[1:], like=x) < 0.9)


class LeavesTrainMode(Honest):
    def direction(self, target, x, labels, rng):
        direction = super().direction(target, x, labels, rng)
        target.module.train()
        return direction


class LeavesEvalMode(Honest):
    def direction(self, target, x, labels, rng):
        target.module.eval()
        return super().direction(target, x, labels, rng)


class UpdatesBatchNorm(Honest):
    def direction(self, target, x, labels, rng):
        for part in target.module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean += 1e-6
        return super().direction(target, x, labels, rng)


class WritesGrad(Honest):
    def direction(self, target, x, labels, rng):
        leaf = x.detach().clone().requires_grad_()
        F.cross_entropy(target.logits(leaf), labels, reduction="sum").backward()
        return leaf.grad.sign()


class Unfreezes(Honest):
    def direction(self, target, x, labels, rng):
        target.module.requires_grad_(True)
        return super().direction(target, x, labels, rng)


class LooksAtNeighbours(Honest):
    def direction(self, target, x, labels, rng):
        return super().direction(target, x, labels, rng) * (x >= x.mean(0))


class DrawsByPosition(Honest):
    def direction(self, target, x, labels, rng):
        numbers = torch.rand(x.shape, generator=torch.Generator().manual_seed(rng.seed))
        return super().direction(target, x, labels, rng) * (numbers < 0.9)


class ClaimsScores(Honest):
    pass


class ClaimsScoresQuietly(Honest):
    def direction(self, target, x, labels, rng):
        try:
            return super().direction(target, x, labels, rng)
        except RuntimeError:
            return torch.ones_like(x)


class ClaimsLabels(Honest):
    def direction(self, target, x, labels, rng):
        """Each row of pixels the way that lowers the label's log-probability."""
        direction = torch.zeros_like(x)
        for row in range(8):
            probe = x.clone()
            probe[:, 0, row] += 0.01
            with torch.no_grad():
                own = [target.logits(z).log_softmax(1).gather(1, labels[:, None])[:, 0] for z in (x, probe)]
            direction[:, 0, row] = (own[0] - own[1]).sign()[:, None]
        return direction


class MutatesX(Honest):
    def move(self, x, direction, threat):
        return x.copy_(super().move(x, direction, threat)).clone()


class MutatesY(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        result = super().run(target, x, y, threat, rng, y_goal=y_goal)
        if y is not None:
            y.fill_(0)
        return result


class FailsEmpty(Honest):
    def move(self, x, direction, threat):
        assert x.max() <= threat.bounds[1]
        return super().move(x, direction, threat)


class SqueezesOne(Honest):
    def move(self, x, direction, threat):
        moved = super().move(x, direction, threat)
        return moved.squeeze(0)


class FailsNonContiguous(Honest):
    def move(self, x, direction, threat):
        flat = x.view(len(x), x[:1].numel())
        return super().move(flat, direction.reshape(flat.shape), threat).view(x.shape)


class IgnoresGoal(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        check_batch(target, x, y, threat, y_goal)
        own = target.predict(x) if y is None else y
        return Perturbed(self.move(x, self.direction(target, x, own, rng), threat))


class WalksAwayFromGoal(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        labels = check_batch(target, x, y, threat, y_goal)
        return Perturbed(self.move(x, self.direction(target, x, labels, rng), threat))


class NeedsY(Honest):
    def run(self, target, x, y, threat, rng, *, y_goal=None):
        check_batch(target, x, y, threat, y_goal)
        y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
        return super().run(target, x, y, threat, rng, y_goal=y_goal)


class DoesNothing(Honest):
    def move(self, x, direction, threat):
        return x.clone()


@dataclass(frozen=True)
class Undocumented(Honest):
    """One signed step.

    The other fields, steps among them, are for the reader to guess.

    Attributes:
        share: length of the step.
    """

    steps: int = 1


@dataclass
class NotFrozen:
    """One signed step, with a parameter that may change under way.

    Attributes:
        share: length of the step as a share of eps.
    """

    share: float = 1.0
    run = Honest.run
    direction = Honest.direction
    move = Honest.move


class SaysMinimal(Honest):
    def move(self, x, direction, threat):
        return (x + 0.03 * direction).clamp(*threat.bounds)


class Minimal(Honest):
    """The honest minimal attack: the shortest of many steps that breaks a sample."""

    def run(self, target, x, y, threat, rng, *, y_goal=None):
        labels = check_batch(target, x, y, threat, y_goal)
        direction = self.direction(target, x, labels, rng) * (-1 if threat.targeted else 1)
        x_adv, open_ = x.clone(), torch.ones(len(x), dtype=torch.bool)
        for length in torch.logspace(-3, -0.5, 40).tolist():
            x_adv[open_] = (x + length * direction).clamp(*threat.bounds)[open_]
            open_ &= (target.predict(x_adv) == labels) != threat.targeted
        return Perturbed(x_adv)


def spec(cls: type, **changes: object) -> AttackSpec:
    """The Spec of one of these classes."""
    settings = {"params": {"share": 1.0}, "name": f"wrong/{cls.__name__.lower()}", "make": f"{__name__}:{cls.__name__}"}
    return AttackSpec(**{**settings, **changes})  # type: ignore[arg-type]


HONEST = (spec(Honest), spec(Minimal, budget="minimal"))

# the Spec, the only checks that fail on it, and what their messages say
WRONG: tuple[tuple[AttackSpec, set[str], str], ...] = (
    (spec(LeavesBall), {"budget_kept"}, "is beyond eps 0.1"),
    (spec(LeavesBox), {"bounds_kept"}, "the bounds are (0.0, 1.0)"),
    (spec(AssumesUnitBox), {"budget_kept"}, "with bounds (-2.0, 3.0) is beyond eps 0.5"),
    (spec(WrongDtype), {"output", "empty_batch", "batch_of_one"}, "torch.float64"),
    (spec(Float32Only), {"float64"}, "torch.float32"),
    (spec(ReturnsGraph), {"output", "float64", "empty_batch", "batch_of_one"}, "detach"),
    (spec(ReseedsTorch), {"global_numbers_untouched"}, "global generators"),
    (spec(DrawsFromNumpy), {"global_numbers_untouched"}, "global generators"),
    (spec(ReseedsRandom), {"global_numbers_untouched"}, "global generators"),
    (spec(UsesGlobalNumbers), {"deterministic"}, "draw from rng"),
    (spec(SaysDeterministic), {"stochastic_declared"}, "stochastic=False"),
    (spec(LeavesTrainMode), {"model_untouched"}, "mode of net.dropout"),
    (spec(LeavesEvalMode), {"model_untouched"}, "mode of unused"),
    (spec(UpdatesBatchNorm), {"model_untouched"}, "net.norm.running_mean"),
    (spec(WritesGrad), {"model_untouched"}, ".grad of net.readout.weight"),
    (spec(Unfreezes), {"model_untouched"}, "requires_grad of net.conv.bias"),
    (spec(LooksAtNeighbours), {"batch_independent"}, "alone and in company"),
    (spec(DrawsByPosition, stochastic=True), {"batch_independent"}, "alone and in company"),
    (spec(ClaimsScores, needs="scores"), {"asks_no_gradient"}, "needs='scores'"),
    (spec(ClaimsScoresQuietly, needs="scores"), {"asks_no_gradient"}, "needs='scores'"),
    (spec(ClaimsLabels, needs="labels"), {"asks_no_scores"}, "it uses scores"),
    (spec(MutatesX), {"inputs_untouched"}, "it changed x in place"),
    (spec(MutatesY), {"inputs_untouched"}, "it changed y in place"),
    (spec(FailsEmpty), {"empty_batch"}, "raised RuntimeError"),
    (spec(SqueezesOne), {"batch_of_one", "batch_independent"}, "shape"),
    (spec(FailsNonContiguous), {"non_contiguous"}, "raised RuntimeError"),
    (spec(IgnoresGoal), {"targeted"}, "y_goal has no effect"),
    (spec(WalksAwayFromGoal), {"targeted"}, "y_goal has no effect"),
    (spec(NeedsY), {"y_may_be_none"}, "with y=None x_adv differs"),
    (spec(DoesNothing, targeted=False), {"stronger_than_nothing"}, "it breaks none of 20"),
    (spec(Undocumented, params={"share": 1.0, "steps": 1}), {"fields_documented"}, "the field steps is missing"),
    (spec(Honest, params={"share": 0.5}), {"params"}, "params has share = 0.5, the field's default is 1.0"),
    (spec(Honest, params={}), {"params"}, "the field share is missing in the Spec's params"),
    (spec(NotFrozen), {"frozen_dataclass", "params", "fields_documented"}, "use @dataclass(frozen=True)"),
    (spec(SaysMinimal, budget="minimal"), {"minimal"}, "it is not minimal"),
)

# these cannot be judged any further: the Spec, one check of many that fail, its message
HOPELESS: tuple[tuple[AttackSpec, str, str], ...] = (
    (spec(WrongShape), "output", "(20, 64), torch.float32"),
    (spec(ReturnsNan), "output", "x_adv is not finite"),
    (spec(ReturnsTensor), "output", "run returned a Tensor, expected a Perturbed"),
    (spec(Crashes), "output", "raised KeyError: 'a\\nkey'"),
    (spec(Honest, norms=("linf", "l7")), "budget_kept", "no norm named 'l7'"),
    (spec(Honest, make="wrong_attacks:Gone"), "resolves", "has no attribute 'Gone'"),
)
