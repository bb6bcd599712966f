"""An applied model is a transformers model: Trainer, pipeline, compile, copies, devices' hooks."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
)

from searchpet.apply import apply, load
from searchpet.deltas.weights import Weights
from searchpet.discover import discover
from searchpet.grafts import Graft, Grafts
from searchpet.space import make
from searchpet.sparse import freeze_zeros
from tests.laws import families as tiny

FAMILIES = ["bert", "gpt2", "llama", "t5", "vit"]
OTHERS = {"adapter": {"bottleneck": 3, "stage": "parallel"}, "lora": {"rank": 2}}


def applied(family: str, masks: bool = False, **options: Any) -> nn.Module:
    """A model with deltas that look trained."""
    model = tiny.model(family)
    rules = tiny.every_mask() if masks else tiny.every_kind(**options)
    placed = tiny.space(model, *rules)
    keep = tiny.some(len(placed), 0, 0.8 if masks else 0.5)
    apply(model, tiny.spec_of(model, placed, keep))
    tiny.perturb(model.searchpet.parameters(), 0.2, seed=1)
    return model


def rows(family: str, count: int = 16) -> list[dict[str, Any]]:
    """Rows for a Trainer, easy to learn."""
    batch = tiny.inputs(family, rows=count)
    first = next(iter(batch.values())).flatten(1)[:, 0]
    return [{name: value[i] for name, value in batch.items()} | {"labels": int(first[i]) % 3}
            for i in range(count)]


def trainer(model: nn.Module, out: Path, steps: int = 8, family: str = "bert",
            **arguments: Any) -> Trainer:
    return Trainer(model, TrainingArguments(**{
        "output_dir": str(out), "max_steps": steps, "learning_rate": 1e-2, "use_cpu": True,
        "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": [], "seed": 0,
        "disable_tqdm": True, "save_strategy": "no", **arguments}), train_dataset=rows(family),
        eval_dataset=rows(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_trainer_resumes_to_the_same_weights(family: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, other = applied(family, **OTHERS), applied(family, **OTHERS)
    trainer(whole, tmp_path, family=family, **saving).train()
    tiny.perturb(other.searchpet.parameters(), 0.5, seed=9)  # the checkpoint's must come back
    middle = load_like(copy.deepcopy(other), tmp_path / "checkpoint-4")
    again = trainer(other, tmp_path, family=family, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, p in whole.named_parameters():
        assert torch.equal(other.get_parameter(name), p), name
    batch = tiny.inputs(family)
    assert not torch.equal(tiny.logits(middle, batch), tiny.logits(whole.eval(), batch))
    assert math.isfinite(again.evaluate()["eval_loss"])


def load_like(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the weights of a Trainer's checkpoint, as the Trainer reads it."""
    from safetensors.torch import load_file

    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    return model.eval()


def test_a_checkpoint_is_loaded_as_any_saved_model(tmp_path: Path) -> None:
    model = applied("bert")
    trainer(model, tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    torch.testing.assert_close(
        tiny.logits(load(tmp_path / "checkpoint-2"), tiny.inputs("bert")),
        tiny.logits(model.eval(), tiny.inputs("bert")), rtol=1e-4, atol=1e-5)


def test_the_best_checkpoint_comes_back_with_its_deltas(tmp_path: Path) -> None:
    model = applied("bert")
    run = trainer(model, tmp_path, steps=4, save_strategy="steps", save_steps=1,
                  eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                  metric_for_best_model="loss", greater_is_better=True)  # the worst, so the first
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    assert best.name != "checkpoint-4"
    torch.testing.assert_close(
        tiny.logits(model.eval(), tiny.inputs("bert")),
        tiny.logits(load(best), tiny.inputs("bert")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True}, {"bf16": True}],
                         ids=["gradient checkpointing", "bf16"])
