"""From a strategy's name to a spec: the wiring between a session, a space and a strategy."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from searchpet import catalog, scored
from searchpet.ask import Ask, hyperparameters
from searchpet.batch import Encodings
from searchpet.budget import Budget
from searchpet.bulk import MASK_FILE, Bulk
from searchpet.calibrate import lowered
from searchpet.choose import affordable, density_of, nested, own_choice
from searchpet.discover import depths
from searchpet.errors import InputError, shown
from searchpet.importance import importance
from searchpet.inherit import learns, leave
from searchpet.limits import Keep, Limits
from searchpet.pruning import keep_of
from searchpet.pruning import used as kept_use
from searchpet.run import RunFolder
from searchpet.searched import units_of
from searchpet.session import Session
from searchpet.space import Space
from searchpet.sparse import Sparse
from searchpet.spec import BackboneId, BudgetUse, Spec
from searchpet.strategies import Problem, Ranking, descend
from searchpet.supernet import Supernet
from searchpet.trace import Trace

SMALLER = "budgets"  # folder of the smaller ones of several, by their parameters
SEARCH = 0.3  # of tau: soft gates move more coordinates at a time than the structure will have


def budget_of(session: Session, text: str, count_head: bool) -> tuple[Budget, int]:
    """The budget and the parameters that it leaves for deltas."""
    budget = Budget.parse(text, session.identity.parameters)
    head = session.head_size if count_head else 0
    if count_head and budget.limit <= head:
        raise InputError(f"a budget that counts the head must exceed its {head:,} parameters, but "
                         f"got {budget.said}; drop --count-head or raise the budget")
    return budget, budget.limit - head


def budgets_of(session: Session, ask: Ask) -> list[tuple[Budget, int]]:
    """`budget_of` all that is asked for, rising.  Raises InputError for two that are the same."""
    found = sorted((budget_of(session, text, ask.count_head) for text in ask.budgets),
                   key=lambda pair: pair[0].limit)
    for (a, _), (b, _) in itertools.pairwise(found):
        if a.limit == b.limit:
            raise InputError(f"budgets must differ, but {a.text} and {b.text} are both "
                             f"{a.limit:,} parameters; drop one")
    return found


def propose(session: Session, folder: RunFolder | None, ask: Ask, seed: int,
            scores: bool = False) -> tuple[Spec, float]:
    """Run a strategy; the found spec and the seconds it took.

    Of several budgets the search has the geometric middle of the least and the largest: one with
    room for nearly all units ranks none (experiments/many_budgets/).  The specs of the smaller
    ones, each part of the next, go into folders of their own.  scores: keep those of all units.
    Raises InputError for a budget below the cheapest unit and for an unknown name.
    """
    clock = session.clock()
    search, keywords = hyperparameters(ask.strategy, ask.set)
    with session.fresh(seed) as model:
        space = ask.units(model)
        _check_bulk(ask, space)
        budgets, must = budgets_of(session, ask), ask.required(space)
        own = catalog.about("strategies", ask.strategy.partition(":")[0], "CHOOSES", False)
        if own and (len(budgets) > 1 or must is not None):
            raise own_choice(ask.strategy, len(budgets) > 1)
        for budget, limit in budgets:
            budget.afford(int(space.cost[~space.prunes].min()) + budget.limit - limit)
            affordable(space.cost, must, limit, budget.text)
        limit = math.isqrt(budgets[0][1] * budgets[-1][1])
        keep = None
        if ask.prune and not space.bulk:
            keep = keep_of(ask.prune, model, space, session.table)
        net = Supernet(model, space, session.head, seed)
        looks = catalog.about("strategies", ask.strategy.partition(":")[0], "LOOKS", True)
        problem = _problem(session, folder, net, limit, keep, must, seed, looks)
        bulk = _bulk(ask, problem) if space.bulk else None
        sparse = _sparse(problem)
        try:
            ranking = search(problem, **keywords)
        finally:
            net.remove()
            if bulk:
                bulk.remove()
        head = {n: p.detach().clone() for n, p in model.named_parameters() if n in session.head}
    sparse.take(ranking.masks)
    if ranking.notes and folder is not None:
        folder.log(strategy=ask.strategy, **ranking.notes)
    made = _provenance(session, ask, space, keywords, seed)
    choices = nested(problem.limits, ranking, [n for _, n in budgets], ask.strategy)
    *smaller, spec = (_spec(session, ask, own, keep, budget, made, sparse)
                      for (own, keep), (budget, _) in zip(choices, budgets, strict=True))
    bits = sparse.bits()
    if bulk:
        spec = spec.model_copy(update={
            "entries": (*spec.entries, *bulk.entries()), "keep": bulk.use()})
        bits |= bulk.bits()
    if bits and folder is not None:
        folder.write_tensors(MASK_FILE, bits)
        spec._folder = folder.path
    if folder is not None and scores:
        _leave_scores(folder, problem.limits, ranking, [*smaller, spec])
    if folder is not None:
        for other in smaller:
            place = folder.sub(f"{SMALLER}/{other.budget.limit}")
            place.write_text("spec.json", other.text())
    if folder is not None and learns(ask.strategy):
        leave(folder, net, spec, head, session.trained(spec).model_dump_json())
    return spec, clock()


def _leave_scores(folder: RunFolder, limits: Limits, ranking: Ranking, specs: Sequence[Spec],
                  ) -> None:
    about = scored.About(
        specs=[spec.hash for spec in specs], density=density_of(limits, ranking),
        units=len(limits.space), must=limits.must.nonzero().squeeze(-1).tolist())
    scored.write(folder, ranking.score, limits.price(ranking.keep.cpu().double()), about)


def _check_bulk(ask: Ask, space: Space) -> None:
    """Raise InputError for weight masks that cannot be searched so."""
    if not space.bulk:
        return
    if bool(space.prunes.any()):
        raise InputError("masks of single weights and of units cannot be searched together; give "
                         "one sort to --masks")
    if len(ask.budgets) > 1:
        raise InputError("masks of single weights take one --budget at a time, but got "
                         f"{ask.budget}; search once for each")
    if ask.prune is None or ask.prune.measure != "weights":
        raise InputError("masks of single weights save no FLOPs, so they need --keep-weights, "
                         "such as 50%, and --masks")
    if not catalog.about("strategies", ask.strategy.partition(":")[0], "WEIGHTS", False):
        raise InputError(f"strategy {ask.strategy} chooses no masks of weights; take --strategy "
                         "prune_first, or --masks prune/structured")


def _bulk(ask: Ask, problem: Problem) -> Bulk:
    """The weight masks of a problem."""
    assert ask.prune is not None  # checked before
    bulk = Bulk(problem.space, problem.net.model, float(ask.prune.share), ask.prune.text,
                problem.loss, problem.generator)
    problem.settle_weights = bulk.settle
    return bulk


def _sparse(problem: Problem) -> Sparse:
    """The masks of PET's own parameters, if the strategy settles any.

    Its warm-up trains the whole space, at rates lowered as `bilevel` lowers them.
    """
    def warm(steps: int, see: Callable[[], None]) -> None:
        rates = lowered(problem.rates, problem.crowd)
        learn = torch.optim.AdamW(problem.net.groups(rates), weight_decay=0.0)
        learn.register_step_pre_hook(lambda *_: see())
        for step in range(steps):
            descend(problem, problem.train[step], learn)

    sparse = Sparse(problem.net, problem.limit, problem.loss, warm, problem.generator)
    problem.settle_pet = sparse.settle
    return sparse


def _spec(session: Session, ask: Ask, limits: Limits, keep: Tensor, budget: Budget,
          provenance: dict[str, Any], sparse: Sparse) -> Spec:
    """The choice as a spec; the budgets are asserted once more."""
    limit, entries = limits.limit, sparse.entries(limits.entries(keep))
    used = limits.parameters(keep & ~sparse.thinned)
    used += sum(entry.mask.count for entry in entries if entry.mask)
    if used > limit:
        raise RuntimeError(f"strategy {ask.strategy} kept {used} parameters, above {limit}")
    if not used:
        raise InputError(f"a budget must buy at least one choice of {ask.strategy}, but {limit:,} "
                         f"parameters buy none in space {limits.space.name}; raise the budget")
    return Spec(
        backbone=BackboneId(**asdict(session.identity)), entries=entries,
        budget=BudgetUse(
            text=budget.text, limit=budget.limit, used=used + budget.limit - limit,
            slack=limit - used, denominator=budget.denominator,
            counts="deltas and head" if ask.count_head else "deltas"),
        keep=kept_use(limits.keep, limits.kept(keep)) if limits.keep else None,
        plan=limits.plan(keep), provenance=provenance)


def _problem(session: Session, folder: RunFolder | None, net: Supernet, limit: int,
             keep: Keep | None, must: Tensor | None, seed: int, looks: bool) -> Problem:
    """What the strategy may see: the training split, in two halves.

    looks: whether it looks at data at all; without, there are no rates and the head stays drawn.
    """
    first, second = session.splits["train"].halved(seed)
    model, rates, room = net.model, dict[str, float](), 1.0
    if looks:
        session.fit_head(model, first, seed)
        rates, room = _rates(session, net, Limits(net.space, limit, keep, must=must),
                             first, seed)
    loops: list[Any] = []

    def loop(steps: int, **state: Any) -> Any:
        stage = f"search-{len(loops) + 1}" if loops else "search"
        loops.append(session.loop(folder, stage, steps, seed, **state))
        loops[-1].generator = generator
        model.train()
        return loops[-1]

    generator = torch.Generator().manual_seed(seed)
    loss = session.loss(model)
    problem = Problem(
        net=net, space=net.space, limit=limit, keep=keep, must=must,
        train=session.batches(first, seed), valid=session.batches(second, seed + 1), loss=loss,
        importance=lambda name, batches: importance(name, net, batches, loss, generator),
        rates=rates, room=room, steps=session.settings.steps, loop=loop, generator=generator,
        units_of=lambda name: units_of(name, net.space))
    if folder is not None:
        problem.watch = Trace(folder, net.space, limit, problem.steps)
    return problem


def _rates(session: Session, net: Supernet, limits: Limits, data: Encodings, seed: int,
           ) -> tuple[dict[str, float], float]:
    """Rates of the search, for gates as open as the limits allow on average; `Problem.room`."""
    tau = session.settings.tau
    measured = session.calibration(net.model, net.grafts, data, seed)
    found = measured.rates(SEARCH * tau)
    everything = measured.room(found, tau)
    net.z = limits.shift(torch.zeros(len(net.space)), ease=1.0).float()
    average = measured.room(found, tau)
    net.z = torch.ones(len(net.space))
    return lowered(found, average), everything / average


def _provenance(session: Session, ask: Ask, space: Space, keywords: Mapping[str, Any],
                seed: int) -> dict[str, Any]:
    """How a spec came about; no times, so that the same search gives the same file."""
    settings = {k: v for k, v in asdict(session.settings).items()
                if k not in ("data", "device", "seed", "task", "model")
                and (k, v) != ("task_weights", None)}
    return {
        "strategy": ask.strategy, "hyperparameters": dict(keywords), "space": space.name,
        **({"masks": ask.prune.masks} if ask.prune else {}),
        **{name: list(wish) for name, wish in (("must", ask.must), ("forbid", ask.forbid))
           if wish},
        **({"budgets": list(ask.budgets)} if len(ask.budgets) > 1 else {}),
        "units": len(space), "stacks": depths(space.sites), "seed": seed,
        "task": session.task.name, "data": session.task.fingerprint, "settings": settings,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")}
        | {"searchpet": version()},
        "command": command(sys.argv),
    }


def version() -> str:
    """This package's version."""
    from searchpet import __version__

    return __version__


def command(argv: list[str]) -> str:
    """The command line without what does not change the result, --resume and --out, and without
    passwords.
    """
    import shlex

    words, skip = ["searchpet"], False
    for word in argv[1:]:
        if skip:
            skip = False
        elif word in ("--out", "-o"):
            skip = True
        elif word != "--resume" and not word.startswith("--out="):
            words.append(shown(word))
    return shlex.join(words) if argv and "searchpet" in argv[0] else "python"
