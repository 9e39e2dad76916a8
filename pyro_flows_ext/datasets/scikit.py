"""Data sets that scikit-learn ships."""

from __future__ import annotations

from typing import Any


def scikit_learn_datasets() -> Any:
    """`sklearn.datasets`. Raises `ValueError` where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "these data come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return datasets
