"""The host's rules for all that the plugin offers.

The kit's images have 8x8 pixels, for which the paper's sizes leave no room, and its linear model takes no others: the
rules of attacks are checked a second time with sizes that leave room, resized back.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from robplug.testing import Check, list_checks

SLOW = {"di2/d-cw"}  # 1250 steps, twenty times over
OF_THE_SPEC = {"resolves", "frozen_dataclass", "params", "fields_documented"}
ROOMY = {"ratio": 1.5, "resize_back": True}
OWN = {
    "di2/m-di2-fgsm": {"per_sample": True},  # the shared draws are those of di2/di2-fgsm
    "di2/d-cw": {"steps": 20, "binary_search_steps": 2, "initial_const": 1.0},
}


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
        if check.name not in OF_THE_SPEC:
            given = {**check.spec.params, **ROOMY, **OWN.get(check.spec.name, {})}
            roomy = replace(check, spec=replace(check.spec, params=given))
            params.append(pytest.param(roomy, id=f"{check.spec.name}-{check.name}"))
    return params


@pytest.mark.parametrize("check", diverse_checks())
def test_conformance_where_there_is_room(check: Check) -> None:
    check()
