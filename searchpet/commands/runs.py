"""What is there already: `evaluate`, `predict`, `show`, `verify`, `compare`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer
from searchpet.errors import InputError, unknown


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
    answer(found, json_, lambda v: [v.table("metric", split, rows=found.items())])


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
        _save(text, out)


def show(
    spec: Annotated[Path, typer.Argument(
        help="A spec, searchpet:NAME, or the folder of a run.")],
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Show a structure: a table, and a picture of layers and roles."""
    from searchpet.spec import Spec

    found = Spec.load(o.at(spec))
    answer(json.loads(found.text()), json_, lambda views: views.structure(found))


def verify(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")], model: o.AnyModel = None,
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Count again what a run claims: parameters, what pruning left, outputs."""
    from searchpet.verify import verify as count

    found = count(run, model)
    answer([dataclasses.asdict(check) for check in found], json_,
            lambda views: [views.checks(found)])
    wrong = [check.what for check in found if not check.holds]
    if wrong:
        raise InputError(f"a run must be what it says, but {run} is not: {', '.join(wrong)}")


def compare(
    runs: Annotated[list[Path], typer.Argument(
        help="Folders of runs; with --against, of grids.")],
    against: Annotated[str | None, typer.Option(
        "--against", metavar="METHOD", help="Compare a grid's methods with this one, over all "
        "tasks: means, differences and their intervals.")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="With --against: a file for the table (.md) or a figure of it "
        "(.svg, .pdf, .png).")] = None,
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Compare the results of several runs, or the methods of grids."""
    from searchpet.run import RunFolder

    if against is not None:
        _methods(runs, against, out, json_)
        return
    if out is not None:
        raise InputError("--out takes the table of --against METHOD, which is not given; give "
                         "both, or take --json")
    if tables := [str(run) for run in runs if run.suffix == ".jsonl"]:
        raise InputError(f"a grid's methods are compared with one of them, but {tables[0]} came "
                         "without --against METHOD; name it")
    found = [(str(run), RunFolder(run).result()) for run in runs]
    answer([{"run": name, **values} for name, values in found], json_,
            lambda views: [views.comparison(found)])


def _methods(tables: list[Path], reference: str, out: Path | None, json_: bool) -> None:
    """The methods of grids beside one of them."""
    from searchpet import versus

    found = versus.against(tables, reference)
    if out is not None and out.suffix == ".md":
        _save(versus.markdown(found), out)
    elif out is not None:
        from searchpet.charts import methods
        from searchpet.plot import save

        save(methods([dataclasses.asdict(line) for line in found], reference), out)
    columns, rows = versus.cells(found)
    answer([dataclasses.asdict(line) for line in found], json_, lambda views: [
        views.table(*columns, rows=rows, left=columns.index("method") + 1)])


def _save(text: str, file: Path) -> None:
    """Write a file of the user's choice, with the folders that lead there."""
    from searchpet.run import RunFolder

    file.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(file.parent).write_text(file.name, text)
