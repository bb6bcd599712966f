"""Discovery: sites of many families on the meta device, slices and block outputs on real weights.

Blocks and linears in the table are counted by hand from the architectures; a fused projection
counts once per part.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.site import Site

Config = dict[str, Any]

QKVO = "attention.query attention.key attention.value attention.output "
CROSS = QKVO.replace("attention", "cross_attention")
PLAIN = QKVO + "ffn.in ffn.out "  # six linears a block
GATED = PLAIN + "ffn.gate "  # seven
OTHER = "attention.other "

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
PHI = BERT | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 99}
BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")} | {"pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {"num_heads": 4, "vocab_size": 99, "pad_token_id": 0}
VIT = {k: v for k, v in BERT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 16}
SPEECH = BERT | {"conv_dim": [16], "conv_kernel": [3], "conv_stride": [2]}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
FALCON = {k: BERT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
FALCON |= {"vocab_size": 99, "alibi": False, "new_decoder_architecture": False}
MOE = {"num_local_experts": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SWIN |= {"window_size": 4}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99}
OPT = FALCON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99}
XGLM = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "vocab_size": 99}
FUNNEL = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [2, 2]}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
FSMT = {"src_vocab_size": 99, "tgt_vocab_size": 99, "langs": ["en", "de"]}
WHISPER = {"num_mel_bins": 8, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
CODEGEN = GPT2 | {"rotary_dim": 4}
TWO_STACKS = {"text_config": BERT, "vision_config": VIT}


@dataclass(frozen=True)
class Part:
    """What one part of a model must hold: its stacks, blocks, and linears per block."""

    stacks: str  # paths of the lists of blocks
    roles: str  # of the linears
    linears: int = 0  # per block; 0: each role once
    blocks: int = 2
    name: str = "encoder"


@dataclass(frozen=True)
class Row:
    family: str
    auto: str
    config: Config
    parts: tuple[Part, ...]


def row(family: str, auto: str, config: Config, *parts: Part, name: str = "") -> Any:
    return pytest.param(Row(family, auto, config, parts), id=name or family)


def bert(family: str, prefix: str, roles: str = PLAIN, linears: int = 0, **more: Any) -> Any:
    """A BERT-like classifier."""
    stack = Part(f"{prefix}.encoder.layer", roles, linears)
    return row(family, "SequenceClassification", BERT | more, stack)


def causal(family: str, stack: str, roles: str, config: Config, name: str = "") -> Any:
    return row(family, "CausalLM", config, Part(stack, roles, name="decoder"), name=name)


def llama(family: str, roles: str = GATED, config: Config = LLAMA) -> Any:
    return causal(family, "model.layers", roles, config)


def pair(family: str, roles: str, stack: str, config: Config, auto: str = "Seq2SeqLM") -> Any:
    """An encoder of two blocks and a decoder of three, with cross-attention."""
    encoder = Part(stack.format("encoder"), roles)
    decoder = Part(stack.format("decoder"), roles + CROSS, blocks=3, name="decoder")
    return row(family, auto, config, encoder, decoder)


def vit(family: str, stack: str = "layers", auto: str = "", **more: Any) -> Any:
    return row(family, auto, VIT | more, Part(stack, PLAIN))


ROWS = [
    bert("bert", "bert"),
    bert("roberta", "roberta"),
    bert("xlm-roberta", "roberta"),
    bert("camembert", "roberta"),
    bert("ernie", "ernie"),
    bert("electra", "electra", embedding_size=32),
    bert("mpnet", "mpnet"),
    bert("roformer", "roformer", embedding_size=32),
    bert("rembert", "rembert", input_embedding_size=16, output_embedding_size=16),
    bert("megatron-bert", "bert"),
    bert("nystromformer", "nystromformer"),
    bert("big_bird", "bert"),
    bert("layoutlm", "layoutlm"),
    bert("esm", "esm"),
    bert("xlm-roberta-xl", "roberta"),
    bert("roberta-prelayernorm", "roberta_prelayernorm"),
    bert("data2vec-text", "data2vec_text"),
    bert("convbert", "convbert", PLAIN + OTHER, 8, embedding_size=32),  # kernel, value
    bert("luke", "luke", PLAIN + OTHER, 9),  # three more queries
    bert("longformer", "longformer", PLAIN + OTHER, 9, attention_window=[4, 4]),  # global q, k, v
    bert("deberta", "deberta", PLAIN + OTHER, 8, **DEBERTA),  # relative keys and queries
    bert("deberta-v2", "deberta", PLAIN + OTHER, 8, **DEBERTA),
    row("nomic_bert", "", BERT, Part("layers", GATED)),
    row("modernbert", "SequenceClassification", BERT, Part("model.layers", GATED)),
    row("distilbert", "", DISTIL, Part("transformer.layer", PLAIN)),
    row("albert", "", BERT, Part("encoder.albert_layer_groups.0.albert_layers", PLAIN, blocks=1)),
    row("funnel", "SequenceClassification", FUNNEL,
        Part("funnel.encoder.blocks.0 funnel.encoder.blocks.1", PLAIN, blocks=4)),
    *(row(family, "", XLM, Part("attentions ffns", PLAIN)) for family in ("xlm", "flaubert")),
    causal("gpt2", "transformer.h", PLAIN, GPT2),
    causal("gpt2", "transformer.h", PLAIN + CROSS, GPT2 | {"add_cross_attention": True},
           "gpt2-cross"),
    causal("openai-gpt", "transformer.h", PLAIN, GPT2),
    causal("gpt_bigcode", "transformer.h", PLAIN, GPT2),
    causal("gpt_bigcode", "transformer.h", PLAIN, GPT2 | {"multi_query": False}, "bigcode-mha"),
    causal("gpt_neo", "transformer.h", PLAIN, NEO),
    causal("gpt_neox", "gpt_neox.layers", PLAIN, BERT),
    causal("gptj", "transformer.h", PLAIN, CODEGEN),
    causal("codegen", "transformer.h", PLAIN, CODEGEN),
    causal("ctrl", "transformer.h", PLAIN, GPT2 | {"dff": 64}),
    causal("opt", "model.decoder.layers", PLAIN, OPT),
    causal("bloom", "transformer.h", PLAIN, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    causal("falcon", "transformer.h", PLAIN, FALCON),
    causal("falcon", "transformer.h", PLAIN, FALCON | {"multi_query": False}, "falcon-rw"),
    causal("falcon", "transformer.h", PLAIN,
           FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "falcon-40b"),
    causal("mpt", "transformer.blocks", PLAIN, MPT),
    causal("biogpt", "biogpt.layers", PLAIN, BERT),
    causal("xglm", "model.layers", PLAIN, XGLM),
    *map(llama, "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 cohere".split()),
    *map(llama, "granite glm glm4 smollm3 exaone4 helium stablelm vaultgemma".split()),
    llama("phi3", config=PHI),
    *(llama(family, PLAIN, PHI) for family in ("phi", "starcoder2", "nemotron", "apertus")),
    llama("persimmon", PLAIN, BERT),
    llama("modernbert-decoder", GATED, BERT),
    llama("mixtral", QKVO, LLAMA | MOE),  # router and experts are bare parameters
    pair("t5", PLAIN, "{}.block", T5),
    pair("t5", GATED, "transformer.{}.block", T5 | {"feed_forward_proj": "gated-gelu"},
         "SequenceClassification"),
    pair("mt5", GATED, "{}.block", T5),
    pair("longt5", PLAIN, "{}.block", T5),
    *(pair(family, PLAIN, "model.{}.layers", BART)
      for family in "bart mbart pegasus marian m2m_100 blenderbot plbart".split()),
    pair("fsmt", PLAIN, "{}.layers", BART | FSMT, ""),
    pair("whisper", PLAIN, "{}.layers", BART | WHISPER, ""),
    vit("vit", "vit.layers", "ImageClassification"),
    *map(vit, ("deit", "beit", "vit_mae")),
    vit("dinov2", "encoder.layer"),
    vit("siglip_vision_model", "encoder.layers"),
    vit("clip_vision_model", "encoder.layers"),
    row("swin", "", SWIN,
        Part("encoder.layers.0.blocks encoder.layers.1.blocks", PLAIN, blocks=4)),
    row("clip_text_model", "", BERT, Part("encoder.layers", PLAIN)),
    row("clip", "", TWO_STACKS,
        Part("text_model.encoder.layers vision_model.encoder.layers", PLAIN, blocks=4)),
    row("wav2vec2", "", SPEECH, Part("encoder.layers", PLAIN)),
    row("wavlm", "", SPEECH, Part("encoder.layers", PLAIN + OTHER)),  # relative position gate
]  # fmt: skip


def build(row: Row) -> nn.Module:
    config = transformers.AutoConfig.for_model(row.family, **row.config)
    auto = getattr(transformers, f"AutoModelFor{row.auto}" if row.auto else "AutoModel")
    model: nn.Module = auto.from_config(config, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("row", ROWS)
def test_a_family_on_the_meta_device(row: Row) -> None:
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = build(row)
    sites = discover(model)
    assert len({(site.path, site.role) for site in sites}) == len(sites)
    assert {site.part for site in sites} == {part.name for part in row.parts}
    for part in row.parts:
        of_part = [site for site in sites if site.part == part.name]
        linears = [site for site in of_part if site.form == "linear"]
        per_block = Counter(site.layer for site in linears)
        roles = set(part.roles.split())
        assert per_block == dict.fromkeys(range(part.blocks), part.linears or len(roles))
        assert {site.role for site in linears} == roles
        outputs = Counter(site.role for site in of_part if site.form == "block")
        expected = {"attention.block", "ffn.block"} if "ffn.out" in roles else {"attention.block"}
        expected |= {"cross_attention.block"} if "cross_attention.output" in roles else set()
        assert expected <= set(outputs) and set(outputs.values()) == {part.blocks}
        covers_every_linear(model, part.stacks.split(), linears)
    norms = [site for site in sites if site.form == "norm"]
    assert norms or row.family == "olmo"  # whose norms hold no parameters
    for site in sites:
        model.get_submodule(site.path)
        assert (site.source is not None) == (site.form == "block")
        model.get_submodule(site.source or "")
        if "attention" in site.role and site.form != "norm":
            # ConvBERT's other two heads convolve; Swin's stages have 2 and 4
            assert site.heads == 4 or row.family in ("convbert", "swin")


def covers_every_linear(model: nn.Module, stacks: list[str], sites: list[Site]) -> None:
    """Each output feature of each linear in the stacks lies in exactly one site."""
    found: dict[str, list[int]] = {}
    for site in sites:
        for start, stop in site.index or ((0, site.d_out),):
            found.setdefault(site.path, []).extend(range(start, stop))
        assert site.index is None or sum(b - a for a, b in site.index) == site.d_out
    expected = {}
    for path, module in model.named_modules():
        if any(path.startswith(stack + ".") for stack in stacks):
            if isinstance(module, nn.Linear):
                expected[path] = list(range(module.out_features))
            elif hasattr(module, "nf"):
                expected[path] = list(range(module.nf))
    assert {path: sorted(features) for path, features in found.items()} == expected


def test_forty_families_are_covered() -> None:
    assert len({param.values[0].family for param in ROWS}) >= 40


# --- on real weights ----------------------------------------------------------------------------


def named(name: str) -> Row:
    return cast(Row, next(param.values[0] for param in ROWS if param.id == name))


def real(name: str) -> nn.Module:
    """The row's model with weights large enough for every part to matter."""
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model = build(named(name))
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def run(model: nn.Module, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, 8), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    with torch.no_grad():
        return model(**inputs, **more)


