"""The host's rules for all that the plugin offers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from robplug.testing import Check, list_checks
from robplug.testing.attack_checks import ATTACK_CHECKS

# No rule is about how long an attack works. With their own parameters these three are among the slow tests.
SHORT = {"flow/multi-step": {"steps": 3}, "flow/stadv": {"steps": 3}, "flow/gradient-free": {"queries": 101}}


def checks() -> list[object]:
    cases = []
    for check in list_checks("robplug-flow"):
        spec, name = check.spec, f"{check.spec.name}-{check.name}"
        takes_long = spec.name in SHORT and check.function in ATTACK_CHECKS
        cases.append(pytest.param(check, id=name, marks=[pytest.mark.slow] if takes_long else []))
        if takes_long:
            short = replace(spec, params={**spec.params, **SHORT[spec.name]})
            cases.append(pytest.param(replace(check, spec=short), id=f"{name}-short"))
    return cases


@pytest.mark.parametrize("check", checks())
def test_conformance(check: Check) -> None:
    check()
