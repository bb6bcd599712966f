"""Knobs: what a search takes as given, as numbers and choices that an outer loop can turn.

A knob's name says what it does:

    strategy                   the strategy that searches
    STRATEGY.KEY               a hyperparameter of it; only where that strategy runs
    kinds                      kinds of the base space that stay, such as lora+bias
    option.KIND.OPTION[.ROLE]  an option of a kind, on all sites or on those whose role begins so;
                               0 takes the kind away there
    roles, layers              where: globs joined by +, and layers as in a space file, or all
    depth.I                    whether the I-th of equal slices of the depth takes part
    share.KIND                 share of the budget that a kind may spend; 0: no share of its own
    spend                      share of the budget that is used at all
    keep_flops                 share of the blocks' FLOPs that stays; 1: nothing is pruned
    masks                      the space of masks to prune by
    tau                        relative output change per step, as in `--tau`

A space is narrowed here and never widened: every rule comes from the base space.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from searchpet import catalog
from searchpet.ask import Ask, hyperparameters, space_of
from searchpet.errors import InputError, unknown
from searchpet.pruning import Prune
from searchpet.pruning import asked as prune_to
from searchpet.settings import Settings
from searchpet.site import Site
from searchpet.spacefile import Rule, SpaceFile
from searchpet.spec import first_problem

Values = Mapping[str, Any]  # of knobs, by name

PLAIN = ("strategy", "kinds", "roles", "layers", "spend", "keep_flops", "masks", "tau")
ALL = "all"  # layers: also those norms that are in no layer
FORMS = re.compile(r"option\.(?P<kind>\w+)\.(?P<option>\w+)(?:\.(?P<role>[\w.]+))?|"
                   r"depth\.(?P<slice>\d+)|share\.(?P<share>\w+)|"
                   r"(?P<strategy>\w+)\.(?P<key>\w+)")


def check_name(name: str) -> None:
    """Raise InputError for a knob that turns nothing."""
    if name in PLAIN:
        return
    match = FORMS.fullmatch(name)
    if not match:
        raise unknown("knob", name, (*PLAIN, "STRATEGY.KEY", "option.KIND.OPTION", "depth.I",
                                     "share.KIND"))
    if kind := match["kind"] or match["share"]:
        catalog.get("deltas", kind)
    if match["strategy"]:
        _, keywords = hyperparameters(match["strategy"], {})
        if match["key"] not in keywords:
            raise unknown(f"hyperparameter of {match['strategy']}", match["key"], keywords)


def owner(name: str) -> str | None:
    """The strategy that a knob belongs to, if it is a hyperparameter."""
    match = FORMS.fullmatch(name)
    return match["strategy"] if match else None


def ask_of(values: Values, base: SpaceFile, ask: Ask, sites: Sequence[Site], limit: int,
           head: int = 0) -> Ask:
    """What the search is asked for where the knobs stand so.

    ask: the same without knobs; limit: parameters that its budget leaves for the deltas; head:
    those that it counts beside them.  Raises InputError where nothing is left to choose from.
    """
    strategy = str(values.get("strategy", ask.strategy))
    name = strategy.partition(":")[0]
    given = ask.set if name == ask.strategy.partition(":")[0] else {}
    own = {key.partition(".")[2]: v for key, v in values.items() if owner(key) == name}
    spend = float(values.get("spend", 1.0))
    budget = ask.budget if spend >= 1 else str(head + max(1, int(spend * limit)))
    found = replace(ask, strategy=strategy, set={**given, **own}, budget=budget,
                    prune=_pruned(values, ask, strategy))
    if ":" in strategy and space_of(strategy, None).startswith(f"{name}/"):
        return replace(found, space=None, file=None)  # a form brings its own space
    return replace(found, space=None, file=narrowed(values, base, sites))


def _pruned(values: Values, ask: Ask, strategy: str) -> Prune | None:
    """What is pruned, the knobs' share and masks before those that were asked for."""
    masks = values.get("masks") or (ask.prune.masks if ask.prune else None)
    if float(values.get("keep_flops", 1)) >= 1:
        return replace(ask.prune, masks=str(masks)) if ask.prune else None
    share = f"{100 * float(values['keep_flops']):.4g}%"
    return prune_to(share, None, None, masks, strategy)


