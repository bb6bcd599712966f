"""Serving: the deltas and heads of many tasks on one backbone that is in memory once.

    model = searchpet.serve({"a": "runs/a", "b": "runs/b"})
    model.set_task("a")               # every row is of task a
    model.set_task(["a", "b", "a"])   # one task for each row of the next batches
    model.add_task("c", "runs/c"); model.remove_task("b"); model.searchpet.labels

One task at a time computes what its run loaded alone computes, bit for bit; mixed rows compute
what their task computes on these rows alone, up to the rounding of matrix products, whose sums
depend on the number of rows (some 1e-6 of the largest logit in fp32).  In a mixed batch the logits
are as wide as the widest task in it, and rows of tasks with fewer labels end in -inf.

`generate` works as well, with a cache, and with mixed rows and beams: generation repeats each row
in place, and so do the names.  What a run prunes is masked, not removed: rows share the backbone.
Everything is frozen; serving is for inference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.apply import apply, grafts, write_tensors
from searchpet.errors import InputError, unknown
from searchpet.grafts import Grafts, register
from searchpet.learned import Learned, backbone_of, learned
from searchpet.mixed import TOKENS_FIRST, After, Before, Check, Switch, Turn, rows_of
from searchpet.saving import DELTA_FILE, Saved, fingerprint
from searchpet.stored import Trained, name_labels

Place = str | Path


def serve(tasks: Mapping[str, Place], *, model: str | nn.Module | None = None,
          device: str = "cpu") -> nn.Module:
    """The backbone of several runs with the deltas and heads of all; the first task is on.

    tasks: name -> folder of a run, or one that an applied model's `save_pretrained` wrote.  Of a
    run on several tasks, the one of this name.
    model: where the backbone lies, if not where its name says; or a model of it, such as one that
    generates: heads that it has no place for are left out, and its weights, which a run knows by
    the name of their file alone, are taken on trust.
    Raises InputError for folders that are damaged, or not of one backbone.
    """
    if not tasks:
        raise InputError("serve must be given a task, as in {'a': 'runs/a'}, but got none")
    found = {name: learned(name, place) for name, place in tasks.items()}
    first = next((one for one in found.values() if isinstance(one.about, Trained)),
                 next(iter(found.values())))
    host, revision = (model, None) if isinstance(model, nn.Module) else backbone_of(first, model)
    if hasattr(host, "searchpet"):
        raise InputError("tasks must be served on a plain model, but this one has deltas already; "
                         "load it again")
    served = Served(host, revision, trusted=isinstance(model, nn.Module))
    for name, one in found.items():
        served.add(name, one)
    served.set_task(next(iter(found)))
    return host.eval().to(device)


class Served(nn.Module):
    """The tasks of a model, its `model.searchpet`.

    labels: task -> its class names, none for a number.  revision: of the backbone's weights, where
    they were loaded by their name; trusted: whether the model was given.
    """

    def __init__(self, model: nn.Module, revision: str | None, trusted: bool) -> None:
        super().__init__()
        self.owner = (model,)  # in a tuple: no submodule
        self.revision, self.trusted = revision, trusted
        self.labels: dict[str, tuple[str, ...]] = {}
        self.turn = Turn()
        self.of = nn.ModuleList()  # deltas of each task, in the order of labels
        self.switches: dict[str, Switch] = {}
        self._at: dict[tuple[str, bool], tuple[Before | After, Any]] = {}
        self._weights: str | None = None
        register(model, Check(self.turn))
        owner: Any = model
        owner.searchpet = self
        owner.set_task, owner.add_task = self.set_task, self.add_task
        owner.remove_task, owner.save_pretrained = self.remove_task, self.save_pretrained
        if hasattr(model, "generate"):
            owner.generate = self.generate

    def set_task(self, names: str | Sequence[str]) -> None:
        """The task of all rows, or of each.  Raises InputError for one that is not served."""
        for name in [names] if isinstance(names, str) else names:
            if name not in self.labels:
                raise unknown("task", name, self.labels)
        if not names:
            raise InputError("set_task must be given a task, or one for each row, but got none")
        kind = getattr(self.owner[0].config, "model_type", "")
        if not isinstance(names, str) and kind in TOKENS_FIRST:
            raise InputError(f"rows with tasks of their own need modules that see rows first, but "
                             f"those of {kind} see tokens first; set one task for the batch")
        self.turn.set(names)
        if self.switches:
            self._tell([names] if isinstance(names, str) else names)

    def _tell(self, names: Sequence[str]) -> None:
        """Write into the config what the logits are; names of classes where all rows share them.
        """
        owner: Any = self.owner[0]
        labels = max((self.labels[name] for name in names), key=len)
        one = len(set(names)) == 1
        owner.config.num_labels = len(labels) or 1
        owner.config.problem_type = "single_label_classification" if labels else "regression"
        name_labels(owner, labels if one else tuple(f"LABEL_{i}" for i in range(len(labels))))

    def add_task(self, name: str, run: Place) -> None:
        """Serve one task more.  Raises InputError, and serves what it did, where it cannot."""
        self.add(name, learned(name, run))

    def remove_task(self, name: str) -> None:
        """Serve it no longer.  If it was on, set_task must say what is, before the next batch."""
        if name not in self.labels:
            raise unknown("task", name, self.labels)
        number = list(self.labels).index(name)
        for key, (hook, handle) in list(self._at.items()):
            hook.of.pop(name, None)
            if not hook.of:
                handle.remove()
                del self._at[key]
        for switch in self.switches.values():
            switch.drop(name)
        del self.of[number], self.labels[name]
        if name == self.turn.alone or name in self.turn.names:
            self.turn.set(None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which spreads rows: beams, and several answers to one."""
        model: Any = self.owner[0]
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            self.turn.check(rows_of(args, kwargs))
        self.turn.generating = True
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.turn.generating, self.turn.factor = False, 1

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raises InputError: what is served was saved task by task."""
        raise InputError("a model that serves tasks must be saved task by task, but it holds "
                         f"{len(self.labels)}; searchpet.load(RUN).save_pretrained saves one")

    def add(self, name: str, one: Learned) -> None:
        """Build the task's deltas and head on the model, then take them off: hooks of this module
        hand rows to them.  Nothing changes where it is refused.
        """
        if name in self.labels:
            raise InputError(f"tasks must have names of their own, but {name!r} is served "
                             "already; remove_task first")
        (model,) = self.owner
        head = one.head
        if self.trusted and any(_absent(model, owner) for owner in _owners(head)):
            head = ()
        self._check(name, one, head)
        tensors = {_at_home(key, model): value for key, value in one.tensors.items()
                   if head or not key.startswith("head/")}
        owner, turn = cast(Any, model), self.turn
        before = turn.alone if turn.alone is not None else turn.names or None
        saver = owner.save_pretrained
        heads = {path: self._head(path, one) for path in _owners(head)}
        del owner.searchpet  # one spec at a time
        turn.set(None)
        for path, module in heads.items():
            _put(model, path, module)
        try:
            apply(model, one.spec, head=frozenset(head))
            write_tensors(model, frozenset(head), tensors, one.folder.path / DELTA_FILE)
            own = grafts(model)
        finally:
            applied = getattr(model, "searchpet", None)
            if isinstance(applied, Grafts):
                applied.detach()
            owner.searchpet, owner.save_pretrained = self, saver
            for path, switch in self.switches.items():
                _put(model, path, switch)
            turn.set(before)
        self._join(name, one, own, heads)

    def _join(self, name: str, one: Learned, own: Grafts, heads: Mapping[str, nn.Module]) -> None:
        (model,) = self.owner
        self.labels[name] = one.labels
        self.of.append(own.requires_grad_(False))
        for path, module in heads.items():
            self.switches[path].add(name, module.requires_grad_(False).eval())
        for path, hook in own.hooks:
            key = path, hook.before
            if key not in self._at:
                hub = Before(self.turn) if hook.before else After(self.turn)
                self._at[key] = hub, register(model.get_submodule(path), hub)
            at: Any = self._at[key][0]
            at.of.setdefault(name, []).append(hook)

    def _head(self, path: str, one: Learned) -> nn.Module:
        """A module of the head, of the size that the task's has; its values are to come."""
        (model,) = self.owner
        if path not in self.switches:
            if not path or _absent(model, path):
                raise InputError(f"{one.folder.path} must have a head that the model has a module "
                                 f"for, but it has {one.head[0]}")
            self.switches[path] = Switch(self.turn, model.get_submodule(path))
        weight = next(model.parameters())
        module: Any = copy.deepcopy(self.switches[path].blank[0]).to(weight.device, weight.dtype)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            like = one.tensors.get(f"head/{path}.{leaf}")
            if like is not None:
                setattr(module, leaf, nn.Parameter(torch.empty(
                    like.shape, dtype=parameter.dtype, device=parameter.device)))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        return cast(nn.Module, module)

    def _check(self, name: str, one: Learned, head: Sequence[str]) -> None:
        """Raise InputError for what is of another backbone, or masks its weights."""
        for entry in one.spec.entries:
            kind = catalog.get("deltas", entry.kind)
            if kind.stage == "weight":
                raise InputError(f"served tasks share the backbone's weights, but task {name!r} "
                                 f"masks them, by {entry.kind} at {entry.path}; load it alone")
        heads = set(_owners(head))
        if self.labels and heads != set(self.switches):
            raise InputError(f"served tasks must have heads of the same modules, "
                             f"{', '.join(self.switches) or 'none'}, but task {name!r} has "
                             f"{', '.join(sorted(heads)) or 'none'}")
        law = f"task {name!r} must be of the backbone that is served, but its run is of "
        if isinstance(one.about, Saved):
            found = self._fingerprint(one.about)
            if one.about.weights != found:
                raise InputError(f"{law}weights {one.about.weights[:12]}…, and these are "
                                 f"{found[:12]}…")
        elif not self.trusted and self.revision != one.spec.backbone.revision:
            raise InputError(f"{law}{one.spec.backbone.name} at {one.spec.backbone.revision}, and "
                             f"this one is at {self.revision or 'a revision that nobody knows'}")

    def _fingerprint(self, saved: Saved) -> str:
        """Of the backbone's weights as they are; the first head's names serve for all."""
        if self._weights is None:
            (model,) = self.owner
            own = {n for n, _ in model.named_parameters()
                   if any(n.startswith(f"{path}.") for path in self.switches)}
            self._weights = fingerprint(model, frozenset(own | set(saved.head)))
        return self._weights


def _owners(head: Sequence[str]) -> list[str]:
    """Paths of the modules that hold the head's parameters."""
    return sorted({name.rpartition(".")[0] for name in head})


def _at_home(key: str, model: nn.Module) -> str:
    """A tensor's name as the model's class has it: T5's classifiers lie in `transformer.`."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if key.startswith("head/") or prefix == ".":
        return key
    bare = key.removeprefix(prefix)
    return bare if _absent(model, prefix[:-1]) else prefix + bare


def _absent(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return True
    return False


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
