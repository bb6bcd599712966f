"""Recovery: the losses on which a pruned model is retrained, a weighted sum.

- ce: the model's own loss.
- logits: T^2 KL(softmax(t / T) || softmax(s / T)), mean over the examples; MSE where the outputs
  are no single choice (regression, multi-label).  Hinton et al. 2015, arXiv:1503.02531.
- hidden: MSE of W_l s_l and the teacher's layer, over real tokens, channels and layers; W_l is
  learned, has no bias and starts as the identity.  After TinyBERT, Jiao et al. 2020,
  arXiv:1909.10351; there one W serves all layers, and the layers are summed.
- attention: MSE or KL(t || s) of the attention probabilities averaged over the attention heads,
  since heads were removed (those that are only masked still count); over real tokens and layers.
  TinyBERT compares scores head by head.
- contrastive: InfoNCE of the student's representation against frozen banks.  CAP, Xu et al. 2022,
  arXiv:2112.07198.  `unsupervised`: the positive is the same text in the pretrained model or a
  snapshot; `supervised`: every text of the same label in the fine-tuned teacher, the text itself
  included; mean over banks.  CAP reads the first token; here it is the mean over real tokens of
  the last hidden state, which means something in decoders and under left padding too.

Layer i of n is taught by layer round(i N / n) of N, halves up.  The teacher reads the student's
token ids and gives its outputs in the student's order.  One of another architecture teaches logits
alone: its layers have no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.batch import Encoded, passes
from searchpet.errors import InputError, unknown
from searchpet.train import Batch, autocast, to

ROWS = 4096  # of a bank, as in CAP
MAP_LR = 1e-3  # of the learned maps: AdamW's usual rate, small against the identity's ones
LEAST = 1e-6  # of an attention probability in KL, which takes logs: dropout makes some 0
STACKS = ("", "encoder_", "decoder_")  # how transformers prefixes what a stack returns
TERMS = ("ce", "logits", "hidden", "attention", "unsupervised", "supervised")
Stacks = Sequence[tuple[Tensor, ...]]  # of each stack, one tensor per layer


@dataclass(frozen=True)
class Recovery:
    """Weights of the terms, 0 is off, and their options.  Raises InputError for bad values."""

    ce: float = 1.0
    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    unsupervised: float = 0.0
    supervised: float = 0.0
    temperature: float = 2.0  # a fine-tuned teacher is nearly always sure: soften it
    contrast_temperature: float = 0.1  # CAP's
    attention_form: str = "mse"  # or kl, which attention dropout makes noisy

    def __post_init__(self) -> None:
        for name in TERMS:
            value = getattr(self, name)
            _must(0 <= value < math.inf, f"{name} must be a finite number >= 0, but got {value}")
        for name in ("temperature", "contrast_temperature"):
            value = getattr(self, name)
            _must(0 < value < math.inf, f"{name} must be a finite number > 0, but got {value}")
        if self.attention_form not in ("mse", "kl"):
            raise unknown("attention_form", self.attention_form, ("mse", "kl"))
        _must(self.on(*TERMS), f"one of {', '.join(TERMS)} must be > 0, but all are 0")

    def on(self, *terms: str) -> bool:
        """Whether one of the terms has a weight."""
        return any(getattr(self, term) > 0 for term in terms)


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def match(layers: int, taught: int) -> list[int]:
    """The teacher's layer, 1..taught, for each of the student's layers, 1..layers."""
    return [max(1, (2 * i * taught + layers) // (2 * layers)) for i in range(1, layers + 1)]


def pairs(student: Stacks, teacher: Stacks) -> list[tuple[Tensor, Tensor]]:
    """Each layer of the student with the one that teaches it, stack by stack."""
    return [(s, theirs[i - 1]) for ours, theirs in zip(student, teacher, strict=True)
            for s, i in zip(ours, match(len(ours), len(theirs)), strict=True)]


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """student, teacher (b, classes) -> ()."""
    s, t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


def hidden_loss(layers: Sequence[tuple[Tensor, Tensor]], maps: Sequence[Tensor], real: Tensor,
                ) -> Tensor:
    """layers n of (b, s, d) with (b, s, e), maps n of (e, d), real bool (b, s) -> ()."""
    errors = [(F.linear(s.float(), w) - t.float()).square()[real].mean()
              for (s, t), w in zip(layers, maps, strict=True)]
    return torch.stack(errors).mean()


def attention_loss(layers: Sequence[tuple[Tensor, Tensor]], real: Tensor, form: str) -> Tensor:
    """layers n of (b, heads, s, s) with (b, its heads, s, s), real bool (b, s) -> ().

    `mse` is the mean over pairs of real tokens, `kl` over real queries.
    """
    errors = []
    for layer in layers:
        s, t = (heads.float().mean(1) for heads in layer)  # (b, s, s)
        if form == "kl":  # dropout leaves rows that do not sum to 1
            s, t = (p / p.sum(-1, keepdim=True) for p in (s.clamp_min(LEAST), t.clamp_min(LEAST)))
            errors.append((t * (t.log() - s.log())).sum(-1)[real].mean())
        else:
            errors.append((s - t).square()[real[:, :, None] & real[:, None, :]].mean())
    return torch.stack(errors).mean()


def info_nce(z: Tensor, rows: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """-log softmax(cos(z, rows) / temperature), mean over the positives, then over the examples.

    z (b, d), rows (n, d) of unit length, positive bool (b, n) -> ().  An example without a
    positive does not count; 0 if none has one.
    """
    log_p = F.log_softmax(F.normalize(z, dim=-1) @ rows.T / temperature, -1)
    count = positive.sum(-1)
    each = -(log_p * positive).sum(-1) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


def see(model: nn.Module, batch: Batch, precision: str, *wanted: str) -> Any:
    """What a forward pass gives; wanted: `hidden_states`, `attentions`, both or nothing more."""
    with autocast(model, precision):
        return model(**to(batch, model), **{f"output_{name}": True for name in wanted})


def hidden(out: Any) -> Stacks:
    """Hidden states (b, s, d) without the embeddings."""
    return [states[1:] for states in _stacks(out, "hidden_states")]


def _stacks(out: Any, name: str) -> Stacks:
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
    _must(rows >= 2, f"a bank must have rows >= 2 to contrast, but got {rows=}")
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


class Objective:
    """A student's loss in recovery; `loss` stands in for `train.loss_of(student)`.

    student: with its deltas and masks, if any, hooked in.
    teacher: on the same device, always in evaluation mode; None where no term needs one.
    probe:   a batch as in training; a pass over it settles layers and sizes.
    banks:   `unsupervised` -> those of the pretrained model and of snapshots, `supervised` -> that
             of the fine-tuned teacher.

    Raises InputError where a term lacks what it needs.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, recovery: Recovery,
                 probe: Batch, banks: Mapping[str, Sequence[Bank]] | None = None,
                 precision: str = "fp32") -> None:
        self.student, self.teacher, self.recovery = student, teacher, recovery
        self.precision, device = precision, next(student.parameters()).device
        given = {term: (banks or {}).get(term, ()) for term in POSITIVES if recovery.on(term)}
        self.banks = {term: [replace(b, rows=b.rows.to(device)) for b in some]
                      for term, some in given.items()}
        _check_parts(student, teacher, recovery, probe, self.banks)
        config: Any = student.config
        self.one_choice = config.problem_type == "single_label_classification" or (
            config.problem_type is None and config.num_labels > 1)  # transformers' own rule
        was_training = student.training
        student.eval()
        with torch.no_grad():
            ours, theirs = self._passes(probe)
        student.train(was_training)
        _check_sizes(recovery, ours, theirs, probe, self.banks)
        layers = pairs(hidden(ours), hidden(theirs)) if recovery.hidden else []
        self._maps = [nn.Parameter(torch.eye(t.shape[-1], s.shape[-1], device=device))
                      for s, t in layers]

    def parameters(self) -> list[nn.Parameter]:
        """The learned maps: trained with the student, neither counted nor saved."""
        return self._maps

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the terms, ()."""
        terms = self.terms(batch)
        return torch.stack([getattr(self.recovery, k) * v for k, v in terms.items()]).sum()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The terms that have a weight, without it, () each."""
        w, found = self.recovery, dict[str, Tensor]()
        ours, theirs = self._passes(batch)
        if w.ce:
            found["ce"] = ours.loss
        if w.logits:
            s, t = ours.logits.float(), theirs.logits.float()
            found["logits"] = (logits_loss(s, t, w.temperature) if self.one_choice
                               else F.mse_loss(s, t))
        if w.hidden:
            layers = pairs(hidden(ours), hidden(theirs))
            found["hidden"] = hidden_loss(layers, self._maps, tokens(batch, layers[0][0]))
        if w.attention:
            layers = pairs(_stacks(ours, "attentions"), _stacks(theirs, "attentions"))
            real = tokens(batch, layers[0][0][:, 0])
            found["attention"] = attention_loss(layers, real, w.attention_form)
        for term, banks in self.banks.items():
            z = represent(ours, batch)
            found[term] = torch.stack([
                info_nce(z, b.rows, POSITIVES[term](b, batch), w.contrast_temperature)
                for b in banks]).mean()
        return found

    def _passes(self, batch: Batch) -> tuple[Any, Any]:
        """What student and teacher give; the student twice where no term needs the teacher."""
        w = self.recovery
        wanted = ["hidden_states"] if self.banks or w.on("hidden", "attention") else []
        wanted += ["attentions"] if w.attention else []
        ours = see(self.student, batch, self.precision, *wanted)
        if self.teacher is None or not w.on("logits", "hidden", "attention"):
            return ours, ours
        self.teacher.eval()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            return ours, see(self.teacher, inputs, self.precision, *wanted)


