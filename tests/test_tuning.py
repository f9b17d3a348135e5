"""The factor of a penalty by trials: against closed forms, resumption bit for bit, what is refused."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robplug.cli import main
from robplug.data import ASSETS, Dataset
from robplug.defenses import Defense, NoDefense
from robplug.errors import InputError, StoreError
from robplug.plugins import registry
from robplug.step import Step
from robplug.training import fit
from robplug.training_plan import Options
from robplug.training_setup import split_rows
from robplug.tuning import choose
from robplug.tuning_field import find_defense
from robplug.tuning_search import next_value

ONE_STEP: dict[str, Any] = {"batch_size": 100, "weight_decay": 0.0, "device": "cpu"}


class Slope(nn.Module):
    """One parameter s; x = 1 gets the logits (0, s)."""

    def __init__(self, slope: float = 2.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), self.slope * x.flatten(1)[:, 0]], dim=1)


@dataclass(frozen=True)
class Pull(Defense):
    """Adds strength * s: a step takes lr * strength from s, whatever the batch."""

    strength: float = 0.123
    offset: int = 0

    def penalty(self, step: Step) -> Tensor:
        return self.strength * step.model.slope + self.offset


def ones(count: int = 50) -> Dataset:
    return Dataset("ones", torch.ones(count, 1), torch.ones(count, dtype=torch.int64))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(("slope", "lr"), [(0.5, 0.1), (2.0, 1.0), (2.0, 30.0), (8.0, 1000.0)])
def test_the_choice_borders_on_the_largest_strength_that_keeps_accuracy(
    tmp_path: Path, slope: float, lr: float
) -> None:
    """One step makes s + lr (sigmoid(-s) - strength), and accuracy is lost where that is below zero."""
    limit = slope / lr + sigmoid(-slope)
    found = choose(Slope(slope), ones(), [NoDefense(), Pull()], 1, out=tmp_path, lr=lr, **ONE_STEP)
    assert found["R"] == pytest.approx(slope) and len(found["batches"]) == 10
    assert found["start"] == pytest.approx(math.log(2) / slope)
    assert found["clean_accuracy"] == 1.0
    assert found["choice"] < limit <= 1.25 * found["choice"] and found["bracket"]
    for trial in found["trials"]:
        assert trial["too_high"] == (trial["value"] > limit) == (trial["clean_accuracy"] < 1)
        assert trial["cross_entropy"] == pytest.approx(math.log1p(math.exp(-slope)), abs=1e-7)
    stored = json.loads((tmp_path / "tune.json").read_text())
    assert stored["trace"] == found and stored["schema_version"] == 1


def test_a_cross_entropy_of_chance_is_too_high_whatever_the_accuracy(tmp_path: Path) -> None:
    """Two batches: the mean of softplus(-s) before and after the first step is to stay below ln 2.

    Held-out samples are labelled so that accuracy is 0 from the start and cannot fall.
    """
    data, lr, slope = ones(), 1.0, 2.0
    options: dict[str, Any] = {**ONE_STEP, "batch_size": 20, "held_out": 0.2, "lr": lr, "seed": 4}
    data.y[split_rows(50, Options(**options))[1]] = 0
    after = 2 * math.log(2) - math.log1p(math.exp(-slope))  # softplus(-s) of the second step
    limit = (slope + math.log(math.expm1(after))) / lr + sigmoid(-slope)
    found = choose(Slope(slope), data, Pull(), out=tmp_path, **options)
    assert found["clean_accuracy"] == 0.0
    assert found["choice"] < limit <= 1.25 * found["choice"]
    for trial in found["trials"]:
        assert trial["too_high"] == (trial["value"] > limit) == (trial["cross_entropy"] >= math.log(2))


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2)
    )


def toy(count: int = 60) -> Dataset:
    x = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return Dataset("toy", x, (x.mean((1, 2, 3)) > 0.5).long())


@functools.cache
def weights() -> dict[str, Tensor]:
    return fit(small(), toy(), epochs=15, batch_size=10, lr=0.02, optimizer="adam", device="cpu").state_dict()


def trained() -> nn.Module:
    model = small()
    model.load_state_dict(weights())
    return model


@dataclass(frozen=True)
class Noisy(Defense):
    """The mean change of the logits under noise, with draws of both kinds."""

    strength: float = 1.0
    gain: float | None = None
    scale: str = "one"
    steps: int = 1

    def penalty(self, step: Step) -> tuple[Tensor, Tensor]:
        x = step.x + step.rng.normal(step.x.shape[1:], like=step.x) + 0.1 * torch.randn_like(step.x)
        raw = (step.model(x) - step.clean().logits).abs().mean()
        return raw.detach(), self.strength * raw


def test_a_trial_is_the_training_that_fit_makes_and_scores_what_was_not_trained_on(tmp_path: Path) -> None:
    """The same, by hand: start weights, one epoch at a constant rate, accuracy on a tenth of the samples."""
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"batch_size": 20, "lr": 0.01, "seed": 7, "device": "cpu"}
    found = choose(model, toy(), ["robplug/at", Noisy()], 1, out=tmp_path, tolerance=0.2, schedule=[1, 2], **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "tune").iterdir()) == [
        str(number + 1) for number in range(len(found["trials"]))
    ]
    held = split_rows(60, Options(**options, held_out=0.1))[1]
    for number, trial in enumerate(found["trials"], start=1):
        model = trained()
        stack = ["robplug/at", Noisy(trial["value"])]
        fit(model, toy(), stack, out=tmp_path / "x", epochs=1, held_out=0.1, schedule="constant", **options)
        saved = load_file(tmp_path / "tune" / str(number) / "weights.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
        right = (model(toy().x[held]).argmax(1) == toy().y[held]).double().mean()
        assert trial["clean_accuracy"] == float(right)
        record = json.loads((tmp_path / "x" / "train.json").read_text())
        assert trial["cross_entropy"] == record["history"][0]["loss"]


def test_the_first_value_is_of_the_mode_that_training_has(tmp_path: Path) -> None:
    """A penalty that tells the mode, the pass, and its draws."""
    seen: list[tuple[Any, ...]] = []

    @dataclass(frozen=True)
    class Watch(Noisy):
        def mode(self, model: nn.Module) -> None:
            model[1].eval()

        def penalty(self, step: Step) -> tuple[Tensor, Tensor]:
            seen.append((self.strength, step.model.training, step.model[1].training, tuple(step.x.flatten().tolist())))
            value, loss = super().penalty(step)
            seen[-1] += (float(value),)
            return value, loss

    data = toy()
    found = choose(trained(), data, Watch(), out=tmp_path, tolerance=0.3, batch_size=8, lr=0.01, device="cpu")
    first, second = seen[:10], seen[10:20]
    assert [(2.0, *entry[1:]) for entry in first] == second
    assert {entry[:3] for entry in first} == {(1.0, True, False)}
    assert len({entry[3] for entry in first}) == 10 and all(len(entry[3]) == 8 * 12 for entry in first)
    assert [entry[4] for entry in first] == found["batches"] and len(set(found["batches"])) == 10
    assert found["R"] == pytest.approx(sum(found["batches"]) / 10)


@dataclass(frozen=True)
class Interrupt(Noisy):
    """Ctrl-C is pressed after some steps."""

    def after_step(self, model: nn.Module) -> None:
        made[0] += 1
        if made[0] in stops:
            signal.raise_signal(signal.SIGINT)


made = [0]
stops: set[int] = set()


def tuned(out: Path, **changes: Any) -> dict[str, Any]:
    options = {"tolerance": 0.2, "batch_size": 10, "lr": 0.02, "seed": 7, "device": "cpu"}
    return choose(trained(), toy(), Interrupt(), out=out, **{**options, **changes})


def test_interrupted_tuning_goes_on_and_makes_no_step_twice(tmp_path: Path) -> None:
    made[0] = 0
    stops.clear()
    whole = tuned(tmp_path / "whole")
    steps, trials = made[0], len(whole["trials"])
    assert steps == 6 * trials >= 24
    made[0] = 0
    stops.update({3, 6, 7, 14, 18, steps})  # inside trials, and at the end of some
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path / "parts")
    assert tuned(tmp_path / "parts") == whole and made[0] == steps
    assert tuned(tmp_path / "parts") == whole and made[0] == steps
    assert (tmp_path / "parts" / "tune.json").read_bytes() == (tmp_path / "whole" / "tune.json").read_bytes()
    for weights in (tmp_path / "whole").rglob("*.safetensors"):
        assert weights.read_bytes() == (tmp_path / "parts" / weights.relative_to(tmp_path / "whole")).read_bytes()


def test_what_another_tuning_has_left_is_refused(tmp_path: Path) -> None:
    stops.clear()
    tuned(tmp_path)
    with pytest.raises(StoreError, match=r"tune\.json: was made with tolerance = 0\.2 and not 0\.3; remove tune\.json"):
        tuned(tmp_path, tolerance=0.3)
    with pytest.raises(StoreError, match=r"made with lr = 0\.02 and not 0\.1"):
        tuned(tmp_path, lr=0.1)
    with pytest.raises(StoreError, match=r"made with origin = .* and not \{'state': 'other'\}"):
        tuned(tmp_path, origin={"state": "other"})
    tuned(tmp_path, epochs=7)  # trials have one
    (tmp_path / "tune.json").write_text("{")
    with pytest.raises(StoreError, match=r"is damaged \(JSONDecodeError.*start over"):
        tuned(tmp_path)


def test_a_trial_that_diverges_is_too_high(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Steep(Pull):
        def penalty(self, step: Step) -> Tensor:
            return super().penalty(step) / (self.strength < 3)  # not finite from 3 on

    found = choose(Slope(), ones(), Steep(), out=tmp_path, lr=0.1, **ONE_STEP)
    assert found["choice"] < 3 <= 1.25 * found["choice"]
    lost = [trial for trial in found["trials"] if trial["cross_entropy"] is None]
    assert lost and all(trial["value"] >= 3 and trial["too_high"] for trial in lost)


@pytest.mark.parametrize(
    ("limit", "start", "count"), [(1.0, 1.0, 6), (9.9, 1.0, 6), (0.99, 1.0, 6), (0.0011, 1.0, 8), (3e5, 1e6, 6)]
)
def test_the_search_brackets_any_limit(limit: float, start: float, count: int) -> None:
    tried: list[dict[str, Any]] = []
    while (value := next_value("f", start, tried)) is not None:
        tried.append({"value": value, "too_high": value > limit})
    best = max(trial["value"] for trial in tried if not trial["too_high"])
    assert best <= limit < 1.25 * best and len(tried) == count


def test_nothing_beyond_ten_times_the_first_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = choose(Slope(), ones(), Pull(), out=tmp_path, lr=1e-7, progress=True, **ONE_STEP)
    assert [trial["value"] / found["start"] for trial in found["trials"]] == pytest.approx([1, 10])
    assert found["choice"] == found["trials"][1]["value"] and found["bracket"] is False
    assert capsys.readouterr().err.endswith("Pull.strength = 3.466, the largest that is tried: none was too high\n")


def test_where_all_are_too_high_there_is_no_choice(tmp_path: Path) -> None:
    wrong = Dataset("wrong", ones().x, 0 * ones().y)  # cross-entropy is above ln 2 from the start
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"to bear Pull.strength = 0.0003466, got a value too high .*; train with a"
        ):
            choose(Slope(), wrong, Pull(), out=tmp_path, lr=1e-7, **ONE_STEP)
        trace = json.loads((tmp_path / "tune.json").read_text())["trace"]
        assert len(trace["trials"]) == 4 and trace["choice"] is None
    assert len(list((tmp_path / "tune").iterdir())) == 4


NAMES = ["flow/adt", "flow/fgr", "nsloss/nsloss@mnist", "nsloss/jacobian", "far/fgr"]


@pytest.mark.parametrize(
    ("asked", "place", "field"),
    [
        ("flow/fgr.strength", 1, "strength"),
        ("flow/fgr", 1, "strength"),
        ("nsloss/nsloss@mnist.eps", 2, "eps"),
        ("nsloss/nsloss.strength", 2, "strength"),
        ("nsloss.strength", 2, "strength"),  # a method's name comes before that of an origin
        ("jacobian", 3, "strength"),
        ("far.strength", 4, "strength"),
    ],
)
def test_names_of_defences(asked: str, place: int, field: str) -> None:
    assert find_defense(NAMES, asked) == (place, field)


@pytest.mark.parametrize(
    ("names", "asked", "says"),
    [
        (NAMES, "fgr.strength", r"'fgr' to name one defence of the plan, got flow/fgr and far/fgr; give a full name"),
        (NAMES, "flow.strength", r"got flow/adt and flow/fgr"),
        (["a/b", "a/b"], "a/b.strength", r"got a/b and a/b"),
        (NAMES, "jacobi.strength", r"a defence of the plan to tune, got 'jacobi'; did you mean jacobian\?"),
        (["a/b"], "zzz", r"got 'zzz'; it has a/b"),
        (["a/b"], "", r"got ''; it has a/b"),
        ([], "a/b", r"it has none"),
    ],
)
def test_names_that_are_no_defence_are_refused(names: list[str], asked: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_defense(names, asked)


@dataclass(frozen=True)
class Silent(Pull):
    def penalty(self, step: Step) -> None:
        return None


@pytest.mark.parametrize(
    ("stack", "place", "field", "says"),
    [
        ([Noisy()], 0, "strenght", r"a field of Noisy that is a float, got 'strenght'; did you mean strength\?"),
        ([Noisy()], 0, "zzz", r"got 'zzz'; it has strength, gain"),
        ([Noisy()], 0, "scale", r"a field of Noisy that is a float, got scale = 'one'; it has strength, gain"),
        ([Noisy()], 0, "steps", r"got steps = 1; "),
        ([Noisy()], 0, "", r"got ''; it has strength, gain"),
        ([Noisy()], 1, "strength", r"place of one of 1 defences, got 1"),
        (["robplug/at"], 0, "eps", r"a defence with a penalty, got AdversarialTraining, which has none"),
        ([Noisy(), Noisy(2.0)], 1, "strength", r"one Noisy in the stack, got several"),
        ([Silent()], 0, "strength", r"a defence with a penalty, got Silent, whose penalty is None"),
        (["robplug/at", NoDefense()], 1, "strength", r"a defence with a penalty, got NoDefense"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path: Path, stack: list[Any], place: int, field: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        choose(Slope(), ones(), stack, place, field, out=tmp_path, **ONE_STEP)
    assert not list(tmp_path.iterdir())


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    data = Dataset("pixels", torch.rand(20, 1, 4, 4), torch.ones(20, 4, 4, dtype=torch.int64), task="segmentation")
    with pytest.raises(
        InputError, match="data for classification, of which a random guess has a known loss, got segmentation"
    ):
        choose(nn.Conv2d(1, 2, 1), data, Pull(), out=tmp_path, **ONE_STEP)


@pytest.mark.parametrize("slope", [0.0, -3.0, math.nan])
def test_a_penalty_that_is_not_positive_cannot_be_tuned(tmp_path: Path, slope: float) -> None:
    with pytest.raises(InputError, match=rf"a mean penalty per Pull.strength that is finite and > 0, got {slope};"):
        choose(Slope(slope), ones(), Pull(), out=tmp_path, **ONE_STEP)
    assert not list(tmp_path.iterdir())


def test_of_a_sum_only_the_term_of_the_factor_counts(tmp_path: Path) -> None:
    plain = choose(Slope(), ones(), Pull(), out=tmp_path / "plain", lr=0.1, **ONE_STEP)
    assert choose(Slope(), ones(), Pull(offset=7), out=tmp_path / "sum", lr=0.1, **ONE_STEP) == plain


@pytest.mark.parametrize("field", ["power", "shape", "hardly"])
def test_a_field_that_the_penalty_is_not_proportional_to_is_refused(tmp_path: Path, field: str) -> None:
    @dataclass(frozen=True)
    class Bent(Pull):
        power: float = 0.5
        shape: float = 1.0
        hardly: float = 1.0
        narrow: float = 0.5

        def __post_init__(self) -> None:
            if self.narrow >= 2:
                raise InputError("narrow below 2", self.narrow)

        def penalty(self, step: Step) -> Tensor:
            bent = torch.rand(()) ** self.power + self.shape**0.5 + 1e-6 * self.hardly
            return self.strength * (step.model.slope + bent)

    with pytest.raises(InputError, match=rf"a factor that .* \(strength\), got Bent\.{field}$"):
        choose(Slope(), ones(), Bent(), field=field, out=tmp_path, lr=0.1, **ONE_STEP)
    assert not list(tmp_path.iterdir())


def test_a_tolerance_is_a_share(tmp_path: Path) -> None:
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="a tolerance from 0 to below 1"):
            choose(Slope(), ones(), Pull(), out=tmp_path, tolerance=tolerance, **ONE_STEP)


PLAN = """
model = "mine.py:Net"
weights = "WEIGHTS"
dataset = { name = "digits", samples = 200 }
defenses = [{ name = "fake/decay", strength = 3 }]
epochs = 2
batch_size = 4
lr = 0.001
device = "cpu"
out = "OUT"
"""

STOPPING = """
import os, signal
from robplug.zoo import DigitsCNN

