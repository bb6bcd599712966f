"""Masks of single weights: millions of them, so they are no units of a search but chosen by
scores, at once before it or in rounds, and lie as packed bits beside the spec.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.allocate import keep_masks, n_m
from searchpet.errors import InputError
from searchpet.grafts import Graft, Grafts
from searchpet.masks import fingerprint, legal_n_m, packed, unpacked
from searchpet.run import RunFolder
from searchpet.scores import needs_of
from searchpet.site import Site
from searchpet.space import Placement, Space, make
from searchpet.spec import Entry, KeepUse, MaskRef, Spec
from searchpet.stats import WANTS, collect

MASK_FILE = "masks.safetensors"
Batch = dict[str, Tensor]


class Bulk:
    """The weight masks of a space on a model; `settle` chooses them and hooks them in."""

    def __init__(self, space: Space, model: nn.Module, share: float, text: str,
                 loss: Callable[[Batch], Tensor], generator: torch.Generator) -> None:
        twice = Counter((p.site.path, p.site.role) for p in space.bulk).most_common(1)
        if twice and twice[0][1] > 1:
            kinds = [p.kind for p in space.bulk if (p.site.path, p.site.role) == twice[0][0]]
            raise InputError(f"a matrix must have one mask of single weights, but "
                             f"{twice[0][0][0]} has {' and '.join(kinds)}; narrow a `select` in "
                             "the file of --masks")
        self.space, self.model, self.text = space, model, text
        self.loss, self.generator = loss, generator
        linears = [site for site in space.sites if site.form == "linear"]
        self.dense = sum(site.d_in * site.d_out for site in linears)
        self.limit = int(share * self.dense)
        self.gates: dict[str, Tensor] = {}  # by key of a placement; empty until settled
        self._grafts: Grafts | None = None
        if self.limit < self.fixed:
            raise InputError(f"--keep-weights must leave what no mask covers, "
                             f"{100 * self.fixed / self.dense:.3g}% here, but got {text}")

    @property
    def fixed(self) -> int:
        """Elements of matrices without a mask."""
        return self.dense - sum(p.site.d_in * p.site.d_out for p in self.space.bulk)

    @property
    def share(self) -> float:
        """Of the elements under masks, those that the limit leaves."""
        return (self.limit - self.fixed) / (self.dense - self.fixed)

    @property
    def keeps(self) -> dict[str, Tensor]:
        """The masks by key of a placement, bool (width,)."""
        return {key: gate.cpu().bool().reshape(-1) for key, gate in self.gates.items()}

    def kept(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that stay, by path: bool, of the shapes of the matrices in `like`, on the CPU.

        Of masks of single weights; whatever no mask covers stays.
        """
        found = {path: torch.ones(m.shape, dtype=torch.bool) for path, m in like.items()}
        for p in self.space.bulk:
            rows = _rows(p.site) if p.site.index else torch.arange(p.site.d_out)
            found[p.site.path][rows] = self.gates[key_of(p)].cpu().bool()
        return found

    def settle(self, score: str | Mapping[str, Tensor], allocation: str,
               batches: Sequence[Batch], *, ease: float = 0.0) -> Bulk:
        """Choose the masks by a score of `searchpet.scores`, or by scores of matrices by path.

        May be called again: what is pruned already does not come back, and a named score is
        measured on the model as it is pruned then.
        allocation: of `searchpet.allocate.keep_masks`; "" is per_row for wanda, else global.
        ease in [0, 1]: how far the limit is still relaxed towards everything; masks with a rule of
        their own stay open until it is 0.
        Raises InputError for a score that a few batches cannot measure.
        """
        scores = self._measured(score, batches) if isinstance(score, str) else score
        found = {key_of(p): _tiles(p, scores[p.site.path]) for p in self.space.bulk}
        if not self.gates:
            self.gates = {key: torch.ones(s.shape, dtype=torch.int8, device=s.device)
                          for key, s in found.items()}
            self._hook()
        left = {key: s.float().masked_fill(self.gates[key] == 0, -torch.inf)
                for key, s in found.items()}
        keeps = self._choose(left, allocation or ("per_row" if score == "wanda" else "global"),
                             ease)
        for key, keep in keeps.items():
            self.gates[key].copy_(keep)
        return self

    def _measured(self, name: str, batches: Sequence[Batch]) -> dict[str, Tensor]:
        member = catalog.get("scores", name)
        if not set(needs_of(member)) <= {*WANTS, "generator"}:
            raise InputError(f"weights must be scored by what a few batches can measure, but "
                             f"{name} needs a training; take magnitude, wanda, snip or fisher")
        with self._written():
            stats = collect(self.model, {p.site.path for p in self.space.bulk}, batches,
                            self.loss, want=set(needs_of(member)) & set(WANTS),
                            generator=self.generator)
            return {path: member(stat) for path, stat in stats.items()}

    def _hook(self) -> None:
        self._grafts = Grafts(self.model, [Graft(p.site, p.kind, _delta(p))
                                           for p in self.space.bulk])
        self._grafts.z = [self.gates[key_of(p)].view(-1) for p in self.space.bulk]

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Inside, masks are zeros in the weights themselves: only those can be measured."""
        if self._grafts is None:
            yield
            return
        modules: dict[str, Any] = {p.site.path: self.model.get_submodule(p.site.path)
                                   for p in self.space.bulk}
        masked = {path: module.weight.detach().clone() for path, module in modules.items()}
        self._grafts.detach()
        whole = {path: module.weight.detach().clone() for path, module in modules.items()}
        try:
            for path, module in modules.items():
                module.weight.data.copy_(masked[path])
            yield
        finally:
            for path, module in modules.items():
                module.weight.data.copy_(whole[path])
            self._hook()

    def _choose(self, scores: Mapping[str, Tensor], allocation: str, ease: float,
                ) -> dict[str, Tensor]:
        """The masks by key, of their scores' shapes."""
        ruled = {key_of(p): p for p in self.space.bulk if p.kind == "n_m"}
        free = {key: score for key, score in scores.items() if key not in ruled}
        keeps = {key: n_m(scores[key], *_ratio(p)) if ease == 0 else scores[key] > -torch.inf
                 for key, p in ruled.items()}
        limit = int(self.limit + ease * (self.dense - self.limit))
        left = limit - self.fixed - sum(int(k.sum()) for k in keeps.values())
        if left < 0 and ease == 0:
            raise InputError(f"--keep-weights {self.text} must leave what the n_m masks keep by "
                             f"their rule, but they keep {-left:,} weights more; raise it")
        tiles = {p.site.d_in * p.site.d_out // p.width for p in self.space.bulk
                 if key_of(p) in free}
        if len(tiles) > 1:
            raise InputError("masks must be of one tile size to be compared, but those of space "
                             f"{self.space.name} are of {sorted(tiles)} weights")
        for tile in tiles:
            count = sum(score.numel() for score in free.values())
            keeps |= keep_masks(free, min(count, max(0, left) // tile) / count, allocation)
        return keeps

    def entries(self) -> tuple[Entry, ...]:
        """The spec's entries: references to the masks."""
        return tuple(
            Entry(path=p.site.path, role=p.site.role, layer=p.site.layer, kind=p.kind,
                  options=dict(p.options), kept=[],
                  mask=MaskRef(shape=(p.width,), sha256=digest, count=count))
            for p in self.space.bulk
            for digest, count in [fingerprint(self.keeps[key_of(p)])])

    def use(self) -> KeepUse:
        """Weights that stay."""
        kept = sum(int(self.keeps[key_of(p)].sum()) * (p.site.d_in * p.site.d_out // p.width)
                   for p in self.space.bulk)
        return KeepUse(measure="weights", text=self.text, limit=float(self.limit),
                       used=float(self.fixed + kept), dense=float(self.dense))

    def bits(self) -> dict[str, Tensor]:
        """What masks.safetensors holds."""
        return {key: packed(keep) for key, keep in self.keeps.items()}

    def remove(self) -> None:
        """Take the masks out of the model."""
        if self._grafts is not None:
            self._grafts.detach()


def read_mask(entry: Entry, bits: Mapping[str, Tensor]) -> Tensor:
    """An entry's mask, bool (width,).  Raises InputError unless it is the one that was meant."""
    assert entry.mask is not None
    if entry.key not in bits:
        raise InputError(f"{MASK_FILE} must hold the mask of {entry.key}, but does not; copy it "
                         "from where the spec was made")
    mask: Tensor = unpacked(bits[entry.key], entry.mask.shape)
    if fingerprint(mask) != (entry.mask.sha256, entry.mask.count):
        raise InputError(f"{MASK_FILE} must hold the masks of its spec, but that of {entry.key} "
                         "is another one; it was changed or damaged")
    return mask


def thinned(entry: Entry, site: Site, bits: Mapping[str, Tensor]) -> Graft:
    """The graft of a mask entry.  Raises InputError for a mask that breaks its kind's rule."""
    delta = make(entry.kind, site, dict(entry.options))
    mask = read_mask(entry, bits)
    if len(mask) != delta.width:
        raise InputError(f"{entry.key}: a mask must have {delta.width} elements, but has "
                         f"{len(mask)}")
    if entry.kind == "n_m":
        options: Any = delta.options
        n, m = options["n"], options["m"]
        if not legal_n_m(mask.view(site.d_out, site.d_in), n, m):
            raise InputError(f"{entry.key}: an {n}:{m} mask must keep {n} of every {m} in a row, "
                             "but does not")
    return Graft(site, entry.kind, delta.thin(mask))


def read_bits(spec: Spec) -> dict[str, Tensor]:
    """The masks of a spec's weights, from beside it; none if it has none.

    Raises InputError where the file is absent or damaged.
    """
    if not any(entry.mask for entry in spec.entries):
        return {}
    if spec.folder is None:
        raise InputError("a spec with masks of weights must be read from a file, beside which "
                         f"{MASK_FILE} lies; use Spec.load")
    return RunFolder(spec.folder).read_tensors(MASK_FILE)[0]


def key_of(place: Placement) -> str:
    return f"{place.site.path}:{place.site.role}:{place.kind}"


def _delta(place: Placement) -> Any:
    return make(place.kind, place.site, place.options)


def _ratio(place: Placement) -> tuple[int, int]:
    options = _delta(place).options
    return options["n"], options["m"]


def _tiles(place: Placement, score: Tensor) -> Tensor:
    """Scores of a mask's coordinates: of elements (d_out, d_in), or sums over tiles (R, C)."""
    matrix = score if not place.site.index else score[_rows(place.site)]
    if place.kind != "blocks":
        return matrix
    r, c = (_delta(place).options[name] for name in ("rows", "columns"))
    return matrix.unfold(0, r, r).unfold(1, c, c).sum((-1, -2))


def _rows(site: Site) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in site.index or ()])
