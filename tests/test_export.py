"""Exports compute what the run does, in the hands of others; what cannot be said is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from searchpet import portable
from searchpet.apply import apply
from searchpet.errors import InputError
from searchpet.export import export, observed, to_merged, to_onnx, to_peft
from searchpet.spacefile import Rule
from searchpet.spec import Spec
from tests.laws import families as tiny

module: Any = sys.modules["searchpet.export"]  # of that name the package offers the function
FAMILIES = ["albert", "bert", "gpt2", "gpt_neox", "llama", "roberta", "t5", "vit"]
BARE = ("llama", "t5")  # norms without a bias
MIXES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"kind": "lora", "options": {"rank": 3}}],
    "bias": [{"kind": "bias", "form": "linear"}],
    "scale": [{"kind": "scale", "form": "linear"}],
    "norm": [{"kind": "scale", "form": "norm"}, {"kind": "bias", "form": "norm"}],
    "all": [{"kind": "lora", "options": {"rank": 2}}, {"kind": "scale"}, {"kind": "bias"}],
}


def rules(mix: str, family: str) -> list[Rule]:
    found = []
    for row in MIXES[mix]:
        row = dict(row)
        if family in BARE and row["kind"] == "bias":
            if row.get("form") == "norm":
                continue
            row["form"] = "linear"
        found.append(tiny.rule(row.pop("kind"), "atom", row.pop("options", None), **row))
    return found


def applied(family: str, *of: Rule, share: float = 0.6, labels: int = 3) -> tuple[nn.Module, Spec]:
    """A model with deltas and a head that look trained, single channels and atoms of it."""
    model = tiny.model(family, labels=labels)
    placed = tiny.space(model, *of)
    spec = tiny.spec_of(model, placed, tiny.some(len(placed), 0, share))
    apply(model, spec)
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, seed=1)
    own = dict(model.named_parameters())
    tiny.perturb([own[name] for name in sorted(tiny.head_of(tiny.model(family)))], 0.3, seed=2)
    return model, spec


def loaded(family: str, model: nn.Module, labels: int = 3) -> Any:
    """As an export sees it; the fresh backbone's head is another one."""
    def fresh() -> nn.Module:
        found = tiny.model(family, labels=labels)
        own = dict(found.named_parameters())
        tiny.perturb([own[name] for name in sorted(tiny.head_of(found))], 0.3, seed=9)
        return found

    return observed(model, tiny.head_of(tiny.model(family)), fresh,
                    ["token_type_ids"] if family == "bert" else [])


def effect(family: str, of: Any) -> float:
    """How far the deltas and the head move the logits."""
    bare = of.fresh()
    return max(float((tiny.logits(bare, batch) - logits).abs().max())
               for batch, logits in zip(of.batches, of.logits, strict=True))


def to_adapter(family: str, mix: str, folder: Path, **more: Any) -> dict[str, Any]:
    model, spec = applied(family, *rules(mix, family), **more)
    seen = loaded(family, model, more.get("labels", 3))
    assert effect(family, seen) > 0.05
    figures: dict[str, Any] = {}
    to_peft(seen, spec, folder, figures)
    assert figures["of them not 0"] == figures["parameters of the structure"] == spec.budget.used
    return figures


def close(figures: dict[str, Any]) -> bool:
    """Within half of what an export is allowed, which is 1e-4 of the largest logit."""
    assert figures["allowed"] == 1e-4 * max(1, figures["largest logit"])
    return figures["largest difference of logits"] <= figures["allowed"] / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
