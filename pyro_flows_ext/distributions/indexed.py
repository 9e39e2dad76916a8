"""`ContinuouslyIndexedFlow`: a density of many flows with latent indices (Cornish et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from typing_extensions import Self

from ..ops import broadcast_shapes, check_context_dim, check_event, check_positive
from ..transforms import FlowTransform
from ._bound import BoundedDensity
from .indexed_layer import Index, IndexedLayer
from .normal import affine_by, log_standard_normal
from .transformed import TransformedDensity, log_prob_anywhere


class ContinuouslyIndexedFlow(BoundedDensity, TransformedDensity):
    """z_0 ~ base, u_l ~ p_l(u | z_{l-1}), z_l = F_l(z_{l-1}; u_l) for l = 1 ... L, x = z_L: vectors `(*, D)` or images.

    F(z; u) = f(exp(s(u)) ⊙ z + t(u)) around any transform f (`transforms.IndexedTransform`). A map for every u makes
    holes, edges and separate parts that no single continuous map of a Gaussian has. Draws are exact. The log-density
    log p(x) = log ∫ p(x, u) du is intractable; inference densities q_l(u | z_l), trained along, give the bound

        log p(x) >= E_q [log p(x, u) - log q(u | x)],    q(u | x) = q_L(u_L | x) q_{L-1}(u_{L-1} | z_{L-1}) ...

    with equality if q(u | x) is p(u | x). `log_prob` is one draw of it, `log_prob_bound` its form with many particles.
    Training on `log_prob` (`pyro.sample("x", flow, obs=x)`) maximises the ELBO. For the importance-weighted bound, with
    the indices as latents of a datum, call `flow.model("x", x)` in the model's plate and `flow.guide("x", x)` in the
    guide's.

    p_l and q_l are diagonal normals; q_l takes f_l⁻¹(z_l), in which u_l is a shift and a scale. s and t start at zero
    and p_l equal to q_l: the initial density is that of the plain flow, and the bound is tight.
    Cost: `rsample` a forward pass, `log_prob` an inverse one, `log_prob_bound` K of them.

    Args:
        base: as in `FlowDistribution`.
        transforms: one `FlowTransform` for one layer, or one a layer, as the parts of a preset (`maf(2,
            num_layers=5)`).
        index_dim: length of u_l, or its number of channels.
        hidden_dims, index_hidden_dims: widths of the networks of s and t, and of p_l and q_l. For images these are
            `nn.ResidualConvNet`s with a block for each width, all equal.
        index_image: whether u_l of an image is an image of the size of z_{l-1}; a vector otherwise.
        context_dim: length of the context of `condition`, which all networks read.

    Raises:
        TypeError: for a base or a transform of another kind.
        ValueError: for a base with parameters that would not train, and for events that are neither vectors nor images.

    References:
        Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
        Normalising Flows.
    """

    can_standardize = True
    layers: Any

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: FlowTransform | Iterable[FlowTransform],
        index_dim: int = 1,
        hidden_dims: Sequence[int] = (10, 10),
        index_hidden_dims: Sequence[int] = (50, 50),
        *,
        index_image: bool = True,
        context_dim: int = 0,
        validate_args: bool | None = None,
    ):
        parts = list(transforms) if isinstance(transforms, Iterable) else [transforms]
        if not parts:
            raise ValueError("transforms: expected at least one FlowTransform, got none")
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise TypeError(f"transforms: expected FlowTransforms, got a {type(part).__name__}")
        super().__init__(base, validate_args)
        self._base_event_dim = parts[0].domain.event_dim
        shaped = self._base_dist(self._base_event_dim)
        shape = shaped.event_shape
        if len(shape) != self._base_event_dim or len(shape) not in (1, 3):
            raise ValueError(
                f"base: expected draws that are {'images (*, C, H, W)' if self._base_event_dim == 3 else 'vectors (*, D)'}, "
                f"got events of shape {tuple(shape)}"
            )
        self.context_dim = check_context_dim(context_dim)
        size = check_positive("index_dim", index_dim)
        layers = []
        for part in parts:
            index_shape = (size, *shape[1:]) if index_image else (size,)
            layers.append(
                IndexedLayer(
                    part,
                    tuple(shape),
                    index_shape,
                    tuple(hidden_dims),
                    tuple(index_hidden_dims),
                    context_dim,
                    informative=True,
                )
            )
            shape = part.forward_shape(shape)
        self._batch_shape, self._event_shape = shaped.batch_shape, shape
        self.layers = nn.ModuleList(layers)

    @property
    def index_dim(self) -> int:
        """The length of each index, or its number of channels."""
        return self._index_shapes[0][0]

    def condition(self, context: Tensor) -> Self:
        """The density at this context, `(*, C)`: its batch shape is `(*)`, broadcast against the base's."""
        if not self.context_dim:
            return super().condition(context)
        check_event("context", context, self.context_dim)
        context = self._context_to_layers(context)
        batch = broadcast_shapes(self.batch_shape, context.shape[:-1])
        return self._view(batch, context=context, context_dim=0)

    # --- the distribution ---

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws `(*sample_shape, *batch_shape, D)`, with a gradient where the base has one."""
        return self._push(self._base_at_batch().rsample(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws without a gradient: `(*sample_shape, *batch_shape, D)`."""
        return self._push(self._base_at_batch().sample(torch.Size(sample_shape)))

    @property
    def support(self) -> Any:
        return self.layers[-1].indexed.transform.codomain

    # --- the indices as latents of a Pyro program ---

    def model(self, name: str, obs: Tensor | None = None) -> Tensor:
        """Samples x at site `name`, and with `obs` the indices u_l at sites `{name}_u{l}`: log p(obs, u) in all.

        The normaliser of p(u | obs) is unknown. The indices are therefore N(0, I) here, and the site `name` has the
        rest, log p(obs, u) - Σ log N(u_l): the joint density is right with any guide. Without `obs`, a plain draw of x.
        """
        if obs is None:
            return pyro.sample(name, self)
        batch = self._check_value(obs)
        indices = []
        for l, shape in enumerate(self._index_shapes, 1):
            zeros = obs.new_zeros(batch + shape)
            prior = dist.Normal(zeros, torch.ones_like(zeros)).to_event(len(shape))
            indices.append(pyro.sample(f"{name}_u{l}", prior))
        return pyro.sample(name, _GivenIndices(self, indices), obs=obs)

    def guide(self, name: str, obs: Tensor) -> None:
        """Samples the indices of `model(name, obs)` from q(u | obs)."""
        batch = self._check_value(obs)

        def draw(l: int, dims: int) -> Index:
            def from_site(params: Tensor) -> Tensor:
                zeros = torch.zeros_like(params.chunk(2, -dims)[0])
                loc, log_scale = affine_by(zeros, params, inverse=False, event_dim=dims)
                q = dist.Normal(loc, log_scale.exp()).to_event(dims)
                return pyro.sample(f"{name}_u{l}", q)

            return from_site

        indices = [draw(l, len(shape)) for l, shape in enumerate(self._index_shapes, 1)]
        self._pull(obs.expand(batch + self.event_shape), indices)

    # --- passes ---

    @property
    def _index_shapes(self) -> list[Size]:
        return [layer.index_shape for layer in self.layers]

    def _base_at_batch(self) -> Any:
        return self._base_dist(self._base_event_dim).expand(self.batch_shape)

    def _push(self, z: Tensor) -> Tensor:
        context = self._given_context()
        for layer in self.layers:
            event_dim: int = layer.indexed.transform.domain.event_dim
            batch = z.shape[: z.dim() - event_dim]
            noise = torch.randn_like(z.new_zeros(batch + layer.index_shape))
            z, _, _ = layer.push(z, noise, context)
        return self._from_layers(z)

    def _pull(self, value: Tensor, indices: Sequence[Index]) -> tuple[Tensor, Tensor]:
        """log p(value, u) and log q(u | value), `(*)` each, for `indices` u_1 ... u_L."""
        context = self._given_context()
        z, scaling = self._to_layers(value)
        log_p, log_q = [], []
        for layer, index in zip(list(self.layers)[::-1], indices[::-1], strict=True):
            z, noise, (ladj, log_r) = layer.pull(z, index, context)
            log_p.append(ladj + log_standard_normal(noise, len(layer.index_shape)))
            log_q.append(log_r)
        log_base = log_prob_anywhere(self._base_dist(self._base_event_dim), z)
        return log_base + scaling + torch.stack(log_p).sum(0), torch.stack(log_q).sum(0)

    def _given_context(self) -> Tensor | None:
        if self.context_dim:
            raise ValueError(
                "this density depends on a context: call condition(context) first, with one of shape "
                f"(*, {self.context_dim})"
            )
        return self.context

    def _log_weights(self, value: Tensor) -> Tensor:
        log_p, log_q = self._pull(value, [None for _ in self.layers])
        return log_p - log_q


