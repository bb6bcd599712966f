"""What there is to choose from: `sites`, `space`, `list`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from searchpet import options as o
from searchpet.commands import Plugin, answer
from searchpet.errors import unknown

LISTS = ("kinds", "grains", "scores", "strategies", "spaces", "tasks", "knobs")


def sites(
    model: o.Model = "sentence-transformers/all-MiniLM-L6-v2", json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List a model's sites: where something can be put."""
    from searchpet.survey import sites_of

    found = sites_of(model)
    answer([dataclasses.asdict(site) for site in found], json_,
            lambda views: [views.sites(found)])


def space(
    name: Annotated[str, typer.Argument(help="A space's name, or a TOML file.")] = "nano",
    model: o.Model = "sentence-transformers/all-MiniLM-L6-v2", budget: o.Budget = "0.01%",
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """Show what a space holds on a model, and what a budget buys of it."""
    from searchpet.survey import survey

    found = survey(name, model, budget)
    answer(found, json_, lambda views: views.survey(found))


def list_(
    what: Annotated[str, typer.Argument(
        help="kinds, grains, scores, strategies, spaces, tasks or knobs.")],
    json_: o.Json = False, plugin: Plugin = [], debug: o.Debug = False,  # noqa: B006
) -> None:
    """List what there is, with a line on each."""
    from searchpet.survey import described

    if what not in LISTS:
        raise unknown("list", what, LISTS)
    found = described("deltas" if what == "kinds" else what)
    answer(found, json_, lambda v: [v.table(what, "", rows=found.items(), left=2)])