def settings_of(values: Values, settings: Settings, steps: int) -> Settings:
    """The settings of a search and a training of so many steps, where the knobs stand so."""
    return replace(settings, tau=float(values.get("tau", settings.tau)), steps=steps)


def narrowed(values: Values, base: SpaceFile, sites: Sequence[Site]) -> SpaceFile:
    """The base space with the knobs' kinds, options, roles and layers; and their shares.

    Raises InputError where nothing is left.
    """
    kinds = str(values["kinds"]).split("+") if "kinds" in values else None
    layers = _layers(values)
    rules = [narrow
             for rule in base.rule if kinds is None or rule.kind in kinds
             for options, roles in _by_role(rule, values, _roles(rule, values, sites))
             for where in layers
             if (narrow := _narrow(rule, options, roles, where, sites)) is not None]
    if not rules:
        turned = ", ".join(f"{name}={value}" for name, value in values.items())
        raise InputError(f"knobs must leave something to choose from, but {turned} leave nothing "
                         "of the base space on this model")
    left = {rule.kind for rule in rules}
    share = {name.partition(".")[2]: float(value) for name, value in values.items()
             if name.startswith("share.") and float(value) > 0}
    share = {kind: value for kind, value in share.items() if kind in left and len(left) > 1}
    try:
        return SpaceFile(description=base.description, rule=tuple(rules),
                         share=share or base.share)
    except ValidationError as error:  # shares above 1 together, ...
        raise InputError(f"knobs must make a space that holds: {first_problem(error)}") from error


def _roles(rule: Rule, values: Values, sites: Iterable[Site]) -> list[str]:
    """Roles of the model that a rule selects and the knobs allow, in the model's order."""
    globs = str(values.get("roles", "*")).split("+")
    return list(dict.fromkeys(
        site.role for site in sites
        if any(fnmatch.fnmatchcase(site.role, glob) for glob in rule.select.role)
        and any(fnmatch.fnmatchcase(site.role, glob) for glob in globs)))


def _layers(values: Values) -> list[str]:
    """Layers to select, one string for each rule to be made; "" is all of them."""
    slices = {int(name.partition(".")[2]): bool(value) for name, value in values.items()
              if name.startswith("depth.")}
    if not slices:
        layers = str(values.get("layers", ALL))
        return ["" if layers == ALL else layers]
    count = max(slices) + 1
    return [f"{round(100 * i / count)}%-{round(100 * (i + 1) / count)}%"
            for i in range(count) if slices.get(i, True)]


def _by_role(rule: Rule, values: Values, roles: Sequence[str],
             ) -> list[tuple[dict[str, Any], list[str]]]:
    """Options and the roles that have them; the knob with the longest role decides."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for role in roles:
        options = dict(rule.options)
        for name in sorted(values, key=len):
            match = FORMS.fullmatch(name)
            if match and match["kind"] == rule.kind and role.startswith(match["role"] or ""):
                options[match["option"]] = values[name]
        groups.setdefault(tuple(options.items()), []).append(role)
    return [(dict(options), found) for options, found in groups.items()
            if not any(type(value) is not bool and value == 0 for _, value in options)]


def _narrow(rule: Rule, options: dict[str, Any], roles: list[str], layers: str,
            sites: Sequence[Site]) -> Rule | None:
    """The rule with options, on some roles and layers; None where it would match no site."""
    if layers and rule.select.layers:
        raise InputError("a knob on layers or depth needs a base space whose rules select no "
                         f"layers, but rule {rule.kind} selects {rule.select.layers!r}")
    update = {"role": tuple(roles), "layers": layers or rule.select.layers}
    select = rule.select.model_copy(update=update)
    fits = catalog.get("deltas", rule.kind).fits
    depth = {site.part: 1 + max(s.layer for s in sites if s.part == site.part
                                and s.form != "norm") for site in sites if site.form != "norm"}
    if not any(fits(s) and select.matches(s, depth.get(s.part, 0)) for s in sites):
        return None
    return Rule(kind=rule.kind, grain=rule.grain, options=options, select=select)
