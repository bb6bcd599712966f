"""What a search is asked for: strategy, space and hyperparameters by name, and the budgets."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.discover import discover
from searchpet.errors import InputError, unknown
from searchpet.patterns import patterns
from searchpet.pruning import Prune, with_masks
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import SpaceFile, read_space, space_names
from searchpet.strategies import Ranking

STRATEGY = "bilevel"
SPACE = "nano"
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
OWN = "space.toml"  # what a space is called that is given itself; it lies beside the spec


@dataclass(frozen=True)
class Ask:
    """What a search is asked for.  `set` holds hyperparameters of the strategy.

    budget: one, or several with commas between, which share a search.
    must, forbid: patterns of PET that is kept in any case, or has no place in the space.
    file: the space itself, instead of one by name.
    """

    strategy: str = STRATEGY
    space: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    budget: str = "0.01%"
    count_head: bool = False
    prune: Prune | None = None
    must: Sequence[str] | None = None
    forbid: Sequence[str] | None = None
    file: SpaceFile | None = None

    @property
    def budgets(self) -> tuple[str, ...]:
        """One, or several that share a search."""
        if _THOUSANDS.fullmatch(self.budget.strip()):
            plain = self.budget.replace(",", "")
            raise InputError(f"budget must be a count without separators, such as {plain}, but "
                             f"got {self.budget!r}; several counts need a space between: "
                             f"{self.budget.replace(',', ', ')!r}")
        return tuple(text.strip() for text in self.budget.split(","))

    @property
    def named_space(self) -> str:
        return OWN if self.file else space_of(self.strategy, self.space)

    @property
    def inherits(self) -> bool:
        """Whether a structure is trained on from its search where nobody says.

        Strategies that set `INHERITS` do, for one budget and with nothing removed: there it was
        measured to pay (experiments/equal_budget).  Beside pruning it did not
        (experiments/prune), and of several budgets a search has learned for their middle alone.
        """
        name = self.strategy.partition(":")[0]
        return (bool(catalog.about("strategies", name, "INHERITS", False))
                and len(self.budgets) == 1 and self.prune is None)

    def settings(self) -> dict[str, Any]:
        """Plain values for settings.json."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file"}
        prune = asdict(self.prune) if self.prune else None
        wishes = {name: list(plain[name]) if plain[name] else None for name in ("must", "forbid")}
        return {**plain, **wishes, "space": self.named_space, "prune": prune}

    def units(self, model: nn.Module) -> Space:
        """The units on a model: of the space, and of the masks to prune by."""
        return self.on(discover(model))

    def on(self, sites: Sequence[Site]) -> Space:
        """`units`, on the sites of a model."""
        own = self.file or read_space(self.named_space)
        if all(catalog.get("deltas", rule.kind).neutral == 1 for rule in own.rule):
            raise InputError(f"a space must have units of PET, but {self.named_space} has masks "
                             "alone; give it to --masks and another one to --space")
        file = with_masks(own, self.prune)
        return Space(self.named_space, sites, file.rule, file.share,
                     patterns(self.forbid, "--forbid"))

    def required(self, space: Space) -> Tensor | None:
        """Units that must be kept: bool (units,), None if there is no such wish."""
        found = [space.matching(one, "--must") for one in patterns(self.must, "--must")]
        return torch.stack(found).any(0) if found else None


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
