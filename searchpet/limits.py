"""Limits: the budgets of a search on the units of a space, solved in order, prune first.

A PET unit's price depends on what pruning leaves of its host: a LoRA atom on a query projection
of which half the attention heads go has half the rows.  So the prune units are settled first, on
what inference may cost, then the PET units on the parameters that the rest costs.  In a search
`shift` does so with probabilities, at its end `fill` does so exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from searchpet.budget import fill, fill_groups, fill_to, shift, shift_to
from searchpet.errors import InputError
from searchpet.hosts import Hosts, Live, Mask
from searchpet.inference import Cost
from searchpet.knapsack import pack
from searchpet.prices import Prices
from searchpet.site import Site
from searchpet.space import Placement, Space
from searchpet.spec import Entry, Ratio


@dataclass(frozen=True)
class Keep:
    """What inference may cost: `limit` of the measure (flops, weights, latency), as asked for in
    `text`; `cost` gives it as a function of the gates (units,).
    """

    measure: str
    text: str
    limit: float
    cost: Cost


def masks_of(space: Space) -> list[Mask]:
    """The space's prune masks; ids are units."""
    return [Mask(p.site, space.unit[p.start : p.start + p.width], p.run, p.atoms)
            for p in space.placements if p.neutral == 1]


class Limits:
    """limit: parameters of the kept PET units together;  keep: what inference may cost.

    settled: bool (units,), which prune units stay, where that is decided already.
    must: bool (units,), PET units that are kept in any case, out of their kind's share first.
    """

    def __init__(self, space: Space, limit: int, keep: Keep | None = None,
                 settled: Tensor | None = None, must: Tensor | None = None) -> None:
        if bool(space.prunes.any()) != (keep is not None):
            raise InputError("prune masks in a space and a limit on what is kept need each other: "
                             "give --keep-flops with the kinds heads, neurons, sublayers, layers, "
                             f"ranks, but space {space.name} has {int(space.prunes.sum())} of "
                             f"their units and the limit is {keep.text if keep else 'absent'}")
        self.space, self.limit, self.keep, self.settled = space, limit, keep, settled
        self.must = torch.zeros(len(space), dtype=torch.bool) if must is None else must.cpu()
        self._some = bool(self.must.any())
        self.prune = space.prunes.nonzero().squeeze(-1)
        self.pet = (~space.prunes).nonzero().squeeze(-1)
        self.hosts = Hosts(space.sites, masks_of(space)) if keep else None
        self._prices = Prices(space, self.hosts) if self.hosts else None
        self._cost = space.cost.double()

    def at(self, limit: int, must: Tensor | None = None) -> Limits:
        """The same with another limit on PET, and other units that are kept in any case."""
        other = copy(self)
        other.limit = limit
        if must is not None:
            other.must, other._some = must, bool(must.any())
        return other

    def price(self, z: Tensor) -> Tensor:
        """Expected parameters of each unit (units,), float64, where prune gates are z (units,)."""
        if self._prices is None:
            self._cost = self._cost.to(z.device)  # sent once
            return self._cost
        return self._prices.at(z)

    def shift(self, alpha: Tensor, beta: float = 1.0, ease: float = 0.0) -> Tensor:
        """p (units,) float64 that meets both budgets in expectation; differentiable in alpha.

        ease in [0, 1]: how far the limit on what is kept is still relaxed towards everything.
        """
        if self.keep is None:
            return self._shared(alpha, self.price(alpha), beta, torch.arange(len(alpha)))
        p = alpha.detach().new_ones(len(self.space), dtype=torch.float64)
        prune, pet = self.prune.to(alpha.device), self.pet.to(alpha.device)
        p = p.index_put((prune,), self._open(alpha[prune], beta, ease))
        price = self.price(p.detach())[pet]
        return p.index_put((pet,), self._shared(alpha[pet], price.clamp(min=1e-9), beta, self.pet))

    def _shared(self, alpha: Tensor, price: Tensor, beta: float, pet: Tensor) -> Tensor:
        """`shift` of PET units, of each part of the budget for itself; pet: their numbers.

        What must be kept has p = 1, and the rest what it leaves.
        """
        if not self.space.share and not self._some:
            return shift(alpha, price, self.limit, beta)
        must = self.must[pet]
        p = must.to(alpha.device).double()
        whole = [(torch.arange(len(pet)), float(self.limit))]
        for mine, limit in self._parts(pet) if self.space.share else whole:
            held, mine = mine[must[mine]].to(alpha.device), mine[~must[mine]].to(alpha.device)
            left = limit - float(price[held].sum())
            if left > 0:
                p = p.index_put((mine,), shift(alpha[mine], price[mine], left, beta))
        return p

    def _parts(self, pet: Tensor) -> list[tuple[Tensor, float]]:
        """(places among `pet`, parameters) of every part of the budget; units of none get 0."""
        names = [p.kind for p in self.space.placements]
        share, parts = self.space.share, []
        for kind in (*share, None):  # None: the kinds without a share
            mine = torch.tensor([n == kind or (kind is None and n not in share) for n in names])
            places = mine[self.space.owner[pet]].nonzero().squeeze(-1)
            part = share[kind] if kind else max(0.0, 1 - sum(share.values()))
            if len(places) and part > 0:
                parts.append((places, part * self.limit))
        return parts

    def _open(self, alpha: Tensor, beta: float, ease: float) -> Tensor:
        """p of the prune units, (prune units,)."""
        assert self.keep is not None
        if self.settled is not None:
            return self.settled[self.prune].to(alpha.device).double()
        return shift_to(alpha, self._cost_of_prune(alpha.device), self._eased(ease), beta)

    def _eased(self, ease: float) -> float:
        """The limit on what is kept, relaxed towards everything."""
        assert self.keep is not None
        return self.keep.limit + ease * (self.keep.cost.dense - self.keep.limit)

    def _cost_of_prune(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The cost as a function of the prune units' gates alone."""
        assert self.keep is not None
        cost, prune = self.keep.cost, self.prune.to(device)
        ones = torch.ones(len(self.space), dtype=torch.float64, device=device)
        return lambda q: cost.at(ones.index_put((prune,), q))

    def fill(self, score: Tensor, *, density: bool = False, group: Tensor | None = None,
             ease: float = 0.0) -> Tensor:
        """keep (units,) bool: best scores first, never above either budget.

        ease in [0, 1]: how far the limit on what is kept is still relaxed towards everything.

        density: PET units are those of the greatest summed score, and not the best one by one.
        group: int64 (units,), PET units that are kept or left together and have the same score.
        """
        score = score.detach().cpu().double()
        keep = torch.ones(len(self.space), dtype=torch.float64)
        if self.settled is not None:
            keep[self.prune] = self.settled.cpu()[self.prune].double()
        elif self.keep is not None:
            guarded = score.clone()
            guarded[self.lifeline(score)] = torch.inf
            keep[self.prune] = fill_to(self._places(guarded), self._cost_of_prune(keep.device),
                                       self._eased(ease)).double()
            keep = self._closed(keep, guarded)
        price = self.price(keep).round().long()[self.pet]
        alive = price > 0
        chosen, cost_of = self.pet[alive], price[alive]
        keep[self.pet] = 0
        worth = score[chosen]

        def take(mine: Tensor, limit: int) -> Tensor:
            if group is not None:
                return fill_groups(worth[mine], cost_of[mine], limit, group[chosen[mine]])
            return (pack if density else fill)(worth[mine], cost_of[mine], limit)

        keep[chosen[self._fill(chosen, cost_of, take)]] = 1
        return keep.bool()

    def _fill(self, chosen: Tensor, cost: Tensor, take: Callable[[Tensor, int], Tensor],
              ) -> Tensor:
        """bool (chosen,): what must be, then each part of the budget for itself, then what they
        left over.  take: places among `chosen` and a limit -> bool, which of them.
        """
        kept = self.must[chosen].clone()
        for mine, limit in self._parts(chosen) if self.space.share else ():
            left = int(limit) - int(cost[mine][kept[mine]].sum())
            mine = mine[~kept[mine]]
            kept[mine[take(mine, left)]] = True
        rest = (~kept).nonzero().squeeze(-1)
        kept[rest[take(rest, self.limit - int(cost[kept].sum()))]] = True
        return kept

    def _places(self, score: Tensor) -> Tensor:
        """Scores of the prune units (prune units,) by which they are taken one after another.

        A unit is worth no more than what it hangs on and comes after it.  Otherwise the neurons of
        a closed feed-forward would all be taken for nothing, and opening it would cost all of them
        at once, or not fit.
        """
        worth, depth = score.clone(), torch.zeros(len(score), dtype=torch.int64)
        for units, above in self._hanging:
            worth[units] = worth[units].minimum(score[above].min())
            depth[units] = depth[units].maximum(torch.tensor(len(above)))
        order = score.argsort(descending=True, stable=True)
        order = order[depth[order].argsort(stable=True)]
        order = order[worth[order].argsort(descending=True, stable=True)]
        return -order.argsort()[self.prune].double()

    def _closed(self, keep: Tensor, score: Tensor) -> Tensor:
        """`keep` (units,) without gates that have nothing left behind them, by their own score.

        A gate that is worth more than all behind it stays: its sublayer's bias is left.
        """
        beneath: dict[int, list[Tensor]] = defaultdict(list)
        for units, above in sorted(self._hanging, key=lambda pair: -len(pair[1])):
            for gate in above.tolist():
                beneath[gate].append(units)
        for gate, parts in sorted(beneath.items(), key=lambda item: len(item[1])):
            units = torch.cat(parts)
            if not bool(keep[units].any()) and score[gate] < score[units].max():
                keep[gate] = 0
        return keep

    @cached_property
    def _hanging(self) -> list[tuple[Tensor, Tensor]]:
        """Prune units, and the gates of the sublayer and the layer that they hang on."""
        assert self.hosts is not None
        found = []
        for p in self.space.placements:
            if p.neutral == 1:
                units = self.space.unit[p.start : p.start + p.width]
                own = set(units.tolist())
                above = [i for i in self.hosts.ties(p.site).above if i not in own]
                if above:
                    found.append((units, torch.tensor(above)))
        return found

    def lifeline(self, score: Tensor) -> Tensor:
        """Prune units that always stay: in every stack a layer with something in each sublayer.

        The layer is the one with the best mean score (units,), what stays in it the best as well.
        """
        layers: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for p in self.space.placements:
            if p.neutral == 1:
                layers[p.site.part, p.site.layer].append(
                    self.space.unit[p.start : p.start + p.width])
        best: dict[str, tuple[float, Tensor]] = {}
        for (part, _), masks in layers.items():
            mean = float(score[torch.cat(masks)].mean())
            if part not in best or mean > best[part][0]:
                best[part] = mean, torch.stack([units[score[units].argmax()] for units in masks])
        return torch.cat([units for _, units in best.values()])

    def parameters(self, keep: Tensor) -> int:
        """Exact parameters of the kept PET units on what is left of their hosts."""
        price = self.price(keep.cpu().double()).round().long()
        return int(price[keep.cpu() & ~self.space.prunes].sum())

    def kept(self, keep: Tensor) -> float:
        """What the kept units leave of the measure on inference."""
        assert self.keep is not None
        return float(self.keep.cost.at(torch.where(
            self.space.prunes, keep.cpu(), torch.ones_like(keep.cpu())).double()))

    def plan(self, keep: Tensor) -> tuple[Ratio, ...]:
        """Shares that the prune masks keep, by role and relative depth."""
        depth = {part: max(s.layer for s in self.space.sites if s.part == part and s.form
                           != "norm") for part in {s.part for s in self.space.sites}}
        found = []
        for p in self.space.placements:
            if p.neutral == 1:
                units = self.space.unit[p.start : p.start + p.width]
                above = self.hosts.ties(p.site).above if self.hosts else ()
                alive = all(bool(keep[i]) for i in above)
                found.append(Ratio(
                    part=p.site.part, role=p.site.role, kind=p.kind,
                    depth=p.site.layer / max(1, depth[p.site.part]),
                    kept=float(keep.cpu()[units].double().mean()) if alive else 0.0))
        return tuple(found)

    def entries(self, keep: Tensor) -> tuple[Entry, ...]:
        """The spec's entries: what is removed already has no mask or PET entry of its own."""
        entries = self.space.entries(keep)
        if self.hosts is None:
            return entries
        sites = {(site.path, site.role): site for site in self.hosts.sites}
        atoms = {(p.site.path, p.site.role, p.kind): p for p in self.space.placements}
        found = []
        for entry in entries:
            site = sites[entry.path, entry.role]
            place = atoms[entry.path, entry.role, entry.kind]
            left = self._left(entry, site, place, keep.cpu())
            if left is not None:
                found.append(left)
        return tuple(found)

    def _left(self, entry: Entry, site: Site, place: Placement, keep: Tensor) -> Entry | None:
        """The entry without what hangs on something removed; None if nothing is left."""
        assert self.hosts is not None
        if place.neutral == 1:
            above = self.hosts.ties(site).above
            own = set(self.space.unit[place.start : place.start + place.width].tolist())
            return entry if all(bool(keep[i]) for i in above if i not in own) else None
        live = self.hosts.live(site, keep)
        if live is None:
            return None
        kept = kept_channels(entry.kept, place.atoms, place.width, site, live)
        return entry.model_copy(update={"kept": kept}) if kept else None


def kept_channels(kept: Sequence[int], atoms: bool, width: int, site: Site, live: Live,
                  ) -> list[int]:
    """Coordinates that still have an output feature, in the original numbering."""
    if atoms or live.outs is None or width != site.d_out:
        return list(kept)
    left = set(live.outs.tolist())
    return [c for c in kept if c in left]
