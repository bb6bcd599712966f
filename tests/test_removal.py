"""Removal: in every proven family the removed model computes what the masked one computes.

Tiny random models, three layers a stack, two or four kv groups; weights are far from their init,
so that every head, neuron, sublayer and layer matters.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from searchpet import removal
from searchpet.cuts import MIXERS
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.families import FAMILIES
from searchpet.flops import flops
from searchpet.probe import outputs, random_inputs, rows
from searchpet.removal import Cut, mask, removable, remove
from searchpet.site import Site
from tests.laws import families as tiny

Config = dict[str, Any]
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: Config = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "intermediate_size": 24, "max_position_embeddings": 32}
TEXT = PLAIN | TOKENS
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
SLIDING = GROUPED | {"sliding_window": 5}
DEBERTA = TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                  "position_buckets": 4, "type_vocab_size": 0}
T5 = TOKENS | {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4,
                   "decoder_start_token_id": 0}
BART = TOKENS | {"d_model": 16, "max_position_embeddings": 32, "decoder_start_token_id": 2}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 3, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 24}

CLASSIFIER, IMAGES = "SequenceClassification", "ImageClassification"
WRITER, SEQ2SEQ = "CausalLM", "Seq2SeqLM"
FAMILY: dict[str, tuple[str, Config]] = {  # `type` or `type, variant` -> task, config
    "albert": (CLASSIFIER, TEXT | {"embedding_size": 16, "inner_group_num": 3}),
    "bart": (SEQ2SEQ, BART),
    "bert": (CLASSIFIER, TEXT),
    "deberta-v2": (CLASSIFIER, DEBERTA | {"share_att_key": False}),
    "deberta-v2, shared keys": (CLASSIFIER, DEBERTA | {"share_att_key": True}),
    "distilbert": (CLASSIFIER, {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24,
                                "vocab_size": 50, "max_position_embeddings": 32}),
    "electra": (CLASSIFIER, TEXT | {"embedding_size": 16}),
    "gemma": (WRITER, GROUPED),
    "gemma2": (WRITER, SLIDING),
    "gpt2": (WRITER, TOKENS | {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    "gpt_neox": (WRITER, TEXT),
    "llama": (WRITER, GROUPED),
    "mistral": (WRITER, SLIDING),
    "modernbert": (CLASSIFIER, TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "mt5": (SEQ2SEQ, T5),  # its feed-forward part is gated
    "opt": (WRITER, TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi3": (WRITER, GROUPED),
    "qwen2": (WRITER, SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": (WRITER, GROUPED),
    "roberta": (CLASSIFIER, TEXT),
    "t5": (SEQ2SEQ, T5),
    "vit": (IMAGES, PLAIN | {"image_size": 16, "patch_size": 8}),
    "xlm-roberta": (CLASSIFIER, TEXT),
}
NAMES = sorted(FAMILY)
WRITERS = [name for name in NAMES if FAMILY[name][0] in (WRITER, SEQ2SEQ)]


@functools.cache
def built(name: str, task: str | None, seed: int, more: tuple[tuple[str, Any], ...]) -> nn.Module:
    usual, settings = FAMILY[name]
    config = transformers.AutoConfig.for_model(name.split(",")[0], **settings | dict(more))
    config.num_labels, config.tie_word_embeddings = 3, False
    auto: Any = getattr(transformers, f"AutoModelFor{task or usual}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = auto.from_config(config, attn_implementation="eager")
        tiny.perturb(model.parameters(), 0.1)
    return model.eval()


def build(name: str, task: str | None = None, seed: int = 0, **more: Any) -> nn.Module:
    return copy.deepcopy(built(name, task, seed, tuple(more.items())))


def probe(model: nn.Module, length: int = 9) -> dict[str, Tensor]:
    return random_inputs(model, rows(model), length, torch.Generator().manual_seed(1))


def masked(model: nn.Module, cut: Cut, inputs: dict[str, Tensor]) -> Tensor:
    hooks = mask(model, cut)
    found = outputs(model, inputs)
    hooks.remove()
    return found


# --- cuts: sites of a model -> what stays and goes ---


def of_role(sites: tuple[Site, ...], end: str, *layers: int, form: str = "linear") -> list[Site]:
    return [s for s in sites if s.form == form and s.role.endswith(end)
            and (not layers or s.layer in layers)]


def widths(sites: tuple[Site, ...], seed: int = 0) -> Cut:
    """Different attention heads and neurons everywhere."""
    draw = random.Random(seed)

    def some(count: int | None) -> tuple[int, ...]:
        size = draw.randint(1, max(1, (count or 0) - 1))
        return tuple(sorted(draw.sample(range(count or 0), size)))

    heads = {s.path: some(s.kv_heads) for s in of_role(sites, "attention.output")}
    neurons = {s.path: some(s.d_in) for s in of_role(sites, "ffn.out")}
    return Cut(heads, neurons)


def sublayers(sites: tuple[Site, ...]) -> Cut:
    """The attentions of the first layers, the feed-forward parts of the second ones."""
    return Cut(sublayers=frozenset(
        s.path for s in [*of_role(sites, "attention.block", 0, form="block"),
                         *of_role(sites, "ffn.block", 1, form="block")]))


def layers(sites: tuple[Site, ...]) -> Cut:
    """The first layer of each stack: T5's owns the position bias."""
    return Cut(layers=frozenset(s.path for s in of_role(sites, "layer", 0, form="layer")))


