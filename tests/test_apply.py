"""An applied spec is the supernet at z = keep; whatever does not fit the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from searchpet.apply import apply, outside_base, trained_tensors, write_tensors
from searchpet.errors import InputError
from searchpet.spec import Spec
from tests.laws import families as tiny

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
OPTIONS = [{}, {"adapter": {"bottleneck": 3, "stage": "parallel"}, "lora": {"rank": 2}}]


def found(family: str, share: float = 0.5, seed: int = 0, **options: Any) -> Spec:
    model = tiny.model(family)
    placed = tiny.space(model, *tiny.every_kind(**options))
    return tiny.spec_of(model, placed, tiny.some(len(placed), seed, share))


def edited(spec: Spec, number: int, **changes: Any) -> Spec:
    """The spec with one entry changed."""
    entries = list(spec.entries)
    entries[number] = entries[number].model_copy(update=changes)
    return spec.model_copy(update={"entries": tuple(entries)})


@every_family
@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "others"])
def test_an_applied_spec_is_the_supernet_at_its_keep(family: str, options: dict[str, Any]) -> None:
    big, small, batch = tiny.model(family), tiny.model(family), tiny.inputs(family)
    placed = tiny.space(big, *tiny.every_kind(**options))
    keep = tiny.some(len(placed), seed=1)
    net = tiny.supernet(big, placed)
    applied = apply(small, tiny.spec_of(big, placed, keep))
    tiny.hand_over(net, keep, applied)
    net.z = keep.float()
    torch.testing.assert_close(
        tiny.logits(applied, batch), tiny.logits(big, batch), rtol=1e-4, atol=1e-5)
    assert tiny.sizes(applied.searchpet.deltas.parameters()) == placed.parameters(keep)


@every_family
def test_a_fresh_spec_is_silent_and_leaves_only_deltas_and_head_to_train(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    before, head = tiny.logits(model, batch), outside_base(model)
    spec = found(family)
    assert apply(model, spec) is model
    assert torch.equal(tiny.logits(model, batch), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith("searchpet.")} == head
    assert head == tiny.head_of(tiny.model(family))
    count = tiny.sizes([p for n, p in model.named_parameters() if n.startswith("searchpet.")])
    assert count == spec.budget.used


def test_a_retrained_structure_starts_where_the_search_started() -> None:
    big, small = tiny.model("bert"), tiny.model("bert")
    placed = tiny.space(big, *tiny.every_kind(lora={"rank": 4}))
    keep = tiny.some(len(placed), seed=2)
    net = tiny.supernet(big, placed, trained=False, seed=7)
    applied = apply(small, tiny.spec_of(big, placed, keep), seed=7)
    before = {n: p.clone() for n, p in applied.searchpet.named_parameters()}
    tiny.hand_over(net, keep, applied)
    for name, p in applied.searchpet.named_parameters():
        assert torch.equal(p, before[name]), name


def test_deltas_that_share_a_module_act_at_every_use() -> None:
    model, batch = tiny.model("albert"), tiny.inputs("albert")
    placed = tiny.space(model, tiny.rule("bias", role="ffn.out"))
    before = tiny.logits(model, batch)
    apply(model, tiny.spec_of(model, placed, torch.ones(len(placed), dtype=torch.bool)))
    (graft,) = model.searchpet.grafts
    tiny.perturb(graft.delta.parameters(), 1.0)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.searchpet.watch = count
    assert not torch.allclose(tiny.logits(model, batch), before)
    assert calls == 2  # layers


def test_a_spec_of_a_t5_classifier_fits_the_t5_that_generates_and_back() -> None:
    def lora(model: nn.Module) -> Spec:
        placed = tiny.space(model, tiny.rule("lora", "module"))
        return tiny.spec_of(model, placed, tiny.some(len(placed), seed=1))

    classifier = tiny.model("t5")
    writer, spec = transformers.T5ForConditionalGeneration(classifier.config), lora(classifier)
    apply(writer, spec)
    assert {e.path for e in spec.entries} == {
        f"transformer.{graft.site.path}" for graft in writer.searchpet.grafts}
    bare = lora(transformers.T5ForConditionalGeneration(classifier.config))
    assert not any(e.path.startswith("transformer.") for e in bare.entries)
    apply(classifier, bare)
    assert len(classifier.searchpet.grafts) == len(bare.entries)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="made for, tiny .*search again"):
        apply(tiny.model("albert"), found("bert"))
    with pytest.raises(InputError, match="one with a config"):
        apply(nn.Linear(2, 2), found("bert"))


def test_a_second_spec_is_refused() -> None:
    model, spec = tiny.model("bert"), found("bert")
    apply(model, spec)
    with pytest.raises(InputError, match="one spec at a time"):
        apply(model, spec)


@pytest.mark.parametrize(("changes", "message"), [
    ({"path": "bert.nowhere"}, r"no .* at bert\.nowhere"),
    ({"role": "attention.nothing"}, "no attention.nothing at"),
    ({"kept": [0, 10**6]}, "must be below .*but got 1000000"),
    ({"kept": [0, 10**15]}, "must be below"),
    ({"kind": "lorra"}, "did you mean 'lora'"),
    ({"options": {"rank": 10**12}}, "rank must be in"),
    ({"options": {"rnk": 2}}, "did you mean 'rank'"),
    ({"kind": "adapter", "options": {}}, "adapter must sit where it fits"),
])
def test_what_is_not_in_the_model_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    model, spec = tiny.model("bert"), found("bert")
    number = next(i for i, e in enumerate(spec.entries) if e.kind == "lora")
    batch = tiny.inputs("bert")
    before = tiny.logits(model, batch)
    with pytest.raises(InputError, match=message) as caught:
        apply(model, edited(spec, number, **changes))
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "searchpet") and not tiny.hooks(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(tiny.logits(model, batch), before)


def test_a_spec_that_costs_more_than_it_says_is_refused() -> None:
    spec = found("bert")
    number = next(i for i, e in enumerate(spec.entries) if e.kind == "bias" and len(e.kept) > 1)
    fewer = edited(spec, number, kept=spec.entries[number].kept[1:])
    with pytest.raises(InputError, match="must cost what it says"):
        apply(tiny.model("bert"), fewer)
    use = spec.budget.model_copy(update={"limit": spec.budget.used - 1, "slack": -1})
    with pytest.raises(InputError, match="within its budget"):
        apply(tiny.model("bert"), spec.model_copy(update={"budget": use}))


def test_a_budget_that_counts_the_head_is_checked_with_it() -> None:
    model = tiny.model("bert")
    placed = tiny.space(model, *tiny.every_kind())
    keep = tiny.some(len(placed), 0)
    used = placed.parameters(keep)
    head = tiny.sizes([p for n, p in model.named_parameters() if n in tiny.head_of(model)])

    def spec(used: int, limit: int) -> Spec:
        return tiny.spec_of(model, placed, keep, used=used, limit=limit, slack=limit - used,
                            counts="deltas and head")

    apply(tiny.model("bert"), spec(used + head, used + head))
    with pytest.raises(InputError, match="within its budget"):
        apply(tiny.model("bert"), spec(used + head - 1, used + head - 1))


def test_stored_tensors_must_be_exactly_those_of_the_spec() -> None:
    model = apply(tiny.model("bert"), found("bert"))
    head = tiny.head_of(model)
    own = {name: t.clone() for name, t in trained_tensors(model, head).items()}
    first = min(own)
    for tensors, message in [
        ({n: t for n, t in own.items() if n != first}, f"lacks {first}"),
        ({**own, "zz:more": torch.ones(1)}, "unknown zz:more"),
        ({**own, first: torch.ones(99)}, "shape"),
    ]:
        with pytest.raises(InputError, match=message):
            write_tensors(model, head, tensors, "file")
    write_tensors(model, head, {name: t + 1 for name, t in own.items()}, "file")
    for name, t in trained_tensors(model, head).items():
        assert torch.equal(t, own[name] + 1)


def test_the_transformers_trainer_trains_an_applied_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = apply(tiny.model("bert"), found("bert"))
    batch = tiny.inputs("bert", rows=16)
    rows = [{"input_ids": batch["input_ids"][i], "attention_mask": batch["attention_mask"][i],
             "labels": int(batch["input_ids"][i, 0]) % 3} for i in range(16)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=25, learning_rate=1e-2, per_device_train_batch_size=16, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    head = tiny.head_of(tiny.model("bert"))
    assert all(n in head or n.startswith("searchpet.") for n in changed)
    assert changed & head and changed - head


def test_every_kept_coordinate_is_named_once() -> None:
    spec = found("gpt2", lora={"rank": 3})
    kept = [(e.key, c) for e in spec.entries for c in e.kept]
    assert len(kept) == len(set(kept))
    assert spec.budget.used == sum(
        p.numel() for p in apply(tiny.model("gpt2"), spec).searchpet.parameters())
