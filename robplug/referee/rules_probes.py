"""The checks that look at the model: from what was measured on some samples, and from rows where these say the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from robplug.referee import formats
from robplug.referee.findings import (
    INVALID,
    MANY,
    SUSPICIOUS,
    CannotCheckError,
    Evidence,
    Finding,
    Probe,
    StepPoint,
    check,
    is_noise,
    is_one_step,
    share,
)
from robplug.referee.paired import Array, Pairs, Verdicts
from robplug.referee.wilson import Rate, wilson

STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of steps that the probe tries."""
STEP_NAMES = ("steps", "max_iter", "iterations")
"""Names of parameters that count gradient steps, over all libraries."""
DISAGREEMENT = 0.1
"""Median disagreement between gradients and finite differences above which the gradient is not the function's.

Kinks and float32 leave 0.01 or less on networks of ReLUs; a factor of 1.25 makes 0.11, another direction 0.5 and more.
"""


@check(
    "two identical calls differ",
    source="RobustBench's flags (Croce et al. 2021); Pintor et al. 2022, indicator 2",
    remedy="declare the target with stochastic = true, and give it eot and draws",
)
def repeatable(evidence: Evidence) -> Iterator[Finding]:
    """A model that is not declared stochastic answers one batch in two ways.

    Invalid: attack and verdict saw different models, and neither verdict can be had again.
    """
    if evidence.stochastic:
        raise CannotCheckError("the target is declared stochastic")
    differs, changes = (evidence.model.share("repeat", name) for name in ("differs", "changes"))
    if differs.count:
        told = (
            f"a second identical call gives other logits for {_of(differs)} samples, another class for {changes.count}"
        )
        yield Finding(INVALID, told, {"logits": differs.count, "classes": changes.count, "samples": differs.total})


@check(
    "answers that are no numbers",
    source="Athalye et al. 2018, section 3 (numeric instability)",
    remedy="find the operation that gives nan or inf; a detector is to answer with a class of its own",
)
def answers(evidence: Evidence) -> Iterator[Finding]:
    """The model gives nan or inf on clean, noisy or adversarial samples.

    Invalid: the largest of nan is no prediction, gradients end there, and such samples count as unresolved at best.
    """
    rows = 0
    for _, cell in evidence.cells:
        rows += sum(note == "makes the model give no number" for note in cell.table["note"].to_pylist())
        rows += int((cell.column("prediction") < 0).sum())
    if rows:
        yield Finding(INVALID, f"{formats.plural(rows, 'row')} of the cells hold no finite answer", {"rows": rows})
    for probe, measure, where in (
        (evidence.model, "repeat", "before any attack"),
        (evidence.model, "unbounded", "after an unbounded attack"),
        (evidence.threat, "noise", "under noise"),
    ):
        if probe.has(measure) and (rate := probe.share(measure, "infinite")).count:
            numbers = {"infinite": rate.count, "samples": rate.total}
            yield Finding(INVALID, f"no finite answer for {_of(rate)} samples {where}", numbers, probe.eps)


@check(
    "gradients are zero, constant or no numbers",
    source="Athalye et al. 2018, section 3 (shattered gradients); RobustBench's flags (Croce et al. 2021); "
    "Pintor et al. 2022, indicator 1",
    remedy="replace the part without a useful gradient on the way back (BPDA: backward = in robplug.target), and add "
    "attacks on scores: square",
)
def gradients(evidence: Evidence) -> Iterator[Finding]:
    """The gradient of the margin is zero, nan, or bit by bit that of a sample of another class.

    Invalid where it is no number, which ends every gradient attack, and above one half of the samples, for then the
    attacks have searched most of them blindly; suspicious below.
    """
    for name, told in (("infinite", "nan or inf"), ("zero", "zero"), ("constant", "the same as in another class")):
        rate = evidence.model.share("gradients", name)
        if rate.low > MANY:
            level = INVALID if name == "infinite" or rate.low > 0.5 else SUSPICIOUS
            text = f"the margin's gradient is {told} for {_of(rate)} samples"
            yield Finding(level, text, {name: rate.count, "samples": rate.total})


