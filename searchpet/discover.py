"""Discovery: a transformer's sites, found by structure and attribute names, never by family.

A *stack* is a ModuleList (or Sequential) whose elements hold an attention and matrices beside it;
the innermost such lists count (ALBERT's groups, Swin's stages).  XLM keeps attentions and
feed-forward parts in parallel lists: their i-th elements together form a block.

- part: the first `encoder` or `decoder` in the stack's path; else `decoder` if it is causal.
- layer: running index of the block within its part, over all its stacks.  Weights that several
  layers share (ALBERT) are one module: addressed once, at the layer that registers it first.

Sites, with the roles of `roles`:

- linear: every nn.Linear and every Conv1D (a transposed linear) of a block.  A fused projection is
  one site per part.  `attention.other`, `cross_attention.other` and `ffn.other` are the rest:
  DeBERTa's relative keys, Longformer's global projections, routers, adapters, a token mixer in
  attention's place.  Weights that are bare parameters (XLNet's attention, stacked experts) and
  convolutions (SqueezeBERT) are no linears.
- norm: modules whose only parameters are a 1-D weight and bias.  In a block norm.attention,
  norm.cross_attention and norm.ffn, with the suffix `_post` on the second where a sublayer has one
  before it and one on its output; norm.query and norm.key; norm.other (a convolution's, say).
  Around the blocks norm.embedding (layer -1) and norm.final (layer: the part's block count).
- block: the output of attention or feed-forward before the residual addition.  Its path is the
  output linear, as a rule; the norm on it where that norm is inside the residual branch (Gemma 2,
  OLMo 2), which the source of the block's forward tells; the whole module where experts share the
  work.  Dropout and layer scale that follow are counted to the residual addition.
- layer: a whole block, role `layer`; none where a block is no single module (XLM).
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from searchpet.errors import InputError
from searchpet.roles import FEED_FORWARD, attention_scopes, norm_side, within
from searchpet.site import Site
from searchpet.sublayers import Block, Member, linear_sites, norm_size, parent

_PARTS = ("encoder", "decoder")
_CACHES = {"past_key_values", "use_cache"}  # a stack that takes them generates, so it is causal


class _Stack(NamedTuple):
    path: str  # of the list; of the first where lists run in parallel
    blocks: tuple[Block, ...]


def discover(model: nn.Module) -> tuple[Site, ...]:
    """All sites of a model: encoder first, then by layer, then in order of registration."""
    modules = dict(model.named_modules())  # a shared module once, under its first name
    stacks = _stacks(modules, getattr(model, "config", None))
    blocks = [block for stack in stacks for block in stack.blocks]
    sites = [site for block in blocks for site in linear_sites(block)]
    if not sites:
        raise InputError(
            "a model must hold a ModuleList of blocks with attention and linear layers, but "
            f"{type(model).__name__} has none; take a transformer, say one from AutoModel"
        )
    sites += [site for block in blocks for site in _norms(block)]
    sites += [site for block in blocks for site in _layers(block)]
    sites += _outer_norms(modules, stacks)
    place = {path: i for i, path in enumerate(modules)}
    sites.sort(key=lambda s: (_PARTS.index(s.part), s.layer, place[s.path], s.form == "block"))
    return tuple(sites)


def depths(sites: Iterable[Site]) -> dict[str, int]:
    """Blocks of each stack, by part.  Norms do not count: some stand outside the blocks."""
    found: dict[str, int] = {}
    for site in sites:
        if site.form != "norm":
            found[site.part] = max(found.get(site.part, 0), site.layer + 1)
    return found


# --- stacks -------------------------------------------------------------------------------------


def _complete(parameters: Iterable[tuple[str, nn.Parameter]]) -> bool:
    """Whether they make a block: an attention, and matrices beside it."""
    ndims = {name: parameter.ndim for name, parameter in parameters}
    scopes = attention_scopes(ndims)
    beside = (n for name, n in ndims.items() if not any(within(name, scope) for scope in scopes))
    return bool(scopes) and any(ndim > 1 for ndim in beside)


def _elements(modules: dict[str, nn.Module]) -> dict[str, list[dict[str, str]]]:
    """Path of each list of blocks -> for each block, path of each of its roots -> its name."""
    lists = {p: m for p, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)}
    found = [p for p, m in lists.items() if any(_complete(e.named_parameters()) for e in m)]
    inner = [p for p in found if not any(q != p and within(q, p) for q in found)]
    if not inner:
        return _parallel(lists)
    return {p: [{f"{p}.{i}".lstrip("."): ""} for i, _ in lists[p].named_children()] for p in inner}


def _parallel(lists: Mapping[str, nn.Module]) -> dict[str, list[dict[str, str]]]:
    """Lists of equal length side by side whose i-th elements together make a block."""
    groups: dict[tuple[str, int], dict[str, nn.Module]] = {}
    for path, module in lists.items():
        holder, _, name = path.rpartition(".")
        groups.setdefault((holder, len(list(module.children()))), {})[name] = module
    found = {}
    for (holder, length), named in groups.items():
        parameters = (
            (f"{name}.{leaf}", parameter)
            for name, module in named.items()
            for leaf, parameter in module.named_parameters()
        )
        if length and _complete(parameters):
            paths = {f"{holder}.{name}".lstrip("."): name for name in named}
            blocks = [{f"{path}.{i}": name for path, name in paths.items()} for i in range(length)]
            found[next(iter(paths))] = blocks
    return found


def _members(modules: dict[str, nn.Module], roots: dict[str, str]) -> tuple[Member, ...]:
    """The modules at and under the roots, in order of registration."""
    return tuple(
        Member(path, f"{name}{path[len(root) :]}".lstrip("."), module)
        for root, name in roots.items()
        for path, module in modules.items()
        if within(path, root)
    )


def _stacks(modules: dict[str, nn.Module], config: object) -> list[_Stack]:
    stacks, counts = [], dict.fromkeys(_PARTS, 0)
    for path, elements in _elements(modules).items():
        part = _part(modules, path, config)
        # a block that is another one's module has no members of its own
        owned = [members for roots in elements if (members := _members(modules, roots))]
        blocks = (Block(part, i, members, config) for i, members in enumerate(owned, counts[part]))
        if owned:
            stacks.append(_Stack(path, tuple(blocks)))
        counts[part] += len(owned)
    return stacks


def _part(modules: dict[str, nn.Module], path: str, config: object) -> str:
    generates = getattr(config, "is_decoder", False)  # a BERT-like model used as a decoder
    named = re.search(r"encoder|decoder", path.lower())
    if named and not (generates and named[0] == "encoder"):
        return named[0]
    owner = modules[path.rpartition(".")[0]]
    takes = set(inspect.signature(owner.forward).parameters)
    masks = (b for n, b in owner.named_buffers() if n.endswith(".bias") and b.ndim == 4)
    causal = generates or takes & _CACHES or next(masks, None) is not None
    return "decoder" if causal else "encoder"


def _layers(block: Block) -> Iterator[Site]:
    root = block.members[0]
    width = next((site.d_out for site in linear_sites(block) if site.form == "block"), None)
    if not root.name and width:
        yield block.site(root.path, "layer", "layer", width, width)


# --- norms --------------------------------------------------------------------------------------


def _norms(block: Block) -> Iterator[Site]:
    sides = {name: _nested_side(block, name) for name in block.norms}
    sides |= _beside(block, [name for name, side in sides.items() if side is None], sides)
    inside = set(block.branch_norms.values())
    first = {side for name, side in sides.items() if name not in inside}
    for name, (path, size) in block.norms.items():
        side = sides[name] or "other"
        post = "_post" if name in inside and side in first else ""
        yield block.site(path, f"norm.{side}{post}", "norm", size, size)


def _nested_side(block: Block, name: str) -> str | None:
    """Sublayer of a norm that lies inside it (or beside its linears, in a module of their own)."""
    scope = block.scope_of(name)
    if scope is not None:
        leaf = name[len(scope) + 1 :].lower()
        return {"q": "query", "k": "key"}.get(leaf[0], block.scopes[scope])
    sublayer = next((sub for sub, norm in block.branch_norms.items() if norm == name), None)
    if sublayer:
        called_so = "ffn" if FEED_FORWARD.search(sublayer) else "other"
        return block.scopes.get(sublayer, called_so)
    holder = parent(name)
    while holder:
        sides = [side for scope, side in block.scopes.items() if within(scope, holder)]
        if sides:
            return sides[0]
        if any(within(x, holder) for x, kind in block.feed_forward.items() if kind != "other"):
            return "ffn"
        holder = parent(holder)
    return "other" if "." in name else None


def _beside(block: Block, names: list[str], known: dict[str, str | None]) -> dict[str, str | None]:
    """Sides of the norms that stand beside the sublayers, from their names and each other."""
    said = {name: norm_side(name.rpartition(".")[2]) for name in names}
    taken = {side for side in [*known.values(), *said.values()] if side}
    for name in names:
        if said[name] == "after_attention":
            said[name] = "ffn" if "attention" in taken else "attention"
        elif said[name] is None:
            said[name] = next((s for s in ("attention", "ffn") if s not in taken), "other")
            taken.add(said[name] or "")
    return said


def _outer_norms(modules: dict[str, nn.Module], stacks: list[_Stack]) -> Iterator[Site]:
    """Embedding and final norms, each for the stack that it is nearest to."""
    owned = {m.path for stack in stacks for block in stack.blocks for m in block.members}
    counts = {p: sum(len(s.blocks) for s in stacks if s.blocks[0].part == p) for p in _PARTS}
    for path, module in modules.items():
        size = None if path in owned else norm_size(module)
        if size is None:
            continue
        stack = max(stacks, key=lambda s: len(_common(path, s.path)))
        part = stack.blocks[0].part
        side = _outer_side(modules, path, stack.path)
        if side:
            layer = -1 if side == "embedding" else counts[part]
            yield Site(path, f"norm.{side}", layer, "norm", part, size, size)


def _common(a: str, b: str) -> list[str]:
    """Tokens of the innermost module that holds both."""
    pairs = zip(a.split(".")[:-1], b.split(".")[:-1], strict=False)
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _outer_side(modules: dict[str, nn.Module], path: str, stack: str) -> str | None:
    """`embedding`, `final`, or None for a norm in a head or pooler."""
    holder = _common(path, stack)
    norm, *deeper = path.split(".")[len(holder) :]
    towards = stack.split(".")[len(holder)]
    owner = modules[".".join(holder)]
    if deeper:  # in a module beside the stack: embeddings come before it, heads after
        names = [name for name, _ in owner.named_children()]
        return "embedding" if names.index(norm) < names.index(towards) else None
    try:
        source = inspect.getsource(type(owner).forward)
    except (OSError, TypeError):
        return "embedding" if "emb" in norm.lower() else "final"
    # registration order says nothing here, the forward's does: what is called last wins
    last = [
        max((m.end() for m in re.finditer(rf"self\.{n}\b", source)), default=-1)
        for n in (norm, towards)
    ]
    return "final" if last[0] > last[1] else "embedding"
