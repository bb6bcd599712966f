"""The record of a search: how probabilities moved, in a file of bounded size.

At most `POINTS` steps are kept, evenly spread, each with the parameters that are expected and that
are decided, and for every role (of PET) and every mask what it is expected to hold and quantiles
of its units' probabilities.  Nothing is drawn at random, so a search with a record finds what the
same search finds without one.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.space import Placement, Space
from searchpet.spec import first_problem

FILE = "probabilities.json"
POINTS = 100
SAMPLE = 200  # units of a group, evenly spread, whose quantiles are taken
QUANTILES = (0.1, 0.5, 0.9)
DIGITS = 4  # significant ones; more would only make the file longer


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Group(_Frozen):
    """Units of one role, or of one mask: `masks` says which.  parameters: if all were kept."""

    name: str
    masks: bool
    units: int
    parameters: int


class Point(_Frozen):
    """A step, counted from 1.  groups: of each (expected parameters, p at QUANTILES, largest p).
    """

    step: int
    expected: float
    hard: float
    entropy: float
    groups: list[tuple[float, float, float, float, float]]


class Record(_Frozen):
    """What a search has left of its gates.  limit: parameters."""

    steps: int
    limit: int
    groups: list[Group]
    points: list[Point]


def read(folder: RunFolder) -> Record | None:
    """The record of a run, None where its search left none: not every strategy has gates.

    Raises InputError for a file that is no such record.
    """
    if not folder.has(FILE):
        return None
    try:
        found = Record.model_validate(folder.read_json(FILE))
    except ValidationError as error:
        raise InputError(f"{folder.path / FILE} must be the record of a search, but "
                         f"{first_problem(error)}; it was edited or damaged, delete it") from error
    if any(len(point.groups) != len(found.groups) for point in found.points):
        raise InputError(f"{folder.path / FILE} must have as many values as groups at every "
                         "point, but has not; it was edited or damaged, delete it")
    return found


class Trace:
    """Writes the record while a search runs; a search that goes on continues it."""

    def __init__(self, folder: RunFolder, space: Space, limit: int, steps: int) -> None:
        self.folder, self.limit, self.steps = folder, limit, steps
        self.every = -(-steps // POINTS)
        names = [_name(place, space) for place in space.placements]
        order = list(dict.fromkeys(names))
        numbers = torch.tensor([order.index(name) for name in names])
        member = numbers[space.owner]  # (units,), the group of each unit
        # a unit that lies in several groups, a whole layer say, counts to its first
        there = [i for i in range(len(order)) if bool((member == i).any())]
        self.units = [(member == i).nonzero().squeeze(-1) for i in there]
        self.samples = [_spread(own) for own in self.units]
        self.groups = [
            Group(name=order[i][0], masks=order[i][1], units=len(own),
                  parameters=int(space.cost[own].sum()))
            for i, own in zip(there, self.units, strict=True)]
        self.points: dict[int, Point] | None = None

    def __call__(self, step: int, p: Tensor, price: Tensor, figures: dict[str, Tensor]) -> None:
        """Note a step, counted from 0, if it is one of those that are kept.

        p, price (units,); figures: expected, hard, entropy.
        """
        number = step + 1
        if number % self.every and number != self.steps:
            return
        if self.points is None:
            before = read(self.folder)
            self.points = {point.step: point for point in before.points} if before else {}
        self.points[number] = Point(
            step=number, groups=self._groups(p.detach(), price.detach()),
            **{name: _short(float(value)) for name, value in figures.items()})
        kept = [point for at, point in sorted(self.points.items()) if at <= number]
        record = Record(steps=self.steps, limit=self.limit, groups=self.groups, points=kept)
        self.folder.write_text(FILE, record.model_dump_json() + "\n")

    def _groups(self, p: Tensor, price: Tensor) -> list[Any]:
        p, price = p.double().cpu(), price.double().cpu()
        held, levels = p * price, torch.tensor(QUANTILES, dtype=torch.float64)
        return [[_short(v) for v in (float(held[own].sum()), *p[some].quantile(levels).tolist(),
                                     float(p[own].max()))]
                for own, some in zip(self.units, self.samples, strict=True)]


def _name(place: Placement, space: Space) -> tuple[str, bool]:
    """What a placement is counted to, and whether that is a mask; stacks apart if several."""
    masks = place.neutral == 1
    role = f"{place.kind} of {place.site.role}" if masks else place.site.role
    several = len({site.part for site in space.sites}) > 1
    return (f"{place.site.part} {role}" if several else role), masks


def _spread(members: Tensor) -> Tensor:
    """At most SAMPLE of them, evenly spread."""
    if len(members) <= SAMPLE:
        return members
    return members[torch.linspace(0, len(members) - 1, SAMPLE).round().long()]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