def test_a_trainer_trains_with(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = applied(family, **OTHERS)
    run = trainer(model, tmp_path, steps=20, family=family, **arguments)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert {p.dtype for p in model.searchpet.parameters()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    batch = tiny.inputs("bert") | {"labels": torch.tensor([0, 1, 2])}
    found = []
    for checkpointing in (False, True):
        model = applied("bert", **OTHERS).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        found.append([p.grad for p in model.searchpet.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pipeline_takes_an_applied_model(
    tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2)
    placed = tiny.space(model, *tiny.every_kind())
    classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer, top_k=None,
                        device="cpu")
    texts = ["a good film", "the bad cat"]
    before = classify(texts)
    apply(model, tiny.spec_of(model, placed, tiny.some(len(placed), 0)))
    classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer, top_k=None,
                        device="cpu")
    assert classify(texts) == before  # silent
    tiny.perturb(model.searchpet.parameters(), 0.3, seed=1)
    scores = tiny.logits(model, tiny_tokenizer(texts, padding=True, return_tensors="pt"))
    for row, probabilities in zip(classify(texts, batch_size=2), scores.softmax(-1), strict=True):
        found = {line["label"]: line["score"] for line in row}
        assert found == pytest.approx(
            {f"LABEL_{i}": float(p) for i, p in enumerate(probabilities)}, abs=1e-5)
    assert classify(texts) != before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masks", [False, True], ids=["pet", "masks"])
def test_compiled_in_one_graph_the_logits_are_the_same(family: str, masks: bool) -> None:
    model, batch = applied(family, masks, **OTHERS), tiny.inputs(family)
    expected = tiny.logits(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.logits(compiled, batch), expected)
    tiny.perturb(model.searchpet.parameters(), 0.3, seed=2)  # weights are no constants of it
    assert torch.equal(tiny.logits(compiled, batch), tiny.logits(model, batch))
    torch._dynamo.reset()


def test_a_mask_of_weights_compiles_as_well() -> None:
    model, batch = tiny.model("bert"), tiny.inputs("bert")
    site = next(s for s in discover(model) if s.role == "attention.query")
    delta = Weights(site)
    Grafts(model, [Graft(site, "weights", delta.thin(torch.arange(delta.width) % 2 == 0))])
    expected = tiny.logits(model, batch)
    assert not torch.allclose(expected, tiny.logits(tiny.model("bert"), batch), atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(tiny.logits(compiled, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_whole_and_on_their_own(family: str) -> None:
    model, batch = applied(family, **OTHERS), tiny.inputs(family)
    model(**batch).logits.sum().backward()  # what a pass leaves must not be in the way
    expected = tiny.logits(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
              torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(tiny.logits(other, batch), expected)
        tiny.perturb(other.searchpet.parameters(), 0.3, seed=3)
        assert not torch.equal(tiny.logits(other, batch), expected)
    assert torch.equal(tiny.logits(model, batch), expected)
    other.searchpet.detach()  # the copy's hooks are its own
    assert tiny.hooks(other) == 0 and tiny.hooks(model) > 0


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = applied("bert")
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        tiny.perturb(other.searchpet.parameters(), 0.3, seed=3)
        other.save_pretrained(tmp_path / str(number))
        batch = tiny.inputs("bert")
        torch.testing.assert_close(tiny.logits(load(tmp_path / str(number)), batch),
                                   tiny.logits(other, batch), rtol=1e-4, atol=1e-5)


def test_a_copy_of_sparse_deltas_keeps_its_zeros() -> None:
    model = tiny.model("bert")
    site = next(s for s in discover(model) if s.role == "attention.query")
    delta = make("lora", site, {"rank": 2})
    masks = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0
             for name, p in delta.named_parameters()}
    freeze_zeros(delta, masks)
    model.searchpet = Grafts(model, [Graft(site, "lora", delta, sparse=masks)])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(other.searchpet.parameters(), lr=1.0)
        for _ in range(2):
            other(**tiny.inputs("bert"), labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
        (graft,) = other.searchpet.grafts
        for name, p in graft.delta.named_parameters():
            assert not p[~graft.sparse[name]].any() and p[graft.sparse[name]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_half_models_keep_their_deltas_whole(family: str, dtype: torch.dtype) -> None:
    model, batch = applied(family, **OTHERS), tiny.inputs(family)
    expected = tiny.logits(model, batch)
    own = [p.detach().clone() for p in model.searchpet.parameters()]
    half = model.to(dtype)
    for p, before in zip(half.searchpet.parameters(), own, strict=True):
        assert torch.equal(p, before)
    found = tiny.logits(half, batch)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_double_models_are_double_throughout() -> None:
    model, batch = applied("bert", **OTHERS), tiny.inputs("bert")
    expected = tiny.logits(model, batch)
    found = tiny.logits(model.double(), batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_devices_hooks_of_accelerate_load_deltas_as_they_are_needed(family: str) -> None:
    from accelerate import cpu_offload, dispatch_model

    model, batch = applied(family, **OTHERS), tiny.inputs(family)
    expected = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(dispatch_model(model, {"": "cpu"}), batch), expected)
    model = applied(family, **OTHERS)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in model.searchpet.parameters())
    assert torch.equal(tiny.logits(model, batch), expected)
