"""Tables of what the catalog holds, read from the source: options with their reasons, facts."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from texts import ROOT, as_markdown

from searchpet import catalog
from searchpet.site import Form, Site
from searchpet.space import make
from searchpet.survey import described

HIDDEN = ("channels", "variant")  # keyword arguments that are no options
WIDTH, INNER = 384, 1536  # of the sites on which prices are shown: MiniLM's
PLACES: tuple[tuple[str, str, Form, int], ...] = (
    ("a linear of 384 x 384", "attention.output", "linear", WIDTH),
    ("the second matrix of a feed-forward, 1536 to 384", "ffn.out", "linear", INNER),
    ("a norm of 384", "norm.ffn", "norm", WIDTH),
    ("a block of width 384", "ffn.block", "block", WIDTH),
    ("a layer of width 384", "layer", "layer", WIDTH))
SITES = tuple(Site(path=path, role=role, layer=0, form=form, part="encoder", d_in=d_in,
                   d_out=WIDTH, heads=12, kv_heads=12) for path, role, form, d_in in PLACES)


class Option(NamedTuple):
    """A keyword argument: its name, its type and default as written, why it is so."""

    name: str
    kind: str
    default: str
    reason: str


def options(family: str, name: str) -> list[Option]:
    """The options of a kind or hyperparameters of a strategy, from the source of its file."""
    member: Any = catalog.get(family, name)
    function = member.__init__ if family == "deltas" else member
    file = ROOT / "searchpet" / family / f"{name}.py"
    text = file.read_text(encoding="utf-8")
    hints, reasons = get_type_hints(function), _comments(text)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if arg.arg not in HIDDEN and default is not None:
                    found.append(Option(arg.arg, _type(hints[arg.arg]), ast.unparse(default),
                                        reasons.get(arg.lineno, "")))
    return found


def _comments(text: str) -> dict[int, str]:
    """Line -> the comment beside its code, with the lines of comment alone that follow."""
    comments = {token.start[0]: token for token in tokenize.generate_tokens(
        io.StringIO(text).readline) if token.type == tokenize.COMMENT}
    found: dict[int, str] = {}
    last = 0
    for line in sorted(comments):
        token = comments[line]
        words = token.string.lstrip("# ")
        if token.line.strip().startswith("#"):
            if last and line - last == 1 + found[last].count("\n"):
                found[last] += f"\n{words}"
            continue
        found[line], last = words, line
    return {line: " ".join(words.split()) for line, words in found.items()}


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return str(getattr(hint, "__name__", hint))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def source(family: str, name: str) -> str:
    """What the file says of itself: formula, source, and how it differs from the paper."""
    text = inspect.getdoc(_module(family, name)) or ""
    return as_markdown(text)


def option_table(family: str, name: str) -> str:
    """Options with defaults and reasons; a sentence where there are none."""
    rows = [(f"`{o.name}`", o.kind, f"`{o.default}`", o.reason) for o in options(family, name)]
    if not rows:
        return "It has no options."
    return table(("option", "type", "default", "why"), rows)


def price(kind: str) -> str:
    """Stage, sites and price of a kind with its default options."""
    build = catalog.get("deltas", kind)
    fitting = [site for site in SITES if build.fits(site)]
    rows = []
    for site in fitting:
        with torch.device("meta"):  # shapes only
            delta = make(kind, site, {})
        cost = int(delta.cost()[0])
        rows.append((site.path, f"{delta.width:,}", f"{cost:,}" if cost else "none"))
    forms = ", ".join(dict.fromkeys(site.form for site in fitting))
    delta = make(kind, fitting[0], {})
    merges = "as zeros" if delta.neutral else (
        "yes" if delta.affine(torch.ones(delta.width)) is not None else "no, it is not affine")
    facts = table(("", ""), [
        ("acts at stage", f"`{delta.stage}`"), ("sits on sites of the form", f"{forms}"),
        ("silent at the gate", f"{delta.neutral:g}"), ("can be merged", merges)])
    costs = table(("on", "coordinates", "parameters of each"), rows)
    return f"{facts}\n\nWith the default options, on the sizes of MiniLM:\n\n{costs}"


def kind(name: str) -> str:
    """What a kind's page has that the source knows."""
    return (f"{source('deltas', name)}\n\n## Price and place\n\n{price(name)}\n\n"
            f"## Options\n\n{option_table('deltas', name)}")


def strategy(name: str) -> str:
    """What a strategy's page has that the source knows."""
    variants = catalog.about("strategies", name, "VARIANTS", ())
    forms = [f"Variants: {', '.join(f'`{name}:{v}`' for v in variants)}."] if variants else []
    return "\n\n".join([source("strategies", name), *forms, "## Hyperparameters",
                        option_table("strategies", name)])


def members(family: str) -> str:
    """Every member of a family with its first line; kinds and strategies link to their pages."""
    linked = {"deltas": "kinds", "strategies": "strategies"}
    rows = []
    for name in catalog.names(family):
        label = f"[`{name}`]({name}.md)" if family in linked else f"`{name}`"
        rows.append((label, as_markdown(catalog.describe(family, name))))
    return table(("name", "what it is"), rows)


def listed(what: str, prefix: str = "") -> str:
    """What `searchpet list` shows of spaces or knobs; those whose names begin so, as variants."""
    return table(("name", "what it is"),
                 [(f"`{name.replace('/', ':') if prefix else name}`", text)
                  for name, text in described(what).items() if name.startswith(prefix)])


def scores() -> str:
    """Scores of weights, with what has to be measured for each."""
    from searchpet.scores import needs_of

    rows = []
    for name in catalog.names("scores"):
        needs = ", ".join(f"`{n}`" for n in needs_of(catalog.get("scores", name)))
        first = as_markdown(catalog.describe("scores", name))
        rows.append((f"`{name}`", first, needs or "nothing"))
    return table(("score", "what it is", "needs beside the weight"), rows)


def _module(family: str, name: str) -> Any:
    return inspect.getmodule(catalog.get(family, name))
