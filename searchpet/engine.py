"""The engine: `search` and `train` as whole jobs with a run folder; evaluate, predict, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from searchpet import once
from searchpet.apply import apply, load
from searchpet.ask import STRATEGY, Ask
from searchpet.bulk import MASK_FILE, read_bits
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.finished import evaluate, predict
from searchpet.inherit import must_learn, take
from searchpet.latency import Table, measure
from searchpet.launch import follow, jointly, opened
from searchpet.merge import merge
from searchpet.multitask import open_session, several
from searchpet.processes import first
from searchpet.pruning import asked as prune_to
from searchpet.recovery import Recovery
from searchpet.run import Listener, RunFolder, silent
from searchpet.session import Session
from searchpet.settings import Settings, asked
from searchpet.spec import Spec
from searchpet.teach import losses, taught

__all__ = ["Result", "apply", "evaluate", "load", "merge", "predict", "search", "train"]

CONTROLS = ("random", "random:unit")


@dataclass(frozen=True)
class Result:
    """A finished run: where it is, the spec (None for references), the content of result.json."""

    path: Path
    spec: Spec | None
    values: dict[str, Any]

    @property
    def score(self) -> float:
        return float(self.values["score"])


@jointly
def search(
    *,
    strategy: str = STRATEGY,
    space: str | None = None,
    set: Mapping[str, Any] | None = None,
    budget: str = "0.01%",
    keep_flops: str | None = None,
    keep_weights: str | None = None,
    keep_latency: str | None = None,
    masks: str | None = None,
    distill: str | None = None,
    recovery: Mapping[str, Any] | None = None,
    inherit: bool = False,
    controls: int = 1,
    full: bool = False,
    test: bool = False,
    count_head: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    listener: Listener = silent,
    **settings: Any,
) -> Result:
    """Find a structure, train it, train the controls, write the run folder.

    settings: fields of `Settings` (model, task, steps, seed, ...).  `set` holds hyperparameters
    of the strategy.  `full` also trains full fine-tuning, for reference.
    keep_flops, keep_weights, keep_latency: share such as `60%` of the blocks' FLOPs, matrix
    elements or time on this device that may stay; the space then also has the masks of `masks`.
    distill: teacher of every training of a structure, controls included: `full` or a run folder.
    recovery: fields of `searchpet.recovery.Recovery`: weights of what those trainings learn from.
    inherit: start the training from what the search has learned; controls have learned nothing.
    Raises InputError for whatever is wrong with the input.
    """
    chosen = Settings(**settings)
    if controls < 0:
        raise InputError(f"--controls must be >= 0, but got {controls}")
    ask = Ask(strategy, space, dict(set or {}), budget, count_head,
              prune_to(keep_flops, keep_weights, keep_latency, masks, strategy))
    terms = losses(distill, recovery)
    if inherit:
        must_learn(strategy)
    values = asked(chosen, command="search", **ask.settings(), distill=distill,
                   recovery=_plain(terms, recovery),
                   inherit=inherit or None,  # runs from before it existed go on
                   controls=controls, full=full, test=test)
    folder = opened(RunFolder(out or default_out(chosen, ask)), values, resume)
    if folder.has("result.json"):
        return Result(folder.path, Spec.load(folder.path), folder.read_json("result.json"))
    session = open_session(chosen, listener)
    check_test(session, test)
    for warning in session.task.warnings:
        folder.log(warning=warning)

    session.table = latencies(session, folder, ask)
    _teach(session, folder, distill, terms)
    main = _find_and_train(session, folder, ask, chosen.seed, test, inherit)
    rows = [control(session, folder, replace(ask, strategy=name, set={}), i, test)
            for i in range(controls) for name in CONTROLS]
    session.job = "full"
    reference = once.train(session, folder.sub("controls/full"), "full", chosen.seed,
                           test=test) if full else {}
    spec = Spec.load(folder.path)
    values = {
        **values_of(session, spec, main, test), "strategy": strategy,
        "space": spec.provenance["space"], "controls": rows,
        "full_finetune": reference.get("score"),
    }
    folder.write_json("result.json", values)
    return Result(folder.path, spec, values)


@jointly
def train(
    spec: Spec | str | Path | None = None,
    *,
    reference: str | None = None,
    sweep: bool = False,
    distill: str | None = None,
    recovery: Mapping[str, Any] | None = None,
    test: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    listener: Listener = silent,
    **settings: Any,
) -> Result:
    """Train a spec, or a reference: `full` fine-tuning or the `head` alone.

    sweep: choose tau among four by successive halving, by validation (`searchpet.halving`).
    distill, recovery: teacher of a spec's training, and what it learns from; as in `search`.
    Raises InputError for whatever is wrong with the input.
    """
    chosen = Settings(**settings)
    if (spec is None) == (reference is None):
        raise InputError("train takes a spec, --full or --head-only: exactly one of them")
    if spec is None and (distill or recovery):
        raise InputError("--distill and --recovery must train a spec, but a reference is asked "
                         "for; drop them")
    terms = losses(distill, recovery)
    found = spec if isinstance(spec, Spec) or spec is None else Spec.load(spec)
    label = found.hash[:8] if found else str(reference)
    folder = RunFolder(out or f"runs/{_short(chosen.task)}-{_short(chosen.model)}-train-{label}"
                              f"-s{chosen.seed}")
    folder = opened(folder, asked(
        chosen, command="train", spec=found.hash if found else None, reference=reference,
        sweep=sweep, distill=distill, recovery=_plain(terms, recovery), test=test), resume)
    if folder.has("result.json"):
        return Result(folder.path, found, folder.read_json("result.json"))
    session = open_session(chosen, listener)
    check_test(session, test)
    if found:
        _teach(session, folder, distill, terms)
        check_backbone(session, found)
        if bits := read_bits(found):
            folder.write_tensors(MASK_FILE, bits)
        folder.write_text("spec.json", found.text())
    row = once.train(session, folder, found or str(reference), chosen.seed, sweep=sweep, test=test)
    values = {
        **values_of(session, found, row, test),
        "strategy": found.provenance.get("strategy", "spec") if found else reference,
        "controls": [], "full_finetune": row["score"] if reference == "full" else None,
    }
    folder.write_json("result.json", values)
    return Result(folder.path, found, values)


def latencies(session: Session, folder: RunFolder, ask: Ask) -> Table | None:
    """The table that all structures of a run are priced by: measured once."""
    if ask.prune is None or ask.prune.measure != "latency":
        return None
    if not folder.has("latency.json") and first():
        with session.fresh(session.settings.seed) as model:
            table = measure(model, discover(model))
        folder.write_json("latency.json", table.model_dump())
    follow(folder, "latency.json")
    return Table.model_validate(folder.read_json("latency.json"))


def _teach(session: Session, folder: RunFolder, teacher: str | None,
           terms: Recovery | None) -> None:
    """Let the session's structures learn from what is asked for, if that is not the task alone."""
    if terms is not None:
        if several(session.settings):
            raise InputError("distillation and contrastive losses take one task, but --task is "
                             f"{session.task.name}; drop --distill and --recovery")
        session.teaching = taught(session, folder, teacher, terms)


