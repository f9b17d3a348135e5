"""The imports that must never be, read from the syntax trees. A rule whose pattern matches no file fails."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = {"art", "foolbox", "torchattacks", "eagerpy"}
ADAPTERS = ("art", "foolbox", "torchattacks")
STDLIB = set(sys.stdlib_module_names)


def files(*patterns: str) -> list[Path]:
    found = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    assert found, f"no file matches {patterns}: the rule would hold for nothing"
    return found


def imports(path: Path, *, everywhere: bool = True) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every import but those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _nodes(tree, everywhere):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _nodes(node: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if not everywhere and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _nodes(child, everywhere)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(paths: list[Path], wrong, everywhere: bool = True) -> list[str]:  # type: ignore[no-untyped-def]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path, everywhere=everywhere)
        if wrong(name)
    ]


def plugin_packages() -> list[str]:
    folders = ROOT.glob("plugins/robplug-*/robplug_*")
    return [path.name for path in folders if path.is_dir() and path.suffix != ".egg-info"]


def test_the_host_imports_no_plugin() -> None:
    assert offenders(files("robplug/**/*.py"), lambda name: name.startswith("robplug_")) == []


def test_a_plugin_imports_no_other_plugin() -> None:
    for package in plugin_packages():
        paths = files(f"plugins/*/{package}/**/*.py")
        assert offenders(paths, lambda name, own=package: name.startswith("robplug_") and not under(name, own)) == []


def test_the_referee_is_handed_a_registry_and_imports_no_library() -> None:
    paths = files("robplug/referee/*.py")
    assert offenders(paths, lambda name: under(name, *LIBRARIES, "robplug.adapters", "robplug.plugins")) == []


def test_listing_and_reporting_import_no_torch() -> None:
    heavy = {"torch", "triton", *LIBRARIES}
    module_level = (
        "types",
        "hookspecs",
        "errors",
        "plugins",
        "registry",
        "builtin",
        "cli",
        "canonical",
        "__init__",
        "api",
    )
    paths = files(
        *(f"robplug/{name}.py" for name in module_level),
        "robplug/adapters/*/plugin.py",
        "robplug/adapters/common.py",
        "robplug/vision/plugin.py",
    )
    assert offenders(paths, lambda name: under(name, *heavy), everywhere=False) == []
    anywhere = (
        "plan",
        "cells",
        "store",
        "rundir",
        "entries",
        "worst",
        "wilson",
        "paired",
        "findings",
        "rules_rows",
        "rules_probes",
        "diagnostics",
        "summary",
        "results",
        "table",
        "formats",
    )
    anywhere += ("report", "figures", "pictures", "step_curve")
    paths = files(*(f"robplug/referee/{name}.py" for name in anywhere))
    assert offenders(paths, lambda name: under(name, *heavy)) == []


def test_kernels_stand_alone() -> None:
    if not plugin_packages():
        return  # the first kernels come with the first plugin
    kernels = list(ROOT.glob("plugins/*/robplug_*/kernels/*.py"))
    assert offenders(kernels, lambda name: under(name, *LIBRARIES)) == []
    ops = [path for path in kernels if path.name in ("ops.py", "calls.py")]
    assert offenders(ops, lambda name: under(name, "robplug") and not under(name, "robplug.kernels")) == []
    native = [path for path in kernels if path.name.startswith("numba_")]
    assert offenders(native, lambda name: under(name, "robplug") and not under(name, "robplug.cpu_kernels")) == []
    others = [path for path in kernels if path not in (*ops, *native)]
    assert offenders(others, lambda name: under(name, "robplug")) == []
    not_native = [path for path in files("robplug/**/*.py", "plugins/*/robplug_*/**/*.py") if path not in native]
    not_native.remove(ROOT / "robplug/cpu_kernels.py")
    assert offenders(not_native, lambda name: under(name, "numba", "llvmlite", "robplug.cpu_kernels")) == []
    not_triton = [path for path in kernels if path.name != "triton_impl.py"] + files("robplug/**/*.py")
    assert offenders(not_triton, lambda name: under(name, "triton")) == []
    anything = files("robplug/**/*.py", "plugins/*/robplug_*/**/*.py")
    assert offenders(anything, lambda name: name.endswith(".triton_impl") or ".triton_impl." in name) == []
    reference = [path for path in kernels if path.name == "reference.py"]
    plain = ("torch", "__future__", "math", "collections.abc", "typing")
    assert offenders(reference, lambda name: not under(name, *plain)) == []


def test_plugin_modules_import_the_host_and_the_standard_library_only() -> None:
    paths = files(
        "robplug/builtin.py",
        "robplug/adapters/*/plugin.py",
        "robplug/vision/plugin.py",
        *(f"plugins/*/{p}/plugin.py" for p in plugin_packages()),
    )
    assert offenders(paths, lambda name: name.partition(".")[0] not in STDLIB | {"robplug"}) == []


@pytest.mark.parametrize("library", ADAPTERS)
def test_adapters_import_neither_each_other_nor_the_referee(library: str) -> None:
    others = [f"robplug.adapters.{other}" for other in ADAPTERS if other != library]
    others += [other for other in LIBRARIES if other not in (library, "eagerpy")]
    paths = files(f"robplug/adapters/{library}/*.py")
    wrong = (*others, "robplug.referee", *(["eagerpy"] if library != "foolbox" else []))
    assert offenders(paths, lambda name: under(name, *wrong)) == []


def test_nothing_imports_an_adapter() -> None:
    """Entry points name them; cli and registry read no more than whether a catalogue fits the library installed."""
    paths = [path for path in files("robplug/**/*.py") if "adapters" not in path.parts and path.name != "cli.py"]
    assert offenders(paths, lambda name: under(name, "robplug.adapters")) == []


def test_nothing_imports_the_command_line_and_only_it_the_conformance_kit() -> None:
    paths = files("robplug/**/*.py")
    assert offenders(paths, lambda name: under(name, "robplug.cli")) == []
    rest = [path for path in paths if path.name != "cli.py" and "testing" not in path.parts]
    assert offenders(rest, lambda name: under(name, "robplug.testing")) == []


def test_nothing_in_the_host_imports_the_networks_of_further_tasks() -> None:
    paths = [path for path in files("robplug/**/*.py") if "vision" not in path.parts]
    assert offenders(paths, lambda name: under(name, "robplug.vision")) == []


def test_torchvision_is_imported_late_and_beside_the_core_only() -> None:
    paths = files("robplug/**/*.py")
    core = [path for path in paths if "vision" not in path.parts]
    assert offenders(core, lambda name: under(name, "torchvision")) == []
    assert offenders(paths, lambda name: under(name, "torchvision", "pycocotools", "PIL"), everywhere=False) == []


def test_files_are_small() -> None:
    long_files = [
        str(path.relative_to(ROOT))
        for path in files("robplug/**/*.py", "plugins/*/robplug_*/**/*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 300
    ]
    assert long_files == []


def test_the_host_is_thin() -> None:
    """Lines of code, without docstrings, comments and blank lines; adapters, vision and conformance kit are apart."""
    apart = {"adapters", "testing", "vision"}
    total = sum(code_lines(path) for path in files("robplug/**/*.py") if not apart & set(path.parts))
    assert total <= 8600


def code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docs for n, line in lines)


@pytest.mark.parametrize("words", ["list attacks", "plugins", "show robplug/pgd"])
def test_listing_imports_no_torch_at_run_time(words: str) -> None:
    code = (
        "import sys\nfrom robplug.cli import app\n"
        f"try:\n    app({words.split()!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'art', 'foolbox', 'torchattacks', 'triton', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "robplug" in done.stdout
