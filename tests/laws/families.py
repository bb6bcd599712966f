"""Tiny random models of several families, with inputs and deltas that look trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from searchpet.discover import discover
from searchpet.space import Rule, Select, Space

WORDS = 50
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 32}
TEXT = PLAIN | {"vocab_size": WORDS, "pad_token_id": 0}
GATED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "albert": TEXT | {"embedding_size": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 32,
             "pad_token_id": 0},
    "gpt_neox": TEXT,
    "llama": GATED,
    "gemma": GATED,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
           "vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1,
           "decoder_start_token_id": 0},
    "vit": {k: v for k, v in PLAIN.items() if k != "max_position_embeddings"}
    | {"image_size": 16, "patch_size": 8},
}
FAMILIES = sorted(CONFIGS)


def model(family: str, seed: int = 0, labels: int = 3) -> nn.Module:
    """A classifier of the family, evaluation mode, with weights that are not nearly zero."""
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    config.num_labels, config.tie_word_embeddings = labels, False
    auto = (transformers.AutoModelForImageClassification if family == "vit"
            else transformers.AutoModelForSequenceClassification)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: nn.Module = auto.from_config(config, attn_implementation="eager")
        perturb(built.parameters(), 0.1)
    return built.eval()


def inputs(family: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch of the family: images, or token ids that end in 1."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(2, WORDS, (rows, 7), generator=generator)
    ids[:, -1] = 1  # T5 reads its answer at the end of the text
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(of: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return of(**batch).logits


@torch.no_grad()
def perturb(parameters: Iterator[nn.Parameter], size: float, seed: int | None = None) -> None:
    """Add normal noise in place: weights as training would leave them."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(size * torch.randn(p.shape, generator=generator))


def rule(kind: str, grain: str = "module", options: dict[str, Any] | None = None,
         **select: Any) -> Rule:
    return Rule(kind=kind, grain=grain, options=options or {}, select=Select(**select))


def space(of: nn.Module, *rules: Rule) -> Space:
    return Space("test", discover(of), rules)


def some(units: int, seed: int, share: float = 0.5) -> Tensor:
    """A random choice of units, neither none nor all: bool (units,)."""
    draw = torch.rand(units, generator=torch.Generator().manual_seed(seed))
    keep = draw < share
    keep[int(draw.argmin())], keep[int(draw.argmax())] = True, False
    return keep


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sizes(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
