"""The common base of the densities: a module that is a Pyro distribution, over a fixed or learned base distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints
from typing_extensions import Self

from ..ops import broadcast_shapes, not_a_tensor
from ..transforms import ComposeFlow, FlowTransform, Standardize
from ..transforms.base import forget_param_store
from .tensors import map_tensors


class Density(TorchDistribution, nn.Module):
    """An `nn.Module` that is a `TorchDistribution`: it has parameters, and it can be sampled and scored.

    In a model, call `pyro.module("x_density", density)` at every run (or make the density an attribute of a
    `PyroModule`), then `pyro.sample("x", density, obs=x)`. A subclass defines `log_prob` and `rsample` (or `sample`)
    for its `batch_shape`, and keeps fixed distributions as plain attributes: `.to()` and `.double()` move those too.
    `expand` shares the parameters.

    Attributes:
        exact_log_prob: False if `log_prob` is a bound; `check_guide_site` refuses such a density as a guide site.
        standardization: None, or the map of `standardize` from the data's units to those of the layers.
        context_dim: length of the context that `condition` takes; 0 for none.
        can_standardize: whether log_prob and draws of the class pass through `standardization`.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True
    exact_log_prob = True
    context_dim = 0
    can_standardize = False
    standardization: Standardize | None

    def __init__(
        self,
        batch_shape: Size = Size(),  # noqa: B008
        event_shape: Size = Size(),  # noqa: B008
        validate_args: bool | None = None,
    ):
        # torch's Distribution calls super().__init__() last, which is nn.Module's: attributes come after both.
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args)
        self.register_module("standardization", None)

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Sets the units of the data in place: the layers model y = (x - loc) / scale instead of x.

            log p(x) = log p_layers((x - loc) / scale) - Σ log scale

        Draws and log-densities stay in the units of x. `loc` and `scale` are buffers in the density's dtype, saved in its
        `state_dict` and created by `load_state_dict` where the saved density has them. A second call replaces the first.

        Args:
            loc: the shape of an event, or one that broadcasts to it: `(D)`, or `(C, 1, 1)` for images.
            scale: positive, of the same shape.

        Raises:
            TypeError: the class of the density does not support it.
            ValueError: the density has bounded support, or the values do not fit.

        Example:
            >>> import pyro.distributions as dist, torch
            >>> from pyro_flows_ext.distributions import FlowDistribution
            >>> from pyro_flows_ext.transforms import planar
            >>> density = FlowDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), planar(2))
            >>> density.standardize(torch.tensor([1e6, 0.0]), torch.tensor([1e4, 1e-3]))
            >>> density.sample((3,)).shape
            torch.Size([3, 2])
        """
        if not self.can_standardize:
            raise TypeError(
                f"standardize: {type(self).__name__} does not support it; standardise the data instead"
            )
        codomain = self._layers_codomain()
        if codomain is not None and not is_real(codomain):
            raise ValueError(
                f"standardize: expected a density of all real numbers, got one with support {codomain}; "
                "leave the data in the units of its layers"
            )
        some = next(self.parameters(), torch.empty(0))
        dims = max(loc.dim(), len(self.event_shape))
        self.standardization = Standardize(loc.to(some), scale.to(some), dims)

    def _layers_codomain(self) -> Any:
        """The support of the layers' density; None if it depends on a context."""
        return self.support

    def _to_layers(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The value in the units of the layers, and the log-det."""
        dims = len(self.event_shape)
        if self.standardization is None:
            return value, value.new_zeros(value.shape[: value.dim() - dims])
        return self.standardization.forward_and_ladj(value)

    def _from_layers(self, value: Tensor) -> Tensor:
        """A value in the units of the data."""
        if self.standardization is None:
            return value
        return self.standardization.inverse_and_ladj(value)[0]

    def _with_units(self, transform: FlowTransform) -> FlowTransform:
        """The transform from the base to the data in their units, over the same parameters."""
        if self.standardization is None:
            return transform
        key = (transform, self.standardization)
        old_key, whole = self.__dict__.get("_whole", (None, None))
        if old_key is None or any(a is not b for a, b in zip(key, old_key, strict=True)):
            whole = ComposeFlow([transform, self.standardization.inv])
            # A plain attribute: as a module it would list every parameter twice.
            self.__dict__["_whole"] = (key, whole)
        whole.training = self.training  # a part of the cache's key
        return whole

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        loc = state_dict.get(f"{prefix}standardization.loc")
        if loc is not None and self.standardization is None and self.can_standardize:
            self.standardize(torch.zeros_like(loc), torch.ones_like(loc))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def condition(self, context: Tensor) -> Self:
        """The density at a context `(*, context_dim)`. Raises `ValueError` for a density that depends on none."""
        raise ValueError(
            "condition: expected a density with a context, got one without; build a transform with context_dim > 0"
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """This density with `batch_shape`, over the same parameters."""
        batch_shape = torch.Size(batch_shape)
        if not _broadcasts(self.batch_shape, batch_shape):
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

    @torch.no_grad()
    def quantiles(self, probs: Sequence[float] | Tensor, num_samples: int = 10_000) -> Tensor:
        """Quantiles of each element of the event by itself, from draws: `(len(probs), *batch_shape, *event_shape)`.

        The standard error of a median of a normal is .0125 standard deviations with the default number of draws.
        """
        draws = self.sample((num_samples,))
        probs = torch.as_tensor(probs, dtype=draws.dtype, device=draws.device)
        if probs.dim() != 1 or not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"probs: expected a list of numbers from 0 to 1, got {probs.tolist()}")
        # In columns, as torch.quantile takes no more than 16 million numbers at once.
        columns = draws.flatten(1).unbind(1) if draws.dim() > 1 else (draws,)
        found = torch.stack([torch.quantile(column, probs) for column in columns], -1)
        return found.reshape(len(probs), *draws.shape[1:])

    def objective(self, value: Tensor) -> Tensor:
        """The objective that training maximises, by default `log_prob`: `(*, *event_shape)` -> `(*)`, in nats."""
        return self.log_prob(value)

    def _validate_sample(self, value: Tensor) -> None:
        # torch's constraints cannot reshape tensors without elements, and compiled code cannot raise by their values.
        if value.numel() and not torch.compiler.is_compiling():
            super()._validate_sample(value)

    def _check_value(self, value: Tensor) -> Size:
        """The batch shape of a value to be scored. Raises `ValueError` or `TypeError` for one that does not fit."""
        if not isinstance(value, Tensor):
            raise not_a_tensor("value", value)
        event = self.event_shape
        cut = value.dim() - len(event)
        if cut < 0 or value.shape[cut:] != event:
            raise ValueError(
                f"value: expected a tensor of shape (*, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        rows = value.shape[:cut]
        if not self.batch_shape:
            return rows
        if not all(
            a == b or 1 in (a, b) for a, b in zip(rows[::-1], self.batch_shape[::-1], strict=False)
        ):
            raise ValueError(
                f"value: expected a batch shape that broadcasts against {tuple(self.batch_shape)}, got {tuple(rows)}"
            )
        return broadcast_shapes(rows, self.batch_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, value in vars(self).items():
            if isinstance(value, Distribution) and not isinstance(value, nn.Module):
                self.__dict__[name] = map_tensors(value, fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return {name: value for name, value in self.__dict__.items() if name != "_whole"}

    def __repr__(self) -> str:
        text = nn.Module.__repr__(self)
        for name in ("standardization", "context_standardization"):
            text = text.replace(f"  ({name}): None\n", "")
        return text

    def extra_repr(self) -> str:
        batch = f"batch_shape={tuple(self.batch_shape)}, " if self.batch_shape else ""
        return f"{batch}event_shape={tuple(self.event_shape)}"


def is_real(support: Any) -> bool:
    """Whether a constraint allows every real number."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _broadcasts(shape: Size, to: Size) -> bool:
    """Whether a tensor of `shape` can be expanded to the other shape."""
    pairs = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def check_guide_site(name: str, fn: Any) -> None:
    """Raises `ValueError` for a guide's site `name` whose distribution has a bound for its `log_prob`.

    A guide's log q enters an ELBO with a minus: a lower bound on it would make the ELBO too large.
    """
    while fn is not None:
        if not getattr(fn, "exact_log_prob", True):
            raise ValueError(
                f"site {name!r} of the guide: expected an exact log_prob, got a lower bound ({type(fn).__name__}), with which "
                "the ELBO is no bound; use an exact density, or for a posterior guides.AutoCIF"
            )
        fn = getattr(fn, "base_dist", None)
