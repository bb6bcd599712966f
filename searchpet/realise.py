"""From a spec's entries to grafts: the deltas at their places, the masks, and what to remove.

PET deltas are built at the size that pruning leaves of their hosts, so their tensors are the same
whether the masks are hooks in a whole model or the model is really smaller.  Names in files are
those of the original model; `moved` says where its layers are now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.bulk import read_bits, read_mask, thinned
from searchpet.errors import InputError
from searchpet.grafts import Graft
from searchpet.hosts import Hosts, Live, Mask
from searchpet.limits import kept_channels
from searchpet.removal import Cut
from searchpet.site import Site
from searchpet.space import make
from searchpet.sparse import freeze_zeros, masks_of
from searchpet.spec import Entry, Spec
from searchpet.supernet import seeded


@dataclass(frozen=True)
class Structure:
    """A spec on the sites of its backbone.

    hosts: the sites with the spec's masks;  keep: bool over the ids of the masks' coordinates.
    masks, pet, weights: the entries of units to prune, of PET, and of masks of weights.
    bits: what lies in masks.safetensors beside the spec.
    """

    sites: dict[tuple[str, str], Site]
    hosts: Hosts
    keep: Tensor
    masks: tuple[Entry, ...]
    pet: tuple[Entry, ...]
    weights: tuple[Entry, ...]
    bits: dict[str, Tensor]

    @property
    def prunes(self) -> bool:
        return bool(self.masks)

    def site(self, entry: Entry) -> Site:
        return _site(self.sites, entry)

    def live(self, entry: Entry) -> Live:
        """What is left of an entry's site.  Raises InputError if nothing is."""
        live = self.hosts.live(self.site(entry), self.keep)
        if live is None:
            raise InputError(f"{entry.key}: a spec must not put PET on what it removes; it was "
                             "edited or damaged, search again or restore it")
        return live


def structure(spec: Spec, sites: Sequence[Site]) -> Structure:
    """Raises InputError for an entry that names no site, or a coordinate that is not there."""
    named = {(site.path, site.role): site for site in sites}
    masks: list[Mask] = []
    keeps: list[Tensor] = []
    sorts: dict[str, list[Entry]] = {"masks": [], "pet": [], "weights": []}
    for entry in spec.entries:
        if catalog.get("deltas", entry.kind).neutral == 0:
            sorts["pet"].append(entry)
        elif entry.mask is not None:
            sorts["weights"].append(entry)
        else:
            site = _site(named, entry)
            with torch.device("meta"):
                delta = make(entry.kind, site, dict(entry.options))
            _below(entry, delta.width)
            start = sum(len(mask.ids) for mask in masks)
            masks.append(Mask(site, torch.arange(start, start + delta.width), delta.run,
                              delta.atoms))
            keeps.append(_bool(entry.kept, delta.width))
            sorts["masks"].append(entry)
    keep = torch.cat(keeps) if keeps else torch.zeros(0, dtype=torch.bool)
    hosts = Hosts(sites, masks)
    if hosts.directions and sorts["weights"]:
        raise InputError("a spec must mask the ranks of whole matrices, but it masks single "
                         "weights as well; make one of one sort")
    return Structure(named, hosts, keep, tuple(sorts["masks"]),
                     tuple(sorts["pet"]), tuple(sorts["weights"]), read_bits(spec))


def pet_grafts(of: Structure, seed: int, moved: Callable[[str], str] | None = None,
               ) -> list[Graft]:
    """Silent deltas; `moved` (path -> path) if the model has been made smaller."""
    found = [_pet(of, entry, seed, moved) for entry in of.pet]
    return [graft if entry.mask is None else _sparse(of, entry, graft)
            for entry, graft in zip(of.pet, found, strict=True)]


def _sparse(of: Structure, entry: Entry, graft: Graft) -> Graft:
    """The graft with the entry's mask on its parameters."""
    masks = masks_of(graft.delta, read_mask(entry, of.bits))
    freeze_zeros(graft.delta, masks)
    return replace(graft, sparse=masks)


def mask_grafts(of: Structure) -> list[Graft]:
    """The masks as hooks, for a model that keeps its size."""
    found = []
    for entry in of.masks:
        delta = make(entry.kind, of.site(entry), dict(entry.options))
        found.append(Graft(of.site(entry), entry.kind,
                           delta.thin(_bool(entry.kept, delta.width))))
    return found


def weight_grafts(of: Structure) -> list[Graft]:
    """The masks of weights."""
    return [thinned(entry, of.site(entry), of.bits) for entry in of.weights]


