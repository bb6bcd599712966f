"""Masks of weights: bool (d_out, d_in), True = kept.  Conversions, files, fingerprints.

`refill` and `regroup` turn an unstructured mask into one that saves time on ordinary hardware:
Chen et al. 2022, arXiv:2202.04736.  All functions are pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from searchpet.errors import InputError


def refill(mask: Tensor, score: Tensor | None = None) -> Tensor:
    """Whole rows instead of single weights: as many as the kept weights fill, bool (d_out, d_in).

    Rows kept = kept weights / d_in, rounded, and one at least where any weight is kept; so the
    count stays within one row's.  The rows with most kept weights win; among equals the one with
    the larger sum of `score` (say |w|) over its kept weights, then the first.
    """
    _matrix(mask)
    if score is not None and score.shape != mask.shape:
        raise InputError(f"score must have the mask's shape, {tuple(mask.shape)}, but has "
                         f"{tuple(score.shape)}")
    row = mask.sum(1).cpu()
    left = row if score is None else (score.detach().double() * mask).sum(1).cpu()
    place = filled(row, int(row.sum()) / mask.shape[1], left)
    keep = torch.zeros_like(mask)
    keep[(place > 0).to(mask.device)] = True
    return keep


def filled(count: Tensor, many: float, left: Tensor) -> Tensor:
    """Where n units stand in a quota of `many`, float64 (n,): above 0 inside it, higher = keep.

    count (n,): what is left of each; the largest come first, among equals those with the larger
    `left` (n,), then the first.  The quota is rounded, and one at least where anything is left.
    A unit's value is how many places it is from the quota's edge, as a share of n: so one
    threshold moves the quotas of several masks alike.
    """
    quota = max(round(many), int(bool(count.any())))
    order = np.lexsort((-left.cpu().numpy(), -count.cpu().numpy()))  # last key first, then stable
    found = torch.empty(len(count), dtype=torch.float64)
    found[torch.from_numpy(order.copy())] = (
        quota - 0.5 - torch.arange(len(count), dtype=torch.float64)) / len(count)
    return found


class Block(NamedTuple):
    """A dense block of a weight: rows (r,), columns (c,), int64, rising."""

    rows: Tensor
    columns: Tensor


class Regrouped(NamedTuple):
    """Dense blocks on disjoint rows; covered: fraction of the mask's weights inside them;
    area: weights in the blocks.
    """

    blocks: tuple[Block, ...]
    covered: float
    area: int


def regroup(mask: Tensor, parts: int = 8, *, cover: float | None = None, min_rows: int = 16,
            seed: int = 0) -> Regrouped:
    """Rows with similar columns together, and of each group the columns that most of it uses.

    parts:    groups at most, 8 as in the paper.
    cover:    take columns until this fraction of the mask's weights is inside the blocks; None:
              as many as keep the blocks' area within the mask's count, so the cost stays.
    min_rows: rows of a group at least, 16 as in the paper: lower blocks waste a dense product.
              Smaller groups join the nearest one.
    Pairs of a group and a column are taken by falling density (kept weights per row).  The paper
    partitions a hypergraph of the columns; here k-means on the rows' supports groups them
    (scikit-learn; `seed` for its starts), which finds planted groups too.
    """
    _matrix(mask)
    if parts < 1 or min_rows < 1 or not (cover is None or 0 <= cover <= 1):
        raise InputError("regroup needs parts >= 1, min_rows >= 1 and cover in [0, 1], but got "
                         f"{parts}, {min_rows} and {cover}")
    support = mask.cpu().numpy()
    used = np.flatnonzero(support.any(1))
    if not len(used):
        return Regrouped((), 1.0, 0)  # there is nothing to cover
    label = _cluster(support[used], parts, min_rows, seed)
    groups = [used[label == g] for g in np.unique(label)]
    counts = np.stack([support[rows].sum(0) for rows in groups])  # (groups, d_in)
    height = np.array([len(rows) for rows in groups])
    chosen = _densest(counts, height, cover)
    blocks = tuple(Block(torch.from_numpy(rows), torch.from_numpy(np.flatnonzero(columns)))
                   for rows, columns in zip(groups, chosen, strict=True) if columns.any())
    covered = int(counts[chosen].sum()) / int(counts.sum())
    return Regrouped(blocks, covered, int((height @ chosen).sum()))


def _densest(counts: np.ndarray, height: np.ndarray, cover: float | None) -> np.ndarray:
    """The pairs of a group and a column to take, bool (groups, d_in).

    counts (groups, d_in): kept weights of the pair;  height (groups,): rows of the group.
    """
    flat = counts.ravel()
    order = np.argsort(-(counts / height[:, None]).ravel(), kind="stable")
    inside = flat[order].cumsum()
    area = height.repeat(counts.shape[1])[order].cumsum()
    if cover is None:
        taken = int((area <= inside[-1]).sum())
    else:  # the first place where it is enough; 0.1 * 30 is a little more than 3
        wanted = math.ceil(cover * int(inside[-1]) - 1e-9)
        taken = int(np.searchsorted(inside, wanted)) + 1 if wanted else 0
    chosen = np.zeros(flat.shape, dtype=bool)
    chosen[order[:taken]] = True
    return chosen.reshape(counts.shape)


def _cluster(rows: np.ndarray, parts: int, min_rows: int, seed: int) -> np.ndarray:
    """The group of each row, (rows,) int, from supports (rows, d_in) bool."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(rows, axis=0))
    points = rows.astype(np.float32)
    model = KMeans(min(parts, distinct), n_init=4, random_state=seed).fit(points)
    label: np.ndarray = model.labels_.copy()
    away = model.transform(points)  # (rows, groups)
    while True:
        sizes = np.bincount(label, minlength=away.shape[1])
        smallest = int(np.where(sizes > 0, sizes, len(label) + 1).argmin())
        if sizes[smallest] >= min_rows or sizes[smallest] == len(label):
            return label
        away[:, smallest] = np.inf  # for good: nothing joins a group that is gone
        homeless = label == smallest
        label[homeless] = away[homeless].argmin(1)


