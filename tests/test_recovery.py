"""Recovery losses: formulas by hand, what learns, how layers match, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from searchpet.batch import Encoded
from searchpet.contrast import Bank, bank, info_nce, represent, see
from searchpet.errors import InputError
from searchpet.recovery import (
    TERMS,
    Objective,
    Recovery,
    attention_loss,
    hidden_loss,
    logits_loss,
    match,
    pairs,
)
from searchpet.removal import Cut, remove
from searchpet.train import loss_of
from tests.laws import families as tiny

TAUGHT = ["logits", "hidden", "attention"]


def only(*terms: str, **options: Any) -> Recovery:
    """The terms at weight 1 and nothing else."""
    return Recovery(**dict.fromkeys(TERMS, 0.0) | dict.fromkeys(terms, 1.0), **options)


def bert(layers: int = 2, seed: int = 0, labels: int = 3, **more: Any) -> nn.Module:
    """A random BERT without dropout, so that training mode changes nothing."""
    config = transformers.BertConfig(
        **tiny.TEXT | {"num_hidden_layers": layers} | more, num_labels=labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager")
        tiny.perturb(model.parameters(), 0.2)
    return model.eval()


def labelled(rows: int = 4, seed: int = 0, family: str = "bert") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tiny.inputs(family, rows, seed) | {
        "labels": torch.randint(3, (rows,), generator=generator)}


def padded(batch: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """The same texts under more padding."""
    return {name: F.pad(value, (0, columns)) if value.dim() == 2 else value
            for name, value in batch.items()}


def keep_layers(model: nn.Module, kept: list[int]) -> nn.Module:
    """A copy of a BERT that has lost its other layers."""
    student = copy.deepcopy(model)
    encoder = student.bert.encoder
    encoder.layer = nn.ModuleList(encoder.layer[i] for i in kept)
    return student


def keep_head(model: nn.Module, layer: int, head: int) -> nn.Module:
    """A copy of a BERT of which one layer has a single attention head left."""
    student = copy.deepcopy(model)
    attention = student.bert.encoder.layer[layer].attention
    size = attention.self.attention_head_size
    rows = slice(head * size, (head + 1) * size)
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        linear.weight, linear.bias = (nn.Parameter(p.detach()[rows]) for p in (
            linear.weight, linear.bias))
    attention.output.dense.weight = nn.Parameter(attention.output.dense.weight.detach()[:, rows])
    return student


def encoded(rows: int, seed: int = 0) -> Encoded:
    """Texts of 3 to 8 tokens, no two the same, and labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = [[2 + i // 40, 2 + i % 40, *torch.randint(
        2, tiny.WORDS, (1 + i % 6,), generator=generator).tolist()] for i in range(rows)]
    return Encoded({"input_ids": ids}, torch.arange(rows) % 3, {"input_ids": 0})


def banked(model: nn.Module, texts: Encoded, **options: Any) -> Bank:
    return bank(model, texts, torch.Generator().manual_seed(0), **options)


def term(name: str, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor],
         **options: Any) -> float:
    with torch.no_grad():
        return float(Objective(student, teacher, only(name, **options), batch).terms(batch)[name])


# --- a student that is its teacher ---


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family: str) -> None:
    student = tiny.model(family)
    objective = Objective(student, copy.deepcopy(student), only(*TAUGHT), tiny.inputs(family))
    terms = objective.terms(tiny.inputs(family, seed=1))
    assert list(terms) == TAUGHT
    assert all(float(v.detach()) == pytest.approx(0, abs=1e-9) for v in terms.values()), terms
    other = Objective(student, tiny.model(family, seed=1), only(*TAUGHT), tiny.inputs(family))
    assert all(float(v.detach()) > 1e-9 for v in other.terms(tiny.inputs(family)).values())


def test_without_other_terms_it_is_the_models_own_loss() -> None:
    student, batch = tiny.model("bert").train(), labelled()
    losses = []
    for loss in (loss_of(student), Objective(student, None, Recovery(), batch).loss,
                 Objective(student, bert(seed=1), Recovery(), batch).loss):
        torch.manual_seed(0)  # dropout is on
        losses.append(float(loss(batch).detach()))
    assert losses[0] == losses[1] == losses[2]


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    recovery = Recovery(ce=0.1, logits=0.9, hidden=2.0, attention=30.0, unsupervised=0.3,
                        supervised=3.0)
    batch, teacher = labelled(), bert(seed=1)
    banks = {"unsupervised": [banked(bert(seed=2), encoded(9))],
             "supervised": [banked(teacher, encoded(9))]}
    objective = Objective(bert(), teacher, recovery, batch, banks)
    terms = objective.terms(batch)
    assert list(terms) == list(TERMS)
    by_hand = sum(getattr(recovery, name) * float(value.detach()) for name, value in terms.items())
    assert float(objective.loss(batch).detach()) == pytest.approx(by_hand, rel=1e-6)


