"""The report: a page about a run that says what was asked, what came out, and how to use it.

One file, `report.html` in the run's folder: figures are inline SVG, nothing is fetched, and no
script runs.  For who knows nothing of the run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

from markupsafe import Markup

from searchpet import launch, plot
from searchpet.apply import DELTA_FILE
from searchpet.canvas import Figure, picture, save
from searchpet.curves import record_of, trainings_of
from searchpet.engine import Result
from searchpet.errors import InputError
from searchpet.outline import Outline, outline
from searchpet.page import render
from searchpet.propose import SMALLER
from searchpet.recall import command_of
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.transfer import REPORT, fates
from searchpet.views import duration, figure, kept, share, size, trained_on

P = ParamSpec("P")
FILE = "report.html"
CURVE = "budget.svg"
DOTS = 96  # of CSS per inch
SMALL = 0.6  # of a figure's own size: the least that it is shown at
FILES = {
    "spec.json": "the structure", "delta.safetensors": "the trained numbers",
    "masks.safetensors": "masks of single weights", "result.json": "the figures of this page",
    "settings.json": "what was asked for", "log.jsonl": "what happened",
    "probabilities.json": "how the search went", "training.json": "how the training went",
    "scores.safetensors": "the search's scores of all units",
    CURVE: "score over budget",
    "inherit.safetensors": "what the search has learned",
    "transfer.json": "what became of each entry", "source.json": "the spec that was carried over",
    "space.toml": "the winner's space",
    "study.db": "the trials", "study.json": "which study this is of"}


def write(run: str | Path) -> Path:
    """Write report.html of a finished run; its path.

    Raises InputError for a folder that holds no finished run, or files that were damaged.
    """
    folder = RunFolder(run)
    values = _checked(folder.result(), folder)
    spec = Spec.load(folder.path) if folder.has("spec.json") else None
    drawn = outline(spec) if spec else None
    trains = trainings_of(folder)
    figures = _figures(folder, values, drawn, trains)
    if "budget" in figures:
        save(figures["budget"][0], folder.path / CURVE)
    page = render(
        "run.html", v=values, spec=spec, command=command_of(folder), path=str(folder.path),
        answer=answer(values), rows=rows(values), ledger=ledger(values, spec, drawn),
        figures={name: _inline(made, name, told) for name, (made, told) in
                 figures.items()},
        usage=usage(folder, values), provenance=provenance(values, spec),
        files=[(name, told, size((folder.path / name).stat().st_size))
               for name, told in FILES.items() if folder.has(name)],
        carried=carried(folder), best=_best(values),
        keep=kept(values["keep"]) if values["keep"] else "",
        backbone=spec.backbone.name if spec else "", share=share(values["fraction"]))
    folder.write_text(FILE, page)
    return folder.path / FILE


def reported(job: Callable[P, Result]) -> Callable[P, Result]:
    """A job that leaves a page in its run.  A page that fails costs no finished run: the log says
    so, and `searchpet report RUN` says why.
    """
    @functools.wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        result = job(*args, **kwargs)
        own = [RunFolder(path) for path in sorted(result.path.glob(f"{SMALLER}/*"))]
        for folder in [RunFolder(result.path), *own] if launch.leader() else ():
            if folder.has("result.json"):
                _written(folder)
        return result

    return run


def _written(folder: RunFolder) -> None:
    try:
        write(folder.path)
    except Exception as error:  # whatever it is, the run itself is done
        with contextlib.suppress(OSError):
            folder.log(warning=f"{FILE} could not be written: {error!r}")


def _checked(values: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """result.json with figures that are figures.  Raises InputError for others."""
    rows = [values, *(c for c in values.get("controls") or () if isinstance(c, dict))]
    numbers = [(name, row.get(name)) for row in rows for name in ("score", "trainable")]
    numbers += [(name, values[name]) for name in ("head", "backbone", "fraction")]
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(
                value):
            raise InputError(f"{folder.path / 'result.json'} must have numbers, but {name} is "
                             f"{str(value)[:40]!r}; it was edited or damaged, train again")
    return {"controls": [], "full_finetune": None, "warnings": [], "study": None, "tau": None,
            "validation_score": None, "inherited": False, **values}


def _best(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The control with the best score."""
    return max(values["controls"], key=lambda c: float(c["score"]), default=None)


def answer(values: Mapping[str, Any]) -> list[str]:
    """Sentences: what it reached, whether that beats the controls and by how much, how sure."""
    v, best, full = values, _best(values), values["full_finetune"]
    said = [f"It reaches {v['metric']} {v['score']:.4f} on {v['split']} data, with "
            f"{v['trainable']:,} trained parameters, {share(v['fraction'])} of the backbone."]
    if best is not None:
        ahead = 100 * (v["score"] - best["score"])
        how = "ahead of" if ahead > 0 else "behind" if ahead < 0 else "level with"
        by = f"{abs(ahead):.2f} points " if ahead else ""
        of = (f"{len(v['controls'])} usual settings, which were tried first" if v["study"] else
              f"{len(v['controls'])} controls under the same budget and with "
              f"{'as long a' if v['inherited'] else 'the same'} training")
        said.append(f"That is {by}{how} {best['name']} ({best['score']:.4f}), the best of {of}.")
        said.append("This is one seed, and one draw of each control row: differences of a few "
                    "points can be chance. Repeat the command with --seed 1 and --seed 2 before "
                    "you build on them.")
    elif v["study"]:
        said.append("The other trials of its study were judged by validation: searchpet trials "
                    "shows them.")
    elif v["strategy"] not in ("full", "head"):
        said.append("It was trained without controls, so this page cannot say whether another "
                    f"structure of its size would do as well; {_trains(v)} trains some.")
    if v["inherited"]:
        said.append(trained_on(v) + (
            " Part of what it is ahead is that it has learned for longer: searchpet search "
            "--fresh trains all alike." if v["controls"] else ""))
    if full is not None and v["strategy"] != "full":
        said.append(f"Full fine-tuning of all {v['backbone']:,} parameters reaches {full:.4f} "
                    f"here: {100 * (v['score'] - full):+.2f} points from there.")
    return said


def _trains(values: Mapping[str, Any]) -> str:
    """The command that trains controls beside a structure."""
    return f"searchpet {'transfer --controls 1' if values['strategy'] == 'transfer' else 'search'}"


def carried(folder: RunFolder) -> dict[str, Any]:
    """What became of the source of a transfer, by role and by entry; empty for other runs."""
    if not folder.has(REPORT):
        return {}
    report = folder.read_json(REPORT)
    return {"source": report["source"]["backbone"], "notes": report["notes"],
            "fates": fates(report), "roles": [
                (row["role"], row["kind"], figure(row["source"]), figure(row["target"]))
                for row in report["roles"]]}


def rows(values: Mapping[str, Any]) -> list[tuple[str, str, str, str, bool]]:
    """The comparison: name, score, trained parameters, share, whether it is this run's own."""
    v = values
    name = f"{v['strategy']} (found)" if v["controls"] else str(v["strategy"])
    found = [(name, v["score"], v["trainable"], True)]
    found += [(c["name"], c["score"], c["trainable"], False) for c in v["controls"]]
    if v["full_finetune"] is not None and v["strategy"] != "full":
        found.append(("full fine-tuning", v["full_finetune"], v["backbone"], False))
    return [(str(n), figure(float(s)), figure(t), share(t / max(1, v["backbone"])), own)
            for n, s, t, own in found]


def ledger(values: Mapping[str, Any], spec: Spec | None, drawn: Outline | None,
           ) -> list[tuple[str, str]]:
    """What was allowed and where it went."""
    found = [("backbone, frozen" if values["strategy"] != "full" else "backbone, trained",
              figure(values["backbone"]))]
    if spec:
        budget = spec.budget
        found += [(f"limit ({budget.text}, counts {budget.counts})", figure(budget.limit)),
                  ("used", figure(budget.used)), ("left over", figure(budget.slack))]
    found.append(("head, the task's output layer", figure(values["head"])))
    for kind in drawn.kinds if drawn else ():
        held = [place for place in drawn.places if place.kind == kind] if drawn else []
        count = sum(place.parameters for place in held)
        found.append((f"in {kind}, {len(held)} places", f"{count:,}" + (
            "" if drawn and drawn.exact else " coordinates")))
    seconds = values["seconds"]
    found += [(f"{name} time", duration(seconds[name])) for name in ("search", "train")
              if isinstance(seconds, dict) and seconds.get(name)]
    return found


