"""The file that describes a grid: TOML, checked whole before the first training.

    tasks = ["trec6", "cola"]
    budgets = ["0.01%"]
    seeds = [0, 1, 2]
    taus = [0.03, 0.1, 0.3]
    steps = 300
    methods = ["full", "uniform:bias", "default", { name = "random", structures = 3 }]

A method is a name or a table with `name`, `strategy`, `space`, `set`, `structures`, `budget`,
`masks`, `distill`, `recovery`, `inherit` and `on`.  With `keep_flops = ["60%"]` methods prune as
well, but for those with `masks = ""`; `budget` is its own instead of the grid's; `distill = true`
trains its structures on the outputs of full fine-tuning, `recovery = { logits = 0.9, ce = 0.1 }`
says on what else; `inherit = true` starts the trainings from what the search has learned
(`default` does so where the command line does); `on = "trec6"` takes the structures that are found
on that task, or on several (`a,b`), to every task of the grid.  Methods that differ in such
trainings alone share their structures: the search is done once.  A search is trained with every
seed; with `paired = true` every training has a structure of its own instead, structure k with the
k-th seed (from the first again after the last), so that a spread holds the search's own.
`stretch = 2` tries up to two taus more where the best one is at an end.  Names that mean
something: `full`, `head` and `peft_default` (references, without a budget), `adalora` and `kappa`
(PEFT's, within the budget), every strategy, `s3pet` (on the space `s3pet_mix`), and
`default`: what the command line does with no choice made.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from searchpet.ask import STRATEGY, Ask, hyperparameters
from searchpet.budget import Budget
from searchpet.errors import InputError
from searchpet.inherit import must_learn
from searchpet.outside import NAMES, OWN_SIZE, needs_peft
from searchpet.pruning import asked as prune_to
from searchpet.recovery import Recovery
from searchpet.settings import Settings
from searchpet.spacefile import read_space
from searchpet.spec import first_problem
from searchpet.teach import losses

# trained without a budget -> the budget in their lines; None: their own size
REFERENCES = {"full": 1.0, "head": 0.0, **dict.fromkeys(OWN_SIZE)}
NAMED = {"default": (STRATEGY, None), "s3pet": ("s3pet", "s3pet_mix")}  # strategy, space


class Method(BaseModel):
    """How structures are found: `full`, `head`, or a strategy on a space."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    strategy: str = ""
    space: str | None = None
    set: dict[str, bool | int | float | str] = {}
    structures: int = Field(default=1, ge=1)  # structure seeds 0, 1, ...
    masks: str | None = None  # what pruning may take out; "": this method does not prune
    distill: bool = False
    recovery: dict[str, float | str] = {}  # weights of the losses and their options
    inherit: bool | None = None  # None: no, but `default` does as the command line
    on: str = ""  # the task that structures are found on; "": the one that they are trained on
    budget: str | int | None = None  # instead of the grid's

    @property
    def reference(self) -> bool:
        """Whether it takes no budget."""
        return self.name in REFERENCES

    @property
    def searches(self) -> bool:
        """Whether a strategy finds its structures; else it is trained as it is."""
        return not self.reference and self.name not in NAMES

    def resolved(self) -> tuple[str, str | None]:
        """Strategy and space; what is not given follows from the name."""
        strategy, space = NAMED.get(self.name, (self.name, None))
        return self.strategy or strategy, self.space or (None if self.strategy else space)

    @property
    def as_usual(self) -> bool:
        """Whether its trainings start from what the command line would start them from."""
        return self.name == "default" and self.inherit is None

    def terms(self) -> Recovery | None:
        """What the structures are trained on; None: the task's loss."""
        return losses("full" if self.distill else None, self.recovery)

    def beside(self) -> list[Any]:
        """What differs from the defaults of pruning and training."""
        masks = [] if self.masks is None else [self.masks]
        flags = [name for name in ("distill", "inherit") if getattr(self, name)]
        flags += ["inherit"] if self.as_usual else []
        own = [value for value in (self.recovery, self.budget, self.on) if value]
        return [*masks, *flags, *own]


