"""What `save_pretrained` writes of an applied model is read by transformers and by `load`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from searchpet.apply import apply, load
from searchpet.errors import InputError
from searchpet.merge import merge
from tests.laws import families as tiny

FAMILIES = ["bert", "gpt2", "llama", "t5", "vit"]


def bare(family: str) -> nn.Module:
    """As `tiny.model`; a T5 with embeddings that are not tied is nothing its config can say."""
    model = tiny.model(family)
    if family != "t5":
        return model
    config = model.config
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(model)(config)
        tiny.perturb(model.parameters(), 0.1)
    return model.eval()


def applied(family: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model with deltas and a head that look trained."""
    model = bare(family) if model is None else model
    placed = tiny.space(model, *tiny.every_kind(**options))
    apply(model, tiny.spec_of(model, placed, tiny.some(len(placed), 0)))
    tiny.perturb((p for p in model.parameters() if p.requires_grad), 0.2, seed=1)
    return model


def pruned(remove: bool = False) -> nn.Module:
    model = tiny.model("bert")
    placed = tiny.space(model, *tiny.every_mask())
    keep = tiny.some(len(placed), 3, 0.8)
    return apply(model, tiny.spec_of(model, placed, keep), remove=remove)


def stored(folder: Path) -> dict[str, Tensor]:
    """All weights that transformers would read."""
    return {name: value for file in folder.glob("model*.safetensors")
            for name, value in load_file(file).items()}


def close(a: Tensor, b: Tensor) -> None:
    """Within rounding, which goes by the largest of the logits."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["5GB", "10KB"], ids=["one file", "shards"])
def test_a_saved_model_is_restored_and_its_base_is_the_base(
    family: str, size: str, tmp_path: Path
) -> None:
    model, batch, before = applied(family), tiny.inputs(family), bare(family)
    model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (size == "10KB") == (tmp_path / "model.safetensors.index.json").is_file()
    again = load(tmp_path)
    assert type(again) is type(model) and not again.training
    assert again.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    close(tiny.logits(again, batch), tiny.logits(model, batch))
    assert not torch.allclose(tiny.logits(again, batch), tiny.logits(before, batch), atol=1e-2)

    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    head = tiny.head_of(before)
    for name, p in plain.named_parameters():
        original = model if name in head else before  # the head is the trained one
        assert torch.equal(p, original.get_parameter(name)), name
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any("searchpet" in key for key in info["unexpected_keys"])
    assert not any("searchpet" in key for key in stored(tmp_path))


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "GPT2LMHeadModel",
                                  "LlamaForCausalLM"])
def test_models_that_write_are_restored_as_what_they_are(name: str, tmp_path: Path) -> None:
    build = getattr(transformers, name)
    family = build.config_class.model_type
    config = tiny.model(family).config
    config.tie_word_embeddings = family != "llama"
    torch.manual_seed(0)
    model = applied(family, build(config).eval())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is build
    batch = tiny.inputs(family)
    batch |= {"decoder_input_ids": batch["input_ids"]} if family == "t5" else {}
    close(tiny.logits(again, batch), tiny.logits(model, batch))
    _, info = build.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_units_that_are_masked_are_restored_and_really_removed(tmp_path: Path) -> None:
    model, batch = pruned(), tiny.inputs("bert")
    model.save_pretrained(tmp_path)
    for remove in (False, None):
        close(tiny.logits(load(tmp_path, remove=remove), batch), tiny.logits(model, batch))
    smaller = tiny.sizes(load(tmp_path).parameters())
    assert smaller < tiny.sizes(tiny.model("bert").parameters())


def test_a_model_with_units_removed_is_restored_on_its_backbone(tmp_path: Path) -> None:
    model, batch = pruned(remove=True), tiny.inputs("bert")
    tiny.model("bert").save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "delta.safetensors", "spec.json"]  # weights that nothing could build are not there
    again = load(tmp_path / "saved", model=str(tmp_path / "backbone"))
    close(tiny.logits(again, batch), tiny.logits(model, batch))
    tiny.model("bert", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="must be those that the deltas were trained on"):
        load(tmp_path / "saved", model=str(tmp_path / "other"))
    with pytest.raises(InputError, match="backbone must be a local folder or a name"):
        load(tmp_path / "saved")
    with pytest.raises(InputError, match="save it before merging"):
        merge(model).save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = tiny.model("bert")
    placed = tiny.space(model, tiny.rule("bias", "channel"))
    apply(model, tiny.spec_of(model, placed, tiny.some(len(placed), 0)))
    tiny.perturb(model.searchpet.parameters(), 0.2, seed=1)
    merge(model).save_pretrained(tmp_path)
    assert not (tmp_path / "spec.json").exists()
    again = type(model).from_pretrained(tmp_path)
    close(tiny.logits(again, tiny.inputs("bert")), tiny.logits(model, tiny.inputs("bert")))


def test_what_is_pushed_is_the_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pushed = applied("bert"), []

    def push(self: Any, repo_id: str, **_: Any) -> None:  # as the hub's: save, then upload
        self.save_pretrained(tmp_path / "upload")
        pushed.append(repo_id)

    monkeypatch.setattr(type(model), "push_to_hub", push)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    model.push_to_hub("me/other")
    assert pushed == ["mine", "me/other"]
    names = {p.name for p in (tmp_path / "upload").iterdir()}
    assert {"config.json", "model.safetensors", "spec.json", "delta.safetensors"} <= names


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    applied("bert").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_half_precision_comes_back_as_it_was(tmp_path: Path) -> None:
    model, batch = applied("bert").to(torch.bfloat16), tiny.inputs("bert")
    assert {p.dtype for p in model.searchpet.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert {p.dtype for p in again.searchpet.parameters()} == {torch.float32}
    torch.testing.assert_close(tiny.logits(again, batch), tiny.logits(model, batch),
                               rtol=2e-2, atol=2e-2)


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    model = applied("bert")

    def fresh() -> None:
        model.save_pretrained(tmp_path)

    def edit(**changes: Any) -> None:
        from safetensors import safe_open

        with safe_open(tmp_path / "delta.safetensors", "pt") as file:
            about = json.loads(file.metadata()["saved"])
        save_file(load_file(tmp_path / "delta.safetensors"), tmp_path / "delta.safetensors",
                  {"saved": json.dumps(about | changes)})

    fresh()
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(InputError, match="must be those that the deltas were trained on"):
        load(tmp_path)
    for changes, message in [
        ({"architecture": "os"}, "must be a model class of transformers, but got 'os'"),
        ({"architecture": "a.b"}, "architecture: .*pattern"),
        ({"head": ["nowhere"]}, "it has no nowhere"),
        ({"spec_hash": "0"}, "must belong to the spec beside it"),
        ({"more": 1}, "more: Extra inputs"),
    ]:
        fresh()
        edit(**changes)
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    fresh()
    with pytest.raises(InputError, match="has one head, but got task='a'; drop it"):
        load(tmp_path, task="a")
    from searchpet.engine import evaluate

    with pytest.raises(InputError, match="which knows no task"):
        evaluate(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        model.save_pretrained(tmp_path / "spec.json")
