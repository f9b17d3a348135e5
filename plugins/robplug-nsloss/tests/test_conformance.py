"""The host's rules for all that the plugin offers; test_attack.py has those of the attacks, with fewer steps."""

from __future__ import annotations

import pytest

from robplug.testing import Check, list_checks
from robplug.testing.attack_checks import ATTACK_CHECKS

SLOW = {"nsloss/cw-restarts", "nsloss/cw-averaged"}


def checks() -> list[object]:
    cases = []
    for check in list_checks("robplug-nsloss"):
        takes_long = check.spec.name in SLOW and check.function in ATTACK_CHECKS
        marks = [pytest.mark.slow] if takes_long else []
        cases.append(pytest.param(check, id=f"{check.spec.name}-{check.name}", marks=marks))
    return cases


@pytest.mark.parametrize("check", checks())
def test_conformance(check: Check) -> None:
    check()
