"""A grid: methods x tasks x budgets x seeds, trained alike, in a folder that survives kill -9.

A cell is one method on one task at one budget.  In each: a structure per structure seed; one
training per value of `taus` (first structure, first seed), the best chosen by validation score;
then the final trainings with that tau, every structure with every seed.  Test data is touched
after the choice alone.

    results.jsonl  one line per final training       table.md  mean and spread over them
    sweep.jsonl    one line per training that chose  work/     structures, checkpoints, tensors

The same command continues a grid, and may run several times at once: a process takes the next
cell that no other one holds, and the system lets go of the cells of a process that died.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from searchpet import once
from searchpet.apply import apply, read_delta, write_tensors
from searchpet.budget import Budget
from searchpet.errors import InputError
from searchpet.gridcells import Cell, cells_of, file_name, trainings_of
from searchpet.gridfile import GridFile, read_grid
from searchpet.inherit import take
from searchpet.ledger import RESULT_KEY, SWEEP_KEY, Ledger, Row, alone, claim, write_table
from searchpet.multitask import open_session
from searchpet.outside import NAMES, Outside
from searchpet.recovery import Recovery
from searchpet.run import Listener, RunFolder, silent
from searchpet.session import Session
from searchpet.spec import Spec
from searchpet.teach import Teaching, taught

Trainee = Spec | Outside | str  # what a method comes to: a structure, PEFT's own, a reference


@dataclass
class Bench:
    """A grid on its way."""

    grid: GridFile
    folder: Path
    data: str | None
    say: Callable[[str], None]
    listener: Listener
    began: float = field(default_factory=time.monotonic)
    before: int = -1  # trainings done when this process began

    def __post_init__(self) -> None:
        self.results = Ledger(self.folder / "results.jsonl", RESULT_KEY)
        self.sweeps = Ledger(self.folder / "sweep.jsonl", SWEEP_KEY)

    def finished(self, cell: Cell) -> bool:
        done = self.results.rows()
        return all(cell.key(*final) in done for final in self.grid.finals(cell.method))

    def progress(self, what: str) -> None:
        """Print a line with the trainings done and the time left, at the pace so far."""
        swept = self.sweeps.rows().values()
        done = len(self.results.rows()) + len(swept)
        whole = trainings_of(self.grid) + sum(row["tau"] not in self.grid.taus for row in swept)
        self.before = done if self.before < 0 else self.before
        left = ""
        if done > self.before:
            pace = (time.monotonic() - self.began) / (done - self.before)
            left = f", about {max(0, whole - done) * pace / 60:.0f} min left"
        self.say(f"[{done}/{whole}{left}] {what}")


def run_grid(file: str | Path, *, data: str | None = None, out: str | Path | None = None,
             say: Callable[[str], None] = print, listener: Listener = silent) -> str:
    """Run what is left of a grid, write table.md, return the table.

    data: folder of task folders; out: by default the folder of the TOML; say: gets progress
    lines.  Raises InputError for whatever is wrong with the input.
    """
    grid = read_grid(file)
    bench = Bench(grid, Path(out) if out else Path(file).resolve().parent, data, say, listener)
    _same_grid(bench)
    bench.progress("start")
    elsewhere = 0
    for task in grid.tasks:
        session = functools.cache(functools.partial(_session, bench, task))
        for cell in cells_of(grid, bench.folder, task, session):
            if not bench.finished(cell):
                with claim(cell.path) as mine:
                    elsewhere += not mine
                    if mine and not bench.finished(cell):
                        _run_cell(bench, cell, session())
    if elsewhere:
        bench.progress(f"left to other processes: {elsewhere} cells")
    return write_table(bench.folder) if bench.results.rows() else ""


def _session(bench: Bench, task: str) -> Session:
    session = open_session(bench.grid.settings(task, bench.data), bench.listener)
    for warning in session.task.warnings:
        bench.say(f"warning: {task}: {warning}")
    return session


def _run_cell(bench: Bench, cell: Cell, session: Session) -> None:
    """Structures, sweep, final trainings; what is there already is kept."""
    session.job = str(cell)
    terms = cell.method.terms()
    session.teaching = None if terms is None else _teaching(bench, cell, session, terms)
    found: dict[int, tuple[Trainee, float]] = {}
    for structure, _ in bench.grid.finals(cell.method):
        if structure not in found:
            found[structure] = _structure(bench, cell, session, structure)
    tau = _best_tau(bench, cell, session, *found[0])
    done = bench.results.rows()
    for structure, seed in bench.grid.finals(cell.method):
        if cell.key(structure, seed) not in done:
            method, seconds = found[structure]
            row = _final(bench, cell, session, method, (structure, seed), tau)
            line = _line(cell, session, method, row, (structure, seed), seconds)
            bench.results.add(line)
            bench.progress(f"{cell} structure {structure} seed {seed} tau {tau:g}: "
                           f"{line['metric']} {line['score']:.4f} on {line['split']}")


def _structure(bench: Bench, cell: Cell, session: Session, seed: int) -> tuple[Trainee, float]:
    """The structure of a structure seed, and the seconds that finding it took."""
    if not cell.method.searches:
        return _as_it_is(cell, session), 0.0
    folder = RunFolder(cell.home).sub(f"structure-{seed}")
    ask = bench.grid.ask(cell.method, cell.budget, cell.keep)
    with alone(folder.path):  # a process with another cell may be at it
        if not folder.has("spec.json"):
            where = "" if cell.on == cell.task else f" on {cell.on}"
            bench.progress(f"{cell} structure {seed}: search{where}")
            session = _session(bench, cell.on) if where else session
        return once.find(session, folder, ask, seed)


def _as_it_is(cell: Cell, session: Session) -> Outside | str:
    """A reference, or another library's method within the cell's budget."""
    name = cell.method.name
    if name not in NAMES:
        return name
    if cell.method.reference:
        return Outside(name)
    return Outside(name, Budget.parse(cell.budget, session.identity.parameters).limit)


def _teaching(bench: Bench, cell: Cell, session: Session, terms: Recovery) -> Teaching:
    """What a cell's structures learn from; one process trains the task's teacher, the others
    wait.
    """
    folder = RunFolder(bench.folder / "work" / file_name(cell.task) / "teacher")
    if not cell.method.distill:
        return taught(session, folder, None, terms)
    with alone(folder.path):
        return taught(session, folder, "full", terms)


def _best_tau(bench: Bench, cell: Cell, session: Session, method: Trainee,
              seconds: float) -> float:
    """The tau with the best validation score; the first of equals.

    Where it is the largest or the smallest, more of them are tried beyond, as far as the grid
    wants: a method must not be held back by the choice of taus.
    """
    taus = list(bench.grid.taus)
    if len(taus) == 1:
        return taus[0]
    for beyond in range(bench.grid.stretch + 1):
        scores = _swept(bench, cell, session, method, seconds, taus)
        best = max(taus, key=scores.__getitem__)
        ends = sorted(taus)
        if beyond == bench.grid.stretch or best not in (ends[0], ends[-1]):
            break
        by = ends[0] / ends[1] if best == ends[0] else ends[-1] / ends[-2]
        taus.append(float(f"{best * by:.2g}"))
    return best


def _swept(bench: Bench, cell: Cell, session: Session, method: Trainee, seconds: float,
           taus: Sequence[float]) -> dict[float, float]:
    """The validation score of each tau, trained where that is not done."""
    seed = bench.grid.seeds[0]
    for tau in taus:
        if cell.key(0, seed, tau) not in bench.sweeps.rows():
            row = once.train(session, _sweep_folder(cell, tau), method, seed, tau=tau,
                             start=_start(cell, 0))
            line = _line(cell, session, method, row, (0, seed), seconds)
            bench.sweeps.add(line)
            bench.progress(f"{cell} sweep tau {tau:g}: {line['metric']} {line['score']:.4f} on "
                           "validation")
    rows = bench.sweeps.rows()
    return {tau: rows[cell.key(0, seed, tau)]["score"] for tau in taus}


def _final(bench: Bench, cell: Cell, session: Session, method: Trainee,
           seeds: tuple[int, int], tau: float) -> Row:
    """A final training.  The sweep's own training with the chosen tau is not repeated: its
    tensors get their test score now, after the choice.
    """
    structure, seed = seeds
    test = _has_test(session)
    swept = _sweep_folder(cell, tau)
    if seeds == (0, bench.grid.seeds[0]) and swept.has("training.json"):
        row = dict(swept.read_json("training.json"))
        if not test:
            return row
        if isinstance(method, Spec) and swept.has("delta.safetensors"):
            return {**row, "score": _test_score(session, method, swept, seed), "split": "test"}
    folder = RunFolder(cell.path).sub(f"structure-{structure}-seed-{seed}")
    row = once.train(session, folder, method, seed, tau=tau, test=test,
                     start=_start(cell, structure))
    return {**row, "split": "test" if test else "validation"}


def _start(cell: Cell, structure: int) -> dict[str, Tensor] | None:
    """What a structure's search has left it to begin with, if it is to be used."""
    if not cell.inherits:
        return None
    return take(RunFolder(cell.home).sub(f"structure-{structure}"))


