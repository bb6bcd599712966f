"""Merging: fold affine deltas into the backbone's own weights, at no cost at inference.

With delta = M x + g * y + c:  W' = (1 + g) W + M,  b' = (1 + g) b + c;  norms w' = (1 + g) w,
b' = (1 + g) b + c.  Norms that store w - 1 (y = (1 + w) * xhat): w' = (1 + g) (1 + w) - 1.  Masks
on a module's input multiply its columns, masks on its output all of it.
Exact up to float rounding (about 1e-6 of the logits in fp32).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from searchpet.deltas import Affine
from searchpet.errors import InputError
from searchpet.factors import Factored, matrix_of
from searchpet.grafts import Graft, Grafts


def merge(model: nn.Module, keep_zeros: bool = False) -> nn.Module:
    """Fold a model's deltas into its weights and remove the hooks; return the model.

    Masks become zeros.  A low-rank update of a matrix with single weights masked would fill them:
    with `keep_zeros` it is masked too, as in SQFT (Munoz et al. 2024, arXiv:2410.03750), and the
    outputs change; without, such a model is refused.
    Raises InputError, before anything is changed, for that, for a kind that is not affine and for
    a bias on a module that has none.
    """
    grafts = getattr(model, "searchpet", None)
    if not isinstance(grafts, Grafts):
        raise InputError("merge needs a model with deltas, but this one has none; "
                         "apply a spec or load a run first")
    members: dict[str, list[Graft]] = defaultdict(list)
    for graft in grafts.grafts:
        members[graft.at].append(graft)
    folds = {path: fold_of(model.get_submodule(path), path, own)
             for path, own in members.items()}
    for path, fold in folds.items():
        if fold.mask is not None and fold.affine.M is not None and not keep_zeros:
            raise InputError(f"an update of {path} would fill the zeros of its mask; "
                             "merge(model, keep_zeros=True) masks the update too, which changes "
                             "outputs, or keep the deltas unmerged")
    grafts.detach()
    del model.searchpet
    with torch.no_grad():
        for path, fold in folds.items():
            write(model.get_submodule(path), fold)
    return model


_FACTORS = {"input": "before", "output": "after", "weight": "mask"}  # stage -> field of Fold


@dataclass
class Fold:
    """y -> after * (y + M x + g * y + c) with x -> before * x, on a whole module.

    before (d_in,), after (d_out,), mask (d_out, d_in) of the weight: factors; None is 1.
    weight (d_out, d_in): W without masked directions; None is W.
    """

    affine: Affine
    before: Tensor | None = None
    after: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None


def fold_of(module: nn.Module, path: str, members: list[Graft]) -> Fold:
    """What a module's grafts amount to."""
    if isinstance(module, Factored):
        raise InputError(f"an update can be merged into a matrix, but {path} is two factors; load "
                         "the run with remove=False")
    d_out, d_in = sizes(module)
    affines = [on_module(affine_of(g), g, d_in, d_out) for g in members if g.delta.neutral == 0]
    fold = Fold(summed(affines))
    for graft in members:
        if graft.delta.neutral == 1 and graft.delta.atoms:
            fold.weight = matrix_of(module)  # as it is masked now
        elif graft.delta.neutral == 1:
            factor = _factor(graft, d_in, d_out)
            name = _FACTORS[graft.delta.stage]
            so_far = getattr(fold, name)
            setattr(fold, name, factor if so_far is None else so_far * factor)
    if fold.affine.c is not None and getattr(module, "bias", None) is None:
        raise InputError(f"a bias can be merged where the module has one, but {path} has none; "
                         "keep the deltas unmerged")
    return fold


