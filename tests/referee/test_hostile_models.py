"""Models and targets that are awkward, and must neither spoil others' rows nor stop the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import robplug
from robplug.errors import PlanError

HEAD = "import torch\nimport robplug\nfrom robplug.zoo import digits_standard\n"
PLAN: dict[str, Any] = {
    "datasets": [{"name": "digits", "samples": 12}],
    "threats": [{"norm": "linf", "eps": 0.1}],
    "attacks": [{"name": "robplug/pgd", "steps": 3}],
}


def statuses(folder: Path, code: str, out: str, **changes: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(HEAD + code)
    target = {"name": "mine", "make": str(folder / "model.py") + ":net", **changes.pop("target", {})}
    plan = {"targets": [target, *changes.pop("more", [])], **PLAN, **changes}
    return robplug.evaluate(plan, out=folder / out).rows()


def net(body: str) -> str:
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return (
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.inner = digits_standard()\n    def forward(self, x):\n{lines}\n"
        "def net():\n    return Net()\n"
    )


def test_a_gradient_that_is_no_number_is_an_error_and_not_robustness(tmp_path: Path) -> None:
    code = net("y = self.inner(x)\nif y.requires_grad:\n    y.register_hook(lambda g: g * float('nan'))\nreturn y")
    rows = [row for row in statuses(tmp_path, code, "out") if row["status"] != "misclassified"]
    assert {row["status"] for row in rows} == {"error"} and "finite gradient" in rows[0]["note"]


def test_logits_that_are_no_number_break_nothing(tmp_path: Path) -> None:
    code = net("y = self.inner(x)\nreturn y if (x * 16 == (x * 16).round()).all() else y * float('nan')")
    rows = statuses(tmp_path, code, "out", attacks=[{"name": "robplug/noise", "draws": 1}])
    judged = [row for row in rows if row["status"] != "misclassified"]
    assert {row["status"] for row in judged} == {"invalid"}
    assert {row["note"] for row in judged} == {"makes the model give no number"}


def test_a_model_that_works_in_place_spoils_no_other(tmp_path: Path) -> None:
    code = net("x.mul_(0)\nreturn self.inner(x)")
    more = [{"name": "plain", "make": "robplug/digits-standard"}]
    rows = statuses(tmp_path, code, "out", more=more, attacks=[{"name": "robplug/noise", "draws": 1}])
    alone = robplug.evaluate(
        {"targets": more, **PLAN, "attacks": [{"name": "robplug/noise", "draws": 1}]}, out=tmp_path / "alone"
    )
    plain = [row["status"] for row in rows if row["target"] == "plain"]
    assert plain == [row["status"] for row in alone.rows()] and "robust" in plain


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_models_of_other_precisions_are_judged(tmp_path: Path, dtype: str) -> None:
    code = f"def net():\n    return digits_standard().to(torch.{dtype})\n"
    rows = statuses(tmp_path, code, "out")
    assert {row["status"] for row in rows} <= {"robust", "broken", "misclassified"}
    assert sum(row["status"] == "misclassified" for row in rows) < 4


def test_least_likely_goals_leave_the_model_alone_and_repeat(tmp_path: Path) -> None:
    code = "def net():\n    return torch.nn.Sequential(torch.nn.Dropout(), digits_standard()).train()\n"
    threats = [{"norm": "linf", "eps": 0.2, "targeted": True, "goal": "least-likely"}]
    goals = [[row["y_goal"] for row in statuses(tmp_path, code, out, threats=threats)] for out in ("a", "b")]
    assert goals[0] == goals[1]


def test_one_object_given_to_two_targets_has_two_sets_of_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from robplug.zoo import digits_at, digits_standard

    for name, model in (("at", digits_at()), ("standard", digits_standard())):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    more = [{"name": "other", "make": str(tmp_path / "model.py") + ":net", "weights": str(tmp_path / "at.safetensors")}]
    target = {"weights": str(tmp_path / "standard.safetensors")}
    threats = [{"norm": "linf", "eps": 0.2}]
    rows = statuses(tmp_path, "net = digits_standard()\n", "out", target=target, more=more, threats=threats)
    broken = {name: sum(r["status"] == "broken" for r in rows if r["target"] == name) for name in ("mine", "other")}
    assert broken["mine"] > broken["other"]


def test_stochastic_rows_follow_seed_and_chunk_alone(tmp_path: Path) -> None:
    code = net("return self.inner(x) + 4 * torch.randn(len(x), 10)")
    both = statuses(tmp_path, code, "both", target={"stochastic": True, "draws": 2}, seed=[0, 1])
    one = statuses(tmp_path, code, "one", target={"stochastic": True, "draws": 2}, seed=1)
    assert [r["status"] for r in both if r["seed"] == 1] == [r["status"] for r in one]
    assert json.dumps([r["prediction"] for r in both if r["seed"] == 0]) != json.dumps([r["prediction"] for r in one])


def test_what_cannot_be_run_is_refused_before(tmp_path: Path) -> None:
    scores = "def net():\n    return robplug.target(digits_standard(), offers='scores')\n"
    with pytest.raises(PlanError, match=r"needs gradients, and mine offers scores"):
        statuses(tmp_path, scores, "a")
    with pytest.raises(PlanError, match="it brings its own"):
        statuses(tmp_path, scores, "b", target={"stochastic": True})
    with pytest.raises(PlanError, match="steps >= 1, got 0"):
        statuses(
            tmp_path, "def net():\n    return digits_standard()\n", "c", attacks=[{"name": "robplug/pgd", "steps": 0}]
        )
    with pytest.raises(PlanError, match="expected 'auto', 'cpu'"):
        statuses(tmp_path, "def net():\n    return digits_standard()\n", "d", device="gpu")
