"""What pydantic found wrong, in one line that names each key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def problems(error: ValidationError, models: Mapping[str, type[BaseModel]]) -> str:
    """Returns all problems of a validation in one line.

    Args:
        error: what pydantic raised.
        models: the model of each table by its key, ``""`` the whole; their fields are what may be written there.
    """
    return "; ".join(_problem(dict(item), models) for item in error.errors(include_url=False))


def _problem(item: dict[str, Any], models: Mapping[str, type[BaseModel]]) -> str:
    loc = item["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known = models.get(str(loc[0]) if len(loc) > 1 else "", models[""]).model_fields
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        message = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
    elif item["type"] == "missing":
        message = "is missing"
    elif item["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {item['input']!r}"
    return f"{key}: {message}" if key else message
