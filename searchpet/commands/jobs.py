"""Long work: `search`, `train`, `grid`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer, finish, reporter
from searchpet.errors import InputError


def search(
    ctx: typer.Context, model: o.Model = "sentence-transformers/all-MiniLM-L6-v2",
    task: o.TaskName = "agreement", task_weights: o.TaskWeights = None, data: o.Data = None,
    strategy: o.Strategy = "bilevel",
    space: o.SpaceName = None, set_: o.Set = [],  # noqa: B006  typer copies it
    budget: o.Budgets = "0.01%", keep_flops: o.KeepFlops = None,
    keep_weights: o.KeepWeights = None, keep_latency: o.KeepLatency = None,
    masks: o.Masks = None, must: o.Must = [], forbid: o.Forbid = [],  # noqa: B006
    distill: o.Distill = None, recovery: o.Recovery = [],  # noqa: B006
    inherit: o.Inherit = None, no_train: Annotated[bool, typer.Option(
        "--no-train", help="Only find the structures.", rich_help_panel=o.TRAIN)] = False,
    controls: o.Controls = 1, full: o.AlsoFull = False, count_head: o.CountHead = False,
    seed: o.Seed = 0, steps: o.Steps = 300, batch_size: o.BatchSize = 32,
    accumulate: o.Accumulate = 1, max_length: o.MaxLength = 64, tau: o.Tau = 0.05, lr: o.Lr = None,
    precision: o.Precision = "fp32", device: o.Device = "auto", test: o.Test = False,
    out: o.Out = None, resume: o.Resume = False, dry_run: o.DryRun = False, json_: o.Json = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Find a structure within a budget, train it, compare it, save it."""
    given: dict[str, Any] = {
        "strategy": strategy, "space": space, "set": o.assignments(set_, strategy),
        "budget": budget, "keep_flops": keep_flops, "keep_weights": keep_weights,
        "keep_latency": keep_latency, "masks": masks, "must": must or None,
        "forbid": forbid or None, "train": not no_train, "controls": controls, "full": full,
        "count_head": count_head, **o.settings(ctx)}
    if dry_run:
        from searchpet.plan import plan

        found = dataclasses.asdict(plan(**given))
        answer(found, json_, lambda views: [views.ahead(found)], found["warnings"])
        return
    from searchpet.engine import search as run
    from searchpet.report import reported

    with reporter(quiet) as teller:
        result = reported(run)(**given, distill=distill, recovery=o.values(recovery),
                               inherit=inherit, test=test, out=out, resume=resume,
                               listener=teller)
    if no_train:
        from searchpet import insightviews

        answer(result.values, json_, lambda _: insightviews.untrained(result.values, result.path),
               result.values["warnings"])
        return
    finish(result, json_)


def train(
    ctx: typer.Context,
    spec: Annotated[Path | None, typer.Argument(
        help="A spec, searchpet:NAME, or the folder of a run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning, no spec.")] = False,
    head_only: Annotated[bool, typer.Option("--head-only", help="The head, no spec.")] = False,
    sweep: Annotated[bool, typer.Option(
        "--sweep", help="Choose tau by halving: 1/3, 1, 3 and 9 times --tau start, validation "
        "chooses; at most two trainings in all.")] = False,
    distill: o.Distill = None, recovery: o.Recovery = [],  # noqa: B006
    model: o.AnyModel = None, task: o.AnyTask = None, task_weights: o.TaskWeights = None,
    data: o.Data = None, seed: o.Seed = 0, steps: o.Steps = 300, batch_size: o.BatchSize = 32,
    accumulate: o.Accumulate = 1, max_length: o.MaxLength = 64, tau: o.Tau = 0.05, lr: o.Lr = None,
    precision: o.Precision = "fp32", device: o.Device = "auto", test: o.Test = False,
    out: o.Out = None, resume: o.Resume = False, json_: o.Json = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Train a spec, or a reference, on a task."""
    from searchpet.engine import train as run
    from searchpet.report import reported

    if full and head_only:
        raise InputError("train takes a spec, --full or --head-only: exactly one of them")
    spec = o.at(spec) if spec else None
    reference = "full" if full else "head" if head_only else None
    settings = {**o.origin(spec), **o.settings(ctx)} if spec else o.settings(ctx)
    with reporter(quiet) as teller:
        result = reported(run)(spec, reference=reference, sweep=sweep, distill=distill,
                               recovery=o.values(recovery), test=test, out=out, resume=resume,
                               listener=teller, **settings)
    finish(result, json_)


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

    with reporter(quiet, log=False) as teller:
        text = run_grid(file, data=data, out=out, say=teller.say, listener=teller)
    typer.echo(text, nl=False)
