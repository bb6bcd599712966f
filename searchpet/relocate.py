"""From a spec to one of another backbone, settled within the budgets there.

`counterpart` says where entries belong, `apportion` how many coordinates each place gets, and a
one-shot worth which of them; prune masks go by the source's plan, a share for each role and depth,
and are settled first, to the same share of the same measure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.apportion import Cell, apportion
from searchpet.counterpart import Match, Place, Source, Target, crowd, match, planned
from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.pruning import Prune, keep_of
from searchpet.space import Placement, Space
from searchpet.spacefile import Rule, Select
from searchpet.spec import Entry, Spec, canonical

SINGLE = "masks of single weights say nothing of other weights; search there"
UNPLANNED = "the spec has no plan of what it prunes"
BEYOND = "the budget reaches none of its places"
REMOVED = "pruning leaves nothing of its places"


@dataclass(frozen=True)
class Draft:
    """What is to be bought: the units, what each place asks for, what each mask is to keep."""

    space: Space
    asked: dict[Place, float]
    shares: dict[Place, float]
    matches: tuple[Match, ...]


def draft(spec: Spec, source: Source, target: Target) -> Draft:
    """The counterparts of a spec's entries, as a space.

    Raises InputError where none has one.
    """
    prunes = spec.keep is not None and bool(spec.plan)
    shares = planned(spec.plan, source, target) if prunes else {}
    matches = tuple(_match(entry, source, target, shares) for entry in spec.entries)
    crowd(m for m in matches if is_pet(m.entry))
    pet = [m for m in matches if is_pet(m.entry) and m.shares]
    if not pet:
        why = "; ".join(dict.fromkeys(m.why for m in matches))
        raise InputError("a transfer must find a place for some PET of the spec, but finds none: "
                         f"{why or 'the spec has no entries'}; search on that backbone instead")
    asked: dict[Place, float] = defaultdict(float)
    for m in pet:
        for place, share in m.shares.items():
            asked[place] += len(m.entry.kept) * share
    rules = [*_pet_rules(pet, target), *_mask_rules(spec.entries, shares)]
    return Draft(Space("transfer", target.sites, rules), dict(asked), shares, matches)


def is_pet(entry: Entry) -> bool:
    """Whether an entry adds something, unlike a prune mask."""
    return bool(catalog.get("deltas", entry.kind).neutral == 0)


def _match(entry: Entry, source: Source, target: Target, shares: Mapping[Place, float]) -> Match:
    """What becomes of an entry, before the budget is spent."""
    if entry.mask is not None:
        return Match(entry, "dropped", SINGLE)
    if is_pet(entry):
        return match(entry, source, target)
    if not shares:
        return Match(entry, "dropped", UNPLANNED)
    if any(role == entry.role and kind == entry.kind for _, role, kind in shares):
        return Match(entry, "mapped", "as a share of its depth")
    return Match(entry, "dropped", f"nothing that {entry.kind} at {entry.role} could prune there")


def _pet_rules(pet: Sequence[Match], target: Target) -> list[Rule]:
    """Each kind on all sites of the roles that take it; options of the entry that gives most, or
    of the nearest layer that takes any.
    """
    most: dict[Place, tuple[float, dict[str, bool | int | float | str]]] = {}
    for m in pet:
        for place, share in m.shares.items():
            given = len(m.entry.kept) * share
            if given > most.get(place, (-1.0, {}))[0]:
                most[place] = given, dict(m.entry.options)
    at = {(site.path, site.role): site for site in target.sites}
    groups = {(kind, at[path, role].part, role) for path, role, kind in most}
    paths: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    options = {}
    for kind, part, role in sorted(groups):
        sites = [s for s in target.of(part, role) if catalog.get("deltas", kind).fits(s)]
        taking = [s for s in sites if (s.path, role, kind) in most]
        for site in sites:
            near = min((abs(s.layer - site.layer), s.path) for s in taking)[1]
            own = most.get((site.path, role, kind), most[near, role, kind])[1]
            key = (kind, role, canonical(own))
            options[key] = own
            paths[key].append(site.path)
    return [Rule(kind=kind, grain="atom", options=options[kind, role, text],
                 select=Select(role=(role,), path=tuple(found)))
            for (kind, role, text), found in paths.items()]


def _mask_rules(entries: Sequence[Entry], shares: Mapping[Place, float]) -> list[Rule]:
    """The masks of a plan; options are those of the first entry of their kind."""
    paths: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, role, kind in shares:
        paths[kind, role].append(path)
    options = {e.kind: dict(e.options) for e in reversed(entries)}
    return [Rule(kind=kind, grain="atom", options=options.get(kind, {}),
                 select=Select(role=(role,), path=tuple(found)))
            for (kind, role), found in paths.items()]


def settle(spec: Spec, of: Draft, model: nn.Module, limit: int, worth: Tensor,
           ) -> tuple[Limits, Tensor]:
    """The choice within `limit` parameters and the share of inference: keep (units,) bool.

    worth (units,): which coordinates of a place come first.
    Raises InputError where the masks cannot reach the share.
    """
    space, keep, settled = of.space, None, None
    if of.shares:
        assert spec.keep is not None  # there is no plan without
        keep = keep_of(Prune(spec.keep.measure, spec.keep.text, "the spec's plan"), model, space)
        first = Limits(space, limit, keep)
        settled = first.fill(_margins(of, worth))
    limits = Limits(space, limit, keep, settled)
    gates = torch.ones(len(space)) if settled is None else settled
    price = limits.price(gates.double()).round().long()
    cells = [cell for p in space.placements if p.neutral == 0
             and len((cell := _cell(of, p, price, worth)).units)]
    return limits, limits.fill(apportion(cells, limit, len(space)))


def _units(space: Space, place: Placement, worth: Tensor) -> Tensor:
    """A placement's units, best first."""
    units = space.unit[place.start : place.start + place.width]
    return units[worth[units].argsort(descending=True, stable=True)]


