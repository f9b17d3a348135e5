"""Training plans: what they train, and what they refuse."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import robplug
from robplug.augmentation import CropFlip
from robplug.cli import main
from robplug.defenses import NoDefense
from robplug.errors import PlanError, StoreError
from robplug.training import fit
from robplug.training_plan import load_train_plan, run_train_plan
from robplug.zoo import digits_cnn


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


PLAN = """
model = "robplug/digits-cnn"
epochs = 1
batch_size = 64
out = "OUT"

[dataset]
name = "digits"
samples = 200

[[defenses]]
name = "robplug/at"
eps = "51/255"
steps = 1
"""


def test_a_plan_trains_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for number in range(2):
        plan = tmp_path / f"{number}.toml"
        plan.write_text(PLAN.replace("OUT", str(tmp_path / f"out{number}")))
        torch.manual_seed(number)
        results.append(load_file(run_train_plan(plan)))
    assert_same(*results)
    record = json.loads((tmp_path / "out0" / "train.json").read_text())
    assert len(record["defenses"]) == 1 and record["defenses"][0]["eps"] == 0.2 and record["schema_version"] == 1
    assert record["data"] == robplug.dataset("digits", split="train").head(200).digest
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        word in lines[0] for word in ("epoch   1/1", "loss", "accuracy", "samples/s", "left")
    )


def test_a_finished_training_is_neither_repeated_nor_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    text = PLAN.replace("OUT", str(out))
    plan.write_text(text)

    def train() -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(plan)])
        return stopped.value.code, *capsys.readouterr()

    code, said, _ = train()
    assert code == 0 and said.splitlines()[-1] == f"weights: {out / 'weights.safetensors'}"
    files = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert files.keys() == {"weights.safetensors", "train.json"}
    code, again, note = train()
    assert (code, again) == (0, said) and "finished already" in note and "epoch" not in note
    plan.write_text(text.replace("epochs = 1", "epochs = 2"))
    code, _, note = train()
    assert code == 2 and "train.json: is of a finished training with epochs = 1 and not 2; choose another out" in note
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == files
    record = json.loads((out / "train.json").read_text())
    (out / "train.json").write_text(json.dumps({key: record[key] for key in record if key != "origin"}))
    plan.write_text(text)
    with pytest.raises(StoreError, match="finished training with origin = None and not"):
        run_train_plan(plan)
    (out / "train.json").write_text("{")
    with pytest.raises(StoreError, match=r"damaged .*JSONDecodeError.*; choose another out, or remove train\.json"):
        run_train_plan(plan)
    (out / "train.json").unlink()
    run_train_plan(plan)
    assert (out / "weights.safetensors").read_bytes() == files["weights.safetensors"][0]


def test_a_plan_may_name_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'model = "mine.py:net"\nparams = {{ width = 3 }}\ndataset = "digits"\nepochs = 1\nout = "{tmp_path / "out"}"\n'
    )
    assert set(load_file(run_train_plan(plan, progress=False))) == {"1.weight", "1.bias"}


def test_a_plan_may_begin_with_the_weights_of_another(tmp_path: Path) -> None:
    plans = {"first": PLAN, "tuned": f'weights = "{tmp_path}/first/weights.safetensors"\nlr = 1e-12\n{PLAN}'}
    found = {}
    for name, text in plans.items():
        (tmp_path / f"{name}.toml").write_text(text.replace("OUT", str(tmp_path / name)))
        found[name] = load_file(run_train_plan(tmp_path / f"{name}.toml", progress=False))
    for name, tensor in found["first"].items():
        torch.testing.assert_close(found["tuned"][name], tensor, rtol=0, atol=1e-6)
    missing = plans["tuned"].replace("first", "none")
    (tmp_path / "missing.toml").write_text(missing.replace("OUT", str(tmp_path / "missing")))
    with pytest.raises(PlanError, match=r"none/weights\.safetensors"):
        run_train_plan(tmp_path / "missing.toml", progress=False)


def test_augmented_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data = robplug.dataset("digits", split="train").head(200)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 64, "device": "cpu", "seed": 3}

    def net() -> nn.Module:
        torch.manual_seed(0)
        return digits_cnn()

    class Stop(NoDefense):
        left = 5

        def after_step(self, model: nn.Module) -> None:
            Stop.left -= 1
            if Stop.left == 0:
                signal.raise_signal(signal.SIGINT)

    stack = [CropFlip(padding=1), Stop()]
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data, stack, out=tmp_path / "parts", **options)
    resumed = fit(net(), data, stack, out=tmp_path / "parts", resume=True, **options)
    assert_same(resumed.state_dict(), fit(net(), data, stack, **options).state_dict())
    plain = fit(net(), data, [NoDefense()], **options).state_dict()
    assert any(not torch.equal(plain[name], tensor) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("epochs", "epoch"), r"plan.toml: epoch: unknown key; did you mean epochs\?"),
        (("epochs = 1", "epochs = 0"), "plan.toml: epochs: .* got 0"),
        (("samples = 200", "sample = 200"), r"dataset.sample: unknown key; did you mean samples\?"),
        (("samples = 200", "samples = 2000"), "2000 asked for, it has 1201"),
        (('out = "OUT"', ""), "plan.toml: out: is missing"),
        (('name = "robplug/at"', 'name = "robplug/att"'), r"defenses: no defense named 'robplug/att'; did you mean"),
        (("steps = 1", "step = 1"), r"defenses: expected a parameter of robplug/at, got 'step'; did you mean steps\?"),
        (("robplug/digits-cnn", "robplug/digit-cnn"), r"no target named 'robplug/digit-cnn'; did you mean"),
        (("robplug/digits-cnn", "robplug/module"), "got robplug/module, which turns an object of the class Module"),
        (
            ("robplug/digits-cnn", "robplug/resnet20"),
            r"model robplug/resnet20: does not take samples of shape \(1, 8, 8\)",
        ),
        (("[dataset]", "[dataset"), "is not valid TOML"),
        (
            ('model = "robplug/digits-cnn"', "targets = []"),
            "toml: this looks like a plan of attacks: robplug run .*it$",
        ),
        (
            ("epochs", 'weights = "robplug/digits-standard"\nepochs'),
            r'a network; begin with it by model = "robplug/dig',
        ),
    ],
)
def test_unfit_plans_are_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("OUT", str(tmp_path / "out")).replace(change[0], change[1]).replace("OUT", ""))
    if change[0] == 'out = "OUT"':
        plan.write_text(PLAN.replace(*change))
    with pytest.raises(PlanError, match=says):
        run_train_plan(plan)
    assert not (tmp_path / "out").exists()


def test_a_model_of_too_few_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\nNET = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n")
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("robplug/digits-cnn", "mine.py:NET").replace("OUT", str(tmp_path / "out")))
    with pytest.raises(PlanError, match=r"model mine\.py:NET: has 2 classes"):
        run_train_plan(plan)


def test_demo_plans_are_valid() -> None:
    root = Path(__file__).parents[1] / "benchmarks" / "demo"
    for name in ("standard", "adversarial"):
        plan = load_train_plan(root / f"{name}.toml")
        assert plan.out == f"runs/demo/{name}" and plan.model == "robplug/digits-cnn"