@check(
    "the cross-entropy saturates",
    source="Carlini and Wagner 2017; Croce and Hein 2020, section 4; Tram\u00e8r et al. 2020",
    remedy="add attacks on a loss of logits: apgd with the DLR loss, cw, deepfool",
)
def saturation(evidence: Evidence) -> Iterator[Finding]:
    """The softmax underflows: the cross-entropy's gradient is zero in float32, and the margin's is not.

    Suspicious: attacks on the cross-entropy stand still there, and others do not. Small gradients are no sign: 8 % of
    those of a healthy ResNet-20 are below 1e-6, so that only what float32 cannot hold is counted.
    """
    rate = share((evidence.model.column("gradients", "underflow") > 0)[usable(evidence.model)])
    if rate.low > MANY:
        told = f"the cross-entropy has no gradient in float32 for {_of(rate)} samples on which the margin has one"
        yield Finding(SUSPICIOUS, told, {"underflow": rate.count, "samples": rate.total})


@check(
    "gradients are not the function's",
    source="Athalye et al. 2018, section 3 (shattered gradients); Carlini et al. 2019, section 4.4 (numeric gradients)",
    remedy="add attacks that need no gradient: square, boundary; where a substitute is meant, say so with "
    "backward = in robplug.target",
)
def differences(evidence: Evidence) -> Iterator[Finding]:
    """Reported gradients disagree with finite differences of a thousandth of the range.

    Suspicious: the attacks follow something else than the model. The disagreement of a sample is the sum of
    |difference - prediction| over that of |difference| + |prediction|, over the gradient's signs and three random
    directions; the median over samples forgives kinks. Zero gradients have a check of their own.
    """
    evidence.need_repeatable()
    found = evidence.model.column("differences", "disagreement")[usable(evidence.model)]
    found = found[np.isfinite(found)]
    if not len(found):
        raise CannotCheckError("no sample has a gradient to compare")
    median = float(np.median(found))
    if median > DISAGREEMENT:
        told = f"gradients and finite differences disagree by {median:.2g} in the median (0: equal, 1: unrelated)"
        yield Finding(SUSPICIOUS, told, {"disagreement": median, "samples": len(found)})


@check(
    "an unbounded attack fails",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 3.1; Pintor et al. 2022, indicator 6",
    remedy="repair the attack before believing any smaller radius: BPDA, a loss of logits, more steps",
)
def unbounded(evidence: Evidence) -> Iterator[Finding]:
    """Gradient attacks with a linf radius of half the range leave more than the share of the largest class.

    Invalid: every image can become the same grey one, which has one class, so that more is left only by an attack that
    fails, and it fails at smaller radii too. Samples without any gradient are left to the check of gradients.
    """
    low, high = evidence.subject.bounds
    half = (high - low) / 2 * (1 - 1e-6)
    wide = [eps for eps in evidence.radii if evidence.subject.norm == "linf" and eps >= half]
    if wide and not evidence.subject.targeted:
        cells = evidence.iterative()
        verdicts = Verdicts.of(cells, wide[-1])
        y = np.concatenate([cell.column("y") for cell in cells])
        yield from _not_reached(verdicts.answered & ~verdicts.broken, y, "gradient attacks of the plan", wide[-1])
        return
    probe = evidence.model
    left, counted = (
        probe.column("unbounded", "broken") == 0,
        usable(probe) & (probe.column("unbounded", "infinite") == 0),
    )
    if not counted.any():
        raise CannotCheckError("no sample has a gradient and an answer")
    yield from _not_reached(left[counted], probe.y[counted], "PGD on the margin", (high - low) / 2)


def _not_reached(left: Array, y: Array, attack: str, eps: float) -> Iterator[Finding]:
    if not len(y):
        raise CannotCheckError("there is no row yet")
    rate, largest = share(left), float(np.unique(y, return_counts=True)[1].max() / len(y))
    if rate.low > largest:
        told = f"{attack} at linf {formats.radius(eps)} leaves {_of(rate)} samples; the largest class has {largest:.0%}"
        yield Finding(INVALID, told, {"left": rate.count, "samples": rate.total, "largest_class": largest}, eps)


@check(
    "noise breaks what gradients do not",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 4.11",
    remedy="add robplug/noise with more draws, square, and restarts of the gradient attacks",
)
def noise(evidence: Evidence) -> Iterator[Finding]:
    """Random points of the ball break samples that no gradient attack does.

    Suspicious: what is hit by chance is easily found. Noise counts only where gradients failed, and only if the
    interval of its share lies above 1 %.
    """
    evidence.need_repeatable()
    blind = [cell for _, cell in evidence.cells if is_noise(cell)]
    drawn = {eps: Verdicts.of(blind, eps) for eps in evidence.radii} if blind else _drawn(evidence)
    for eps, noise in drawn.items():
        searched = Verdicts.of(evidence.iterative(), eps)
        rate = share(noise.broken[searched.answered & ~searched.broken & noise.answered])
        if rate.low > MANY:
            told = f"eps {formats.radius(eps)}: noise breaks {_of(rate)} samples that gradient attacks leave"
            yield Finding(SUSPICIOUS, told, {"broken": rate.count, "samples": rate.total}, eps)