class GridFile(BaseModel):
    """The content of a grid's TOML.  A method is a name or a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tasks: tuple[str, ...] = Field(min_length=1)
    methods: tuple[Method, ...] = Field(min_length=1)
    budgets: tuple[str | int, ...] = Field(default=("0.01%",), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    taus: tuple[float, ...] = Field(default=(0.03, 0.1, 0.3), min_length=1)
    stretch: int = Field(default=0, ge=0)  # taus tried beyond the ends, while the best is there
    keep_flops: tuple[str, ...] = ()
    paired: bool = False  # a structure for each training
    space: str | None = None  # of methods that name none
    model: str = Settings.model
    steps: int = Settings.steps
    batch_size: int = Settings.batch_size
    accumulate: int = Settings.accumulate
    max_length: int = Settings.max_length
    precision: str = Settings.precision
    device: str = Settings.device

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        listed = value if isinstance(value, list | tuple) else [value]
        return [{"name": one} if isinstance(one, str) else one for one in listed]

    @field_validator("methods", "tasks", "budgets", "seeds", "taus", "keep_flops")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [getattr(one, "name", one) for one in value]
        if len(set(names)) < len(names):
            raise ValueError("values must be distinct")
        return value

    def finals(self, method: Method) -> list[tuple[int, int]]:
        """(structure seed, training seed) of every final training of a cell."""
        count, seeds = method.structures if method.searches else 1, self.seeds
        if self.paired and method.searches:
            return [(s, seeds[s % len(seeds)]) for s in range(max(count, len(seeds)))]
        return [(s, seed) for s in range(count) for seed in seeds]

    def ask(self, method: Method, budget: str, keep: str | None) -> Ask:
        """What a method's search is asked for."""
        strategy, space = method.resolved()
        prunes = keep is not None and keep != "" and method.masks != ""
        prune = prune_to(keep, None, None, method.masks, strategy) if prunes else None
        return Ask(strategy, space or self.space, method.set, budget, prune=prune)

    def inherits(self, method: Method, budget: str, keep: str | None) -> bool:
        """Whether a method's trainings start from what its searches have learned."""
        if method.as_usual:
            return self.ask(method, budget, keep).inherits
        return bool(method.inherit)

    def searched_by(self, method: Method, task: str, budget: str, keep: str) -> Method:
        """The first method that asks for the same search on `task`: one is done for all."""
        ask = self.ask(method, budget, keep)
        return next(m for m in self.methods
                    if m.searches and m.on in ("", task) and self.ask(m, budget, keep) == ask)

    def settings(self, task: str, data: str | None) -> Settings:
        """What a session on `task` needs.  Raises InputError for a value out of range."""
        return Settings(model=self.model, task=task, data=data, seed=self.seeds[0],
                        steps=self.steps, batch_size=self.batch_size,
                        accumulate=self.accumulate, max_length=self.max_length,
                        precision=self.precision, device=self.device)


def read_grid(path: str | Path) -> GridFile:
    """Read and check a grid's TOML, its methods and spaces included.

    Raises InputError naming the file, the key, the value and what is allowed.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        grid = GridFile.model_validate(content)
    except OSError as error:
        raise InputError(f"a grid must be a readable TOML file, but {path}: "
                         f"{error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"grid {path} must be TOML, but it is not: {error}") from error
    except ValidationError as error:
        raise InputError(f"grid {path}: {first_problem(error)}") from error
    for method in grid.methods:
        if method.name in NAMES:
            _as_it_is(method)
        if method.searches:
            ask = grid.ask(method, "1", None)
            hyperparameters(ask.strategy, ask.set)
            read_space(ask.named_space)
            method.terms()
            if method.inherit:
                must_learn(ask.strategy)
                _on_its_task(method)
            for keep in grid.keep_flops:
                if (prune := grid.ask(method, "1", keep).prune) is not None:
                    read_space(prune.masks)
    for budget in (*grid.budgets, *(m.budget for m in grid.methods if m.budget is not None)):
        Budget.parse(budget, 1)
    for tau in grid.taus:
        Settings(tau=tau, steps=grid.steps, batch_size=grid.batch_size,
                 accumulate=grid.accumulate, precision=grid.precision)
    return grid


def _as_it_is(method: Method) -> None:
    """Raise InputError for another library's method that is not there, or is asked for more."""
    needs_peft(method.name)
    allowed = {"name"} if method.reference else {"name", "budget"}
    if more := sorted(method.model_fields_set - allowed):
        raise InputError(f"method {method.name} is another library's and takes "
                         f"{' and '.join(sorted(allowed))} alone, but has {', '.join(more)}; drop "
                         "it, or give your method another name")


def _on_its_task(method: Method) -> None:
    """Raise InputError where deltas, and a head, of one task would be those of another."""
    if method.on:
        raise InputError(f"method {method.name} must either inherit what its search has learned "
                         f"or take structures from {method.on}, but has both; drop one")
