"""Statistics of weights, from a few batches: what the scores of `searchpet.scores` need.

The model is left as it was: training flags, requires_grad and hooks are restored, no `.grad` is
written.  Dropout is off while measuring.  Every batch counts the same in a mean.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from searchpet.errors import InputError, unknown
from searchpet.scores import Score, Stats, contribution, degenerate
from searchpet.site import Site
from searchpet.sublayers import linear_size

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
See = Callable[[str, Tensor, Tensor], None]  # of a module's path, x (..., d_in), y (..., d_out)
GRADIENTS = ("grad", "square", "hessian_grad")
WANTS = (*GRADIENTS, "norm")


def collect(model: nn.Module, linears: Mapping[str, nn.Module] | Iterable[str],
            batches: Iterable[Batch], loss: Loss, *, want: Collection[str],
            generator: torch.Generator | None = None) -> dict[str, Stats]:
    """Statistics of linears' weights by path, (d_out, d_in) for transposed linears too.

    linears: paths in `model`, or modules of it by path.  loss(batch) runs the model.
    want: of `grad`, `square`, `hessian_grad` (a float32 copy of the weights each, two for the
    last) and `norm` (padding left out where x has the mask's tokens); empty: no batch is run.
    generator: handed to every Stats.  A float32 `weight` shares memory with the model.
    Raises InputError for what is no linear, and when the loss does not depend on the weights.
    """
    _check(want, WANTS)
    named = linears if isinstance(linears, Mapping) else {p: model.get_submodule(p)
                                                          for p in linears}
    turned = {path: _is_turned(path, module) for path, module in named.items()}
    weights = {path: module.get_parameter("weight") for path, module in named.items()}
    squares: dict[str, Tensor] = {}
    now: list[Batch] = []

    def run(batch: Batch) -> Tensor:
        now[:] = [batch]
        return loss(batch)

    def see(path: str, x: Tensor, y: Tensor) -> None:
        counts = _counting(model, now[0], path, x)
        rows = x.detach().float().flatten(0, -2) if counts is None else x.detach()[counts].float()
        part = rows.square().sum(0)  # (tokens, d_in) -> (d_in,)
        squares[path] = squares[path] + part if path in squares else part

    watched = _watch(named, see) if "norm" in want else contextlib.nullcontext()
    with evaluating(model), _trainable(weights.values(), among=model.parameters()):
        found = _measure(weights, list(batches), run, want, watched)
    stats = {}
    for path, weight in weights.items():
        own: dict[str, Any] = {"weight": weight.detach().float(), **found[path]}
        own = {name: t.T if turned[path] else t for name, t in own.items()}
        if "norm" in want:
            own["norm"] = squares.get(path, own["weight"].new_zeros(own["weight"].shape[1])).sqrt()
        stats[path] = Stats(generator=generator, **own)
    return stats


def collect_parameters(parameters: Mapping[str, nn.Parameter], batches: Iterable[Batch],
                       loss: Loss, *, want: Collection[str],
                       generator: torch.Generator | None = None) -> dict[str, Stats]:
    """Statistics of parameters of any shape by name, such as a PET module's own.

    As `collect`, without `norm`; the weights are copies.  Put the model in evaluation mode first.
    """
    _check(want, GRADIENTS)
    with _trainable(parameters.values()):
        found = _measure(parameters, list(batches), loss, want, contextlib.nullcontext())
    return {name: Stats(p.detach().float().clone(), generator=generator, **found[name])
            for name, p in parameters.items()}


def collect_contributions(model: nn.Module, sites: Collection[Site], batches: Iterable[Batch],
                          loss: Loss) -> dict[str, float]:
    """What each layer adds, `scores.contribution`, by path: the mean over all tokens.

    sites: of form `layer`.  A layer whose weights several layers share is averaged over its calls;
    one that no batch reaches is left out, and so is padding, as in `collect`.
    Raises InputError for a site of another form.
    """
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    for site in sites:
        if site.form != "layer":
            raise InputError(f"contributions are of sites of form layer, but {site.path} is a "
                             f"{site.form}; take the layer sites of `discover`")
    total, count = defaultdict[str, float](float), defaultdict[str, int](int)
    now: list[Batch] = []

    def see(path: str, x: Tensor, y: Tensor) -> None:
        counts = _counting(model, now[0], path, x)
        tokens = x[..., 0].numel() if counts is None else int(counts.sum())
        total[path] += float(contribution(x, y, counts)) * tokens
        count[path] += tokens

    with evaluating(model), _watch(modules, see), torch.no_grad():
        for batch in batches:
            now[:] = [batch]
            loss(batch)
    return {path: total[path] / count[path] for path in modules if path in count}


class Scored(NamedTuple):
    """By name; flat: the tensors whose scores are all equal; warmed: whether the warm-up ran."""

    stats: dict[str, Stats]
    scores: dict[str, Tensor]
    flat: tuple[str, ...]
    warmed: bool


def collect_or_warm(collect: Callable[[], dict[str, Stats]], warm: Callable[[], None],
                    score: Score) -> Scored:
    """Score what `collect()` measured; if a tensor's scores are all equal, `warm()`, score again.

    Of PET factors of which one is zero at init, SNIP and Fisher give 0 to both, magnitude and
    GraSP to the zero one: ties would decide the mask, or remove the zero factor whole.  `warm`
    takes a few steps of training; then none is zero.  Rewinding the weights is left to the caller.
    Raises InputError when no tensor's scores differ after the warm-up; `flat` names those of
    which they do not.
    """
    def scored(warmed: bool) -> Scored:
        stats = collect()
        scores = {name: score(s) for name, s in stats.items()}
        return Scored(stats, scores, tuple(n for n in scores if degenerate(scores[n])), warmed)

    found = scored(warmed=False)
    if found.flat:
        warm()
        found = scored(warmed=True)
        if degenerate(found.scores):
            raise InputError("a score must tell weights apart, but all are equal, after the "
                             "warm-up too; warm up for longer, or take magnitude or random")
    return found


@torch.no_grad()
def add_movement(moved: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Add this step's -g * w to `moved`, by name; it becomes the `moved` of Stats.

    Call it after each backward pass, before the optimizer's step.  No gradient adds 0.
    """
    for name, p in parameters.items():
        step = -p.float() * (0.0 if p.grad is None else p.grad.float())
        moved[name] = moved[name] + step if name in moved else step


def _measure(weights: Mapping[str, Tensor], batches: Sequence[Batch], loss: Loss,
             want: Collection[str], watched: contextlib.AbstractContextManager[Any],
             ) -> dict[str, dict[str, Any]]:
    """name -> the wanted ones of GRADIENTS; `watched` is entered for the first pass."""
    if want and not batches:
        raise InputError(f"{', '.join(sorted(want))}: at least one batch must be given, but got 0")
    tensors = list(weights.values())
    means: dict[str, list[Tensor]] = {}
    with watched:
        if set(want) & set(GRADIENTS):
            means = _gradients(tensors, batches, loss, want)
        elif want:
            with torch.no_grad():
                for batch in batches:
                    loss(batch)
    if "hessian_grad" in want:
        means["hessian_grad"] = _hessian_grad(tensors, batches, loss, means["grad"])
    return {name: {what: means[what][i] for what in means if what in want}
            for i, name in enumerate(weights)}


def _gradients(weights: list[Tensor], batches: Sequence[Batch], loss: Loss,
               want: Collection[str]) -> dict[str, list[Tensor]]:
    """Means over the batches: `grad`, where it or hessian_grad is wanted, and `square`."""
    names = {"grad" if name == "hessian_grad" else name for name in want} - {"norm"}
    means = {name: [torch.zeros_like(w, dtype=torch.float32) for w in weights] for name in names}
    for batch in batches:
        for i, g in enumerate(_gradient(loss(batch), weights)):
            for name, mean in means.items():
                part = g.float() if name == "grad" else g.float().square()
                mean[i].add_(part, alpha=1 / len(batches))
    return means


def _hessian_grad(weights: list[Tensor], batches: Sequence[Batch], loss: Loss,
                  grad: list[Tensor]) -> list[Tensor]:
    """H g for the mean gradient g: the mean over the batches of each one's d(g_batch . g) / dw."""
    means = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            own = _gradient(loss(batch), weights, create_graph=True)
            along = torch.stack([(a.float() * b).sum() for a, b in zip(own, grad, strict=True)])
            if along.requires_grad:  # else the loss is linear in the weights
                parts = torch.autograd.grad(along.sum(), weights, materialize_grads=True)
                for mean, part in zip(means, parts, strict=True):
                    mean.add_(part.float(), alpha=1 / len(batches))
    return means


def _gradient(value: Tensor, weights: list[Tensor], create_graph: bool = False,
              ) -> tuple[Tensor, ...]:
    """d value / d weights; zeros for weights that it does not reach."""
    if not value.requires_grad:
        raise InputError("the loss must depend on a weight that is scored, but it depends on none "
                         f"of the {len(weights)}; run the model that holds them, with gradients")
    return torch.autograd.grad(value, weights, create_graph=create_graph, materialize_grads=True)


def _counting(model: nn.Module, batch: Batch, path: str, x: Tensor) -> Tensor | None:
    """Which tokens of x (..., d) are no padding, bool (...); None for all of them.

    A mask counts where it has as many entries as x has tokens.  In a decoder that has an encoder
    beside it the decoder's own mask comes first, or that of its labels, -100 being padding.
    """
    masks = []
    beside = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if beside and "decoder" in path.split("."):
        labels = batch.get("labels")
        if "decoder_attention_mask" in batch:
            masks.append(batch["decoder_attention_mask"])
        elif labels is not None and labels.dim() == 2:
            masks.append(labels != -100)
    if "attention_mask" in batch:
        masks.append(batch["attention_mask"])
    for mask in masks:
        if mask.numel() * x.shape[-1] == x.numel():
            return mask.reshape(x.shape[:-1]).to(x.device) != 0
    return None


def _check(want: Collection[str], known: Sequence[str]) -> None:
    for name in want:
        if name not in known:
            raise unknown("statistic", name, known)


def _is_turned(path: str, module: nn.Module) -> bool:
    """Whether a linear's weight is stored (d_in, d_out), as in transformers' Conv1D."""
    if linear_size(module) is None:
        raise InputError(f"statistics are of linears, but {path} is a {type(module).__name__}; "
                         "take the linear sites of `discover`")
    return not isinstance(module, nn.Linear)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _trainable(weights: Iterable[Tensor], among: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, `weights` require gradients and the others of `among` do not; after, as before."""
    chosen = list(weights)
    before = [(p, p.requires_grad) for p in (*among, *chosen)]
    for p, _ in before:
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextlib.contextmanager
def _watch(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Inside, `see` is told the first tensor in and the first tensor out of each module's call."""
    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            see(path, x, output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [module.register_forward_hook(hook_of(path), with_kwargs=True)
               for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
