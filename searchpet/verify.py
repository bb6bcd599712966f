"""Verify: count again what a run claims, on the model itself.

What it cannot say: a score needs the task's data, `evaluate` measures it.  A time is not taken
again, since it never comes out the same: where the run has no table of them, what is left is taken
as said, and the limit is checked against the file's own figure of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from searchpet import catalog
from searchpet.apply import DELTA_FILE, grafts, has_masks, part_of, read_delta, restore
from searchpet.budget import Budget
from searchpet.bulk import read_mask
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.flops import flops
from searchpet.inference import Cost
from searchpet.latency import Table
from searchpet.masks import legal_n_m
from searchpet.probe import outputs, random_inputs, rows
from searchpet.pruning import Prune, cost_of
from searchpet.realise import Structure, structure
from searchpet.run import RunFolder
from searchpet.space import make
from searchpet.spec import KeepUse, Spec, first_problem

CLOSE = 1e-4  # of the largest logit: two ways to compute the same differ by float rounding


@dataclass(frozen=True)
class Check:
    """One figure: what the files claim, what was found, and whether they agree."""

    what: str
    claimed: Any
    found: Any
    holds: bool


def verify(run: str | Path, model: str | None = None) -> list[Check]:
    """Recount a run's parameters, its limits and what it leaves of the blocks; compare outputs.

    model: folder of the backbone, where it is not found by its name.
    Raises InputError for a run that cannot be loaded at all: a spec whose hash is not that of its
    content, tensors or masks of another spec, another architecture, a result.json of no run.
    """
    folder = folder_of(run)
    spec = Spec.load(folder.path)
    claims = folder.result() if folder.has("result.json") else {}
    parts = read_delta(folder)[1].parts
    first = parts[0].task if parts else None  # what is checked is shared
    masked = restore(folder.path, model, remove=False, task=first)
    checks = _parameters(folder, spec, claims, masked, first)
    prunes = any(catalog.get("deltas", e.kind).neutral == 1 for e in spec.entries)
    if prunes or spec.keep is not None:
        checks.append(_same("a limit on what is kept", spec.keep is not None, prunes))
    removed = restore(folder.path, model, task=first) if prunes else masked
    gone = prunes and not has_masks(removed)
    if prunes or claims.get("removed"):
        checks.append(_same("really removed", claims.get("removed", gone), gone))
    if gone:
        checks.append(_outputs(masked, removed))
    return [*checks, *_pruned(folder, spec, masked, removed if gone else None),
            *_scores(folder, claims)]


def _scores(folder: RunFolder, claims: Mapping[str, Any]) -> list[Check]:
    """What the training left word of; a score itself is measured by `searchpet evaluate`.

    Controls have no result.json: their figures stand in their run's.
    """
    trained = folder.read_json("training.json") if folder.has("training.json") else {}
    if not claims:
        same = trained.get("tensors") == folder.digest(DELTA_FILE)
        return [Check("tensors of training.json", True, same, same)]
    names = ["validation_score", *(["score"] if claims["split"] == "validation" else [])]
    return [_same(f"{name} of result.json", claims.get(name), trained["validation_score"])
            for name in names if "validation_score" in trained]


def folder_of(run: str | Path) -> RunFolder:
    """The folder of a run, given itself or by its spec.json.  Raises InputError for a file alone.
    """
    path = Path(run)
    if path.is_file() and path.name != "spec.json":
        raise InputError(f"verify needs the folder of a run, but {run} is a file; give the folder "
                         "that it lies in")
    return RunFolder(path.parent if path.is_file() else path)


def _parameters(folder: RunFolder, spec: Spec, claims: Mapping[str, Any], masked: nn.Module,
                task: str | None) -> list[Check]:
    """What is trained and saved, within which budget."""
    tensors, whole_run = read_delta(folder)
    heads = _head(tensors)
    tensors, trained = part_of(tensors, whole_run, task)
    head = _head(tensors)
    stored = sum(t.numel() for t in tensors.values()) - head
    counted = stored + (heads if spec.budget.counts == "deltas and head" else 0)
    deltas = sum(p.numel() for p in grafts(masked).parameters())
    whole = sum(p.numel() for p in masked.parameters()) - head - deltas
    trainable = sum(graft.parameters for graft in grafts(masked).grafts)
    budget, limit = spec.budget, _limit(spec.budget.text, whole)
    return [
        _same("hash of the spec", trained.spec_hash[:12], spec.hash[:12]),
        _same("parameters of the backbone", spec.backbone.parameters, whole),
        _same("parameters of which the budget is a share", budget.denominator, whole),
        _same(f"parameters that a budget of {budget.text} is", budget.limit, limit),
        _same("parameters that count", budget.used, counted),
        _same("trainable parameters of the deltas", stored, trainable),
        Check("within the budget", budget.limit, counted, counted <= budget.limit),
        *_result(claims, {
            "tensors": folder.digest(DELTA_FILE), "trainable": stored, "head": heads,
            "backbone": whole, "fraction": stored / whole,
            "budget_limit": limit, "spec_hash": spec.hash,
            "keep": spec.keep.model_dump() if spec.keep else None})]


def _head(tensors: Mapping[str, Tensor]) -> int:
    """Parameters of the task heads."""
    return sum(t.numel() for name, t in tensors.items() if name.startswith("head/"))


def _limit(text: str, parameters: int) -> int | None:
    """Parameters of a budget as the user wrote it; None where the text says none."""
    try:
        return Budget.parse(text, parameters).limit
    except InputError:
        return None


def _result(claims: Mapping[str, Any], counted: Mapping[str, Any]) -> list[Check]:
    """result.json against what was counted; what is no number is the same or not."""
    found = []
    for name, value in counted.items() if claims else ():
        same = claims[name] == value
        number = isinstance(value, int | float) and isinstance(claims[name], int | float)
        found.append(Check(f"{name} of result.json", claims[name] if number else True,
                           value if number else same, same))
    return found


# --- what is pruned -----------------------------------------------------------------------------


def _outputs(masked: nn.Module, removed: nn.Module) -> Check:
    """Whether the model that is really smaller computes the same."""
    inputs = random_inputs(masked, rows(masked), 16, torch.Generator().manual_seed(0))
    expected = outputs(masked, inputs)
    apart = float((outputs(removed, inputs) - expected).abs().max())
    bound = CLOSE * max(1.0, float(expected.abs().max()))
    return Check("masked and removed outputs differ by at most", bound, apart, apart <= bound)


def _pruned(folder: RunFolder, spec: Spec, masked: nn.Module, removed: nn.Module | None,
            ) -> list[Check]:
    """The plan, the masks' own rules, and what is left of the blocks; leaves no deltas.

    removed: the model that is really smaller, on which it is counted; else as the search did.
    """
    nonzero = _nonzero(masked)  # takes the deltas off
    of, keep = structure(spec, discover(masked)), spec.keep
    checks = [*_plan(spec, of), *_rules(of)]
    if keep is None:
        return checks
    cost = None if of.weights else _cost(keep, masked, of, folder)
    left = float(cost.at(of.keep.double())) if cost else None
    if of.weights:
        left = nonzero
        checks.append(_same("measure of masks of weights", keep.measure, "weights"))
    elif removed is not None and keep.measure != "latency":  # measured anew that differs
        grafts(removed).detach()
        del removed.searchpet
        left = _weights(removed) if keep.measure == "weights" else sum(flops(removed).values())
    dense = _weights(masked) if of.weights else cost.dense if cost else None
    checks.append(_allowed(keep, bool(of.weights)))
    if dense is not None and left is not None:
        checks += [_near(f"{keep.measure} of the whole blocks", keep.dense, dense),
                   _near(f"{keep.measure} that are left", keep.used, left),
                   Check("within what may be kept", keep.limit, left, left <= keep.limit)]
    return checks


def _allowed(keep: KeepUse, single: bool) -> Check:
    """The limit that the text gives, of the dense figure; single: of masks of single weights."""
    try:
        share = Prune(keep.measure, keep.text).share
    except InputError:
        return Check(f"{keep.measure} that {keep.text} is", keep.limit, None, False)
    found = int(float(share) * keep.dense) if single else int(share * Fraction(keep.dense))
    return _same(f"{keep.measure} that {keep.text} is", keep.limit, float(found))


def _cost(keep: KeepUse, model: nn.Module, of: Structure, folder: RunFolder) -> Cost | None:
    """The measure as the search counted it, over the spec's masks; None where it cannot be."""
    table = None
    if keep.measure == "latency":
        if not folder.has("latency.json"):  # times of the search itself
            return None
        try:
            table = Table.model_validate(folder.read_json("latency.json"))
        except ValidationError as error:
            raise InputError(f"{folder.path / 'latency.json'}: {first_problem(error)}") from error
    return cost_of(keep.measure, model, of.hosts.sites, of.hosts, len(of.keep), table)


