"""Mixed batches: every row of a batch with the deltas and the head of its own task.

A module that any task has deltas at carries one hook, which hands the tensors to the deltas of the
task that is on.  Where several are, rows are grouped by task: each task's deltas see their rows
alone, so what they compute is what they compute in a batch of these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.errors import InputError
from searchpet.hooks import Act, Enter, Remember, first, replace_first

Group = tuple[str, Tensor]  # a task and its rows, int64 (rows,), ascending
# what says how many rows a call has, the first that is there
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids",
          "decoder_inputs_embeds")


TOKENS_FIRST = ("led", "longformer", "xlnet")  # their tensors are (tokens, rows, .)


class Turn:
    """Whose turn it is: one task's, or each row's own.

    alone: the task of all rows;  names: the task of each row, where they differ in principle.
    factor: into how many rows generation has spread each one, as beams or several answers.
    """

    def __init__(self) -> None:
        self.alone: str | None = None
        self.names: tuple[str, ...] = ()
        self.factor = 1
        self.generating = False
        self._groups: dict[tuple[int, torch.device], list[Group]] = {}

    def set(self, names: str | Sequence[str] | None) -> None:
        self.alone = names if isinstance(names, str) else None
        self.names = () if names is None or isinstance(names, str) else tuple(names)
        self.factor = 1
        self._groups = {}

    def check(self, rows: int) -> None:
        """Before a pass over so many rows.  Raises InputError where names do not fit them."""
        if self.alone is not None:
            return
        if not self.names:
            raise InputError("a task must be set before the model is called; call set_task")
        self.factor, rest = divmod(rows, len(self.names))
        if rest or (self.factor != 1 and not self.generating):
            raise InputError(f"set_task must name a task for each row, but the batch has {rows} "
                             f"rows and {len(self.names)} names are set")

    def groups(self, x: Tensor) -> list[Group]:
        """The rows of x by task.  x: (rows, ...), or (rows * tokens, features) in a row.

        Raises InputError where x has no rows: what all rows share cannot differ between them.
        """
        key = len(x), x.device
        if key not in self._groups:
            rows = len(self.names) * self.factor
            flat, rest = divmod(len(x), rows)
            if rest or (flat != 1 and x.dim() > 2):
                raise InputError(f"rows with tasks of their own need every module with deltas to "
                                 f"see {rows} rows, but one sees {tuple(x.shape)}, which all rows "
                                 "share; set one task for the batch")
            each = flat * self.factor
            of = [name for name in self.names for _ in range(each)]
            self._groups[key] = [
                (name, torch.tensor([i for i, own in enumerate(of) if own == name],
                                    device=x.device)) for name in dict.fromkeys(self.names)]
        return self._groups[key]


def rows_of(args: Any, kwargs: Any) -> int:
    """How many rows a call of the model has."""
    found = next((kwargs[name] for name in INPUTS if isinstance(kwargs.get(name), Tensor)), None)
    return len(first(args, kwargs) if found is None else found)


class Check:
    """Pre-hook of the whole model: does every row have a task?"""

    before = True

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.turn.check(rows_of(args, kwargs))


class Before:
    """Pre-hook of one module: of: task -> what it does to the input there."""

    before = True

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.of: dict[str, list[Enter | Remember]] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.turn.alone is not None:
            for hook in self.of.get(self.turn.alone, ()):
                args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            return args, kwargs
        x = changed = first(args, kwargs)
        for name, rows in self.turn.groups(x) if self.turn.names else ():
            for hook in self.of.get(name, ()):
                own = changed[rows]
                if isinstance(hook, Remember):
                    hook.keep(own)
                else:
                    changed = changed.index_copy(0, rows, hook.change(own))
        return (args, kwargs) if changed is x else replace_first(args, kwargs, changed)


class After:
    """Hook of one module: of: task -> its deltas there."""

    before = False

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.of: dict[str, list[Act]] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.turn.alone is not None:
            for act in self.of.get(self.turn.alone, ()):
                output = act(module, args, kwargs, output)
            return output
        y = output[0] if isinstance(output, tuple) else output
        changed: Tensor | None = None
        for name, rows in self.turn.groups(y) if self.turn.names else ():
            for act in self.of.get(name, ()):
                x = first(args, kwargs)[rows] if act.reads_x else None
                changed = y.clone() if changed is None else changed
                changed.index_copy_(0, rows, act.change(x, y[rows]))
        if changed is None:
            return output
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class Switch(nn.Module):
    """In the place of a module of the head: one for each task.

    blank: the module that was there.  Rows of tasks with fewer outputs end in -inf.
    """

    def __init__(self, turn: Turn, blank: nn.Module) -> None:
        super().__init__()
        self.turn, self.blank = turn, (blank,)  # in a tuple: no submodule
        self.names: list[str] = []
        self.of = nn.ModuleList()

    def add(self, name: str, module: nn.Module) -> None:
        self.names.append(name)
        self.of.append(module)

    def drop(self, name: str) -> None:
        del self.of[self.names.index(name)]
        self.names.remove(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (rows, ..., features) -> (rows, ..., most outputs of the tasks in the batch)."""
        def of(name: str) -> nn.Module:
            return self.of[self.names.index(name)]

        if self.turn.alone is not None:
            return of(self.turn.alone)(x, *args, **kwargs)
        groups = self.turn.groups(x)
        found = [of(name)(x[rows], *args, **kwargs) for name, rows in groups]
        width = max(y.shape[-1] for y in found)
        whole = found[0].new_full((len(x), *found[0].shape[1:-1], width), float("-inf"))
        for (_, rows), y in zip(groups, found, strict=True):
            whole[rows, ..., : y.shape[-1]] = y
        return whole
