"""What a search is asked for: strategy, space and hyperparameters by name, and the budgets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from searchpet import catalog
from searchpet.discover import discover
from searchpet.errors import InputError, unknown
from searchpet.pruning import Prune, with_masks
from searchpet.space import Space
from searchpet.spacefile import read_space, space_names
from searchpet.strategies import Ranking

STRATEGY = "bilevel"
SPACE = "nano"


@dataclass(frozen=True)
class Ask:
    """What a search is asked for.  `set` holds hyperparameters of the strategy."""

    strategy: str = STRATEGY
    space: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    budget: str = "0.01%"
    count_head: bool = False
    prune: Prune | None = None

    @property
    def named_space(self) -> str:
        return space_of(self.strategy, self.space)

    def settings(self) -> dict[str, Any]:
        """Plain values for settings.json."""
        prune = asdict(self.prune) if self.prune else None
        return {**asdict(self), "space": self.named_space, "prune": prune}

    def units(self, model: nn.Module) -> Space:
        """The units on a model: of the space, and of the masks to prune by."""
        file = with_masks(read_space(self.named_space), self.prune)
        space = Space(self.named_space, discover(model), file.rule, file.share)
        if bool(space.prunes.all()):
            raise InputError(f"a space must have units of PET, but {space.name} has masks alone; "
                             "give it to --masks and another one to --space")
        return space


def space_of(strategy: str, space: str | None) -> str:
    """The space to search: the one asked for, else the strategy's own, else the default.

    A strategy `NAME:VARIANT` owns the space file `NAME/VARIANT`.  Raises InputError for a variant
    without one, where the strategy has such a folder.
    """
    name, _, variant = strategy.partition(":")
    own = [path.rpartition("/")[2] for path in space_names() if path.startswith(f"{name}/")]
    if space or not own:
        return space or str(catalog.about("strategies", name, "SPACE", SPACE))
    if variant not in own:
        raise unknown(f"{name}:NAME", variant, own)
    return f"{name}/{variant}"


def hyperparameters(strategy: str, given: Mapping[str, str | float | int | bool],
                    ) -> tuple[Callable[..., Ranking], dict[str, Any]]:
    """The strategy and all its keyword arguments, `given` ones over the defaults.

    strategy: `NAME` or `NAME:VARIANT`.  Raises InputError for an unknown name or a value that is
    not of the default's type.
    """
    name, _, variant = strategy.partition(":")
    search: Callable[..., Ranking] = catalog.get("strategies", name)
    defaults = {key: p.default for key, p in inspect.signature(search).parameters.items()
                if p.kind is p.KEYWORD_ONLY}
    values = {key: _typed(f"{name}.{key}", value, defaults[key])
              for key, value in given.items() if key in defaults}
    for key in given:
        if key not in defaults:
            raise unknown(f"hyperparameter of {name}", key, defaults)
    if variant:
        if "variant" not in defaults:
            raise InputError(f"strategy must be {name}, which has no variants, but got {strategy}")
        values["variant"] = variant
    return search, {**defaults, **values}


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` (text from the command line, or a Python value) as the type of `default`."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        found = kind(value)
        if kind is float and not math.isfinite(found):
            raise ValueError("not finite")
        return found
    except (ValueError, KeyError) as error:
        raise InputError(f"{name} must be a {kind.__name__} such as {default}, but got "
                         f"{value!r}") from error
