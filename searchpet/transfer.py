"""Transfer: a structure found on one backbone, carried over to another, and trained there.

Roles, stacks and relative depth: `searchpet.counterpart`.  The budget is the source's share of its
backbone unless another is given, and is solved again: counts are apportioned to the places that
ask for them (`searchpet.apportion`), so what one coordinate costs there changes how many there are
in all, not which places have more of them than others.  Channels, heads and neurons have other
numbers on another backbone: they are chosen anew there, by role and depth (`searchpet.oneshot`).
The same architecture, whatever its weights, keeps every entry as it is.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from searchpet import once
from searchpet.ask import SPACE, Ask
from searchpet.backbone import Identity, load_backbone
from searchpet.budget import Budget
from searchpet.bulk import MASK_FILE, read_bits
from searchpet.counterpart import VERDICTS, Match, Source, Target, source_of
from searchpet.discover import discover
from searchpet.engine import CONTROLS, Result, check_test, control
from searchpet.errors import InputError
from searchpet.launch import opened
from searchpet.multitask import open_session
from searchpet.oneshot import BATCHES, by_magnitude, by_task
from searchpet.propose import command, version
from searchpet.pruning import MASKS, Prune
from searchpet.pruning import used as kept_use
from searchpet.relocate import close, draft, first_come, is_pet, settle
from searchpet.run import Listener, RunFolder, silent
from searchpet.session import Session
from searchpet.settings import Settings, asked
from searchpet.space import Space
from searchpet.spacefile import space_names
from searchpet.spec import BackboneId, BudgetUse, Entry, Spec

REPORT = "transfer.json"
SOURCE = "source.json"  # the spec that was carried over


def transfer(
    spec: Spec | str | Path,
    *,
    model: str,
    task: str | None = None,
    budget: str | None = None,
    train: bool = True,
    sweep: bool = False,
    controls: int = 0,
    test: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    listener: Listener = silent,
    **settings: Any,
) -> Result:
    """Carry a spec over to another backbone and train it there.

    model, task: where to; without a task (`train=False`) weights choose instead of gradients.
    budget: as in `search`; by default the share of the backbone that the spec has.
    train: False writes spec.json and transfer.json alone; the result's values are then the latter.
    sweep, test: as in `engine.train`; controls: random structures of the same budgets, as in
    `search`.  settings: fields of `Settings`.
    Raises InputError for whatever is wrong with the input.
    """
    found = spec if isinstance(spec, Spec) else Spec.load(spec)
    given = {"model": model, **({"task": task} if task else {}), **settings}
    if train and task is None:
        raise InputError("a transfer trains on a task, but none is given; give task, or "
                         "train=False (--no-train) for the structure alone")
    if controls < 0:
        raise InputError(f"--controls must be >= 0, but got {controls}")
    chosen = Settings(**given)
    name = Path(model.rstrip("/")).name
    folder = opened(
        RunFolder(out or f"runs/{Path(task or 'no-task').name}-{name}-transfer-{found.hash[:8]}"
                         f"-s{chosen.seed}"),
        {**asked(chosen, command="transfer", spec=found.hash, budget=budget, train=train,
                 sweep=sweep, controls=controls, test=test), "task": task}, resume)
    if folder.has("result.json"):
        return Result(folder.path, Spec.load(folder.path), folder.read_json("result.json"))
    if not train and folder.has("spec.json"):
        return Result(folder.path, Spec.load(folder.path), folder.read_json(REPORT))
    session = open_session(chosen, listener) if task else None
    if session:
        check_test(session, test)
    if not folder.has("spec.json"):
        _write(folder, found, chosen, session, budget)
    moved = Spec.load(folder.path)
    if not train or session is None:
        return Result(folder.path, moved, folder.read_json(REPORT))
    return _train(session, folder, moved, sweep, controls, test)


def _train(session: Session, folder: RunFolder, spec: Spec, sweep: bool, controls: int,
           test: bool) -> Result:
    row = once.train(session, folder, spec, session.settings.seed, sweep=sweep, test=test)
    ask = _like(spec)
    rows = [control(session, folder, replace(ask, strategy=name), i, test)
            for i in range(controls) for name in CONTROLS]
    values = {**once.values_of(session, spec, row, test), "strategy": "transfer", "controls": rows,
              "full_finetune": None, "transfer": spec.provenance["report"]}
    folder.write_json("result.json", values)
    return Result(folder.path, spec, values)


def _like(spec: Spec) -> Ask:
    """What controls are asked for: the budgets of a spec, the space it was once found in if that
    comes with the package, else the default one.
    """
    space, masks = (spec.provenance.get(name) for name in ("space", "masks"))
    own = space_names()
    prune = None
    if spec.keep is not None:
        prune = Prune(spec.keep.measure, spec.keep.text, masks if masks in own else MASKS)
    return Ask(space=space if space in own else SPACE, budget=spec.budget.text,
               count_head=spec.budget.counts == "deltas and head", prune=prune)


def _write(folder: RunFolder, found: Spec, settings: Settings, session: Session | None,
           budget: str | None) -> None:
    """spec.json of the structure there; before it the source's, and transfer.json."""
    moved, report = _moved(found, settings, session, budget)
    made: dict[str, Any] = {
        **{k: v for k, v in found.provenance.items() if k in ("space", "masks", "task")},
        **({"task": session.task.name, "data": session.task.fingerprint} if session else {}),
        "strategy": "transfer", "hyperparameters": {}, "seed": settings.seed,
        "source": {"hash": found.hash, "backbone": found.backbone.name, "budget":
                   found.budget.text, **{k: found.provenance[k] for k in ("strategy", "task")
                                         if k in found.provenance}},
        "report": {**report["counts"], "notes": report["notes"]}, "stacks": report["stacks"],
        "versions": {"searchpet": version()}, "command": command(sys.argv)}
    if bits := read_bits(found) if any(e.mask for e in moved.entries) else {}:
        folder.write_tensors(MASK_FILE, bits)
    folder.write_text(SOURCE, found.text())
    folder.write_json(REPORT, report)
    folder.write_text("spec.json", moved.model_copy(update={"provenance": made}).text())