def one(sites: tuple[Site, ...], role: str, layer: int = 0) -> Site:
    (site,) = [site for site in sites if site.role == role and site.layer == layer]
    return site


FUSED = "gpt2 openai-gpt gpt_bigcode bigcode-mha gpt_neox bloom phi3 modernbert falcon falcon-rw "
FUSED += "falcon-40b mpt codegen persimmon deberta"


@pytest.mark.parametrize("name", FUSED.split())
def test_slices_are_queries_keys_and_values(name: str) -> None:
    """A query at one position moves that row of the attention, a key others, a value none."""
    model, position = real(name), 3
    sites = discover(model)
    before = run(model, output_attentions=True).attentions[0]  # (batch, heads, rows, columns)
    for role in ("query", "key", "value"):
        site = one(sites, f"attention.{role}")

        def disturb(module: nn.Module, args: Any, y: Tensor, site: Site = site) -> Tensor:
            y = y.clone()
            for start, stop in site.index or ():
                y[:, position, start:stop] += torch.linspace(1, 2, stop - start)
            return y

        handle = model.get_submodule(site.path).register_forward_hook(disturb)
        after = run(model, output_attentions=True).attentions[0]
        handle.remove()
        moved = (after - before).abs().amax(dim=(0, 3)) > 1e-6  # (heads, rows)
        assert moved[:, position].all() == (role != "value")
        assert moved[:, position + 1 :].any() == (role == "key")
        if role != "value":
            assert moved.any(dim=1).all()  # every head


