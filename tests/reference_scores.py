"""Scores that the published evaluation gave, by their names there, against ours."""

from typing import Any

import pytest


def assert_scores_agree(summary: dict[str, Any], expected: dict[str, float]) -> None:
    for name in ("bPQ", "bDQ", "bSQ", "mPQ", "mDQ", "mSQ"):
        assert summary[name] == pytest.approx(expected[name], abs=1e-9), name
    assert summary["dice"] == pytest.approx(expected["Binary-Cell-Dice-Mean"], abs=1e-6)
    assert summary["jaccard"] == pytest.approx(expected["Binary-Cell-Jacard-Mean"], abs=1e-6)
    for name in ("f1", "precision", "recall"):
        assert summary["detection"][name] == pytest.approx(expected[f"{name}_detection"], abs=1e-9)