def emptied(sites: tuple[Site, ...]) -> Cut:
    """All heads and all neurons, elsewhere than `sublayers`."""
    return Cut(heads={s.path: () for s in of_role(sites, "attention.output", 1)},
               neurons={s.path: () for s in of_role(sites, "ffn.out", 0)})


def combined(sites: tuple[Site, ...]) -> Cut:
    """First layers without attention, no second ones, narrow parts everywhere."""
    narrow = widths(sites, seed=1)
    gone = frozenset(s.path for s in of_role(sites, "layer", 1, form="layer"))
    silent = frozenset(s.path for s in sites if s.role == "attention.block" and s.layer == 0)
    crossing = {s.path: () for s in of_role(sites, "cross_attention.output", 2)}
    return Cut(narrow.heads | crossing, narrow.neurons, silent, gone)


CUTS: list[Callable[[tuple[Site, ...]], Cut]] = [widths, sublayers, layers, emptied, combined]


# --- the removed model ---


def removed_equals_masked(model: nn.Module, cut: Cut) -> None:
    inputs, dense = probe(model), outputs(model, probe(model))
    expected = masked(model, cut, inputs)
    assert not torch.allclose(expected, dense, atol=1e-3)  # the cut matters
    weights = tiny.sizes(model.parameters())
    renamed = remove(model, cut)
    assert tiny.sizes(model.parameters()) < weights
    assert tiny.hooks(model) == 0
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert bool(renamed) == bool(cut.layers)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_removed_equals_masked(name: str, cut: Callable[[tuple[Site, ...]], Cut]) -> None:
    model = build(name)
    removed_equals_masked(model, cut(discover(model)))


@pytest.mark.parametrize("name", WRITERS)
def test_sequence_classifiers_of_generating_families(name: str) -> None:
    model = build(name, CLASSIFIER)
    removed_equals_masked(model, combined(discover(model)))


