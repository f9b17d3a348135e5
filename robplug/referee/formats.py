"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robplug.referee.entries import Subject
    from robplug.referee.findings import Diagnosis
    from robplug.referee.quality import Quality
    from robplug.referee.summary import Matrix, Summary
    from robplug.referee.wilson import Rate
    from robplug.referee.worst import WorstCase

NORMS = {"linf": "\u2113\u221e", "l2": "\u21132", "l1": "\u21131", "l0": "\u21130"}
NONE = "\u2013"


def percent(share: float | None) -> str:
    """Returns such as ``41.3 %``; no digit is invented where there is no sample."""
    return NONE if share is None else f"{100 * share:.1f}\u00a0%"


def span(low: float, high: float) -> str:
    """Returns such as ``38.2 – 44.5 %``."""
    return f"{100 * low:.1f}\u202f\u2013\u202f{100 * high:.1f}\u00a0%"


def interval(rate: Rate) -> str:
    """Returns the interval of a rate, or a dash where there is no sample."""
    return span(rate.low, rate.high) if rate.total else NONE


def radius(eps: float | None) -> str:
    """Returns such as ``0.1`` or ``8/255``: 255ths where the decimal number is long and the fraction exact."""
    if eps is None:
        return "any"
    short = f"{eps:.4g}"
    parts = eps * 255
    if float(short) != eps and abs(parts - round(parts)) < 1e-9 * max(parts, 1):
        return f"{round(parts)}/255"
    return short


def norm(name: str) -> str:
    """Returns the sign of a norm, or its name."""
    return NORMS.get(name, name)


def threat(subject: Subject) -> str:
    """Returns such as ``ℓ∞`` or ``ℓ2 targeted (next)``."""
    goal = f" targeted ({subject.goal_rule})" if subject.targeted else ""
    return f"{norm(subject.norm)}{goal}"


def matrix(one: Matrix, summary: Summary) -> str:
    """Returns such as ``digits, ℓ∞ ε = 0.1``; of several transfers the number comes first."""
    eps = ", any distance" if one.eps is None else f" \u03b5 = {radius(one.eps)}"
    return f"{transferred(one, summary)}{eps}{f' targeted ({one.goal_rule})' if one.targeted else ''}"


def transferred(one: Matrix, summary: Summary) -> str:
    """Returns such as ``digits, ℓ∞``; of several transfers the number comes first."""
    several = any(other.number != one.number for other in summary.matrices)
    return f"{f'transfer {one.number + 1}: ' if several else ''}{one.dataset}, {norm(one.norm)}"


def counted(one: Matrix) -> str:
    """Says which samples a matrix counts."""
    models = len({*one.sources, *one.victims} - {*one.mixtures})
    if one.count == "pairs":
        return "samples that source and victim classify correctly"
    who = f"all {models} models classify" if models > 1 else "the model classifies"
    return f"{plural(one.common, 'sample')} of {count(one.samples)} that {who} correctly"


def change(before: float, after: float) -> str:
    """Returns such as ``75.1 → 3.2 %``."""
    return f"{100 * before:.1f}\u202f\u2192\u202f{100 * after:.1f}\u00a0%"


def first_figure(quality: Quality) -> str:
    """Returns the figure that is asked for most, after the attack, such as ``mAP 50 3.2 %``."""
    name, (_, after) = next(iter(quality.items()))
    return f"{name} {percent(after)}"


def count(value: int) -> str:
    """Returns a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def plural(value: int, thing: str) -> str:
    """Returns such as ``1 sample`` or ``2 samples``."""
    return f"{count(value)} {thing}{'' if value == 1 else 's'}"


def seconds(value: float) -> str:
    """Returns such as ``0.42 s`` or ``3 min 10 s``."""
    if value < 60:
        return f"{value:.2g}\u00a0s" if value < 10 else f"{value:.0f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {rest}\u00a0s"


def distance(value: float | None) -> str:
    """Returns a distance with three digits."""
    return NONE if value is None else f"{value:.3g}"


def measure(value: float | None) -> str:
    """Returns a measure with three digits; thousands in full."""
    return distance(value) if value is None or round(abs(value)) < 1000 else count(round(value))


def unfinished(summary: Summary) -> str:
    """Says what of a run is missing."""
    begun, other = plural(summary.incomplete, "cell"), plural(summary.not_begun, "cell")
    return f"unfinished run: {begun} incomplete, {other} not begun"


def diagnosis(one: Diagnosis) -> str:
    """Returns such as ``suspicious: one step beats many``."""
    if one.raised:
        return f"{one.verdict}: {', '.join(one.raised)}"
    made = f"in {plural(len(one.checked), 'check')}" if one.checked else f"({next(iter(one.unchecked.values()))})"
    return f"{one.verdict} {made}"


def adaptive(one: Diagnosis, summary: Summary) -> str:
    """Says which attacks were made against the defence."""
    names = [summary.attack(number).name for number in one.adaptive]
    return f"adaptive attacks: {', '.join(names)}" if names else "no adaptive attack was run"


def unresolved(summary: Summary, case: WorstCase) -> str:
    """Says how many samples are unresolved, and which attacks are responsible."""
    blame = sorted((share for share in case.shares if share.unanswered), key=lambda share: -share.unanswered)
    named = ", ".join(f"{summary.attack(share.attack).name} ({share.unanswered})" for share in blame)
    share = percent(case.unresolved / case.samples)
    none = "no valid answer" if summary.finished else "no answer yet, or no valid one,"
    return f"{case.unresolved} of {case.samples} samples ({share}) are unresolved: {none} from {named}"
