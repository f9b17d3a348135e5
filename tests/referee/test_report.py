"""The report: self-contained, escaped, and fit for a phone."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from make_run import NAN, MadeCell, write_run

from robplug.errors import InputError, RobplugError, StoreError
from robplug.referee import step_curve
from robplug.referee.figures import _Line
from robplug.referee.findings import StepPoint
from robplug.referee.formats import radius, seconds
from robplug.referee.overlays import drawn_over
from robplug.referee.pictures import first_example
from robplug.referee.report import write_report
from robplug.referee.rundir import load_run
from robplug.referee.wilson import wilson

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert('$x_1$')</script>"


def _images(channels: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.full((2, channels, 4, 4), 0.5, dtype=np.float32)
    x_adv = x.copy()
    x_adv[:, 0, 0, 0] += 0.1
    x_adv[:, 0, 3, 3] -= 0.05
    return np.array([1, 2], dtype=np.int64), x, x_adv


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with something of everything: long names, a refusal, two norms, minimal cells, images, many attacks."""
    long = "a_target_with_a_name_that_goes_on_and_on_and_never_finds_a_good_place_to_break"
    cells = []
    for target in ("net", long):
        for eps, last in ((2 / 255, "mrei"), (8 / 255, "mirr")):
            cells += [
                MadeCell("mrrb" * 8, target=target, eps=eps, images=_images(), forwards=12_345_678, seconds=4000.0),
                MadeCell("mrbb" * 8, target=target, eps=eps, label="pgd · foolbox", claims=[True] * 32, silent=(1,)),
                MadeCell(last * 8, target=target, eps=eps, label=f"art/{long}", mode="own", needs="labels"),
            ]
        distances = [NAN, 0.1, 0.6, 2.0] * 8
        minimal = {"eps": None, "norm": "l2", "readings": [(0.5, 0.5), (1.0, 1.0)], "distances": distances}
        minimal["measures"] = [
            {},
            *({"total variation": size, f"{long} {long}": 12_345.6} for size in (3.0, 4.0, 9.0)),
        ] * 8
        cells.append(
            MadeCell("mbbb" * 8, target=target, label="cw · art", params_passed={"steps": 9, long: long * 3}, **minimal)
        )
    return write_run(tmp_path_factory.mktemp("run"), cells, plan_file=f"plans/{long}.toml")


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


