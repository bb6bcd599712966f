"""The command line.  Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from searchpet import options as o
from searchpet.errors import InputError, unknown
from searchpet.failures import continuation, explain

if TYPE_CHECKING:
    from searchpet.engine import Result
    from searchpet.progress import Reporter

WRONG = 2  # exit code of wrong input
INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
WIDE = 160  # columns of a table that goes into a file
QUIET = {  # what other libraries would print beside our own lines
    **dict.fromkeys(["TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"], "error"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
LISTS = ("kinds", "grains", "strategies", "spaces", "tasks")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Architecture search for parameter-efficient tuning: find where small tuning modules "
    "belong in a frozen transformer, under a hard parameter budget.")


def plug_in(modules: list[str]) -> list[str]:
    """Import the user's modules.  Raises InputError for one that is not there or fails."""
    for module in modules or ():
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module)
        except InputError:
            raise
        except Exception as error:  # a user's module can fail in any way
            raise InputError(f"--plugin must name a module that can be imported, but {module}: "
                             f"{type(error).__name__}: {error}; --debug shows where") from error
    return modules


Plugin = Annotated[list[str], typer.Option(
    "--plugin", metavar="MODULE", help="Python module to import first; it may register kinds, "
    "grains, strategies, tasks.", rich_help_panel=o.RUN, callback=plug_in, is_eager=True)]


