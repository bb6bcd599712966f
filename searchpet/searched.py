"""What was searched: the units that a spec was chosen from, built again, and which of them it
keeps.

A spec says coordinates, not units, and names its space.  Where that space and the backbone's
config are on this machine the units can be numbered as the search numbered them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchpet.ask import OWN, Ask
from searchpet.errors import InputError
from searchpet.outline import sites_of
from searchpet.pruning import Prune
from searchpet.site import Site
from searchpet.space import Placement, Space
from searchpet.spec import Spec


def space_of(spec: Spec, sites: Sequence[Site] | None = None) -> Space | None:
    """The space that a spec was chosen from.  sites: of its backbone, by default found.

    None where space or backbone are not at hand, or the space is not what it was.
    """
    made = spec.provenance
    name = made.get("space")
    if not isinstance(name, str):
        return None
    if name == OWN:
        name = str(spec.folder / OWN) if spec.folder else name
    sites = sites_of(spec) if sites is None else sites
    if not sites:
        return None
    try:
        prune = None
        if spec.keep is not None:
            prune = Prune(spec.keep.measure, spec.keep.text, str(made.get("masks")))
        forbid = made.get("forbid")
        wish = [str(text) for text in forbid] if isinstance(forbid, list) else None
        found = Ask(str(made.get("strategy")), name, prune=prune, forbid=wish).on(sites)
    except InputError:  # a space or a kind that is not here
        return None
    return found if len(found) == made.get("units", len(found)) else None


def keep_of(spec: Spec, space: Space, alike: bool = False) -> Tensor:
    """Which units a spec keeps: bool (units,).

    A mask without an entry keeps all, or nothing where its host is gone: the plan says which.
    alike: atoms of a PET factorisation are counted, not named: n kept ones are the first n.
    """
    entries = {(entry.path, entry.role, entry.kind): entry for entry in spec.entries}
    gone = {(r.part, r.role, r.kind, r.depth) for r in spec.plan if r.kept == 0}
    last = depth_of(space)
    chosen = torch.zeros(len(space.unit), dtype=torch.bool)
    for p in space.placements:
        entry = entries.get((p.site.path, p.site.role, p.kind))
        own = chosen[p.start : p.start + p.width]
        if entry is not None:
            kept = range(len(entry.kept)) if alike and exchangeable(p) else entry.kept
            own[torch.tensor(list(kept), dtype=torch.int64)] = True
        elif p.neutral == 1:
            depth = p.site.layer / last[p.site.part]
            own[:] = (p.site.part, p.site.role, p.kind, depth) not in gone
    keep = torch.zeros(len(space), dtype=torch.bool)
    keep[space.unit[chosen]] = True
    return keep


def units_of(name: str, space: Space) -> Tensor:
    """Which units of a space a spec keeps that was searched on it: bool (units,).

    Raises InputError for a spec that cannot be read, and one that keeps what the space lacks.
    """
    spec = Spec.load(name)
    width = {(p.site.path, p.site.role, p.kind): p.width for p in space.placements}
    for e in spec.entries:
        if max(e.kept, default=0) >= width.get((e.path, e.role, e.kind), 0):
            raise InputError(f"spec {name} must keep units of space {space.name}, but its "
                             f"{e.kind} at {e.path} is none of them; take the --space that it "
                             "was searched on")
    return keep_of(spec, space)


def exchangeable(place: Placement) -> bool:
    """Whether coordinates are the same before they have learned: atoms of a PET factorisation."""
    return place.atoms and place.neutral == 0


def depth_of(space: Space) -> dict[str, int]:
    """Number of the last layer of each stack, at least 1: what relative depths divide by."""
    return {part: max([1, *(s.layer for s in space.sites if s.part == part and s.form != "norm")])
            for part in {site.part for site in space.sites}}
