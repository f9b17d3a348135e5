"""Canonical parameters are checked once, before any library sees them."""

from __future__ import annotations

import pytest

from robplug.canonical import CANONICAL
from robplug.errors import InputError


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("pgd", {"steps": 0}, "steps to be a whole number >= 1, got 0"),
        ("pgd", {"restarts": 1.5}, "restarts .* got 1.5"),
        ("bim", {"step_size": -0.1}, "step_size > 0, or none for the default, got -0.1"),
        ("mi-fgsm", {"step_size": float("nan")}, "got nan"),
        ("square", {"queries": "many"}, "'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, params: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        CANONICAL[name](**params)


@pytest.mark.parametrize("name", CANONICAL)
def test_defaults_make_sense(name: str) -> None:
    CANONICAL[name]()
