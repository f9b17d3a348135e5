"""The checks that compare attacks with each other, from the rows of the cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from robplug.referee import formats
from robplug.referee.entries import Attack
from robplug.referee.findings import (
    MANY,
    SUSPICIOUS,
    CannotCheckError,
    Evidence,
    Finding,
    check,
    is_noise,
    is_one_step,
    share,
)
from robplug.referee.paired import Pairs, Verdicts
from robplug.referee.rundir import StoredCell

Cells = Sequence[tuple[Attack, StoredCell]]


@check(
    "black-box attacks beat gradients",
    source="Athalye et al. 2018, section 3.1; Carlini et al. 2019, sections 4.4 and 4.5; "
    "Pintor et al. 2022, indicator 5",
    remedy="attack through the defence: BPDA (backward = in robplug.target) for what has no useful gradient; keep the "
    "black-box attack in the plan",
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
    yield from _beating_gradients(evidence, blind)


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
    yield from _beating_gradients(evidence, single)


def _beating_gradients(evidence: Evidence, challengers: Cells) -> Iterator[Finding]:
    """Yields each challenger and radius at which it beats all gradient attacks of several steps together."""
    champions = evidence.iterative()
    for attack, cells in _by_attack(challengers):
        for eps in evidence.radii:
            pairs = Pairs.of(Verdicts.of(cells, eps), Verdicts.of(champions, eps))
            if pairs.first_wins:
                told = f"eps {formats.radius(eps)}: {pairs.told(attack.name, 'all gradient attacks of several steps')}"
                yield Finding(SUSPICIOUS, told, pairs.numbers, eps, (attack.number,))


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
    if not fixed or len(evidence.radii) < 2:
        raise CannotCheckError("no attack of several steps with a fixed budget has two radii")
    for attack, cells in _by_attack(fixed):
        radii = sorted({cell.record["threat"]["eps"] for cell in cells})
        for small, large in pairwise(radii):
            pairs = Pairs.of(Verdicts.of(cells, small), Verdicts.of(cells, large))
            if pairs.first_wins:
                told = pairs.told(f"eps {formats.radius(small)}", f"eps {formats.radius(large)}")
                yield Finding(SUSPICIOUS, f"{attack.name}: {told}", pairs.numbers, large, (attack.number,))


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
    for eps in evidence.radii:
        together = Verdicts.of([cell for _, cell in evidence.cells], eps)
        seen, attacks = np.zeros(len(together.broken), dtype=bool), set()
        for attack, cell in evidence.cells:
            if cell.record["threat"]["eps"] == eps:
                unseen = cell.column("silent").astype(bool) & ~together.broken[cell.sample]
                seen[cell.sample] |= unseen
                attacks |= {attack.number} if unseen.any() else set()
        rate = share(seen[together.answered])
        if rate.low > MANY:
            told = f"{rate.count} of {rate.total} samples were seen broken, and no attack returned them"
            numbers = {"seen": rate.count, "samples": rate.total}
            yield Finding(SUSPICIOUS, f"eps {formats.radius(eps)}: {told}", numbers, eps, tuple(sorted(attacks)))


def _by_attack(cells: Cells) -> list[tuple[Attack, list[StoredCell]]]:
    attacks = {attack.number: attack for attack, _ in cells}
    return [(attack, [cell for other, cell in cells if other == attack]) for attack in attacks.values()]
