"""Gradients on their way to other processes, some megabytes a message, the first of them during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Bytes of gradients from which on a message is sent while the backward pass goes on: below, its latency is the cost.
MESSAGE_BYTES = 4 * 2**20


class Message:
    """Gradients that travel together."""

    def __init__(self, params: Sequence[Tensor]):
        self.sum = params[0].new_zeros(sum(p.numel() for p in params))
        parts = self.sum.split([p.numel() for p in params])
        self.parts = {id(p): part.view_as(p) for p, part in zip(params, parts, strict=True)}
        self.params = params
        self.arrived: set[int] = set()
        self.work: Any = None

    def put(self, param: Tensor, weight: float) -> None:
        self.arrived.add(id(param))
        part = self.parts[id(param)]
        if param.grad is None:
            part.zero_()
        else:
            torch.mul(param.grad, weight, out=part)

    @property
    def is_complete(self) -> bool:
        return len(self.arrived) == len(self.params)


class Gradients:
    """Weighted sums of gradients over processes, in messages that all processes start in the same order.

    Parameters go in reverse, as a backward pass reaches the last ones first. A message starts when it is complete and all
    before it have started.
    """

    def __init__(self, params: Sequence[Tensor], send: Callable[[Tensor], Any]):
        self.params, self.send = list(params), send
        self.messages = [Message(run) for run in _runs(self.params[::-1])]
        self.message_of = {id(p): m for m in self.messages for p in m.params}
        self.num_started, self.weight, self.has_begun = 0, 1.0, False

    def are_of(self, params: Sequence[Tensor]) -> bool:
        return [id(p) for p in params] == [id(p) for p in self.params]

    def begin(self, weight: float) -> None:
        self.num_started, self.weight, self.has_begun = 0, weight, True
        for message in self.messages:
            message.arrived.clear()

    @torch.no_grad()
    def put(self, param: Tensor) -> None:
        """Takes the gradient of a parameter, which is final, and starts the messages that are ready."""
        message = self.message_of[id(param)]
        if id(param) in message.arrived:
            raise RuntimeError(
                "expected one backward pass a step, got a second gradient of a parameter whose first may have been sent"
            )
        message.put(param, self.weight)
        while self.num_started < len(self.messages):
            message = self.messages[self.num_started]
            if not message.is_complete:
                break
            message.work = self.send(message.sum)
            self.num_started += 1

    def send_all(self, weight: float) -> None:
        """Starts what has not been: all, without a backward pass under `sending`."""
        if not self.has_begun:
            self.begin(weight)
        for message in self.messages[self.num_started :]:
            for p in message.params:
                if id(p) not in message.arrived:
                    self.put(p)
        self.has_begun = False

    def wait(self) -> None:
        for message in self.messages:
            message.work.wait()
            message.work = None  # which keeps threads of the backend alive

    def sum_of(self, param: Tensor) -> Tensor:
        return self.message_of[id(param)].parts[id(param)]


def _runs(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, some megabytes together."""
    run: list[Tensor] = []
    size = 0
    for p in params:
        is_other = bool(run) and (p.dtype, p.device) != (run[0].dtype, run[0].device)
        if run and (is_other or size >= MESSAGE_BYTES):
            yield run
            run, size = [], 0
        run.append(p)
        size += p.numel() * p.element_size()
    if run:
        yield run
