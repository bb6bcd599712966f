"""From a split of texts to padded batches: encode, halve, shuffle, pass over.

Batches are length-bucketed: rows are shuffled, sorted by length inside windows of `WINDOW`
batches, and the batches shuffled again: little padding, and yet every epoch is a fresh draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from searchpet.errors import InputError

WINDOW = 50  # batches sorted together: enough for tight lengths, few enough to stay random
Batch = dict[str, Tensor]


class Rows(Protocol):
    """What `encode` needs of a split: one or two text columns, and labels if there are any."""

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def labels(self) -> tuple[int, ...] | tuple[float, ...] | None: ...


class Encodings(Protocol):
    """An encoded split, of one task or of several."""

    def __len__(self) -> int: ...
    @property
    def labels(self) -> Any: ...
    def halved(self, seed: int) -> tuple[Encodings, Encodings]: ...
    def batches(self, batch_size: int, seed: int) -> Any: ...


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows, not padded yet.

    tokens: name -> one list of numbers per row, `input_ids` always among the names; the lists of a
            row are equally long.
    labels: (n,) long for classes, float for regression, or None.
    pad:    name -> the number that fills up a row;  left: whether it goes before the row.
    """

    tokens: Mapping[str, Sequence[Sequence[int]]]
    labels: Tensor | None
    pad: Mapping[str, int]
    left: bool = False

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (n,) long."""
        return torch.tensor([len(row) for row in self.tokens["input_ids"]], dtype=torch.long)

    def select(self, indices: Tensor | Sequence[int]) -> Encoded:
        """The rows at `indices`, in that order."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        tokens = {name: [lists[i] for i in rows.tolist()] for name, lists in self.tokens.items()}
        labels = None if self.labels is None else self.labels[rows]
        return Encoded(tokens, labels, self.pad, self.left)

    def halved(self, seed: int) -> tuple[Encoded, Encoded]:
        """`halve`."""
        return halve(self, seed)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """`Batches`."""
        return Batches(self, batch_size, seed)

    def batch(self, indices: Tensor | Sequence[int]) -> Batch:
        """The rows at `indices`, padded to the longest: (b, longest) each; labels (b,) if any."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        ids = [self.tokens["input_ids"][i] for i in rows.tolist()]
        longest = max(len(row) for row in ids)
        out = {"input_ids": self._padded(ids, self.pad["input_ids"], longest)}
        out["attention_mask"] = self._padded([[1] * len(row) for row in ids], 0, longest)
        for name in self.tokens.keys() - {"input_ids"}:
            lists = [self.tokens[name][i] for i in rows.tolist()]
            out[name] = self._padded(lists, self.pad[name], longest)
        if self.labels is not None:
            out["labels"] = self.labels[rows]
        return out

    def _padded(self, lists: Sequence[Sequence[int]], fill: int, longest: int) -> Tensor:
        """Lists of unequal length -> (b, longest) long."""
        gaps = [[fill] * (longest - len(row)) for row in lists]
        if self.left:
            return torch.tensor([[*gap, *row] for gap, row in zip(gaps, lists, strict=True)])
        return torch.tensor([[*row, *gap] for gap, row in zip(gaps, lists, strict=True)])


def encode(split: Rows, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize a split with a transformers tokenizer, truncated to `max_length` tokens.

    A tokenizer without a padding token pads with its end token.  Raises InputError when
    `max_length` leaves no room for a word, or is more than the tokenizer's model can read.
    """
    columns = [list(column) for column in split.columns]
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
    if not special < max_length <= tokenizer.model_max_length:
        raise InputError(
            f"max_length must be above {special} (special tokens) and at most "
            f"{tokenizer.model_max_length} (what the model reads), but got {max_length}"
        )
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = {"input_ids": fill or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    tokens = _tokens(tokenizer(*columns, truncation=True, max_length=max_length), pad["input_ids"])
    return Encoded(
        tokens, _label_tensor(split.labels), {name: pad.get(name, 0) for name in tokens},
        left=tokenizer.padding_side == "left",
    )


def _tokens(output: Mapping[str, Any], fill: int) -> dict[str, list[list[int]]]:
    """Per-token outputs without the mask (it follows from the lengths); no row stays empty."""
    tokens = {name: [list(r) for r in v] for name, v in output.items() if name != "attention_mask"}
    for name, rows in tokens.items():  # GPT-2 and the like turn an empty text into no token
        tokens[name] = [row or [fill if name == "input_ids" else 0] for row in rows]
    return tokens


def _label_tensor(labels: tuple[int, ...] | tuple[float, ...] | None) -> Tensor | None:
    if labels is None:
        return None
    real = any(isinstance(label, float) for label in labels)
    return torch.tensor(labels, dtype=torch.float32 if real else torch.long)


def halve(encoded: Encoded, seed: int) -> tuple[Encoded, Encoded]:
    """Weight-train and alpha-valid halves of the training split, alike in labels.

    Deterministic by seed; sizes differ by at most one.  Raises InputError below two rows.
    """
    if len(encoded) < 2:
        raise InputError(f"a training split must have 2 rows to be halved, but has {len(encoded)}")
    order = torch.randperm(len(encoded), generator=_generator(seed, "halve"))
    if encoded.labels is not None:
        order = order[torch.argsort(encoded.labels[order], stable=True)]
    first, second = order[0::2].sort().values, order[1::2].sort().values
    return encoded.select(first), encoded.select(second)


class Batches:
    """Endless training batches: `batches[step]` is a pure function of (seed, step).

    Every row comes once per epoch; the epoch's incomplete batch is kept.  With fewer rows than
    `batch_size` a batch is the whole data.  Raises InputError for batch_size < 1 or no rows.
    """

    def __init__(self, encoded: Encoded, batch_size: int, seed: int) -> None:
        _check_batch(encoded, batch_size)
        self.encoded, self.batch_size, self.seed = encoded, batch_size, seed
        self.steps_per_epoch = -(-len(encoded) // batch_size)
        self._lengths = encoded.lengths
        self._cached: tuple[int, list[Tensor]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        """Batch of a step >= 0: input_ids, attention_mask, ... (b, longest) and labels (b,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self.order(epoch))
        return self.encoded.batch(self._cached[1][position])

    def order(self, epoch: int) -> list[Tensor]:
        """Row indices of each batch of an epoch, in order."""
        generator = _generator(self.seed, epoch)
        shuffled = torch.randperm(len(self.encoded), generator=generator)
        batches: list[Tensor] = []
        for window in torch.split(shuffled, WINDOW * self.batch_size):
            by_length = window[torch.argsort(self._lengths[window], stable=True)]
            batches += torch.split(by_length, self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def passes(encoded: Encoded, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
    """One evaluation pass: (row indices (b,), batch), each row once, longest rows first.

    Longest first, so that what does not fit in memory fails at once.  Raises InputError for
    batch_size < 1 or no rows.
    """
    _check_batch(encoded, batch_size)
    by_length = torch.argsort(encoded.lengths, descending=True, stable=True)
    for rows in torch.split(by_length, batch_size):
        yield rows, encoded.batch(rows)


def _check_batch(encoded: Encoded, batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be >= 1, but got {batch_size}")
    if not len(encoded):
        raise InputError("batches need at least 1 row, but got 0")


def _generator(seed: int, stream: int | str) -> torch.Generator:
    """A generator for one stream of a seed; hashed, so that neighbouring seeds share nothing."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
