"""The cells of a grid: one method on one task at one budget, pruned to one share or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from searchpet.budget import Budget
from searchpet.gridfile import REFERENCES, GridFile, Method
from searchpet.outside import Outside
from searchpet.run import RunFolder
from searchpet.session import Session

SIZE = "size.json"  # of a method without a budget


@dataclass(frozen=True)
class Cell:
    """A cell, and the folders for what it leaves behind: its trainings; its structures, which it
    shares with all methods that ask for the same search.

    on: the task that its structures are found on.
    """

    task: str
    budget: str
    share: float
    method: Method
    path: Path
    home: Path
    keep: str = ""  # of the FLOPs, such as 60%; "": this cell does not prune
    inherits: bool = False  # its trainings start from what its searches have learned

    @property
    def on(self) -> str:
        return self.method.on or self.task

    @property
    def kept(self) -> float:
        return float(Fraction(self.keep[:-1].strip()) / 100) if self.keep else 1.0

    def key(self, structure: int, seed: int, *tau: float) -> tuple[Any, ...]:
        return (self.task, self.share, self.method.name, structure, seed, self.kept, *tau)

    def __str__(self) -> str:
        budget = "" if self.method.reference else f" {self.budget}"
        keep = f" keep {self.keep}" if self.keep else ""
        return f"{self.task}{budget}{keep} {self.method.name}"


def cells_of(grid: GridFile, folder: Path, task: str, session: Callable[[], Session],
             ) -> Iterator[Cell]:
    """The cells of a task, in the order in which they are worked on; references once.

    session: opened only where a budget is no share.
    """
    for i, shared in enumerate(map(str, grid.budgets)):
        for j, keep in enumerate(grid.keep_flops or ("",)):
            for method in grid.methods:
                prunes = method.masks != "" and method.searches
                own = None if method.budget is None else str(method.budget)
                if method.reference and i + j == 0:
                    yield _reference(grid, folder, task, method, session)
                elif not method.reference and (prunes or j == 0) and (own is None or i == 0):
                    budget = own or shared
                    yield _cell(grid, folder, task, budget, _share(budget, session), method,
                                keep if prunes else "")


def trainings_of(grid: GridFile) -> int:
    """Trainings of the whole grid, those that choose tau included."""
    sweep = len(grid.taus) if len(grid.taus) > 1 else 0
    total = 0
    for method in grid.methods:
        prunes = method.masks != "" and method.searches
        keeps = max(1, len(grid.keep_flops)) if prunes else 1
        budgets = 1 if method.budget is not None else len(grid.budgets)
        cells = 1 if method.reference else budgets * keeps
        total += cells * (len(grid.finals(method)) + sweep)
    return len(grid.tasks) * total


def file_name(text: str) -> str:
    """A name of a task, budget or method as a folder's name."""
    return text.replace("%", "pc").replace("/", "--").replace(":", "-").replace(" ", "_")


def _reference(grid: GridFile, folder: Path, task: str, method: Method,
               session: Callable[[], Session]) -> Cell:
    """The cell of a method without a budget; its own size is measured once."""
    cell = _cell(grid, folder, task, "", REFERENCES[method.name] or 0.0, method, "")
    if REFERENCES[method.name] is not None:
        return cell
    home = RunFolder(cell.path)
    if not home.has(SIZE):
        with session().fresh(grid.seeds[0], spoil=True) as model:
            found = Outside(method.name).attach(model, session().head, grid.steps, 0)
            home.path.mkdir(parents=True, exist_ok=True)
            home.write_json(SIZE, {"trainable": found.most,
                                   "backbone": session().identity.parameters})
    size = home.read_json(SIZE)
    return replace(cell, share=size["trainable"] / size["backbone"])


def _cell(grid: GridFile, folder: Path, task: str, budget: str, share: float, method: Method,
          keep: str) -> Cell:
    def path(task: str, name: str) -> Path:
        parts = [task, budget or "all", *([f"keep-{keep}"] if keep else []), name]
        return folder.joinpath("work", *map(file_name, parts))

    home, on, inherits = method, method.on or task, False
    if method.searches:
        home = grid.searched_by(method, on, budget, keep)
        inherits = grid.inherits(method, budget, keep)
    return Cell(task, budget, share, method, path(task, method.name), path(on, home.name), keep,
                inherits)


def _share(budget: str, session: Callable[[], Session]) -> float:
    """A budget as a fraction of the backbone's parameters."""
    if budget.endswith("%"):
        return float(Fraction(budget[:-1].strip()) / 100)
    parameters = session().identity.parameters
    return Budget.parse(budget, parameters).limit / parameters
