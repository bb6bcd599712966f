"""Tiny random models of several families, with inputs and deltas that look trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from searchpet import catalog
from searchpet.backbone import config_hash
from searchpet.discover import discover
from searchpet.space import Space
from searchpet.spacefile import Rule, Select
from searchpet.spec import BackboneId, BudgetUse, Spec
from searchpet.supernet import Supernet

WORDS = 50
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 32}
TEXT = PLAIN | {"vocab_size": WORDS, "pad_token_id": 0}
GATED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "albert": TEXT | {"embedding_size": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 32,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    "gpt_neox": TEXT,
    "llama": GATED,
    "gemma": GATED,
    "qwen3": TEXT | {"num_key_value_heads": 2, "head_dim": 8},  # norms of queries and keys
    "roberta": TEXT,  # its head has a hidden layer, its positions begin after the padding's
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


def every_kind(**options: dict[str, Any]) -> list[Rule]:
    """Every kind of PET wherever it fits, each coordinate a unit.  options: by kind."""
    return [rule(kind, "atom", options.get(kind)) for kind in kinds(neutral=0)]


def every_mask(**options: dict[str, Any]) -> list[Rule]:
    """Every prune mask of units wherever it fits, each coordinate a unit.  options: by kind."""
    return [rule(kind, "atom", options.get(kind)) for kind in kinds(neutral=1)]


def kinds(neutral: float) -> list[str]:
    """Names of the kinds that are silent at this gate; masks of single weights are no units."""
    found = {k: catalog.get("deltas", k) for k in catalog.names("deltas")}
    return [k for k, kind in found.items() if kind.neutral == neutral and kind.stage != "weight"]


def supernet(of: nn.Module, placed: Space, *, trained: bool = True, seed: int = 0) -> Supernet:
    """All deltas of a space, with weights as training would leave them."""
    net = Supernet(of, placed, head_of(of), seed)
    if trained:
        perturb(net.grafts.deltas.parameters(), 0.2, seed + 1)
    return net


def head_of(of: nn.Module) -> frozenset[str]:
    """The parameters outside the base model."""
    base = f"{of.base_model_prefix}."
    return frozenset(n for n, _ in of.named_parameters() if not n.startswith(base))


def spec_of(of: nn.Module, placed: Space, keep: Tensor, **budget: Any) -> Spec:
    """The spec that a search which kept `keep` would write."""
    used = placed.parameters(keep)
    count = sum(p.numel() for n, p in of.named_parameters() if n not in head_of(of))
    use = {"text": str(used), "limit": used, "used": used, "slack": 0, "denominator": count}
    return Spec(
        backbone=BackboneId(name="tiny", revision=None, config_hash=config_hash(of.config),
                            parameters=count),
        entries=placed.entries(keep), budget=BudgetUse(**use | budget))


@torch.no_grad()
def hand_over(net: Supernet, keep: Tensor, to: nn.Module) -> None:
    """Copy the kept coordinates' weights from a supernet to a model that its spec was applied to.
    """
    own = {graft.key: graft.delta for graft in to.searchpet.grafts}
    chosen = keep[net.space.unit].split([p.width for p in net.space.placements])
    for graft, kept in zip(net.grafts.grafts, chosen, strict=True):
        if kept.any():
            own[graft.key].load_state_dict(graft.delta.thin(kept).state_dict())


def hooks(of: nn.Module) -> int:
    """How many hooks a model carries."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in of.modules())


def sizes(parameters: Iterable[Tensor]) -> int:
    """How many numbers the tensors hold."""
    return sum(p.numel() for p in parameters)