def test_every_proven_family_is_tested() -> None:
    assert {name.split(",")[0] for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2", "modernbert"])
def test_fused_attention_kernels_are_removed_from_as_well(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("sdpa")
    removed_equals_masked(model, widths(discover(model)))
    inputs = probe(model)
    fused = outputs(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(outputs(model, inputs), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [emptied, combined])
@pytest.mark.parametrize("name", WRITERS)
def test_generation_is_the_same_with_a_cache(name: str, cut: Any) -> None:
    model: Any = build(name)
    remove(model, cut(discover(model)))
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    inputs = probe(model, 7)
    inputs.pop("decoder_input_ids", None)
    runs = [model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cached,
                           output_scores=True, return_dict_in_generate=True)
            for cached in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for with_cache, without in zip(*(run.scores for run in runs), strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_loads_into_the_dense_config_cut_the_same_way(name: str) -> None:
    model, other = build(name), build(name, seed=7)
    cut = combined(discover(model))
    remove(model, cut)
    remove(other, cut)
    inputs = probe(model)
    assert not torch.equal(outputs(other, inputs), outputs(model, inputs))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))
    assert torch.equal(outputs(copy.deepcopy(model), inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_discovered_and_removed_from_again(name: str) -> None:
    model = build(name)
    first = discover(model)
    cut = widths(first)
    remove(model, cut)
    left = {(s.path, s.role): s for s in discover(model)}
    assert left.keys() == {(s.path, s.role) for s in first}
    for site in first:
        kept = cut.heads.get(site.path)
        if site.form != "linear" or site.role.split(".")[0] not in MIXERS or kept is None:
            continue
        now = left[site.path, site.role]
        assert (now.kv_heads, now.heads) == (
            len(kept), len(kept) * (site.heads or 0) // (site.kv_heads or 1))
    remove(model, widths(tuple(left.values()), seed=2))  # verifies: in present numbering


def test_layers_are_renumbered_and_counted() -> None:
    model: Any = build("t5", num_layers=4, num_decoder_layers=3)
    cut = Cut(layers=frozenset({"encoder.block.1", "decoder.block.0"}))
    assert remove(model, cut) == {
        "encoder.block.2": "encoder.block.1", "encoder.block.3": "encoder.block.2",
        "decoder.block.1": "decoder.block.0", "decoder.block.2": "decoder.block.1"}
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 2)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (3, 2)
    assert [b.layer[0].SelfAttention.layer_idx for b in model.decoder.block] == [0, 1]
    model = build("gemma2")
    types = model.config.layer_types
    remove(model, Cut(layers=frozenset({"model.layers.1"})))
    assert model.config.layer_types == [types[0], types[2]]
    assert model.config.num_hidden_layers == 2


def test_flags_and_modes_stay() -> None:
    model = build("bert").train()
    tiny_head = {"classifier.weight", "classifier.bias"}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in tiny_head)
    remove(model, combined(discover(model)))
    assert model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == tiny_head


def blind(model: nn.Module) -> set[str]:
    """Parameters that no gradient reaches."""
    result: Any = model(**probe(model))
    result.logits.square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_training_goes_on(name: str) -> None:
    model = build(name)
    remove(model, emptied(discover(model)))
    lost = blind(model) - blind(build(name))
    assert all("norm" in n or ".ln_" in n for n in lost)  # of norms that feed an emptied sublayer
    biases = [n for n, _ in model.named_parameters() if n.endswith("attn.output.bias")]
    assert name != "gpt2" or biases == ["transformer.h.1.attn.output.bias"]  # what is left trains


def test_half_precision_is_verified_in_its_own_rounding() -> None:
    model = build("llama").to(torch.bfloat16)
    weights = tiny.sizes(model.parameters())
    remove(model, widths(discover(model)))
    assert tiny.sizes(model.parameters()) < weights


# --- what is refused, and that nothing has changed then ---


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that removal may touch; tensors by identity."""
    found: dict[str, Any] = {n: id(p) for n, p in model.named_parameters()}
    for path, module in model.named_modules():
        found[f"{path}/module"] = id(module)
        found |= {f"{path}/{k}": v for k, v in vars(module).items()
                  if isinstance(v, int | str | bool | type(None))}
        if hasattr(module, "config"):
            found[f"{path}/config"] = (id(module.config), copy.deepcopy(vars(module.config)))
    return found


def test_an_unknown_family_stays_masked() -> None:
    config = transformers.MPNetConfig(**TEXT, num_labels=3)
    model = transformers.MPNetForSequenceClassification(config).eval()
    tiny.perturb(model.parameters(), 0.2)
    cut, before = widths(discover(model)), snapshot(model)
    reason = removable(model)
    assert reason and "stays masked, latency will not drop" in reason and "\n" not in reason
    with pytest.raises(InputError, match="must be proven for a family, but it is not for mpnet"):
        remove(model, cut)
    assert snapshot(model) == before
    inputs = probe(model)
    dense = outputs(model, inputs)
    assert not torch.allclose(masked(model, cut, inputs), dense, atol=1e-3)
    assert torch.equal(outputs(model, inputs), dense)


OUTPUT = "bert.encoder.layer.{}.attention.output.dense"
DOWN = "bert.encoder.layer.{}.output.dense"
LAYER = "bert.encoder.layer.{}"
REFUSED: list[tuple[str, Config, Cut, str]] = [
    ("bert", {}, Cut(heads={OUTPUT.format(9): (0,)}), "did you mean .*attention.output.dense"),
    ("bert", {}, Cut(heads={DOWN.format(0): (0,)}), "heads must name attention output proj"),
    ("bert", {}, Cut(neurons={OUTPUT.format(0): (0,)}), "neurons must name linears of role ffn"),
    ("bert", {}, Cut(sublayers=frozenset({LAYER.format(0)})), "sublayers must name block sites"),
    ("bert", {}, Cut(layers=frozenset({DOWN.format(0)})), "layers must name layer sites"),
    ("bert", {}, Cut(heads={OUTPUT.format(0): (0, 4)}), r"within 0..3, but got \[0, 4\]"),
    ("bert", {}, Cut(neurons={DOWN.format(0): (3, 2)}), r"must ascend .*got \[3, 2\]"),
    ("bert", {}, Cut(layers=frozenset(LAYER.format(i) for i in range(3))),
     "every stack must keep a layer with attention heads and neurons"),
    ("bert", {}, Cut(heads={OUTPUT.format(i): () for i in range(3)}), "every stack must keep"),
    ("bert", {"is_decoder": True, "add_cross_attention": True},
     Cut(heads={"bert.encoder.layer.0.crossattention.output.dense": (0,)}),
     "is cross-attention, which is not proven for this family"),
    ("deberta-v2", {"conv_kernel_size": 3}, Cut(layers=frozenset({"deberta.encoder.layer.0"})),
     "first layer must stay where the stack's 'conv' acts on its output"),
    ("t5", {}, Cut(layers=frozenset({"encoder.block.1"})),
     "must keep an encoder as deep as its decoder"),
]


@pytest.mark.parametrize(("name", "more", "cut", "law"), REFUSED)
def test_refused_cuts_name_the_law(name: str, more: Config, cut: Cut, law: str) -> None:
    model = build(name, **more)
    before = snapshot(model)
    assert removable(model) is None
    reason = removable(model, cut)
    with pytest.raises(InputError, match=law) as error:
        remove(model, cut)
    assert str(error.value) == reason and "\n" not in reason
    assert snapshot(model) == before


def test_wrapped_linears_and_models_with_deltas_are_refused() -> None:
    model: Any = build("bert")
    nn.utils.parametrize.register_parametrization(  # type: ignore[attr-defined]
        model.bert.encoder.layer[0].output.dense, "weight", nn.Identity())
    with pytest.raises(InputError, match="which is no plain linear"):
        remove(model, Cut(neurons={DOWN.format(0): (0,)}))
    model = build("bert")
    model.searchpet = nn.Identity()
    with pytest.raises(InputError, match="removal must come before deltas"):
        remove(model, Cut())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "phi3", "gemma2"])
def test_verification_catches_a_wrong_slice_and_restores(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = removal.keep_outputs

    def wrong(edits: Any, linear: Any, index: Any) -> None:
        right(edits, linear, [*index[1:], index[0]])  # the right number of the wrong rows

    monkeypatch.setattr(removal, "keep_outputs", wrong)
    model = build(name)
    inputs, before = probe(model), snapshot(model)
    dense, cut = outputs(model, inputs), combined(discover(model))
    with pytest.raises(InputError, match="must compute what the masked one does, but logits"):
        remove(model, cut)
    assert snapshot(model) == before
    assert torch.equal(outputs(model, inputs), dense)
    remove(model, cut, verify=False)  # nothing else would have noticed


# --- FLOPs ---


def by_hand(tokens: int, heads: int, neurons: int, size: int = 16, head: int = 4) -> int:
    """2 T d_in d_out per linear, 4 T T d_head per attention head."""
    projections = 4 * 2 * tokens * size * heads * head
    mixing = heads * 4 * tokens**2 * head
    return projections + mixing + 2 * 2 * tokens * size * neurons


def test_flops_are_those_counted_by_hand() -> None:
    model: Any = build("bert")
    model.set_attn_implementation("sdpa")
    paths = [LAYER.format(i) for i in range(3)]
    assert flops(model, length=20) == dict.fromkeys(paths, by_hand(20, 4, 24))
    assert flops(model, batch=3, length=20)[paths[0]] == 3 * by_hand(20, 4, 24)
    assert flops(model)[paths[0]] == by_hand(32, 4, 24)  # no more positions than that
    remove(model, Cut(
        heads={OUTPUT.format(0): (1,), OUTPUT.format(1): ()},
        neurons={DOWN.format(0): (1, 2, 5)},
        sublayers=frozenset({DOWN.format(1)})))
    assert flops(model, length=20) == dict(
        zip(paths, [by_hand(20, 1, 3), 0, by_hand(20, 4, 24)], strict=True))
    assert model.config._attn_implementation == "sdpa"
    assert not model.training and tiny.hooks(model) == 0


@pytest.mark.parametrize("name", NAMES)
def test_flops_drop_in_every_family(name: str) -> None:
    model = build(name)
    before, cut = flops(model, length=12), combined(discover(model))
    renamed = remove(model, cut)
    after = flops(model, length=12)
    assert set(after) == {renamed.get(path, path) for path in before.keys() - cut.layers}
    for path in before.keys() - cut.layers:
        assert 0 < after[renamed.get(path, path)] < before[path]


def test_all_calls_of_a_shared_layer_count() -> None:
    counted = flops(build("albert", inner_group_num=1, num_hidden_layers=5), length=20)
    assert list(counted.values()) == [5 * by_hand(20, 4, 24)]