def _plan(spec: Spec, of: Structure) -> list[Check]:
    """The plan against the entries, share by share; a mask without an entry keeps everything.

    A share of a mask that keeps everything may be absent: only the search's space names it.
    """
    if not of.prunes and not spec.plan:
        return []
    deepest: dict[str, int] = {}
    for site in of.hosts.sites:
        if site.form != "norm":
            deepest[site.part] = max(site.layer, deepest.get(site.part, 1))
    kinds = {name for name in {e.kind for e in of.masks} | {ratio.kind for ratio in spec.plan}
             if catalog.get("deltas", name).neutral == 1}
    entries = {(e.path, e.role, e.kind): e for e in of.masks}
    found, needed = Counter[Any](), Counter[Any]()
    for site in of.hosts.sites:
        alive = all(bool(of.keep[i]) for i in of.hosts.ties(site).above)
        for kind in (name for name in kinds if catalog.get("deltas", name).fits(site)):
            share, entry = 1.0, entries.get((site.path, site.role, kind))
            if entry is not None:
                share = len(entry.kept) / make(kind, site, dict(entry.options)).width
            depth = site.layer / deepest.get(site.part, 1)
            row = site.part, site.role, kind, round(depth, 6), round(share if alive else 0.0, 6)
            found[row] += 1
            needed[row] += entry is not None
    claimed = Counter((r.part, r.role, r.kind, round(r.depth, 6), round(r.kept, 6))
                      for r in spec.plan)
    shares, agree = (sum(rows.values()) for rows in (claimed | +needed, claimed & found))
    return [_same("shares of the plan as in the entries", shares, agree)]


