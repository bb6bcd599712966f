"""Metrics by name, computed by scikit-learn and scipy.  Larger is better for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from searchpet.errors import InputError, unknown

Array = np.ndarray[Any, Any]
ALIASES = {
    "acc": "accuracy", "mcc": "matthews", "matthews_correlation": "matthews",
    "f1_binary": "f1", "macro_f1": "f1_macro", "spearmanr": "spearman", "pearsonr": "pearson",
}


def _accuracy(found: Array, labels: Array) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, found))


def _matthews(found: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, found))


def _f1(found: Array, labels: Array) -> float:
    """F1 of class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, found == 1, zero_division=0))


def _f1_macro(found: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, found, average="macro", zero_division=0))


def _spearman(found: Array, labels: Array) -> float:
    from scipy.stats import rankdata

    if not np.isfinite(found).all():  # ranks would hide it
        return 0.0
    return _pearson(rankdata(found), rankdata(labels))


def _pearson(found: Array, labels: Array) -> float:
    """0 where it is not defined: fewer than two rows, a constant side, predictions not finite."""
    from scipy.stats import pearsonr

    if len(found) < 2 or not np.isfinite(found).all() or np.ptp(found) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(pearsonr(found, labels).statistic)


CLASSIFICATION: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy, "matthews": _matthews, "f1": _f1, "f1_macro": _f1_macro,
}
REGRESSION: dict[str, Callable[[Array, Array], float]] = {
    "spearman": _spearman, "pearson": _pearson,
}


def parse_metrics(text: str | Iterable[str]) -> tuple[str, ...]:
    """Canonical names, the score first: "spearman (and pearson)" -> ("spearman", "pearson").

    Raises InputError for an unknown or an empty list of names.
    """
    words = re.findall(r"[\w-]+", text) if isinstance(text, str) else list(text)
    names = [word.lower().replace("-", "_") for word in words if word.lower() != "and"]
    found = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
    if not found:
        raise InputError(f"metric must name at least one metric, but got {text!r}; try 'accuracy'")
    for name in found:
        if name not in CLASSIFICATION | REGRESSION:
            raise unknown("metric", name, CLASSIFICATION | REGRESSION | ALIASES)
    return found


def check_metrics(metrics: Sequence[str], classes: int) -> None:
    """Raise InputError where a metric does not fit a task of `classes` classes (0: regression)."""
    fit = CLASSIFICATION if classes else REGRESSION
    kind = "classification" if classes else "regression"
    for name in metrics:
        if name not in fit:
            raise InputError(
                f"metric of a {kind} task must be one of {', '.join(fit)}, but got {name!r}"
            )
    if "f1" in metrics and classes > 2:
        raise InputError(
            f"metric 'f1' must have 2 classes (class 1 is positive), but the task has {classes}; "
            "use 'f1_macro'"
        )


def measure(metrics: Sequence[str], logits: Array, labels: Array) -> dict[str, float]:
    """Metrics of a model's outputs, in the order given.

    logits (n, classes), or (n, 1) or (n,) for regression; labels (n,).  Raises InputError for an
    unknown metric, one that does not fit the number of outputs, or no rows.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    names = parse_metrics(metrics)
    classes = logits.shape[-1] if logits.ndim == 2 and logits.shape[-1] > 1 else 0
    check_metrics(names, classes)
    if not len(labels) or len(logits) != len(labels):
        raise InputError(
            f"metrics need as many predictions as labels, at least 1, but got {len(logits)} "
            f"and {len(labels)}"
        )
    found = logits.argmax(-1) if classes else logits.reshape(len(labels))  # (n,)
    known = CLASSIFICATION if classes else REGRESSION
    return {name: known[name](found, labels) for name in names}
