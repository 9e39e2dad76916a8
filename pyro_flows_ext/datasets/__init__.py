"""Data from files and by name: named tensors for a model, and rows to learn a density of."""

from .files import Columns, load_data, table_bytes
from .rows import DATASETS, Part, Rows, Split, load_rows, split_rows
from .scikit import scikit_learn_datasets

__all__ = [
    "DATASETS",
    "Columns",
    "Part",
    "Rows",
    "Split",
    "load_data",
    "load_rows",
    "scikit_learn_datasets",
    "split_rows",
    "table_bytes",
]
