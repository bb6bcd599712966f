"""What is found is used elsewhere: `transfer`, `vote`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer, finish, reporter
from searchpet.errors import InputError


def transfer(
    ctx: typer.Context,
    spec: Annotated[Path, typer.Argument(help="A spec, searchpet:NAME, or the folder of a run.")],
    model: Annotated[str, typer.Option(
        "--model", "-m", help="The backbone to carry it to.", rich_help_panel=o.WHAT)],
    task: o.AnyTask = None, data: o.Data = None,
    budget: Annotated[str | None, typer.Option(
        "--budget", "-b", help="There: a share (0.01%), a count or bytes; by default the share of "
        "its own backbone.", rich_help_panel=o.SEARCH)] = None,
    no_train: Annotated[bool, typer.Option(
        "--no-train", help="Only write spec.json and the report; without --task, magnitude "
        "instead of gradients chooses channels.")] = False,
    sweep: Annotated[bool, typer.Option(
        "--sweep", help="Choose tau by halving: 1/3, 1, 3 and 9 times --tau start, validation "
        "chooses; at most two trainings in all.")] = False,
    controls: o.Controls = 0, seed: o.Seed = 0, steps: o.Steps = 300,
    batch_size: o.BatchSize = 32, accumulate: o.Accumulate = 1, max_length: o.MaxLength = 64,
    tau: o.Tau = 0.05, lr: o.Lr = None, precision: o.Precision = "fp32",
    device: o.Device = "auto", test: o.Test = False, out: o.Out = None,
    resume: o.Resume = False, json_: o.Json = False, quiet: o.Quiet = False,
    plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Carry a structure over to another backbone, and train it there."""
    from searchpet import carriedviews
    from searchpet.jobs import transfer as run
    from searchpet.transfer import REPORT

    spec = o.at(spec)
    settings: dict[str, Any] = {**o.origin(spec), **o.settings(ctx)}
    if no_train and task is None:
        settings.pop("task", None)
    with reporter(quiet) as teller:
        result = run(spec, budget=budget, train=not no_train, sweep=sweep, controls=controls,
                     test=test, out=out, resume=resume, listener=teller, **settings)
    report = json.loads((result.path / REPORT).read_text(encoding="utf-8"))
    if no_train:
        answer(report, json_, lambda _: carriedviews.carried(report, result.path))
        return
    if not json_:  # then the result alone is printed
        answer(report, False, lambda _: [*carriedviews.account(report), ""])
    finish(result, json_)


def vote(
    specs: Annotated[list[Path], typer.Argument(help="Specs, or folders of runs.")],
    budget: Annotated[str | None, typer.Option(
        "--budget", "-b", help="A share, a count or bytes; by default that of the specs.")] = None,
    model: o.AnyModel = None, out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="File of the spec. [default: vote-HASH.json]")] = None,
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Vote specs of several tasks on one backbone into one for all of them."""
    from searchpet import carriedviews
    from searchpet.vote import vote as run

    if out is not None and out.exists():
        raise InputError(f"--out must be a new file, but {out} is there; name another")
    found = run([o.at(spec) for spec in specs], budget=budget, model=model)
    target = out or Path(f"vote-{found.hash[:8]}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    found.save(target)
    answer(json.loads(found.text()), json_, lambda _: carriedviews.voted(found, target))
