"""`AutoAmortizedFlow`: a flow over the local latents of each datum, whose parameters a network computes from the datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from ..ops import quantiles as elementwise_quantiles
from ..programs import JacobianDelta, constrain, tensors_of, unconstrain
from ..transforms import ElementwiseAffine
from ._local import (
    DataPlate,
    LocalLatent,
    check_same,
    find_plate,
    indices_are_given,
    read_latents,
)
from ._local_flow import ConditionalFactory, local_flow
from ._setup import PortableGuide, argument_shapes, check_init_scale, init_to_median, slim
from .base import QUANTILE_DRAWS

# Numbers drawn at a time for quantiles.
CHUNK = 10_000_000


class AutoAmortizedFlow(PortableGuide):
    """A guide for the latents of each datum: z_n = constrain(m(h_n) + s(h_n) ⊙ flow(ε; h_n)), h_n = encoder(x_n), ε ~ N(0, I).

    All latents of a datum have one joint density, exact except for "cif": a continuously indexed flow as in `AutoCIF`, of
    "nsf-ar" steps and one index a layer, for posteriors with modes, edges and holes. Its site `_{name}_latent` holds latents
    and indices u_n, and the log-density of its factor `_{name}_r` is -log r(u_n | z_n, h_n): every ELBO is a bound,

        ELBO_n = E_q(z,u | h) [log p(x_n, z) + log r(u | z, h_n) - log q(z, u | h_n)]  <=  log p(x_n).

    A datum has the same posterior in full data, a `subsample_size`, a `subsample` by argument, and mini-batches as arguments.
    The model runs up to its first latent at each call, to read its plate. `poutine.scale` and `poutine.mask` around the
    latents apply in the guide too. Global latents: hide them by `poutine.block`, and join a guide for them by
    `AutoGuideList`. A list keeps its first plates: for mini-batches of several sizes, or a `subsample` by argument,
    construct it by `AutoGuideList(model, create_plates=guide.data_plate)`.

    Args:
        model: a Pyro model whose latents all lie in one plate.
        encoder: a module `(N, *) -> (N, H)` that treats rows alone. Device and dtype of the guide follow its output.
        flow: "planar", "sylvester" (parameters linear in h), "iaf", "realnvp" or "cif" (networks with h as an input); a
            callable from (D, H) to a transform with `context_dim` H; None for a Gaussian.
        num_layers, hidden_dims: depth and widths of the networks of a flow by name.
        encoder_inputs: from the model's arguments to the rows x_n, of all data or of those taken. By default the first tensor
            argument with as many rows; later calls have to pass it in the same way.
        plate: name of the plate of data; needed if the latents have several in common.
        init_loc_fn, init_scale: initial location (the mean over the data) and scale, the same for every datum.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: at setup or a call, for latents that are discrete, global or in different plates; a support that differs
            between data or changes from run to run; rows of neither size; another guide's parameters in the parameter store.

    References:
        Rezende & Mohamed 2015, Variational Inference with Normalizing Flows; van den Berg et al. 2018, Sylvester Normalizing
        Flows for Variational Inference; "cif": Caterini et al. 2021, Variational Inference with Continuously-Indexed Flows.
    """

    _until_set_up = ("_flow_factory", "_init_loc_fn")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        *,
        flow: str | ConditionalFactory | None = "planar",
        num_layers: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        encoder_inputs: Callable[..., Tensor] | None = None,
        plate: str | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ):
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {encoder!r}")
        if encoder_inputs is not None and not callable(encoder_inputs):
            raise TypeError(
                f"encoder_inputs: expected a function of the model's arguments, got {encoder_inputs!r}"
            )
        super().__init__(model)
        self._local_flow, self._flow_factory = local_flow(flow, num_layers, hidden_dims)
        self.exact_log_prob = self._local_flow.exact_log_prob
        self._encoder_inputs, self._plate_name = encoder_inputs, plate
        self._init_loc_fn, self._init_scale = init_loc_fn, check_init_scale(init_scale)
        self._given: dict[Any, bool] = {}
        self._key: int | str = 0
        self.encoder = encoder

    # --- setting up ---

    @torch.no_grad()  # a graph in the prototype could not be copied
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.prototype_trace = None  # a failed setup leaves the guide not set up
        trace = self._run_model(args, kwargs)
        if self.master is not None:
            self.master()._check_prototype(trace)
        name, self._latents, loc = read_latents(trace, self._plate_name)
        check_same(self._latents, read_latents(self._run_model(args, kwargs), name)[1])
        self._given = {argument_shapes(args, kwargs): self._is_given(name, args, kwargs)}
        self._plate = self._read_plate(name, args, kwargs)
        if self._encoder_inputs is None:
            self._key = self._plate.argument_with_rows(args, kwargs)
        some = torch.arange(self._plate.size)
        rows = self._plate.rows_of(self._select(args, kwargs), some)
        features = self._features(rows)
        loc, self.latent_dim = loc.to(features), len(loc)
        make = self._flow_factory
        flow = None if make is None else make(len(loc), features.shape[-1])
        affine = ElementwiseAffine(len(loc), context_dim=features.shape[-1], hidden_dims=())
        affine.loc.copy_(loc)
        affine.log_scale.fill_(math.log(self._init_scale))
        self.transform = self._local_flow.place(flow, affine).to(loc)
        self._posterior(rows).sample()  # a flow of another dimension raises here
        self.prototype_trace = slim(list(trace.iter_stochastic_nodes()))
        self._check_param_store()

    def _run_model(self, args: Any, kwargs: Any) -> Trace:
        model = InitMessenger(self._init_loc_fn)(self.model)
        with poutine.block():
            return poutine.trace(poutine.block(model, prototype_hide_fn)).get_trace(*args, **kwargs)

    # --- which data ---

    def data_plate(self, *args: Any, **kwargs: Any) -> pyro.plate:
        """The plate of the data that the model takes for these arguments: `AutoGuideList(model, create_plates=...)`."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self._find_plate(args, kwargs).open()

    def _find_plate(self, args: Any, kwargs: Any) -> DataPlate:
        """The data plate for these arguments; where their shapes are new, the latents must be those of the setup."""
        known = self._plate
        if self.model is None or torch.jit.is_tracing():
            return self._plate_without_model(args, kwargs)
        shapes = argument_shapes(args, kwargs)
        # Bounds that are tensors may depend on the values of arguments of the same shapes.
        if shapes not in self._given or any(tensors_of(x.support) for x in self._latents):
            with torch.no_grad():
                trace = self._run_model(args, kwargs)
                # Sites observed at setup are latent without data, as under Predictive.
                for name in {*trace.nodes} - {latent.name for latent in self._latents}:
                    trace.remove_node(name)
                latents = read_latents(trace, known.name)[1]
            check_same(self._latents, latents)
            if shapes not in self._given:
                self._given[shapes] = self._is_given(known.name, args, kwargs)
        return self._read_plate(known.name, args, kwargs)

    def _plate_without_model(self, args: Any, kwargs: Any) -> DataPlate:
        """The plate as it was, for a guide from a file, or one that is compiled."""
        known = self._plate
        if any(self._given.values()):
            raise ValueError(
                f"plate {known.name!r}: expected the model, which computes from the arguments which data the plate takes; a "
                "pickled or compiled guide is without one. Use sample_posterior and log_prob, or a guide with its model"
            )
        if known.size < known.full_size:
            return known
        size = len(self._select(args, kwargs))
        return replace(known, size=size, full_size=size)

    def _is_given(self, name: str, args: Any, kwargs: Any) -> bool:
        return indices_are_given(self.model, self._latents[0], name, args, kwargs)

    def _read_plate(self, name: str, args: Any, kwargs: Any) -> DataPlate:
        given = self._given[argument_shapes(args, kwargs)]
        return find_plate(self.model, self._latents[0], name, args, kwargs, given=given)

    def _select(self, args: Any, kwargs: Any) -> Tensor:
        """The tensor of rows among the arguments, indexed or not."""
        if self._encoder_inputs is not None:
            name = "encoder_inputs"
            value: object = self._encoder_inputs(*args, **kwargs)
        else:
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            name, value = f"argument {self._key!r}", arguments.get(self._key)
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(
                f"{name}: expected a tensor of rows to encode, as when the guide was set up, got {value!r}"
            )
        return value

    # --- the posterior of a datum ---

    def _features(self, rows: Tensor) -> Tensor:
        features = self.encoder(rows)
        if not isinstance(features, Tensor) or features.shape[:-1] != rows.shape[:1]:
            got = tuple(features.shape) if isinstance(features, Tensor) else features
            raise ValueError(
                f"encoder: expected an output of shape ({len(rows)}, H), features by row, got {got}"
            )
        return features

    def _posterior(self, rows: Tensor, dim: int = -1) -> dist.TransformedDistribution:
        """The joint density of the unconstrained latents by row, with the rows at dimension `dim` of its batch shape.

        For "cif", the density of the latents followed by their indices.
        """
        features = self._features(rows)
        context = features.reshape(len(rows), *(1,) * (-dim - 1), -1)
        size = self._local_flow.noise_dim(self.transform, self.latent_dim)
        zeros = context.new_zeros(*context.shape[:-1], size)
        base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        return dist.TransformedDistribution(base, self.transform.condition(context))

    def _latents_of(self, vector: Tensor) -> Iterator[tuple[LocalLatent, JacobianDelta]]:
        """The latents, constrained, in draws of the posterior."""
        return constrain(vector[..., : self.latent_dim], self._latents)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples the latents of the data that the model takes; the same arguments as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plate = self._find_plate(args, kwargs)
        if torch.is_grad_enabled():
            self._check_param_store()
        plates = self._open_plates(plate)
        index = torch.as_tensor(plates[plate.name].indices)
        rows = plate.rows_of(self._select(args, kwargs), index)
        posterior = self._posterior(rows, plate.dim)
        result = {}
        with plate.handlers(), plates[plate.name]:
            name = f"_{self._pyro_name}_latent"
            vector = pyro.sample(name, posterior, infer={"is_auxiliary": True})
            self._local_flow.weigh(f"_{self._pyro_name}_r", posterior, vector)
            # The dimensions on the right of the plate, all 1, go: a latent's own plates are in its shape.
            vector = vector.reshape(*vector.shape[: plate.dim], -1)
            for latent, image in self._latents_of(vector):
                with ExitStack() as stack:
                    for inner, _, _ in latent.inner:
                        stack.enter_context(plates[inner])
                    result[latent.name] = pyro.sample(latent.name, image)
        return result

    def _open_plates(self, plate: DataPlate) -> dict[str, pyro.plate]:
        if self.master is None:
            inner = {p for latent in self._latents for p in latent.inner}
            plates = {name: pyro.plate(name, size, dim=dim) for name, size, dim in sorted(inner)}
            return {**plates, plate.name: plate.open()}
        plates = self.master().plates
        if not plate.is_like(plates[plate.name]):
            raise ValueError(
                f"plate {plate.name!r} has other data in the model than in the AutoGuideList, which keeps the plates of its first "
                "call: construct it by AutoGuideList(model, create_plates=guide.data_plate), with this guide"
            )
        return plates

    # --- draws and densities ---

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws for every row of the arguments, any number of them: site -> `(num_samples, N, *shape)`.

        The model does not run, and its plate does not count: the rows may be new data, more or fewer than before.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        vector = self._posterior(self._select(args, kwargs)).sample(torch.Size([num_samples]))
        return {latent.name: image.v for latent, image in self._latents_of(vector)}

    def log_prob(self, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q(z_n | x_n), exact, in constrained space, for every row x_n, in nats.

        Args:
            samples: site -> `(*, N, *shape)`, any values.
            args, kwargs: the model's arguments, with N rows to encode.

        Returns:
            `(*, N)`; -inf outside the support.

        Raises:
            ValueError: if sites, shapes or rows do not fit.
            TypeError: for flow="cif", whose log q is intractable.
        """
        posterior, vector, ladj, inside = self._at(samples, args, kwargs)
        log_q = self._local_flow.log_prob(posterior, vector)
        return torch.where(inside, log_q - ladj, -torch.inf)

    def log_prob_bound(
        self, samples: Mapping[str, Tensor], *args: Any, num_particles: int = 100, **kwargs: Any
    ) -> Tensor:
        """Lower bound: log 1/K Σ_k q(z_n, u_k | x_n) / r(u_k | z_n, x_n), u_k ~ r, on log q(z_n | x_n), for flow="cif".

        Shapes and errors as in `log_prob`; K = `num_particles`. Random: its mean rises to log q with K, its exponential is
        unbiased for q. Not for importance weights, which would come out too large. For any other flow, log q itself.
        """
        posterior, vector, ladj, inside = self._at(samples, args, kwargs)
        bound = self._local_flow.log_prob_bound(posterior, vector, num_particles)
        return torch.where(inside, bound - ladj, -torch.inf)

    def _at(
        self, samples: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> tuple[dist.TransformedDistribution, Tensor, Tensor, Tensor]:
        """The posterior of every row, and what `unconstrain` makes of the samples."""
        self._require_setup()
        vector, ladj, inside = unconstrain(samples, self._latents)
        rows = self._select(args, kwargs)
        if ladj.shape[-1:] != rows.shape[:1]:
            raise ValueError(
                f"samples: expected values of shape (*, {len(rows)}, *), one for each row to encode, got the leading shape "
                f"{tuple(ladj.shape)}"
            )
        return self._posterior(rows), vector, ladj, inside

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, elementwise, from 10,000 draws: site -> `(len(quantiles), N, *shape)`."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        size = max(1, CHUNK // (QUANTILE_DRAWS * self.latent_dim))
        parts = []
        for rows in self._select(args, kwargs).split(size):
            vector = self._posterior(rows).sample((QUANTILE_DRAWS,))
            parts.append(
                {
                    latent.name: elementwise_quantiles(image.v, quantiles)
                    for latent, image in self._latents_of(vector)
                }
            )
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
