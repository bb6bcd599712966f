"""Vote: specs of several tasks on one backbone become one for all of them.

A coordinate's score is the number of specs that keep it.  Among equals the place (site and kind)
whose coordinates have more votes together comes first, then the cheaper coordinate, then the one
that comes first in the model.  The budget is filled exactly so, with coordinates of these places
that nobody keeps at last.  Atoms of a factorisation are alike before they have learned: n kept
ones are votes for the first n.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.apply import origin
from searchpet.backbone import load_backbone
from searchpet.budget import Budget, fill
from searchpet.discover import depths, discover
from searchpet.errors import InputError
from searchpet.propose import command, version
from searchpet.run import RunFolder
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import Rule, Select
from searchpet.spec import BudgetUse, Entry, Spec, canonical

Place = tuple[str, str, str]  # path and role of a site, kind


def vote(specs: Sequence[Spec | str | Path], *, budget: str | None = None,
         model: str | None = None) -> Spec:
    """The spec of at most `budget` that most of the specs agree on.

    budget: by default the one that all of them have;  model: where the backbone lies.
    Raises InputError for specs of different backbones, of masks, or of budgets with the head.
    """
    found = [spec if isinstance(spec, Spec) else Spec.load(spec) for spec in specs]
    _check(found)
    first = found[0]
    texts = {spec.budget.text for spec in found}
    if budget is None and len(texts) > 1:
        raise InputError("a vote needs a budget where the specs have several, but they have "
                         f"{', '.join(sorted(texts))}; give --budget")
    limit = Budget.parse(budget or first.budget.text, first.backbone.parameters)
    space = Space("vote", _sites(first, model), _rules(found))
    votes = _votes(found, space)
    limit.afford(int(space.cost.min()))
    keep = fill(_score(votes, space), space.cost, limit.limit)
    used = space.parameters(keep)
    return Spec(
        backbone=first.backbone, entries=space.entries(keep),
        budget=BudgetUse(text=limit.text, limit=limit.limit, used=used,
                         slack=limit.limit - used, denominator=limit.denominator),
        provenance=_provenance(found, space, votes[keep]))


def _check(specs: Sequence[Spec]) -> None:
    """Raise InputError unless the specs can be voted on."""
    if len(specs) < 2:
        raise InputError(f"a vote must be among two specs at least, but got {len(specs)}")
    first = specs[0].backbone
    for spec in specs:
        own = spec.backbone
        if (own.config_hash, own.revision) != (first.config_hash, first.revision):
            raise InputError(
                f"a vote must be among specs of one backbone, but they are of {first.name} at "
                f"{first.revision} and of {own.name} at {own.revision}; carry them over first: "
                "searchpet transfer SPEC --model ONE")
        if spec.budget.counts != "deltas":
            raise InputError("a vote must be among budgets of deltas, as every task has a head of "
                             "its own, but one counts the head; search without --count-head")
        for entry in spec.entries:
            if entry.mask or catalog.get("deltas", entry.kind).neutral == 1:
                raise InputError("a vote must be among specs that prune and mask nothing, but one "
                                 f"has {entry.key}; search without --keep-flops and the like")


def _sites(spec: Spec, model: str | None) -> tuple[Site, ...]:
    """The sites of the specs' backbone.  Raises InputError for another one."""
    lies = origin(RunFolder(spec.folder)) if spec.folder else None
    backbone = load_backbone(model or lies or spec.backbone.name, outputs=2, regression=False,
                             seed=0)
    if backbone.identity.config_hash != spec.backbone.config_hash:
        raise InputError(f"the backbone must be that of the specs, {spec.backbone.name}, but "
                         f"{backbone.identity.name} is of another architecture; give its --model")
    return discover(backbone.model)


def _place(entry: Entry) -> Place:
    return entry.path, entry.role, entry.kind


def _rules(specs: Sequence[Spec]) -> list[Rule]:
    """All places that a spec uses, each with the options of the one that keeps most there."""
    most: dict[Place, Entry] = {}
    for spec in specs:
        for entry in spec.entries:
            if _place(entry) not in most or len(most[_place(entry)].kept) < len(entry.kept):
                most[_place(entry)] = entry
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in most.values():
        groups[entry.kind, entry.role, canonical(entry.options)].append(entry)
    return [Rule(kind=kind, grain="atom", options=dict(members[0].options),
                 select=Select(role=(role,), path=tuple(e.path for e in members)))
            for (kind, role, _), members in groups.items()]


def _votes(specs: Sequence[Spec], space: Space) -> Tensor:
    """How many specs keep each unit, int64 (units,).

    Raises InputError for an entry at a site, or of a coordinate, that is not there.
    """
    votes = torch.zeros(len(space), dtype=torch.int64)
    places = {(p.site.path, p.site.role, p.kind): p for p in space.placements}
    for spec in specs:
        for entry in spec.entries:
            p = places.get(_place(entry))
            if p is None or (entry.kept and entry.kept[-1] >= p.width and not p.atoms):
                raise InputError(f"{entry.key}: a spec must name sites and coordinates of its "
                                 "backbone, but this one is not there; restore the file")
            kept = range(min(len(entry.kept), p.width)) if p.atoms else entry.kept
            votes[space.unit[p.start + torch.tensor(list(kept), dtype=torch.int64)]] += 1
    return votes


def _score(votes: Tensor, space: Space) -> Tensor:
    """Votes, ties broken: the last place of a unit's rank, negated, float64 (units,)."""
    together = torch.zeros(len(space.placements), dtype=torch.int64)
    together.index_add_(0, space.owner, votes)
    order = torch.arange(len(space))
    for key, falling in ((space.cost, False), (together[space.owner], True), (votes, True)):
        order = order[key[order].argsort(descending=falling, stable=True)]
    return -order.argsort().double()


def _provenance(specs: Sequence[Spec], space: Space, votes: Tensor) -> dict[str, Any]:
    """Who voted, and how many of the kept units had how many votes."""
    tasks = dict.fromkeys(str(spec.provenance.get("task", "")) for spec in specs)
    counted = Counter(votes.tolist())
    return {
        "strategy": "vote", "hyperparameters": {}, "stacks": depths(space.sites),
        **({"task": ",".join(tasks)} if all(tasks) else {}),
        "sources": [{"hash": spec.hash, "task": spec.provenance.get("task"),
                     "budget": spec.budget.text} for spec in specs],
        "votes": {str(n): counted[n] for n in sorted(counted, reverse=True)},
        "versions": {"searchpet": version()}, "command": command(sys.argv)}
