"""The rules of an attack: each function takes an AttackSpec and raises AssertionError where the rule is broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import SkipTest

import torch
from torch import Tensor

from robplug.isolation import ModuleState, global_numbers, seeded_globals
from robplug.plugins import registry
from robplug.testing.fixtures import WIDE, linear, network
from robplug.testing.trials import LabelsOnly, NoGradients, Trial, require, trial
from robplug.types import AttackSpec, Perturbed

ROUNDING = 1e-5
"""Largest difference, relative to the width of the data, that the order of a float32 sum may make."""


def check_output(spec: AttackSpec) -> None:
    """In each norm of the Spec: x_adv has x's shape, dtype and device, is finite and carries no graph."""
    for norm in spec.norms:
        _check_perturbed(given := trial(spec, network(), norm), given.call())


def check_float64(spec: AttackSpec) -> None:
    """With a float64 model and float64 samples, x_adv is float64."""
    _check_perturbed(given := trial(spec, network(dtype=torch.float64)), given.call())


def _check_perturbed(given: Trial, result: Perturbed) -> None:
    x, x_adv, count = given.x, result.x_adv, len(given.x)
    expected = (tuple(x.shape), x.dtype, x.device)
    got = (tuple(x_adv.shape), x_adv.dtype, x_adv.device)
    require(got == expected, f"x_adv has shape, dtype, device {got}, expected {expected}")
    require(x_adv.isfinite().all(), f"x_adv is not finite in {given.threat.norm}")
    require(not x_adv.requires_grad, "x_adv carries a graph; detach it")
    claim, witness = result.claim, result.witness
    is_mask = claim is None or (tuple(claim.shape), claim.dtype) == ((count,), torch.bool)
    require(is_mask, f"claim is {claim!r}, expected None or a bool tensor of shape ({count},)")
    require(witness is None or len(witness) == count, f"witness has no first axis of {count} samples")


def check_budget_kept(spec: AttackSpec) -> None:
    """A fixed budget holds in each norm, with bounds [0, 1] and others, as the norm itself measures it."""
    if spec.budget == "minimal":
        raise SkipTest("it looks for the smallest distance")
    for given in _norms_and_bounds(spec):
        result, threat = given.run(), given.threat
        norm = registry().norm(threat.norm)
        worst = float(norm.distance(given.x, result.x_adv, result.witness).max())
        limit = norm.allowed(threat.eps or 0.0, given.x[0].numel(), threat.bounds)
        where = f"{threat.norm} distance {worst:.7g} with bounds {threat.bounds}"
        require(worst <= limit, f"{where} is beyond eps {threat.eps:.7g}")


def check_bounds_kept(spec: AttackSpec) -> None:
    """x_adv stays inside the bounds of the data, [0, 1] and others, also with a radius that reaches far beyond."""
    for given in _norms_and_bounds(spec):
        x_adv = given.within(3 * (given.threat.eps or 0.0)).run().x_adv
        low, high = given.threat.bounds
        got = float(x_adv.min()), float(x_adv.max())
        require(low <= got[0] and got[1] <= high, f"x_adv has values in {got}, the bounds are {(low, high)}")


def _norms_and_bounds(spec: AttackSpec) -> Iterator[Trial]:
    for bounds in ((0.0, 1.0), WIDE):
        for norm in spec.norms:
            yield trial(spec, network(bounds), norm)


def check_deterministic(spec: AttackSpec) -> None:
    """The same random streams give the same x_adv, bit for bit, whatever the global generators hold."""
    given = trial(spec, network())
    results = []
    for seed in (1, 2):
        with seeded_globals(seed):
            results.append(given.run().x_adv)
    require(torch.equal(*results), "two runs with equal rng differ; draw from rng, not from the global generators")


def check_stochastic_declared(spec: AttackSpec) -> None:
    """A Spec with stochastic=False gives the same x_adv whatever the seed."""
    if spec.stochastic:
        raise SkipTest("it says that it is stochastic")
    given = trial(spec, network())
    same = torch.equal(given.run().x_adv, replace(given, seed=1).run().x_adv)
    require(same, "another seed gives another x_adv, and its Spec says stochastic=False")


def check_batch_independent(spec: AttackSpec) -> None:
    """A sample gets alone what it gets in company: the same verdict, and in 95 % of cases the same x_adv."""
    given = trial(spec, network())
    together = given.run().x_adv
    alone = torch.cat([given.rows(slice(i, i + 1)).run().x_adv for i in range(len(given.x))])
    _check_same(given, together, alone, "alone and in company")


def check_non_contiguous(spec: AttackSpec) -> None:
    """Samples whose memory is not contiguous get the same x_adv."""
    given = trial(spec, network())
    strided = replace(given, x=given.x.transpose(2, 3).contiguous().transpose(2, 3))
    _check_same(given, given.run().x_adv, strided.run().x_adv, "with contiguous and with other memory")


def _check_same(given: Trial, one: Tensor, other: Tensor, when: str) -> None:
    low, high = given.threat.bounds
    require(one.shape == other.shape, f"{when}, x_adv has shapes {tuple(one.shape)} and {tuple(other.shape)}")
    verdicts = int((given.target.predict(one) != given.target.predict(other)).sum())
    require(verdicts == 0, f"{when}, {verdicts} of {len(one)} verdicts differ")
    differ = int(((one - other).abs().flatten(1).amax(1) > ROUNDING * (high - low)).sum())
    require(differ <= 0.05 * len(one), f"{when}, x_adv of {differ} of {len(one)} samples differ")