class Net(DigitsCNN):
    passes = 0

    def forward(self, x):
        Net.passes += self.training
        if self.training and f"{Net.passes}" == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), int(os.environ["STOP_BY"]))
        return super().forward(x)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder in which the fake plugin is installed, for this process too."""
    folder = shutil.copytree(Path(__file__).parent / "fake_plugin", tmp_path / "site")
    info = folder / "robplug_fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robplug-fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robplug]\nfake = robplug_fake\n")
    monkeypatch.syspath_prepend(folder)
    registry.cache_clear()
    yield folder
    registry.cache_clear()
    for name in ("robplug_fake", "robplug_fake_parts"):
        sys.modules.pop(name, None)


def plan_for(out: Path, defense: str = "fake/decay", field: str = "strength") -> Path:
    """Writes a plan whose model stops its process in its pass number STOP_AT, if there is such a number."""
    (out.parent / "mine.py").write_text(STOPPING)
    changes = {"WEIGHTS": ASSETS / "digits-standard.safetensors", "OUT": out, "fake/decay": defense, "strength": field}
    plan = out.with_suffix(".toml")
    plan.write_text(
        functools.reduce(lambda text, change: text.replace(change[0], str(change[1])), changes.items(), PLAN)
    )
    return plan


def exit_code(*words: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code


def test_the_command_goes_on_after_ctrl_c_and_a_kill(
    tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and SIGKILL in the middle of trials: 30 batches for R, then 45 steps a trial."""
    parts, whole = plan_for(tmp_path / "parts"), plan_for(tmp_path / "whole")
    tune = ("--tune", "decay.strength", "--tolerance", "0.05")
    monkeypatch.setattr(sys, "argv", ["robplug", "train", str(parts), *tune])
    monkeypatch.setenv("STOP_AT", "87")
    monkeypatch.setenv("STOP_BY", str(int(signal.SIGINT)))
    assert exit_code("train", str(parts), *tune) == 130
    said = capsys.readouterr().err
    assert f"what is finished is stored. To go on:\n  robplug train {parts} --tune decay.strength" in said
    assert [path.name for path in (tmp_path / "parts" / "tune" / "2").glob("*.pt")] == ["checkpoint-000000012.pt"]
    words = [sys.executable, "-c", "from robplug.cli import main; main()", "train", str(parts), *tune]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STOP_BY": str(int(signal.SIGKILL))}
    assert subprocess.run(words, env=env, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert len(json.loads((tmp_path / "parts" / "tune.json").read_text())["trace"]["trials"]) == 2
    monkeypatch.delenv("STOP_AT")
    for plan in (parts, whole):
        capsys.readouterr()
        assert exit_code("train", str(plan), *tune) == 0
    for name in ("tune.json", "train.json", "weights.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    trace = json.loads((tmp_path / "whole" / "tune.json").read_text())["trace"]
    record = json.loads((tmp_path / "whole" / "train.json").read_text())
    assert record["origin"]["tuning"] == trace and record["defenses"][0]["strength"] == trace["choice"]
    assert len(record["history"]) == 2
    said = capsys.readouterr().err
    told = re.findall(r"^trial +(\d+) +\S+ +cross-entropy .* (too high|can be raised)$", said, re.MULTILINE)
    expected = [(str(k + 1), "too high" if t["too_high"] else "can be raised") for k, t in enumerate(trace["trials"])]
    assert told == expected and f"Decay.strength = {trace['choice']:.4g}" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--tune", "robplug/att.eps"],
            "error: expected a defence of the plan to tune, got 'robplug/att'; did you mean ",
        ),
        (
            ["--tune", "at.eps"],
            "error: expected a defence with a penalty, got AdversarialTraining, which has none; tune ",
        ),
        (["--tolerance", "0.1"], "--tolerance belongs to --tune"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    plan = plan_for(tmp_path / "a", "robplug/at", "eps")
    assert exit_code("train", str(plan), *words) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
