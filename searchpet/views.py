"""What the command line prints: tables and a text picture, from plain values."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from searchpet.site import Site
from searchpet.spec import Entry, Spec

SHADES = "·░▒▓█"  # none, then quarters of the largest count on a logarithmic scale


def table(*columns: str, rows: Iterable[Sequence[object]] = (), left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        view.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        view.add_row(*(cell if isinstance(cell, str) else figure(cell) for cell in row))
    return view


def figure(value: object) -> str:
    """A number as people read it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def share(value: float) -> str:
    """A fraction as percent, three digits."""
    return f"{100 * value:.3g}%"


def outcome(values: Mapping[str, Any]) -> Iterable[Any]:
    """The comparison at the end of a search or a training."""
    backbone = values["backbone"]
    rows: list[list[object]] = [
        [f"{values['strategy']} (found)" if values["controls"] else values["strategy"],
         values["score"], values["trainable"], share(values["fraction"])]]
    for control in values["controls"]:
        count = control["trainable"]
        rows.append([control["name"], control["score"], count, share(count / backbone)])
    full = values["full_finetune"]
    if full is not None and values["strategy"] != "full":
        rows.append(["full fine-tuning", full, backbone, "100%"])
    budget = values["budget_limit"]
    room = f"budget {budget:,} of" if budget is not None else "a backbone of"
    head = f"beside a head of {values['head']:,}"
    yield f"{values['task']}: {room} {backbone:,} parameters, {head}"
    if values.get("keep"):
        yield kept(values["keep"]) + ("" if values["removed"] else "; they are masked, not "
                                      "removed, so latency will not drop")
    yield ""
    if values.get("sweep"):
        yield swept(values["sweep"])
        yield ""
    yield table("structure", f"{values['metric']} on {values['split']}", "trainable", "share",
                rows=rows)
    if values.get("inherited"):
        yield ""
        yield trained_on(values)


def trained_on(values: Mapping[str, Any]) -> str:
    """What the structure's training began with, in a sentence; what that of the controls did."""
    controls = ", the controls' from untrained ones" if values["controls"] else ""
    return f"Its training went on from the modules that the search had trained{controls}."


def swept(found: Mapping[str, Any]) -> str:
    """How tau was chosen and what that cost, in a sentence."""
    tried = ", ".join(f"{one['tau']:.3g} ({one['score']:.4f} after {one['steps']})"
                      for one in found["tried"])
    return (f"tau {found['tau']:.3g} by validation, of {tried}; {found['steps']:,} steps in all, "
            f"{found['trainings']:.2f} trainings, {found['seconds']:.0f} s")


def kept(keep: Mapping[str, Any]) -> str:
    """What a structure leaves of the backbone, in a sentence."""
    measure, used, dense = keep["measure"], keep["used"], keep["dense"]
    amounts = (f"{used / 1e6:.1f} of {dense / 1e6:.1f} ms" if measure == "latency"
               else f"{used:,.0f} of {dense:,.0f}")
    return (f"keeps {share(used / dense)} of the blocks' {measure} ({amounts}, at most "
            f"{keep['text']})")


def finished(values: Mapping[str, Any], path: Path) -> Iterable[Any]:
    """The end of a job: the comparison, what was saved where, what to do next."""
    yield from outcome(values)
    yield ""
    yield saved(path)
    if values["spec_hash"]:
        yield f"\nnext: {shlex.join(['searchpet', 'show', str(path)])}"
        yield f"      {shlex.join(['searchpet', 'predict', str(path)])} FILE"
    if (path / "study.db").is_file():
        yield f"      {shlex.join(['searchpet', 'trials', str(path)])}"
    elif study := values.get("study"):  # its storage's address may hold a password
        yield f"      {shlex.join(['searchpet', 'trials', study['name']])} --storage ADDRESS"


def saved(path: Path) -> Table:
    """What lies where in a run folder."""
    known = {"spec.json": "the structure", "delta.safetensors": "the trained tensors",
             "result.json": "these figures", "report.html": "a page about the run"}
    rows = [[what, str(path / name), size((path / name).stat().st_size)]
            for name, what in known.items() if (path / name).is_file()]
    if (path / "controls").is_dir():
        rows.append(["the controls", str(path / "controls"), ""])
    if (path / "front").is_dir():
        rows.append(["the Pareto front's structures", str(path / "front"), ""])
    return table("saved", "where", "size", rows=rows, left=2)


