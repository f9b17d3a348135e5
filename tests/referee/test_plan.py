"""Plans: what they may say, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from robplug.errors import PlanError
from robplug.plugins import registry
from robplug.referee.cells import Cell, expand
from robplug.referee.keys import Identity, cell_key
from robplug.referee.plan import load_plan
from robplug.referee.plan_tables import DatasetEntry, TargetEntry, as_number
from robplug.types import AttackSpec, ThreatModel

PLAN: dict[str, Any] = {
    "targets": [{"name": "mine", "make": "model.py:net"}],
    "datasets": [{"name": "digits", "samples": 8}],
    "threats": [{"norm": "linf", "eps": ["2/255", 0.1]}],
    "attacks": [{"name": "robplug/pgd", "steps": 5}],
}


def cells(**changes: Any) -> list[Cell]:
    plan, where = load_plan({**PLAN, **changes})
    return expand(plan, registry(), where)


def test_cells_are_the_product() -> None:
    found = cells(
        seed=[0, 1],
        targets=[{"name": "a", "make": "m.py:a"}, {"name": "b", "make": "m.py:b"}],
        attacks=[{"name": "robplug/pgd"}, {"name": "robplug/fgsm"}],
    )
    assert len(found) == 2 * 2 * 2 * 2 and [cell.index for cell in found] == list(range(16))
    assert {cell.threat.eps for cell in found} == {2 / 255, 0.1}
    assert found[0].params["steps"] == 20 and found[0].mode == "own"


def test_fractions_are_numbers_in_lists_too() -> None:
    assert as_number(["1/255", 2, "svhn", ["3"]]) == [1 / 255, 2, "svhn", [3]]


def test_a_canonical_attack_is_compiled_for_its_libraries() -> None:
    found = cells(attacks=[{"name": "pgd", "steps": 7, "libraries": ["robplug"]}], threats=[{"norm": "l2", "eps": 0.5}])
    assert [(cell.spec.name, cell.mode, cell.label) for cell in found] == [
        ("robplug/pgd", "harmonised", "pgd · robplug")
    ]
    assert found[0].params["steps"] == 7 and found[0].params_passed == {"steps": 7}


def test_harmonised_parameters_follow_the_bounds_of_the_data() -> None:
    """torchattacks works in [0, 1]: a step of 10 in data from 0 to 255 is one of 10/255 there."""
    attacks = [{"name": "pgd", "libraries": ["torchattacks"], "step_size": 10}]
    plan, where = load_plan({**PLAN, "attacks": attacks, "threats": [{"norm": "linf", "eps": 20}]})
    for bounds, alpha in (((0.0, 1.0), 10.0), ((0.0, 255.0), 10 / 255)):
        (cell,) = expand(plan, registry(), where, [bounds])
        assert cell.params["alpha"] == pytest.approx(alpha) and cell.threat.bounds == bounds


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"thraets": []}, "thraets: unknown key; did you mean threats"),
        (
            {"targets": [{"nmae": "x"}]},
            r"targets\[0\].name: is missing; targets\[0\].nmae: unknown key; did you mean name",
        ),
        ({"targets": []}, "targets"),
        (
            {"targets": [{"name": "a", "make": "m", "of": ["b"]}, {"name": "b", "make": "n"}]},
            "'b' is no target furth",
        ),
        ({"transfer": [{"sources": ["mine"], "victims": ["yours"]}]}, r"transfer\[0\].victims: 'yours' is no target"),
        ({"transfer": [{"sources": ["mine", "mine"], "victims": ["mine"]}]}, "'mine' is there twice"),
        ({"transfer": [{"sources": [], "victims": ["mine"]}]}, "at least one source"),
        ({"transfer": [{"sources": "leave-one-out", "victims": ["mine"]}]}, "leave-one-out needs at least 3 victims"),
        ({"transfer": [{"sources": "all", "victims": ["mine"]}]}, "leave-one-out"),
        (
            {
                "targets": [{"name": "mine", "make": "m"}, {"name": "idle", "make": "n"}],
                "transfer": [{"sources": ["mine"], "victims": ["mine"]}],
            },
            "'idle' is no source, victim or member",
        ),
        ({"attacks": [{"name": "robplug/pgd", "sweep": {"steps": [1]}}]}, "sweep.steps"),
        ({"attacks": [{"name": "robplug/pgd", "transform": abs}]}, r"attacks\[0\].transform: .*holds nothing else"),
        ({"attacks": [{"name": "robplug/pgd", "step_size": float("nan")}]}, r"attacks\[0\].step_size: .*got nan"),
        ({"attacks": [{"name": "robplug/pgd", "sweep": {"steps": [1, 2], "restarts": [1, 2]}}]}, "over one parameter"),
        ({"attacks": [{"name": "robplug/pgd", "steps": 3, "sweep": {"steps": [1, 2]}}]}, "steps is given and swept"),
        ({"attacks": [{"name": "robplug/pgd", "sweep": {"stepz": [1, 2]}}]}, "'stepz'; did you mean steps"),
        ({"targets": [{"name": "unknown"}]}, "no target named 'unknown'.*give make="),
        ({"targets": [{"name": "a", "make": "m"}, {"name": "a", "make": "n"}]}, "'a' twice"),
        ({"datasets": [{"name": "digitz"}]}, "did you mean digits"),
        ({"datasets": [{"name": "digits", "samples": 0}]}, r"datasets\[0\].samples.*got 0"),
        ({"threats": [{"norm": "linfty", "eps": 0.1}]}, "did you mean linf"),
        ({"threats": [{"norm": "linf", "eps": -1}]}, r"threats\[0\].eps.*eps >= 0, got -1"),
        ({"threats": [{"norm": "linf", "eps": "8/0"}]}, "8/0"),
        ({"threats": [{"norm": "linf", "eps": "minimal"}]}, "robplug/pgd needs a radius"),
        ({"threats": [{"norm": "l0", "eps": 3}]}, "robplug/pgd serves linf, l2, l1, not l0; restrict it with norms="),
        ({"attacks": [{"name": "robplug/pdg"}]}, "did you mean robplug/pgd"),
        ({"attacks": [{"name": "robplug/pgd", "stepz": 3}]}, r"attacks\[0\]: .*'stepz'; did you mean steps"),
        ({"attacks": [{"name": "robplug/pgd", "norms": ["l2"]}]}, "'l2' is no threat of the plan, which has linf"),
        ({"attacks": [{"name": "robplug/pgd", "libraries": ["art"]}]}, "goes with a canonical name"),
        ({"attacks": [{"name": "robplug/pgd", "mode": "harmonised"}]}, "canonical name with mode"),
        ({"attacks": [{"name": "robplug/pgd", "mode": "as-shipped", "steps": 3}]}, "no parameters with mode"),
        ({"attacks": [{"name": "robplug/pgd", "mode": "fair"}]}, r"attacks\[0\].mode"),
        ({"attacks": [{"name": "pgdd"}]}, "did you mean pgd"),
        ({"attacks": [{"name": "pgd", "libraries": ["Foolbix"]}]}, "no attacks of 'Foolbix': .*did you mean foolbox"),
        ({"model": "robplug/lenet"}, "model: unknown key"),
        ({"attacks": [{"name": "pgd", "stepz": 1, "libraries": ["robplug"]}]}, "'stepz'"),
        ({"targets": [{"name": "a", "make": "m.py:a", "eot": 4}]}, "eot = 4 and draws = 1 need stochastic = true"),
        ({"attacks": [{"name": "robplug/pgd", "norms": ["linf", "l3"]}]}, "'l3' is no threat of the plan"),
        ({"chunk": 0}, "chunk.*got 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_wrong_plan_is_explained(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        cells(**changes)


def test_a_training_plan_is_told_in_one_clause() -> None:
    with pytest.raises(PlanError, match=r"^plan: this looks like a training plan: robplug train runs it$"):
        load_plan({"model": "robplug/lenet", "dataset": "digits", "epochs": 3, "out": "runs/x"})


def test_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gone\.toml: cannot be read"):
        load_plan(tmp_path / "gone.toml")
    path = tmp_path / "broken.toml"
    path.write_text('seed = 0\nout = "x\n')
    with pytest.raises(PlanError, match=r"broken\.toml: is not valid TOML.*line 2"):
        load_plan(path)


def test_the_key_of_version_1_is_frozen() -> None:
    """Every field off its default; a change of this key makes every stored result unreachable."""
    spec = AttackSpec(name="art/golden", make="m:o", params={"steps": 1})
    cell = Cell(
        index=3,
        target=TargetEntry(name="t", make="m.py:t", params={"depth": 2}, stochastic=True, eot=2, draws=5),
        dataset=DatasetEntry(name="d", split="train", root="r", samples=9),
        spec=spec,
        label="golden",
        mode="harmonised",
        params_passed={"steps": 4},
        params={"steps": 4, "random_start": True, "loss": "ce", "step_size": None},
        threat=ThreatModel("l2", 0.5, targeted=True),
        readings=(0.5,),
        goal="next",
        seed=7,
        timeout_s=30.0,
    )
    versions = {"robplug": "0.1.0", "art": "1.20.1"}
    digests = ("w" * 64, "s" * 64, "d" * 64, "p" * 64)
    identity = Identity(*digests, (-1.0, 1.0), "scores", (True, 2, 5), versions)
    assert cell_key(cell, identity, chunk=16, batch_size=128) == GOLDEN


GOLDEN = "ff7b8962c01ffaddc50c111fcd0e47261f4dcd19de382e1d5aba273eaf84bd59"
