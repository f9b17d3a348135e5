"""The conformance kit catches every planted defect, by the intended check alone, and passes what is right."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

import pytest
import torch

import robplug
from robplug.errors import PluginError
from robplug.isolation import global_numbers
from robplug.plugins import Plugin
from robplug.testing import run
from robplug.testing.checks import checks_for
from robplug.testing.fixtures import linear, network
from robplug.testing.listing import what_slows_listing
from robplug.testing.run import Check, CheckResult, check_package, list_checks, parametrize


def _wrong(name: str) -> ModuleType:
    folder = str(Path(__file__).parents[1] / "wrong_plugins")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


attacks, norms, pieces = _wrong("wrong_attacks"), _wrong("wrong_norms"), _wrong("wrong_pieces")
MODULES = (attacks, norms, pieces)


def _results(spec: robplug.types.Spec) -> list[CheckResult]:
    return [Check(spec, function).result() for function in checks_for(spec)]


def _label(value: object) -> str | None:
    make = getattr(value, "make", None)
    return make and make.rpartition(":")[2]


@pytest.mark.parametrize("spec", [spec for module in MODULES for spec in module.HONEST], ids=_label)
def test_the_honest_pass(spec):
    assert [result for result in _results(spec) if result.status == "failed"] == []


@pytest.mark.parametrize(
    ("spec", "checks", "message"), [case for module in MODULES for case in module.WRONG], ids=_label
)
def test_each_broken_rule_fails_its_check_and_no_other(spec, checks, message):
    failed = {result.check: result.message for result in _results(spec) if result.status == "failed"}

    assert set(failed) == checks
    assert any(message in text for text in failed.values()), failed
    assert all("\n" not in text for text in failed.values())


@pytest.mark.parametrize(("spec", "check", "message"), attacks.HOPELESS, ids=_label)
def test_what_cannot_be_judged_fails_in_one_line(spec, check, message):
    failed = {result.check: result.message for result in _results(spec) if result.status == "failed"}

    assert message in failed[check]
    assert "\n" not in failed[check]


@pytest.mark.parametrize(("spec", "check", "reason"), pieces.SKIPPED, ids=_label)
def test_what_does_not_apply_is_skipped_with_the_reason(spec, check, reason):
    skipped = {result.check: result.message for result in _results(spec) if result.status == "skipped"}

    assert reason in skipped[check]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"tasks": ("detection",)}, "output"),
        ({"scope": "dataset"}, "output"),
        ({"targeted": False}, "targeted"),
        ({"norms": ("l0",)}, "stronger_than_nothing"),
    ],
)
def test_attacks_are_not_asked_for_what_they_do_not_claim(change, check):
    found = {result.check: result for result in _results(attacks.spec(attacks.Honest, **change))}

    assert found[check].status == "skipped"


def test_an_attack_that_is_targeted_only_is_never_called_without_goals():
    class Recorder(attacks.Honest):
        def run(self, target, x, y, threat, rng, *, y_goal=None):
            assert y_goal is not None
            return super().run(target, x, y, threat, rng, y_goal=y_goal)

    attacks.TargetedOnly = Recorder
    results = _results(attacks.spec(Recorder, make="wrong_attacks:TargetedOnly", untargeted=False))

    assert [result for result in results if result.status == "failed"] == []


def test_the_host_keeps_its_own_rules_and_says_so_as_it_goes():
    seen: list[CheckResult] = []
    numbers = global_numbers()

    results = check_package("robplug", seen.append)

    assert seen == results
    assert global_numbers() == numbers
    assert [result for result in results if result.status not in ("passed", "skipped")] == []
    passed = {(result.subject, result.check) for result in results if result.status == "passed"}
    assert {("robplug/pgd", "batch_independent"), ("robplug/noise", "asks_no_scores"), ("l1", "project")} <= passed


def test_a_distribution_that_is_not_there_is_an_error_with_a_remedy():
    with pytest.raises(PluginError, match=r"no-such-plugin: it is not installed.*there is robplug"):
        check_package("no-such-plugin")


def test_a_distribution_under_another_name_is_named(installed):
    installed()
    with pytest.raises(PluginError, match=r"wrong: it is not installed.*did you mean robplug-wrong\?"):
        check_package("wrong")


@pytest.fixture
def installed(monkeypatch):
    """Makes a plugin of Specs the only one that is installed."""

    def install(*specs, error=None):
        plugin = Plugin("robplug-wrong", "1", "robplug.builtin", specs, error)
        fake = robplug.registry.Registry([plugin, *robplug.plugins.load()])
        monkeypatch.setattr(run, "registry", lambda: fake)

    return install


def test_a_disabled_plugin_fails_to_load_and_nothing_else_is_asked_of_it(installed):
    error = PluginError("robplug-wrong", "importing it\nfailed", "pip uninstall robplug-wrong")
    installed(error=error)

    message = "importing it failed; pip uninstall robplug-wrong"
    assert check_package("Robplug_Wrong") == [CheckResult("loads", "robplug.builtin", "failed", message)]
    with pytest.raises(PluginError, match="pip uninstall"):
        list_checks("robplug-wrong")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from robplug import hookimpl\nprint('hello')", ""),
        ("from robplug.defenses import Defense", "importing quick and calling its hooks loads torch; import inside "),
        ("def robplug_norms():\n    import torch, foolbox\n    return []", "loads torch, foolbox; "),
        ("def robplug_attacks():\n    raise KeyError('x')", "in a process of its own, it raises KeyError: 'x'"),
    ],
)
def test_listing_is_to_load_nothing_heavy(tmp_path, monkeypatch, source, message):
    (tmp_path / "quick.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = what_slows_listing("quick")
    assert message in found and bool(message) is bool(found) and "\n" not in found


def test_what_cannot_be_imported_is_said_once(installed):
    installed(attacks.spec(attacks.Honest, make="wrong_attacks:Gone"), attacks.spec(attacks.Honest, name="a/b"))

    failed = [(result.subject, result.check) for result in check_package("robplug-wrong") if result.status == "failed"]

    assert failed == [("wrong/honest", "resolves")]


def test_an_expected_failure_is_kept_apart_and_an_unexpected_success_is_not_forgiven(installed):
    installed(attacks.spec(attacks.MutatesX))
    subject = "wrong/mutatesx"
    expected = {(subject, "inputs_untouched"): "saves memory", (subject, "output"): "not yet"}

    results = {result.check: result for result in check_package("robplug-wrong", expected=expected)}

    assert results["inputs_untouched"].status == "expected"
    assert results["inputs_untouched"].message == "it changed x in place; expected: saves memory"
    assert results["output"].status == "failed"
    assert results["output"].message == "it passes and was expected to fail: not yet"


def test_pytest_gets_the_same_list(installed):
    installed(attacks.spec(attacks.MutatesX, targeted=False))

    mark = parametrize("robplug-wrong", expected={("wrong/mutatesx", "inputs_untouched"): "saves memory"}).mark
    params = {param.id: param for param in mark.args[1]}

    names = [result.check for result in check_package("robplug-wrong")][2:]
    assert list(params) == [f"wrong/mutatesx-{name}" for name in names]
    (xfail,) = params["wrong/mutatesx-inputs_untouched"].marks
    assert (xfail.name, xfail.kwargs) == ("xfail", {"reason": "saves memory", "strict": True})
    params["wrong/mutatesx-output"].values[0]()
    with pytest.raises(AssertionError, match="it changed x"):
        params["wrong/mutatesx-inputs_untouched"].values[0]()
    with pytest.raises(SkipTest):
        params["wrong/mutatesx-targeted"].values[0]()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0)])
def test_the_network_is_right_by_margins_from_little_to_much(bounds):
    scene = network(bounds)

    top = scene.target.logits(scene.x).topk(2).values
    margin = top[:, 0] - top[:, 1]
    assert torch.equal(scene.target.predict(scene.x), scene.y)
    assert margin.min() < 0.5 and margin.max() > 5
    assert (scene.x.min(), scene.x.max()) == bounds
    assert not torch.allclose(scene.target.module.net.norm.running_mean, torch.zeros(6))


def test_the_linear_distances_are_where_the_prediction_changes():
    scene = linear()

    direction = -scene.weight.view(1, 8, 8).sign() * (2 * scene.y - 1).view(-1, 1, 1, 1)
    length = scene.distances("linf").view(-1, 1, 1, 1)
    assert torch.equal(scene.target.predict(scene.x), scene.y)
    assert torch.equal(scene.target.predict(scene.x + 0.999 * length * direction), scene.y)
    assert torch.equal(scene.target.predict(scene.x + 1.001 * length * direction), 1 - scene.y)
    assert torch.allclose(scene.distances("l2") * scene.weight.norm(), scene.distances("l1") * scene.weight.abs().max())
