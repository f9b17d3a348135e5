"""The host's rules for all that the plugin offers.

The kit's images have 8x8 pixels, for which the paper's sizes leave no room: the rules of attacks are checked a second
and third time with sizes that do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from robplug.testing import Check, list_checks

SLOW = {"di2/d-cw"}  # 1250 steps, twenty times over
OF_THE_SPEC = {"resolves", "frozen_dataclass", "params", "fields_documented"}
ROOMY = {"ratio": 1.5, "resize_back": True}
SHORT = {"di2/d-cw": {"steps": 20, "binary_search_steps": 2, "initial_const": 1.0}}


def checks() -> list[object]:
    marks = {True: (pytest.mark.slow,), False: ()}
    return [
        pytest.param(check, id=f"{check.spec.name}-{check.name}", marks=marks[check.spec.name in SLOW])
        for check in list_checks("robplug-di2")
    ]


@pytest.mark.parametrize("check", checks())
@pytest.mark.filterwarnings("ignore:images of 8x8 are too small")
def test_conformance(check: Check) -> None:
    check()


def diverse_checks() -> list[object]:
    params = []
    for check in list_checks("robplug-di2"):
        name = check.spec.name
        for per_sample in (False, True) if name == "di2/m-di2-fgsm" else (False,):
            given = {**check.spec.params, **ROOMY, **SHORT.get(name, {}), "per_sample": per_sample}
            drawn = "per-sample" if per_sample else "shared"
            roomy = replace(check, spec=replace(check.spec, params=given))
            params += [pytest.param(roomy, id=f"{name}-{check.name}-{drawn}")] * (check.name not in OF_THE_SPEC)
    return params


@pytest.mark.parametrize("check", diverse_checks())
def test_conformance_where_there_is_room(check: Check) -> None:
    check()