def from_blocks(blocks: Sequence[Block], shape: tuple[int, int]) -> Tensor:
    """The mask of dense blocks, bool `shape`."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for rows, columns in blocks:
        mask[rows[:, None], columns] = True
    return mask


def legal_n_m(mask: Tensor, n: int, m: int) -> bool:
    """Whether at most n of every m consecutive weights along the input axis are kept.

    False too where m does not divide that axis.
    """
    if m < 1 or mask.shape[-1] % m:
        return False
    return bool((mask.unflatten(-1, (-1, m)).sum(-1) <= n).all())


# --- files --------------------------------------------------------------------------------------


def packed(mask: Tensor) -> Tensor:
    """The mask as bits: uint8 (ceil(elements / 8),), row-major, the first element highest."""
    if mask.dtype != torch.bool:
        raise InputError(f"a mask must be bool, but is {str(mask.dtype).removeprefix('torch.')}")
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of that shape that `packed` gave.  Raises InputError for bits that it cannot be."""
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise InputError(f"a mask of shape {tuple(shape)} must be {-(-count // 8)} bytes, but got "
                         f"{tuple(bits.shape)} of {str(bits.dtype).removeprefix('torch.')}")
    every = np.unpackbits(bits.cpu().numpy())
    if every[count:].any():
        raise InputError(f"the bits behind a mask's {count} elements must be 0, but are not; the "
                         "file is damaged or of another shape")
    return torch.from_numpy(every[:count].astype(bool)).reshape(tuple(shape))


def fingerprint(mask: Tensor) -> tuple[str, int]:
    """(sha256 in hex, kept elements): equal masks have equal ones, on any device.

    The hash is over the shape, as text `(3, 4)` and a newline, and the packed bits.
    """
    text = f"{tuple(mask.shape)}\n".encode()
    return hashlib.sha256(text + packed(mask).numpy().tobytes()).hexdigest(), int(mask.sum())


def _matrix(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel():
        raise InputError("a mask must be bool (d_out, d_in), but got "
                         f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}")
