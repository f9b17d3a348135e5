"""Every error that robplug raises on purpose.

    RobplugError
    |-- PluginError        a plugin could not be used
    |-- UnknownNameError   no attack, defence, target, dataset or norm has this name
    |-- ThreatError        a threat model that makes no sense, or that an attack cannot serve
    |-- InputError         a tensor, parameter or file that does not fit (also a ValueError)
    |-- PlanError          a plan that cannot be run
    `-- StoreError         a run directory that cannot be used

What a message says is also there as attributes, so that programs need not parse it.
"""

from __future__ import annotations

from collections.abc import Sequence


class RobplugError(Exception):
    """Base class of all errors that robplug raises on purpose."""


class PluginError(RobplugError):
    """A plugin that cannot be used.

    Attributes:
        distribution: name of the pip distribution that brings the plugin.
        problem: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, distribution: str, problem: str, remedy: str) -> None:
        super().__init__(f"plugin {distribution}: {problem}; {remedy}")
        self.distribution = distribution
        self.problem = problem
        self.remedy = remedy


class UnknownNameError(RobplugError, LookupError):
    """A name that no installed plugin offers.

    Attributes:
        kind: "attack", "defense", "target", "dataset" or "norm".
        name: the name that was asked for.
        near: installed names that look like it.
        reason: why a plugin that might have it is not there, or "".
    """

    def __init__(self, kind: str, name: str, near: Sequence[str] = (), reason: str = "") -> None:
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        why = f"; {reason}" if reason else ""
        super().__init__(f"no {kind} named {name!r}{hint}{why} (see `robplug list {kind}s`)")
        self.kind = kind
        self.name = name
        self.near = tuple(near)
        self.reason = reason


class ThreatError(RobplugError, ValueError):
    """A threat model that makes no sense, or that an attack cannot serve."""


class InputError(RobplugError, ValueError):
    """An argument that does not fit: the message has what was expected, the value and the remedy.

    Attributes:
        expected: what was expected.
        got: the value or a short description of it.
    """

    def __init__(self, expected: str, got: object, remedy: str = "") -> None:
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"expected {expected}, got {got}{tail}")
        self.expected = expected
        self.got = got


class PlanError(RobplugError):
    """A plan that cannot be run.

    Attributes:
        where: file and key, such as ``plan.toml: attacks[0].steps``.
        problem: what is wrong, with the value and the remedy.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where
        self.problem = problem


class StoreError(RobplugError):
    """A run directory that cannot be used: locked, full, unwritable or damaged.

    Attributes:
        path: the file or directory.
        problem: what is wrong and what to do.
    """

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem
