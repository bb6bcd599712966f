"""The training loop: schedule, early stop, best checkpoint, and steps that mean what they say."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from searchpet.batch import Batches, Encoded
from searchpet.errors import InputError
from searchpet.run import StageLoop
from searchpet.train import Fit, Recipe, evaluate, fit, loss_of, predict, schedule
from tests.laws import families as tiny


def encoded(rows: int, seed: int, length: int = 6) -> Encoded:
    """Random texts; the label is whether the first token is a high one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, tiny.WORDS, (rows, length), generator=generator)
    labels = (ids[:, 0] > tiny.WORDS // 2).long()
    return Encoded({"input_ids": ids.tolist()}, labels, {"input_ids": 0})


class Steady:
    """Scores that an evaluation finds, one after another, whatever the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
        self.scores, self.heads = list(scores), []
        monkeypatch.setattr(sys.modules[fit.__module__], "evaluate", self)

    def __call__(self, model: nn.Module, *_: object) -> dict[str, float]:
        self.heads.append(model.classifier.weight.detach().clone())
        return {"accuracy": self.scores.pop(0)}


def model_without_dropout() -> nn.Module:
    model = tiny.model("bert", labels=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(model: nn.Module, recipe: Recipe, batches: Any = None, lr: float = 1e-2) -> Fit:
    groups = [{"params": list(model.parameters()), "kind": "full", "lr": lr}]
    return fit(model, groups, batches or Batches(encoded(64, 0), recipe.batch_size, 0), recipe,
               loss_of(model),
               lambda: sys.modules[fit.__module__].evaluate(
                   model, encoded(32, 1), ["accuracy"], 4 * recipe.batch_size),
               lambda steps, **state: StageLoop(None, "train", steps, 0, torch.Generator(),
                                                state=state))


# --- schedule ---


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.06), (2, 0.5), (10, 0.0), (300, 0.06),
                                               (7, 1.0)])
def test_the_rate_rises_to_one_and_falls_to_nearly_zero(steps: int, warmup: float) -> None:
    factors = [schedule(step, steps, warmup) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors) and max(factors) == 1
    top = factors.index(1.0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_the_rate_of_each_group_follows_the_schedule() -> None:
    model = tiny.model("bert", labels=2)
    rates: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(model, Recipe(steps=8, batch_size=8, warmup=0.25, patience=8), lr=0.5)
    assert rates == pytest.approx([0.5 * schedule(i, 8, 0.25) for i in range(8)])


# --- checkpoints ---


def test_the_best_checkpoint_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("bert", labels=2)
    steady = Steady(monkeypatch, [1.0, 0.1, 0.9, 0.9, 0.3])  # the first is before any training
    result = train(model, Recipe(steps=8, batch_size=8, evaluations=4))
    assert result.history == [(0, 1.0), (2, 0.1), (4, 0.9), (6, 0.9), (8, 0.3)]
    assert result.step == 4 and result.metrics == {"accuracy": 0.9}  # the first of equals
    assert torch.equal(model.classifier.weight, steady.heads[2])
    assert not torch.equal(model.classifier.weight, steady.heads[-1])


def test_training_stops_when_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = Steady(monkeypatch, [0.7, 0.5, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9])
    result = train(tiny.model("bert", labels=2),
                   Recipe(steps=10, batch_size=8, evaluations=10, patience=3))
    assert len(result.history) == 8 and result.step == 4
    assert len(steady.scores) == 3


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_last_step_is_always_evaluated(steps: int) -> None:
    result = train(tiny.model("bert", labels=2), Recipe(steps=steps, batch_size=8, evaluations=2))
    assert result.history[-1][0] == steps


# --- steps ---


def test_training_learns_and_only_what_it_was_given() -> None:
    model = tiny.model("bert", labels=2)
    body = {n: p.detach().clone() for n, p in model.bert.named_parameters()}
    model.bert.requires_grad_(False)
    groups = [{"params": list(model.classifier.parameters()), "kind": "head", "lr": 1e-2}]
    batches, loss = Batches(encoded(64, 0), 16, 0), loss_of(model.eval())
    before = loss(batches[0]).item()
    fit(model, groups, batches, Recipe(steps=40, batch_size=16), loss,
        lambda: evaluate(model, encoded(32, 1), ["accuracy"], 64),
        lambda steps, **state: StageLoop(None, "train", steps, 0, torch.Generator(), state=state))
    assert loss_of(model.eval())(batches[0]).item() < before
    assert all(torch.equal(p, body[n]) for n, p in model.bert.named_parameters())


def test_the_same_seed_trains_to_the_same_bits() -> None:
    first, again = tiny.model("bert", labels=2), tiny.model("bert", labels=2)
    for number, model in enumerate((first, again)):
        torch.manual_seed(number)  # what was drawn before does not matter
        train(model, Recipe(steps=3, batch_size=8))
    for (name, p), q in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_accumulation_is_a_larger_batch() -> None:
    large = Batches(encoded(64, 0), 16, 0)

    class Halves:
        """The large batches, cut in two."""

        def __getitem__(self, step: int) -> dict[str, Tensor]:
            part = slice(8 * (step % 2), 8 * (step % 2) + 8)
            return {name: t[part] for name, t in large[step // 2].items()}

    whole, parts = model_without_dropout(), model_without_dropout()
    train(whole, Recipe(steps=3, batch_size=16), large, lr=1e-3)
    train(parts, Recipe(steps=3, batch_size=8, accumulate=2), Halves(), lr=1e-3)
    moved = (whole.classifier.weight - model_without_dropout().classifier.weight).detach()
    assert float(moved.abs().max()) > 1e-4
    torch.testing.assert_close(
        parts.classifier.weight, whole.classifier.weight, rtol=1e-3, atol=2e-5)


def test_bf16_trains_with_parameters_in_fp32() -> None:
    model = tiny.model("bert", labels=2)
    result = train(model, Recipe(steps=4, batch_size=8, precision="bf16"))
    assert 0 <= result.metrics["accuracy"] <= 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    model = tiny.model("bert", labels=2)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="loss must stay finite"):
        train(model, Recipe(steps=4, batch_size=8))


# --- evaluation ---


def test_evaluation_is_the_direct_computation_in_the_order_of_the_rows() -> None:
    model = tiny.model("bert", labels=2).train()
    rows = [[5, 9, 3], [4], [7, 8, 9, 10, 11], [12, 3], [30, 31, 32], [6]]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    data = Encoded({"input_ids": rows}, labels, {"input_ids": 0})
    found = predict(model, data, batch_size=4)
    assert model.training  # as it was
    model.eval()
    with torch.no_grad():
        direct = np.stack([model(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows])
    np.testing.assert_allclose(found, direct, rtol=1e-4, atol=1e-5)
    accuracy = float((direct.argmax(-1) == labels.numpy()).mean())
    assert evaluate(model, data, ["accuracy"], 4) == {"accuracy": pytest.approx(accuracy)}
