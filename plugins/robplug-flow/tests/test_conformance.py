"""The host's rules for all that the plugin offers."""

from __future__ import annotations

import pytest

from robplug.testing import Check, list_checks

SLOW = {"flow/stadv"}  # 300 steps, twenty times over


def checks() -> list[object]:
    marks = {True: (pytest.mark.slow,), False: ()}
    return [
        pytest.param(check, id=f"{check.spec.name}-{check.name}", marks=marks[check.spec.name in SLOW])
        for check in list_checks("robplug-flow")
    ]


@pytest.mark.parametrize("check", checks())
def test_conformance(check: Check) -> None:
    check()