def _drawn(evidence: Evidence) -> dict[float, Verdicts]:
    """Returns what the probe's noise breaks, at its radius."""
    probe = evidence.threat
    broken, answered = np.zeros((2, evidence.cells[0][1].expected), dtype=bool)
    broken[probe.samples] = probe.column("noise", "broken") > 0
    answered[probe.samples] = True
    return {probe.eps or 0.0: Verdicts(broken, answered)}


@check(
    "more steps still gain",
    source="Carlini et al. 2019, section 4.8; Pintor et al. 2022, indicator 4",
    remedy="give the gradient attacks of the plan more steps: steps = 100 and beyond, until the curve is flat",
)
def convergence(evidence: Evidence) -> Iterator[Finding]:
    """PGD on the margin with the most steps breaks more than with as many as the plan's attacks have.

    Suspicious: the curve is not flat where the plan stops. From the same starts, with a step of 2.5 eps / steps each;
    a plan with as many steps as the probe, or more, is compared by the probe's last two.
    """
    evidence.need_repeatable()
    own = _steps_of_plan(evidence)
    fewer = next((steps for steps in STEPS[:-1] if steps >= own), STEPS[-2])
    pairs = _columns(evidence.threat, "steps", f"broken {STEPS[-1]}", f"broken {fewer}")
    if pairs.first_wins:
        told = pairs.told(f"{STEPS[-1]} steps", f"{fewer}")
        yield Finding(SUSPICIOUS, told, {**pairs.numbers, "steps_of_plan": own}, evidence.threat.eps)


def _steps_of_plan(evidence: Evidence) -> int:
    """Returns the most steps that a gradient attack of the plan takes."""
    cells = [cell for attack, cell in evidence.cells if attack.needs == "gradients"]
    found = [1 for cell in cells if is_one_step(cell)]
    named = [cell.record["params_in_force"].get(name) for cell in cells for name in STEP_NAMES]
    found += [value for value in named if isinstance(value, int)]
    if not found:
        raise CannotCheckError("no gradient attack of the plan tells its number of steps")
    return max(found)


@check(
    "averaged gradients break more",
    source="Athalye et al. 2018, section 4.2; Carlini et al. 2019, section 4.6",
    remedy="raise eot of the target, and restarts and draws of the attacks, until nothing changes any more",
)
def averaging(evidence: Evidence) -> Iterator[Finding]:
    """On a randomised target, PGD with gradients averaged over more draws than the plan's breaks more.

    Suspicious: an attacker may average longer than the plan does. On a deterministic target restarts rightly gain
    a little, so that nothing is concluded there.
    """
    if not evidence.stochastic:
        raise CannotCheckError("the target is not declared stochastic")
    pairs = _columns(evidence.threat, "averaging", "often", "once")
    if pairs.first_wins:
        told = pairs.told("gradients averaged over more draws", "the plan's own")
        yield Finding(SUSPICIOUS, told, pairs.numbers, evidence.threat.eps)


def _columns(probe: Probe, measure: str, first: str, second: str) -> Pairs:
    """Compares two columns of a probe."""
    every = np.ones(len(probe.samples), dtype=bool)
    return Pairs.of(*(Verdicts(probe.column(measure, name) > 0, every) for name in (first, second)))


def curve(probe: Probe) -> tuple[StepPoint, ...]:
    """Returns what is left after each number of steps, or nothing."""
    points = []
    for steps in STEPS if probe.has("steps") else ():
        margins = probe.column("steps", f"margin {steps}")
        margins = np.minimum(margins[np.isfinite(margins)], 0)
        left = int((probe.column("steps", f"broken {steps}") == 0).sum())
        median = float(np.median(margins)) if len(margins) else None
        points.append(StepPoint(steps, wilson(left, len(probe.samples)), median))
    return tuple(points)


def usable(probe: Probe) -> Array:
    """(N,) bool: samples whose gradient is finite, not zero and their own."""
    useless = [probe.column("gradients", name) > 0 for name in ("infinite", "zero", "constant")]
    found: Array = ~np.logical_or.reduce(useless)
    return found


def _of(rate: Rate) -> str:
    return f"{rate.count} of {rate.total}"
