"""Metrics against values worked out by hand, their names, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from searchpet.errors import InputError
from searchpet.metrics import measure, parse_metrics


def test_metric_names() -> None:
    assert parse_metrics("spearman (and pearson)") == ("spearman", "pearson")
    assert parse_metrics("mcc") == ("matthews",)
    assert parse_metrics(["f1-macro", "Accuracy"]) == ("f1_macro", "accuracy")
    with pytest.raises(InputError, match="'bleu'"):
        parse_metrics("bleu")
    with pytest.raises(InputError, match="span_f1"):
        parse_metrics("span-f1")
    with pytest.raises(InputError, match="at least one"):
        parse_metrics("")


def test_classification_metrics() -> None:
    """Two of three right: tp 1, fp 1, tn 1, fn 0, so f1 2/3 and matthews 1/2, by hand."""
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    found = measure(("mcc", "accuracy", "f1", "f1_macro"), logits, np.array([0, 0, 1]))
    assert list(found) == ["matthews", "accuracy", "f1", "f1_macro"]
    assert list(found.values()) == pytest.approx([1 / 2, 2 / 3, 2 / 3, 2 / 3])


def test_correlations() -> None:
    """x^3 keeps the order: spearman 1, pearson 0.9431 for 1..5, by hand."""
    x = np.arange(1.0, 6.0)
    found = measure(("spearman", "pearson"), x[:, None] ** 3, x)
    assert found == {"spearman": pytest.approx(1.0), "pearson": pytest.approx(0.9431, abs=1e-4)}
    for bad in (np.ones(5), np.array([1, 2, 3, 4, np.nan])):
        assert measure(("spearman", "pearson"), bad, x) == {"spearman": 0.0, "pearson": 0.0}


def test_metrics_that_do_not_fit() -> None:
    labels = np.array([0, 1, 2])
    with pytest.raises(InputError, match="f1_macro"):
        measure(("f1",), np.eye(3), labels)
    with pytest.raises(InputError, match="regression"):
        measure(("accuracy",), np.ones((3, 1)), labels)
    with pytest.raises(InputError, match="did you mean"):
        measure(("acuracy",), np.eye(3), labels)
    with pytest.raises(InputError, match="at least 1"):
        measure(("accuracy",), np.ones((0, 2)), np.ones(0))