def size(count: float) -> str:
    """Bytes as people read them; KB = 1000."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """`45 s`, `3:20 min`, `2:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def checks(found: Iterable[Any]) -> Table:
    """What was recounted."""
    rows = [["ok" if c.holds else "WRONG", c.what, _brief(c.claimed), _brief(c.found)]
            for c in found]
    return table("", "figure", "claimed", "found", rows=rows, left=2)


def _brief(value: Any) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return round(value) if value >= 1 else f"{value:.2g}"
    return value


def ahead(plan: Mapping[str, Any]) -> Table:
    """What a dry run found out."""
    p = plan
    rows = [
        ["space", f"{p['space']}: {p['units']:,} units, {p['parameters']:,} parameters, the "
                  f"cheapest {p['cheapest']:,}"],
        ["budget", f"{p['limit']:,} parameters, beside a head of {p['head']:,}"],
        ["time", f"about {duration(p['seconds'])}: search {duration(p['search_seconds'])}, "
                 f"{p['trainings']} × training {duration(p['train_seconds'])}"],
        ["memory", f"about {size(p['memory_bytes'])}"],
        ["disk", f"{size(p['disk_bytes'])} kept, at most {size(p['disk_peak_bytes'])} while it "
                 "runs"],
    ]
    return table("dry run", "nothing was written", rows=rows, left=2)


def survey(found: Mapping[str, Any]) -> Iterable[Any]:
    """A space on a model, and what a budget buys of it."""
    f = found
    yield (f"{f['space']} on {f['model']} ({f['backbone']:,} parameters): {f['units']:,} units, "
           f"{f['parameters']:,} parameters, the cheapest unit {f['cheapest']:,}")
    yield (f"budget {f['budget']} = {f['limit']:,} parameters; drawn at random it buys "
           f"{f['random_units']:,} units, {f['random_parameters']:,} parameters; of one kind "
           "alone at most:\n")
    yield table("kind", "grain", "units", "parameters", "cheapest", "dearest", "budget buys",
                rows=[list(group.values()) for group in f["kinds"]], left=2)


def lines(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """Predictions as JSON Lines or CSV; in CSV one column per class score."""
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out = io.StringIO()
    flat = [{k: v for key, value in row.items() for k, v in _cells(key, value)} for row in rows]
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _cells(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, list):
        return [(key, value)]
    return [(f"{key}_{i}", one) for i, one in enumerate(value)]


def comparison(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Results of several runs, the best of each task first."""
    rows = sorted(([v["task"], name, v["strategy"], v["score"], f"{v['metric']} {v['split']}",
                    v["trainable"], share(v["fraction"]), v["seed"],
                    round(v["seconds"]["search"] + v["seconds"]["train"])]
                   for name, v in runs), key=lambda row: (row[0], row[4], -row[3]))
    return table("task", "run", "strategy", "score", "metric", "trainable", "share", "seed",
                 "seconds", rows=[[*row[:5], *row[5:]] for row in rows], left=3)


def structure(spec: Spec) -> Iterable[Any]:
    """A spec's deltas by kind and role, the picture of them, and what is pruned."""
    masks = {ratio.kind for ratio in spec.plan}
    weights = [e for e in spec.entries if e.mask and not e.kept]  # masks of them list nothing
    pet = [e for e in spec.entries if e.kind not in masks and (e.kept or not e.mask)]
    budget, backbone = spec.budget, spec.backbone
    yield (f"{backbone.name}: {budget.used:,} of {budget.limit:,} parameters "
           f"({share(budget.used / budget.denominator)} of {budget.denominator:,}), found by "
           f"{spec.provenance.get('strategy', 'hand')}, {spec.hash[:12]}\n")
    yield _members("kind", pet)
    yield from ("", picture(pet))
    if spec.keep:
        yield from ("", kept(spec.keep.model_dump()))
    if spec.plan:
        yield ratios(spec)
    if weights:
        yield _members("mask", weights)


def _members(title: str, entries: Sequence[Entry]) -> Table:
    """Entries by kind and role; where masks lie beside the spec, how much those keep."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.role), []).append(entry)
    rows = []
    for (kind, role), found in sorted(groups.items()):
        masks = [e.mask for e in found if e.mask]
        left, whole = sum(m.count for m in masks), sum(math.prod(m.shape) for m in masks)
        rows.append([kind, role, len(found), sum(len(e.kept) for e in found) or left,
                     _ranges(e.layer for e in found),
                     f"{left:,} of {whole:,}, {share(left / max(1, whole))}" if masks else ""])
    wide = 6 if any(row[-1] for row in rows) else 5
    return table(*[title, "role", "sites", "coordinates", "layers", "mask keeps"][:wide],
                 rows=[row[:wide] for row in rows], left=2)


def ratios(spec: Spec) -> Table:
    """Percent that prune masks keep, by layer from the first to the last."""
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for ratio in spec.plan:
        rows.setdefault((ratio.part, ratio.role, ratio.kind), []).append((ratio.depth, ratio.kept))
    return table("mask", "at", "percent kept, layer by layer", left=3, rows=[
        [kind, f"{part} {role}", " ".join(f"{100 * share:3.0f}" for _, share in sorted(found))]
        for (part, role, kind), found in sorted(rows.items())])


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5`."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def picture(entries: Sequence[Entry]) -> str:
    """Roles (rows) x layers (columns): the darker, the more coordinates are kept there."""
    cells: Counter[tuple[str, int]] = Counter()
    for entry in entries:
        cells[_row(entry), entry.layer] += len(entry.kept)
    layers = range(min(layer for _, layer in cells), max(layer for _, layer in cells) + 1)
    names = sorted({name for name, _ in cells})
    wide, most = max(len(name) for name in names), max(cells.values())
    lines = [" " * wide + " " + " ".join(
        " e" if layer < 0 else f"{layer % 100:>2}" for layer in layers)]
    for name in names:
        shades = " ".join(_shade(cells[name, layer], most) * 2 for layer in layers)
        total = sum(cells[name, layer] for layer in layers)
        lines.append(f"{name:<{wide}} {shades}  {total:,}")
    legend = f"columns are layers, e the embeddings; {SHADES[-1]} is {most:,} coordinates"
    return "\n".join([*lines, legend])