def _check_parts(student: Any, teacher: Any, recovery: Recovery, probe: Batch,
                 banks: Mapping[str, Sequence[Bank]]) -> None:
    _must(teacher is not student, "the teacher must be a second model, but is the student")
    _must(teacher is not None or not recovery.on("logits", "hidden", "attention"),
          "logits, hidden and attention need a teacher, but got none; set them to 0 or give one")
    if recovery.on("hidden", "attention"):
        ours, theirs = student.config.model_type, teacher.config.model_type
        _must(ours == theirs, f"hidden and attention need a teacher of the student's architecture "
              f"{ours}, but got {theirs}; set them to 0 and use logits")
    labels = probe.get("labels")
    _must(labels is not None or not recovery.on("ce", "supervised"),
          "ce and supervised need labels, but the batch has none; set them to 0")
    for term, given in banks.items():
        _must(bool(given), f"{term} needs a bank, but got none; set it to 0 or give one")
        classes = labels is not None and not labels.is_floating_point()
        _must(term != "supervised" or (classes and all(b.labels is not None for b in given)),
              "supervised needs classes in the batch and in the bank, but got none; set it to 0")


def _check_sizes(recovery: Recovery, ours: Any, theirs: Any, probe: Batch,
                 banks: Mapping[str, Sequence[Bank]]) -> None:
    n, m = ours.logits.shape[-1], theirs.logits.shape[-1]
    _must(n == m, f"the teacher must have the student's {n} outputs, but has {m}")
    if not banks and not recovery.on("hidden", "attention"):
        return
    shapes = [tuple(h.shape) for layers in hidden(ours) for h in layers]
    sound = all(len(s) == 3 and tokens(probe, torch.empty(s)).shape == s[:2] for s in shapes)
    _must(bool(shapes) and sound, "hidden states must be (batch, tokens, channels), but are "
          f"{shapes}; use ce and logits alone")
    for who, out in (("student", ours), ("teacher", theirs)) if recovery.attention else ():
        layers = sum(map(len, hidden(out)))
        maps = sum(a.dim() == 4 and a.shape[2] == a.shape[3]
                   for found in _stacks(out, "attentions") for a in found)
        _must(maps == layers, f"attention needs a square map of each of {layers} layers, but the "
              f"{who} gives {maps}; call its set_attn_implementation('eager'), or set it to 0 "
              "where a layer has lost its attention")
    for b in (b for given in banks.values() for b in given):
        _must(b.rows.shape[-1] == shapes[-1][-1], f"a bank must have the student's "
              f"{shapes[-1][-1]} channels, but has {b.rows.shape[-1]}")
