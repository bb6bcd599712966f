"""Other people's methods, trained as ours are: PEFT's LoRA, AdaLoRA and KappaTune.

`peft_default`  LoRA as PEFT makes it when nothing is said: r = 8 on the modules of its own table
                (query and value of BERT), at its own size.
`adalora`       PEFT's AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) on the modules of its own
                table, with as many ranks in all as the budget pays: a rank costs d_in + d_out + 1.
`kappa`         LoRA on the matrices of lowest condition number, PEFT's
                `find_kappa_target_modules`, at the rank that the budget pays.

The modules are PEFT's own.  Learning rates come from the same probe as those of deltas, the rest
of the training is `Session.fit`'s.

AdaLoRA begins with 1.5 times its ranks, as in the paper (at least one a matrix), prunes them on
its cubic schedule from a tenth of the steps to the middle and tunes what is left; only that is
judged.  What it prunes is set to 0 after every step, and is not counted; while it trains it holds
all that it began with, `most`, and two moving averages of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.errors import InputError
from searchpet.train import Plain

SIZED = ("adalora", "kappa")  # take a budget
OWN_SIZE = ("peft_default",)  # do not
NAMES = (*SIZED, *OWN_SIZE)
TOP = 0.2  # of the matrices: the default of find_kappa_target_modules
FIRST = 1.5  # ranks that AdaLoRA begins with, of those that it ends with; the paper's
WARM, ALLOCATED = 0.1, 0.5  # shares of the steps at which AdaLoRA begins and ends to prune
ADAPTER = "default"


class Added(nn.Module):
    """What a PEFT layer adds to its module's output; its parameters are those of the adapter."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.own = nn.ParameterList(p for n, p in layer.named_parameters() if "lora_" in n)
        self.layer: Callable[[Tensor], Tensor] = layer.forward  # no submodule of this one
        self.base: Callable[[Tensor], Tensor] = layer.base_layer.forward

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out); y and z are not needed."""
        return self.layer(x) - self.base(x)


@dataclass(frozen=True)
class Layer:
    """A PEFT layer as calibration sees a delta."""

    delta: Added
    kind: str = "peft"


@dataclass
class Attached:
    """A model that PEFT has changed.

    loss_model: gives the loss to train on, which may have terms beside the task's;  limit: what
    may be left at the end;  course: what happens on the way.
    """

    loss_model: nn.Module
    layers: Sequence[Any]
    limit: int | None
    course: Any = field(default_factory=Plain)
    watch: Callable[[int, Tensor | None, Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.grafts = [Layer(Added(layer)) for layer in self.layers]
        self.z = [next(layer.parameters()).new_ones(1) for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(self._seen(i))

    def _seen(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def seen(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if self.watch is not None:
                self.watch(i, args[0], y)

        return seen

    @property
    def most(self) -> int:
        """Parameters that train, at most, beside the head."""
        return sum(p.numel() for part in self.grafts for p in part.delta.parameters())

    def kept(self) -> int:
        """Parameters that are left, beside the head, within the limit."""
        pruned = isinstance(self.course, Allocation)
        count = self.course.kept(self.layers) if pruned else self.most
        if self.limit is not None and count > self.limit:
            raise RuntimeError(f"PEFT kept {count} parameters, above {self.limit}")
        return count


@dataclass(frozen=True)
class Outside:
    """One of NAMES;  limit: parameters that it may spend, for those of SIZED."""

    name: str
    limit: int | None = None

    def attach(self, model: nn.Module, head: frozenset[str], steps: int, seed: int) -> Attached:
        """Change the model in place, for a training of so many steps.

        Raises InputError where PEFT is not there, does not know the model's modules, or the
        limit does not pay a single rank.
        """
        needs_peft(self.name)
        make = {"peft_default": _default, "adalora": _adalora, "kappa": _kappa}[self.name]
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                found = make(model, head, steps, self.limit)
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self.name} needs a model that PEFT knows, but of "
                                 f"{type(model).__name__} it says: {error}") from error
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name or name in head)
        return found


def needs_peft(name: str) -> None:
    """Raise InputError where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"method {name} needs peft, which this Python has not; "
                         "pip install 'searchpet[export]'")


def _default(model: nn.Module, head: frozenset[str], steps: int, limit: int | None) -> Attached:
    from peft import LoraConfig

    return _lora(model, LoraConfig(exclude_modules=_owners(head)), None)


def _lora(model: nn.Module, config: Any, limit: int | None) -> Attached:
    from peft.tuners.lora import LoraModel

    LoraModel(model, config, ADAPTER)
    return Attached(model, _layers(model), limit)


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _owners(head: frozenset[str]) -> list[str]:
    """Modules of the head: they train as a whole."""
    return sorted({name.rpartition(".")[0] for name in head} - {""})