def test_peft_computes_what_the_run_does(family: str, mix: str, tmp_path: Path) -> None:
    figures = to_adapter(family, mix, tmp_path)
    assert figures["not 0 in the export"] == figures["of them not 0"]
    assert figures["stored, padding included"] >= figures["not 0 in the export"]
    assert close(figures)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_lora_by_a_power_of_two_is_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    """Rank 1 and alpha 16, S3PET's; no slices side by side."""
    model, spec = applied(family, tiny.rule("lora", "module", role="attention.output"))
    figures: dict[str, Any] = {}
    to_peft(loaded(family, model), spec, tmp_path, figures)
    assert figures["largest difference of logits"] == 0
    assert figures["stored, padding included"] == figures["parameters of the structure"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_regression_has_one_output(family: str, tmp_path: Path) -> None:
    assert close(to_adapter(family, "all", tmp_path, labels=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_computes_what_the_run_does(family: str, tmp_path: Path) -> None:
    of = [r for r in rules("all", family) if family not in BARE or r.kind != "bias"]
    model, spec = applied(family, *of)
    figures = to_merged(loaded(family, model), spec, tmp_path)
    assert close(figures)
    assert figures["parameters"] == tiny.sizes(tiny.model(family).parameters())


def test_llama_has_a_place_for_biases_in_its_config(tmp_path: Path) -> None:
    model, spec = applied("llama", tiny.rule("bias", "channel", form="linear"), tiny.rule("lora"))
    figures = to_merged(loaded("llama", model), spec, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert close(figures) and config["attention_bias"] and config["mlp_bias"]


def test_a_flag_that_nobody_needs_stays_off(tmp_path: Path) -> None:
    model, spec = applied("llama", tiny.rule("bias", "channel", role="attention.query"))
    to_merged(loaded("llama", model), spec, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_bias"] and not config["mlp_bias"]


def pruned(family: str, keep: Callable[[Any], torch.Tensor], kind: str, **select: Any) -> Any:
    """A model with units really removed, and its spec."""
    model = tiny.model(family)
    elsewhere = "attention.query" if kind == "neurons" else "ffn.in"
    placed = tiny.space(model, tiny.rule("lora", "module", role=elsewhere),
                        tiny.rule(kind, "atom", {"multiple": 4} if kind == "neurons" else {},
                                  **select))
    spec = tiny.spec_of(model, placed, keep(placed))
    use = {"measure": "flops", "text": "50%", "limit": 1.0, "used": 0.5, "dense": 2.0}
    spec = Spec.model_validate({**json.loads(spec.model_dump_json()), "keep": use})
    apply(model, spec, remove=True)
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, seed=1)
    return model, spec


def first_of_each(kind: str, count: int) -> Callable[[Any], torch.Tensor]:
    """Keeps all PET and the first units of a kind at each site."""
    def keep(space: Any) -> torch.Tensor:
        found = torch.ones(len(space), dtype=torch.bool)
        for number, place in enumerate(space.placements):
            units = (space.owner == number).nonzero().squeeze(-1)
            if place.kind == kind:
                found[units[count:]] = False
        return found
    return keep


@pytest.mark.parametrize(("family", "kind", "count"), [
    ("bert", "neurons", 3), ("llama", "neurons", 3), ("t5", "neurons", 3), ("gpt2", "neurons", 3),
    ("qwen3", "heads", 1)])
def test_sizes_that_a_config_can_say_are_said(family: str, kind: str, count: int,
                                              tmp_path: Path) -> None:
    model, spec = pruned(family, first_of_each(kind, count), kind)
    figures = to_merged(loaded(family, model), spec, tmp_path)
    assert close(figures)
    assert figures["parameters"] < tiny.sizes(tiny.model(family).parameters())


def unequal(space: Any) -> torch.Tensor:
    """Takes one unit of one mask alone."""
    found = torch.ones(len(space), dtype=torch.bool)
    number = next(i for i, place in enumerate(space.placements) if place.kind != "lora")
    found[(space.owner == number).nonzero()[0]] = False
    return found


@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_sizes_that_no_config_can_say_are_refused(kind: str, tmp_path: Path) -> None:
    model, spec = pruned("bert", unequal, kind)
    with pytest.raises(InputError, match=r"layers of one size .* keep the run .* --format onnx"):
        to_merged(loaded("bert", model), spec, tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_onnx_computes_what_the_run_does_in_every_shape(family: str, tmp_path: Path) -> None:
    model, _ = applied(family, *rules("all", "bert" if family == "bert" else "llama"))
    if family == "llama":  # a graph needs no config: any linear may have a bias
        assert any(g.kind == "bias" for g in model.searchpet.grafts)
    figures = to_onnx(loaded(family, model), tmp_path)
    assert close(figures) and figures["shapes tried"] == 3


def test_onnx_keeps_what_was_removed_removed(tmp_path: Path) -> None:
    model, _ = pruned("bert", unequal, "neurons")
    figures = to_onnx(loaded("bert", model), tmp_path)
    assert close(figures)
    assert figures["parameters"] < tiny.sizes(tiny.model("bert").parameters())


@pytest.mark.parametrize(("kind", "message"), [
    ("adapter", r"none for adapter at bert\..* \(it is not affine\); keep the run"),
    ("matrix", r"none for matrix at bert\..* full update.*take --format merged"),
    ("heads", r"none for heads at bert\..*attention.output.dense.*PEFT does not prune"),
])
def test_what_peft_cannot_say_is_refused_by_position(kind: str, message: str) -> None:
    model, _ = applied("bert", tiny.rule("lora", "atom", role="ffn.in"), tiny.rule(kind, "atom"),
                       share=0.5)
    with pytest.raises(InputError, match=message) as caught:
        portable.adapters(model, tiny.head_of(tiny.model("bert")))
    assert "\n" not in str(caught.value) and "lora at" not in str(caught.value)


@pytest.mark.parametrize("family", BARE)
def test_a_bias_on_a_norm_that_has_none_is_refused(family: str, tmp_path: Path) -> None:
    model, spec = applied(family, tiny.rule("bias", form="norm"))
    way = r"search with --forbid kind=bias,role=norm\.\*"
    with pytest.raises(InputError, match=rf"bias at .* \(a norm without a bias\).* {way}"):
        portable.adapters(model, tiny.head_of(tiny.model(family)))
    with pytest.raises(InputError, match=rf"bias at .*norm.* {way} and take --format peft"):
        to_merged(loaded(family, model), spec, tmp_path)


@pytest.mark.parametrize("family", BARE)
def test_onnx_refuses_a_bias_on_a_norm_alone(family: str, tmp_path: Path) -> None:
    """It takes those on linears, and PEFT would not take the norm's either."""
    model, _ = applied(family, tiny.rule("bias"))
    with pytest.raises(InputError, match=r"bias at .*norm.* --forbid kind=bias") as caught:
        to_onnx(loaded(family, model), tmp_path)
    named = str(caught.value).split("has none for ")[1].split(";")[0]
    assert all("norm" in place for place in named.split(", "))
    assert "peft" not in str(caught.value)


def test_what_is_not_affine_is_not_merged(tmp_path: Path) -> None:
    model, spec = applied("bert", tiny.rule("adapter"), tiny.rule("lora"))
    with pytest.raises(InputError, match=r"must be affine, but the structure has adapter at bert"):
        to_merged(loaded("bert", model), spec, tmp_path)


def test_a_name_is_matched_as_it_is() -> None:
    """As PEFT matches: (.*\\.)?(KEY)$ from the start."""
    import re

    names = ["encoder.layer.1.query", "encoder.layer.11.query", "encoderxlayer.1.query",
             "my.encoder.layer.1.query", "encoder.layer.1.query-a", "a+b.layer[1]", "a|b", "a.b"]
    for name in names:
        key = rf"(.*\.)?({portable.pattern(name)})$"
        assert [other for other in names if re.match(key, other)] == [name]


@pytest.mark.parametrize(("family", "form"), [
    ("vit", "peft"), ("vit", "merged"), ("vit", "onnx"), ("bert", "peft"), ("llama", "merged"),
    ("gpt2", "peft")])
def test_what_save_pretrained_wrote_is_exported(family: str, form: str, tmp_path: Path) -> None:
    mix = "lora" if form == "peft" else "all"
    model, spec = applied(family, *rules(mix, family))
    any_model: Any = model
    any_model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "preprocessor_config.json").write_text("{}")
    made = export(tmp_path / "saved", format=form, out=tmp_path / "out")
    assert close(made.values["figures"])
    assert made.values["run"] == {"spec_hash": spec.hash, "task": None, "tensors": hashlib.sha256(
        (tmp_path / "saved" / "delta.safetensors").read_bytes()).hexdigest()}
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    text = (tmp_path / "out" / "README.md").read_text()
    assert type(model).__name__ in text and "AutoTokenizer" not in text
    if form == "onnx":
        return
    code = text.split("```python\n")[1].split("```")[0].replace(
        "folder = 'out'", f"folder = {str(tmp_path / 'out')!r}")
    code = code.replace(repr(spec.backbone.name), repr(str(tmp_path / "saved")))
    room: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(code, room)
    batch = observed(model, frozenset(), lambda: model).batches[1]
    assert torch.allclose(tiny.logits(room["model"], batch), tiny.logits(model, batch), atol=1e-4)


def test_layers_1_and_11_keep_their_own_ranks(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "bert", tiny.CONFIGS["bert"] | {"num_hidden_layers": 12})
    model = tiny.model("bert")
    placed = tiny.space(model, tiny.rule("lora", "atom", {"rank": 3}, role="attention.query"))
    keep = torch.zeros(len(placed), dtype=torch.bool)
    for layer, rank in ((1, 3), (11, 1), (10, 2)):
        keep[3 * layer:3 * layer + rank] = True
    spec = tiny.spec_of(model, placed, keep)
    apply(model, spec)
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, seed=1)
    figures: dict[str, Any] = {}
    to_peft(loaded("bert", model), spec, tmp_path, figures)
    assert figures["stored, padding included"] == spec.budget.used == 6 * 32 and close(figures)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == [1, 2, 3]


def test_a_module_that_a_name_catches_by_its_end_is_noticed(tmp_path: Path) -> None:
    """PEFT saves every module whose name ends with that of the head."""
    model, spec = applied("llama", tiny.rule("lora"))
    seen = loaded("llama", model)

    def fresh() -> nn.Module:
        found = seen.fresh()
        found.model.layers[0].underscore = nn.Linear(2, 2)
        return found

    with pytest.raises(InputError, match=r"PEFT must load what an export holds.*underscore"):
        to_peft(observed(model, seen.head, fresh), spec, tmp_path, {})


def test_sparse_atoms_are_counted_without_their_zeros(tmp_path: Path) -> None:
    model, spec = applied("bert", tiny.rule("lora", "module", {"rank": 2}))
    with torch.no_grad():
        for delta in model.searchpet.deltas:
            delta.A[:, ::2] = 0
    figures: dict[str, Any] = {}
    to_peft(loaded("bert", model), spec, tmp_path, figures)
    assert (figures["not 0 in the export"] == figures["of them not 0"]
            < figures["parameters of the structure"] == figures["stored, padding included"])


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight", "lora_B.bias", "ia3_l",
                                 "LayerNorm.weight", "classifier.weight"])
def test_a_wrong_number_in_the_file_is_noticed(key: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write_adapter

    def falsify(adapter: Any, folder: Path, spec: Spec) -> None:
        tensors = {name: value.clone() for name, value in adapter.tensors.items()}
        for name in (name for name in tensors if name.endswith(key)):
            tensors[name].view(-1)[0] += 1
        write(portable.Adapter(adapter.type, adapter.config, tensors), folder, spec)

    monkeypatch.setattr(module, "_write_adapter", falsify)
    model, spec = applied("bert", *rules("all", "bert"))
    with pytest.raises(InputError, match=rf"exactly what an export holds.*{key}.* was deleted"):
        to_peft(loaded("bert", model), spec, tmp_path, {})


@pytest.mark.parametrize("form", ["peft", "merged", "onnx"])
def test_wrong_logits_are_noticed(form: str, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = applied("bert", tiny.rule("lora", "module"))
    seen = loaded("bert", model)
    seen.logits[-1].view(-1)[0] += 0.01
    write: dict[str, Callable[[], Any]] = {
        "peft": lambda: to_peft(seen, spec, tmp_path, {}),
        "merged": lambda: to_merged(seen, spec, tmp_path), "onnx": lambda: to_onnx(seen, tmp_path)}
    with pytest.raises(InputError, match=r"logits differ by 0\.01 \(allowed: 0\.0001\); it was"):
        write[form]()


def test_a_small_effect_that_is_lost_is_noticed(tmp_path: Path) -> None:
    """Also one below what rounding may change of a logit."""
    model, spec = applied("bert", tiny.rule("bias", "module"))
    deltas = list(model.searchpet.deltas.parameters())
    large = loaded("bert", model).effect
    with torch.no_grad():
        for p in deltas:
            p *= 6e-5 / large
    seen = loaded("bert", model)
    assert 4e-5 < seen.effect < 8e-5
    figures = to_merged(seen, spec, tmp_path / "kept")
    assert figures["most that the deltas change"] == seen.effect
    assert figures["largest difference of logits"] < figures["allowed"] == seen.effect / 2
    model, spec = applied("bert", tiny.rule("bias", "module"))
    with torch.no_grad():
        for p in model.searchpet.deltas.parameters():
            p.zero_()
    lost = dataclasses.replace(seen, model=model)
    with pytest.raises(InputError, match=r"must compute what its run does.*it was deleted"):
        to_merged(lost, spec, tmp_path / "lost")
