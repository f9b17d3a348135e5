"""What the three surveys share: the form of an entry, and writing a catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def can(
    *norms: str,
    budget: str = "fixed",
    targeted: bool = True,
    untargeted: bool = True,
    needs: str = "gradients",
    stochastic: bool = False,
    canonical: str | None = None,
) -> dict[str, Any]:
    """Returns the capabilities of one class, as the catalogue has them; see `robplug.types.AttackSpec`."""
    return {
        "norms": list(norms),
        "budget": budget,
        "targeted": targeted,
        "untargeted": untargeted,
        "needs": needs,
        "stochastic": stochastic,
        "canonical": canonical,
    }


def write_catalogue(catalogue: dict[str, Any]) -> None:
    """Writes the catalogue of a library, to be committed."""
    path = Path(__file__).parent / catalogue["library"] / "catalogue.json"
    path.write_text(json.dumps(catalogue, indent=1) + "\n", encoding="utf-8")
