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
- unsupervised, supervised: InfoNCE of the student's representation against frozen banks, mean over
  banks; see `searchpet.contrast`.

Layer i of n is taught by layer round(i N / n) of N, halves up: a student that has lost layers is
taught by those at the depths of what is left.  Where one of the two has no attention left, the
pair is left out of `attention`.  The teacher reads the student's token ids, its outputs have the
student's order.  One of another architecture teaches logits alone: its layers do not correspond.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.contrast import (
    POSITIVES,
    Bank,
    hidden,
    info_nce,
    must,
    represent,
    see,
    stacks,
    tokens,
)
from searchpet.discover import discover
from searchpet.errors import InputError, unknown
from searchpet.train import Batch

MAP_LR = 1e-3  # of the learned maps: AdamW's usual rate, small against the identity's ones
LEAST = 1e-6  # of an attention probability in KL, which takes logs: dropout makes some 0
TERMS = ("ce", "logits", "hidden", "attention", "unsupervised", "supervised")
TAUGHT = ("logits", "hidden", "attention", "supervised")  # terms that need a teacher


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
            must(0 <= value < math.inf, f"{name} must be a finite number >= 0, but got {value}")
        for name in ("temperature", "contrast_temperature"):
            value = getattr(self, name)
            must(0 < value < math.inf, f"{name} must be a finite number > 0, but got {value}")
        if self.attention_form not in ("mse", "kl"):
            raise unknown("attention_form", self.attention_form, ("mse", "kl"))
        must(self.on(*TERMS), f"one of {', '.join(TERMS)} must be > 0, but all are 0")

    def on(self, *terms: str) -> bool:
        """Whether one of the terms has a weight."""
        return any(getattr(self, term) > 0 for term in terms)

    def given(self, values: Mapping[str, Any]) -> Recovery:
        """With these weights and options, as numbers or text; where a term is among them, the
        others have weight 0.  Raises InputError for a name that is no field, and for bad values.
        """
        known = [field.name for field in fields(self)]
        named: dict[str, Any] = dict.fromkeys(TERMS, 0.0) if set(values) & set(TERMS) else {}
        for name, value in values.items():
            if name not in known:
                raise unknown("--recovery", name, known)
            named[name] = value if name == "attention_form" else _number(name, value)
        return replace(self, **named)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"--recovery {name} must be a number such as {name}=0.5, but got "
                         f"{value!r}") from error


def match(layers: int, taught: int) -> list[int]:
    """The teacher's layer, 1..taught, for each of the student's layers, 1..layers."""
    return [max(1, (2 * i * taught + layers) // (2 * layers)) for i in range(1, layers + 1)]


def pairs(student: Sequence[Sequence[Tensor | None]], teacher: Sequence[Sequence[Tensor | None]],
          ) -> list[tuple[Tensor, Tensor]]:
    """Each layer of the student with the one that teaches it, by stack, unless one is None."""
    found = [(s, theirs[i - 1]) for ours, theirs in zip(student, teacher, strict=True)
             for s, i in zip(ours, match(len(ours), len(theirs)), strict=True)]
    return [(s, t) for s, t in found if s is not None and t is not None]


def attending(model: nn.Module, out: Any, who: str) -> list[list[bool]]:
    """Of each stack, whether a layer still has an attention.  Raises InputError if `out` has not a
    map of each: fused attention gives none.
    """
    maps = [sum(a is not None and a.dim() == 4 and a.shape[2] == a.shape[3] for a in found)
            for found in stacks(out, "attentions")]
    layers = [len(found) for found in hidden(out)]
    if maps == layers:
        return [[True] * n for n in layers]  # ALBERT's share one attention
    left: dict[str, set[int]] = defaultdict(set)
    for site in (s for s in discover(model) if s.role == "attention.output"):
        left[site.part].add(site.layer)
    there = [len(own) for own in left.values()]
    must(maps == there, f"attention needs a square map of each of {sum(there)} layers, but the "
         f"{who} gives {sum(maps)}; call its set_attn_implementation('eager'), or take hidden=1")
    return [[i in own for i in range(n)] for n, own in zip(layers, left.values(), strict=True)]


def by_layer(out: Any, left: Sequence[Sequence[bool]]) -> list[list[Tensor | None]]:
    """The attention maps of each stack's layers, None for a layer without; left: `attending`."""
    return [[next(maps) if here else None for here in own]
            for maps, own in zip(map(iter, stacks(out, "attentions")), left, strict=True)]


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
        if recovery.attention and teacher is not None:
            self._left = [attending(student, ours, "student"),
                          attending(teacher, theirs, "teacher")]
            must(bool(self._attentions(ours, theirs)), "attention needs a layer that has one and "
                 "is taught by one that has, but none is left; take hidden=1 instead")
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
            layers = self._attentions(ours, theirs)
            real = tokens(batch, layers[0][0][:, 0])
            found["attention"] = attention_loss(layers, real, w.attention_form)
        for term, banks in self.banks.items():
            z = represent(ours, batch)
            found[term] = torch.stack([
                info_nce(z, b.rows, POSITIVES[term](b, batch), w.contrast_temperature)
                for b in banks]).mean()
        return found

    def _attentions(self, ours: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
        return pairs(by_layer(ours, self._left[0]), by_layer(theirs, self._left[1]))

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
    must(teacher is not student, "the teacher must be a second model, but is the student")
    must(teacher is not None or not recovery.on("logits", "hidden", "attention"),
          "logits, hidden and attention need a teacher, but got none; set them to 0 or give one")
    if recovery.on("hidden", "attention"):
        ours, theirs = student.config.model_type, teacher.config.model_type
        must(ours == theirs, f"hidden and attention need a teacher of the student's architecture "
              f"{ours}, but got {theirs}; leave them out and use logits")
    labels = probe.get("labels")
    must(labels is not None or not recovery.on("ce", "supervised"),
          "ce and supervised need labels, but the batch has none; set them to 0")
    for term, given in banks.items():
        must(bool(given), f"{term} needs a bank, but got none; set it to 0 or give one")
        classes = labels is not None and not labels.is_floating_point()
        must(term != "supervised" or (classes and all(b.labels is not None for b in given)),
              "supervised needs classes in the batch and in the bank, but got none; leave it out")


def _check_sizes(recovery: Recovery, ours: Any, theirs: Any, probe: Batch,
                 banks: Mapping[str, Sequence[Bank]]) -> None:
    n, m = ours.logits.shape[-1], theirs.logits.shape[-1]
    must(n == m, f"the teacher must have the student's {n} outputs, but has {m}; give one that "
         "was trained on this task")
    if not banks and not recovery.on("hidden", "attention"):
        return
    shapes = [tuple(h.shape) for layers in hidden(ours) for h in layers]
    sound = all(len(s) == 3 and tokens(probe, torch.empty(s)).shape == s[:2] for s in shapes)
    must(bool(shapes) and sound, "hidden states must be (batch, tokens, channels), but are "
          f"{shapes}; use ce and logits alone")
    for b in (b for given in banks.values() for b in given):
        must(b.rows.shape[-1] == shapes[-1][-1], f"a bank must have the student's "
              f"{shapes[-1][-1]} channels, but has {b.rows.shape[-1]}; leave supervised out, or "
              "take a teacher of the student's size")


def maps_of(objective: Objective) -> list[dict[str, Any]]:
    """The learned maps as a parameter group, if there are any."""
    maps = objective.parameters()
    return [{"params": maps, "kind": "maps", "lr": MAP_LR}] if maps else []
