"""What ``--tune`` names: a defence of the stack, and the field that is the factor of its penalty."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from robplug.defenses import Defense, Stack
from robplug.errors import InputError


def find_defense(names: Sequence[str], asked: str) -> tuple[int, str]:
    """Finds the defence, and the field of it, that ``--tune`` names.

    Args:
        names: of the plan's defences.
        asked: ``NAME.FIELD``, or ``NAME``, which means its ``strength``. NAME is the full name of a defence
            (``origin/method@preset``), or its ``origin/method``, ``method`` or ``origin``, where one alone has it.

    Returns:
        The defence's place in the stack, and the name of the field.

    Raises:
        InputError: no defence of the plan has the name, or several do.
    """
    name, field = asked.rsplit(".", 1) if "." in asked else (asked, "strength")
    forms = [_forms(full) for full in names]
    for same in zip(*forms, strict=True):
        places = [place for place, form in enumerate(same) if form == name]
        if len(places) > 1:
            several = " and ".join(names[place] for place in places)
            raise InputError(f"{name!r} to name one defence of the plan", several, "give a full name")
        if places:
            return places[0], field
    near = difflib.get_close_matches(name, [form for several in forms for form in several], n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}"
    raise InputError("a defence of the plan to tune", repr(name), hint)


def _forms(full: str) -> tuple[str, str, str, str]:
    """Returns what a defence may be called, the most exact name first."""
    plain = full.partition("@")[0]
    return full, plain, plain.rpartition("/")[2], plain.partition("/")[0]


def with_value(defenses: Iterable[str | Defense], place: int, field: str, value: float) -> list[Defense]:
    """Returns the defences, one of which has another value of a field."""
    several = Stack(defenses).defenses
    changed: Any = several[place]
    several[place] = dataclasses.replace(changed, **{field: value})
    return several


def check_field(defenses: Sequence[Defense], place: int, field: str) -> None:
    """Refuses a defence that has no penalty of its own to be seen, and a field that takes no float.

    Raises:
        InputError: as said; or another defence of the stack has the same class, under which both penalties are logged.
    """
    if not 0 <= place < len(defenses):
        raise InputError(f"place of one of {len(defenses)} defences", place)
    defense = defenses[place]
    name = type(defense).__name__
    if type(defense).penalty is Defense.penalty:
        raise InputError("a defence with a penalty", f"{name}, which has none", "tune another one of the stack")
    if sum(type(other).__name__ == name for other in defenses) > 1:
        raise InputError(f"one {name} in the stack", "several", "tune with one of them, then add the others")
    known = float_fields(defense)
    if field in known:
        return
    all_names = [each.name for each in _fields(defense)]
    near = difflib.get_close_matches(field, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    got = f"{field} = {getattr(defense, field)!r}" if field in all_names else repr(field)
    raise InputError(f"a field of {name} that is a float", got, hint)


def float_fields(defense: Defense) -> list[str]:
    """Returns the names of a defence's fields that take a float."""
    return [each.name for each in _fields(defense) if _takes_float(each.type)]


def is_proportional(first: Sequence[float], middle: Sequence[float], last: Sequence[float], rounding: float) -> bool:
    """Whether a term of a penalty is proportional to a field, and the other terms do not depend on it.

    Args:
        first: the penalty of some batches at a value of the field.
        middle: of the same batches and draws, half way between.
        last: at another value.
        rounding: how far the penalties may be off, as a share of them.
    """
    for a, b, c in zip(first, middle, last, strict=True):
        slack = rounding * max(abs(a), abs(b), abs(c))
        if abs(a + c - 2 * b) > slack or abs(c - a) <= slack:
            return False
    return True


def _fields(defense: Defense) -> Sequence[Any]:
    return dataclasses.fields(defense) if dataclasses.is_dataclass(defense) else ()


def _takes_float(annotation: Any) -> bool:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return "float" in [part.strip() for part in text.split("|")]
