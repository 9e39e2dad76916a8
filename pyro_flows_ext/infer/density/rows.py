"""Rows of data with their contexts and weights, from arrays, DataFrames, tensors, datasets and loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data import Subset as TorchSubset
from torch.utils.data.distributed import DistributedSampler

from .arrays import as_tensor

# Rows of a stream that are read to learn about it before training.
HEAD_ROWS = 10_000


class Batch(NamedTuple):
    """Rows `(B, *event_shape)`, their contexts `(B, C)` and weights `(B)`, or None."""

    values: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None

    def take(self, rows: Any) -> Batch:
        """Some of the rows."""
        return self._map(lambda part: part[rows])

    def to(self, like: Tensor) -> Batch:
        """On the device and in the dtype of a tensor."""
        return self._map(lambda part: part.to(like))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        values, context, weights = self
        return Batch(
            fn(values),
            None if context is None else fn(context),
            None if weights is None else fn(weights),
        )


# The rows of a batch of so many that one process of several takes.
Part = Callable[[int], slice]


def whole(num: int) -> slice:
    """All rows."""
    return slice(num)


class Table:
    """Rows in tensors, which may lie in a file that is mapped into memory; with `index`, a selection of them."""

    def __init__(
        self,
        values: Tensor,
        context: Tensor | None = None,
        weights: Tensor | None = None,
        columns: list[str] | None = None,
        index: Tensor | None = None,
        context_columns: list[str] | None = None,
    ):
        self.parts: tuple[Tensor, Tensor | None, Tensor | None] = (values, context, weights)
        self.columns, self.index, self.context_columns = columns, index, context_columns

    def __len__(self) -> int:
        return len(self.parts[0] if self.index is None else self.index)

    def take(self, rows: Any) -> Batch:
        """The rows of an index or slice."""
        if self.index is not None:
            rows = self.index[rows]
        return Batch(*self.parts).take(rows)

    def epoch(self, batch_size: int, part: Part = whole) -> Iterator[Batch]:
        """The rows in a new order, `part` of every batch; an incomplete batch at the end is left out."""
        size = min(batch_size, len(self))
        order = torch.randperm(len(self)).to(self.parts[0].device)
        for rows in order[: len(self) // size * size].split(size):
            yield self.take(rows[part(size)])

    def chunks(self, size: int) -> Iterator[Batch]:
        """All rows in their order."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def head(self, num: int) -> Batch:
        """About `num` rows, spread evenly over the data."""
        step = max(1, len(self) // num)
        return self.take(slice(0, step * num, step))

    def unsqueeze(self) -> None:
        """Makes rows `(N, 1)` of numbers `(N)`."""
        self.parts = (self.parts[0].unsqueeze(-1), *self.parts[1:])

    def select(self, index: Tensor) -> Table:
        """Some of the rows, in the order of the data, over the same memory."""
        index = index.sort().values.to(self.parts[0].device)
        return Table(*self.parts, self.columns, index, self.context_columns)


class Stream:
    """Batches of an iterable: a loader, or any object that can be iterated more than once."""

    columns: list[str] | None = None
    context_columns: list[str] | None = None

    def __init__(self, name: str, batches: Iterable[Any], takes_context: bool):
        self.name, self.batches, self.takes_context = name, batches, takes_context

    @property
    def sampler(self) -> DistributedSampler[Any] | None:
        """The sampler of a loader that gives every process rows of its own."""
        sampler = getattr(self.batches, "sampler", None)
        return sampler if isinstance(sampler, DistributedSampler) else None

    def epoch(self, batch_size: int, part: Part = whole) -> Iterator[Batch]:
        if self.sampler is not None:
            yield from self.chunks(batch_size)
        elif isinstance(self.batches, _Shuffled):
            for item in self.batches.iterate(part):
                yield self._batch(item)
        else:
            for batch in self.chunks(batch_size):
                yield batch.take(part(len(batch.values)))

    def chunks(self, size: int) -> Iterator[Batch]:
        found = False
        for item in self.batches:
            found = True
            yield self._batch(item)
        if not found:
            raise ValueError(f"{self.name}: expected at least one batch, got none")

    def head(self, num: int) -> Batch:
        """The first rows, `num` or a few more."""
        parts: list[Batch] = []
        for batch in self.chunks(num):
            parts.append(batch)
            if sum(len(part.values) for part in parts) >= num:
                break
        contexts = [part.context for part in parts if part.context is not None]
        weights = [part.weights for part in parts if part.weights is not None]
        return Batch(
            torch.cat([part.values for part in parts]),
            torch.cat(contexts) if contexts else None,
            torch.cat(weights) if weights else None,
        )

    def _batch(self, item: Any) -> Batch:
        """A batch of a loader: rows, or (rows, context) and (rows, context, weights) for a density with a context."""
        parts = tuple(item) if isinstance(item, tuple | list) else (item,)
        expected = (2, 3) if self.takes_context else (1,)
        if len(parts) not in expected:
            kind = "pairs (rows, context)" if self.takes_context else "rows alone"
            raise ValueError(
                f"{self.name}: expected batches of {kind}, got {len(parts)} parts; let the dataset return "
                f"{'both' if self.takes_context else 'no labels'}"
            )
        values, context, weights = (*parts, None, None)[:3]
        rows = as_tensor(self.name, values)[0]
        return Batch(
            rows,
            None if context is None else as_tensor("context", context)[0],
            None if weights is None else as_tensor("weights", weights)[0],
        )


class _Shuffled:
    """A dataset with an index, in batches of a new order at each iteration."""

    def __init__(self, dataset: Any, batch_size: int, collate: Any = default_collate):
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(whole)

    def iterate(self, part: Part) -> Iterator[Any]:
        """Part of every batch; the rest is not read."""
        size = min(self.batch_size, len(self.dataset))
        order = torch.randperm(len(self.dataset)).tolist()
        for start in range(0, len(order) // size * size, size):
            yield self.collate([self.dataset[i] for i in order[start : start + size][part(size)]])


# Data that can be read many times.
Rows = Table | Stream


def read_rows(
    name: str, data: Any, context: Any, weights: Any, takes_context: bool, batch_size: int
) -> Rows:
    """The rows of any data. Raises `TypeError` or `ValueError` for what is none, naming it by `name`."""
    if isinstance(data, TensorDataset):
        if context is None and takes_context and len(data.tensors) > 1:
            data, context = data.tensors[:2]
        elif len(data.tensors) == 1:
            data = data.tensors[0]
        else:
            raise ValueError(
                f"{name}: expected a TensorDataset of rows alone for a density without a context, got "
                f"{len(data.tensors)} tensors; pass data.tensors[0]"
            )
    if isinstance(data, Dataset | DataLoader) or _is_stream(data):
        if context is not None or weights is not None:
            raise ValueError(
                f"context, weights: expected None beside a {type(data).__name__}; let it return (rows, context) or "
                "(rows, context, weights)"
            )
        return Stream(name, _loader(name, data, batch_size), takes_context)
    values, columns = as_tensor(name, data)
    if values.dim() == 0 or len(values) == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {tuple(values.shape)}")
    context_columns = None
    if context is not None:
        context, context_columns = _beside("context", context, values)
        context = context.unsqueeze(-1) if context.dim() == 1 else context
    if weights is not None:
        weights, _ = _beside("weights", weights, values)
        _check_weights(weights)
    return Table(values, context, weights, columns, None, context_columns)


def split_rows(rows: Rows, share: float, batch_size: int) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows to validate with, a random share; none where that is less than one row."""
    if isinstance(rows, Table):
        num = round(share * len(rows))
        if num == 0 or num == len(rows):
            return rows, None
        order = torch.randperm(len(rows))
        return rows.select(order[num:]), rows.select(order[:num])
    source: Any = rows.batches
    dataset = getattr(source, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not _is_plain(source):
        raise ValueError(
            "validation: expected rows or a loader of its own for data that comes in batches, got a share; or None "
            "to train without"
        )
    num = round(share * len(dataset))
    if num == 0:
        return rows, None
    shuffled = torch.randperm(len(dataset)).tolist()
    subsets = [TorchSubset(dataset, shuffled[num:]), TorchSubset(dataset, shuffled[:num])]
    if isinstance(source, _Shuffled):
        kept, held = subsets
        sources: list[Any] = [
            _Shuffled(kept, batch_size, source.collate),
            DataLoader(held, batch_size, collate_fn=source.collate),
        ]
    else:
        options = {
            "batch_size": source.batch_size,
            "num_workers": source.num_workers,
            "collate_fn": source.collate_fn,
        }
        shuffle = isinstance(source.sampler, RandomSampler)
        sources = [
            DataLoader(subset, shuffle=shuffle and i == 0, **options)
            for i, subset in enumerate(subsets)
        ]
    train, validation = sources
    return (
        Stream("data", train, rows.takes_context),
        Stream("validation", validation, rows.takes_context),
    )


def _beside(name: str, data: Any, values: Tensor) -> tuple[Tensor, list[str] | None]:
    """A tensor with a row for each of the values, and the names of its columns."""
    tensor, columns = as_tensor(name, data)
    if tensor.dim() == 0 or len(tensor) != len(values):
        raise ValueError(
            f"{name}: expected one row for each of the {len(values)} rows of data, got shape {tuple(tensor.shape)}"
        )
    return tensor.to(values.device), columns


def _check_weights(weights: Tensor) -> None:
    if weights.dim() != 1:
        raise ValueError(f"weights: expected shape (N,), got {tuple(weights.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool(weights.sum() > 0):
        raise ValueError("weights: expected finite numbers >= 0 with a positive sum")


def _is_stream(data: Any) -> bool:
    """Whether an object gives batches when iterated, and is no array or list of numbers."""
    if isinstance(data, Tensor) or hasattr(data, "__array__") or hasattr(data, "to_numpy"):
        return False
    if isinstance(data, list | tuple):
        return bool(data) and isinstance(data[0], Tensor | tuple)
    return hasattr(data, "__iter__") and not isinstance(data, str | bytes | dict | set)


def _loader(name: str, data: Any, batch_size: int) -> Any:
    """Something that can be iterated again and again, and gives batches."""
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size)
    if isinstance(data, Dataset):
        if not hasattr(data, "__len__") or len(data) == 0:
            raise ValueError(f"{name}: expected a Dataset with a length of at least 1")
        return _Shuffled(data, batch_size)
    if iter(data) is data:
        raise TypeError(
            f"{name}: expected batches that can be read again in the next epoch, got an iterator; pass a DataLoader, a "
            "list of batches, or a class with __iter__"
        )
    return data


def _is_plain(source: Any) -> bool:
    """Whether rows are drawn by nothing but a shuffle."""
    if isinstance(source, _Shuffled):
        return True
    sampler = getattr(source, "sampler", None)
    return getattr(source, "batch_size", None) is not None and isinstance(
        sampler, RandomSampler | SequentialSampler
    )
