"""The outer loop: `tune`, and `trials` to look at one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer, finish, reporter
from searchpet.errors import InputError

STUDY = "Study"


_option = partial(typer.Option, rich_help_panel=STUDY)

Study = Annotated[str | None, _option(
    "--study", help="Name of the study; by default that of the folder of the run.")]
Storage = Annotated[str | None, typer.Option(
    "--storage", envvar="SEARCHPET_STORAGE", rich_help_panel=STUDY,
    help="sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE, journal:FILE or "
    "grpc://HOST:PORT; by default a file in the run's folder.")]


def tune(
    ctx: typer.Context,
    trials: Annotated[int, _option("--trials", help="How many trials, in all.")] = 50,
    timeout: Annotated[str | None, _option(
        "--timeout", metavar="TIME", help="Begin no trial after so long: 90s, 30m, 2h.")] = None,
    metric: Annotated[str, _option(
        "--metric", help="What trials are judged by: score, or several of score,trainable,flops,"
        "latency for a Pareto front.")] = "score",
    limit: Annotated[list[str], _option(
        "--limit", metavar="METRIC=MOST", help="What the best may have at most of trainable "
        "(parameters), flops or latency (milliseconds). Repeatable.")] = [],  # noqa: B006
    knobs: Annotated[str | None, _option(
        "--knobs", help="What to turn: a tuning space (`searchpet list knobs`) or a TOML file; by "
        "default one that suits the rest.")] = None,
    sampler: Annotated[str, _option("--sampler", help="tpe, nsga2, gp or random.")] = "tpe",
    pruner: Annotated[str, _option(
        "--pruner", help="halving, hyperband or none.")] = "halving",
    study: Study = None, storage: Storage = None,
    jobs: Annotated[int, _option("--jobs", "-j", help="Processes on this machine.")] = 1,
    artifacts: Annotated[str | None, _option(
        "--artifacts", help="Folder or s3://BUCKET for the files of finished trials; by default "
        "in the run's folder.")] = None,
    worker: Annotated[bool, _option(
        "--worker", help="Join the study in --storage, made elsewhere, and help.")] = False,
    collect: Annotated[bool, _option(
        "--collect", help="Only write the study's best trial to --out.")] = False,
    serve: Annotated[str | None, _option(
        "--serve", metavar="HOST:PORT", help="Only stand before --storage as a proxy, for "
        "workers that connect to grpc://HOST:PORT.")] = None,
    model: o.Model = "sentence-transformers/all-MiniLM-L6-v2",
    task: o.TaskName = "agreement", task_weights: o.TaskWeights = None, data: o.Data = None,
    strategy: Annotated[str, typer.Option(
        "--strategy", rich_help_panel=o.SEARCH, help="How trials search where no knob chooses; "
        "tpe: they do not, the knobs are the structure.")] = "bilevel",
    budget: o.Budget = "0.01%", keep_flops: o.KeepFlops = None,
    keep_weights: o.KeepWeights = None, keep_latency: o.KeepLatency = None,
    masks: o.Masks = None, count_head: o.CountHead = False, seed: o.Seed = 0,
    steps: o.Steps = 300, batch_size: o.BatchSize = 32, accumulate: o.Accumulate = 1,
    max_length: o.MaxLength = 64, tau: o.Tau = 0.05, lr: o.Lr = None,
    precision: o.Precision = "fp32", device: o.Device = "auto", test: o.Test = False,
    out: o.Out = None, resume: o.Resume = False, json_: o.Json = False,
    quiet: o.Quiet = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Turn the knobs of the search for many trials, keep the best."""
    from searchpet import jobs as run
    from searchpet.tune import serve as proxy
    from searchpet.tune import work

    if worker + collect + bool(serve) > 1:
        raise InputError("--worker, --collect and --serve are three things: give one of them")
    if (worker or collect or serve) and not storage:
        raise InputError("--storage must say where the study is; the command that made it says so")
    if serve and storage:
        proxy(storage, serve, lambda line: typer.echo(line, err=True))
        return
    with reporter(quiet, log=False) as teller:
        if worker and storage:
            work(storage, study, out=out, data=data, device=device, say=teller.say,
                 listener=teller)
            return
        if collect and storage:
            result = run.collect(storage, study, out=out, data=data, device=device,
                                 artifacts=artifacts, test=test, listener=teller)
        else:
            result = run.tune(
                trials=trials, timeout=timeout, study=study, storage=storage, jobs=jobs,
                metric=metric, knobs=knobs,
                limit=o.values(limit, "--limit", "METRIC=MOST", "flops=1e9"),
                sampler=sampler, pruner=pruner, artifacts=artifacts, strategy=strategy,
                budget=budget, keep_flops=keep_flops, keep_weights=keep_weights,
                keep_latency=keep_latency, masks=masks, count_head=count_head, test=test, out=out,
                resume=resume, plugins=plugin, say=teller.say, listener=teller, **o.settings(ctx))
    finish(result, json_)


def trials(
    study: Annotated[str, typer.Argument(
        help="Folder of a tune's run, or the name of a study in --storage.")],
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Folder for the figures and study.html; by default none.")] = None,
    json_: o.Json = False, debug: o.Debug = False,
) -> None:
    """Show a study's trials and which knobs matter; draw it."""
    from searchpet.trials import look, summary, write

    made, question = look(study, storage)
    found = summary(made, question)
    answer(found, json_, lambda views: views.study(found))
    for path in write(made, question, out) if out else ():
        typer.echo(f"wrote {path}", err=True)
