"""Saliency: energies are squared gradients, agreement is of two halves, ranks combine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from searchpet.errors import InputError
from searchpet.slopes import energy, worth
from searchpet.strategies import Problem, Ranking
from searchpet.strategies.saliency import opened, ranks, search
from tests.laws import families as tiny
from tests.laws.problems import Cut, classified


def asked(*, steps: int = 10, folder: Path | None = None) -> Problem:
    rules = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel")]
    return classified(rules, 200, steps=steps, folder=folder)


def test_the_energy_of_a_channel_is_its_squared_gradient_in_steps_of_its_kind() -> None:
    given = asked()
    batches = [given.train[i] for i in range(3)]
    before = [p.detach().clone() for p in given.net.trained]
    found = energy(given.net, given.loss, given.rates, batches, opened(given))
    assert all(torch.equal(a, b) for a, b in zip(before, given.net.trained, strict=True))
    given.net.model.eval()
    for place, graft in zip(given.space.placements, given.net.grafts.grafts, strict=True):
        units = given.space.unit[place.start : place.start + place.width]
        parameters = list(graft.delta.parameters())
        squares = torch.zeros(place.width, dtype=torch.float64)
        for batch in batches:
            given.net.z = opened(given)
            for g in torch.autograd.grad(given.loss(batch), parameters, materialize_grads=True):
                if place.kind == "bias":
                    squares += g.double().square()
                elif g.shape[-1] == place.width:  # B (d_out, rank); at init A has no gradient
                    squares += g.double().square().sum(0)
        expected = squares * given.rates[place.kind] ** 2
        torch.testing.assert_close(found[units], expected, rtol=0.02, atol=1e-3 * found.max())


def test_the_agreement_is_minus_the_slope_of_the_gates_on_the_other_half() -> None:
    given = asked(steps=20)
    ranking = search(given, by="agreement", warmup=0.5, batches=2)
    given.net.model.eval()  # the deltas are still as they have been trained
    mean = sum(worth(given.net, given.loss, given.valid[i], opened(given)) for i in (0, 1)) / 2
    torch.testing.assert_close(ranking.score, mean)
    assert float(ranking.score.abs().max()) > 0
    assert torch.equal(ranking.keep, given.limits.fill(ranking.score, density=True))


def test_both_is_the_mean_rank_per_parameter() -> None:
    given = asked()
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(len(given.space), generator=generator, dtype=torch.float64)
              for _ in range(2)]
    cost = given.space.cost.double()
    found = ranks(given, scores) / cost
    first, second = ((s / cost).argsort().argsort() for s in scores)
    assert torch.equal(found.argsort(), (first + second).double().add(2).argsort())
    assert float(found.min()) > 0 and float(found.max()) <= 2


def test_gates_that_are_settled_as_pruned_stay_shut() -> None:
    given = asked()
    space = given.space
    settled = torch.ones(len(space), dtype=torch.bool)
    assert opened(given).tolist() == [1.0] * len(space)
    settled[0] = False
    space.prunes[0] = True
    assert opened(replace(given, settled=settled))[0] == 0


def test_a_search_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    def run(given: Problem, stop: int) -> tuple[Ranking, int]:
        count = Cut(given, stop)
        return search(given, warmup=1.0), count.made

    whole, total = run(asked(), 0)
    with pytest.raises(KeyboardInterrupt):
        run(asked(folder=tmp_path), 6)
    rest, left = run(asked(folder=tmp_path), 0)
    assert torch.equal(rest.score, whole.score) and torch.equal(rest.keep, whole.keep)
    assert left == total - 5


@pytest.mark.parametrize(("more", "message"), [
    ({"by": "energ"}, "did you mean 'energy'"),
    ({"warmup": 0.0}, "saliency.warmup must be a share"),
    ({"batches": 0}, "saliency.batches must be at least 1"),
])
def test_a_wrong_hyperparameter_is_one_line(more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(asked(), **more)  # type: ignore[arg-type]
