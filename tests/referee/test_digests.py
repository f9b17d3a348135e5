"""What a model is, beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from robplug.referee.digests import source_digest
from robplug.referee.plan_tables import TargetEntry

SOURCE = """
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        return x

def plain():
    return Model()

def other():
    return Model()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(SOURCE)
    return tmp_path


def digest(folder: Path, **entry: object) -> str:
    whole = TargetEntry(name="model", **{"make": "models.py:plain", **entry})  # type: ignore[arg-type]
    return source_digest(nn.Identity(), whole, str(folder / "plan.toml"))


def test_what_makes_another_model(folder: Path) -> None:
    """The object that is named counts, as it may close over other numbers; how its file is named does not."""
    first = digest(folder)
    assert digest(folder) == first
    assert digest(folder, make=f"{folder}/models.py:plain") == first
    assert digest(folder, make="models.py:other") != first
    assert digest(folder, params={"depth": 3}) != first
    (folder / "models.py").write_text(SOURCE.replace("return x", "return -x"))
    assert digest(folder) != first


def test_the_structure_counts(folder: Path) -> None:
    entry = TargetEntry(name="model", make="robplug/module")
    where = str(folder / "plan.toml")
    assert source_digest(nn.ReLU(), entry, where) != source_digest(nn.Sigmoid(), entry, where)
    assert source_digest(nn.Linear(2, 2), entry, where) == source_digest(nn.Linear(2, 2), entry, where)