# --- what learns ---


def test_gradients_reach_the_student_and_the_maps_only() -> None:
    student, teacher, batch = bert(), bert(seed=1), labelled()
    banks = {"unsupervised": [banked(bert(seed=2), encoded(9))],
             "supervised": [banked(teacher, encoded(9))]}
    recovery = Recovery(logits=1, hidden=1, attention=1, unsupervised=1, supervised=1)
    objective = Objective(student, teacher, recovery, batch, banks)
    assert [tuple(w.shape) for w in objective.parameters()] == [(16, 16)] * 2
    objective.loss(batch).backward()
    trained = [*student.parameters(), *objective.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained
               if p is not student.bert.embeddings.token_type_embeddings.weight)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(b.rows.requires_grad for given in objective.banks.values() for b in given)


def test_only_the_hidden_term_has_maps() -> None:
    teacher, batch = bert(seed=1), labelled()
    assert Objective(bert(), teacher, only("logits", "attention"), batch).parameters() == []


def test_deltas_learn_through_a_frozen_student() -> None:
    student = bert()
    net = tiny.supernet(student, tiny.space(student, tiny.rule("bias", "channel")))
    batch = labelled()
    Objective(student, bert(), only(*TAUGHT), batch).loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for p in net.grafts.deltas[:1].parameters())
    assert all(p.grad is None for p in student.bert.encoder.layer[0].output.dense.parameters())


def test_the_teacher_never_drops_out_and_the_student_does() -> None:
    student, teacher, batch = tiny.model("bert"), tiny.model("bert", seed=1), labelled()
    objective = Objective(student, teacher.train(), only("logits"), batch)
    calm = [float(objective.loss(batch).detach()) for _ in range(2)]
    teacher.train()
    assert [float(objective.loss(batch).detach()), calm[1]] == [calm[0]] * 2
    student.train()
    assert float(objective.loss(batch).detach()) != float(objective.loss(batch).detach())
    assert not teacher.training and student.training


def test_thirty_steps_of_distillation_halve_the_distance_to_the_teacher() -> None:
    teacher = bert(4)
    student = keep_layers(teacher, [0, 3]).train()
    batches = [tiny.inputs("bert", 16, seed) for seed in range(30)]
    fresh = tiny.inputs("bert", 64, 99)
    objective = Objective(student, teacher, only("logits", "hidden"), fresh)
    before = term("logits", student, teacher, fresh, temperature=1.0)
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], 3e-3,
                                  weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        objective.loss(batch).backward()
        optimizer.step()
    after = term("logits", student, teacher, fresh, temperature=1.0)
    assert after <= before / 2, (before, after)


def test_a_look_at_the_probe_leaves_no_trace() -> None:
    student, batch = tiny.model("bert").train(), labelled()
    state = torch.get_rng_state()
    Objective(student, bert(), only(*TAUGHT), batch)
    assert student.training and torch.equal(torch.get_rng_state(), state)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


# --- logits ---


def test_the_temperature_formula_against_hand_numbers() -> None:
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    # T = 1: (9/10, 1/10) against (1/2, 1/2);  T = 2: (3/4, 1/4) against (1/2, 1/2), times 4
    one = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    two = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(logits_loss(student, teacher, 1.0)) == pytest.approx(one, rel=1e-5)
    assert float(logits_loss(student, teacher, 2.0)) == pytest.approx(two, rel=1e-5)
    twice = logits_loss(student.repeat(3, 1), teacher.repeat(3, 1), 2.0)
    assert float(twice) == pytest.approx(two, rel=1e-5)  # a mean over examples


def test_numbers_are_distilled_by_squared_error() -> None:
    batch = tiny.inputs("bert") | {"labels": torch.tensor([0.5, -1.0, 2.0])}
    student, teacher = bert(labels=1), bert(labels=1, seed=1)
    gap = tiny.logits(student, batch) - tiny.logits(teacher, batch)
    assert term("logits", student, teacher, batch) == pytest.approx(float(gap.square().mean()))


def test_another_architecture_teaches_logits() -> None:
    config = transformers.DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=2,
                                           vocab_size=tiny.WORDS, num_labels=3)
    teacher = transformers.DistilBertForSequenceClassification(config)
    batch = labelled() | {"token_type_ids": torch.zeros(4, 7, dtype=torch.long)}
    assert term("logits", bert(), teacher, batch) > 0
    with pytest.raises(InputError, match="architecture bert, but got distilbert"):
        Objective(bert(), teacher, only("hidden"), batch)