def usage(folder: RunFolder, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what for, code) of a run that can be loaded."""
    if not folder.has(DELTA_FILE):
        return []
    path = str(folder.path)
    several = "," in str(values["task"])
    task = f', task="{str(values["task"]).split(",")[0].strip()}"' if several else ""

    def line(*words: str) -> str:
        return shlex.join(["searchpet", *words])

    option = ["--task", str(values["task"]).split(",")[0].strip()] if several else []
    return [
        ("The trained transformers model, in Python", "import searchpet\n\nmodel = "
         f"searchpet.load({path!r}{task})"),
        ("Label new texts (a CSV, JSON Lines or parquet file with the task's columns)",
         line("predict", path, "new.csv", *option)),
        ("Measure it again", line("evaluate", path)),
        ("Train the same structure with another seed",
         line("train", str(folder.path / "spec.json"), "--seed", "1"))]


def provenance(values: Mapping[str, Any], spec: Spec | None) -> list[tuple[str, str]]:
    """Where it all comes from."""
    v, found = values, [("seed", str(values["seed"])), ("tau", str(values["tau"]))]
    if v["study"]:
        s = v["study"]
        found += [("study", f"{s.get('name')}: best of {s.get('trials')} trials, number "
                            f"{s.get('trial')}"),
                  ("knobs", ", ".join(f"{k}={x}" for k, x in (s.get("params") or {}).items()))]
    if spec:
        p, b = spec.provenance, spec.backbone
        found += [("backbone", f"{b.name}, revision {b.revision}"), ("spec", spec.hash)]
        found += [(name, str(p[name])) for name in ("space", "masks", "units", "data") if
                  p.get(name) is not None]
        for name in ("hyperparameters", "settings", "versions"):
            if isinstance(p.get(name), dict) and p[name]:
                found.append((name, ", ".join(f"{k} {x}" for k, x in p[name].items())))
    if v["tensors"]:
        found.append(("tensors, sha256", str(v["tensors"])))
    return [(name, value) for name, value in found if value not in ("", "None")]


def _figures(folder: RunFolder, values: Mapping[str, Any], drawn: Outline | None,
             trains: Sequence[plot.Learning]) -> dict[str, tuple[Figure, str]]:
    """Name -> figure and what it shows; those that the run has something for."""
    found: dict[str, tuple[Figure, str]] = {}
    if drawn:
        found["structure"] = plot.structure(drawn), "Structure: roles by layers."
        found["parameters"] = plot.parameters(drawn), "Parameters by layer and by role."
    scored = plot.results(values, folder.path)
    if len(scored) > 1:
        found["cost"] = (plot.cost(scored, f"{values['metric']} on {values['split']}"),
                         "Score over cost, beside the controls.")
    if own := plot.smaller(values, folder.path):
        found["budget"] = (plot.budget([*own, scored[0]],
                                       f"{values['metric']} on {values['split']}"),
                           "Score over budget: structures of one search, each part of the next.")
    try:
        record = record_of(folder)
    except InputError:  # a strategy without gates
        record = None
    if record:
        found["search"] = plot.search(record), "Expected and hard parameters over the search."
        if any(not group.masks for group in record.groups):
            found["shares"] = plot.shares(record), "What each role was expected to hold."
    if trains:
        found["learning"] = (plot.learning(trains, str(values["metric"])),
                             "Validation scores and loss over the training.")
    return found


def _inline(made: Figure, name: str, told: str) -> Markup:
    """A figure as SVG inside a page: ids of its own, as wide as it is at most.

    Matplotlib has escaped its texts; `told` is ours.
    """
    text = picture(made, "svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    wide = made.get_figwidth() * DOTS
    style = f"width:100%;max-width:{wide:.0f}px;min-width:{min(wide, SMALL * wide):.0f}px"
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
                  rf'<svg \1 xmlns="http://www.w3.org/2000/svg" '
                  rf'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
                  rf'aria-label="{told}" style="{style}">', text, count=1)
    return Markup(text)
