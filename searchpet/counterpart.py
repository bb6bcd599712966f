"""Counterparts: where the entries of a spec belong on another backbone.

Stack.  Where both backbones have an encoder and a decoder each keeps its own.  Otherwise what the
source has goes to every stack of the target, split by their numbers of layers.

Role.  The same role, else the one that stands in for it (`STAND_INS`).  Cross attention takes
nothing from other attentions and gives nothing to them: a source without it says nothing of it.

Depth.  Layer i of L covers [i/L, (i+1)/L) of the depth, and an entry is split over the target's
layers by how much of that they cover: 12 -> 24 layers makes two of one, 24 -> 12 one of two.
ALBERT's layers are one module, so they take what all depths of the source have, and give it back
to all.  Norms outside the blocks have no depth.

Demand.  What is carried over is a count: an entry with n coordinates asks for n in all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from searchpet import catalog
from searchpet.discover import depths
from searchpet.errors import InputError
from searchpet.site import Site
from searchpet.spec import Entry, Ratio, Spec

# role -> what stands in for it where a backbone has none, and at which end of the stack: a norm
# before the first block is nearest to the first of a block's norms, one behind them to the last
STAND_INS: dict[str, tuple[str, int | None]] = {
    "ffn.gate": ("ffn.in", None),
    "norm.attention_post": ("norm.attention", None),
    "norm.cross_attention_post": ("norm.cross_attention", None),
    "norm.ffn_post": ("norm.ffn", None),
    "norm.embedding": ("norm.attention", 0),
    "norm.final": ("norm.ffn", -1),
}
OUTER = ("norm.embedding", "norm.final")  # roles without a depth
VERDICTS = ("mapped", "approximated", "dropped")
Place = tuple[str, str, str]  # path and role of a site, kind


@dataclass
class Match:
    """What became of an entry of the source: a verdict, why, and the share for each place.

    shares sum to 1, or are empty where nothing there can take the entry.
    """

    entry: Entry
    verdict: str
    why: str = ""
    shares: dict[Place, float] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.verdict, self.why, self.shares = "dropped", why, {}


@dataclass(frozen=True)
class Source:
    """Blocks of each stack of the backbone that a spec was made for; `guess` says how it is known
    where the spec does not say so itself.
    """

    stacks: dict[str, int]
    guess: str = ""

    def part(self, entry: Entry) -> str:
        """The stack of an entry: the only one, or the one that its path names."""
        if len(self.stacks) == 1:
            return next(iter(self.stacks))
        return "decoder" if "decoder" in entry.path.lower() else "encoder"


def source_of(spec: Spec) -> Source:
    """The stacks that a spec's provenance names, else as far as its entries reach.

    Raises InputError where an entry lies outside of them.
    """
    said = spec.provenance.get("stacks")
    if said is not None:
        _check_stacks(spec, said)
        return Source(dict(said))
    parts = {name[0] if (name := re.findall("encoder|decoder", e.path.lower())) else "encoder"
             for e in spec.entries}
    stacks = dict.fromkeys(sorted(parts) or ["encoder"], 1)
    source = Source(stacks)
    for entry in spec.entries:
        part = source.part(entry)
        stacks[part] = max(stacks[part], entry.layer + (entry.role not in OUTER))
    shown = ", ".join(f"{n} layers of {part}" for part, n in stacks.items())
    return Source(stacks, "the spec does not say how deep its backbone is; taken from its deepest "
                          f"entries: {shown}")


def _check_stacks(spec: Spec, said: Any) -> None:
    if not (isinstance(said, Mapping) and said and said.keys() <= {"encoder", "decoder"}
            and all(type(n) is int and 0 < n <= 100_000 for n in said.values())):
        raise InputError("a spec's provenance must count the blocks of its encoder or decoder "
                         f"under stacks, but says {str(said)[:60]!r}; restore the file")
    source = Source(dict(said))
    for entry in spec.entries:
        of = source.stacks[source.part(entry)]
        if entry.role not in OUTER and not 0 <= entry.layer < of:
            raise InputError(f"a spec's entries must lie in the {of} blocks of their stack, but "
                             f"{entry.key} says layer {entry.layer}; restore the file")


def overlaps(layer: int, of: int, onto: int) -> dict[int, float]:
    """How the layer, of `of`, is spread over `onto` layers: they sum to 1."""
    low, high = layer / of * onto, (layer + 1) / of * onto
    width = high - low
    found = {}
    for other in range(int(low), onto):
        share = (min(high, other + 1) - max(low, other)) / width
        if share <= 1e-9:  # rounding of the borders
            if other >= high:
                break
            continue
        found[other] = share
    return found


class Target:
    """The sites of the backbone that a spec goes to."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites, self.stacks = tuple(sites), depths(sites)
        self._of: dict[tuple[str, str], list[Site]] = defaultdict(list)
        for site in sites:
            self._of[site.part, site.role].append(site)

    def of(self, part: str, role: str) -> list[Site]:
        return self._of.get((part, role), [])

    def parts(self, part: str, source: Source) -> dict[str, float]:
        """The stacks that take what `part` of the source has, with their shares."""
        if len(source.stacks) > 1 and part in self.stacks:
            return {part: 1.0}
        whole = sum(self.stacks.values())
        return {name: count / whole for name, count in self.stacks.items()}