def _test_score(session: Session, spec: Spec, folder: RunFolder, seed: int) -> float:
    """The first metric on test of a training's saved tensors."""
    with session.fresh(seed, spoil=spec.keep is not None) as model:
        apply(model, spec, head=session.head, seed=seed, remove=None)
        write_tensors(model, session.head, read_delta(folder)[0], folder.path)
        return float(session.evaluate(model, "test")[session.task.metrics[0]])


def _line(cell: Cell, session: Session, method: Trainee, row: Mapping[str, Any],
          seeds: tuple[int, int], search_seconds: float) -> Row:
    """A line of results.jsonl or sweep.jsonl.

    It says which structure was trained: another processor may find another one.
    """
    return {
        "task": cell.task, "budget": cell.share, "method": cell.method.name,
        "structure_seed": seeds[0], "seed": seeds[1], "score": row["score"],
        "metric": session.task.metrics[0], "split": row.get("split", "validation"),
        "trainable": row["trainable"], "tau": row["tau"], "search_seconds": search_seconds,
        "train_seconds": row["train_seconds"],
        **({"structure": method.hash[:12]} if isinstance(method, Spec) else {}),
        **({"keep": cell.kept} if cell.keep else {}),
        **({"most": row["most"]} if row.get("most") else {}),
    }


def _has_test(session: Session) -> bool:
    test = session.splits.get("test")
    return test is not None and test.labels is not None


def _sweep_folder(cell: Cell, tau: float) -> RunFolder:
    return RunFolder(cell.path).sub(f"sweep-{tau:g}")


def _same_grid(bench: Bench) -> None:
    """Refuse to mix trainings of two grids; the lists of tasks, methods and so on may grow.

    Raises InputError naming what changed since the folder's first run.
    """
    folder = RunFolder(bench.folder).sub("work")
    lists = {"tasks", "budgets", "methods", "seeds", "keep_flops"}
    now = bench.grid.model_dump(mode="json", exclude=lists)
    now["first seed"] = bench.grid.seeds[0]
    now |= {f"method {m.name}": [*m.resolved(), m.set, *m.beside()] for m in bench.grid.methods}
    before = folder.read_json("grid.json") if folder.has("grid.json") else {}
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            raise InputError(f"a grid must keep its settings while it grows, but {key} was "
                             f"{before[key]!r} in {bench.folder} and is {now[key]!r} now; take "
                             "another --out, or move the old results away")
    with claim(folder.path) as mine:
        if mine:
            folder.write_json("grid.json", {**before, **now})
