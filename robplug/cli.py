"""The command line: ``robplug --help``."""

from __future__ import annotations

import importlib.metadata as metadata
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from robplug.canonical import CANONICAL
from robplug.errors import RobplugError
from robplug.plugins import registry
from robplug.registry import KINDS

app = typer.Typer(
    help="Papers' attacks and defences as plugins for ART, Foolbox and torchattacks, and a referee that trusts none.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"robplug {metadata.version('robplug')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None: ...


@app.command()
def plugins() -> None:
    """Show the installed plugins, and for a broken one what is wrong and what to do."""
    table = Table("plugin", "version", "offers", "state")
    broken = False
    for plugin in registry().plugins:
        offers = Counter(kind for kind, (_, cls) in KINDS.items() for spec in plugin.specs if isinstance(spec, cls))
        text = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in offers.items())
        state = "ok" if plugin.error is None else f"disabled: {plugin.error.problem}; {plugin.error.remedy}"
        table.add_row(f"{plugin.distribution} ({plugin.module})", plugin.version, text, state)
        broken |= plugin.error is not None
    out.print(table)
    raise typer.Exit(1 if broken else 0)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, targets, datasets or norms")] = "attacks",
) -> None:
    """List what the installed plugins offer; imports neither torch nor an attack library."""
    single = kind.removesuffix("s").replace("defence", "defense")
    if single not in KINDS:
        raise typer.BadParameter(f"expected {', '.join(k + 's' for k in KINDS)}, got {kind!r}")
    columns = ("name", *_COLUMNS[single], "summary")
    room = single != "attack" or out.width >= 120
    wide = len(columns) if room else len(columns) - 2
    table = Table(*columns[:wide], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for spec in registry().specs(single):
        more = [_text(getattr(spec, column)) for column in _COLUMNS[single]]
        if out.is_terminal:
            table.add_row(*(spec.name, *more, spec.summary)[:wide])
        else:  # for grep and cut
            print("\t".join((spec.name, *more, spec.summary)))
    if out.is_terminal:
        out.print(table)
    for note in _library_notes() if single == "attack" else ():
        err.print(f"note: {note}")


_COLUMNS = {
    "attack": ("norms", "budget", "needs", "canonical", "tasks"),
    "defense": ("tasks", "pieces"),
    "target": ("task", "of"),
    "dataset": ("task",),
    "norm": ("unit",),
}


def _text(value: str | bool | tuple[str, ...] | None) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value or "")


def _library_notes() -> list[str]:
    from robplug.adapters.common import DISTRIBUTIONS, other_version

    return [note for library in DISTRIBUTIONS if (note := other_version(library))]


@app.command()
def show(name: Annotated[str, typer.Argument(help="a name of `robplug list`")]) -> None:
    """Show one attack, defence, target, data set or norm: what it is, its source and its parameters."""
    found = [(kind, spec) for kind in KINDS for spec in registry().specs(kind) if spec.name == name]
    if name in CANONICAL:
        _show_canonical(name)
        return
    if not found:
        registry().spec("attack", name)  # raises, with near matches
    for kind, spec in found:
        out.print(f"[bold]{spec.name}[/bold] ({kind})  {spec.summary}")
        for label in ("source", *_COLUMNS[kind], "targeted", "stochastic", "make"):
            if value := getattr(spec, label, None):
                out.print(f"  {label}: {_text(value)}", highlight=False)
        for key, value in spec.params.items():
            out.print(f"  {key} = {value!r}", highlight=False)