def match(entry: Entry, source: Source, target: Target) -> Match:
    """Where an entry of PET belongs.  Raises InputError for a kind that does not exist."""
    kind = catalog.get("deltas", entry.kind)
    part = source.part(entry)
    found: dict[Place, float] = {}
    reasons: list[str] = []
    lost: list[str] = []
    for name, weight in target.parts(part, source).items():
        role, end = entry.role, None
        if not target.of(name, role) and role in STAND_INS:
            role, end = STAND_INS[role]
        sites = target.of(name, role)
        fitting = [site for site in sites if kind.fits(site)]
        if not fitting:
            lost.append(f"kind {entry.kind} does not fit {role} there" if sites else
                        f"no {entry.role} in the {name} there")
            continue
        if role != entry.role:
            reasons.append(f"{role} stands in for {entry.role}")
        layers, near = _layers(entry, source.stacks[part], target.stacks[name], fitting, end)
        if near:
            reasons.append(near)
        for layer, share in layers.items():
            beside = [site for site in fitting if site.layer == layer]
            for site in beside:
                place = (site.path, site.role, entry.kind)
                found[place] = found.get(place, 0.0) + weight * share / len(beside)
    if not found:
        return Match(entry, "dropped", "; ".join(dict.fromkeys(lost)))
    whole = sum(found.values())
    shares = {place: share / whole for place, share in found.items()}
    return Match(entry, "approximated" if reasons else "mapped",
                 "; ".join(dict.fromkeys([*reasons, *lost])), shares)


def _layers(entry: Entry, of: int, onto: int, fitting: Sequence[Site], end: int | None,
            ) -> tuple[dict[int, float], str]:
    """Layers that take an entry with their shares, and what is not quite right about it."""
    there = sorted({site.layer for site in fitting})
    if end is not None:
        return {there[end]: 1.0}, ""
    if entry.role in OUTER:
        return {layer: 1 / len(there) for layer in there}, ""
    spread = overlaps(entry.layer, of, onto)
    inside = {layer: share for layer, share in spread.items() if layer in there}
    if inside:
        whole = sum(inside.values())
        return {layer: share / whole for layer, share in inside.items()}, ""
    middle = sum(spread) / len(spread)
    near = min(there, key=lambda layer: abs(layer - middle))
    return {near: 1.0}, f"the nearest layer with {fitting[0].role} there is {near}"


def crowd(matches: Iterable[Match]) -> None:
    """Say of entries that meet in one place that they do: ALBERT's layers, or fewer of them."""
    meet: dict[Place, set[tuple[str, int]]] = defaultdict(set)
    whole = [m for m in matches if m.shares]
    for m in whole:
        for place in m.shares:
            meet[place].add((m.entry.path, m.entry.layer))
    for m in whole:
        most = max(len(meet[place]) for place in m.shares)
        if most > 1:
            m.verdict = "approximated"
            m.why = "; ".join(filter(None, [m.why, f"{most} of the source share a site there"]))


def planned(plan: Sequence[Ratio], source: Source, target: Target,
            ) -> dict[Place, float]:
    """Share that each prune mask of the target is to keep, where the source's plan says so.

    Mean over the source's layers that a layer covers, by how much; the nearest where it covers
    none.
    """
    said: dict[Place, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    depth: dict[str, int] = {}  # of what comes to a stack of the target
    for ratio in plan:
        if ratio.part not in source.stacks:
            raise InputError(f"a spec's plan must be of the stacks of its backbone, "
                             f"{', '.join(source.stacks)}, but names {ratio.part}; restore the "
                             "file")
        if catalog.get("deltas", ratio.kind).neutral == 0:
            raise InputError(f"a spec's plan must be of prune masks, but names {ratio.kind}; "
                             "restore the file")
        for name in target.parts(ratio.part, source):
            depth[name] = max(depth.get(name, 1), source.stacks[ratio.part])
    for ratio in plan:
        for name in target.parts(ratio.part, source):
            layer = round(ratio.depth * (depth[name] - 1))
            said[name, ratio.role, ratio.kind][layer].append(ratio.kept)
    found = {}
    for (name, role, kind), layers in said.items():
        own = {layer: sum(kept) / len(kept) for layer, kept in layers.items()}
        for site in target.of(name, role):
            if catalog.get("deltas", kind).fits(site):
                found[site.path, role, kind] = _mean(
                    own, overlaps(site.layer, target.stacks[name], depth[name]))
    return found


def _mean(own: Mapping[int, float], spread: Mapping[int, float]) -> float:
    """Weighted mean over the layers that are covered, else the value of the nearest."""
    inside = {layer: share for layer, share in spread.items() if layer in own}
    if not inside:
        middle = sum(spread) / len(spread)
        return own[min(own, key=lambda layer: abs(layer - middle))]
    return sum(own[i] * share for i, share in inside.items()) / sum(inside.values())
