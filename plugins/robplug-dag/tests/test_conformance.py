"""The host's rules for all that the plugin offers."""

from __future__ import annotations

from robplug.testing import Check, parametrize


@parametrize("robplug-dag")
def test_conformance(check: Check) -> None:
    check()
