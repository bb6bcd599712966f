"""Merged weights compute what the deltas computed; what cannot be merged is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from searchpet import catalog
from searchpet.apply import apply
from searchpet.errors import InputError
from searchpet.grafts import Graft, Grafts
from searchpet.merge import merge
from searchpet.site import Site
from searchpet.spacefile import Rule
from tests.laws import families as tiny

LINEAR = Site("m", "attention.query", 0, "linear", "encoder", 4, 4)
# merged anywhere; a bias only where the module has one
AFFINE = [kind for kind in tiny.kinds(neutral=0)
          if catalog.get("deltas", kind).fits(LINEAR) and kind != "bias"]
WITH_BIASES = ["albert", "bert", "gpt2", "gpt_neox", "vit"]


def applied(family: str, *rules: Rule, share: float = 0.6) -> nn.Module:
    """A model with deltas that look trained."""
    model = tiny.model(family)
    placed = tiny.space(model, *rules)
    apply(model, tiny.spec_of(model, placed, tiny.some(len(placed), 0, share)))
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, seed=1)
    return model


def rules(*kinds: str) -> list[Rule]:
    return [tiny.rule(kind, "atom", {"rank": 3} if kind == "lora" else {}) for kind in kinds]


def merged_equals_unmerged(model: nn.Module, family: str) -> None:
    batch = tiny.inputs(family)
    bare = tiny.logits(tiny.model(family), batch)
    before = tiny.logits(model, batch)
    assert not torch.allclose(before, bare, atol=1e-2)  # the deltas matter
    assert merge(model) is model
    torch.testing.assert_close(tiny.logits(model, batch), before, rtol=1e-5, atol=1e-5)
    assert not hasattr(model, "searchpet")
    assert tiny.hooks(model) == tiny.hooks(tiny.model(family))
    assert model.state_dict().keys() == tiny.model(family).state_dict().keys()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_equals_unmerged(family: str) -> None:
    merged_equals_unmerged(applied(family, *rules(*AFFINE)), family)


@pytest.mark.parametrize("family", WITH_BIASES)
def test_merged_equals_unmerged_with_biases(family: str) -> None:
    merged_equals_unmerged(applied(family, *rules(*AFFINE, "bias")), family)


@pytest.mark.parametrize("kind", [*AFFINE, "bias"])
def test_each_affine_kind_merges_alone(kind: str) -> None:
    merged_equals_unmerged(applied("gpt2", *rules(kind)), "gpt2")


def test_norms_that_store_one_less_are_told_by_what_they_do() -> None:
    model = applied("gemma", tiny.rule("scale", "channel", form="norm"), share=0.9)
    (norm, *_) = [m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm")]
    weight = norm.weight.detach().clone()
    graft = next(g for g in model.searchpet.grafts if "layers.0.input_layernorm" in g.site.path)
    gain = graft.delta.affine(torch.ones(graft.delta.width)).g.detach()
    merge(model)
    torch.testing.assert_close(norm.weight.detach(), (1 + weight) * (1 + gain) - 1)


def unchanged_after_refusal(model: nn.Module, message: str) -> None:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = tiny.hooks(model)
    with pytest.raises(InputError, match=message) as caught:
        merge(model)
    assert "\n" not in str(caught.value)
    assert tiny.hooks(model) == hooks and hasattr(model, "searchpet")
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.parametrize("kind", ["adapter", "lowrank_adapter"])
def test_a_kind_that_is_not_affine_is_refused_by_name_and_nothing_changes(kind: str) -> None:
    model = applied("bert", *rules("lora", kind))
    unchanged_after_refusal(model, f"affine.*{kind} at bert.encoder.layer")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_bias_without_a_place_is_refused_by_name_and_nothing_changes(family: str) -> None:
    unchanged_after_refusal(applied(family, *rules("lora", "bias")), r"bias .*layer.*has none")


def test_a_model_without_deltas_is_refused() -> None:
    with pytest.raises(InputError, match="has none; apply a spec or load a run"):
        merge(tiny.model("bert"))


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_a_single_module_takes_all_its_affine_kinds_at_once(module: nn.Module) -> None:
    form: Any = "linear" if isinstance(module, nn.Linear) else "norm"
    site = Site("m", "attention.query", 0, form, "encoder", 4, 4)
    toy = nn.Module()
    toy.m, toy.forward = module, lambda x: module(x)
    kinds = [k for k in [*AFFINE, "bias"] if catalog.get("deltas", k).fits(site)
             and (k != "bias" or getattr(module, "bias", None) is not None)]
    own = [Graft(site, k, catalog.get("deltas", k)(site)) for k in kinds]
    for graft in own:
        tiny.perturb(graft.delta.parameters(), 0.5, seed=3)
    tiny.perturb(module.parameters(), 0.3, seed=4)
    toy.searchpet = Grafts(toy, own)
    x = torch.randn(2, 3, 4)
    before = module(x)
    merge(toy)
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)


def test_deltas_merge_where_they_are() -> None:
    """Gates of the merge are made on the deltas' device."""
    site = Site("m", "attention.query", 0, "linear", "encoder", 4, 4)
    toy = nn.Module()
    toy.m = nn.Linear(4, 4)
    toy.searchpet = Grafts(toy, [Graft(site, "lora", catalog.get("deltas", "lora")(site))])
    toy.to("meta")
    merge(toy)
    assert toy.m.weight.device.type == "meta"
