"""Diagnostics: each check is raised by a target that is built for it alone, and by no healthy network."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from make_run import MadeCell, write_run

import robplug
from robplug.errors import PlanError
from robplug.plugins import Plugin, registry
from robplug.referee.cells import expand
from robplug.referee.diagnostics import CHECKS
from robplug.referee.findings import Diagnosis
from robplug.referee.paired import mcnemar
from robplug.referee.plan import load_plan
from robplug.referee.results import Results
from robplug.referee.run import run_plan
from robplug.registry import Registry
from robplug.types import AttackSpec, Perturbed

SUSPECTS = Path(__file__).with_name("suspects.py")
PGD = {"name": "robplug/pgd", "steps": 10}
SQUARE = {"name": "square", "libraries": ["torchattacks"], "queries": 150}
PLAN: dict[str, Any] = {"datasets": [{"name": "digits", "samples": 64}], "keep": "none", "threads": 1}
ALL = {check.name for check in CHECKS}
ITS_OWN = {
    "averaged gradients break more": ("random_gradient", {}, [PGD], 0.15),
    "two identical calls differ": ("random_layer", {}, [PGD], 0.05),
    "answers that are no numbers": ("detector", {}, [PGD], 0.05),
    "gradients are zero, constant or no numbers": ("quantised", {}, [PGD], 0.05),
    "the cross-entropy saturates": ("saturated", {}, [PGD], 0.05),
    "gradients are not the function's": ("weighted", {}, [PGD], 0.05),
    "an unbounded attack fails": ("wrong_between", {"low": 0.1, "high": 1.0}, [PGD], 0.08),
    "black-box attacks beat gradients": ("masked", {}, [PGD, SQUARE], 0.15),
    "one step beats many": ("right_at_the_sample", {}, [PGD, {"name": "robplug/fgsm"}], 0.1),
    "a larger budget breaks fewer": ("wrong_between", {"low": 0.085, "high": 0.25, "share": 0.6}, [PGD], [0.08, 0.09]),
    "noise breaks what gradients do not": ("wrong_between", {"low": -1, "high": 0.35}, [PGD], 0.3),
    "more steps still gain": ("narrow", {}, [PGD], 0.15),
}
"""Check: target, its parameters, attacks and radii of the plan."""
BY_ROWS = "a success was not returned"


def diagnosed(out: Path, target: dict[str, Any], attacks: Any, eps: Any, **changes: Any) -> tuple[Diagnosis, ...]:
    threats = [{"norm": "linf", "eps": eps}]
    plan = {"targets": [target], "attacks": attacks, "threats": threats, **PLAN, **changes}
    return robplug.evaluate(plan, out=out).summary().diagnoses


def suspect(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "make": f"{SUSPECTS}:{name}", "params": params}


def raised(diagnosis: Diagnosis) -> set[str]:
    return {finding.check for finding in diagnosis.findings}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Diagnosis, ...]:
    """A plain and an adversarially trained network under everything that a check could be raised by."""
    plan = {
        "targets": [{"name": "robplug/digits-standard"}, {"name": "robplug/digits-at"}],
        "threats": [{"norm": "linf", "eps": [0.1, 0.2]}],
        "attacks": [PGD, {"name": "robplug/fgsm"}, {"name": "robplug/noise"}, SQUARE],
        **PLAN,
    }
    return robplug.evaluate(plan, out=tmp_path_factory.mktemp("healthy")).summary().diagnoses


@pytest.mark.parametrize("check", ITS_OWN)
def test_a_check_is_raised_alone_by_its_own_target(check: str, tmp_path: Path) -> None:
    target, params, attacks, eps = ITS_OWN[check]
    (diagnosis,) = diagnosed(tmp_path, suspect(target, params), attacks, eps)
    assert raised(diagnosis) == {check}
    assert diagnosis.verdict == max(
        (finding.level for finding in diagnosis.findings), key=["suspicious", "invalid"].index
    )


def test_every_check_has_a_target() -> None:
    assert {*ITS_OWN, BY_ROWS} == ALL


def test_healthy_networks_raise_nothing(healthy: tuple[Diagnosis, ...]) -> None:
    assert [diagnosis.verdict for diagnosis in healthy] == ["no flag"] * 2
    for diagnosis in healthy:
        assert set(diagnosis.unchecked) == {"averaged gradients break more"}, "all that can be checked is checked"
        assert len(diagnosis.steps) == 7


@pytest.mark.parametrize("model", ["digits_standard", "digits_at"])
def test_healthy_networks_with_declared_noise_raise_nothing(model: str, tmp_path: Path) -> None:
    (diagnosis,) = diagnosed(tmp_path, suspect("slightly_random", {"model": model}), [PGD], 0.15)
    assert diagnosis.verdict == "no flag" and "averaged gradients break more" in diagnosis.checked
    assert diagnosis.unchecked["two identical calls differ"] == "the target is declared stochastic"


def test_a_shattered_gradient_is_seen_from_two_sides(tmp_path: Path) -> None:
    (diagnosis,) = diagnosed(tmp_path, suspect("shattered", {}), [PGD], 0.1)
    assert raised(diagnosis) == {"gradients are not the function's", "an unbounded attack fails"}
    assert diagnosis.verdict == "invalid"


# rows made by hand: pgd takes 10 backward passes a sample, fgsm one

ROWS = 40


def made(statuses: str, steps: int = 10, **options: Any) -> MadeCell:
    options.setdefault("label", "pgd \u00b7 art")
    return MadeCell(statuses, backwards=steps * len(statuses), params_passed={"steps": steps}, **options)


def of_rows(tmp_path: Path, *cells: MadeCell, **record: Any) -> Diagnosis:
    return Results(write_run(tmp_path, cells, chunk=ROWS, **record)).summary().diagnoses[0]


@pytest.mark.parametrize(
    ("first", "second", "flagged"), [("b" * 8 + "r" * 32, "r" * 40, True), ("b" * 7 + "r" * 33, "r" * 40, False)]
)
def test_seven_samples_are_chance_and_eight_are_not(tmp_path: Path, first: str, second: str, flagged: bool) -> None:
    """2 / 2^7 > .01 > 2 / 2^8."""
    blind = made(first, label="art/square", mode="own", needs="scores")
    found = of_rows(tmp_path, made(second), blind)
    assert raised(found) == ({"black-box attacks beat gradients"} if flagged else set())
    if flagged:
        (finding,) = found.findings
        assert finding.numbers == {"total": 40, "only_first": 8, "only_second": 0, "p": 2 / 2**8}
        assert finding.attacks == (2,) and finding.eps == 0.1 and finding.source and finding.remedy


def test_gradients_that_gave_no_answer_are_not_beaten(tmp_path: Path) -> None:
    blind = made("b" * 20 + "r" * 20, label="art/square", mode="own", needs="scores")
    assert raised(of_rows(tmp_path, made("e" * 20 + "r" * 20), blind)) == set()


def test_many_gradient_attacks_count_together(tmp_path: Path) -> None:
    one, other = made("b" * 10 + "r" * 30), made("r" * 10 + "b" * 10 + "r" * 20, label="pgd \u00b7 foolbox")
    step = made("b" * 20 + "r" * 20, steps=1, label="fgsm \u00b7 art")
    assert "one step beats many" not in raised(of_rows(tmp_path / "both", one, other, step))
    assert "one step beats many" in raised(of_rows(tmp_path / "one", one, step))


def test_one_step_of_a_larger_budget_may_overshoot(tmp_path: Path) -> None:
    for steps, flagged in ((10, True), (1, False)):
        cells = [made("b" * 20 + "r" * 20, steps, eps=0.1), made("r" * 40, steps, eps=0.2)]
        found = of_rows(tmp_path / str(steps), *cells)
        assert ("a larger budget breaks fewer" in raised(found)) == flagged


def test_a_wide_radius_of_the_plan_needs_no_probe(tmp_path: Path) -> None:
    fails = of_rows(tmp_path / "fails", *[made("r" * 40, eps=eps) for eps in (0.1, 0.5)])
    assert raised(fails) == set(), "of one class only, all may be left"
    assert "an unbounded attack fails" in fails.checked


@pytest.mark.parametrize(("silent", "flagged"), [(range(3), True), (range(1), False), (range(37, 40), False)])
def test_what_was_seen_broken_and_not_returned(tmp_path: Path, silent: Any, flagged: bool) -> None:
    """One odd sample is no pattern, and what another attack returns (the last ten) is no loss."""
    liar = made("r" * 40, silent=tuple(silent))
    found = of_rows(tmp_path, liar, made("r" * 30 + "b" * 10, label="apgd \u00b7 art"))
    assert raised(found) == ({BY_ROWS} if flagged else set())


@dataclass(frozen=True)
class Liar:
    """Finds adversarial examples as PGD does, shows them to the model, and returns the clean samples."""

    def run(self, target: Any, x: Any, y: Any, threat: Any, rng: Any, *, y_goal: Any = None) -> Perturbed:
        found = registry().attack("robplug/pgd", steps=5).run(target, x, y, threat, rng, y_goal=y_goal)
        target.logits(found.x_adv)
        return Perturbed(x)


def test_an_attack_that_hides_its_success_is_seen(tmp_path: Path) -> None:
    module = sys.modules.setdefault("liars", types.ModuleType("liars"))
    module.Liar = Liar  # type: ignore[attr-defined]
    plugin = Plugin("pytest", "0", "liars", (AttackSpec(name="liar/pgd", make="liars:Liar"),))
    plan = {"targets": [{"name": "robplug/digits-standard"}], "threats": [{"norm": "linf", "eps": 0.1}], **PLAN}
    plan["attacks"] = [{"name": "liar/pgd"}]
    own = Registry([*registry().plugins, plugin])
    (found,) = run_plan({**plan, "probes": 0}, own, out=tmp_path).summary().diagnoses
    assert raised(found) == {BY_ROWS}


def test_noise_counts_only_where_gradients_failed(tmp_path: Path) -> None:
    noise = made("b" * 10 + "r" * 30, label="noise/x", mode="own", needs="labels")
    assert raised(of_rows(tmp_path / "held", made("b" * 10 + "r" * 30), noise)) == set()
    found = of_rows(tmp_path / "failed", made("r" * 10 + "b" * 30), noise)
    assert raised(found) == {"noise breaks what gradients do not"}


def test_what_could_not_be_checked_is_said(tmp_path: Path) -> None:
    found = of_rows(tmp_path, made("r" * 40), plan={"targets": [{"name": "net"}], "probes": 0})
    assert {*found.checked, *found.unchecked} == ALL
    assert found.unchecked["two identical calls differ"] == "the plan has probes = 0"
    assert found.unchecked["one step beats many"] == "the plan has no gradient attack of one step"
    assert found.verdict == "no flag" and found.steps == ()


def test_other_tasks_than_classification_are_not_checked(tmp_path: Path) -> None:
    path = write_run(tmp_path, [made("r" * 40)])
    (file,) = path.glob("cells/*/cell.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "task": "segmentation"}))
    results = Results(path)
    (found,) = results.summary().diagnoses
    assert found.verdict == "not checked" and set(found.unchecked) == ALL and not found.checked
    assert "diagnosis: not checked (there is no check of segmentation)" in str(results.table())


def test_a_transferred_attack_is_a_black_box(tmp_path: Path) -> None:
    threats = [{"norm": "linf", "eps": 0.15}]
    targets = [suspect("masked", {}), {"name": "plain", "make": "robplug/digits-standard"}]
    transfer = [{"sources": ["masked", "plain"], "victims": ["masked", "plain"]}]
    plan = {"targets": targets, "threats": threats, "attacks": [PGD], "transfer": transfer, **PLAN, "keep": "all"}
    found = robplug.evaluate({**plan, "probes": 0}, out=tmp_path).summary().diagnoses
    assert [raised(one) for one in found] == [{"black-box attacks beat gradients"}, set()]


# the adaptive attack


def test_an_adaptive_attack_is_named_or_missed(tmp_path: Path) -> None:
    cells = [made("r" * 40), made("r" * 40, label="apgd \u00b7 art")]
    without = of_rows(tmp_path / "without", *cells)
    assert without.adaptive == ()
    assert "no adaptive attack was run" in str(Results(tmp_path / "without").table())
    for number, name in enumerate(("apgd", "apgd \u00b7 art")):
        path = tmp_path / str(number)
        named = of_rows(path, *cells, plan={"targets": [{"name": "net", "adaptive": [name]}]})
        assert named.adaptive == (2,)
        assert "adaptive attacks: apgd \u00b7 art" in str(Results(path).table())


def test_an_adaptive_attack_must_be_in_the_plan() -> None:
    target = {"name": "robplug/digits-at", "adaptive": ["robplug/pdg"]}
    plan, where = load_plan({**PLAN, "targets": [target], "threats": [{"norm": "linf", "eps": 0.1}], "attacks": [PGD]})
    with pytest.raises(PlanError, match=r"targets\.robplug/digits-at\.adaptive.*did you mean robplug/pgd"):
        expand(plan, registry(), where)


# what people see, and programs


def test_the_verdict_stands_in_table_summary_and_report(tmp_path: Path) -> None:
    blind = made("b" * 20 + "r" * 20, label="art/square", mode="own", needs="scores")
    results = Results(write_run(tmp_path, [made("r" * 40), blind], chunk=ROWS))
    assert "diagnosis: suspicious: black-box attacks beat gradients" in str(results.table())
    results.export()
    (stored,) = json.loads((tmp_path / "summary.json").read_text())["diagnoses"]
    assert stored["verdict"] == "suspicious" and stored["findings"][0]["numbers"]["only_first"] == 20
    page = results.report().read_text(encoding="utf-8")
    assert "Can these numbers be believed?" in page and "20 samples fall to art/square alone" in page
    assert "Athalye et al. 2018" in page and "No adaptive attack was run" in page


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    n, few = first + second, min(first, second)
    both_tails = sum(math.comb(n, k) for k in range(n + 1) if min(k, n - k) <= few) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, both_tails))
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for first, second in ((0, 0), (0, 8), (3, 17), (250, 310), (4000, 4400)):
        expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_every_check_says_where_it_is_from_and_what_to_do() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    for check in CHECKS:
        assert check.source and check.remedy and f"| {check.name} |" in page
        assert "Suspicious" in str(check.rule.__doc__) or "Invalid" in str(check.rule.__doc__), "a level has a reason"