def _cell(of: Draft, p: Placement, price: Tensor, worth: Tensor) -> Cell:
    units = _units(of.space, p, worth)
    units = units[price[units] > 0]  # what pruning leaves
    asked = of.asked.get((p.site.path, p.site.role, p.kind), 0.0)
    return Cell((p.site.part, p.site.role, p.kind), asked, units,
                int(price[units[0]]) if len(units) else 0)


def _margins(of: Draft, worth: Tensor) -> Tensor:
    """Scores of prune units (units,): the k-th best of w in a place that is to keep the share s
    has s - (k - 1/2) / w, so that more or less is taken away evenly.
    """
    score = torch.zeros(len(of.space), dtype=torch.float64)
    for p in of.space.placements:
        if p.neutral == 1:
            number = torch.arange(p.width, dtype=torch.float64) + 0.5
            share = of.shares[p.site.path, p.site.role, p.kind]
            score[_units(of.space, p, worth)] = share - number / p.width
    return score


def first_come(spec: Spec, space: Space, worth: Tensor) -> Tensor:
    """The worth where the backbone is the spec's own architecture: what it keeps comes first."""
    kept = {(e.path, e.role, e.kind): e.kept for e in spec.entries if e.mask is None}
    found = worth / (1 + worth.abs().max()) if len(worth) else worth  # below 1
    for p in space.placements:
        for c in kept.get((p.site.path, p.site.role, p.kind), ()):
            if c < p.width:
                found[space.unit[p.start + c]] += 2.0
    return found


def close(of: Draft, entries: Sequence[Entry], price: Tensor) -> dict[Place, int]:
    """How many coordinates each place got; entries that came away with nothing are dropped.

    price (units,): of each unit, 0 for PET on what is pruned.
    """
    left = {(p.site.path, p.site.role, p.kind) for p in of.space.placements
            if (price[of.space.unit[p.start : p.start + p.width]] > 0).any()}
    got = {(e.path, e.role, e.kind): len(e.kept) for e in entries}
    for m in of.matches:
        if m.shares and not any(got.get(place) for place in m.shares):
            m.drop(REMOVED if left.isdisjoint(m.shares) else BEYOND)
    return got