def check_asks_no_gradient(spec: AttackSpec) -> None:
    """An attack that needs scores or labels works on a model without gradients and never asks for one."""
    if spec.needs == "gradients":
        raise SkipTest("it says that it needs gradients")
    given = trial(spec, network())
    blind = NoGradients(given.target.module)
    problem = f"it asked for a gradient, and its Spec says needs={spec.needs!r}"
    try:
        given.on(blind, offers="scores").run()
    except Exception:  # raised on, but a gradient asked for is the better explanation of whatever it is
        require(not blind.asked, problem)
        raise
    require(not blind.asked, problem)


def check_asks_no_scores(spec: AttackSpec) -> None:
    """An attack that needs labels gives the same x_adv where the logits are one-hot."""
    if spec.needs != "labels":
        raise SkipTest(f"it says that it needs {spec.needs}")
    given = trial(spec, network())
    with_scores = given.run().x_adv
    with_labels = given.on(LabelsOnly(given.target.module), offers="labels").run().x_adv
    same = torch.equal(with_scores, with_labels)
    require(same, "one-hot logits change x_adv: it uses scores, and its Spec says needs='labels'")


def check_minimal(spec: AttackSpec) -> None:
    """The distances of a minimal attack on a linear model are smaller than the fixed radius that breaks as many."""
    if spec.budget != "minimal":
        raise SkipTest("its budget is fixed")
    norm, scene = _closed_form_norm(spec), linear()
    x_adv, broken = _attack_linear(trial(spec, scene, norm))
    require(broken.any(), "on a linear model it breaks nothing")
    found = registry().norm(norm).distance(scene.x, x_adv)[broken]
    fixed = scene.distances(norm).sort().values[int(broken.sum()) - 1]
    detail = f"median {norm} distance {found.median():.4g}, a fixed radius of {fixed:.4g} breaks as many samples"
    require(found.median() < fixed, f"it is not minimal: {detail}")


def check_stronger_than_nothing(spec: AttackSpec) -> None:
    """On a linear model, with twice the radius that breaks every sample, at least one is broken."""
    norm, scene = _closed_form_norm(spec), linear()
    eps = 2 * float(scene.distances(norm).max())
    _, broken = _attack_linear(trial(spec, scene, norm).within(eps))
    require(
        broken.any(),
        f"it breaks none of {len(broken)} linear problems with {norm} eps {eps:.3g}; eps {eps / 2:.3g} is enough",
    )


def _closed_form_norm(spec: AttackSpec) -> str:
    norms = [norm for norm in spec.norms if norm in ("linf", "l2", "l1")]
    if not norms:
        raise SkipTest("the smallest distance has a closed form in linf, l2 and l1 only")
    return norms[0]


def _attack_linear(given: Trial) -> tuple[Tensor, Tensor]:
    assert given.y is not None
    x_adv = given.run().x_adv
    return x_adv, given.target.predict(x_adv) != given.y


def check_model_untouched(spec: AttackSpec) -> None:
    """Modes, parameters, buffers, requires_grad and .grad of the model are afterwards what they were."""
    given = trial(spec, network())
    before = ModuleState(given.target.module)
    given.call()
    changes = before.restore()
    require(not changes, f"it changed {', '.join(changes)}")


def check_global_numbers_untouched(spec: AttackSpec) -> None:
    """The global generators of torch, numpy and random are afterwards where they were."""
    given = trial(spec, network())
    before = global_numbers()
    given.call()
    require(global_numbers() == before, "it used or reseeded the global generators of torch, numpy or random")


def check_inputs_untouched(spec: AttackSpec) -> None:
    """x, y and y_goal are not written to."""
    given = trial(spec, network())
    copies = {name: tensor.clone() for name in ("x", "y", "y_goal") if (tensor := getattr(given, name)) is not None}
    given.call()
    changed = [name for name, tensor in copies.items() if not torch.equal(tensor, getattr(given, name))]
    require(not changed, f"it changed {', '.join(changed)} in place")


def check_targeted(spec: AttackSpec) -> None:
    """More samples reach a class when it is the goal than when another class is."""
    if not spec.targeted:
        raise SkipTest("it says that it is untargeted only")
    scene = network()
    given, goals = trial(spec, scene), scene.ranked(1)
    there, elsewhere = (given.towards(scene.ranked(rank)).run().x_adv for rank in (1, 3))
    reached, anyway = (int((scene.target.predict(x_adv) == goals).sum()) for x_adv in (there, elsewhere))
    detail = f"{reached} of {len(goals)} samples reach their y_goal, and {anyway} with another y_goal"
    require(reached > anyway, f"y_goal has no effect: {detail}")


def check_y_may_be_none(spec: AttackSpec) -> None:
    """Without y, the target's own predictions are meant."""
    given = trial(spec, network())
    same = torch.equal(given.run().x_adv, replace(given, y=None).run().x_adv)
    require(same, "with y=None x_adv differs from that with the target's own predictions as y")


def check_empty_batch(spec: AttackSpec) -> None:
    """A batch of no samples gives an x_adv of no samples."""
    _check_perturbed(given := trial(spec, network()).rows(slice(0, 0)), given.call())


def check_batch_of_one(spec: AttackSpec) -> None:
    """A batch of one sample keeps its first axis."""
    _check_perturbed(given := trial(spec, network()).rows(slice(0, 1)), given.call())


ATTACK_CHECKS = (
    check_output,
    check_float64,
    check_budget_kept,
    check_bounds_kept,
    check_deterministic,
    check_stochastic_declared,
    check_batch_independent,
    check_non_contiguous,
    check_asks_no_gradient,
    check_asks_no_scores,
    check_minimal,
    check_stronger_than_nothing,
    check_model_untouched,
    check_global_numbers_untouched,
    check_inputs_untouched,
    check_targeted,
    check_y_may_be_none,
    check_empty_batch,
    check_batch_of_one,
)