@app.command()
def search(
    ctx: typer.Context, model: o.Model = "sentence-transformers/all-MiniLM-L6-v2",
    task: o.TaskName = "agreement", task_weights: o.TaskWeights = None, data: o.Data = None,
    strategy: o.Strategy = "bilevel",
    space: o.SpaceName = None, set_: o.Set = [],  # noqa: B006  typer copies it
    budget: o.Budget = "0.01%", keep_flops: o.KeepFlops = None,
    keep_weights: o.KeepWeights = None, keep_latency: o.KeepLatency = None,
    masks: o.Masks = None, distill: o.Distill = None, recovery: o.Recovery = [],  # noqa: B006
    inherit: o.Inherit = False, controls: o.Controls = 1,
    full: o.AlsoFull = False, count_head: o.CountHead = False, seed: o.Seed = 0,
    steps: o.Steps = 300, batch_size: o.BatchSize = 32, accumulate: o.Accumulate = 1,
    max_length: o.MaxLength = 64, tau: o.Tau = 0.1, lr: o.Lr = None,
    precision: o.Precision = "fp32", device: o.Device = "auto", test: o.Test = False,
    out: o.Out = None, resume: o.Resume = False, dry_run: o.DryRun = False, json_: o.Json = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Find a structure within a budget, train it, compare it, save it."""
    given: dict[str, Any] = {
        "strategy": strategy, "space": space, "set": o.assignments(set_, strategy),
        "budget": budget, "keep_flops": keep_flops, "keep_weights": keep_weights,
        "keep_latency": keep_latency, "masks": masks, "controls": controls, "full": full,
        "count_head": count_head, **o.settings(ctx)}
    if dry_run:
        from searchpet.plan import plan

        found = dataclasses.asdict(plan(**given))
        _answer(found, json_, lambda views: [views.ahead(found)], found["warnings"])
        return
    from searchpet.engine import search as run

    with _reporter(quiet) as reporter:
        result = run(**given, distill=distill, recovery=o.values(recovery), inherit=inherit,
                     test=test, out=out, resume=resume, listener=reporter)
    _finish(result, json_)


@app.command()
def train(
    ctx: typer.Context,
    spec: Annotated[Path | None, typer.Argument(help="A spec, or the folder of a run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning, no spec.")] = False,
    head_only: Annotated[bool, typer.Option("--head-only", help="The head, no spec.")] = False,
    sweep: Annotated[bool, typer.Option(
        "--sweep", help="Try a third and three times --tau too; validation chooses.")] = False,
    distill: o.Distill = None, recovery: o.Recovery = [],  # noqa: B006
    model: o.AnyModel = None, task: o.AnyTask = None, task_weights: o.TaskWeights = None,
    data: o.Data = None, seed: o.Seed = 0, steps: o.Steps = 300, batch_size: o.BatchSize = 32,
    accumulate: o.Accumulate = 1, max_length: o.MaxLength = 64, tau: o.Tau = 0.1, lr: o.Lr = None,
    precision: o.Precision = "fp32", device: o.Device = "auto", test: o.Test = False,
    out: o.Out = None, resume: o.Resume = False, json_: o.Json = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Train a spec, or a reference, on a task."""
    from searchpet.engine import train as run

    if full and head_only:
        raise InputError("train takes a spec, --full or --head-only: exactly one of them")
    reference = "full" if full else "head" if head_only else None
    settings = {**o.origin(spec), **o.settings(ctx)} if spec else o.settings(ctx)
    with _reporter(quiet) as reporter:
        result = run(spec, reference=reference, sweep=sweep, distill=distill,
                     recovery=o.values(recovery), test=test, out=out, resume=resume,
                     listener=reporter, **settings)
    _finish(result, json_)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")], task: o.AnyTask = None,
    data: o.Data = None, split: Annotated[str, typer.Option(
        "--split", help="train, validation or test.")] = "validation",
    model: o.AnyModel = None, batch_size: o.BatchSize = 128, json_: o.Json = False,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Measure a trained run on a split of its task, or of another with the same labels."""
    from searchpet.engine import evaluate as measure

    found = measure(run, task=task, data=data, split=split, model=model, batch_size=batch_size)
    _answer(found, json_, lambda v: [v.table("metric", split, rows=found.items())])


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    file: Annotated[Path, typer.Argument(help="CSV, JSON Lines or parquet with the texts.")],
    form: Annotated[str, typer.Option("--format", help="jsonl or csv.")] = "jsonl",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; else stdout.")] = None,
    task: o.OneTask = None, model: o.AnyModel = None, batch_size: o.BatchSize = 128,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Label new texts with a trained run."""
    from searchpet.engine import predict as label
    from searchpet.views import lines

    if form not in ("jsonl", "csv"):
        raise unknown("--format", form, ("jsonl", "csv"))
    text = lines(label(run, file, task=task, model=model, batch_size=batch_size), form)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


@app.command()
def show(
    spec: Annotated[Path, typer.Argument(help="A spec, or the folder of a run.")],
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Show a structure: a table, and a picture of layers and roles."""
    from searchpet.spec import Spec

    found = Spec.load(spec)
    _answer(json.loads(found.text()), json_, lambda views: views.structure(found))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")], model: o.AnyModel = None,
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Count again what a run claims: parameters, what pruning left, outputs."""
    from searchpet.verify import verify as count

    found = count(run, model)
    _answer([dataclasses.asdict(check) for check in found], json_,
            lambda views: [views.checks(found)])
    wrong = [check.what for check in found if not check.holds]
    if wrong:
        raise InputError(f"a run must be what it says, but {run} is not: {', '.join(wrong)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Compare the results of several runs."""
    from searchpet.run import RunFolder

    found = [(str(run), RunFolder(run).read_json("result.json")) for run in runs]
    _answer([{"run": name, **values} for name, values in found], json_,
            lambda views: [views.comparison(found)])


@app.command()
def sites(
    model: o.Model = "sentence-transformers/all-MiniLM-L6-v2", json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List a model's sites: where something can be put."""
    from searchpet.survey import sites_of

    found = sites_of(model)
    _answer([dataclasses.asdict(site) for site in found], json_,
            lambda views: [views.sites(found)])


@app.command()
def space(
    name: Annotated[str, typer.Argument(help="A space's name, or a TOML file.")] = "nano",
    model: o.Model = "sentence-transformers/all-MiniLM-L6-v2", budget: o.Budget = "0.01%",
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Show what a space holds on a model, and what a budget buys of it."""
    from searchpet.survey import survey

    found = survey(name, model, budget)
    _answer(found, json_, lambda views: views.survey(found))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="kinds, grains, strategies, spaces or tasks.")],
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """List what there is, with a line on each."""
    from searchpet.survey import described

    if what not in LISTS:
        raise unknown("list", what, LISTS)
    found = described("deltas" if what == "kinds" else what)
    _answer(found, json_, lambda v: [v.table(what, "", rows=found.items(), left=2)])


@app.command()
def grid(
    file: Annotated[Path, typer.Argument(help="TOML: methods, tasks, budgets, seeds, taus.")],
    data: o.Data = None, out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Folder for the results; by default that of the TOML.")] = None,
    table: Annotated[bool, typer.Option(
        "--table", help="Only write and print the table of what is there.")] = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Train methods x tasks x budgets x seeds; again to continue, several at once to share."""
    from searchpet.ledger import write_table

    if table:
        typer.echo(write_table(out or file.resolve().parent), nl=False)
        return
    from searchpet.grid import run_grid

    with _reporter(quiet, log=False) as reporter:
        text = run_grid(file, data=data, out=out, say=reporter.say, listener=reporter)
    typer.echo(text, nl=False)


def _reporter(quiet: bool, log: bool = True) -> Reporter:
    from searchpet.progress import Reporter

    return Reporter(quiet, log)


def _answer(value: Any, as_json: bool, render: Callable[[Any], Iterable[Any]],
            notes: Iterable[str] = ()) -> None:
    """Print a command's result: on stdout as JSON or as `render` shows it, notes on stderr."""
    for note in notes:
        typer.echo(f"warning: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(value, indent=1))
        return
    from rich.console import Console

    from searchpet import views

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    for part in render(views):
        console.print(part, markup=False)


def _finish(result: Result, as_json: bool) -> None:
    """The end of `search` and `train`: the comparison, what was saved where, what to do next."""
    _answer(result.values, as_json, lambda views: views.finished(result.values, result.path),
            result.values["warnings"])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.  Wrong input: one line on stderr and exit code 2; a bug: a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in words
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        try:
            code = typer.main.get_command(app).main(
                args=words, prog_name="searchpet", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            line = explain(error, words)
            if line is None:
                raise
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {line}", err=True)
            return WRONG
    if code == INTERRUPTED:
        typer.echo(f"interrupted{continuation(words)}", err=True)
    return int(code or 0)
