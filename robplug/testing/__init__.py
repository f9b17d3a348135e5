"""The conformance kit for plugin authors.

``robplug check PACKAGE`` and `check_package` run it as a script does, `parametrize` as tests of pytest.
"""

from robplug.testing.run import Check, CheckResult, check_package, list_checks, parametrize

__all__ = ["Check", "CheckResult", "check_package", "list_checks", "parametrize"]