def _row(entry: Entry) -> str:
    side = next((s for s in ("encoder", "decoder") if s in entry.path.split(".")[:2]), "")
    return f"{side} {entry.role}".strip()


def _shade(count: int, most: int) -> str:
    if not count:
        return SHADES[0]
    level = math.log1p(count) / math.log1p(most)
    return SHADES[max(1, math.ceil(4 * level))]


def sites(found: Sequence[Site]) -> Table:
    """Sites by part and role: shapes, layers, how many."""
    groups: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in found:
        shape = f"{site.d_in}→{site.d_out}" if site.form == "linear" else str(site.d_out)
        groups.setdefault((site.part, site.role, site.form, shape), []).append(site)
    rows = [[part, role, form, shape, _ranges(s.layer for s in members), len(members)]
            for (part, role, form, shape), members in sorted(groups.items())]
    return table("part", "role", "form", "shape", "layers", "sites", rows=rows, left=5)


def _value(metric: str, value: float | None) -> float | int | None:
    """A trial's value: counts are whole."""
    return value if value is None or metric in ("score", "latency") else round(value)


def study(found: Mapping[str, Any]) -> Iterable[Any]:
    """A study: its trials, and what its knobs matter."""
    yield (f"{found['study']}: {found['complete']} complete, {found['pruned']} pruned, "
           f"{found['failed']} failed, {found['running']} running, of {found['wanted']} trials")
    columns = list(dict.fromkeys([*found["metrics"], *found["limits"]]))
    yield ""
    yield table("trial", "state", *columns, "steps", "seconds", left=2, rows=[
        [f"{t['number']}{' *' if t['number'] in found['front'] else ''}",
         t["state"] + ("" if t["reused"] is None else f", as trial {t['reused']}"),
         *(_value(name, t.get(name)) for name in columns), t["steps"], t["seconds"]]
        for t in found["trials"]])
    if found["front"]:
        within = ", ".join(f"{name} <= {most:,g}" for name, most in found["limits"].items())
        yield ("* best" if len(found["metrics"]) == 1 else "* on the Pareto front") + (
            within and f" of those with {within}")
    yield from (f"trial {t['number']} failed: {t['failure']}" for t in found["trials"]
                if t["failure"])
    if found["importances"]:
        yield ""
        yield table("knob", "importance", rows=[
            [name, share(value)] for name, value in found["importances"].items()])
