"""A planted structure is found: labels come from the backbone with strong deltas at three sites.

The teacher's deltas keep the input factors that the student starts from, as trained LoRAs nearly
do, and have strong output factors; labels are its most likely class on random tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from searchpet import catalog
from searchpet.budget import fill
from searchpet.space import Space
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws, problem

WORDS, CLASSES, SIZE = 30, 8, 32
PLANTED = [(0, "ffn.in"), (1, "attention.value"), (1, "ffn.in")]  # one of each kind of influence
STRENGTH = 3.0  # of B, times LoRA's scaling: most labels change
SHARPNESS = 3.0  # spread of each of the teacher's logits
SEEDS = (0, 1, 2)
TAU = 0.02  # this backbone is random and sharp: at 0.3 the deltas diverge, and harmless ones win


def backbone(seed: int) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * SIZE,
        vocab_size=WORDS, max_position_embeddings=8, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:  # at BERT's own 0.02 every text gets the same class
                p.normal_(std=1.0 if "embed" in name else p.shape[1] ** -0.5)
    return model.eval()


def candidates(model: nn.Module) -> tuple[Space, set[int]]:
    """A rank-1 LoRA on each of twelve linears, and which of them are planted."""
    space = tiny.space(
        model, tiny.rule("lora", "module", {"rank": 1}, role=["attention.*", "ffn.*"]))
    sites = [(p.site.layer, p.site.role) for p in space.placements]
    return space, {sites.index(site) for site in PLANTED}


def teacher(seed: int) -> nn.Module:
    """The backbone with three strong deltas, its head scaled so that labels are clear and even."""
    model = backbone(seed)
    space, planted = candidates(model)
    net = Supernet(model, space, frozenset(), seed)
    generator = torch.Generator().manual_seed(seed)
    for i in sorted(planted):
        delta = net.grafts.grafts[i].delta
        delta.B.data.normal_(std=STRENGTH / delta.scaling, generator=generator)
    head = model.classifier
    with torch.no_grad():
        logits = model(**Draws(0, 500, WORDS)[0]).logits
        head.weight *= SHARPNESS / logits.std(0, keepdim=True).T
        head.bias.sub_(SHARPNESS * logits.mean(0) / logits.std(0))
    return model


def labels_of(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """batch -> the model's most likely class, (rows,)."""
    return lambda batch: tiny.logits(model, batch).argmax(-1)


def hits(strategy: str, seed: int, steps: int, rows: int, **more: Any) -> int:
    """How many of the three planted modules a strategy keeps, at a budget of just those."""
    expert, student = teacher(seed), backbone(seed)
    student.classifier.load_state_dict(expert.classifier.state_dict())
    space, planted = candidates(student)
    limit = int(space.cost[sorted(planted)].sum())
    train, valid = (Draws(stream, rows, WORDS, labels_of(expert)) for stream in (1, 2))
    asked = problem(student, space, limit, steps=steps, seed=seed, head=frozenset(),
                    tau=TAU, train=train, valid=valid)
    keep = catalog.get("strategies", strategy)(asked, **more).keep
    assert space.parameters(keep) <= limit
    return len(planted & set(keep.nonzero().squeeze(-1).tolist()))


@pytest.mark.parametrize(("strategy", "steps", "rows"), [
    ("bilevel", 200, 32), ("s3pet", 120, 24), ("lagrangian", 200, 32),
    ("progressive", 200, 32)])
def test_a_search_finds_what_was_planted(strategy: str, steps: int, rows: int) -> None:
    found = [hits(strategy, seed, steps, rows) for seed in SEEDS]
    assert sum(found) >= 7, found  # of nine; chance finds two or three


def test_one_shot_finds_some_by_agreement_and_none_by_energy() -> None:
    """Chance finds two or three of nine, the learned gates above seven or more."""
    found = {by: sum(hits("saliency", seed, 200, 32, by=by) for seed in SEEDS)
             for by in ("agreement", "energy", "both")}
    assert found["agreement"] >= 5 and found["both"] >= 5, found
    assert found["energy"] <= 3, found


def test_random_rarely_does() -> None:
    """Chance finds two or more of the three in about one draw of eight."""
    space, planted = candidates(backbone(0))
    limit = int(space.cost[sorted(planted)].sum())
    generator = torch.Generator().manual_seed(0)
    draws = [fill(torch.rand(len(space), generator=generator), space.cost, limit)
             for _ in range(500)]
    found = [int(keep[sorted(planted)].sum()) for keep in draws]
    assert sum(n >= 2 for n in found) / len(found) < 0.25
    assert sum(found) / len(found) < 1.0
