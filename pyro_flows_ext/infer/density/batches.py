"""Batches without end, and the loss on each, for the steps of `fit_density`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from ..compiled import UnsupportedForCompilation
from ..distributed import Processes
from .checks import check_finite, objective
from .compiling import CompiledObjective
from .rows import Batch, Rows, Stream
from .settings import trained


class BatchObjective:
    """Minus the mean objective of a density on one batch after the other, for a `Trainer`."""

    def __init__(self, density: Density, train: Rows, batch_size: int, processes: Processes):
        self.density, self.parameters = density, trained(density)
        self.like = self.parameters[0]
        self.processes, self.batches = processes, Batches(train, batch_size, processes)
        # Of this process's part of the batch, in an average over processes.
        self.weight = 1.0
        # Tables are checked as a whole before training.
        self.is_unchecked = isinstance(train, Stream)
        self.mean_weight = _mean_weight(train)
        self.compiled: CompiledObjective | None = None
        self.last: Batch | None = None

    def __call__(self) -> tuple[float, list[Tensor]]:
        raw = next(self.batches)
        if self.is_unchecked:
            check_finite("data", raw.values, self.like.dtype)
        batch = raw.to(self.like)
        self.weight = float(len(batch.values))
        if not self.density.training:
            self.density.train()
        self.last = batch
        values = self._values(batch)
        if batch.weights is None:
            loss = -values.mean()
        else:
            loss = -(values * batch.weights).mean() / self.mean_weight
        with self.processes.sending(self.parameters, self.weight):
            loss.backward()
        return loss.item(), self.parameters

    def _values(self, batch: Batch) -> Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(batch)
            except UnsupportedForCompilation as unsupported:
                self.compiled = None
                warnings.warn(f"fit_density goes on with eager steps: {unsupported}", stacklevel=7)
        return objective(self.density, batch)

    def compile(self) -> CompiledObjective:
        """The objective, compiled for batches like the last one. Raises `UnsupportedForCompilation` where it cannot be."""
        if self.processes.count > 1:
            raise UnsupportedForCompilation("gradients are averaged over processes")
        if self.last is None:
            raise UnsupportedForCompilation("no step has been taken yet")
        return CompiledObjective(self.density, self.last, self.parameters)


class Batches:
    """Batches without end: all rows in a new order, and again; of every batch the part of this process."""

    def __init__(self, rows: Rows, batch_size: int, processes: Processes):
        self.rows, self.batch_size, self.processes = rows, batch_size, processes
        self.num_epochs = 0
        self.began: Tensor | None = None
        self.used = 0
        self.epoch: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self.epoch is not None:
            batch = next(self.epoch, None)
            if batch is not None:
                self.used += 1
                return batch
        # The order is that of the first process in all of them.
        with self.processes.alike():
            self.began, self.used = torch.get_rng_state(), 1
            return next(self._new_epoch())

    def _new_epoch(self) -> Iterator[Batch]:
        sampler = getattr(self.rows, "sampler", None)
        if sampler is not None:
            sampler.set_epoch(self.num_epochs)
        self.num_epochs += 1
        self.epoch = self.rows.epoch(self.batch_size, self.processes.part)
        return self.epoch

    def state(self) -> list[Any]:
        """The generator's state at the start of this epoch, and how many of its batches are used."""
        return [self.began, self.used, self.num_epochs]

    def load_state(self, state: list[Any]) -> None:
        """Goes to the same place of the same epoch."""
        self.began, self.used, self.num_epochs = state
        if self.began is None:
            return
        torch.set_rng_state(self.began)
        self.num_epochs -= 1
        epoch = self._new_epoch()
        for _ in range(self.used):
            next(epoch)


def _mean_weight(rows: Rows) -> float:
    total, count = 0.0, 0
    for batch in rows.chunks(65_536):
        if batch.weights is None:
            return 1.0
        total, count = total + batch.weights.double().sum().item(), count + len(batch.weights)
    return total / count
