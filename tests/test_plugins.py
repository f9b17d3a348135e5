"""Plugins are found by installation alone, and a broken one is disabled alone, by name and with a remedy."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

from robplug import hookspecs
from robplug.cli import main
from robplug.defenses import Defense
from robplug.errors import InputError, RobplugError, UnknownNameError
from robplug.plugins import Plugin, load, registry
from robplug.referee.digests import plugin_digest
from robplug.referee.plan_tables import TargetEntry
from robplug.registry import KINDS, Registry, canonical_settings, check_params, resolve_path
from robplug.testing.checks import PIECES, checks_for
from robplug.testing.listing import what_slows_listing
from robplug.testing.run import Check, CheckResult
from robplug.types import Attack, AttackSpec, Spec, ThreatModel

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")

ONE_ATTACK = """
from robplug import AttackSpec, hookimpl

@hookimpl
def robplug_attacks():
    return [AttackSpec(name="{name}", make="json:loads")]
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Makes folders of metadata and modules as pip leaves them, and returns the plugins that are found."""
    imported = set(sys.modules)

    def install(
        distribution: str, source: str | None, *, entry: str = "plugin", version: str = "1.0", requires=(), at="site"
    ):
        module = f"{distribution.lower().replace('-', '_')}_module"
        folder = tmp_path / at
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = [f"Name: {distribution}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        (info / "entry_points.txt").write_text(f"[robplug]\n{entry} = {module}\n")
        if source is not None:
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
        if str(folder) not in sys.path:
            monkeypatch.syspath_prepend(folder)
        return info

    yield install
    for name in set(sys.modules) - imported:
        if name.endswith("_module"):
            del sys.modules[name]


def _load() -> dict[str, Plugin]:
    """Loads all plugins afresh; whatever is wrong with some, the built-in ones work."""
    plugins = load()
    built_in = [plugin for plugin in plugins if plugin.distribution == "robplug"]
    assert [plugin.error for plugin in built_in] == [None] * 5
    assert "robplug/pgd" in {spec.name for plugin in built_in for spec in plugin.specs}
    return {plugin.distribution: plugin for plugin in plugins if plugin.distribution != "robplug"}


def test_installation_alone_is_enough(site):
    site("acme-attacks", ONE_ATTACK.format(name="acme/one"), version="2.5")

    plugin = _load()["acme-attacks"]

    assert (plugin.version, plugin.error, [spec.name for spec in plugin.specs]) == ("2.5", None, ["acme/one"])


def test_two_distributions_with_one_entry_point_name_both_load(site):
    site("acme-one", ONE_ATTACK.format(name="acme/one"), entry="attacks")
    site("acme-two", ONE_ATTACK.format(name="acme/two"), entry="attacks")

    names = {name: [spec.name for spec in plugin.specs] for name, plugin in _load().items()}

    assert (names["acme-one"], names["acme-two"]) == (["acme/one"], ["acme/two"])


def test_a_module_that_two_distributions_name_is_refused_to_the_second(site):
    site("acme-one", ONE_ATTACK.format(name="acme/one"))
    info = site("acme-two", None)
    (info / "entry_points.txt").write_text("[robplug]\nplugin = acme_one_module\n")

    plugins = _load()

    assert plugins["acme-one"].error is None
    assert plugins["acme-two"].error is not None


def test_of_two_versions_on_the_path_the_one_that_is_imported_counts(site):
    site("acme", ONE_ATTACK.format(name="acme/old"), version="1.0", at="old", requires=["robplug>=9"])
    site("acme", ONE_ATTACK.format(name="acme/new"), version="2.0", at="new")

    plugin = _load()["acme"]

    assert (plugin.version, plugin.error, [spec.name for spec in plugin.specs]) == ("2.0", None, ["acme/new"])


HOOK = (
    "from robplug import AttackSpec, DatasetSpec, NormSpec, TargetSpec, hookimpl\n@hookimpl\ndef robplug_{}:\n    {}\n"
)
ATTACK = 'return [AttackSpec(name="acme/one", make="a:b", {})]'
BROKEN = {
    "misspelt hook": (HOOK.format("atacks()", "return []"), ["robplug_atacks", "robplug_attacks, robplug_defenses"]),
    "hook with an argument": (HOOK.format("attacks(config)", "return []"), ["config", "without arguments"]),
    "unmarked hook": ("def robplug_attacks(): return []", ["robplug_attacks is not marked", "@robplug.hookimpl"]),
    "unmarked misspelt hook": ("def robplug_atacks(): return []", ["robplug_atacks is not marked"]),
    "hook returning None": (HOOK.format("attacks()", "return None"), ["returned None, expected a list of Specs"]),
    "hook returning strings": (HOOK.format("attacks()", "return ['x']"), ["returned 'x', expected a AttackSpec"]),
    "hook returning another kind": (
        HOOK.format("attacks()", 'return [NormSpec(name="a", make="a:b")]'),
        ["expected a AttackSpec"],
    ),
    "hook raising": (HOOK.format("attacks()", "return 1 / 0"), ["robplug_attacks raised ZeroDivisionError", "authors"]),
    "hook ending the process": (HOOK.format("attacks()", "raise SystemExit(3)"), ["raised SystemExit: 3"]),
    "name in capitals": (
        HOOK.format("attacks()", 'return [AttackSpec(name="Acme/One", make="a:b")]'),
        ["'Acme/One'", "origin/method"],
    ),
    "attack without origin": (
        HOOK.format("attacks()", 'return [AttackSpec(name="pgd", make="a:b")]'),
        ["'pgd'", "origin/method"],
    ),
    "name that is no string": (HOOK.format("attacks()", 'return [AttackSpec(name=None, make="a:b")]'), ["name None"]),
    "make without colon": (
        HOOK.format("norms()", 'return [NormSpec(name="n", make="a.b")]'),
        ["'a.b'", "module:object"],
    ),
    "norms that are one string": (HOOK.format("attacks()", ATTACK.format('norms="linf"')), ["norms 'linf'", "tuple"]),
    "needs that nobody knows": (
        HOOK.format("attacks()", ATTACK.format('needs="gradient"')),
        ["needs 'gradient'", "gradients, scores, labels"],
    ),
    "budget that nobody knows": (
        HOOK.format("attacks()", ATTACK.format('budget="small"')),
        ["expected one of fixed, minimal"],
    ),
    "params that are a list": (HOOK.format("attacks()", ATTACK.format('params=["steps"]')), ["params ['steps']"]),
    "import error": ("import no_such_package_anywhere", ["importing acme_module failed", "pip uninstall acme"]),
    "syntax error": ("def (:", ["importing acme_module failed: SyntaxError", "pip uninstall acme"]),
    "exit on import": ("raise SystemExit('bye')", ["importing acme_module failed: SystemExit: bye"]),
}


@pytest.mark.parametrize(("source", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_disabled_alone_and_says_why(site, source, expected):
    site("acme", source)
    site("bystander", ONE_ATTACK.format(name="bystander/one"))

    plugins = _load()
    registry = Registry(load())

    assert plugins["bystander"].error is None
    assert [spec.name for spec in plugins["bystander"].specs] == ["bystander/one"]
    broken = plugins["acme"]
    assert broken.specs == ()
    assert broken.error.distribution == "acme"
    assert str(broken.error).startswith("plugin acme: ")
    assert broken.error.remedy
    assert "\n" not in str(broken.error)
    for text in expected:
        assert text in str(broken.error)
    with pytest.raises(UnknownNameError, match=r"acme .* is disabled: ") as caught:
        registry.attack("acme/one")
    assert broken.error.problem in str(caught.value)
    assert broken.error.remedy in caught.value.reason


def test_a_plugin_for_another_host_is_not_even_imported(site):
    site("acme", "raise RuntimeError('imported')", requires=["numpy", "RobPlug>=9"])

    error = _load()["acme"].error

    assert re.search(
        r"made for robplug >=9, and 0\.\d+\.\d+ is installed; pip install --upgrade acme robplug", str(error)
    )


@pytest.mark.parametrize(
    "requirement", ["robplug>=0.1,<0.2", "robplug", "robplug>=9; extra == 'future'", "robplug>=9; python_version < '3'"]
)
def test_requirements_that_are_met_or_do_not_apply_do_no_harm(site, requirement):
    site("acme", ONE_ATTACK.format(name="acme/one"), requires=[requirement])

    assert _load()["acme"].error is None


def test_a_requirement_that_nobody_can_read_disables_its_plugin(site):
    site("acme", ONE_ATTACK.format(name="acme/one"), requires=["robplug>>>1"])

    assert "its requirement 'robplug>>>1' cannot be read" in str(_load()["acme"].error)


def test_damaged_metadata_disable_their_plugin_alone(site):
    info = site("acme", ONE_ATTACK.format(name="acme/one"))
    (info / "entry_points.txt").write_text("[robplug]\nneither key nor value\n")
    other = site("other", ONE_ATTACK.format(name="other/one"))
    (other / "METADATA").unlink()
    stranger = site("stranger", None)
    (stranger / "entry_points.txt").write_text("[console_scripts]\nneither key nor value\n")

    plugins = _load()

    assert "importing entry_points.txt failed" in str(plugins["acme"].error)
    assert plugins["unknown"].error is None
    assert "stranger" not in plugins


def test_an_entry_point_that_is_no_module_is_refused(site):
    info = site("acme", "VALUE = 3")
    (info / "entry_points.txt").write_text("[robplug]\nplugin = acme_module:VALUE\n")

    assert "acme_module:VALUE is a int, expected a module" in str(_load()["acme"].error)


def test_of_two_plugins_with_one_name_the_later_is_disabled(site):
    site("beta", ONE_ATTACK.format(name="shared/one"))
    site("alpha", ONE_ATTACK.format(name="shared/one"))

    plugins = _load()

    assert plugins["alpha"].error is None
    error = plugins["beta"].error
    assert str(error) == (
        "plugin beta: it claims the attack 'shared/one', which alpha has; pip uninstall beta, or the other"
    )


def test_nobody_takes_a_built_in_name_or_class(site):
    site("acme", ONE_ATTACK.format(name="robplug/pgd"))
    accepts = 'return [TargetSpec(name="more/module", make="a:b", accepts=("torch.nn.modules.module.Module",))]'
    site("more", HOOK.format("targets()", accepts))

    plugins = _load()

    assert "it claims the attack 'robplug/pgd', which robplug has" in str(plugins["acme"].error)
    assert "claims the model class 'torch.nn.modules.module.Module', which robplug has" in str(plugins["more"].error)


def test_what_else_a_disabled_plugin_has_is_answered_with_the_reason(site):
    two = 'return [AttackSpec(name=name, make="a:b") for name in ("robplug/pgd", "else/where")]'
    site("acme", HOOK.format("attacks()", two))

    with pytest.raises(UnknownNameError) as caught:
        Registry(load()).attack("else/where")

    assert "acme (acme_module) is disabled: it claims the attack 'robplug/pgd'" in caught.value.reason


def test_a_plan_for_a_broken_plugin_says_why_it_is_not_there(site):
    site("robplug-flow", "1 / 0")

    with pytest.raises(RobplugError, match=r"no attacks of 'flow': robplug-flow .* is disabled: import"):
        Registry(load()).harmonised("pgd", "flow", {}, ThreatModel("l2", 1))


def test_a_spelling_mistake_is_answered_with_near_names():
    with pytest.raises(UnknownNameError, match=r"no attack named 'robplug/pdg'; did you mean .*robplug/pgd") as caught:
        Registry(load()).attack("robplug/pdg")
    assert "robplug/pgd" in caught.value.near
    with pytest.raises(UnknownNameError, match="no attack named 'PGD'; did you mean pgd"):
        canonical_settings("PGD", {})
    assert caught.value.reason == ""


def test_a_parameter_that_is_not_there_is_answered_with_a_near_one():
    with pytest.raises(InputError, match=r"a parameter of robplug/pgd, got 'step'; did you mean steps\?"):
        Registry(load()).attack("robplug/pgd", step=3)
    with pytest.raises(InputError, match="it has none"):
        check_params(Spec(name="a/b", make="c:d"), {"x": 1})


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("robplug/pgd", "attacks", {"tasks": "classification, segmentation, detection"}),
        ("robplug/at", "defenses", {"tasks": "classification", "pieces": "objective"}),
        ("robplug/ensemble", "targets", {"task": "classification", "of": "several"}),
        ("shapes-boxes", "datasets", {"task": "detection"}),
        ("linf", "norms", {"unit": "units of the data"}),
    ],
)
def test_what_a_spec_serves_is_shown_and_listed(capsys, name, kind, fields):
    for words in (["show", name], ["list", kind]):
        with pytest.raises(SystemExit):
            main(words)
    said = capsys.readouterr().out.splitlines()
    (line,) = [line.split("\t") for line in said if line.startswith(f"{name}\t")]
    for field, value in fields.items():
        assert f"  {field}: {value}" in said and value in line


def test_targets_that_are_made_of_others_or_of_objects_say_so():
    targets = [spec for spec in Registry(load()).specs("target") if spec.accepts]
    assert {"robplug/module", "robplug/list"} <= {spec.name for spec in targets}
    for spec in targets:
        with pytest.raises(
            InputError, match=rf"a network, got {spec.name}, which turns an object of .*file\.py:object"
        ):
            Registry(load()).named_target(spec.name)
    with pytest.raises(InputError, match=r"expected one or more targets in `of` for robplug/ensemble, got 0$"):
        Registry(load()).named_target("robplug/ensemble")
    with pytest.raises(InputError, match=r"expected no target in `of` for robplug/lenet, got 1$"):
        Registry(load()).named_target("robplug/lenet", object())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package_anywhere", "needs the package no_such_package_anywhere.*pip install no_such"),
        ("import eagerpy.nothing_here", r"pip install 'robplug\[foolbox\]'"),
        ("1 / 0", "importing acme_module failed: ZeroDivisionError"),
        ("raise SystemExit", "importing acme_module failed: SystemExit"),
        ("", "acme_module:Attack cannot be resolved: .* no attribute 'Attack'"),
    ],
)
def test_an_object_that_cannot_be_imported_is_an_error_of_robplug(site, source, message):
    site("acme", source)

    with pytest.raises(RobplugError, match=message):
        resolve_path("acme_module:Attack")


def test_a_canonical_attack_that_a_library_lacks_is_refused_with_what_it_has():
    registry = Registry(load())

    with pytest.raises(RobplugError, match=r"robplug has the attack 'pgd' only for l1, l2, linf, and the threat is l0"):
        registry.harmonised("pgd", "robplug", {}, ThreatModel("l0", 3))
    with pytest.raises(RobplugError, match="robplug has the attack 'deepfool' not at all"):
        registry.harmonised("deepfool", "robplug", {}, ThreatModel("l2", 1))
    with pytest.raises(RobplugError, match=r"no attacks of 'cleverhans': no plugin of that name .* there are art, "):
        registry.harmonised("pgd", "cleverhans", {}, ThreatModel("l2", 1))
    spec, params = registry.harmonised("pgd", "robplug", {"steps": 3}, ThreatModel("l2", 1))
    assert (spec.name, params["steps"], params["random_start"]) == ("robplug/pgd", 3, True)


def test_each_hook_has_a_heading_with_its_arguments():
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("robplug_")}

    assert sorted(hooks) == sorted(hook for hook, _ in KINDS.values())
    headings = re.findall(r"^### `(robplug_\w+\(.*\))`$", GUIDE, re.MULTILINE)
    assert headings == [f"{name}({', '.join(inspect.signature(hook).parameters)})" for name, hook in hooks.items()]
    for name, (hook, spec_class) in KINDS.items():
        section = GUIDE.partition(f"### `{hook}()`")[2].partition("\n#")[0]
        assert f"`{spec_class.__name__}`" in section, name


def test_the_guide_names_every_rule_of_an_attack():
    names = {
        Check(Spec(name="a/b", make="c:d"), function).name
        for function in checks_for(AttackSpec(name="a/b", make="c:d"))
    }

    assert {name for name in names if f"`{name}`" not in GUIDE} == {"resolves"}


def test_the_guide_shows_run_with_its_arguments():
    shown = re.search(r"^def run\((.*)\): \.\.\.", GUIDE, re.MULTILINE)

    names = [name.partition("=")[0] for name in shown[1].split(", ") if name != "*"]
    assert names == list(inspect.signature(Attack.run).parameters)


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if containing in block)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The guide's smallest plugin and the fake one, built and installed by pip into a folder of their own."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "pyproject.toml").write_text(_block("toml", "robplug-tiny"))
    (folder / "tiny" / "robplug_tiny.py").write_text(_block("python", "tiny/iterative"))
    shutil.copytree(ROOT / "tests" / "fake_plugin", folder / "fake")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *flags,
        "--target",
        folder / "site",
        folder / "tiny",
        folder / "fake",
    ]
    subprocess.run(command, check=True, capture_output=True)
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return folder, {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


def _python(environment, *arguments: str) -> str:
    folder, variables = environment
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_plugins_are_listed_without_importing_torch_or_what_they_name(environment):
    code = """
        import json, sys, robplug
        from robplug.plugins import registry
        kinds = ("attacks", "defenses", "targets", "datasets", "norms")
        names = [spec.name for kind in kinds for spec in getattr(robplug, f"list_{kind}")()]
        heavy = {"torch", "art", "foolbox", "torchattacks", "robplug_fake_parts"} & set(sys.modules)
        errors = [str(plugin.error) for plugin in registry().plugins if plugin.error]
        print(json.dumps([names, sorted(heavy), errors]))
    """

    names, heavy, errors = json.loads(_python(environment, "-c", textwrap.dedent(code)))

    assert {"tiny/iterative", "fake/step", "fake/decay", "fake/line", "fake/function", "fake", "half"} <= set(names)
    assert heavy == []
    assert errors == []


def test_installed_plugins_work_and_pass_the_conformance_kit_under_pytest(environment):
    code = """
        import robplug, torch
        from robplug.testing import check_package
        from robplug_fake_parts import Line

        torch.set_num_threads(1)

        def test_they_work():
            assert robplug.attack("tiny/iterative", steps=3).steps == 3
            assert robplug.target(Line(2.0)).logits(torch.ones(1, 1, 8, 8)).shape == (1, 3)
            assert robplug.target("fake/line").logits(torch.ones(1, 1, 8, 8)).shape == (1, 3)
            assert robplug.dataset("fake", split="train").name == "fake train"

        def test_the_kit_as_a_function():
            results = check_package("Robplug_Fake")
            assert [result for result in results if result.status == "failed"] == []
            assert {"fake/step", "fake/decay", "fake/line", "fake", "half"} <= {result.subject for result in results}
    """
    folder, _ = environment
    (folder / "test_fake.py").write_text(textwrap.dedent(code))
    (folder / "test_conformance.py").write_text(_block("python", "@parametrize"))

    output = _python(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fake.py", "test_conformance.py")

    assert re.search(r"^\d\d passed, \d skipped in ", output, re.MULTILINE), output


def test_the_guides_smallest_plugin_is_small():
    code = [line for line in _block("python", "tiny/iterative").splitlines() if line.strip()]

    assert len(code) <= 20
    assert tomllib.loads(_block("toml", "robplug-tiny"))["project"]["entry-points"]["robplug"] == {
        "tiny": "robplug_tiny"
    }


def _broken_rules(spec: Spec) -> list[CheckResult]:
    results = [Check(spec, function).result() for function in checks_for(spec)]
    return [result for result in results if result.status != "passed"]


def _guides(site, tmp_path: Path, name: str, hook: str, code: str) -> tuple[Spec, ...]:
    """Installs a hook of the guide, and beside it the module that it names; listing it loads nothing heavy."""
    module = f"{name}_code_module"
    (folder := tmp_path / "site").mkdir()
    (folder / f"{module}.py").write_text(_block("python", code))
    source, found = re.subn(r'"robplug_\w+', f'"{module}', _block("python", hook))
    assert found == 1
    site(f"robplug-{name}", source)
    assert what_slows_listing(f"robplug_{name}_module") == ""
    return _load()[f"robplug-{name}"].specs


def test_the_guides_norm_keeps_the_rules(site, tmp_path):
    (spec,) = _guides(site, tmp_path, "contrast", hook="def robplug_norms", code="class Contrast:")

    assert _broken_rules(spec) == []


def test_the_guides_norm_believes_no_false_witness(site):
    site("robplug-contrast", _block("python", "class Contrast:"))
    norm = resolve_path("robplug_contrast_module:CONTRAST")

    x = torch.tensor([[[[0.0, 0.5], [1.0, 0.5]]]])
    grey = torch.tensor([[[[0.1, 0.5], [0.9, 0.5]]]])
    assert norm.distance(x, grey, torch.tensor([[0.2]])).tolist() == pytest.approx([0.2])
    assert norm.distance(x, grey, torch.tensor([[0.1]])).tolist() == [torch.inf]
    assert norm.distance(x, grey).tolist() == [torch.inf]


def test_the_guides_defences_keep_the_rules(site, tmp_path):
    specs = _guides(site, tmp_path, "tiny", hook="def robplug_defenses", code="class Decay")

    assert [spec.name for spec in specs] == ["tiny/noise", "tiny/decay"]
    assert [_broken_rules(spec) for spec in specs] == [[], []]


def test_the_guide_names_every_piece_of_a_defence_with_its_arguments():
    table = GUIDE.partition("| piece | |")[2].partition("\n\n")[0]
    expected = [
        f"{piece}({', '.join(list(inspect.signature(getattr(Defense, piece)).parameters)[1:])})" for piece in PIECES
    ]
    assert re.findall(r"^\| `(.+?)` \|", table, re.M) == expected


def test_the_guides_attack_without_a_loop_keeps_the_rules(site):
    site("guide-search", _block("python", "class Search"))
    spec = AttackSpec(
        name="a/b", make="guide_search_module:Search", params={"draws": 50}, needs="scores", stochastic=True
    )

    assert [result for result in _broken_rules(spec) if result.status == "failed"] == []


def test_the_guide_lists_the_fields_of_an_attack_with_their_defaults():
    table = GUIDE.partition("| field | default | |")[2].partition("\n\n")[0]
    shown = {name: ast.literal_eval(value) for name, value in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.M)}

    spec = AttackSpec(name="a/b", make="c:d")
    assert shown == {name: value for name, value in vars(spec).items() if name not in ("name", "make")}


def test_the_plugin_of_a_target_is_a_part_of_what_the_model_is(site):
    """Other code of a plugin may compute other numbers with the same weights and classes."""
    source = """
    from robplug import TargetSpec, hookimpl

    @hookimpl
    def robplug_targets():
        return [TargetSpec(name="thing/net", make="json:loads")]
    """
    digests = []
    for version in ("1.0", "2.0"):
        site("robplug-thing", source, version=version, at=version)
        plugins = [plugin for plugin in load() if plugin.distribution == "robplug-thing"]
        digests.append(plugin_digest(TargetEntry(name="net", make="thing/net"), Registry(plugins)))
    assert digests[0] != digests[1] and all(digests)
    assert plugin_digest(TargetEntry(name="robplug/lenet"), registry()) == ""
    assert plugin_digest(TargetEntry(name="mine", make="model.py:net"), registry()) == ""
