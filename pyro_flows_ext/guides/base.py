"""`AutoFlow`: a flow over all latent variables of a model, as a Pyro AutoGuide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.params.param_store import param_with_module_name
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_leaves

from ..distributions._tensors import map_tensors
from ..transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    Whitening,
    iaf,
    maf,
    nsf,
    planar,
    radial,
    realnvp,
    residual,
    sylvester,
)
from ..transforms.affine import check_whitening
from ..transforms.base import forget_param_store
from .initialization import init_to_median

FlowFactory = Callable[[int], FlowTransform]

# What `AutoFlow(model, "name")` stands for.
FLOWS: dict[str, FlowFactory] = {
    "planar": partial(planar, num_transforms=16),
    "radial": partial(radial, num_transforms=16),
    "sylvester": partial(sylvester, num_transforms=4),
    "realnvp": partial(realnvp, num_transforms=8),
    "nsf": partial(nsf, num_transforms=4),
    "iaf": partial(iaf, num_transforms=2),
    "maf": partial(maf, num_transforms=2),
    "residual": partial(residual, num_transforms=4, exact_log_det=True),
}

# Draws behind `median` and `quantiles`: the 5 % quantile of a normal then has a standard error of .02 sd.
QUANTILE_DRAWS = 10_000


class GuideOptions(TypedDict, total=False):
    """Keywords that all flow guides share: see `AutoFlow`."""

    init_loc_fn: Callable[..., Any]
    init_scale: float


class AutoFlow(AutoContinuous):
    """A flow guide: latents = constrain(loc + L (m + s ⊙ flow(z))), z ~ N(0, I), exact density.

    `flow` maps the latent dimension D to a `FlowTransform`, or names one of `FLOWS`. An elementwise affine map (m, s) learns behind it, and a
    fixed one (loc, L) places the guide: at first at `init_loc_fn`'s point with scale `init_scale`, or wherever
    `whiten` puts it. Device and dtype follow the model.

    Parameters exist after `setup(*args)` or the first call. Raises `ValueError` for a discrete latent, for a local
    latent under a subsampled plate, for arguments that change the shape of a latent, and when the parameter store
    already holds another guide's parameters under this one's names.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | FlowFactory,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ):
        if not 0 < init_scale < float("inf"):
            raise ValueError(f"init_scale: expected a positive number, got {init_scale!r}")
        if isinstance(flow, str):
            if flow not in FLOWS:
                raise ValueError(f"flow: expected one of {', '.join(FLOWS)}, got {flow!r}")
            flow = FLOWS[flow]
        if not callable(flow):
            raise TypeError(
                "flow: expected a name or a callable from the latent dimension to a FlowTransform, "
                f"got {flow!r}"
            )
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._flow_factory: FlowFactory | None = flow
        self._init_scale = init_scale
        self._known_shapes: set[Any] = set()

    # --- setting up ---

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on these arguments to learn its latents, and creates the parameters."""
        self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():  # a graph in the prototype could not be copied
                self._learn_latents(*args, **kwargs)
                loc = self._init_loc()
        except Exception:
            self.prototype_trace = None  # a failed setup leaves the guide as it was: not set up
            raise
        self.prototype_trace = _slim(self._sites())
        self._known_shapes = {_shapes(args, kwargs)}
        flow = self._flow_factory(self.latent_dim) if self._flow_factory is not None else None
        if not isinstance(flow, FlowTransform):
            raise TypeError(f"flow: expected it to return a FlowTransform, got {flow!r}")
        scale_tril = self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        parts = [flow, ElementwiseAffine(self.latent_dim), Whitening(loc, scale_tril)]
        self.transform = ComposeFlow(parts).to(dtype=loc.dtype, device=loc.device)
        self._check_param_store()

    def _learn_latents(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            if self.prototype_trace is not None:
                for name, site in self._sites():
                    if site["fn"].support.is_discrete:
                        raise ValueError(
                            f"latent {name!r} is discrete ({type(site['fn']).__name__}), and a flow is continuous: "
                            "marginalise it with infer.config_enumerate and TraceEnum_ELBO, and give the guide "
                            f"poutine.block(model, hide=[{name!r}])"
                        ) from error
            raise
        for name, site in self._sites():
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"latent {name!r} is local to plate {frame.name!r}, which subsamples {frame.size} of "
                        f"{frame.full_size}: one flow over all latents would reuse the same {frame.size} values for "
                        "every mini-batch. Use the full data, or a guide amortized over the data"
                    )
            unconstrained = biject_to(site["fn"].support).inv(site["value"])
            if not bool(unconstrained.isfinite().all()):
                raise ValueError(
                    f"latent {name!r}: init_loc_fn gave a value on the boundary of its support "
                    f"({site['value']}); expected one inside"
                )

    @property
    def whitening(self) -> Whitening:
        """The fixed affine map behind the flow; `whiten` sets it."""
        self._require_setup()
        return self._modules["transform"][-1]  # type: ignore[index, return-value]

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Places the guide at N(loc, L Lᵀ) in unconstrained space, for `loc` `(D)` and `scale_tril` L `(D, D)`.

        The flow goes on in the whitened coordinates with the parameters it has; before training that is near N(0, I).
        """
        whitening = self.whitening
        check_whitening(loc, scale_tril)
        if loc.shape != whitening.loc.shape:
            raise ValueError(
                f"loc: expected shape {tuple(whitening.loc.shape)}, got {tuple(loc.shape)}"
            )
        with torch.no_grad():
            whitening.loc.copy_(loc)
            whitening.scale_tril.copy_(scale_tril.tril())

    # --- the AutoContinuous protocol ---

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I) on `(D,)`."""
        zeros = torch.zeros_like(self.whitening.loc)
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from N(0, I) to the unconstrained latents."""
        self._require_setup()
        return self.transform

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent; the same arguments as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_arguments(args, kwargs)
        if torch.is_grad_enabled():
            self._check_param_store()
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws: site -> `(num_samples, *shape)`, without gradient."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.get_posterior().sample(torch.Size([num_samples]))
        return dict(self._constrain(latent))

    def log_prob(self, samples: Mapping[str, Tensor]) -> Tensor:
        """log q(samples), exact, in constrained space: site -> `(*, *shape)` gives `(*)`.

        For values from anywhere; -inf outside the support. Raises `ValueError` when the sites or shapes do not fit.
        """
        sites = dict(self._sites())
        if sites.keys() != samples.keys():
            raise ValueError(f"samples: expected the sites {sorted(sites)}, got {sorted(samples)}")
        parts, ladjs, inside = [], [], []
        for name, site in sites.items():
            value, shape = samples[name], site["value"].shape
            cut = value.dim() - len(shape)
            if cut < 0 or value.shape[cut:] != shape:
                raise ValueError(
                    f"samples[{name!r}]: expected shape (*, {', '.join(map(str, shape))}), "
                    f"got {tuple(value.shape)}"
                )
            support = site["fn"].support
            valid = support.check(value)
            valid = valid.reshape((*value.shape[:cut], -1)).all(-1)
            inside.append(valid)
            # A value outside would make the gradient of its neighbours NaN: put one inside in its place.
            safe = torch.where(valid.reshape(valid.shape + (1,) * len(shape)), value, site["value"])
            constrain = biject_to(support)
            unconstrained = constrain.inv(safe)
            ladj = constrain.log_abs_det_jacobian(unconstrained, safe)
            ladjs.append(sum_rightmost(ladj, ladj.dim() - cut))
            parts.append(unconstrained.reshape((*value.shape[:cut], -1)))
        if len({part.shape[:-1] for part in parts}) > 1:
            raise ValueError(
                "samples: expected the same leading shape for every site, got "
                f"{ {name: tuple(value.shape) for name, value in samples.items()} }"
            )
        log_q = self.get_posterior().log_prob(torch.cat(parts, -1)) - sum(ladjs)
        return torch.where(torch.stack(inside).all(0), log_q, -torch.inf)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent, elementwise, from 10,000 draws."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, elementwise, from 10,000 draws: site -> `(len(quantiles), *shape)`."""
        samples = self.sample_posterior(QUANTILE_DRAWS, *args, **kwargs)
        return {
            name: value.quantile(torch.as_tensor(quantiles).to(value), dim=0)
            for name, value in samples.items()
        }

    def _sites(self) -> list[tuple[str, Any]]:
        """The latent sites of the prototype."""
        self._require_setup()
        return list(self.prototype_trace.iter_stochastic_nodes())  # type: ignore[union-attr]

    def _constrain(self, latent: Tensor) -> list[tuple[str, Tensor]]:
        """Splits `(N, D)` unconstrained into constrained sites `(N, *shape)`."""
        values, position = [], 0
        for name, site in self._sites():
            shape = self._unconstrained_shapes[name]
            part = latent[:, position : position + shape.numel()].reshape(-1, *shape)
            values.append((name, biject_to(site["fn"].support)(part)))
            position += shape.numel()
        return values

    # --- what could go wrong in silence ---

    def _require_setup(self) -> None:
        if self.prototype_trace is None:
            raise ValueError("the guide has no parameters yet: call guide.setup(*args) first")

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments of new shapes must leave the latents' shapes alone; the model is run once to know."""
        if not self._prototype_frames or self.model is None or torch.jit.is_tracing():
            return
        shapes = _shapes(args, kwargs)
        if shapes in self._known_shapes or not (args or kwargs):
            return
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(poutine.block(self.model, self._prototype_hide_fn)).get_trace(
                *args, **kwargs
            )
        for name, site in self._sites():
            old, new = _extent(site, site), _extent(trace.nodes[name], site)
            if old != new:
                raise ValueError(
                    f"latent {name!r} has size {new} for these arguments, but the guide was set up for {old}; "
                    "set up a new guide on these arguments"
                )
        self._known_shapes.add(shapes)

    def _check_param_store(self) -> None:
        """The store must not hold another object's parameters under our names: they would be trained, not ours."""
        if pyro.settings.get("module_local_params"):
            return
        held = dict(pyro.get_param_store().named_parameters())
        prefix = f"{self._pyro_name}.transform"
        for name, parameter in self._modules["transform"].named_parameters():  # type: ignore[union-attr]
            other = held.get(param_with_module_name(prefix, name))
            if other is not None and other is not parameter:
                raise ValueError(
                    f"the parameter store already holds {self._pyro_name!r} parameters of another guide, and would "
                    "train those in place of this one's: call pyro.clear_param_store() first, or keep them apart "
                    "with `with pyro.get_param_store().scope():`"
                )

    # --- copies ---

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own takes the model away from the original. Copies in a file go without model and flow factory,
        # which may be local functions; they have their parameters and need neither.
        forget_param_store(self)
        state = dict(self.__dict__)
        state.update(_model=(None,), master=None)
        if self.prototype_trace is not None:
            state["_flow_factory"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__.update(_model=self._model, _flow_factory=self._flow_factory)
        return new


def _slim(sites: list[tuple[str, Any]]) -> Trace:
    """A trace of these sites with their tensors detached: what a guide needs, and what a file can hold."""
    slim = Trace()
    for name, site in sites:
        node = {**site, "args": (), "kwargs": {}, "infer": {}}
        node["value"] = site["value"].detach().clone()
        node["fn"] = map_tensors(site["fn"], lambda t: t.detach().clone())
        slim.add_node(name, **node)
    return slim


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    leaves = tree_leaves((args, sorted(kwargs.items())))
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)


def _extent(site: Mapping[str, Any], prototype: Mapping[str, Any]) -> tuple[Any, ...]:
    """Event shape and plate sizes, in the plates of the prototype (others, such as particles, may be around)."""
    names = {frame.name for frame in prototype["cond_indep_stack"]}
    plates = {f.name: f.size for f in site["cond_indep_stack"] if f.name in names}
    return tuple(site["fn"].event_shape), tuple(sorted(plates.items()))
