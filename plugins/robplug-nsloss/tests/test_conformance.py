"""The host's rules for all that the plugin offers."""

from __future__ import annotations

from robplug.testing import parametrize


@parametrize("robplug-nsloss")
def test_conformance(check) -> None:  # type: ignore[no-untyped-def]
    check()
