"""The rules that attacks and defences share: a frozen, documented dataclass whose defaults are the Spec's."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from robplug.registry import resolve
from robplug.testing.trials import require
from robplug.types import Spec


def check_resolves(spec: Spec) -> None:
    """What ``make`` names can be imported and called, or is an object."""
    resolve(spec)


def check_frozen_dataclass(spec: Spec) -> None:
    """``make`` names a frozen dataclass."""
    _dataclass(spec)


def check_params(spec: Spec) -> None:
    """The Spec's params are the dataclass's fields with their defaults, as JSON has them; a preset's differ."""
    fields = {item.name: _default(item) for item in dataclasses.fields(_dataclass(spec))}
    for name in sorted({*fields, *spec.params}):
        require(name in spec.params, f"the field {name} is missing in the Spec's params")
        require(name in fields, f"params has {name}, which is no field of {spec.make}")
        require(fields[name] is not dataclasses.MISSING, f"the field {name} has no default")
        here, there = _json(name, spec.params[name]), _json(name, fields[name])
        preset = "@" in spec.name
        require(here == there or preset, f"params has {name} = {here}, the field's default is {there}")


def check_fields_documented(spec: Spec) -> None:
    """Each field stands under Attributes in the docstring of the dataclass, or of a base."""
    made = _dataclass(spec)
    documented = "\n".join(base.__doc__ or "" for base in made.__mro__)
    for item in dataclasses.fields(made):
        entry = re.search(rf"^\s*{item.name}\s*(\([^)]*\))?: *\S", documented, re.MULTILINE)
        require(entry is not None, f"the field {item.name} is missing in the docstring of {spec.make}")


def _dataclass(spec: Spec) -> Any:
    made = resolve(spec)
    require(isinstance(made, type) and dataclasses.is_dataclass(made), f"{spec.make} is no dataclass")
    require(made.__dataclass_params__.frozen, f"{spec.make} is not frozen; use @dataclass(frozen=True)")
    return made


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise AssertionError(f"the parameter {name} = {value!r} is no JSON value") from error