def sizes(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear, a transposed one, or a norm."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() == 1:
        return len(weight), len(weight)
    d_out, d_in = weight.T.shape if hasattr(module, "nf") else weight.shape
    return d_out, d_in


def affine_of(graft: Graft) -> Affine:
    weight = next(graft.delta.parameters())
    affine = graft.delta.affine(torch.ones(graft.delta.width, device=weight.device))
    if affine is None:
        raise InputError(f"only affine kinds can be merged, but {graft.kind} at {graft.site.path} "
                         "is not; keep the deltas unmerged")
    return affine


def _factor(graft: Graft, d_in: int, d_out: int) -> Tensor:
    """What a mask multiplies each feature by."""
    if graft.site.form == "layer":
        raise InputError(f"a layer's mask cannot be merged, but {graft.site.path} has one; load "
                         "the run with remove=True, which takes the layer out")
    delta, site = graft.delta.cpu(), graft.site
    if delta.stage == "weight":
        whole = torch.ones(site.d_out, site.d_in)
        mask = torch.ones(d_out, d_in)
        rows = slice(None) if graft.writes is None else graft.writes.cpu()
        mask[rows] = whole + delta(whole, whole, torch.ones(delta.width))
        return mask
    ones = torch.ones(d_in if delta.stage == "input" else d_out)
    factor: Tensor = ones + delta(ones, ones, torch.ones(delta.width))
    return factor


def on_module(affine: Affine, graft: Graft, d_in: int, d_out: int) -> Affine:
    """The affine map on all features of the module, 0 on those that the delta does not see."""
    if graft.reads is None and graft.writes is None:
        return affine
    M, g, c = affine.M, affine.g, affine.c
    rows = torch.arange(d_out) if graft.writes is None else graft.writes
    if M is not None:
        columns = torch.arange(d_in) if graft.reads is None else graft.reads
        rows_of, columns = rows.to(M.device).unsqueeze(-1), columns.to(M.device)
        M = M.new_zeros(d_out, d_in).index_put((rows_of, columns), M)

    def spread(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.new_zeros(d_out).index_copy(0, rows.to(v.device), v)

    return Affine(M, spread(g), spread(c))


def summed(affines: list[Affine]) -> Affine:
    def add(terms: list[Tensor | None]) -> Tensor | None:
        present = [term.detach() for term in terms if term is not None]
        return torch.stack(present).sum(0) if present else None

    return Affine(add([a.M for a in affines]), add([a.g for a in affines]),
                  add([a.c for a in affines]))


def write(module: nn.Module, fold: Fold) -> None:
    weight, bias, affine = module.weight, getattr(module, "bias", None), fold.affine
    assert isinstance(weight, Tensor)
    gain = None if affine.g is None else 1 + affine.g
    if fold.after is not None:
        after = fold.after.to(weight.device)
        gain = after if gain is None else gain * after
        affine = Affine(*(None if t is None else (after.unsqueeze(-1) if t.dim() > 1 else after)
                          * t for t in (affine.M, affine.g, affine.c)))
    if weight.dim() == 1:
        if gain is not None:
            less_one = _stores_less_one(module, len(weight))
            weight.copy_((weight + 1) * gain - 1 if less_one else weight * gain)
    else:
        # (d_out, d_in) view; GPT-2's Conv1D stores the transpose
        matrix = weight.T if hasattr(module, "nf") else weight
        new = matrix if fold.weight is None else fold.weight
        new = new if gain is None else new * gain.unsqueeze(-1)
        new = new if affine.M is None else new + affine.M
        new = new if fold.mask is None else new * fold.mask.to(new.device)
        matrix.copy_(new if fold.before is None else new * fold.before.to(new.device))
    if bias is not None:
        new = bias if gain is None else bias * gain
        bias.copy_(new if affine.c is None else new + affine.c)


def _stores_less_one(norm: nn.Module, size: int) -> bool:
    """Whether a norm multiplies by 1 + weight: with weight 0 its output is then not 0."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    kept = weight.detach().clone()
    probe = torch.linspace(-1, 1, size, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        weight.zero_()
        out = norm(probe.view(1, 1, size)) - (0 if bias is None else bias)
        weight.copy_(kept)
    return bool(out.abs().max() > 1e-3)
