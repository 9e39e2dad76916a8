"""What every density here shares: a module that is a Pyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.distribution import DistributionMeta
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints
from typing_extensions import Self

from ..transforms.base import forget_param_store
from ._tensors import map_tensors


class _DensityMeta(DistributionMeta, type(nn.Module)):  # type: ignore[misc]
    """Distributions have a metaclass of their own in Pyro."""


class Density(TorchDistribution, nn.Module, metaclass=_DensityMeta):
    """An `nn.Module` that is a `TorchDistribution`: it has parameters, and it can be sampled and scored.

    In a model: `pyro.module("x_density", density)` at every call (or the density as an attribute of a `PyroModule`), then
    `pyro.sample("x", density, obs=x)`. A subclass writes `log_prob` and `rsample` (or `sample`) for its `batch_shape`, and
    keeps fixed distributions as plain attributes: `.to()` and `.double()` move those too. `expand` shares the parameters.

    `exact_log_prob` is False where `log_prob` is a bound; `check_guide_site` refuses such a one as a guide site.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True
    exact_log_prob = True

    def __init__(
        self,
        batch_shape: Size = Size(),  # noqa: B008
        event_shape: Size = Size(),  # noqa: B008
        validate_args: bool | None = None,
    ):
        # torch's Distribution calls super().__init__() last, which is nn.Module's: attributes come after both.
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """This density with `batch_shape`, over the same parameters."""
        batch_shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != batch_shape:
            raise ValueError(
                f"expand: expected a shape that {tuple(self.batch_shape)} broadcasts to, got {tuple(batch_shape)}"
            )
        return self._view(batch_shape)

    def _view(self, batch_shape: Size, **changes: Any) -> Self:
        """A shallow copy over the same parameters, with some attributes or children replaced."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            view.__dict__[name] = dict(self.__dict__[name])
        view.__dict__["_batch_shape"] = batch_shape
        for name, value in changes.items():
            if name in view._modules:
                view._modules[name] = value
            else:
                view.__dict__[name] = value
        return view

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """A draw and its log-density."""
        value = self.rsample(torch.Size(sample_shape))
        return value, self.log_prob(value)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without a gradient: `(*sample_shape, *batch_shape, *event_shape)`."""
        return self.rsample(torch.Size(sample_shape))

    def _check_value(self, value: Tensor) -> Size:
        """The batch shape of a value to be scored; `ValueError` where it does not fit the event."""
        event = self.event_shape
        cut = value.dim() - len(event)
        if cut < 0 or value.shape[cut:] != event:
            raise ValueError(
                f"value: expected a tensor of shape (*, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        return torch.broadcast_shapes(value.shape[:cut], self.batch_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, value in vars(self).items():
            if isinstance(value, Distribution) and not isinstance(value, nn.Module):
                self.__dict__[name] = map_tensors(value, fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        batch = f"batch_shape={tuple(self.batch_shape)}, " if self.batch_shape else ""
        return f"{batch}event_shape={tuple(self.event_shape)}"
