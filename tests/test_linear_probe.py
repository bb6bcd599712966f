"""The head's start: the output layer solves its problem, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from searchpet import linear_probe
from searchpet.errors import InputError
from searchpet.linear_probe import SHRINK, Problem, fit_output
from searchpet.multitask import Heads, MultiSession, turn_to
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.train import logits_of
from tests.commands import write_task
from tests.laws import families as tiny


class Plain(nn.Module):
    """A frozen backbone that is the identity, and a head."""

    def __init__(self, features: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.classifier = nn.Linear(features, outputs, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.classifier(x))


def rows(n: int = 200, features: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    return x * torch.arange(1, features + 1) + 3.0  # unlike in size, and off centre


def start(model: Plain, x: Tensor, y: Tensor) -> tuple[np.ndarray[Any, Any], Any]:
    """Fit; weights in the scale of standardised features, and those features."""
    names = [name for name, _ in model.named_parameters()]
    batches = [{"x": x[i:i + 50], "labels": y[i:i + 50]} for i in range(0, len(x), 50)]
    assert fit_output(model, names, batches, logits_of(model))
    scaled = (x - x.mean(0)) / x.std(0)
    return (model.classifier.weight.detach() * x.std(0)).numpy(), scaled.numpy()


@pytest.mark.parametrize("shrink", SHRINK)
def test_classes_are_solved_as_scikit_learn_solves_them(shrink: float) -> None:
    x = rows()
    y = (x[:, 0] > 3).long() + (x[:, 1] > 5).long()
    scaled = ((x - x.mean(0)) / x.std(0)).double()
    weight, bias = Problem(3, biased=True).least(scaled, y, shrink)
    peer = LogisticRegression(C=1 / (2 * shrink * len(x)), tol=1e-10, max_iter=10_000)
    peer.fit(scaled.numpy(), y.numpy())
    assert weight.numpy() == pytest.approx(peer.coef_, abs=1e-3)
    centre = peer.intercept_ - peer.intercept_.mean()  # they are free up to a common constant
    assert (bias - bias.mean()).numpy() == pytest.approx(centre, abs=1e-2)


@pytest.mark.parametrize("shrink", SHRINK)
def test_numbers_are_solved_as_scikit_learn_solves_them(shrink: float) -> None:
    x = rows().double()
    y = 2 * x[:, 2] - x[:, 5] + 1
    scaled = (x - x.mean(0)) / x.std(0)
    weight, bias = Problem(1, biased=True).least(scaled, y, shrink)
    peer = Ridge(alpha=shrink * len(x)).fit(scaled.numpy(), y.numpy())
    assert weight[0].numpy() == pytest.approx(peer.coef_, rel=1e-3, abs=1e-3)
    assert float(bias) == pytest.approx(float(y.mean()), abs=1e-3)


def test_the_layer_answers_on_features_as_they_come() -> None:
    x = rows()
    y = (x[:, 0] > 3).long()
    model = Plain(6, 2)
    found, scaled = start(model, x, y)
    means = torch.from_numpy(scaled @ found.T)
    shift = (model.classifier(x) - means).detach()
    assert shift.std(0).max() < 1e-3  # the same but for a constant, the bias
    assert (model.classifier(x).argmax(1) == y).float().mean() > 0.85


def test_rows_held_out_choose_the_penalty() -> None:
    """What can be learned is learned; noise is not learned by heart."""
    x = torch.randn(120, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randint(2, (120,), generator=torch.Generator().manual_seed(1))
    for y, low, high in ((noise, 0.5, 0.8), ((x[:, 0] > 0).long(), 0.0, 0.5)):
        problem = Problem(2, biased=True)
        loss = float(problem.loss(*problem.solve(x, y), x, y))
        assert low < loss < high
    assert float(problem.loss(*problem.least(x, noise, SHRINK[0]), x, noise)) < 0.3


def test_too_few_rows_to_hold_any_out_take_the_strongest_penalty() -> None:
    x, y = rows(3).double(), torch.tensor([0, 1, 0])
    problem = Problem(2, biased=True)
    assert torch.equal(problem.solve(x, y)[0], problem.least(x, y, SHRINK[-1])[0])


def test_without_a_bias_nothing_is_taken_off_the_features() -> None:
    x = rows()
    y = (x[:, 0] > x[:, 1]).long()  # a plane through the origin
    model = Plain(6, 2, bias=False)
    start(model, x, y)
    assert (model.classifier(x).argmax(1) == y).float().mean() > 0.9


def test_a_class_that_the_rows_lack_is_no_error() -> None:
    x = rows()
    model = Plain(6, 4)
    start(model, x, (x[:, 0] > 3).long())
    assert set(model.classifier(x).argmax(1).tolist()) == {0, 1}


def test_features_that_hardly_differ_do_not_make_large_weights() -> None:
    x = 1 + 1e-4 * rows()
    model = Plain(6, 2)
    start(model, x, (x[:, 0] > x[:, 0].median()).long())
    assert model.classifier.weight.abs().max() < 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_every_familys_output_layer_is_fitted_and_nothing_else(
    family: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "SHRINK", (1e-2,))  # the labels are noise
    model = tiny.model(family)
    batches = [tiny.inputs(family, rows=8, seed=s) for s in range(4)]
    for s, batch in enumerate(batches):
        if "input_ids" in batch and (left or family != "t5"):  # T5 wants its end token last
            gap = torch.arange(7) < 3 if left else torch.arange(7) > 4
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][::2, gap] = 0
            batch["input_ids"][::2, gap] = 0
        batch["labels"] = torch.randint(3, (8,), generator=torch.Generator().manual_seed(s))
    head, run = tiny.head_of(model), logits_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def loss() -> float:
        found = [nn.functional.cross_entropy(run(b), b["labels"]) for b in batches]
        return float(torch.stack(found).mean())

    drawn = loss()
    assert fit_output(model, head, batches, run)
    assert loss() < min(drawn, 1.08)  # chance is ln 3 = 1.099
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= head
    assert len({n.rpartition(".")[0] for n in changed}) == 1


def test_a_head_without_a_linear_output_stays_as_it_is() -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=2 * self.classifier(x))

    x, model = rows(), Scaled(6, 2)
    before = model.classifier.weight.detach().clone()
    batch = {"x": x, "labels": (x[:, 0] > 3).long()}
    assert not fit_output(model, ["classifier.weight"], [batch], logits_of(model))
    assert not fit_output(model, ["classifier.weight"], [], logits_of(model))
    assert not fit_output(model, [], [batch], logits_of(model))
    assert torch.equal(model.classifier.weight, before)


def test_features_that_are_not_finite_are_refused() -> None:
    x = rows()
    x[3, 2] = float("inf")
    with pytest.raises(InputError, match="finite"):
        start(Plain(6, 2), x, (rows()[:, 0] > 3).long())


def test_search_and_training_begin_with_a_fitted_head(tiny_folder: Path) -> None:
    session = Session(Settings(model=str(tiny_folder), steps=1))
    train = session.splits["train"]
    with session.fresh(0) as model:
        drawn = session.measure(model, train)["accuracy"]
        session.fit_head(model, train, 0)
        fitted = session.measure(model, train)["accuracy"]
        weight = model.classifier.weight.detach().clone()
        session.fit_head(model, train, 0)
        assert torch.equal(model.classifier.weight, weight)  # it starts from nothing drawn
    assert fitted > drawn
    seen: list[float] = []
    session.fit("head", None, 0, tau=1e-9, after=lambda model: seen.append(
        float((model.classifier.weight.detach() - weight).abs().max())))
    assert seen[0] < 1e-6


def test_every_task_has_its_head_fitted(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_task(tmp_path / name)
    session = MultiSession(Settings(model=str(tiny_folder), task="one,two", data=str(tmp_path)))
    with session.fresh(0) as model:
        (switch,) = (m for m in model.modules() if isinstance(m, Heads))
        before = [head.weight.detach().clone() for head in switch.of]
        session.fit_head(model, session.splits["train"], 0)
        for k, task in enumerate(session.tasks):
            turn_to(model, k, task)
            assert not torch.equal(switch.of[k].weight, before[k])
