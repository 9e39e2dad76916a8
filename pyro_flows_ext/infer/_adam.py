"""Adam whose construction and steps do not import torch's compiler."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` without the import of `torch._dynamo`, which takes as long as many a run of `fit`.

    The methods of torch are decorated for `torch.compile`, and the decorators import it when they are called. This class
    calls the methods themselves, as `functools.wraps` keeps them. All parameters are updated by one kernel where torch has
    one, which takes a fifth of the time of an update one by one.

    Args:
        params: tensors.
        lr: the learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float):
        params = list(params)
        super().__init__(params, lr, fused=all(p.device.type in ("cpu", "cuda") for p in params))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        inspect.unwrap(torch.optim.Adam.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""
        return dict(inspect.unwrap(torch.optim.Adam.state_dict)(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch."""
        inspect.unwrap(torch.optim.Adam.load_state_dict)(self, state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As in torch."""
        return inspect.unwrap(torch.optim.Adam.step)(self, closure)
