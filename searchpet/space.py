"""Space: which kinds sit on a model's sites, and which of their coordinates are one unit.

`searchpet.spacefile` says how a space is written down.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from searchpet import catalog
from searchpet.deltas import Delta
from searchpet.errors import InputError, unknown
from searchpet.patterns import Pattern
from searchpet.site import Site
from searchpet.spacefile import Rule, read_space
from searchpet.spec import Entry

LARGEST = 65_536  # of a number in options: above any width, below what would exhaust memory


@dataclass(frozen=True)
class Placement:
    """A kind on a site: `width` coordinates, the first of them number `start` of the space."""

    site: Site
    kind: str
    options: dict[str, Any]
    grain: str
    width: int
    start: int
    atoms: bool
    neutral: float = 0.0
    run: int = 1  # consecutive features that a mask's coordinate gates


class Space:
    """Sites x kinds x grain -> units and their prices.

    sites: of the model, used or not;  placements: in the order of sites, then rules.
    bulk:  masks of single weights, which are no units: there are millions.
    unit:  int64 (coordinates,), the unit of each coordinate.
    cost:  int64 (units,), parameters of each unit.
    owner: int64 (units,), the placement of each unit's first coordinate.
    first: int64 (units,), that coordinate's number inside its placement.
    neutral: float32 (units,), the gate that changes nothing: 0 for PET, 1 for prune masks.
    share: of the budget, what a kind may spend; kinds without one share the rest.
    forbid: PET that has no place in it.  Raises InputError for a pattern that matches none.
    """

    def __init__(self, name: str, sites: Sequence[Site], rules: Sequence[Rule],
                 share: Mapping[str, float] | None = None,
                 forbid: Sequence[Pattern] = ()) -> None:
        self.name, self.sites, self.share = name, tuple(sites), dict(share or {})
        placements: list[Placement] = []
        costs: list[Tensor] = []
        labels: list[Any] = []
        bulk: list[Placement] = []
        for site, rule in _without(name, _pairs(name, sites, rules), forbid, _depths(sites)):
            with torch.device("meta"):  # shapes only
                delta = make(rule.kind, site, rule.options)
            place = Placement(site, rule.kind, rule.options, rule.grain, delta.width,
                              len(labels), delta.atoms, delta.neutral, delta.run)
            if delta.stage == "weight" and not delta.atoms:
                bulk.append(place)
                continue
            placements.append(place)
            costs.append(delta.cost())
            labels.extend(catalog.get("grains", rule.grain)(site, rule.kind, delta.width))
        self.placements, self.bulk = tuple(placements), tuple(bulk)
        numbers: dict[Any, int] = {}
        self.unit = torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels],
                                 dtype=torch.int64)
        coordinate_cost = torch.cat([torch.zeros(0, dtype=torch.int64), *costs])
        self.cost = torch.zeros(len(numbers), dtype=torch.int64).index_add_(
            0, self.unit, coordinate_cost)
        widths, starts = (torch.tensor(n, dtype=torch.int64) for n in (
            [p.width for p in placements], [p.start for p in placements]))
        where = torch.repeat_interleave(widths)
        inside = torch.arange(len(labels)) - starts[where]
        # the first coordinate of each unit: write in reverse, the first one wins
        self.owner = torch.empty(len(numbers), dtype=torch.int64)
        self.first = torch.empty(len(numbers), dtype=torch.int64)
        self.owner[self.unit.flip(0)] = where.flip(0)
        self.first[self.unit.flip(0)] = inside.flip(0)
        self.neutral = torch.tensor([p.neutral for p in placements])[self.owner]
        self.prunes = self.neutral == 1  # bool (units,)

    def __len__(self) -> int:
        return len(self.cost)

    @cached_property
    def total(self) -> int:
        """Parameters of all units together."""
        return int(self.cost.sum())

    def parameters(self, keep: Tensor) -> int:
        """Exact parameters of the kept units; keep (units,) bool."""
        return int(self.cost[keep.cpu()].sum())

    def matching(self, found: Pattern, option: str) -> Tensor:
        """PET units with a coordinate where a pattern matches: bool (units,).

        Raises InputError where there is none.
        """
        units, depth = torch.zeros(len(self), dtype=torch.bool), _depths(self.sites)
        for p in self.placements:
            if p.neutral == 0 and found.matches(p.site, p.kind, depth.get(p.site.part, 0)):
                units[self.unit[p.start : p.start + p.width]] = True
        if not bool(units.any()):
            raise _none(self.name, found, option)
        return units

    def slopes(self, place: Placement) -> tuple[int, int, int]:
        """Parameters of one coordinate of a placement: all, per input and per output feature."""
        def cost(d_in: int, d_out: int) -> int:
            with torch.device("meta"):
                delta = make(place.kind, replace(place.site, d_in=d_in, d_out=d_out),
                             place.options)
            return int(delta.cost()[0])

        d_in, d_out = place.site.d_in, place.site.d_out
        whole = cost(d_in, d_out)
        if place.site.form != "linear":
            return whole, 0, 0  # the residual stream keeps its width
        return whole, cost(d_in + 1, d_out) - whole, cost(d_in, d_out + 1) - whole

    def entries(self, keep: Tensor) -> tuple[Entry, ...]:
        """The spec's entries for the kept units; keep (units,) bool.

        A mask that keeps everything has no entry; one that keeps nothing has an empty one.
        """
        chosen = keep.cpu()[self.unit]
        entries = []
        for p in self.placements:
            kept = chosen[p.start : p.start + p.width].nonzero().squeeze(-1).tolist()
            if len(kept) < p.width if p.neutral else kept:
                entries.append(Entry(path=p.site.path, role=p.site.role, layer=p.site.layer,
                                     kind=p.kind, options=dict(p.options), kept=kept))
        return tuple(entries)


def make(kind: str, site: Site, options: dict[str, Any]) -> Delta:
    """Build a delta.  Raises InputError for a site that the kind does not fit, an option that it
    does not have, or a value that is not of the option's type, not above 0, or beyond all reason.
    """
    build = catalog.get("deltas", kind)
    if not build.fits(site):
        raise InputError(f"kind {kind} must sit where it fits, but {site.path} is a {site.form}")
    hints = get_type_hints(build.__init__)
    allowed = [name for name, p in inspect.signature(build.__init__).parameters.items()
               if p.kind is p.KEYWORD_ONLY and name != "channels"]
    for option, value in options.items():
        if not allowed:
            raise InputError(f"kind {kind} has no options, but got {option!r}")
        if option not in allowed:
            raise unknown(f"option of kind {kind}", option, allowed)
        _check_option(f"kind {kind}: {option}", value, hints[option])
    delta: Delta = build(site, **options)
    return delta


def _check_option(what: str, value: Any, hint: Any) -> None:
    """Raise InputError unless `value` is of the annotated type; numbers must be in (0, 65536]."""
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(f"{what}: {error.errors()[0]['msg']}, but got {value!r}") from error
    if hint in (int, float) and not 0 < value <= LARGEST:
        raise InputError(f"{what} must be in (0, {LARGEST}], but got {value!r}")


def _pairs(name: str, sites: Sequence[Site], rules: Sequence[Rule]) -> list[tuple[Site, Rule]]:
    """Every (site, rule) that applies, in the order of sites.  No kind twice at a site."""
    depth = _depths(sites)
    pairs = [
        (site, rule) for site in sites for rule in rules
        if catalog.get("deltas", rule.kind).fits(site)
        and rule.select.matches(site, depth.get(site.part, 0))
    ]
    seen = set()
    for site, rule in pairs:
        if (site, rule.kind) in seen:
            raise InputError(f"space {name}: a kind may sit once at a site, but two rules put "
                             f"{rule.kind} on {site.path}; narrow a `select`")
        seen.add((site, rule.kind))
    for number, rule in enumerate(rules):
        if not any(used is rule for _, used in pairs):
            raise InputError(f"space {name}: every rule must match a site of this model, but rule "
                             f"{number} ({rule.kind}) matches none; see `searchpet sites`")
    return pairs


def _depths(sites: Sequence[Site]) -> dict[str, int]:
    """Number of blocks of each stack."""
    depth: dict[str, int] = {}
    for site in sites:
        if site.form != "norm":
            depth[site.part] = max(depth.get(site.part, 0), site.layer + 1)
    return depth


def _without(name: str, pairs: Sequence[tuple[Site, Rule]], forbid: Sequence[Pattern],
             depth: Mapping[str, int]) -> Sequence[tuple[Site, Rule]]:
    """The pairs of which no pattern forbids the PET."""
    left = list(pairs)
    for pattern in forbid:
        rest = [(site, rule) for site, rule in left
                if catalog.get("deltas", rule.kind).neutral == 1
                or not pattern.matches(site, rule.kind, depth.get(site.part, 0))]
        if len(rest) == len(left):
            raise _none(name, pattern, "--forbid")
        left = rest
    if forbid and all(catalog.get("deltas", rule.kind).neutral == 1 for _, rule in left):
        raise InputError(f"--forbid must leave units of PET, but of space {name} none is left; "
                         "forbid less")
    return left


def _none(name: str, pattern: Pattern, option: str) -> InputError:
    return InputError(f"{option} must match PET of space {name} on this model, but {pattern.text} "
                      "matches none; see `searchpet space`")


def build_space(name: str, sites: Sequence[Site]) -> Space:
    """The named space on a model's sites."""
    file = read_space(name)
    return Space(name, sites, file.rule, file.share)