def _show_canonical(name: str) -> None:
    """Shows a canonical attack: its parameters, and the libraries that have it."""
    settings = CANONICAL[name]()
    out.print(f"[bold]{name}[/bold] (canonical attack)  {(type(settings).__doc__ or '').splitlines()[0]}")
    for spec in registry().specs("attack"):
        if spec.canonical == name:
            out.print(f"  {spec.name}: {', '.join(spec.norms)}", highlight=False)
    for key, value in vars(settings).items():
        out.print(f"  {key} = {value!r}", highlight=False)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="a plan in TOML; code that it names with make= is run")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="run directory, instead of the plan's")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print cells, what is done, and the work left")] = False,
    report_after: Annotated[bool, typer.Option("--report/--no-report", help="write report.html at the end")] = True,
) -> None:
    """Run a plan: attack, judge, store, report. The same command again goes on where it stopped."""
    if dry_run:
        _dry_run(plan, out_dir)
        return
    from robplug.referee.run import run_plan

    try:
        with _Bar() as bar:
            results = run_plan(plan, registry(), out=out_dir, progress=bar)
    except KeyboardInterrupt:
        err.print(f"stopped; finished chunks are stored. To go on:\n  {_command()}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    out.print(results.table())
    results.export()
    if report_after:
        out.print(f"report: {results.report()}", soft_wrap=True, markup=False)
    errors = Counter((row["label"], row["status"], row["note"]) for row in results.rows() if _no_answer(row))
    for (label, status, note), count in errors.items():
        err.print(f"{count} rows of {label}: {status}: {note}", soft_wrap=True, highlight=False, markup=False)
    if errors:
        if any(results.path.glob("cells/*/traceback-*.txt")):
            err.print(f"tracebacks: {results.path / 'cells'}/*/traceback-*.txt", soft_wrap=True)
        raise typer.Exit(1)


def _no_answer(row: dict[str, Any]) -> bool:
    """Whether an attack failed on a sample, by raising or by returning what is no sample."""
    no_sample = row["status"] == "invalid" and str(row["note"]).startswith(
        ("returned", "run returned", "is not finite")
    )
    return no_sample or bool(row["status"] == "error")


def _dry_run(plan: Path, out_dir: Path | None) -> None:
    from robplug.referee.outlook import outlook

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("target", "attack", "mode", "threat", "done", "forward", "backward"):
        table.add_column(column, overflow="fold")
    rows = outlook(plan, registry(), out_dir)
    for row in rows:
        table.add_row(*row.columns())
    out.print(table)
    out.print(f"{len(rows)} cells; passes are estimates in samples, ? where an attack's parameters do not tell")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run directory")],
    path: Annotated[Path | None, typer.Option("--out", help="where to write; report.html in the run without")] = None,
) -> None:
    """Write the report and the tables of a run, finished or not; runs no code of the plan."""
    from robplug.referee.results import Results

    results = Results(run_dir)
    results.export()
    out.print(results.table())
    out.print(f"report: {results.report(path)}", soft_wrap=True, markup=False)


@app.command()
def train(
    plan: Annotated[Path, typer.Argument(help="a training plan in TOML; code that it names is run")],
    tune: Annotated[
        str | None, typer.Option(metavar="NAME.FIELD", help="choose this factor of a defence's penalty first")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="with --tune: how much clean accuracy may fall, as a share; 0.01 without")
    ] = None,
) -> None:
    """Train a model with a stack of defences; the same command again goes on where it stopped, or says "finished".

    --tune fgr.strength looks for the largest strength of the plan's defence flow/fgr that does not hurt, then trains
    with it. Trials of one epoch begin at ln(classes) / R, R the mean penalty; one is too high if cross-entropy reaches
    ln(classes) or if clean accuracy on held-out data falls by more than the tolerance. They are stored in tune.json.
    """
    from robplug.training_plan import run_train_plan

    if tolerance is not None and tune is None:
        raise typer.BadParameter("--tolerance belongs to --tune, which is not given")
    try:
        weights = run_train_plan(plan, tune=tune, tolerance=tolerance)
    except KeyboardInterrupt:
        err.print(f"stopped; what is finished is stored. To go on:\n  {_command()}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    out.print(f"weights: {weights}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def check(
    package: Annotated[str, typer.Argument(help="name of an installed distribution, such as robplug-flow")],
) -> None:
    """Run the conformance kit on an installed plugin; one line for each rule that it breaks."""
    from robplug.testing.run import check_package

    results = check_package(package)
    counts = Counter(result.status for result in results)
    for result in results:
        if result.status == "failed":
            out.print(f"{result.subject}: {result.check}: {result.message}", soft_wrap=True, highlight=False)
    out.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    raise typer.Exit(1 if counts["failed"] else 0)


class _Bar(Progress):
    """The progress bar of a run: samples, rate and time left."""

    def __init__(self) -> None:
        rate, left = TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True)
        what = TextColumn("{task.description}", table_column=Column(max_width=32, no_wrap=True))
        super().__init__(what, BarColumn(14), MofNCompleteColumn(), rate, left, TextColumn("left"), console=err)
        self._worked = 0

    def begin(self, samples: int) -> None:
        """A run begins."""
        self._bar = self.add_task("starting", total=samples, rate="")

    def advance(self, label: str, samples: int = 0, done_before: bool = False) -> None:  # type: ignore[override]
        """A chunk is finished, perhaps by an earlier run; only this run's count for the rate."""
        self._worked += 0 if done_before else samples
        task = self.tasks[self._bar]
        rate = f"{self._worked / task.elapsed:.1f}/s" if task.elapsed and self._worked else ""
        self.update(self._bar, advance=samples, description=label, rate=rate)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def main(*args: Any) -> None:
    """Runs the command line; an error of robplug is one clear line and exit code 2."""
    try:
        app(*args)
    except RobplugError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
