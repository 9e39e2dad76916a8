"""Training on several processes, started by `torchrun`: what they share, average and decide together.

Every process calls `fit` or `fit_density` with the same arguments. All draw the same order of rows and take their own part of
every batch, so that the batch is that of one process; gradients are averaged, and everything that follows from them is alike.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._messages import Gradients

Result = TypeVar("Result")

# For processes that have not called yet. A process that dies is noticed at once, as its connections close.
PATIENCE = timedelta(seconds=120)


class ProcessLost(RuntimeError):
    """Another process of the run is gone."""


class Processes:
    """The processes of a run: this one alone.

    Attributes:
        rank: the number of this process.
        count: how many there are.
    """

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def start(self, module: Any, agreed: dict[str, Any]) -> None:
        """Waits for all, checks that they agree, and copies parameters, buffers and random state of the first.

        Args:
            module: what is trained.
            agreed: values by name that must be equal.
        """

    def copy(self, state: Any) -> None:
        """Copies the parameters and buffers of a module, or tensors, of the first process."""

    @contextmanager
    def alike(self) -> Iterator[None]:
        """The random numbers of the first process in all; afterwards each has its own again."""
        yield

    def spread(self) -> None:
        """Gives every process but the first random numbers of its own."""

    def part(self, num: int) -> slice:
        """This process's part of `num` rows."""
        return slice(None)

    @contextmanager
    def sending(self, params: Sequence[Tensor], weight: float) -> Iterator[None]:
        """Sends gradients as soon as one backward pass has computed them, ahead of `average` of the same arguments."""
        yield

    def average(self, value: float, params: Sequence[Tensor], weight: float) -> float:
        """Averages the gradients of `params` in place, and the value, weighted by rows; returns the value."""
        return value

    def total(self, *numbers: float) -> list[float]:
        """Sums over the processes."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in a process."""
        return flag

    def of_first(self, value: float) -> float:
        """The value in the first process."""
        return value

    def __repr__(self) -> str:
        return f"process {self.rank} of {self.count}"


class Group(Processes):
    """The default group of `torch.distributed`."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        nccl = dist.get_backend() == "nccl"
        self.device = torch.device("cuda" if nccl else "cpu")
        self.gradients = Gradients([], self._send)

    def start(self, module: Any, agreed: dict[str, Any]) -> None:
        # The only backend with this barrier, which names the process that does not call; elsewhere the next message waits.
        if dist.get_backend() == "gloo":
            self._together(lambda: dist.monitored_barrier(timeout=PATIENCE))
        found: list[Any] = [None] * self.count
        self._together(lambda: dist.all_gather_object(found, agreed))
        for name, value in agreed.items():
            values = [other.get(name) for other in found]
            if any(v != value for v in values):
                raise ValueError(
                    f"{name}: expected the same in all {self.count} processes, got {values}; every process calls with the "
                    "same arguments, and takes its own part of the rows by itself"
                )
        self.copy(module)
        _set_random_states(self._states_of_first())

    def copy(self, state: Any) -> None:
        tensors: Iterable[Tensor] = state if isinstance(state, list) else ()
        if isinstance(state, nn.Module):
            tensors = [*state.parameters(), *state.buffers()]
        with torch.no_grad():
            for tensor in tensors:
                self._copy(tensor)

    @contextmanager
    def alike(self) -> Iterator[None]:
        own = _random_states()
        _set_random_states(self._states_of_first())
        try:
            yield
        finally:
            if not self.is_first:
                _set_random_states(own)

    def spread(self) -> None:
        if not self.is_first:
            seed = int(torch.randint(2**62, ()))
            torch.manual_seed((seed + self.rank) % 2**62)

    def part(self, num: int) -> slice:
        return slice(self.rank * num // self.count, (self.rank + 1) * num // self.count)

    @contextmanager
    def sending(self, params: Sequence[Tensor], weight: float) -> Iterator[None]:
        gradients = self._gradients(params)
        gradients.begin(weight)
        hooks = [p.register_post_accumulate_grad_hook(gradients.put) for p in params]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def average(self, value: float, params: Sequence[Tensor], weight: float) -> float:
        gradients = self._gradients(params)
        gradients.send_all(weight)
        # Who has a gradient at all: a parameter without one keeps none, and its optimizer state.
        has = [float(p.grad is not None) for p in params]
        value, total, *counts = self.total(value * weight, weight, *has)
        self._together(gradients.wait)
        for p, count in zip(params, counts, strict=True):
            if count:
                p.grad = gradients.sum_of(p).div_(total)
        return value / total

    def total(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._together(lambda: dist.all_reduce(sums))
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        return self.total(float(flag))[0] > 0

    def of_first(self, value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64, device=self.device)
        self._together(lambda: dist.broadcast(number, 0))
        return number.item()

    def _gradients(self, params: Sequence[Tensor]) -> Gradients:
        """Those of the last step, where the parameters are the same."""
        if not self.gradients.are_of(params):
            self.gradients = Gradients(params, self._send)
        return self.gradients

    def _send(self, tensor: Tensor) -> Any:
        return self._together(lambda: dist.all_reduce(tensor, async_op=True))

    def _copy(self, tensor: Tensor) -> None:
        # Contiguous, as a broadcast writes over memory in its order.
        sent = tensor.detach().to(self.device).contiguous()
        self._together(lambda: dist.broadcast(sent, 0))
        if not self.is_first:
            tensor.copy_(sent)

    def _states_of_first(self) -> list[Tensor]:
        states = [state.to(self.device) for state in _random_states()]
        for state in states:
            self._together(lambda state=state: dist.broadcast(state, 0))  # type: ignore[misc]
        return [state.cpu() for state in states]

    def _together(self, operation: Callable[[], Result]) -> Result:
        try:
            return operation()
        except RuntimeError as error:
            raise ProcessLost(
                f"{self}: expected all {self.count} processes, but another one ended, raised an error of its own or did "
                "not call; its output says why, and resume=True with checkpoint= goes on from the last checkpoint, with "
                f"any number of processes ({str(error).splitlines()[0]})"
            ) from error


def _random_states() -> list[Tensor]:
    """The states of the generators of the CPU and, where there is one, of this process's GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def count_processes() -> int:
    """The number of processes of this run, without a connection to them."""
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def _end_group() -> None:
    """Ends the threads of the backend before the interpreter ends, which they would otherwise abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def find_processes() -> Processes:
    """The processes of this run: those of `torch.distributed` where it is set up, or where `torchrun` started them."""
    if count_processes() == 1:
        return Processes()
    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl"
        dist.init_process_group(both if torch.cuda.is_available() else "gloo")
        atexit.register(_end_group)
    return Group()
