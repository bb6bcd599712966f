"""Draws docs/assets/searchpet.svg, the one picture: python docs/make/picture.py

The structure is the one that comes with the package as `searchpet:minilm-agreement-0.01`, which
`searchpet search --budget 0.01% --controls 0` found: how many channels of a bias and of a scale it
keeps, by role and layer, without the 30 of the embeddings' norm.  Among them is no bias of a key:
it would add the same to all scores of a query, which the softmax takes away.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "searchpet/found/minilm-agreement-0.01/spec.json"
BIAS, SCALE, LORA, INK, FAINT = "#0072B2", "#E69F00", "#009E73", "#1f2430", "#9aa3b2"
ROLES = {"attention.query": "query", "attention.key": "key", "attention.value": "value",
         "attention.output": "output", "norm.attention": "norm", "ffn.in": "ffn in",
         "ffn.out": "ffn out", "norm.ffn": "norm "}
LAYERS = 6
CELL, ROW, TOP = 38, 30, 128  # width and height of a cell, where the first row begins
MOST = 100  # channels that fill a cell


def text(x: float, y: float, words: str, size: int = 17, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {more}>{words}</text>'


def counts() -> dict[str, tuple[list[int], list[int]]]:
    """Role -> channels by layer, of a bias and of a scale."""
    found = {name: ([0] * LAYERS, [0] * LAYERS) for name in ROLES.values()}
    for entry in json.loads(SPEC.read_text(encoding="utf-8"))["entries"]:
        if entry["role"] in ROLES:
            kinds = found[ROLES[entry["role"]]]
            kinds[entry["kind"] == "scale"][entry["layer"]] += len(entry["kept"])
    return found


def grid(left: float, found: bool) -> list[str]:
    """Layers x roles: every unit that there is, as outlines, or what was found, filled."""
    out = []
    for column, (role, (biases, scales)) in enumerate(counts().items()):
        x = left + column * CELL
        turned = f'transform="rotate(-50 {x + 16} {TOP - 8})"'
        out.append(text(x + 16, TOP - 8, role.strip(), 14, INK, turned))
        for layer in range(LAYERS):
            y = TOP + (LAYERS - 1 - layer) * ROW
            out.append(f'<rect x="{x}" y="{y}" width="{CELL - 4}" height="{ROW - 4}" rx="3" '
                       f'fill="#f1f3f7" stroke="{FAINT}" stroke-width="0.8"/>')
            out += _filled(x, y, biases[layer], scales[layer]) if found else _open(x, y, role)
    return out


def _open(x: float, y: float, role: str) -> list[str]:
    """Outlines of what can sit here: LoRA on a matrix, bias and scale everywhere."""
    marks = [f'<circle cx="{x + 17}" cy="{y + 13}" r="4.2" fill="none" stroke="{BIAS}"/>',
             f'<path d="M{x + 24} {y + 17} l4.5 -8.5 l4.5 8.5 z" fill="none" stroke="{SCALE}"/>']
    lora = f'<rect x="{x + 2.5}" y="{y + 9}" width="8" height="8" fill="none" stroke="{LORA}"/>'
    return marks if role.startswith("norm") else [lora, *marks]


def _filled(x: float, y: float, bias: int, scale: int) -> list[str]:
    """Two bars, as high as there are channels."""
    out = []
    for place, count, colour in ((3, bias, BIAS), (18, scale, SCALE)):
        assert count <= MOST
        height = (ROW - 8) * count / MOST
        if count:
            out.append(f'<rect x="{x + place}" y="{y + ROW - 6 - height:.1f}" width="13" '
                       f'height="{height:.1f}" fill="{colour}"/>')
    return out


def file(x: float, name: str, what: str) -> list[str]:
    return [f'<path d="M{x} 408 h18 l8 8 v26 h-26 z" fill="#fff" stroke="{INK}" '
            'stroke-width="1.5"/>',
            text(x + 36, 423, name, 17, INK, 'font-weight="600"'), text(x + 36, 444, what, 15)]


def picture() -> str:
    legend = ((30, LORA, "LoRA atoms"), (160, BIAS, "biases"), (250, SCALE, "scales"))
    parts = [
        text(24, 38, "1  Every place has a price", 20, INK, 'font-weight="600"'),
        text(24, 62, "51,492 units on a frozen MiniLM", 15),
        text(410, 38, "2  A search spends the budget", 20, INK, 'font-weight="600"'),
        text(410, 62, "0.01 %: exactly 2,271 parameters", 15),
        *grid(24, False), *grid(410, True),
        f'<path d="M344 218 h38 m-11 -9 l11 9 l-11 9" fill="none" stroke="{INK}" '
        'stroke-width="2.5"/>',
        *(f'<rect x="{x}" y="322" width="13" height="13" fill="{c}"/>' + text(x + 19, 334, w, 15)
          for x, c, w in legend),
        text(410, 334, "a bar: how many single channels", 15),
        f'<path d="M24 354 h712" stroke="{FAINT}" stroke-width="1"/>',
        text(24, 386, "3  It is trained beside random structures of its size, and saved", 20,
             INK, 'font-weight="600"'),
        *file(30, "spec.json", "where what sits: 21 KB"),
        *file(280, "delta.safetensors", "the trained numbers, the head"),
        text(572, 423, "searchpet.load(RUN)", 15, INK, 'font-family="monospace"'),
        text(572, 444, "the same class, tuned", 15),
    ]
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 466" role="img" '
            'font-family="system-ui, Helvetica, Arial, sans-serif">\n<title>A search spends a '
            'parameter budget on single places of a frozen transformer</title>\n'
            '<rect width="760" height="466" rx="10" fill="#ffffff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    target = ROOT / "docs/assets/searchpet.svg"
    target.write_text(picture(), encoding="utf-8")
