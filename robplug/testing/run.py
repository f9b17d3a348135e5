"""Running the conformance kit: on an installed distribution as a script does, or as tests of pytest."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

from packaging.utils import canonicalize_name

from robplug.errors import PluginError
from robplug.isolation import seeded_globals
from robplug.plugins import Plugin, registry
from robplug.testing.listing import what_slows_listing
from robplug.types import NormSpec, Spec

if TYPE_CHECKING:
    import pytest

Outcome = Literal["passed", "failed", "skipped", "expected"]
Expected = Mapping[tuple[str, str], str]
"""Reasons for failures that an author knows of, by (subject, check)."""
_UNUSUAL = 918_273_645
"""A seed that nobody else uses: an attack that seeds with 0 must change something."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        check: name of the rule, such as ``"budget_kept"``.
        subject: name of what was checked, such as ``"flow/multi-step"``.
        status: ``"expected"`` is a failure that the author gave a reason for.
        message: one line: what is wrong, why it was skipped, or "".
    """

    check: str
    subject: str
    status: Outcome
    message: str = ""


@dataclass(frozen=True)
class Check:
    """One rule and the Spec that it is to be checked on; a call checks it.

    Attributes:
        spec: of what is checked.
        function: raises AssertionError, or what the plugin raises, where the rule is broken.
    """

    spec: Spec
    function: Callable[[Any], None]

    @property
    def name(self) -> str:
        """The name of the rule."""
        return self.function.__name__.removeprefix("check_")

    def __call__(self) -> None:
        """Checks the rule with seeded global generators, which it leaves as they were."""
        with seeded_globals(_UNUSUAL):
            self.function(self.spec)

    def result(self, reason: str | None = None) -> CheckResult:
        """Checks the rule and returns what was found; whatever is raised becomes a failure.

        Args:
            reason: why a failure is expected, or None.
        """
        status, message = self._outcome()
        if reason is not None and status == "failed":
            status, message = "expected", f"{message}; expected: {reason}"
        elif reason is not None and status == "passed":
            status, message = "failed", f"it passes and was expected to fail: {reason}"
        return CheckResult(self.name, self.spec.name, status, " ".join(message.split()))

    def _outcome(self) -> tuple[Outcome, str]:
        try:
            self()
        except SkipTest as skip:
            return "skipped", str(skip)
        except AssertionError as broken:
            return "failed", str(broken) or "an assertion of the plugin failed"
        except (Exception, SystemExit) as error:  # whatever foreign code does is a result, not the end of the run
            return "failed", f"raised {type(error).__name__}: {error}"
        return "passed", ""


def check_package(
    distribution: str,
    progress: Callable[[CheckResult], None] | None = None,
    expected: Expected | None = None,
) -> list[CheckResult]:
    """Runs the conformance kit on all that an installed distribution offers.

    Args:
        distribution: name as pip knows it.
        progress: called with each result as it comes.
        expected: reasons for failures that are known, by (subject, check).

    Returns:
        A result for each rule and Spec, and per plugin module whether it loads and is listed quickly. What depends
        on an object that cannot be imported is left out.

    Raises:
        PluginError: no such plugin is installed.
    """
    results: list[CheckResult] = []
    for result in _results(_plugins(distribution), expected or {}):
        results.append(result)
        if progress is not None:
            progress(result)
    return results


def _results(plugins: list[Plugin], expected: Expected) -> Iterator[CheckResult]:
    for plugin in plugins:
        problem = "" if plugin.error is None else f"{plugin.error.problem}; {plugin.error.remedy}"
        yield CheckResult("loads", plugin.module, "failed" if problem else "passed", " ".join(problem.split()))
        if not problem:
            slow = what_slows_listing(plugin.module)
            yield CheckResult("listed_quickly", plugin.module, "failed" if slow else "passed", slow)
        for spec in plugin.specs:
            for check in _checks(spec):
                result = check.result(expected.get((spec.name, check.name)))
                yield result
                if (result.check, result.status) == ("resolves", "failed"):
                    break


def list_checks(distribution: str) -> list[Check]:
    """Returns the checks of all that an installed distribution offers, to be called one by one.

    Raises:
        PluginError: no such plugin is installed, or it is disabled.
    """
    plugins = _plugins(distribution)
    for plugin in plugins:
        if plugin.error is not None:
            raise plugin.error
    return [check for plugin in plugins for spec in plugin.specs for check in _checks(spec)]


def parametrize(distribution: str, expected: Expected | None = None) -> pytest.MarkDecorator:
    """Makes a pytest decorator that runs a test once per check, handed over as ``check``.

    Args:
        distribution: name as pip knows it.
        expected: reasons for failures that are known, by (subject, check); these are strict xfails.

    Example:
        >>> @parametrize("robplug")
        ... def test_conformance(check):
        ...     check()
    """
    import pytest

    params = []
    for check in list_checks(distribution):
        reason = (expected or {}).get((check.spec.name, check.name))
        marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
        params.append(pytest.param(check, id=f"{check.spec.name}-{check.name}", marks=marks))
    return pytest.mark.parametrize("check", params)


def _plugins(distribution: str) -> list[Plugin]:
    name = canonicalize_name(distribution)
    plugins = [plugin for plugin in registry().plugins if plugin.distribution == name]
    if not plugins:
        problem = "it is not installed, or has no entry point in the group robplug"
        there = {plugin.distribution.removeprefix("robplug-"): plugin.distribution for plugin in registry().plugins}
        near = difflib.get_close_matches(name.removeprefix("robplug-"), there, n=1)
        installed = f"there is {', '.join(sorted(there.values()))}"
        raise PluginError(distribution, problem, f"did you mean {there[near[0]]}?" if near else installed)
    return plugins


def _checks(spec: Spec) -> Iterator[Check]:
    from robplug.testing.checks import checks_for

    # a norm there is robplug's own, and judges the libraries
    foreign = spec.make.startswith("robplug.adapters.") and not isinstance(spec, NormSpec)
    functions = (check_library_code,) if foreign else checks_for(spec)
    return (Check(spec, function) for function in functions)


def check_library_code(spec: Spec) -> None:
    """Nothing is asked of the attack libraries."""
    raise SkipTest("a library's own code: the referee guards against it instead")
