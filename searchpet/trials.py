"""A look at a study: its trials, what its knobs matter, figures, and a page that holds them.

Figures and importances are Optuna's own: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from searchpet import charts
from searchpet.canvas import Figure, picture
from searchpet.collect import fitting, front
from searchpet.errors import InputError
from searchpet.page import render
from searchpet.question import Question, question_of
from searchpet.roster import FAILURE, root, standing, trials_of
from searchpet.run import RunFolder
from searchpet.study import join
from searchpet.tune import FILE
from searchpet.worker import REUSED

SIZE = (8.0, 4.5)  # inches
DOTS = 150  # per inch
UNITS = {"trainable": "trainable parameters", "flops": "FLOPs", "latency": "latency, ms"}
NAMED = 15  # trials in the legend of a figure
WORST = 1.1  # the hypervolume's reference point, in units of the worst value of each metric


def look(study: str, storage: str | None = None) -> tuple[Study, Question]:
    """A study by name in a storage, or by the folder of its run.

    Raises InputError where neither is there.
    """
    file = Path(study) / FILE
    if storage is None and not file.is_file():
        raise InputError(f"trials takes the folder of a tune's run, or --storage and a study's "
                         f"name, but {study} holds no {FILE}")
    made = join(storage or f"sqlite:///{file}", study if storage else None)
    return made, question_of(made, None, "cpu")


def summary(study: Study, question: Question) -> dict[str, Any]:
    """The study as plain values: counts, rows of trials, importances, the front."""
    now = standing(study)
    latest = {root(t): t for t in trials_of(study)}
    return {
        "study": study.study_name, "metrics": list(question.metrics),
        "limits": dict(question.limits), "wanted": question.trials, "complete": now.complete,
        "pruned": now.pruned, "failed": now.failed, "running": now.running,
        "waiting": now.waiting,
        "front": [t.number for t in front(study, question)] if fitting(study) else [],
        "importances": importances(study, question),
        "trials": [_row(t, question) for t in latest.values()]}


def _row(trial: FrozenTrial, question: Question) -> dict[str, Any]:
    """A trial as plain values; the score of a pruned one is that of its last rung."""
    values = {name: trial.user_attrs[name] for name in question.limits if name in trial.user_attrs}
    values |= dict(zip(question.metrics, trial.values or (), strict=False))
    if "score" not in values and trial.intermediate_values:
        values |= {"score": trial.intermediate_values[max(trial.intermediate_values)]}
    return {
        "number": trial.number, "state": trial.state.name.lower(), **values,
        "steps": max(trial.intermediate_values, default=None),
        "seconds": trial.user_attrs.get("seconds"), "reused": trial.user_attrs.get(REUSED),
        "spec_hash": trial.user_attrs.get("spec_hash"), "params": trial.params,
        "failure": trial.user_attrs.get(FAILURE)}


def importances(study: Study, question: Question) -> dict[str, float]:
    """Knob -> share of what it matters for the score, of those that were turned."""
    if not (names := turned(study)):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(
            study, params=names, target=None if len(question.metrics) == 1 else _score(question)))


def turned(study: Study) -> list[str]:
    """Knobs that stood at more than one value in finished trials: of the others nothing can be
    said, but the evaluator would.
    """
    values: dict[str, set[Any]] = {}
    for trial in trials_of(study):
        for name, value in trial.params.items() if trial.state == TrialState.COMPLETE else ():
            values.setdefault(name, set()).add(value)
    return [name for name, had in values.items() if len(had) > 1]


def _score(question: Question) -> Callable[[FrozenTrial], float]:
    place = question.metrics.index("score")
    return lambda trial: -float(trial.values[place])  # lower is better, to the evaluator


def figures(study: Study, question: Question) -> dict[str, bytes]:
    """Name -> PNG: history, importance, and rungs or the front with its hypervolume."""
    drawn = optuna.visualization.matplotlib
    done = [t for t in trials_of(study) if t.state == TrialState.COMPLETE]
    several = len(question.metrics) > 1
    place = question.metrics.index("score")
    score = (lambda t: t.values[place]) if several else None
    plots: dict[str, Callable[[], Any]] = {
        "history": lambda: drawn.plot_optimization_history(
            study, target=score, target_name="score")}
    if names := turned(study):
        plots["importance"] = lambda: drawn.plot_param_importances(
            study, params=names, target=_score(question) if several else None,
            target_name="score")
    if question.prunes and len(question.rungs) > 1:
        plots["rungs"] = lambda: _rungs(study)
    if several and done:
        plots |= {"front": lambda: charts.front(*points(study, question)),
                  "hypervolume": lambda: _hypervolume(
                      study, _reference(done, question), question)}
    return {name: _png(plot) for name, plot in plots.items()} if done else {}


def points(study: Study, question: Question,
           ) -> tuple[list[dict[str, float]], list[bool], dict[str, str]]:
    """The finished trials for `charts.front`: values by metric, which lead, names of the axes.

    Raises InputError for a study of one metric, or without a finished trial.
    """
    if len(question.metrics) < 2:
        raise InputError("a Pareto front needs two metrics, but the study is judged by the score "
                         "alone; tune with --metric score,flops")
    best = {t.number for t in front(study, question)}
    done = [t for t in trials_of(study) if t.state == TrialState.COMPLETE]
    names = {name: UNITS.get(name, name) for name in question.metrics}
    return ([dict(zip(question.metrics, t.values, strict=True)) for t in done],
            [t.number in best for t in done], names)


def _rungs(study: Study) -> Any:
    axes = optuna.visualization.matplotlib.plot_intermediate_values(study)
    names = axes.get_legend()
    if names is not None and len(axes.lines) > NAMED:
        names.remove()  # they would be higher than the figure
    return axes


def _hypervolume(study: Study, reference: list[float], question: Question) -> Any:
    axes = optuna.visualization.matplotlib.plot_hypervolume_history(study, reference)
    point = ", ".join(f"{name} {value:.6g}" for name, value in
                      zip(question.metrics, reference, strict=True))
    axes.set_title(f"Hypervolume up to {point}")
    return axes


def _reference(done: list[FrozenTrial], question: Question) -> list[float]:
    """A point that every trial is at least as good as: 0 for the score, beyond the worst else."""
    worst = [max(t.values[i] for t in done) for i in range(len(question.metrics))]
    return [0.0 if name == "score" else WORST * value
            for name, value in zip(question.metrics, worst, strict=True)]


def _png(plot: Callable[[], Any]) -> bytes:
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    with warnings.catch_warnings(), plt.style.context("default"):
        warnings.simplefilter("ignore")
        axes = plot()
        if isinstance(axes, Figure):  # one of our own
            return picture(axes, "png")
        figure = axes.figure if hasattr(axes, "figure") else axes[0].figure
        figure.set_size_inches(*SIZE)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DOTS, bbox_inches="tight")
        plt.close(figure)
    return buffer.getvalue()


def write(study: Study, question: Question, out: str | Path) -> list[Path]:
    """Figures as PNG, and study.html that holds them and the table; the files' paths."""
    folder = RunFolder(out)
    folder.path.mkdir(parents=True, exist_ok=True)
    drawn = figures(study, question)
    for name, png in drawn.items():
        folder.write_bytes(f"{name}.png", png)
    images = {name: base64.b64encode(png).decode() for name, png in drawn.items()}
    folder.write_text("study.html", render(
        "study.html", s=summary(study, question), figures=images))
    return [folder.path / f"{name}.png" for name in drawn] + [folder.path / "study.html"]
