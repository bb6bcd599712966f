"""FLOPs of a model's layers, counted in a forward pass.

The counter sees matrix products, so they are counted where nothing is masked but gone: zeros cost
as much as other numbers.  By hand: 2 T d_in d_out for a linear on T tokens, 4 T^2 d_head for an
attention head (scores, and the mix of the values).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from searchpet.cuts import Hooks
from searchpet.discover import discover
from searchpet.probe import evaluating, random_inputs


def flops(model: nn.Module, batch: int = 1, length: int = 128) -> dict[str, int]:
    """Path of each layer, in present numbering -> forward FLOPs of `batch` texts of `length`
    tokens (at most as many as the model has positions for), or of images of the model's size.

    Embeddings, pooler and task head are not counted, all calls of shared layers are.
    Raises InputError for a model in which no layers are found.
    """
    counts = dict.fromkeys(layer_paths(model), 0)
    base: Any = getattr(model, "base_model", model)  # a head has demands on padding of its own
    inputs = random_inputs(base, batch, length, torch.Generator().manual_seed(0))
    hooks = Hooks()
    with _counting(model), FlopCounterMode(display=False) as seen:
        for path in counts:
            _count(model.get_submodule(path), path, counts, seen, hooks)
        try:
            base(**inputs)
        finally:
            hooks.remove()
    return counts


def layer_paths(model: nn.Module) -> list[str]:
    """Every layer of every stack, also one whose sublayers are all gone."""
    lists = dict.fromkeys(s.path.rpartition(".")[0] for s in discover(model) if s.form == "layer")
    return [f"{path}.{name}" for path in lists
            for name, _ in model.get_submodule(path).named_children()]


def _count(layer: nn.Module, path: str, counts: dict[str, int], seen: FlopCounterMode,
           hooks: Hooks) -> None:
    """While hooked, each call adds to `counts[path]` what the counter saw between start and end.
    """

    def start(*_: Any) -> None:
        counts[path] -= seen.get_total_flops()

    def end(*_: Any) -> None:
        counts[path] += seen.get_total_flops()

    hooks.add(layer.register_forward_pre_hook(start))
    hooks.add(layer.register_forward_hook(end))


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Evaluation, no gradients, and attention as plain matrix products: the counter does not see
    all fused kernels.  Afterwards everything is as before.
    """
    owners: list[Any] = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
    configs = {id(m.config): m.config for m in owners}.values()  # parts may have their own
    before = [(config, config._attn_implementation) for config in configs]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        for p in trained:
            p.requires_grad_(False)  # the counter trips over views of parameters under no_grad
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for p in trained:
            p.requires_grad_(True)
