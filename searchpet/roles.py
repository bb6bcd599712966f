"""Names -> roles: what the attribute names inside a transformer block say.

Pure functions on strings and sizes; `discover` brings the modules.  Names such as `q_proj`, `fc1`
or `Wqkv` are read, names of families never.  The questions:

- `attention_scopes`, `projection`: which submodules are attentions, what a linear inside one is;
- `feed_forward`: what a linear outside attention is;
- `norm_side`: which sublayer a norm belongs to;
- `qkv_layout` and its like: in which order a fused projection stores its parts;
- `applied_to_output`: which norms act on a sublayer's output before the residual addition.

`ffn.gate` is the projection that passes through the activation, `ffn.in` the one that it
multiplies (the only one in an ungated feed-forward), whatever a family's code calls the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

ATTENTION = re.compile(r"attn|attention|att$")
CROSS = re.compile(r"cross|encoder_att|enc_?dec_?att")
FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|^ff|^fc|^lin(ear)?_?\d|intermediate|inter$|output$|expert|moe|dense"
)

_GENERIC = ("dense", "linear")  # leaves that say nothing: their parent's name counts
_HEAD = r"(?:w_?|linear_?|projection_|to_)?"
_TAIL = r"(?:_?(?:proj|lin|head|attn))?"
_PROJECTIONS = {
    "query": re.compile(rf"{_HEAD}(?:q|query)(?:_b)?{_TAIL}"),
    "key": re.compile(rf"{_HEAD}(?:k|key){_TAIL}"),
    "value": re.compile(rf"{_HEAD}(?:v|value){_TAIL}"),
    "output": re.compile(rf"{_HEAD}(?:o|out|output){_TAIL}|dense|c_proj|post_proj|proj(ection)?"),
    "fused": re.compile(r"w?qkv(_proj|_linear)?|query_key_value|c_attn|in_proj|kv_b_proj"),
}
_FEED_FORWARDS = {
    "gate": re.compile(r"gate_proj|wi_0|w1"),
    "in": re.compile(
        r"(gate_)?up_proj|wi(_1)?|w3|fc_?(1|in)|c_fc|lin(ear)?_?1|layer_1|pwconv1|dense_h_to_4h"
        r"|(\w+_)?inter(mediate)?(_dense)?|ffn\d?|feed_?forward|input_linear|weights_in"
    ),
    "out": re.compile(
        r"down_proj|wo|w2|fc_?(2|out)|c_proj|lin(ear)?_?2|layer_2|pwconv2|dense_4h_to_h"
        r"|(\w+_)?output(_dense)?|output_linear|weights_out"
    ),
}
_NORMS = (  # the first that matches a norm's own name wins
    ("cross_attention", re.compile(r"cross|encoder_att")),
    ("after_attention", re.compile(r"^post_(self_)?att")),
    ("ffn", re.compile(r"mlp|ffn|(^|_)ff|feed_?forward|channel|full_layer|output|final|after|2$")),
    ("attention", re.compile(r"att|sa_|^input_|temporal|operator|before|1$")),
)


class Layout(NamedTuple):
    """A fused output: `groups` times the parts, each `(role, features)`, one after another."""

    groups: int
    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return self.groups * sum(size for _, size in self.parts)

    def ranges(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Role -> ranges of output features, one per group."""
        found: dict[str, list[tuple[int, int]]] = {role: [] for role, _ in self.parts}
        start = 0
        for _ in range(self.groups):
            for role, size in self.parts:
                found[role].append((start, start + size))
                start += size
        return {role: tuple(ranges) for role, ranges in found.items()}


def attention_scopes(parameters: Iterable[str]) -> dict[str, str]:
    """Name of each attention in a block -> `attention` or `cross_attention`.

    An attention is the outermost submodule that is called one and projects queries.
    """
    scopes = {}
    for name in parameters:
        tokens = name.split(".")
        depth = next((i for i, t in enumerate(tokens) if ATTENTION.search(t.lower())), None)
        if depth is None:
            continue
        # a projection's weight is named `q_proj.weight`, or `q` where it is a bare parameter
        if any(projection([token]) in ("query", "fused") for token in tokens[depth + 1 :][-2:]):
            cross = CROSS.search(tokens[depth].lower())
            scopes[".".join(tokens[: depth + 1])] = "cross_attention" if cross else "attention"
    return scopes


