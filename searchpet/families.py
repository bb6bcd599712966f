"""Families whose removal is proven, as data: what their code reads that a narrower model changes.

Sites and fused projections are found by structure, so a row holds only what no structure tells:
which attributes of an attention hold its sizes, which config keys count layers, and the few laws
that a family's own forward makes.  A family is proven when its row stands in `FAMILIES`: the tests
of removal run over all of them.  Attention, below, is the module that holds the query projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


def _one_stack() -> Mapping[str, str]:
    return MappingProxyType({"encoder": "num_hidden_layers", "decoder": "num_hidden_layers"})


@dataclass(frozen=True)
class Family:
    """What removal must know of a family.

    heads:      attributes of the attention that hold its attention heads.  Written also where the
                forward infers them: discovery of the narrower model reads `num_heads`.
    kv_heads:   attributes that hold its heads of keys and values.
    width:      attributes that hold heads * head size.
    config:     config keys through which the attention reads its heads; it gets a view of the
                config of its own, as the config is every layer's.
    depth:      part -> key of the model's config that counts the part's layers.
    own_depth:  the same key in a stack's own config, where a stack has one.
    rows:       names of further linears of the attention with a slice of rows per head.
    norm:       name of the norm where the attention adds the residual and normalises by itself.
    bias:       whether a stack's first self-attention owns a position bias per attention head,
                which all its others receive and return in full.
    after_first: attribute of the stack that acts beside its first layer, which must then stay.
    cross:      whether cross-attention is proven as well.
    encoder_deepest: whether generation makes its cache as deep as the encoder.
    """

    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    depth: Mapping[str, str] = field(default_factory=_one_stack)
    own_depth: str | None = None
    rows: tuple[str, ...] = ()
    norm: str | None = None
    bias: bool = False
    after_first: str | None = None
    cross: bool = False
    encoder_deepest: bool = False


_BERT = Family(heads=("num_attention_heads",), width=("all_head_size",))
_ROTARY = Family()  # heads are inferred from the head size, which stays
_T5 = Family(
    heads=("num_heads",),  # n_heads stays: it is the position bias's
    depth={"encoder": "num_layers", "decoder": "num_decoder_layers"},
    own_depth="num_layers",
    bias=True,
    cross=True,
    encoder_deepest=True,
)

FAMILIES: Mapping[str, Family] = {  # by `config.model_type`
    "albert": Family(
        heads=("num_attention_heads",),
        width=("all_head_size",),
        depth={},  # num_hidden_layers counts calls, not modules
        norm="LayerNorm",
    ),
    "bart": Family(
        heads=("num_heads",),
        depth={"encoder": "encoder_layers", "decoder": "decoder_layers"},
        cross=True,
    ),
    "bert": _BERT,
    "deberta-v2": Family(
        heads=("num_attention_heads",),
        width=("all_head_size",),
        rows=("pos_key_proj", "pos_query_proj"),
        after_first="conv",
    ),
    "distilbert": Family(heads=("n_heads",)),
    "electra": _BERT,
    "gemma": _ROTARY,
    "gemma2": _ROTARY,
    "gpt2": Family(heads=("num_heads",), width=("split_size",)),
    "gpt_neox": Family(heads=("num_heads",)),
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "modernbert": _ROTARY,
    "mt5": _T5,
    "opt": Family(heads=("num_heads",)),
    "phi3": Family(kv_heads=("num_key_value_heads",), config=("num_attention_heads",)),
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "roberta": _BERT,
    "t5": _T5,
    "vit": Family(heads=("num_attention_heads",)),
    "xlm-roberta": _BERT,
}