@pytest.mark.parametrize("name", ["phi3", "glm", "modernbert", "modernbert-decoder"])
def test_the_gate_is_the_activated_half(name: str) -> None:
    """The output is linear in `ffn.in`: twice that half, twice the output.  Not so in the gate."""
    model = real(name)
    sites = discover(model)
    linear, norm = (model.get_submodule(one(sites, role).path) for role in ("ffn.in", "norm.ffn"))
    mlp = model.get_submodule(one(sites, "ffn.out").path.rpartition(".")[0])
    x = norm(torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)))
    y = mlp(x)
    for role in ("ffn.in", "ffn.gate"):
        ((start, stop),) = one(sites, role).index or ()
        linear.weight.data[start:stop] *= 2
        assert torch.allclose(mlp(x), 2 * y, atol=1e-5) == (role == "ffn.in")
        linear.weight.data[start:stop] /= 2


def silence(model: nn.Module, sites: Iterable[Site]) -> None:
    def zero(module: nn.Module, args: Any, y: Any) -> Any:
        return torch.zeros_like(y) if isinstance(y, Tensor) else (torch.zeros_like(y[0]), *y[1:])

    for site in sites:
        model.get_submodule(site.path).register_forward_hook(zero)


def watch(model: nn.Module, path: str) -> dict[str, Tensor]:
    """The last input and output of a module, once it has run."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        seen["x"] = args[0] if args else kwargs.get("hidden_states")
        seen["y"] = (y if isinstance(y, Tensor) else y[0]).clone()  # some add to it in place

    model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    return seen


PRE_NORM = (
    "gpt2 gpt2-cross gpt_neox gptj opt bloom falcon falcon-rw falcon-40b mpt phi phi3 llama "
)
PRE_NORM += "gemma2 gemma3_text olmo2 glm4 exaone4 cohere mixtral modernbert megatron-bert esm "
PRE_NORM += "roberta-prelayernorm xlm-roberta-xl t5 pegasus vit"
SCALED = ["dinov2", "beit", "swin"]  # a layer scale, or windows, between output and residual


@pytest.mark.parametrize("name", [*PRE_NORM.split(), *SCALED])
def test_a_pre_norm_block_adds_the_outputs_of_its_sublayers(name: str) -> None:
    model = real(name)
    sites = [site for site in discover(model) if site.form == "block"]
    for part in named(name).parts:
        block = watch(model, f"{part.stacks.split()[0]}.1")
        mine = [site for site in sites if site.part == part.name]
        outputs = [watch(model, site.path) for site in mine if site.layer == 1]
        run(model)
        if name not in SCALED:
            ran = [output["y"].view_as(block["x"]) for output in outputs if output]
            assert len(ran) >= 2
            assert torch.allclose(block["x"] + sum(ran), block["y"], atol=1e-4)
        silence(model, mine)
        run(model)
        assert torch.equal(block["x"], block["y"])


@pytest.mark.parametrize("name", ["bert", "distilbert", "nomic_bert", "openai-gpt"])
def test_without_its_sublayers_a_post_norm_block_is_its_norms(name: str) -> None:
    model = real(name)
    sites = discover(model)
    seen = watch(model, f"{named(name).parts[0].stacks}.1")
    silence(model, [site for site in sites if site.form == "block"])
    run(model)
    y = seen["x"]
    for role in ("norm.attention", "norm.ffn"):
        y = model.get_submodule(one(sites, role, layer=1).path)(y)
    assert torch.allclose(seen["y"], y, atol=1e-6)


def test_sources_see_what_the_sublayer_sees() -> None:
    sites = discover(real("gemma2"))
    attention, ffn = one(sites, "attention.block"), one(sites, "ffn.block")
    assert attention.path.endswith("post_attention_layernorm")
    assert attention.source == one(sites, "attention.query").path
    assert ffn.path == one(sites, "norm.ffn_post").path
    assert ffn.source == one(sites, "ffn.gate").path
    assert (ffn.d_in, ffn.d_out) == (32, 32)


def test_norms_around_the_blocks() -> None:
    expected = {
        "bert": {"norm.embedding": ["bert.embeddings.LayerNorm"]},
        "opt": {"norm.final": ["model.decoder.final_layer_norm"]},  # registered before the blocks
        "plbart": {"norm.embedding": ["model.encoder.layernorm_embedding",  # registered after
                                      "model.decoder.layernorm_embedding"]},
        "modernbert": {"norm.embedding": ["model.embeddings.norm"],
                       "norm.final": ["model.final_norm"]},  # the head's norm is no site
    }  # fmt: skip
    for name, roles in expected.items():
        found: dict[str, list[str]] = {}
        for site in discover(real(name)):
            if site.role in ("norm.embedding", "norm.final"):
                assert site.layer == (-1 if site.role == "norm.embedding" else 2)
                found.setdefault(site.role, []).append(site.path)
        assert found == roles


def test_order_is_part_then_layer_then_registration() -> None:
    model = real("t5")
    place = {path: i for i, (path, _) in enumerate(model.named_modules())}
    keys = [
        (s.part != "encoder", s.layer, place[s.path], s.form == "block") for s in discover(model)
    ]
    assert keys == sorted(keys)


def test_a_decoder_made_of_an_encoder_is_a_decoder() -> None:
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    with torch.device("meta"):
        sites = discover(transformers.BertLMHeadModel(config))
    assert {site.part for site in sites} == {"decoder"}
    assert one(sites, "cross_attention.block").source == one(sites, "cross_attention.query").path


def test_a_wrapped_transformer_is_still_found() -> None:
    bert = real("bert")
    inner = {(f"0.{site.path}", site.role) for site in discover(bert)}
    assert {(site.path, site.role) for site in discover(nn.Sequential(bert))} == inner


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2)]
)
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        InputError, match=f"must hold .* but {type(model).__name__} .*; take"
    ) as error:
        discover(model)
    assert "\n" not in str(error.value)