def cut(of: Structure) -> Cut:
    """What the masks remove, in original numbering."""
    heads: dict[str, tuple[int, ...]] = {}
    neurons: dict[str, tuple[int, ...]] = {}
    ranks: dict[tuple[str, str], tuple[int, ...]] = {}
    gone: dict[str, set[str]] = {"sublayers": set(), "layers": set()}
    for entry in of.masks:
        if entry.kind == "heads":
            heads[entry.path] = tuple(entry.kept)
        elif entry.kind == "neurons":
            neurons[entry.path] = _members(of, entry, of.site(entry).d_in)
        elif entry.kind == "ranks":
            width = min(of.site(entry).d_in, of.site(entry).d_out)
            ranks[entry.path, entry.role] = _members(of, entry, width)
        elif entry.kind in gone:
            gone[entry.kind].add(entry.path)
        else:
            raise InputError(f"{entry.key}: only attention heads, neurons, sublayers, layers and "
                             f"ranks can be removed, not {entry.kind}; load it with remove=False")
    return Cut(heads, neurons, frozenset(gone["sublayers"]), frozenset(gone["layers"]), ranks)


def _members(of: Structure, entry: Entry, width: int) -> tuple[int, ...]:
    """What is kept one by one, where a coordinate is a group of neighbours among `width`."""
    run = make(entry.kind, of.site(entry), dict(entry.options)).run
    return tuple(i for c in entry.kept for i in range(c * run, min((c + 1) * run, width)))


def renamer(renames: dict[str, str]) -> Callable[[str], str]:
    """Old path -> new path, from what became of layers."""
    def moved(path: str) -> str:
        for old, new in renames.items():
            if path == old or path.startswith(f"{old}."):
                return new + path[len(old) :]
        return path
    return moved


def _pet(of: Structure, entry: Entry, seed: int, moved: Callable[[str], str] | None) -> Graft:
    live = of.live(entry)
    site = of.site(entry)
    delta = seeded(live.site, entry.kind, dict(entry.options), seed)
    width = delta.width
    channels = not delta.atoms and live.outs is not None and width == live.site.d_out
    _below(entry, site.d_out if channels else width)
    if not entry.kept:
        raise InputError(f"{entry.key}: an entry of a PET kind must keep a coordinate, but its "
                         "list is empty")
    kept = list(entry.kept)
    if channels:
        if kept_channels(kept, False, site.d_out, site, live) != kept:
            raise InputError(f"{entry.key}: a spec must not put PET on channels that it removes; "
                             "it was edited or damaged, search again or restore it")
        assert live.outs is not None
        kept = torch.searchsorted(live.outs, torch.tensor(kept)).tolist()
    if len(kept) < width:
        delta = delta.thin(_bool(kept, width))
    whole = _features(site) if site.index else None
    writes = whole if live.outs is None else live.outs if whole is None else whole[live.outs]
    if moved is None:
        return Graft(live.site, entry.kind, delta, live.ins, writes)
    if whole is not None and writes is not None:
        writes = torch.searchsorted(_left(of, site), writes)
    else:
        writes = None
    # the site's own index is of the whole model
    return Graft(replace(live.site, index=None), entry.kind, delta, None, writes,
                 moved(site.path))


def _left(of: Structure, site: Site) -> Tensor:
    """Output features of a fused module that are left, in its original numbering, ascending."""
    parts = []
    for other in of.sites.values():
        if other.path == site.path and other.index:
            live = of.hosts.live(other, of.keep)
            if live is not None:
                parts.append(_features(other) if live.outs is None
                             else _features(other)[live.outs])
    left: Tensor = torch.cat(parts).unique()
    return left


def _features(site: Site) -> Tensor:
    """A slice's features, as the site orders them."""
    return torch.cat([torch.arange(a, b) for a, b in site.index or ((0, site.d_out),)])


def _site(named: dict[tuple[str, str], Site], entry: Entry) -> Site:
    site = named.get((entry.path, entry.role))
    if site is None:
        raise InputError(f"a spec must name sites of the model, but it has no {entry.role} at "
                         f"{entry.path}; see `searchpet sites`")
    return site


def _below(entry: Entry, width: int) -> None:
    if entry.kept and entry.kept[-1] >= width:
        raise InputError(f"{entry.key}: kept coordinates must be below {width}, but got "
                         f"{entry.kept[-1]}")


def _bool(kept: Iterable[int], width: int) -> Tensor:
    keep = torch.zeros(width, dtype=torch.bool)
    keep[torch.tensor(list(kept), dtype=torch.int64)] = True
    return keep