def _moved(spec: Spec, settings: Settings, session: Session | None, budget: str | None,
           ) -> tuple[Spec, dict[str, Any]]:
    """The structure on the settings' backbone: chosen by the session's task, if there is one."""
    seed = settings.seed
    if session is None:
        if spec.budget.counts == "deltas and head":
            raise InputError("a budget that counts the head needs a task, which says how large it "
                             "is; give --task")
        backbone = load_backbone(settings.model, outputs=2, regression=False, seed=seed)
        model: nn.Module = backbone.model
        return carry(spec, backbone.identity, model, budget, 0, Worth(
            "the magnitude of the pretrained weights, as no task is given",
            lambda space: by_magnitude(model, space, backbone.head, seed)))
    with session.fresh(seed) as model:
        train, loss = session.splits["train"], session.loss(model, "fp32")
        session.fit_head(model, train, seed)
        batches = [session.batches(train, seed)[i] for i in range(BATCHES)]
        head = session.head_size if spec.budget.counts == "deltas and head" else 0
        return carry(spec, session.identity, model, budget, head, Worth(
            f"gradients on {BATCHES} batches of {session.task.name}",
            lambda space: by_task(model, space, session.head, seed, batches, loss)))


@dataclass(frozen=True)
class Worth:
    """Which coordinates come first: what that is, and the function space -> (units,)."""

    name: str
    of: Callable[[Space], Tensor]


def carry(spec: Spec, identity: Identity, model: nn.Module, budget: str | None, head: int,
          worth: Worth) -> tuple[Spec, dict[str, Any]]:
    """The spec on another backbone, and the report of what became of each entry.

    budget: text, None for the source's share;  head: parameters of it that the budget counts.
    Raises InputError where nothing of it has a place there, or the budget buys none of it.
    """
    sites, home = discover(model), BackboneId(**asdict(identity))
    source, target = source_of(spec), Target(sites)
    same = spec.backbone.config_hash == home.config_hash
    limits = _budget(spec, budget, identity.parameters)
    if same and not head and limits.limit == spec.budget.limit:
        moved = spec.model_copy(update={"backbone": home})
        matches = [Match(entry, "mapped", "the same architecture") for entry in spec.entries]
        return moved, _report(spec, moved, matches, target, ["the same architecture: every entry "
                                                             "stays as it is"])
    if head and limits.limit <= head:
        raise InputError(f"a budget that counts the head must exceed its {head:,} parameters, but "
                         f"got {limits.said}; raise the budget")
    plan = draft(spec, source, target)
    order = worth.of(plan.space)
    if same:
        order = first_come(spec, plan.space, order)
    found, keep = settle(spec, plan, model, limits.limit - head, order)
    used = found.parameters(keep)
    if not used:
        limits.afford(int(plan.space.cost[~plan.space.prunes].min()) + head)
    entries = found.entries(keep)
    close(plan, entries, found.price(keep.double()))
    moved = Spec(
        backbone=home, entries=entries, plan=found.plan(keep) if found.keep else (),
        budget=BudgetUse(text=limits.text, limit=limits.limit, used=used + head,
                         slack=limits.limit - head - used, denominator=limits.denominator,
                         counts=spec.budget.counts),
        keep=kept_use(found.keep, found.kept(keep)) if found.keep else None)
    return moved, _report(spec, moved, plan.matches, target,
                          _notes(spec, source, target, moved, model, worth, same))