class _Reader(html.parser.HTMLParser):
    """Collects tags, attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_leaves_the_file(text: str) -> None:
    reader = _Reader(text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), value
    assert "url(" not in text.replace("url(#", "")
    assert "://" not in text
    assert "@import" not in text


def test_links_inside_the_file_lead_somewhere(text: str) -> None:
    attributes = _Reader(text).attributes
    places = {value for name, value in attributes if name == "id"}
    assert {value[1:] for name, value in attributes if name.endswith("href") and value[0] == "#"} <= places


def test_the_numbers_are_there(text: str) -> None:
    reader = _Reader(text)
    words = " ".join(reader.text.split())
    assert "8 of 32 samples (25.0 %) are unresolved" in words
    # samples 1, 5, ... are robust under all three attacks; 2, 6, ... are broken by the second, 3, 7, ... by two
    assert "Together they break 16 samples of 24 classified correctly; 8 of these fall to one attack alone." in words
    assert "invalid 8" in words and "error 8" in words and "false claims 8" in words and "silent success 1" in words
    assert "beyond ε 16" in words and "beyond ε 8" in words
    assert "prediction alone" in words
    assert "8/255" in words
    assert "24\u202f691\u202f344" in reader.text  # rows forward: two radii, eight chunks of 1,543,209 each
    assert "robplug run plan.toml" in words


def test_measures_stand_beside_the_distances(text: str, tmp_path: Path) -> None:
    section = re.search(r'<section id="distances">.*?</section>', text, flags=re.DOTALL)
    assert section is not None and section[0].count("<table") == 2  # the two subjects whose norm measures more
    lines = re.findall(r"<tr>.*?</tr>", section[0], flags=re.DOTALL)[:3]
    cells = [re.findall(r"<t[hd].*?</t[hd]>", line.replace("<br>", " ")) for line in lines]
    head, half, one = [[_Reader(cell).text for cell in line] for line in cells]
    assert head[:5] == ["attack", "ε", "samples broken", "median distance", "median total variation"]
    # at 0.5 a quarter of the samples is broken, at a distance of 0.1; at 1 two quarters, at 0.1 and 0.6
    assert half == ["4cw · art", "0.5", "8", "0.1", "3", "12\u202f346"]
    assert one == ["4cw · art", "1", "16", "0.35", "3.5", "12\u202f346"]
    plain = write_report(write_run(tmp_path, [MadeCell("rb")])).read_text(encoding="utf-8")
    assert 'class="fold measures"' not in plain and "measures beside" not in plain


def test_a_refusal_names_the_attack(tmp_path: Path) -> None:
    cells = [MadeCell("rrre", label="a/one"), MadeCell("rrrr", label="a/two")]
    words = " ".join(_Reader(write_report(write_run(tmp_path, cells)).read_text(encoding="utf-8")).text.split())
    assert "1 of 4 samples (25.0 %) are unresolved: no valid answer from a/one (1)" in words.replace("\u00a0", " ")


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    cells = [
        MadeCell(
            "rbe",
            label=f"{EVIL} · art",
            target=EVIL,
            dataset=EVIL,
            notes={2: EVIL},
            chunk_notes=[EVIL],
            params_passed={EVIL: EVIL},
            goal_rule=EVIL,
            measures=[{EVIL: 1.0}] * 3,
            targeted=True,
            images=_images(),
        )
    ]
    usual: dict[str, Any] = {"plan_file": EVIL, "command": EVIL, "created": EVIL, "robplug": EVIL}
    path = write_report(write_run(tmp_path, cells, **usual, plan={EVIL: EVIL}, versions={EVIL: EVIL}))
    reader = _Reader(path.read_text(encoding="utf-8"))
    assert "script" not in reader.tags
    assert reader.text.count(EVIL) > 15
    drawings = re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "$x_1$" in _Reader(drawings[-1]).text  # and is no formula
    texts = ("content", "alt", "data-label")
    assert not [value for name, value in reader.attributes if "alert" in value and name not in texts]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    made = MadeCell("rb", samples=4)
    words = _Reader(write_report(write_run(tmp_path, [made])).read_text(encoding="utf-8")).text
    assert "Unfinished run: 1 cell incomplete, 0 cells not begun." in words
    assert "2 of 4 samples" in words


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [MadeCell("", samples=3)],
        [MadeCell("mmm")],
        [MadeCell("rrr", eps=0.0)],
        [MadeCell("bbr", eps=None, distances=[1.0, 2.0, 0.0])],
        [MadeCell("bbr", eps=None, distances=[1.0, 2.0, 0.0]), MadeCell("eee", eps=None, label="a/b")],
        [MadeCell("rb", label=f"a/{i}") for i in range(26)],
    ],
    ids=["no cell", "no row", "all misclassified", "radius 0", "no radius", "only errors", "many attacks"],
)
def test_a_meagre_run_has_a_report(tmp_path: Path, cells: list[MadeCell]) -> None:
    assert "</html>" in write_report(write_run(tmp_path, cells)).read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_file(run: Path, text: str, tmp_path: Path) -> None:
    assert write_report(run, tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_figures_take_their_colours_from_the_page(text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 8  # four subjects: curve and distances
    for drawing in drawings:
        assert not re.search(r"(?:fill|stroke|color): ?#", drawing)
        assert "var(--accent)" in drawing
        assert "<style" not in drawing


def test_pictures_show_what_changed(run: Path) -> None:
    cell = next(cell for cell in load_run(run).cells if (cell.path / "examples.safetensors").exists())
    example = first_example([cell])
    assert example is not None
    assert (example.row["sample"], example.channels) == (1, 1)
    assert example.magnified == pytest.approx(5.0)  # a change of 0.1 becomes half the range
    difference = _pixels(example.difference)
    assert difference[0, 0] == 255 and difference[3, 3] == 64 and difference[1, 1] == 128
    assert set(_pixels(example.clean).ravel()) == {128}


def _pixels(uri: str) -> np.ndarray:
    import base64
    import io

    from matplotlib.image import imread

    image = imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])), format="png")
    return (image[..., 0] * 255).round().astype(int)


def test_the_broken_example_is_preferred(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, [MadeCell("rrb", images=_images(channels=3))]))
    example = first_example(run.cells)
    assert example is not None and example.row["sample"] == 2


def test_damaged_images_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("rrb", images=_images())])
    next(run.glob("cells/*/examples.safetensors")).write_bytes(b"nonsense")
    with pytest.raises(StoreError, match=r"examples\.safetensors: is damaged"):
        write_report(run)


def test_lines_of_a_figure_are_read_as_drawn() -> None:
    steps = _Line(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.5, 0.25]), steps=True)
    assert steps.at(np.array([0.0, 0.99, 1.0, 3.0])).tolist() == [1.0, 1.0, 0.5, 0.25]
    straight = _Line(np.array([0.0, 1.0]), np.array([1.0, 0.5]), steps=False)
    assert straight.at(np.array([0.5])).tolist() == [0.75]


def test_numbers_as_people_read_them() -> None:
    assert [radius(eps) for eps in (8 / 255, 0.1, 0.5, 1.0, 0.2, 0.0, None)] == [
        "8/255",
        "0.1",
        "0.5",
        "1",
        "0.2",
        "0",
        "any",
    ]
    assert [seconds(value) for value in (0.4213, 12.3, 190, 7260)] == [
        "0.42\u00a0s",
        "12\u00a0s",
        "3\u00a0min 10\u00a0s",
        "2\u00a0h 1\u00a0min",
    ]


def test_a_directory_is_no_place_for_a_report(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the directory"):
        write_report(run, tmp_path)
    with pytest.raises(StoreError):
        write_report(run, tmp_path / "missing" / "report.html")


def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RobplugError, match=r"jinja2: pip install 'robplug\[report\]'"):
        write_report(run)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser_nothing_overflows_and_nothing_is_fetched(text: str, tmp_path: Path) -> None:
    """Two frames of 390 and 1280 pixels tell what they measured (a window has a least width of 500)."""
    tell = (
        "<script>addEventListener('load', () => { const page = document.documentElement;"
        " document.querySelectorAll('details').forEach(one => { one.open = true; });"
        " const names = performance.getEntriesByType('resource').map(entry => entry.name);"
        " const pictures = [...document.images].filter(image => image.naturalWidth > 0);"
        " const tables = [...document.querySelectorAll('.measures')];"
        " const cut = tables.filter(table => table.scrollWidth > table.parentElement.clientWidth);"
        " parent.postMessage(`width ${innerWidth} needed ${page.scrollWidth} pictures ${pictures.length}"
        " cut ${cut.length} of ${tables.length}"
        " fetched ${names.filter(name => !name.startsWith('data:')).length}`, '*'); })</script>"
    )
    assert text.count("default-src 'none';") == 1
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path / "page.html").write_text(allowed.replace("</body>", f"{tell}</body>"), encoding="utf-8")
    frame = '<iframe src="page.html" style="border:0;float:left;height:2000px;width:{}px"></iframe>'
    listen = "<script>addEventListener('message', event => document.body.append(`[${event.data}]`))</script>"
    (tmp_path / "frames.html").write_text(
        f"<body style='margin:0'>{listen}{frame.format(390)}{frame.format(1280)}</body>", encoding="utf-8"
    )
    dom = _browse(tmp_path / "frames.html", tmp_path / "frames.png")
    pictures = text.count("<img ")
    for width in (390, 1280):
        assert f"[width {width} needed {width} pictures {pictures} cut 0 of 2 fetched 0]" in dom
    shot = _bytes(tmp_path / "frames.png")
    accent = (shot == (0x0A, 0x6F, 0x6C)).all(axis=2)
    assert accent[:, :390].any() and accent[:, 390:].any()  # the bars were painted at both widths


def _browse(page: Path, picture: Path) -> str:
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
        "--disable-component-update --hide-scrollbars --window-size=1670,2000 --virtual-time-budget=3000 --dump-dom"
    )
    places = [f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}", page.as_uri()]
    command = [str(CHROMIUM), *options.split(), *places]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _bytes(picture: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(picture)[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_boxes_that_are_no_numbers_are_drawn_as_far_as_they_go(value: float) -> None:
    drawn = drawn_over(np.zeros((3, 8, 8)), np.array([[1, value, 5, value, 0.9, 1], [2, 2, 4, 4, 0.9, 2]]))
    assert drawn.shape == (3, 8, 8) and drawn[:, 2, 2].any()


@pytest.mark.parametrize("answer", [np.zeros(()), np.zeros((0, 1, 6)), np.zeros((2, 4, 3)), np.zeros((2, 4, 3, 3))])
def test_answers_of_any_shape_end_no_report(answer: np.ndarray, tmp_path: Path) -> None:
    run = write_run(tmp_path, [MadeCell("rrb", images=_images())])
    path = next(run.glob("cells/*/examples.safetensors"))
    save_file({**load_file(path), "before": answer, "after": answer}, path)
    save_file({"trace": np.ones(2, dtype=np.float32)}, path.with_name("trace-00000.safetensors"))
    assert write_report(run).is_file()


@pytest.mark.parametrize(("margins", "drawn"), [((-1.5, 0.0), True), ((0.0, 0.0), False), ((-1.5, None), False)])
def test_the_margin_left_is_drawn_where_there_is_one(margins: tuple[float | None, ...], drawn: bool) -> None:
    points = [StepPoint(steps, wilson(3, 10), margin) for steps, margin in zip((1, 10), margins, strict=True)]
    assert ("median margin left" in step_curve.draw(points)) is drawn