def _afford(name: str, limit: int, cheapest: int) -> None:
    if limit < cheapest:
        raise InputError(f"{name} must be able to pay a rank, {cheapest:,} parameters here, but "
                         f"the budget is {limit:,}; raise it, or leave {name} out")


def _kappa(model: nn.Module, head: frozenset[str], steps: int, limit: int | None) -> Attached:
    """At the rank that the budget pays on PEFT's choice; where it pays none, at rank 1 on as many
    of the first of them as it pays.
    """
    from peft import LoraConfig
    from peft.helpers import find_kappa_target_modules

    assert limit is not None  # callers give one to those of SIZED
    price = {name: sum(module.weight.shape) for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and name not in _owners(head)}
    ranked = find_kappa_target_modules(model, top_p=1.0, show_progress=False)["target_modules"]
    names = [name for name in ranked or [] if name in price]
    if not names:
        raise InputError("kappa needs linear modules, but this backbone has none")
    names = names[: max(1, int(len(names) * TOP))]
    _afford("kappa", limit, price[names[0]])
    spent = list(itertools.accumulate(price[name] for name in names))
    rank = max(1, limit // spent[-1])
    names = [name for name, cost in zip(names, spent, strict=True) if rank * cost <= limit]
    return _lora(model, LoraConfig(r=rank, target_modules=names), limit)


def _adalora(model: nn.Module, head: frozenset[str], steps: int, limit: int | None) -> Attached:
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel, RankAllocator
    from peft.tuners.lora import LoraModel

    assert limit is not None  # callers give one to those of SIZED
    if steps < 2:
        raise InputError(f"adalora must have 2 steps to prune in, at least, but steps is {steps}")
    middle = max(1, round(ALLOCATED * steps))
    config: Any = AdaLoraConfig(
        init_r=1, total_step=steps, tinit=min(round(WARM * steps), middle - 1),
        tfinal=steps - middle, exclude_modules=_owners(head))
    table = {**LoraModel.target_module_mapping, **AdaLoraModel.target_module_mapping}
    config.target_modules = table.get(getattr(getattr(model, "config", None), "model_type", ""))
    make: Any = AdaLoraModel  # untyped
    tuner = make(model, config, ADAPTER)
    layers = _layers(model)
    dearest = max(layer.in_features + layer.out_features + 1 for layer in layers)
    _afford("adalora", limit, dearest)
    ranks = limit // dearest  # whichever they will be, the budget pays them
    config.init_r = math.ceil(FIRST * ranks / len(layers))
    for layer in layers:
        layer.update_layer(ADAPTER, config.init_r, config.lora_alpha, config=config)
    allocate: Any = RankAllocator
    tuner.rankallocator = allocate(model, config, ADAPTER)
    tuner.rankallocator.target_bgt = ranks
    return Attached(tuner, layers, limit, Allocation(model, tuner, middle))


class Allocation:
    """AdaLoRA's pruning, whose moving averages live in tensors of ours, so that they survive.

    middle: the step at which the ranks are chosen for good.
    """

    def __init__(self, model: nn.Module, tuner: Any, middle: int) -> None:
        self.tuner, self.middle = tuner, middle
        self.own = {n: p for n, p in model.named_parameters() if "lora_" in n}
        self.sensitivity, self.uncertainty = (
            [torch.zeros_like(p, requires_grad=False) for p in self.own.values()] for _ in "12")
        self.pattern: dict[str, list[bool]] = {}  # which ranks of which matrix are left

    @property
    def state(self) -> Mapping[str, Any]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty,
                "pattern": self.pattern}

    def moved(self, step: int) -> None:
        """Prune as PEFT does, with the averages as they were at the last step."""
        allocator = self.tuner.rankallocator
        for p in self.own.values():  # of a matrix that no example reaches
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        allocator.ipt = dict.fromkeys(self.own)
        allocator.exp_avg_ipt = dict(zip(self.own, self.sensitivity, strict=True))
        allocator.exp_avg_unc = dict(zip(self.own, self.uncertainty, strict=True))
        self.tuner.peft_config[ADAPTER].rank_pattern = self.pattern
        self.tuner.update_and_allocate(step)
        self.pattern.update(self.tuner.peft_config[ADAPTER].rank_pattern)
        for name, a, b in zip(self.own, self.sensitivity, self.uncertainty, strict=True):
            if name in allocator.exp_avg_ipt:  # PEFT forgets them in the end
                a.copy_(allocator.exp_avg_ipt[name])
                b.copy_(allocator.exp_avg_unc[name])

    def settled(self, steps: int) -> bool:
        return steps > self.middle

    def kept(self, layers: Sequence[Any]) -> int:
        """Parameters of the ranks that are left."""
        names = {id(p): name for name, p in self.own.items()}
        return sum((layer.in_features + layer.out_features + 1)
                   * sum(self.pattern[names[id(layer.lora_E[ADAPTER])]]) for layer in layers)
