"""Data from files and by name: named tensors for a model, and rows to learn a density of."""

from .files import Columns, load_data
from .rows import DATASETS, Rows, Split, load_rows, split_rows
from .scikit import scikit_learn_datasets

__all__ = [
    "DATASETS",
    "Columns",
    "Rows",
    "Split",
    "load_data",
    "load_rows",
    "scikit_learn_datasets",
    "split_rows",
]