def within(name: str, scope: str) -> bool:
    """Whether a dotted name is the scope or lies in it; the empty scope holds all."""
    return scope in ("", name) or name.startswith(scope + ".")


def _telling(tokens: list[str]) -> str:
    while len(tokens) > 1 and tokens[-1].lower() in _GENERIC:
        tokens = tokens[:-1]
    return tokens[-1].lower()


def _first(table: dict[str, re.Pattern[str]], name: str) -> str | None:
    return next((role for role, pattern in table.items() if pattern.fullmatch(name)), None)


def projection(tokens: list[str]) -> str:
    """`query`, `key`, `value`, `output`, `fused` or `other`, from the name inside an attention."""
    return _first(_PROJECTIONS, _telling(tokens)) or "other"


def feed_forward(tokens: list[str], widens: bool) -> str:
    """`in`, `gate`, `out` or `other`, from the name inside a block, outside attention.

    widens: whether the linear has more outputs than inputs; counts for numbered layers only.
    """
    outer = tokens[:-1]
    if outer and not any(FEED_FORWARD.search(token.lower()) for token in outer):
        return "other"  # a projection of something else, say of a convolution or an adapter
    if tokens[-1].isdigit():
        return "in" if widens else "out"
    return _first(_FEED_FORWARDS, _telling(tokens)) or "other"


def norm_side(leaf: str) -> str | None:
    """Sublayer that a norm beside the sublayers belongs to, from its own name; None: unsaid.

    `after_attention` is said by pre-norm blocks of the norm before the feed-forward part, and by
    others of the norm of attention: the rest of the block decides.
    """
    return next((side for side, pattern in _NORMS if pattern.search(leaf.lower())), None)


def qkv_layout(
    name: str, d_out: int, d_q: int, heads: int, cross: bool, per_head: bool
) -> Layout | None:
    """Parts of a fused query-key-value projection, or None when the sizes do not fit.

    name:     the attribute; `query_key_value` and `in_proj` store each head's (or key head's
              group of heads') queries, key and value together, the others all queries first.
    d_q:      features of all queries.   heads: query heads.
    cross:    queries come from elsewhere, so only keys and values are fused.
    per_head: the module says that its heads are stored together.
    """
    if cross:
        return Layout(1, (("key", d_out // 2), ("value", d_out // 2)))
    d_kv, width = (d_out - d_q) // 2, d_q // heads
    if d_kv <= 0 or d_kv % width or d_q + 2 * d_kv != d_out:
        return None
    groups = d_kv // width if per_head or name in ("query_key_value", "in_proj") else 1
    return Layout(
        groups, (("query", d_q // groups), ("key", d_kv // groups), ("value", d_kv // groups))
    )


def gated_query_layout(d_out: int, heads: int) -> Layout:
    """Each head's queries, then the gate on its output."""
    width = d_out // heads // 2
    return Layout(heads, (("query", width), ("other", width)))


def gate_layout(name: str, d_out: int) -> Layout:
    """Halves of a fused gate and up projection: the activated half is first, but for `fc1`."""
    parts = (("gate", d_out // 2), ("in", d_out // 2))
    return Layout(1, parts[::-1] if name == "fc1" else parts)


def applied_to_output(forward: str) -> dict[str, str]:
    """a -> b where the source says `x = self.a(...)`, then `x = self.b(x)`, without a sum between.

    Neither names nor shapes tell a norm inside the residual branch from one behind it: nearly the
    same blocks are written both ways.  The source does.  Lines inside branches are left aside.
    """
    lines = forward.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) + 4
    body = re.compile(rf" {{{indent}}}(\w[\w, ]*) = (.*)")
    pairs, called, targets = {}, "", [""]
    for assigned in filter(None, map(body.match, lines)):
        call = re.match(r"self\.(\w+)\(", assigned[2])
        if " + " in assigned[2]:
            called = ""
        elif call:
            if called and assigned[1] in targets and assigned[2] == f"{call[0]}{assigned[1]})":
                pairs[called] = call[1]
            called, targets = call[1], assigned[1].split(", ")
    return pairs
