"""Merging: fold affine deltas into the backbone's own weights, at no cost at inference.

With delta = M x + g * y + c:  W' = (1 + g) W + M,  b' = (1 + g) b + c;  norms w' = (1 + g) w,
b' = (1 + g) b + c.  Norms that store w - 1 (y = (1 + w) * xhat): w' = (1 + g) (1 + w) - 1.
Exact up to float rounding (about 1e-6 of the logits in fp32).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from searchpet.deltas import Affine
from searchpet.errors import InputError
from searchpet.grafts import Graft, Grafts
from searchpet.site import Site


def merge(model: nn.Module) -> nn.Module:
    """Fold a model's deltas into its weights and remove the hooks; return the model.

    Raises InputError, before anything is changed, for a kind that is not affine and for a bias
    on a module that has none.
    """
    grafts = getattr(model, "searchpet", None)
    if not isinstance(grafts, Grafts):
        raise InputError("merge needs a model with deltas, but this one has none; "
                         "apply a spec or load a run first")
    parts: dict[Site, list[Affine]] = defaultdict(list)
    for graft in grafts.grafts:
        parts[graft.site].append(_affine(graft))
    total = {site: _sum(affines) for site, affines in parts.items()}
    for site, affine in total.items():
        if affine.c is not None and getattr(model.get_submodule(site.path), "bias", None) is None:
            raise InputError(f"a bias can be merged where the module has one, but {site.path} has "
                             "none; keep the deltas unmerged")
    grafts.detach()
    del model.searchpet
    with torch.no_grad():
        for site, affine in total.items():
            _fold(model.get_submodule(site.path), site, affine)
    return model


def _affine(graft: Graft) -> Affine:
    weight = next(graft.delta.parameters())
    affine = graft.delta.affine(torch.ones(graft.delta.width, device=weight.device))
    if affine is None:
        raise InputError(f"only affine kinds can be merged, but {graft.kind} at {graft.site.path} "
                         "is not; keep the deltas unmerged")
    return affine


def _sum(affines: list[Affine]) -> Affine:
    def add(terms: list[Tensor | None]) -> Tensor | None:
        present = [term.detach() for term in terms if term is not None]
        return torch.stack(present).sum(0) if present else None

    return Affine(add([a.M for a in affines]), add([a.g for a in affines]),
                  add([a.c for a in affines]))


def _fold(module: nn.Module, site: Site, affine: Affine) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    rows = slice(None) if site.index is None else torch.cat(
        [torch.arange(a, b) for a, b in site.index])
    if affine.g is not None and site.form == "norm":
        stored_less_one = _stores_less_one(module, site.d_in)
        scaled = (weight + 1) * (1 + affine.g) - 1 if stored_less_one else weight * (1 + affine.g)
        weight.copy_(scaled)
    elif site.form == "linear":
        # (d_out, d_in) view; GPT-2's Conv1D stores the transpose
        matrix = weight.T if hasattr(module, "nf") else weight
        old = matrix[rows]
        new = old if affine.g is None else old * (1 + affine.g).unsqueeze(-1)
        matrix[rows] = (new if affine.M is None else new + affine.M).to(matrix.dtype)
    if bias is not None:
        new = bias[rows] if affine.g is None else bias[rows] * (1 + affine.g)
        bias[rows] = (new if affine.c is None else new + affine.c).to(bias.dtype)


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
