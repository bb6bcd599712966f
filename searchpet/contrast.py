"""Contrast: what a model says of its inputs, banks of it, and InfoNCE against them.

CAP, Xu et al. 2022, arXiv:2112.07198.  `unsupervised`: the positive is the same text in the
pretrained model or a snapshot; `supervised`: every text of the same label in the fine-tuned
teacher, the text itself included.  CAP reads the first token; here it is the mean over real tokens
of the last hidden state, which means something in decoders and under left padding too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.batch import Encoded, passes
from searchpet.errors import InputError
from searchpet.train import Batch, autocast, to

ROWS = 4096  # of a bank, as in CAP
STACKS = ("", "encoder_", "decoder_")  # how transformers prefixes what a stack returns
Stacks = Sequence[tuple[Tensor, ...]]  # of each stack, one tensor per layer


def see(model: nn.Module, batch: Batch, precision: str, *wanted: str) -> Any:
    """What a forward pass gives; wanted: `hidden_states`, `attentions`, both or nothing more."""
    with autocast(model, precision):
        return model(**to(batch, model), **{f"output_{name}": True for name in wanted})


def hidden(out: Any) -> Stacks:
    """Hidden states (b, s, d) without the embeddings."""
    return [states[1:] for states in stacks(out, "hidden_states")]


def stacks(out: Any, name: str) -> Stacks:
    found = [getattr(out, f"{stack}{name}", None) for stack in STACKS]
    return [layers for layers in found if layers]


def tokens(batch: Batch, like: Tensor) -> Tensor:
    """Which tokens are no padding, bool (b, s), for like (b, s, ...)."""
    mask = batch.get("attention_mask")
    mask = torch.ones(like.shape[:2]) if mask is None else mask
    return mask.to(like.device).bool()


def represent(out: Any, batch: Batch) -> Tensor:
    """Mean over real tokens of the last hidden state, of the decoder if there is one: (b, d)."""
    last = hidden(out)[-1][-1].float()
    real = tokens(batch, last)[..., None]
    return last.masked_fill(~real, 0).sum(1) / real.sum(1)


def texts(batch: Batch) -> list[tuple[int, ...]]:
    """The real token ids: what tells texts apart, however they are padded."""
    ids = batch["input_ids"]
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, tokens(batch, ids), strict=True)]


@dataclass(frozen=True)
class Bank:
    """Frozen representations of training texts: rows (n, d) float32 of unit length, labels (n,)
    if there are any, and each text's row.
    """

    rows: Tensor
    labels: Tensor | None
    place: Mapping[tuple[int, ...], int]

    def same_text(self, batch: Batch) -> Tensor:
        """Which row is the batch's text, bool (b, n); none for a text that is not stored."""
        at = torch.tensor([self.place.get(text, -1) for text in texts(batch)])
        return (at[:, None] == torch.arange(len(self.rows))).to(self.rows.device)

    def same_label(self, batch: Batch) -> Tensor:
        """Which rows have the batch's label, bool (b, n)."""
        assert self.labels is not None  # Objective asks
        return (batch["labels"].cpu()[:, None] == self.labels).to(self.rows.device)


POSITIVES = {"unsupervised": Bank.same_text, "supervised": Bank.same_label}


@torch.no_grad()
def bank(model: nn.Module, encoded: Encoded, generator: torch.Generator, *, rows: int = ROWS,
         batch_size: int = 32, precision: str = "fp32") -> Bank:
    """The model's representations of at most `rows` texts, drawn at random, no text twice.

    Raises InputError for rows < 2 or no texts.
    """
    must(rows >= 2, f"a bank must have rows >= 2 to contrast, but got {rows=}")
    order = torch.randperm(len(encoded), generator=generator).tolist()
    unique = {tuple(encoded.tokens["input_ids"][i]): i for i in order}
    drawn = encoded.select(list(unique.values())[:rows])
    was_training = model.training
    model.eval()
    found, labels, names = [], [], list[tuple[int, ...]]()
    for _, batch in passes(drawn, batch_size):
        labels += [batch.pop("labels")] if "labels" in batch else []
        out = see(model, batch, precision, "hidden_states")
        found.append(F.normalize(represent(out, batch), dim=-1))
        names += texts(batch)
    model.train(was_training)
    place = {name: i for i, name in enumerate(names)}
    return Bank(torch.cat(found), torch.cat(labels) if labels else None, place)


def info_nce(z: Tensor, rows: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """-log softmax(cos(z, rows) / temperature), mean over the positives, then over the examples.

    z (b, d), rows (n, d) of unit length, positive bool (b, n) -> ().  An example without a
    positive does not count; 0 if none has one.
    """
    log_p = F.log_softmax(F.normalize(z, dim=-1) @ rows.T / temperature, -1)
    count = positive.sum(-1)
    each = -(log_p * positive).sum(-1) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


def must(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
