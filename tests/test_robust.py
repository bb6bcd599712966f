"""Robust tickets: the adversary finds what random noise does not, and the search listens to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from searchpet import catalog
from searchpet.adversary import adversarial
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.pruning import Prune, keep_of
from searchpet.space import Space
from searchpet.strategies import Problem, Ranking
from tests.laws import families as tiny
from tests.laws.problems import Cut, Draws, classified, problem

WORDS = 20
SIZES = {"size": 0.02, "start": 0.01}
Batch = dict[str, Tensor]


def batch_of(family: str, rows: int = 6) -> Batch:
    """Texts of which every other one has two tokens of padding at its end."""
    batch = tiny.inputs(family, rows)
    batch["labels"] = torch.arange(rows) % 3
    if family != "t5":  # it answers at the last token
        batch["input_ids"][::2, -2:] = 0
        batch["attention_mask"][::2, -2:] = 0
    return batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


def random_noise(model: nn.Module, family: str, batch: Batch, share: float, seed: int) -> float:
    """The loss where the embeddings are off by random noise of that share of their norm."""
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.equal(args[0], batch["input_ids"]):
            return output
        real = batch["attention_mask"][..., None]
        noise = torch.randn(output.shape, generator=seeded(seed)) * real
        length = (output * real).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        return output + share * length[:, None, None] * noise

    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)
              and m.weight.shape == model.get_input_embeddings().weight.shape]
    handles = [table.register_forward_hook(add) for table in tables]
    with torch.no_grad():
        found = float(loss_of(model, batch))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma", "t5"])
def test_the_worst_is_above_the_plain_loss_and_random_noise_of_the_same_size(family: str) -> None:
    model, batch = tiny.model(family), batch_of(family)
    plain = float(loss_of(model, batch).detach())
    noisy = [random_noise(model, family, batch, 0.07, seed) for seed in range(8)]
    worst = float(adversarial(model, lambda b: loss_of(model, b), batch, steps=3, **SIZES,
                              generator=seeded()).detach())
    assert len(set(noisy)) == 8  # the noise arrives
    assert worst > max(plain, *noisy)
    assert worst - plain > 2 * (max(noisy) - plain)


def test_more_steps_find_worse_and_the_gradient_is_that_at_the_worst() -> None:
    model, batch = tiny.model("bert"), batch_of("bert")
    weight = model.classifier.weight
    weight.requires_grad_()
    losses = []
    for steps in (1, 2, 4):
        found = adversarial(model, lambda b: loss_of(model, b), batch, steps=steps, **SIZES,
                            generator=seeded())
        losses.append(float(found.detach()))
    assert losses == sorted(losses) and losses[0] < losses[-1]

    def worst(by: float) -> float:
        with torch.no_grad():
            weight[0, 0] += by
        value = adversarial(model, lambda b: loss_of(model, b), batch, steps=4, **SIZES,
                            generator=seeded())
        with torch.no_grad():
            weight[0, 0] -= by
        return float(value.detach())

    (slope,) = torch.autograd.grad(found, weight)
    # the perturbation moves little with the weight, so the slope is nearly the envelope's
    assert float(slope[0, 0]) == pytest.approx((worst(0.02) - worst(-0.02)) / 0.04, rel=0.2)
    assert all(p.grad is None for p in model.parameters())


def test_noise_is_within_reach_and_spares_padding() -> None:
    model, batch = tiny.model("bert"), batch_of("bert")
    seen: list[Tensor] = []
    norm = model.bert.embeddings.LayerNorm
    watch = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))

    def loss(b: Batch) -> Tensor:
        """One that padding has a part in."""
        found = model(**b, output_hidden_states=True)
        padding = found.hidden_states[-1][:, -2:, 0].sum()
        return found.loss + padding

    loss(batch)
    adversarial(model, loss, batch, steps=3, **SIZES, generator=seeded())
    watch.remove()
    plain, *moved = seen
    real = batch["attention_mask"].bool()
    table = model.bert.embeddings.word_embeddings(batch["input_ids"]) * real[..., None]
    for step, found in enumerate(moved):
        shift = found - plain
        assert not shift[~real].any()
        share = shift.flatten(1).norm(dim=1) / table.flatten(1).norm(dim=1)
        assert bool((share > 0.005).all())
        assert bool((share <= 0.01 + 0.02 * step + 1e-5).all())
    assert len(moved) == 4
    torch.testing.assert_close((moved[0] - plain).flatten(1).norm(dim=1),
                               0.01 * table.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-6)


def test_of_an_encoder_decoder_only_what_the_encoder_reads_is_perturbed() -> None:
    model, batch = tiny.model("t5"), batch_of("t5")
    seen: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for part, inputs in seen.items():
        first = model.get_submodule(f"transformer.{part}.block.0")
        first.register_forward_pre_hook(lambda m, args, to=inputs: to.append(args[0].detach()))
    loss_of(model, batch)
    adversarial(model, lambda b: loss_of(model, b), batch, steps=2, **SIZES, generator=seeded())
    assert [len(inputs) for inputs in seen.values()] == [4, 4]
    assert not any(torch.equal(seen["encoder"][0], x) for x in seen["encoder"][1:])
    assert all(torch.equal(seen["decoder"][0], x) for x in seen["decoder"][1:])


def test_zero_steps_are_the_plain_loss() -> None:
    config = transformers.BertConfig(**tiny.TEXT, num_labels=3)  # with dropout
    model, batch = transformers.BertForSequenceClassification(config).train(), batch_of("bert")
    torch.manual_seed(3)
    plain = loss_of(model, batch)
    torch.manual_seed(3)
    found = adversarial(model, lambda b: loss_of(model, b), batch, steps=0, **SIZES,
                        generator=seeded())
    assert torch.equal(plain, found)


def test_all_passes_have_the_same_dropout() -> None:
    """With nothing to perturb by, every pass is the plain one, and so are later draws."""
    config = transformers.BertConfig(**tiny.TEXT, num_labels=3)
    model, batch = transformers.BertForSequenceClassification(config).train(), batch_of("bert")
    torch.manual_seed(3)
    plain, then = loss_of(model, batch), torch.rand(1)
    torch.manual_seed(3)
    losses: list[float] = []

    def loss(b: Batch) -> Tensor:
        value = loss_of(model, b)
        losses.append(float(value.detach()))
        return value

    found = adversarial(model, loss, batch, steps=2, size=0.0, start=0.0, generator=seeded())
    assert losses == [float(plain.detach())] * 3 and torch.equal(found, plain)
    assert torch.equal(torch.rand(1), then)


def test_hooks_are_gone_after_an_exception_too() -> None:
    model, batch = tiny.model("bert"), batch_of("bert")
    before, hooks = loss_of(model, batch), tiny.hooks(model)
    calls = 0

    def fails(b: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return loss_of(model, b)

    with pytest.raises(KeyboardInterrupt):
        adversarial(model, fails, batch, steps=3, **SIZES, generator=seeded())
    assert tiny.hooks(model) == hooks and torch.equal(loss_of(model, batch), before)
    adversarial(model, lambda b: loss_of(model, b), batch, steps=1, **SIZES, generator=seeded())
    assert tiny.hooks(model) == hooks and torch.equal(loss_of(model, batch), before)


@pytest.mark.parametrize(("family", "given", "message"), [
    ("vit", {}, "does not read text"),
    ("bert", {"steps": -1}, "steps of an adversary must be at least 0, but got -1"),
    ("bert", {"size": -0.1}, "size of an adversary must be at least 0, but got -0.1"),
])
def test_what_cannot_be_perturbed_is_one_line(
    family: str, given: dict[str, float], message: str
) -> None:
    model = tiny.model(family)
    batch = {**tiny.inputs(family), "labels": torch.arange(3)}
    asked = {"steps": 2, **SIZES, **given}
    with pytest.raises(InputError, match=message) as caught:
        adversarial(model, lambda b: loss_of(model, b), batch, **asked, generator=seeded())
    assert "\n" not in str(caught.value)


def test_embeddings_that_come_as_such_are_refused() -> None:
    model, batch = tiny.model("bert"), batch_of("bert")

    def beside(b: Batch) -> Tensor:
        given = model.bert.embeddings.word_embeddings.weight[b["input_ids"]]
        found: Tensor = model(inputs_embeds=given, labels=b["labels"]).loss
        return found

    with pytest.raises(InputError, match="looks up none of this batch"):
        adversarial(model, beside, batch, steps=1, **SIZES, generator=seeded())
    del batch["input_ids"]
    with pytest.raises(InputError, match="a batch has attention_mask, labels"):
        adversarial(model, beside, batch, steps=1, **SIZES, generator=seeded())


# --- the search ---------------------------------------------------------------------------------


def fragile() -> nn.Module:
    """A BERT of one layer whose feed-forward has two neurons, each of which tells the label.

    The label is whether the first token is a high one.  Neuron 0 reads a large difference between
    the tokens' embeddings.  Neuron 1 reads a difference of a twentieth, twenty times as strongly,
    and writes twice as much: more useful, until somebody touches the embeddings.
    """
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2,
        vocab_size=WORDS, max_position_embeddings=8, num_labels=2, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config).eval()
    layer, pooler = model.bert.encoder.layer[0], model.bert.pooler.dense
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 or name.endswith("bias"):
                p.zero_()
        table = model.bert.embeddings.word_embeddings.weight
        table[:, 6:] = torch.tensor([1.0, -1.0] * 5)
        sign = torch.where(torch.arange(WORDS) > WORDS // 2, 1.0, -1.0)
        for feature, size in enumerate((1.0, -1.0, 0.05, -0.05)):
            table[:, feature] = size * sign
        spread = float(table.var(1, unbiased=False).mean().sqrt())
        layer.intermediate.dense.weight[0, 0] = spread
        layer.intermediate.dense.weight[1, 2] = 20 * spread
        layer.intermediate.dense.bias.fill_(1.0)
        layer.output.dense.weight[4] = torch.tensor([0.5, 1.0])
        pooler.weight[0, 4], pooler.bias[0] = 1.0, -0.45
        model.classifier.weight[:, 0] = torch.tensor([-2.0, 2.0])
    return model


@pytest.mark.parametrize(("steps", "kept"), [(0, [False, True]), (2, [True, False])])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_neuron_that_noise_can_flip_loses_under_the_adversary_alone(
    steps: int, kept: list[bool], seed: int
) -> None:
    model = fragile()
    space = Space("test", discover(model), [
        tiny.rule("bias", "channel", role="attention.query"),
        tiny.rule("neurons", "atom", {"most": 2, "multiple": 1})])
    given = problem(model, space, 4, steps=40, seed=seed, train=Draws(2 * seed, 16, WORDS),
                    valid=Draws(2 * seed + 1, 16, WORDS))
    given.keep = keep_of(Prune("weights", "98%"), model, space)  # room for one of the two
    found = catalog.get("strategies", "robust")(given, steps=steps)
    assert found.keep[space.prunes].tolist() == kept
    stable, flipped = found.score[space.prunes].tolist()
    assert steps == 0 or stable - flipped > 0.3


RULES = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
         *tiny.every_mask(neurons={"most": 6, "multiple": 2})]


def asked(share: str, limit: int, folder: Path | None = None, steps: int = 6) -> Problem:
    return classified(RULES, limit, steps=steps, share=share, folder=folder)


@pytest.mark.parametrize(("share", "limit"), [("40%", 30), ("70%", 1000)])
def test_both_budgets_hold_exactly(share: str, limit: int) -> None:
    given = asked(share, limit)
    found: Ranking = catalog.get("strategies", "robust")(given, steps=1)
    assert given.keep and 0 < given.limits.parameters(found.keep) <= limit
    left = given.limits.kept(found.keep)
    assert left <= given.keep.limit
    idle = [i for i in given.limits.prune.tolist() if not found.keep[i]]
    for i in idle:  # the draw leaves no room for another unit
        more = given.limits.kept(found.keep.index_fill(0, torch.tensor([i]), True))
        assert more == left or more > given.keep.limit


@pytest.mark.parametrize("calls", [3, 13])  # in the warm-up, and between two passes of a step
def test_a_search_that_was_cut_off_ends_the_same(calls: int, tmp_path: Path) -> None:
    def run(given: Problem, stop: int) -> tuple[Ranking, int]:
        count = Cut(given, stop)
        return catalog.get("strategies", "robust")(given, steps=2, warmup=0.5), count.made

    (tmp_path / "run").mkdir()
    whole, total = run(asked("50%", 200), 0)
    with pytest.raises(KeyboardInterrupt):
        run(asked("50%", 200, tmp_path / "run"), calls)
    rest, left = run(asked("50%", 200, tmp_path / "run"), 0)
    assert torch.equal(rest.score, whole.score) and torch.equal(rest.keep, whole.keep)
    assert total - calls <= left < total


@pytest.mark.parametrize(("given", "message"), [
    ({"steps": -1}, "steps of an adversary must be at least 0"),
    ({"alpha_lr": 0.0}, "robust.alpha_lr must be above 0"),
    ({"ramp": 1.5}, "robust.ramp must be a share"),
    ({"cold": 0.0}, "robust.cold must be in"),
])
def test_a_hyperparameter_out_of_range_is_one_line(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        catalog.get("strategies", "robust")(asked("50%", 200), **given)
    assert "\n" not in str(caught.value)


def test_without_a_limit_or_without_text_there_is_no_robust_search() -> None:
    model = tiny.model("bert")
    given = problem(model, tiny.space(model, tiny.rule("lora")), 100)
    with pytest.raises(InputError, match="no limit on inference"):
        catalog.get("strategies", "robust")(given)
    images = [{**tiny.inputs("vit"), "labels": torch.arange(3)}]
    model = tiny.model("vit")
    space = Space("test", discover(model), RULES)
    given = problem(model, space, 100, train=images, valid=images)
    given.keep = keep_of(Prune("flops", "50%"), model, space)
    with pytest.raises(InputError, match="does not read text"):
        catalog.get("strategies", "robust")(given)