def _budget(spec: Spec, text: str | None, parameters: int) -> Budget:
    """The budget asked for, else the share that the source has of its backbone."""
    if text is not None:
        return Budget.parse(text, parameters)
    if spec.budget.text.rstrip().endswith("%"):
        return Budget.parse(spec.budget.text, parameters)
    limit = spec.budget.limit * parameters // max(1, spec.budget.denominator)
    return Budget(limit, str(limit), parameters)


def _notes(spec: Spec, source: Source, target: Target, moved: Spec, model: nn.Module,
           worth: Worth, same: bool) -> list[str]:
    """What holds for the transfer as a whole."""
    notes = [source.guess] if source.guess else []
    notes.append(f"what the source keeps comes first, the rest by {worth.name}" if same else
                 "counts by role and depth were carried over; indices mean nothing on another "
                 f"backbone: channels, heads and neurons were chosen by {worth.name}")
    if len(target.stacks) > len(source.stacks):
        notes.append("the source has one stack: encoder and decoder share it by their layers, and "
                     "cross attention, of which it says nothing, takes nothing")
    if lone := sum(_lone(model, entry) for entry in moved.entries):
        notes.append(f"biases of {lone} places sit where the backbone has none: their deltas "
                     "bring them, and cannot be merged into its weights")
    if moved.budget.slack:
        notes.append(f"{moved.budget.slack:,} parameters of the budget buy nothing more of it")
    if spec.keep and not moved.keep:
        notes.append("nothing is pruned there")
    return notes


def _lone(model: nn.Module, entry: Entry) -> bool:
    """Whether an entry is a bias on a module without one."""
    return entry.kind == "bias" and getattr(model.get_submodule(entry.path), "bias", None) is None


def _report(spec: Spec, moved: Spec, matches: Sequence[Match], target: Target,
            notes: list[str]) -> dict[str, Any]:
    """Plain values: the budgets, a row for each entry of the source, a row for each role."""
    counts = Counter(m.verdict for m in matches)
    return {
        "source": {"hash": spec.hash, "backbone": spec.backbone.name,
                   **spec.budget.model_dump()},
        "target": {"backbone": moved.backbone.name, **moved.budget.model_dump()},
        "keep": moved.keep.model_dump() if moved.keep else None,
        "stacks": target.stacks, "notes": notes,
        "counts": {verdict: counts[verdict] for verdict in VERDICTS},
        "entries": [{"entry": m.entry.key, "layer": m.entry.layer, "kept": len(m.entry.kept),
                     "verdict": m.verdict, "why": m.why,
                     "to": [":".join(place) for place in m.shares]} for m in matches],
        "roles": _roles(spec, moved)}


def fates(report: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(verdict, why, how many entries) of a report, the most frequent of a verdict first."""
    counts = Counter((e["verdict"], e["why"] or "same role and kind") for e in report["entries"])
    return [(verdict, why, n) for (verdict, why), n in sorted(
        counts.items(), key=lambda item: (VERDICTS.index(item[0][0]), -item[1]))]


def _roles(spec: Spec, moved: Spec) -> list[dict[str, Any]]:
    """By role and kind, before and after: coordinates of PET that are kept, as whole numbers, and
    the mean share that prune masks keep.
    """
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[], []])
    for side, of in enumerate((spec, moved)):
        for e in of.entries:
            if is_pet(e):
                found[e.role, e.kind][side].append(len(e.kept))
        for ratio in of.plan:
            found[ratio.role, f"{ratio.kind}, share"][side].append(ratio.kept)
    rows = []
    for (role, kind), sides in sorted(found.items()):
        a, b = (sum(s) / len(s) if s and kind.endswith(", share") else sum(s) for s in sides)
        rows.append({"role": role, "kind": kind, "source": a, "target": b})
    return rows