# --- layers ---


@pytest.mark.parametrize(("layers", "taught", "expected"), [
    (3, 3, [1, 2, 3]), (3, 6, [2, 4, 6]), (2, 5, [3, 5]), (4, 6, [2, 3, 5, 6]), (1, 4, [4]),
    (5, 6, [1, 2, 4, 5, 6]), (3, 1, [1, 1, 1])])
def test_layers_match_by_relative_depth(layers: int, taught: int, expected: list[int]) -> None:
    assert match(layers, taught) == expected


def test_a_student_that_lost_layers_is_matched_to_the_teachers_depths() -> None:
    teacher, batch = bert(4), labelled()
    student = keep_layers(teacher, [0, 2])
    ours, theirs = (m(**batch, output_hidden_states=True).hidden_states
                    for m in (student, teacher))
    assert len(ours) == 3 and len(theirs) == 5
    by_hand = [(ours[i] - theirs[j]).square().mean() for i, j in ((1, 2), (2, 4))]
    expected = float(torch.stack(by_hand).mean().detach())
    assert term("hidden", student, teacher, batch) == pytest.approx(expected, rel=1e-5)


def test_stacks_are_matched_each_for_itself() -> None:
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    assert pairs([(a,), (b, c)], [(b, c), (c, a)]) == [(a, c), (b, c), (c, a)]


def test_a_map_is_applied_and_may_change_the_size() -> None:
    s, w = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    t, real = torch.tensor([[[1.0, 2.0, 0.0]]]), torch.tensor([[True]])
    assert float(hidden_loss([(s, t)], [w], real)) == 3.0  # (0 + 0 + 3^2) / 3
    narrow = bert(hidden_size=8)
    objective = Objective(narrow, bert(seed=1), only("hidden"), labelled())
    assert [tuple(m.shape) for m in objective.parameters()] == [(16, 8)] * 2
    assert torch.equal(objective.parameters()[0].detach(), torch.eye(16, 8))


@pytest.mark.parametrize(("name", "options"), [
    ("hidden", {}), ("attention", {}), ("attention", {"attention_form": "kl"})])
def test_padding_does_not_count(name: str, options: dict[str, Any]) -> None:
    student, teacher, batch = bert(), bert(seed=1), labelled()
    before = term(name, student, teacher, batch, **options)
    after = term(name, student, teacher, padded(batch, 3), **options)
    assert before > 0 and after == pytest.approx(before, rel=1e-4)


# --- attention ---


def test_attention_is_averaged_over_the_heads_that_are_left() -> None:
    teacher, batch = bert(), labelled()
    student = keep_head(teacher, layer=0, head=1)
    first = teacher(**batch, output_attentions=True).attentions[0]  # (b, 2, s, s)
    ours, theirs = (m(**batch, output_attentions=True).attentions[1].mean(1)
                    for m in (student, teacher))
    by_hand = ((first[:, 1] - first.mean(1)).square().mean() + (ours - theirs).square().mean()) / 2
    assert term("attention", student, teacher, batch) == pytest.approx(float(by_hand.detach()),
                                                                      rel=1e-4)
    assert term("attention", student, teacher, batch, attention_form="kl") > 0