def _plain(terms: Recovery | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The losses for settings.json; None where the default was left alone."""
    return asdict(terms) if terms and given else None


def check_backbone(session: Session, spec: Spec) -> None:
    """Raise InputError unless the session's backbone is the one that the spec names."""
    if session.identity.config_hash != spec.backbone.config_hash:
        raise InputError(f"a spec must be trained on the architecture it was made for, "
                         f"{spec.backbone.name}, but --model is {session.identity.name}, another "
                         "architecture; search on that model instead, or carry the spec over: "
                         "searchpet transfer SPEC --model OTHER")


def control(session: Session, folder: RunFolder, ask: Ask, number: int, test: bool,
             ) -> dict[str, Any]:
    """A random structure of the same budgets, trained with the same seed as the one found."""
    sub = folder.sub(f"controls/{ask.strategy.replace(':', '-')}-{number}")
    row = _find_and_train(session, sub, ask, session.settings.seed + number, test)
    return {"name": ask.strategy, "score": row["score"], "trainable": row["trainable"]}


def _find_and_train(session: Session, folder: RunFolder, ask: Ask, seed: int, test: bool,
                    inherit: bool = False) -> dict[str, Any]:
    """Spec and training of one strategy in its folder."""
    session.job = ask.strategy
    spec, seconds = once.find(session, folder, ask, seed)
    start = take(folder) if inherit else None
    row = once.train(session, folder, spec, session.settings.seed, test=test, start=start)
    return {**row, "search_seconds": seconds}


def values_of(session: Session, spec: Spec | None, row: Mapping[str, Any], test: bool,
            ) -> dict[str, Any]:
    """The part of result.json that every run has."""
    backbone = session.identity.parameters
    return {
        "task": session.task.name, "metric": session.task.metrics[0],
        "split": "test" if test else "validation", "score": row["score"],
        "metrics": row["metrics"], "validation_score": row["validation_score"],
        "budget_limit": spec.budget.limit if spec else None, "trainable": row["trainable"],
        "head": row["head"], "backbone": backbone, "fraction": row["trainable"] / backbone,
        "seed": session.settings.seed, "tau": row["tau"],
        "spec_hash": spec.hash if spec else None,
        "keep": spec.keep.model_dump() if spec and spec.keep else None,
        "removed": row["removed"], "tensors": row.get("tensors"), "sweep": row.get("sweep"),
        "seconds": {"search": row.get("search_seconds", 0.0), "train": row["train_seconds"]},
        "warnings": [*session.task.warnings, *_in_vain(spec, row)],
    }


def _in_vain(spec: Spec | None, row: Mapping[str, Any]) -> list[str]:
    """A warning where training made a structure worse than it began."""
    start, score = row.get("start_score"), row["validation_score"]
    if spec is None or start is None or score >= start:
        return []
    advice = ("with, whichever tau was tried; try a much smaller --tau, or more --steps"
              if row.get("sweep") else
              "with; try a smaller --tau, or `searchpet train SPEC --sweep`")
    return [f"training ended at {score:.4f} on validation, below the {start:.4f} that it began "
            f"{advice}"]


def check_test(session: Session, test: bool) -> None:
    """Say so before hours of work when --test cannot be answered."""
    if (test and (s := session.splits.get("test")) is None) or (test and s and s.labels is None):
        raise InputError(f"--test needs a labelled test split, but task {session.task.name} has "
                         "none; drop --test")


def default_out(settings: Settings, ask: Ask) -> str:
    """`runs/<task>-<model>-<budget>[-keep-<share>]-<strategy>-s<seed>`."""
    kept = [f"keep-{ask.prune.measure}-{ask.prune.text}"] if ask.prune else []
    parts = (_short(settings.task), _short(settings.model), ask.budget.replace("/", "_"), *kept,
             ask.strategy.replace(":", "_"), f"s{settings.seed}")
    return "runs/" + "-".join(parts)


def _short(name: str) -> str:
    """The last part of a name or path."""
    return Path(name.rstrip("/")).name.replace(" ", "_") or "root"
