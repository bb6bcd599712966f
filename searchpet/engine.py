"""The engine: `search` and `train` as whole jobs with a run folder; evaluate, predict, plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from searchpet import curve, once
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
from searchpet.once import values_of
from searchpet.processes import first
from searchpet.pruning import asked as prune_to
from searchpet.realise import pet_grafts, structure
from searchpet.recovery import Recovery
from searchpet.run import Listener, RunFolder, silent
from searchpet.session import Session
from searchpet.settings import Settings, asked
from searchpet.spec import BackboneId, Spec
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
    must: Sequence[str] | None = None,
    forbid: Sequence[str] | None = None,
    distill: str | None = None,
    recovery: Mapping[str, Any] | None = None,
    inherit: bool | None = None,
    train: bool = True,
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

    budget: one, or several with commas between: one search, at their geometric middle, finds a
    structure for each, a smaller one part of every larger one.  The run is that of the largest;
    the smaller ones lie in its folder `budgets`.
    train: else nothing is trained but the search's own deltas.
    settings: fields of `Settings` (model, task, steps, seed, ...).  `set` holds hyperparameters
    of the strategy.  `full` also trains full fine-tuning, for reference.
    keep_flops, keep_weights, keep_latency: share such as `60%` of the blocks' FLOPs, matrix
    elements or time on this device that may stay; the space then also has the masks of `masks`.
    must, forbid: patterns such as `kind=bias,role=ffn.*,layers=last 2`, of PET that is kept in
    any case or has no place in the space; controls too.
    distill: teacher of every training of a structure, controls included: `full` or a run folder.
    recovery: fields of `searchpet.recovery.Recovery`: weights of what those trainings learn from.
    inherit: start the training, not those of controls, from what the search has learned; None: as
    `Ask.inherits` says.
    Raises InputError for whatever is wrong with the input.
    """
    chosen = Settings(**settings)
    if controls < 0:
        raise InputError(f"--controls must be >= 0, but got {controls}")
    ask = Ask(strategy, space, dict(set or {}), budget, count_head,
              prune_to(keep_flops, keep_weights, keep_latency, masks, strategy), must, forbid)
    terms = losses(distill, recovery)
    inherit = train and ask.inherits if inherit is None else inherit
    if inherit:
        must_learn(strategy)
    _check_training(ask, train, inherit=inherit, full=full, distill=distill, recovery=recovery,
                    test=test)
    values = asked(chosen, command="search", **ask.settings(), distill=distill,
                   recovery=_plain(terms, recovery),
                   inherit=inherit or None,  # runs from before it existed go on
                   no_train=not train or None,
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
    session.job = ask.strategy
    spec, spent = once.find(session, folder, ask, chosen.seed, scores=True)
    curve.begin(session, folder, spec, test=test, distill=distill, recovery=values["recovery"])
    if not train:
        return Result(folder.path, spec, {
            "strategy": strategy, "space": spec.provenance["space"], "spec_hash": spec.hash,
            "budget_limit": spec.budget.limit, "used": spec.budget.used,
            "seconds": {"search": spent}, "warnings": list(session.task.warnings),
            **curve.summary(folder, spec)})
    start = take(folder) if inherit else None
    main = {**once.train(session, folder, spec, chosen.seed, test=test, start=start),
            "search_seconds": spent}
    smaller = curve.train(session, folder, spec, test)
    like = replace(ask, set={}, budget=spec.budget.text)
    rows = [control(session, folder, replace(like, strategy=name), i, test)
            for i in range(controls) for name in CONTROLS]
    session.job = "full"
    reference = once.train(session, folder.sub("controls/full"), "full", chosen.seed,
                           test=test) if full else {}
    own = values_of(session, spec, main, test)
    values = {
        **own, "strategy": strategy, "inherited": inherit, "space": spec.provenance["space"],
        "controls": rows, "full_finetune": reference.get("score"),
        **curve.summary(folder, spec, [*smaller, own]),
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
        there = Spec.load(folder.path) if found else None
        return Result(folder.path, there, folder.read_json("result.json"))
    session = open_session(chosen, listener)
    check_test(session, test)
    if found:
        _teach(session, folder, distill, terms)
        check_backbone(session, found)
        _check_head(session, found)
        found = _at_home(session, found)
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


def _check_training(ask: Ask, train: bool, **given: Any) -> None:
    """Raise InputError for what needs a training, or one budget, and has not."""
    words = [f"--{name}" for name, value in given.items() if value]
    if not train and words:
        raise InputError(f"--no-train leaves nothing to {words[0]}; drop either")
    if len(ask.budgets) > 1 and given["inherit"]:
        raise InputError("--inherit must have one budget, whose deltas the search has learned, "
                         f"but got {ask.budget}; drop it, or search for one")


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


def _check_head(session: Session, spec: Spec) -> None:
    """Raise InputError where a budget counts a head of another size than the session's."""
    if spec.budget.counts != "deltas and head":
        return
    with session.fresh(session.settings.seed) as model:
        deltas = pet_grafts(structure(spec, discover(model)), 0)
    own = spec.budget.used - sum(graft.parameters for graft in deltas)
    if own != session.head_size:
        raise InputError(
            f"a budget that counts the head must be made for the task's own, but this one is for "
            f"{own:,} parameters and the head has {session.head_size:,}; carry it over: searchpet "
            "transfer SPEC --task NEW")


def _at_home(session: Session, spec: Spec) -> Spec:
    """The spec, of the weights that it is trained on: they may be others of its architecture."""
    if session.identity.revision == spec.backbone.revision:
        return spec
    mine = BackboneId(**asdict(session.identity))
    return spec.model_copy(update={"backbone": mine})


def control(session: Session, folder: RunFolder, ask: Ask, number: int, test: bool,
             ) -> dict[str, Any]:
    """A random structure of the same budgets, trained with the same seed as the one found."""
    sub = folder.sub(f"controls/{ask.strategy.replace(':', '-')}-{number}")
    session.job = ask.strategy
    spec, _ = once.find(session, sub, ask, session.settings.seed + number)
    row = once.train(session, sub, spec, session.settings.seed, test=test)
    return {"name": ask.strategy, "score": row["score"], "trainable": row["trainable"]}


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
