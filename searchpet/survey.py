"""A look around: a model's sites, what a space holds on it, and what there is to choose from."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from searchpet import catalog
from searchpet.backbone import load_backbone
from searchpet.budget import Budget, fill
from searchpet.discover import discover
from searchpet.site import Site
from searchpet.space import build_space
from searchpet.spacefile import read_space, space_names, tune_names
from searchpet.tunefile import read_tune


def sites_of(model: str) -> tuple[Site, ...]:
    """The sites of the backbone called `model`."""
    return discover(load_backbone(model, outputs=2, regression=False, seed=0).model)


def survey(name: str, model: str, budget: str) -> dict[str, Any]:
    """Units, prices, and what a budget buys: by kind alone, and drawn from all at random."""
    backbone = load_backbone(model, outputs=2, regression=False, seed=0)
    space = build_space(name, discover(backbone.model))
    limit = Budget.parse(budget, backbone.identity.parameters)
    limit.afford(int(space.cost.min()))
    kinds = [(p.kind, p.grain) for p in space.placements]
    groups = []
    for kind, grain in dict.fromkeys(kinds):
        mine = torch.tensor([pair == (kind, grain) for pair in kinds])[space.owner]
        cost = space.cost[mine]
        bought = fill(-cost.double(), cost, limit.limit)
        groups.append({
            "kind": kind, "grain": grain, "units": len(cost), "parameters": int(cost.sum()),
            "cheapest": int(cost.min()), "dearest": int(cost.max()), "buys": int(bought.sum())})
    draw = torch.rand(len(space), generator=torch.Generator().manual_seed(0))
    drawn = fill(draw, space.cost, limit.limit)
    return {
        "space": space.name, "model": backbone.identity.name,
        "backbone": backbone.identity.parameters, "units": len(space),
        "parameters": space.total, "cheapest": int(space.cost.min()), "budget": limit.text,
        "limit": limit.limit, "random_units": int(drawn.sum()),
        "random_parameters": space.parameters(drawn), "kinds": groups}


def described(family: str) -> dict[str, str]:
    """Name -> one line, for a family of the catalog, `spaces`, or `knobs`: tuning spaces."""
    if family == "knobs":
        return {name: read_tune(name).description for name in tune_names()}
    if family == "spaces":
        return {name: read_space(name).description for name in space_names()}
    found = {name: catalog.describe(family, name) for name in catalog.names(family)}
    if family == "strategies":
        return {name: f"{line}{_options(name)}" for name, line in found.items()}
    return found


def _options(strategy: str) -> str:
    """A strategy's hyperparameters with their defaults, and its variants."""
    search = catalog.get("strategies", strategy)
    keys = [f"{key}={p.default}" for key, p in inspect.signature(search).parameters.items()
            if p.kind is p.KEYWORD_ONLY and key != "variant"]
    own = [name.rpartition("/")[2] for name in space_names() if name.startswith(f"{strategy}/")]
    named = getattr(inspect.getmodule(search), "VARIANTS", own)
    variants = [f"{strategy}:{name}" for name in named]
    return "".join(f"\n  {' '.join(words)}" for words in (keys, variants) if words)
