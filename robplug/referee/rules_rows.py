"""The checks that compare attacks with each other, from the rows of the cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

from robplug.referee import formats
from robplug.referee.entries import Attack
from robplug.referee.findings import (
    MANY,
    SUSPICIOUS,
    CannotCheckError,
    Evidence,
    Finding,
    Pairs,
    Verdicts,
    by_attack,
    check,
    is_one_step,
    share,
)
from robplug.referee.rundir import StoredCell

VARIED = ("restarts", "n_restarts", "nb_restarts", "num_random_init", "nb_random_init", "draws", "eot_iter")
"""Names of parameters that repeat or average an attack, over all libraries."""


@check(
    "black-box attacks beat gradients",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, sections 4.4 and 4.5; "
    "Pintor et al. 2022, indicator 5",
    remedy="attack through the defence: BPDA (backward = in robplug.target) for what has no useful gradient, or the "
    "transferred samples as starting points; keep the black-box attack in the plan",
)
def black_box(evidence: Evidence) -> Iterator[Finding]:
    """A decision- or score-based or transferred attack breaks more than all gradient attacks together.

    Suspicious: the worst case holds what the black-box attack found, and gradients would find more if they worked.
    Noise has a check of its own.
    """
    blind = [(attack, cell) for attack, cell in evidence.cells if attack.needs != "gradients" and not is_noise(cell)]
    blind += evidence.foreign
    if not blind:
        raise CannotCheckError("the plan has no attack on scores or labels, and no transfer to this target")
    yield from _beating(evidence, blind, evidence.iterative(), "all gradient attacks of several steps")


@check(
    "one step beats many",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 3.1",
    remedy="add robplug/pgd with a smaller step_size, more steps and restarts",
)
def one_step(evidence: Evidence) -> Iterator[Finding]:
    """A gradient attack of one step breaks more than all those of several steps together.

    Suspicious: the long attacks get lost where a short one does not, so they are no bound on a better one.
    """
    single = [(attack, cell) for attack, cell in evidence.cells if attack.needs == "gradients" and is_one_step(cell)]
    if not single:
        raise CannotCheckError("the plan has no gradient attack of one step")
    yield from _beating(evidence, single, evidence.iterative(), "all gradient attacks of several steps")


def _beating(
    evidence: Evidence, challengers: list[tuple[Attack, StoredCell]], champions: list[StoredCell], together: str
) -> Iterator[Finding]:
    """Yields a finding for each challenger and radius at which it beats the champions together."""
    for attack, cells in by_attack(challengers):
        for eps in evidence.radii:
            pairs = Pairs.of(Verdicts.of(cells, eps), Verdicts.of(champions, eps))
            if pairs.first_wins:
                told = pairs.told(attack.name, together)
                yield Finding(SUSPICIOUS, f"{_at(eps)}: {told}", pairs.numbers, eps, (attack.number,))


@check(
    "a larger budget breaks fewer",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 3.1",
    remedy="give the attack more steps and restarts, or a step_size that does not grow with eps",
)
def budget(evidence: Evidence) -> Iterator[Finding]:
    """The same attack breaks fewer samples at the next larger radius.

    Suspicious: every ball holds the smaller one, so the attack lost what it could have found. Attacks of one step are
    left out, whose step grows with the ball and may overshoot on any model.
    """
    fixed = [(attack, cell) for attack, cell in evidence.cells if attack.budget == "fixed" and not is_one_step(cell)]
    compared = False
    for attack, cells in by_attack(fixed):
        radii = sorted({reading.eps for cell in cells for reading in cell.readings if reading.eps is not None})
        for small, large in pairwise(radii):
            compared = True
            pairs = Pairs.of(Verdicts.of(cells, small), Verdicts.of(cells, large))
            if pairs.first_wins:
                told = pairs.told(f"eps {formats.radius(small)}", f"eps {formats.radius(large)}")
                yield Finding(SUSPICIOUS, f"{attack.name}: {told}", pairs.numbers, large, (attack.number,))
    if not compared:
        raise CannotCheckError("no attack of several steps with a fixed budget has two radii")


@check(
    "repeats change verdicts",
    source="Athalye et al. 2018, section 4.2; Carlini et al. 2019, section 4.6",
    remedy="raise eot of the target, restarts and draws of the attacks until nothing changes any more",
)
def repeats(evidence: Evidence) -> Iterator[Finding]:
    """On a randomised target, seeds, restarts or averaged gradients decide what breaks.

    Suspicious: an attacker may average longer than the plan does. On a deterministic target restarts rightly gain
    a little, so that nothing is concluded there.
    """
    if not evidence.stochastic:
        raise CannotCheckError("the target is not declared stochastic")
    found = list(_repeats_in_rows(evidence))
    if evidence.subject.targeted or evidence.threat is None or "averaging" in evidence.threat.failed:
        yield from found
        return
    probe = evidence.threat
    every = np.ones(len(probe.samples), dtype=bool)
    once, often = (Verdicts(probe.column("averaging", name) > 0, every) for name in ("once", "often"))
    pairs = Pairs.of(often, once)
    if pairs.first_wins:
        told = pairs.told("gradients averaged over more draws", "the plan's own")
        found.append(Finding(SUSPICIOUS, f"{_at(probe.eps)}: PGD, {told}", pairs.numbers, probe.eps))
    yield from found


def _repeats_in_rows(evidence: Evidence) -> Iterator[Finding]:
    """Compares attacks of the plan that differ in seed, restarts or draws alone."""
    groups: dict[str, list[tuple[Attack, list[StoredCell]]]] = {}
    for attack, cells in by_attack(evidence.cells):
        record = cells[0].record
        same = {name: value for name, value in record["params_passed"].items() if name not in VARIED}
        groups.setdefault(json.dumps([record["label"], record["mode"], same], sort_keys=True), []).append(
            (attack, cells)
        )
    for group in groups.values():
        for (one, cells), (other, others) in combinations(group, 2):
            for eps in evidence.radii:
                pairs = Pairs.of(Verdicts.of(cells, eps), Verdicts.of(others, eps))
                if pairs.differ:
                    told = pairs.told(one.name, other.name)
                    yield Finding(SUSPICIOUS, f"{_at(eps)}: {told}", pairs.numbers, eps, (one.number, other.number))


@check(
    "a success was not returned",
    source="Pintor et al. 2022, indicator 3",
    remedy="use an attack that returns its best iterate: robplug/pgd with early_stop = true or restarts, or apgd",
)
def silent(evidence: Evidence) -> Iterator[Finding]:
    """Samples that count as robust were seen broken on the way of an attack.

    Suspicious, and surely so: the robust accuracy is too high by these samples, and a better attack says by how many
    more. Counted are those that no attack of the plan returns, and only if the interval of their share lies above 1 %.
    """
    evidence.need_repeatable()
    fixed = [cell for _, cell in evidence.cells if not cell.minimal]
    if not fixed:
        raise CannotCheckError("the plan has no attack with a fixed budget")
    everything = [cell for _, cell in evidence.cells]
    for eps in evidence.radii:
        together = Verdicts.of(everything, eps)
        seen = np.zeros(len(together.broken), dtype=bool)
        attacks = set()
        for attack, cell in evidence.cells:
            if cell.record["threat"]["eps"] == eps:
                unseen = cell.column("silent").astype(bool) & ~together.broken[cell.sample]
                seen[cell.sample] |= unseen
                attacks |= {attack.number} if unseen.any() else set()
        rate = share(seen[together.answered])
        if rate.low > MANY:
            told = f"{_at(eps)}: {rate.count} of {rate.total} samples were seen broken, and no attack returned them"
            yield Finding(SUSPICIOUS, told, {"seen": rate.count, "samples": rate.total}, eps, tuple(sorted(attacks)))


def is_noise(cell: StoredCell) -> bool:
    """Whether an attack draws points and does not search."""
    return "noise" in str(cell.record["attack"])


def _at(eps: float | None) -> str:
    return f"eps {formats.radius(eps)}"
