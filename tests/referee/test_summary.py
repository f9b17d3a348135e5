"""The numbers of a run, each worked out by hand on a few samples."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent))
from make_run import NAN, MadeCell, write_run

from robplug.errors import StoreError
from robplug.referee.results import Results
from robplug.referee.summary import CellSummary, Summary, load_run, summarise
from robplug.referee.wilson import wilson
from robplug.referee.worst import WorstCase


def _summary(path: Path, *made: MadeCell, **record: object) -> Summary:
    return summarise(load_run(write_run(path / "run", made, **record)))


def _counts(case: WorstCase) -> tuple[int, int, int, int]:
    return case.misclassified, case.broken, case.unresolved, case.robust


def _shares(case: WorstCase) -> list[tuple[int, int, int]]:
    return [(share.breaks, share.alone, share.unanswered) for share in case.shares]


@pytest.mark.parametrize(("count", "total"), [(0, 7), (7, 7), (1, 3), (41, 100), (999, 1000), (0, 1), (50, 10_000)])
def test_wilson_agrees_with_scipy(count: int, total: int) -> None:
    ours = wilson(count, total)
    reference = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert ours.value == count / total
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_of_no_sample_says_nothing() -> None:
    assert wilson(0, 0).value is None
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_a_cell_counts_each_status(tmp_path: Path) -> None:
    (cell,) = _summary(tmp_path, MadeCell("mrrrbbiie")).cells
    assert (cell.misclassified, cell.robust, cell.broken, cell.invalid, cell.error) == (1, 3, 2, 2, 1)
    assert cell.robust_accuracy is not None
    assert (cell.robust_accuracy.count, cell.robust_accuracy.total) == (3, 9)  # robust / all
    assert (cell.success.count, cell.success.total) == (2, 8)  # broken / classified correctly before
    assert (cell.clean.count, cell.clean.total) == (8, 9)


def test_what_has_nothing_to_attack_is_robust_and_no_success(tmp_path: Path) -> None:
    summary = _summary(tmp_path, MadeCell("murbu", claims=[None, None, False, True, None]))
    (cell,), (case,) = summary.cells, summary.worst_cases
    assert cell.robust_accuracy is not None
    assert (cell.robust_accuracy.count, cell.success.count, cell.success.total) == (3, 1, 2)
    assert (cell.clean.count, cell.claim.rate.count, cell.claim.rate.total) == (4, 1, 2)
    assert _counts(case) == (1, 1, 0, 3) and not case.refused


def test_worst_case_is_per_sample(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("mrrbbr", label="pgd · art"),
        MadeCell("mrbrbr", label="pgd · foolbox"),
    )
    (case,) = summary.worst_cases
    # samples 2, 3 and 4 are broken by somebody, though each cell breaks only two
    assert _counts(case) == (1, 3, 0, 2)
    assert (case.low.value, case.high.value, case.clean.value) == (2 / 6, 2 / 6, 5 / 6)
    assert _shares(case) == [(2, 1, 0), (2, 1, 0)]
    assert not case.refused


def test_an_invalid_answer_breaks_nothing_and_resolves_nothing(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("rrbr", label="a/one"),
        MadeCell("riie", label="a/two", predictions_adv=[0, 1, 1, -1]),
    )
    (case,) = summary.worst_cases
    assert _counts(case) == (0, 1, 2, 1)
    assert (case.low.count, case.high.count) == (1, 3)
    assert case.refused
    assert _shares(case) == [(1, 1, 0), (0, 0, 2)]  # of the three faults of the second, one sample is broken anyway


def test_the_headline_interval_joins_both_ends(tmp_path: Path) -> None:
    (case,) = _summary(tmp_path, MadeCell("r" * 120 + "b" * 79 + "e")).worst_cases
    assert (case.low.low, case.high.high) == (wilson(120, 200).low, wilson(121, 200).high)


@pytest.mark.parametrize(("errors", "refused"), [(0, False), (1, False), (2, False), (3, True)])
def test_more_than_one_percent_unresolved_is_refused(tmp_path: Path, errors: int, refused: bool) -> None:
    (case,) = _summary(tmp_path, MadeCell("r" * (200 - errors) + "e" * errors), chunk=100).worst_cases
    assert (case.unresolved, case.refused) == (errors, refused)


def test_rows_that_are_not_there_yet_are_unresolved(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("rrbr", label="a/one"),
        MadeCell("rr", label="a/two", samples=4),
    )
    (case,) = summary.worst_cases
    assert not summary.finished
    assert [cell.finished for cell in summary.cells] == [True, False]
    assert _counts(case) == (0, 1, 1, 2)
    assert _shares(case) == [(1, 1, 0), (0, 0, 1)]


def test_samples_that_no_cell_has_reached_are_unresolved(tmp_path: Path) -> None:
    (case,) = _summary(tmp_path, MadeCell("rb", samples=5)).worst_cases
    assert _counts(case) == (0, 1, 3, 1)
    assert _shares(case) == [(1, 1, 3)]


def test_a_cell_without_rows_is_no_trouble(tmp_path: Path) -> None:
    summary = _summary(tmp_path, MadeCell("", samples=5))
    assert _counts(summary.worst_cases[0]) == (0, 0, 5, 0)
    assert summary.cells[0].robust_accuracy == wilson(0, 0)


def test_one_minimal_cell_is_read_at_every_radius(tmp_path: Path) -> None:
    readings = [(0.5, 0.500001), (1.0, 1.000001)]
    distances = [NAN, 0.2, 0.5000005, 0.500002, 3.0, 0.0]
    made = MadeCell(
        "mbbbbr", label="cw · art", norm="l2", eps=None, readings=readings, distances=distances, claims=[True] * 6
    )
    summary = _summary(tmp_path, made)
    half, one = summary.cells
    # at 0.5: samples 1 and 2 (inside the tolerance) are broken; 3 and 4 are robust there, as 5 is anywhere
    assert (half.eps, half.broken, half.robust, half.beyond) == (0.5, 2, 3, 2)
    assert (one.eps, one.broken, one.robust, one.beyond) == (1.0, 3, 2, 1)
    assert half.median_distance == pytest.approx((0.2 + 0.5000005) / 2)
    assert one.median_distance == 0.5000005
    assert half.claim.rate.value == 1.0  # the library's claim, whatever the distance
    assert half.success.value == 2 / 5
    assert [_counts(case) for case in summary.worst_cases] == [(1, 2, 0, 3), (1, 3, 0, 2)]


def test_without_a_radius_there_is_no_robust_accuracy(tmp_path: Path) -> None:
    summary = _summary(tmp_path, MadeCell("bbr", eps=None, norm="l2", distances=[1.0, 3.0, 0.0]))
    (cell,) = summary.cells
    assert (cell.eps, cell.robust_accuracy, cell.broken, cell.median_distance) == (None, None, 2, 2.0)
    assert summary.worst_cases == ()


def test_an_adversarial_example_breaks_at_every_radius_that_holds_it(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("rbr", eps=0.1, distances=[0.1, 0.1, 0.1]),
        MadeCell("bri", eps=0.2, distances=[0.05, 0.2, 0.3]),
    )
    small, large = summary.worst_cases
    assert (small.eps, large.eps) == (0.1, 0.2)
    # at 0.1: sample 0 by what the attack found at 0.2; sample 2 is robust, the fault at 0.2 is not asked about
    assert _counts(small) == (0, 2, 0, 1)
    # at 0.2: sample 1 by what it found at 0.1, though it failed there; sample 2 has no answer
    assert _counts(large) == (0, 2, 1, 0)
    assert [cell.broken for cell in summary.cells] == [1, 1]  # the cells' own numbers stand as they are
    assert _shares(small) == [(2, 2, 0)]


def test_different_threats_and_targets_do_not_mix(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("bb"),
        MadeCell("rr", norm="l2", eps=0.1),
        MadeCell("rr", targeted=True, goal_rule="next"),
        MadeCell("rr", target="other"),
        MadeCell("rr", dataset="mnist", data="e" * 64),
    )
    assert [_counts(case) for case in summary.worst_cases] == [(0, 2, 0, 0)] + [(0, 0, 0, 2)] * 4
    assert len(summary.attacks) == 1  # the same attack everywhere


def test_one_name_with_two_models_is_two_subjects(tmp_path: Path) -> None:
    summary = _summary(tmp_path, MadeCell("bb", weights="1" * 64), MadeCell("rr", weights="2" * 64))
    assert [subject.target for subject in summary.subjects] == ["net (11111111)", "net (22222222)"]
    assert [case.robust for case in summary.worst_cases] == [0, 2]


def test_seeds_are_cells_of_one_worst_case(tmp_path: Path) -> None:
    summary = _summary(tmp_path, MadeCell("rbr", seed=0), MadeCell("brr", seed=1))
    assert [attack.name for attack in summary.attacks] == ["pgd · art seed 0", "pgd · art seed 1"]
    assert [cell.broken for cell in summary.cells] == [1, 1]
    assert _counts(summary.worst_cases[0]) == (0, 2, 0, 1)


def test_attacks_of_one_label_are_told_apart(tmp_path: Path) -> None:
    summary = _summary(
        tmp_path,
        MadeCell("r", label="torchattacks/pgd", mode="own", params_passed={"steps": 10}),
        MadeCell("r", label="torchattacks/pgd", mode="own", params_passed={"steps": 20}),
        MadeCell("r", label="torchattacks/pgd", mode="as-shipped"),
    )
    names = ["torchattacks/pgd steps=10", "torchattacks/pgd steps=20", "torchattacks/pgd as shipped"]
    assert [attack.name for attack in summary.attacks] == names


def test_claims_are_shares_of_the_attacked(tmp_path: Path) -> None:
    made = MadeCell("mrbie", claims=[None, True, True, True, None])
    claim = _summary(tmp_path, made).cells[0].claim
    assert (claim.kind, claim.rate.count, claim.rate.total) == ("claim", 3, 4)


@pytest.mark.parametrize(("targeted", "changed"), [(False, 3), (True, 2)])
def test_without_a_claim_the_prediction_speaks(tmp_path: Path, targeted: bool, changed: int) -> None:
    # y is 0, the goal 1; sample 3 is invalid and at the goal, sample 1 at another class, sample 4 raised
    made = MadeCell("mrbie", predictions_adv=[-1, 2, 1, 1, -1], targeted=targeted)
    claim = _summary(tmp_path, made).cells[0].claim
    assert (claim.kind, claim.rate.count, claim.rate.total) == ("prediction alone", changed, 4)


def _against(summary: Summary) -> list[int]:
    return [cell.against_peers for cell in summary.cells]


def test_claims_that_do_not_hold_are_counted(tmp_path: Path) -> None:
    made = MadeCell("rbir", eps=None, readings=[(0.1, 0.1)], distances=[0, 9, 9, 0], claims=[True, True, True, False])
    assert _summary(tmp_path, made).cells[0].false_claims == 2  # the distant one is an honest success


def test_the_odd_one_among_harmonised_peers_is_named(tmp_path: Path) -> None:
    cells = [MadeCell(statuses, label=f"pgd · {i}") for i, statuses in enumerate(["rbrb", "rbre", "bbri"])]
    # sample 0: the third against the two; sample 3: only one has answered
    assert _against(_summary(tmp_path, *cells)) == [0, 0, 1]


def test_only_harmonised_attacks_of_one_name_are_peers(tmp_path: Path) -> None:
    cells = (
        MadeCell("rr", label="pgd · art"),
        MadeCell("bb", label="fgsm · art"),
        MadeCell("bb", label="foolbox/pgd", mode="as-shipped"),
        MadeCell("rr", label="torchattacks/pgd", mode="as-shipped"),
        MadeCell("bb", label="pgd · foolbox", params_passed={"steps": 3}),
    )
    assert _against(_summary(tmp_path, *cells)) == [0, 0, 0, 0, 0]


def test_silent_successes_notes_and_cost_are_added_up(tmp_path: Path) -> None:
    made = MadeCell(
        "rrrii",
        silent=(0, 2),
        notes={3: "leaves the ball", 4: "leaves the ball"},
        chunk_notes=["put back: mode of the model"],
        forwards=100,
        backwards=50,
        seconds=3.0,
    )
    cell: CellSummary = _summary(tmp_path, made).cells[0]
    assert cell.silent == 2
    assert cell.notes == (("put back: mode of the model", 2), ("leaves the ball", 2))
    assert (cell.cost.forwards, cell.cost.backwards, cell.cost.seconds) == (100, 50, 3.0)


def test_cells_of_another_plan_are_left_aside(tmp_path: Path) -> None:
    cells = [MadeCell("bb"), MadeCell("rr", label="pgd · foolbox")]
    keys = [cell.key(i) for i, cell in enumerate(cells)]
    summary = _summary(tmp_path, *cells, cells=[keys[1], "0" * 64])
    assert [cell.key for cell in summary.cells] == [keys[1]]
    assert (summary.left_aside, summary.not_begun, summary.finished) == (1, 1, False)


def test_rows_carry_their_cell(tmp_path: Path) -> None:
    made = MadeCell("rb", eps=None, readings=[(0.1, 0.1)], distances=[0.0, 0.3])
    rows = Results(write_run(tmp_path, [made])).rows()
    assert [(row["sample"], row["status"], row["eps"], row["distance"]) for row in rows] == [
        (0, "robust", None, 0.0),
        (1, "broken", None, 0.3),
    ]
    assert rows[0]["target"] == "net"


def test_export_writes_the_same_numbers(tmp_path: Path) -> None:
    cells = [MadeCell("mrb", label="a/one"), MadeCell("mbb", label="a/two")]
    results = Results(write_run(tmp_path, cells))
    paths = {path.name: path for path in results.export()}
    summary = json.loads(paths["summary.json"].read_text(encoding="utf-8"))
    assert summary["schema_version"] == 1
    assert summary["worst_cases"][0]["low"]["count"] == 0
    tables = {name: list(csv.DictReader(path.open(encoding="utf-8"))) for name, path in paths.items() if "csv" in name}
    assert [row["robust_accuracy"] for row in tables["summary.csv"]] == [str(1 / 3), "0.0"]
    assert len(tables["samples.csv"]) == 6
    worst = [(row["sample"], row["status"], row["broken_by"]) for row in tables["worst-case.csv"]]
    assert worst == [("0", "misclassified", ""), ("1", "broken", "a/two"), ("2", "broken", "a/one; a/two")]


def test_the_table_says_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cells = [MadeCell("rrbb", label="[red]odd[/]\x1b[2J", claims=[True] * 4), MadeCell("rrii", label="a/two")]
    text = str(Results(write_run(tmp_path, cells)).table())
    assert "[red]odd[/]\ufffd[2J" in text
    assert "50.0\u00a0%" in text and "100.0\u00a0%" in text
    assert "no headline: 2 of 4 samples" not in text  # the two are broken by the first attack
    assert "upper bound under these attacks" in text


def test_the_table_refuses_and_names_the_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = str(Results(write_run(tmp_path, [MadeCell("rrre", label="a/one"), MadeCell("rrrr", label="a/two")])).table())
    assert "no headline: 1 of 4 samples (25.0\u00a0%) are unresolved: no valid answer from a/one (1)" in text


@pytest.mark.parametrize(
    ("rows", "missing", "said"),
    [
        ("rb", "1 cell incomplete, 1 cell", "(50.0\u00a0%) are unresolved: no answer yet, or no valid one, from"),
        ("rbrr", "0 cells incomplete, 1 cell", "an upper bound under the attacks so far"),
    ],
)
def test_an_unfinished_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, missing: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cell = MadeCell(rows, samples=4)
    results = Results(write_run(tmp_path, [cell], cells=[cell.key(0), "f" * 64]))
    assert f"unfinished run: {missing} not begun" in str(results.table())
    assert said in str(results.table())
    assert "unfinished" in repr(results)


def _damage_rows(run: Path) -> None:
    next(run.glob("cells/*/samples-00000.parquet")).write_bytes(b"PAR1")


def _lose_rows(run: Path) -> None:
    next(run.glob("cells/*/samples-00000.parquet")).unlink()


def _double_rows(run: Path) -> None:
    first = next(run.glob("cells/*/samples-00000.parquet"))
    first.with_name("samples-00001.parquet").write_bytes(first.read_bytes())


def _damage_json(run: Path) -> None:
    next(run.glob("cells/*/cell.json")).write_text("{", encoding="utf-8")


def _newer_schema(run: Path) -> None:
    (run / "run.json").write_text('{"schema_version": 2}', encoding="utf-8")


def _leave_the_directory(run: Path) -> None:
    (run / "run.json").write_text('{"schema_version": 1, "cells": ["../../../etc/passwd"]}', encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_damage_rows, "missing or damaged"),
        (_lose_rows, "missing or damaged"),
        (_double_rows, "holds a sample twice"),
        (_damage_json, "is damaged"),
        (_newer_schema, "schema_version 2, and this robplug reads 1"),
        (_leave_the_directory, "hexadecimal"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, harm: object, message: str) -> None:
    run = write_run(tmp_path, [MadeCell("rrrrbbbb")])
    harm(run)  # type: ignore[operator]
    with pytest.raises(StoreError, match=message):
        load_run(run)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no run\.json"):
        load_run(tmp_path)


def test_rows_of_chunks_that_are_not_recorded_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("rrrrbbbb")])
    path = next(run.glob("cells/*/cell.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    record.update(chunks=record["chunks"][:1], state="unfinished")
    path.write_text(json.dumps(record), encoding="utf-8")
    (cell,) = summarise(load_run(run)).cells
    assert (cell.samples, cell.expected, cell.broken) == (4, 8, 0)


def test_rows_are_in_the_order_of_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("rrrrbbbb")])
    path = next(run.glob("cells/*/cell.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    record["chunks"].reverse()  # as after an interruption
    path.write_text(json.dumps(record), encoding="utf-8")
    assert [row["sample"] for row in Results(run).rows()] == list(range(8))


def test_numbers_need_no_torch() -> None:
    code = (
        "import robplug.referee.results, robplug.referee.report, sys; assert not {'torch', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MEASURED = [{}, {"length": 9.0}, *({"length": value, "turns": NAN} for value in (1.0, 3.0, NAN, 8.0))]


def test_medians_of_measures_are_over_the_broken_samples(tmp_path: Path) -> None:
    readings = [(0.1, 0.1), (0.5, 0.5), (1.0, 1.0)]
    distances = [NAN, 0.2, 0.2, 0.3, 0.4, 0.9]
    summary = _summary(
        tmp_path, MadeCell("mrbbbb", eps=None, readings=readings, distances=distances, measures=MEASURED), MadeCell("b")
    )
    assert [cell.median_measures for cell in summary.cells] == [
        {"length": None, "turns": None},
        {"length": 2.0, "turns": None},  # of 1 and 3; the third is not a number
        {"length": 3.0, "turns": None},
        {},
    ]


def test_measures_are_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("r", label="a/first"), MadeCell("mrbbbb", measures=MEASURED)])
    results = Results(run)
    assert [row["measures"].get("length") for row in results.rows()][:5] == [None, None, 9.0, 1.0, 3.0]
    results.export()
    (_, cell) = json.loads((run / "summary.json").read_text())["cells"]
    assert cell["median_measures"] == {"length": 3.0, "turns": None}
    for name, columns, values in (
        ("summary.csv", ["median_measures.length", "median_measures.turns"], [("", ""), ("3.0", "")]),
        ("samples.csv", ["measures.length", "measures.turns"], [("", ""), ("", ""), ("9.0", ""), ("1.0", "nan")]),
    ):
        with (run / name).open(encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        assert [column for column in rows[0] if "measures" in column] == columns
        assert [tuple(row[column] for column in columns) for row in rows][: len(values)] == values


def test_without_measures_the_exports_have_no_column_for_them(tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("rb")])
    Results(run).export()
    for name in ("summary.csv", "samples.csv"):
        assert "measures" not in (run / name).read_text()


def test_ten_thousand_samples_add_up(tmp_path: Path) -> None:
    """Against a computation on the letters themselves."""
    letters = np.random.default_rng(0).choice(list("mrbie"), size=(3, 10_000), p=[0.05, 0.6, 0.33, 0.01, 0.01])
    letters[:, letters[0] == "m"] = "m"
    letters[1:][letters[1:] == "m"] = "r"
    letters[:, letters[0] == "m"] = "m"
    cells = [MadeCell("".join(row), label=f"a/{i}") for i, row in enumerate(letters)]
    (case,) = _summary(tmp_path, *cells, chunk=5000).worst_cases
    columns = ["".join(column) for column in letters.T]
    misclassified = sum("m" in column for column in columns)
    broken = sum("b" in column for column in columns)
    robust = sum(column == "rrr" for column in columns)
    assert _counts(case) == (misclassified, broken, 10_000 - misclassified - broken - robust, robust)