def test_attention_by_kl_against_hand_numbers() -> None:
    s = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])  # one head
    t = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.5], [0.0, 0.0]]]])  # two, mean .75 .25
    first = torch.tensor([[True, False]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(attention_loss([(s, t)], first, "kl")) == pytest.approx(expected, rel=1e-4)
    assert float(attention_loss([(2 * s, t)], first, "kl")) == pytest.approx(expected, rel=1e-4)
    assert float(attention_loss([(s, t)], first, "mse")) == pytest.approx(0.25**2)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_attention_maps_that_a_model_cannot_give_are_refused(who: str) -> None:
    models = {"student": bert(), "teacher": bert()}
    models[who].set_attn_implementation("sdpa")
    with pytest.raises(InputError, match=f"2 layers, but the {who} gives 0; .*eager") as refusal:
        Objective(models["student"], models["teacher"], only("attention"), labelled())
    assert "\n" not in str(refusal.value)


def without_attention(model: nn.Module, layer: int) -> nn.Module:
    """A copy of a BERT of which one layer has lost its attention."""
    student = copy.deepcopy(model)
    remove(student, Cut(sublayers=frozenset({f"bert.encoder.layer.{layer}.attention.output.dense"
                                             })))
    return student


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_a_student_that_lost_an_attention_and_a_layer_learns_from_the_maps_that_are_left(
    form: str
) -> None:
    teacher, batch = bert(layers=4, seed=1), labelled()
    student = without_attention(bert(layers=4), 1)
    remove(student, Cut(layers=frozenset({"bert.encoder.layer.0"})))
    student.set_attn_implementation("eager")
    ours = student(**batch, output_attentions=True).attentions
    theirs = teacher(**batch, output_attentions=True).attentions
    assert len(ours) == 2  # of three layers: the first of them has none
    objective = Objective(student, teacher, only("attention", attention_form=form), batch)
    taught = [theirs[i - 1] for i in match(3, 4)[1:]]
    by_hand = attention_loss(list(zip(ours, taught, strict=True)),
                             batch["attention_mask"].bool(), form)
    found = objective.loss(batch)
    assert float(found.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    found.backward()
    own = student.bert.encoder.layer[1].attention.self.query.weight
    assert own.grad is not None and bool(own.grad.any())
    hidden_too = Objective(student, teacher, only("attention", "hidden"), batch)
    assert len(hidden_too.parameters()) == 3  # hidden states are matched in all layers


def test_a_teacher_without_an_attention_teaches_the_others() -> None:
    student, whole, batch = bert(seed=1), bert(), labelled()
    teacher = without_attention(whole, 0)
    teacher.set_attn_implementation("eager")
    (theirs,) = teacher(**batch, output_attentions=True).attentions
    ours = student(**batch, output_attentions=True).attentions[1]
    by_hand = attention_loss([(ours, theirs)], batch["attention_mask"].bool(), "mse")
    assert term("attention", student, teacher, batch) == pytest.approx(
        float(by_hand.detach()), rel=1e-5)


def test_no_pair_of_maps_is_refused() -> None:
    student, teacher = without_attention(bert(), 0), without_attention(bert(seed=1), 1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="but none is left; take hidden=1") as refusal:
        Objective(student, teacher, only("attention"), labelled())
    assert "\n" not in str(refusal.value)


# --- contrast ---


def test_info_nce_against_three_examples_by_hand() -> None:
    half = math.sqrt(0.5)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [half, half]])
    z = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, -1.0]])  # cosines: 1 0 .7 | 0 1 .7 | .7 -.7 0
    none, same = torch.zeros(3, 3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)
    e = math.exp
    alike = math.log(e(2) + 1 + e(2 * half)) - 2
    askew = math.log(e(2 * half) + e(-2 * half) + 1) - 0
    expected = (2 * alike + askew) / 3
    assert float(info_nce(z, rows, same, 0.5)) == pytest.approx(expected, rel=1e-5)
    two = torch.tensor([[True, True, False], [False] * 3, [False] * 3])  # the rest do not count
    both = math.log(e(2) + 1 + e(2 * half)) - (2 + 0) / 2
    assert float(info_nce(z, rows, two, 0.5)) == pytest.approx(both, rel=1e-5)
    assert float(info_nce(z, rows, none, 0.5)) == 0


@pytest.mark.parametrize(("family", "states"), [
    ("bert", "hidden_states"), ("gpt2", "hidden_states"), ("t5", "decoder_hidden_states")])
