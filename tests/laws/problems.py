"""A small search problem on a tiny model, as a strategy sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from searchpet.calibrate import probe, rates
from searchpet.discover import discover
from searchpet.pruning import Prune, keep_of
from searchpet.run import RunFolder, StageLoop
from searchpet.space import Space
from searchpet.strategies import Problem
from searchpet.supernet import Supernet
from tests.laws import families as tiny

Batch = dict[str, Tensor]


class Draws:
    """Endless batches of random tokens; draws[step] is a function of (seed, step).

    label: batch -> (rows,) long; by default whether the first token is a high one.
    """

    def __init__(self, seed: int, rows: int = 8, words: int = tiny.WORDS,
                 label: Callable[[Batch], Tensor] | None = None) -> None:
        self.seed, self.rows, self.words, self.label = seed, rows, words, label

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        ids = torch.randint(2, self.words, (self.rows, 6), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        high = (ids[:, 0] > self.words // 2).long()
        return {**batch, "labels": self.label(batch) if self.label else high}


class Cut:
    """In the place of a problem's loss: raises KeyboardInterrupt at the n-th call; counts them."""

    def __init__(self, given: Problem, stop: int = 0) -> None:
        self.plain, self.stop, self.made = given.loss, stop, 0
        given.loss = self

    def __call__(self, batch: Batch) -> Tensor:
        self.made += 1
        if self.made == self.stop:
            raise KeyboardInterrupt
        return self.plain(batch)


def problem(model: nn.Module, space: Space, limit: int, *, steps: int = 4, seed: int = 0,
            head: frozenset[str] | None = None, tau: float = 0.1, train: Draws | None = None,
            valid: Draws | None = None, folder: RunFolder | None = None,
            every: float = 1e9) -> Problem:
    """A supernet on the model and all that a strategy is given beside it."""
    net = Supernet(model, space, tiny.head_of(model) if head is None else head, seed)
    train, valid = train or Draws(seed), valid or Draws(seed + 1)
    generator = torch.Generator().manual_seed(seed)

    def loss(batch: Batch) -> Tensor:
        return model(**batch).loss

    loops: list[StageLoop] = []

    def loop(steps: int, **state: Any) -> StageLoop:
        stage = f"search-{len(loops) + 1}" if loops else "search"
        loops.append(StageLoop(folder, stage, steps, seed, generator, state=state, every=every))
        return loops[-1]

    training = model.training
    model.eval()  # a probe without dropout
    found = rates(probe(net.grafts, lambda: loss(train[0])), tau, {"head": 5e-3})
    model.train(training)
    return Problem(net=net, space=space, limit=limit, train=train, valid=valid, loss=loss,
                   rates=found, steps=steps, loop=loop, generator=generator)


def classified(rules: Sequence[Any], limit: int, *, steps: int, share: str = "",
               folder: Path | None = None) -> Problem:
    """A problem with dropout, which saves every step; share: of the FLOPs, where it prunes."""
    config = transformers.BertConfig(**tiny.TEXT, num_labels=3)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    space = Space("test", discover(model), rules)
    given = problem(model, space, limit, steps=steps, every=0.0,
                    folder=RunFolder(folder) if folder else None)
    if share:
        given.keep = keep_of(Prune("flops", share), model, space)
    return given
