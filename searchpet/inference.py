"""What a pruned model costs at inference, as a function of which mask coordinates live.

Every measure is a sum of products: sum_t coefficient_t * product of z over the ids of t.  A row of
a query projection costs where its attention head, its sublayer and its layer all live, so no term
has more than three factors.  With z = p this is the expected cost of CoFi (Xia et al. 2022,
arXiv:2204.00408, sec. 3.1), with z in {0, 1} the exact one.

Measures count the blocks alone, not embeddings, pooler or task head:
- flops: of the linears (2 T d_in d_out) and of attention (4 T T d), for one text of 128 tokens,
  or as many as the model has positions for, or one image;
- weights: elements of the linears' matrices.

A matrix of which k singular directions are left costs as two factors, k (d_in + d_out), or as a
whole, d_in d_out, whichever is less.  So a share of the weights is one of the dense matrices, and
a matrix whose factors would be larger than itself stays whole, at no cost for further directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchpet.hosts import NOTHING, Hosts
from searchpet.site import Site

FACTORS = 3


@dataclass(frozen=True)
class Factored:
    """Matrices that are kept as two factors or whole, whichever costs less.

    coefficient (parts,) float64: what a mask's coordinate costs;  ids (parts,) int64: its id;
    matrix (parts,) int64: whose it is;  whole (matrices,) float64: what that costs undivided.
    """

    coefficient: Tensor
    ids: Tensor
    matrix: Tensor
    whole: Tensor

    def at(self, z: Tensor) -> Tensor:
        """Their cost at gates z (ids,).  The gradient is that of the factors everywhere.

        Were it 0 where the whole is cheaper, a search would never see what directions cost before
        half of them are gone.
        """
        whole = self.whole.to(z)
        parts = self.coefficient.to(z) * z[self.ids.to(z.device)]
        factors = torch.zeros_like(whole).index_add(0, self.matrix.to(z.device), parts)
        cheaper = torch.minimum(factors, whole)
        total: Tensor = (factors + (cheaper - factors).detach()).sum()
        return total


@dataclass(frozen=True)
class Cost:
    """coefficient (terms,) float64; factors (terms, 3) int64: ids, or `ids` for a factor of 1;
    factored: matrices with masks of their directions, if there are any.
    """

    coefficient: Tensor
    factors: Tensor
    ids: int
    factored: Factored | None = None

    def at(self, z: Tensor) -> Tensor:
        """The cost at gates z (ids,), a number of z's dtype; differentiable."""
        padded = torch.cat([z, z.new_ones(1)])
        coefficient, factors = self.coefficient.to(z), self.factors.to(z.device)
        total: Tensor = (coefficient * padded[factors].prod(-1)).sum()
        return total if self.factored is None else total + self.factored.at(z)

    @property
    def dense(self) -> float:
        """Nothing removed."""
        return float(self.at(torch.ones(self.ids, dtype=torch.float64)))

    @property
    def floor(self) -> float:
        """Everything removed that a mask can remove."""
        return float(self.at(torch.zeros(self.ids, dtype=torch.float64)))


def build_cost(hosts: Hosts, ids: int, per: Mapping[Site, Mapping[int, float]],
               fixed: Mapping[Site, float], factored: Mapping[Site, float] | None = None) -> Cost:
    """A cost from what each site costs per id of its features, and apart from them; factored:
    what an element costs, of matrices with masks of their directions.
    """
    terms: dict[tuple[int, ...], float] = defaultdict(float)
    for site in {**per, **fixed}:
        above = hosts.ties(site).above
        for i, value in per.get(site, {}).items():
            terms[_key((*above, i), ids)] += value
        if site in fixed:
            terms[_key(above, ids)] += fixed[site]
    return Cost(torch.tensor(list(terms.values()), dtype=torch.float64),
                torch.tensor(list(terms), dtype=torch.int64).reshape(-1, FACTORS), ids,
                _factored(hosts, factored) if factored else None)