class _GivenIndices(TorchDistribution):
    """x beside its indices: `log_prob` is log p(x, u) - log N(u; 0, I), so that with u ~ N(0, I) the two are p(x, u)."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, flow: ContinuouslyIndexedFlow, indices: Sequence[Tensor]):
        self.flow, self.indices = flow, indices
        batch = broadcast_shapes(*(self._batch_of(u) for u in indices))
        super().__init__(batch, flow.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.flow.support

    def _batch_of(self, index: Tensor) -> Size:
        return index.shape[: index.dim() - self._index_dims]

    @property
    def _index_dims(self) -> int:
        return len(self.flow._index_shapes[0])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        return type(self)(self.flow, self._expanded(Size(batch_shape)))

    def _expanded(self, batch: Size) -> list[Tensor]:
        return [u.expand(batch + u.shape[u.dim() - self._index_dims :]) for u in self.indices]

    def log_prob(self, value: Tensor) -> Tensor:
        cut = value.dim() - len(self.event_shape)
        batch: Size = broadcast_shapes(value.shape[:cut], self.batch_shape)
        indices = self._expanded(batch)
        log_p, _ = self.flow._pull(value.expand(batch + self.event_shape), indices)
        dims = self._index_dims
        return log_p - torch.stack([log_standard_normal(u, dims) for u in indices]).sum(0)