def _rules(of: Structure) -> list[Check]:
    """Masks that keep n of every m, and how many do; loading has refused others already."""
    found = []
    for entry in (e for e in of.weights if e.kind == "n_m"):
        site = of.site(entry)
        options: Any = make(entry.kind, site, dict(entry.options)).options
        mask = read_mask(entry, of.bits).view(site.d_out, site.d_in)
        found.append(legal_n_m(mask, options["n"], options["m"]))
    return [_same("masks that keep n of every m", len(found), sum(found))] if found else []


def _weights(model: nn.Module) -> int:
    """Elements of the matrices of all linears in blocks, fused ones once."""
    paths = {site.path for site in discover(model) if site.form == "linear"}
    return sum(model.get_submodule(path).get_parameter("weight").numel() for path in paths)


def _nonzero(model: nn.Module) -> int:
    """Elements of the blocks' matrices that no mask of weights takes out; leaves no deltas."""
    masks = [g for g in grafts(model).grafts if g.delta.stage == "weight"
             and not g.delta.atoms]
    grafts(model).detach()
    del model.searchpet
    total = _weights(model)
    for graft in masks:
        whole = torch.ones(graft.site.d_out, graft.site.d_in)
        total += int(graft.delta.cpu()(whole, whole, torch.ones(graft.delta.width)).sum())
    return total


def _same(what: str, claimed: Any, found: Any) -> Check:
    return Check(what, claimed, found, claimed == found)


def _near(what: str, claimed: float, found: float) -> Check:
    """Sums of the same numbers in another order: equal to the nearest whole one."""
    return Check(what, round(claimed), round(found), abs(claimed - found) <= 0.5)
