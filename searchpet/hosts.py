"""Hosts: what pruning leaves of the sites.

PET sits on sites, and prune masks take features, sublayers and layers away from under it.  This
file says which mask coordinates a site's features and existence hang on.  Rows of query, key and
value hang on the attention heads of the output projection that follows, rows of the feed-forward's
first matrices on the neurons of its second; everything in a sublayer on its mask and on what is
left in it; everything in a layer on the layer's mask.  Norms beside a sublayer stay with the
layer: in a post-norm block they act on the residual stream, which passes by.  A norm on the output
inside the residual branch (role `norm.*_post`) goes with the sublayer, and so do the norms of
queries and keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.site import Site

NOTHING = -1  # a feature that hangs on no mask
_OUTPUTS = ("attention.output", "cross_attention.output", "ffn.out")
_INSIDE = ("query", "key")  # norms with these names act on what these linears give
_MIXED = {"query", "key", "value", "in", "gate"}  # roles whose outputs the output linear mixes


@dataclass(frozen=True)
class Mask:
    """A prune mask: `ids[c]` names coordinate c, which gates `run` consecutive features.

    atoms: it gates singular directions of the site's matrix instead: all features stay.
    """

    site: Site
    ids: Tensor
    run: int
    atoms: bool = False


@dataclass(frozen=True)
class Ties:
    """What a site hangs on, in ids of masks.

    ins (d_in,), outs (d_out,): int64, the id that each feature hangs on, or NOTHING.
    above: ids of the masks of its sublayer and its layer.
    mixed: ids of which one at least must live, or the sublayer computes nothing; may be empty.
    """

    ins: Tensor
    outs: Tensor
    above: tuple[int, ...]
    mixed: tuple[int, ...]


@dataclass(frozen=True)
class Live:
    """What is left of a site: the site with smaller sizes, and which features those are.

    ins, outs: int64 indices into the site's own features, None where all are left.
    """

    site: Site
    ins: Tensor | None
    outs: Tensor | None


@dataclass
class Hosts:
    """Sites, and the masks over them.

    directions: path and role of a site -> the mask of its matrix's singular directions.
    Raises InputError for such masks beside those that take features away: the directions are
    those of whole matrices.
    """

    sites: Sequence[Site]
    masks: Iterable[Mask]
    directions: dict[tuple[str, str], Mask] = field(init=False)
    _at: dict[tuple[str, str], Mask] = field(init=False)

    def __post_init__(self) -> None:
        masks = tuple(self.masks)
        self.directions, self._at = (
            {(mask.site.path, mask.site.role): mask for mask in masks if mask.atoms is atoms}
            for atoms in (True, False))
        if self.directions and self._at:
            raise InputError("masks of ranks must be the only masks of units, as they are those "
                             "of whole matrices, but there are others; give one sort to --masks")

    @cached_property
    def _blocks(self) -> dict[tuple[str, int], list[Site]]:
        """(part, layer) -> its sites."""
        blocks: dict[tuple[str, int], list[Site]] = defaultdict(list)
        for site in self.sites:
            blocks[site.part, site.layer].append(site)
        return blocks

    def ties(self, site: Site) -> Ties:
        """What the site's features and existence hang on."""
        free_in, free_out = (torch.full((d,), NOTHING) for d in (site.d_in, site.d_out))
        prefix, _, part = site.role.partition(".")
        beside = self._blocks[site.part, site.layer]
        above = self._ids(beside, "layer")
        if prefix == "norm" and part.endswith("_post"):  # inside the residual branch
            above += self._ids(beside, f"{part.removesuffix('_post')}.block", site)
        if prefix == "norm" and part in _INSIDE:  # of queries or keys, inside the attention
            near = _nearest(site, [s for s in beside if s.role in _OUTPUTS[:2]])
            prefix = near.role.partition(".")[0] if near else prefix
        if prefix not in ("attention", "cross_attention", "ffn"):
            return Ties(free_in, free_out, above, ())
        above += self._ids(beside, f"{prefix}.block", site)
        output = _nearest(site, [s for s in beside if s.role in _OUTPUTS
                                 and s.role.startswith(f"{prefix}.")])
        mask = self._at.get((output.path, output.role)) if output else None
        if output is None or mask is None:
            return Ties(free_in, free_out, above, ())
        mixed = tuple(mask.ids.tolist())
        if site.form == "linear" and site.path == output.path:
            return Ties(_spread(mask, site.d_in), free_out, above, mixed)
        # further linears of an attention have rows per head where they are as wide, and so has a
        # norm over all queries or keys, unlike one over those of each head
        rows = (part in _MIXED or (part == "other" and site.d_out == output.d_in)
                if site.form == "linear" else site.form == "norm" and any(
                    s.role == f"{prefix}.{part}" and s.d_out == site.d_out for s in beside))
        if rows:
            return Ties(free_in, _spread(mask, site.d_out), above, mixed)
        return Ties(free_in, free_out, above, mixed)

    def _ids(self, beside: list[Site], role: str, near: Site | None = None) -> tuple[int, ...]:
        """Ids of the mask at the site of that role (the nearest to `near`), if there is one."""
        found = [s for s in beside if s.role == role]
        chosen = _nearest(near, found) if near else next(iter(found), None)
        mask = self._at.get((chosen.path, chosen.role)) if chosen else None
        return tuple(mask.ids.tolist()) if mask else ()

    def live(self, site: Site, keep: Tensor) -> Live | None:
        """What is left of a site where keep (ids,) bool lives; None where nothing is."""
        ties = self.ties(site)
        if not all(bool(keep[i]) for i in ties.above):
            return None
        if ties.mixed and not bool(keep[torch.tensor(ties.mixed)].any()):
            return None
        ins, outs = _left(ties.ins, keep), _left(ties.outs, keep)
        if ins is None and outs is None:
            return Live(site, None, None)
        smaller = replace(site, d_in=site.d_in if ins is None else len(ins),
                          d_out=site.d_out if outs is None else len(outs))
        return Live(smaller, ins, outs)


def _nearest(site: Site, among: Sequence[Site]) -> Site | None:
    """The site whose path has most in common with the given one's: experts have several."""
    def common(other: Site) -> int:
        pairs = zip(site.path.split("."), other.path.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(site.path))
    return max(among, key=common, default=None)


def _spread(mask: Mask, size: int) -> Tensor:
    """The id of each of `size` features.  Keys and values have fewer features per coordinate
    than the queries that share them.
    """
    count = len(mask.ids)
    run = mask.run if size == mask.site.d_in else size // count
    return mask.ids[torch.arange(size) // run]


def _left(ids: Tensor, keep: Tensor) -> Tensor | None:
    """Indices of the features that live, None for all."""
    alive = torch.ones(len(ids), dtype=torch.bool)
    tied = ids != NOTHING
    alive[tied] = keep[ids[tied]]
    return None if bool(alive.all()) else alive.nonzero().squeeze(-1)
