"""Names that are loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robplug.lazy import exports

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("plugins/*/robplug_*/__init__.py"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    load, names = exports("robplug", {"rng": ["Rng"]})
    assert load("Rng").__module__ == "robplug.rng"
    assert "Rng" in names() and "__all__" in names()
    with pytest.raises(AttributeError, match="module 'robplug' has no attribute 'Rngs'"):
        load("Rngs")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_has_what_it_lists_and_loads_it_late(package: str) -> None:
    code = (
        f"import sys, {package} as package\n"
        "assert 'torch' not in sys.modules\n"
        "assert sorted(package.__all__) == package.__all__\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        "for name in package.__all__:\n"
        "    assert getattr(package, name).__name__ == name, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
