"""Documentation: every Python block runs, every TOML plan is valid, every public name has an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import robplug
from robplug.plugins import kind_of, registry
from robplug.referee.cells import expand
from robplug.referee.plan import load_plan

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
ELSEWHERE = {"writing-a-plugin.md"}  # its blocks are installed and run by tests/test_plugins.py


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """Blocks of a page follow each other in one process, as a reader would type them."""
    code = [] if page.name in ELSEWHERE else blocks(page, "python")
    if code:
        script = "import torch; torch.set_num_threads(1)\n" + "\n".join(code)
        words = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_toml_plans_are_valid(page: Path) -> None:
    for block in blocks(page, "toml"):
        content = tomllib.loads(block)
        if {"targets", "datasets", "threats", "attacks"} <= content.keys():
            plan, where = load_plan(content)
            assert expand(plan, registry(), where)


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/**/*.toml")), ids=lambda path: path.name)
def test_committed_plans_are_valid(path: Path) -> None:
    if "targets" in tomllib.loads(path.read_text()):
        plan, where = load_plan(path)
        assert expand(plan, registry(), where)


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("benchmarks/**/results/*.json"), *ROOT.glob("plugins/*/benchmarks/results/*.json")]),
    ids=lambda path: "-".join(path.parts[-4:]),
)
def test_committed_results_have_the_documented_form(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    schema = importlib.import_module("schema")
    assert schema.Result.model_validate_json(path.read_text()).rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def public() -> list[str]:
    return [name for name in robplug.__all__ if name != "adapters"]


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(robplug, name)
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("module", ["robplug.api", "robplug.types", "robplug.rng", "robplug.adapters.common"])
def test_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0 and results.failed == 0


def test_every_public_function_has_an_example() -> None:
    functions = [getattr(robplug, name) for name in public() if inspect.isfunction(getattr(robplug, name))]
    assert [f.__name__ for f in functions if "Example:" not in (f.__doc__ or "")] == []


def test_the_public_names_are_the_checked_in_list() -> None:
    """A public name leaves, or comes, only by an edit of tests/api_surface.json."""
    listed = json.loads((ROOT / "tests" / "api_surface.json").read_text())
    assert sorted(robplug.__all__) == listed["robplug"]
    own = next(plugin for plugin in registry().plugins if plugin.module == "robplug.builtin")
    names = {kind: sorted(spec.name for spec in own.specs if kind_of(spec) == kind) for kind in listed["specs"]}
    assert names == listed["specs"]


def test_names_do_not_clash_once_every_submodule_is_imported() -> None:
    """A submodule that bears a public function's name would replace it on import."""
    code = (
        "import pkgutil, importlib, robplug\n"
        "for info in pkgutil.walk_packages(robplug.__path__, 'robplug.'):\n"
        "    importlib.import_module(info.name)\n"
        "import inspect\n"
        "for _ in range(2):\n"
        "    for name in robplug.__all__:\n"
        "        assert name == 'adapters' or not inspect.ismodule(getattr(robplug, name)), name\n"
        "    assert robplug.attack('robplug/pgd').steps == 20 and robplug.list_norms()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