def flops(sites: Sequence[Site], hosts: Hosts, ids: int,
          measured: Mapping[tuple[str, int], float], tokens: int | None = None) -> Cost:
    """FLOPs of the blocks for one input of `tokens` tokens, None if only the count knows.

    measured: what was counted on the dense model, by (part, layer).  A layer that is called more
    than once counts as often.  What the formula does not see (relative positions, say) is spread
    evenly over the features of the attentions.
    """
    per: dict[Site, dict[int, float]] = {}
    fixed: dict[Site, float] = {}
    factored: dict[Site, float] = {}
    for block, total in measured.items():
        inside = [s for s in sites if (s.part, s.layer) == block and s.form == "linear"]
        mixers = [s for s in inside if s.role.endswith("attention.output")]
        linear = sum(2.0 * s.d_in * s.d_out for s in inside)  # per token
        width = sum(s.d_in for s in mixers)
        length = tokens or _tokens(linear, 4.0 * width, total)
        once = linear * length + 4.0 * length**2 * width
        calls = max(1, round(total / once))
        own_per, own_fixed, own_factored = _linears(inside, hosts, 2.0 * length * calls)
        per |= own_per
        fixed |= own_fixed
        factored |= own_factored
        each = (total - calls * linear * length) / width if width else 0.0
        for site in mixers:
            for i, count in _counts(hosts.ties(site).ins).items():
                if i == NOTHING:
                    fixed[site] = fixed.get(site, 0.0) + each * count
                else:
                    per[site][i] += each * count
    return build_cost(hosts, ids, per, fixed, factored)


def _tokens(linear: float, square: float, total: float) -> float:
    """T with linear T + square T^2 = total."""
    if not square:
        return total / linear
    return float(((linear**2 + 4 * square * total) ** 0.5 - linear) / (2 * square))


def weights(sites: Sequence[Site], hosts: Hosts, ids: int) -> Cost:
    """Elements of the linears' matrices in the blocks."""
    return build_cost(hosts, ids, *_linears(sites, hosts, 1.0))


def _linears(sites: Sequence[Site], hosts: Hosts, unit: float,
             ) -> tuple[dict[Site, dict[int, float]], dict[Site, float], dict[Site, float]]:
    """unit * d_in * d_out of every linear, split by what its features hang on; at last `unit` of
    those whose directions are masked.
    """
    per: dict[Site, dict[int, float]] = defaultdict(dict)
    fixed: dict[Site, float] = {}
    factored: dict[Site, float] = {}
    for site in sites:
        if site.form != "linear":
            continue
        if (site.path, site.role) in hosts.directions:
            factored[site] = unit
            continue
        ties = hosts.ties(site)
        ids, other = ((ties.ins, site.d_out) if bool((ties.ins != NOTHING).any())
                      else (ties.outs, site.d_in))
        for i, count in _counts(ids).items():
            if i == NOTHING:
                fixed[site] = unit * count * other
            else:
                per[site][i] = unit * count * other
    return per, fixed, factored


def _factored(hosts: Hosts, units: Mapping[Site, float]) -> Factored:
    """units: what an element of each site's matrix costs."""
    coefficient, ids, matrix = [], [], []
    for number, (site, unit) in enumerate(units.items()):
        mask = hosts.directions[site.path, site.role]
        rank = min(site.d_in, site.d_out)
        starts = torch.arange(len(mask.ids)) * mask.run  # the last group may be shorter
        counts = (rank - starts).clamp(max=mask.run)
        coefficient.append(unit * (site.d_in + site.d_out) * counts.double())
        ids.append(mask.ids)
        matrix.append(torch.full_like(mask.ids, number))
    whole = [unit * site.d_in * site.d_out for site, unit in units.items()]
    return Factored(torch.cat(coefficient), torch.cat(ids), torch.cat(matrix),
                    torch.tensor(whole, dtype=torch.float64))


def _counts(ids: Tensor) -> dict[int, int]:
    values, counts = ids.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _key(factors: tuple[int, ...], ids: int) -> tuple[int, ...]:
    """At most FACTORS ids, sorted, filled up with the id of the constant 1."""
    distinct = sorted(set(factors))
    assert len(distinct) <= FACTORS  # head or neuron, sublayer, layer
    return (*distinct, *[ids] * (FACTORS - len(distinct)))