def test_the_representation_is_the_mean_of_the_last_hidden_state(family: str, states: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    assert torch.allclose(represent(out, batch), getattr(out, states)[-1].mean(1), atol=1e-6)
    batch["attention_mask"][0, 2:] = 0
    expected = getattr(out, states)[-1][0, :2].mean(0)
    assert torch.allclose(represent(out, batch)[0], expected, atol=1e-6)


def test_a_bank_holds_each_text_once_and_finds_it_under_any_padding() -> None:
    model, texts = bert(), encoded(20)
    held = banked(model, texts.select([*range(20), *range(20)]), batch_size=7)
    assert held.rows.shape == (20, 16) and not held.rows.requires_grad
    assert torch.allclose(held.rows.norm(dim=-1), torch.ones(20))
    batch = texts.batch([3, 11, 5])
    for seen in (batch, padded(batch, 4)):
        found = held.same_text(seen)
        assert found.sum(-1).tolist() == [1, 1, 1]
        at = found.nonzero()[:, 1]
        assert held.labels is not None and held.labels[at].tolist() == [0, 2, 2]
        with torch.no_grad():  # the row is what this very model gives for the text
            z = represent(see(model, seen, "fp32", "hidden_states"), seen)
        assert torch.allclose(F.cosine_similarity(z, held.rows[at]), torch.ones(3), atol=1e-5)
    assert held.same_label(batch).sum(-1).tolist() == [7, 6, 6]
    assert not held.same_text(tiny.inputs("bert")).any()


def test_a_bank_draws_no_more_rows_than_asked() -> None:
    model, texts = tiny.model("bert").train(), encoded(20)  # with dropout
    first, again = banked(model, texts, rows=6), banked(model, texts, rows=6)
    assert first.place == again.place and torch.equal(first.rows, again.rows)
    assert len(first.rows) == len(first.place) == 6 and model.training
    other = bank(model, texts, torch.Generator().manual_seed(1), rows=6)
    assert other.place.keys() != first.place.keys()


@pytest.mark.parametrize("name", ["unsupervised", "supervised"])
def test_contrast_draws_a_student_to_its_positives(name: str) -> None:
    texts = encoded(24)
    batch = texts.batch(range(24))
    far = Bank(torch.eye(3, 16), torch.arange(3), {})  # one direction per label
    banks = {"unsupervised": [banked(bert(seed=1), texts), banked(bert(seed=2), texts)],
             "supervised": [far]}
    student = bert()
    objective = Objective(student, None, only(name), batch, banks)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses


def test_texts_that_no_bank_holds_teach_nothing() -> None:
    student, batch = bert(), labelled()
    banks = {"unsupervised": [banked(bert(seed=1), encoded(9))]}
    loss = Objective(student, None, only("unsupervised"), batch, banks).loss(batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


# --- precision ---


def test_bf16_changes_the_terms_a_little() -> None:
    batch, teacher = labelled(), bert(seed=1)
    recovery = Recovery(logits=1, hidden=1, attention=1)
    full, half = (Objective(bert(), teacher, recovery, batch, precision=p).terms(batch)
                  for p in ("fp32", "bf16"))
    for name in full:
        exact, rounded = float(full[name].detach()), float(half[name].detach())
        assert rounded != exact and rounded == pytest.approx(exact, rel=0.1)
    assert all(half[name].dtype == torch.float32 for name in TAUGHT)


# --- refusals ---


@pytest.mark.parametrize(("options", "says"), [
    ({"ce": 0.0}, "one of ce, .* must be > 0, but all are 0"),
    ({"logits": -1.0}, "logits must be a finite number >= 0, but got -1.0"),
    ({"hidden": math.inf}, "hidden must be a finite number >= 0, but got inf"),
    ({"supervised": math.nan}, "supervised must be .* but got nan"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0, but got 0.0"),
    ({"contrast_temperature": -0.1}, "contrast_temperature must be .* but got -0.1"),
    ({"attention_form": "mes"}, "kl, mse, but got 'mes'; did you mean 'mse'?"),
])
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace("?", r"\?")) as refusal:
        Recovery(**options)
    assert "\n" not in str(refusal.value)


def unlabelled_bank() -> Bank:
    texts = encoded(5)
    return banked(bert(), Encoded(texts.tokens, None, texts.pad))


@pytest.mark.parametrize(("recovery", "given", "says"), [
    (only("logits"), lambda: {"teacher": None}, "need a teacher, but got none"),
    (only("logits"), lambda: {"teacher": bert(labels=2)}, "student's 3 outputs, but has 2"),
    (Recovery(), lambda: {"probe": tiny.inputs("bert")}, "need labels, but the batch has none"),
    (only("unsupervised"), dict, "unsupervised needs a bank, but got none"),
    (only("supervised"), lambda: {"banks": {"supervised": []}}, "supervised needs a bank"),
    (only("supervised"), lambda: {"banks": {"supervised": [unlabelled_bank()]}},
     "needs classes in the batch and in the bank"),
    (only("unsupervised"), lambda: {"banks": {"unsupervised": [
        banked(bert(hidden_size=8), encoded(5))]}}, "student's 16 channels, but has 8"),
])
def test_a_term_that_lacks_what_it_needs_is_refused(
        recovery: Recovery, given: Callable[[], dict[str, Any]], says: str) -> None:
    arguments = {"teacher": bert(seed=1), "probe": labelled()} | given()
    with pytest.raises(InputError, match=says) as refusal:
        Objective(bert(), recovery=recovery, **arguments)
    assert "\n" not in str(refusal.value)


def test_a_student_does_not_teach_itself() -> None:
    student = bert()
    with pytest.raises(InputError, match="must be a second model"):
        Objective(student, student, only("logits"), labelled())


def test_a_bank_of_one_row_is_refused() -> None:
    with pytest.raises(InputError, match="rows >= 2 to contrast, but got rows=1"):
        banked(bert(), encoded(5), rows=1)
