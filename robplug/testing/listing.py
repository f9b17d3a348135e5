"""The rule that keeps `robplug list` quick: what lists a plugin loads neither torch nor an attack library."""

from __future__ import annotations

import os
import subprocess
import sys

_SCRIPT = """
import importlib, sys
from robplug.registry import KINDS
module = importlib.import_module(sys.argv[1])
for hook, _ in KINDS.values():
    getattr(module, hook, list)()
print(*[name for name in ("torch", "art", "foolbox", "torchattacks") if name in sys.modules], sep=", ")
"""


def what_slows_listing(module: str) -> str:
    """Returns what listing a plugin loads and must not, in one line, or "".

    It is seen in a process of its own, in which nothing is loaded yet.

    Args:
        module: that the plugin's entry point names.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", _SCRIPT, module]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    last = (done.stderr if done.returncode else done.stdout).splitlines()[-1]
    if done.returncode:
        return f"in a process of its own, it raises {last}"
    remedy = "import inside functions, or keep the hooks in a module that imports robplug alone"
    return f"importing {module} and calling its hooks loads {last}; {remedy}" if last else ""
