"""Importance-weighted bounds, with weights by datum where the guide allows it, and low-variance gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from ...programs import Program, draw_subsample, traces_of, vectorization_error
from .path_gradients import CutMessenger, has_parameters, through_draws
from .weights import Weights, check_reparameterized, importance_weights

GRADIENTS = ("iwae", "stl", "dreg")


class ImportanceWeightedELBO(ELBO):
    """Lower bound: Σ_n s_n E log 1/K Σ_k w_nk, w_nk = p(x_n, z_nk) / q(z_nk), K = `num_particles`; nats.

    K = 1 is the ELBO; the bound grows with K towards log p(x). It is averaged over `num_bounds` B of them, B K draws in all:
    less noise, the same bound. The data n are those of the plates that every latent of
    model and guide lies in, auxiliary ones included: each has weights of its own, and what scales it (a subsampled plate,
    `poutine.scale`) stays outside the logarithm as s_n. Where the latents have no plate in common there is one weight for
    everything. What lies outside of those plates and depends on no draw is added. Plates are taken at their word: what is
    inside depends on other data through nothing but what is outside. Particles share one subsample.

    `gradient`, with w̃ = w / Σ w: "iwae", Σ w̃ ∇ log w; for the guide's parameters also "stl", Σ w̃ ∇ log w through the draws
    alone, and "dreg", Σ w̃² ∇ log w through the draws alone. Those two have no variance left where q is the posterior, and
    little near it, where the signal of "iwae" drowns in noise as K grows; far from it they can be the noisier ones.
    "dreg" is unbiased; "stl" is biased for K > 1, and warns. Both leave the gradient of the model's parameters, and of
    those in factors and `Delta` sites of the guide (the reverse model of a continuously indexed flow), as it is. They
    take log q at the draws once more, a flow's by its inverse: but for flows that draw fast and invert slowly (up to 64
    dimensions), see `path_gradients`.

    `vectorize_particles` runs all particles at once, in a plate left of all others; for a model that cannot, False runs one
    after the other. Unless `max_plate_nesting` is given, the first call runs model and guide to find it, and to see
    whether a batch of particles gives the same log joint as one at a time.

    Raises `ValueError` for a latent that is discrete or has no reparameterised draws; for K > 1 where scales differ within
    a logarithm, as for a global latent beside a subsampled plate, where no part of the data gives a bound for all of it;
    and for a model that does not vectorise.

    Source: Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders; Roeder, Wu & Duvenaud 2017, Sticking the
    Landing; Tucker, Lawson, Gu & Maddison 2019, Doubly Reparameterized Gradient Estimators.
    """

    def __init__(
        self,
        num_particles: int = 1,
        gradient: str = "iwae",
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        num_bounds: int = 1,
    ):
        for name, value in (("num_particles", num_particles), ("num_bounds", num_bounds)):
            if int(value) != value or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {', '.join(GRADIENTS)}; got {gradient!r}")
        if gradient == "stl" and num_particles > 1:
            warnings.warn(
                'gradient="stl" is biased for num_particles > 1: it leaves out a part of the gradient whose mean is zero '
                'for one particle only. Use "dreg", which is unbiased, or one particle',
                stacklevel=2,
            )
        self.num_bounds = int(num_bounds)
        super().__init__(
            num_particles=self.num_bounds * int(num_particles),  # Pyro's word for all draws
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.gradient = gradient

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, from one draw of K particles, without a gradient."""
        traces = [(m, g) for m, g, _ in self._particles(model, guide, args, kwargs, paths=False)]
        loss = -torch_item(self._weights(traces).bound)
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound as a tensor, whose gradient is the one that `gradient` names."""
        bound, surrogate = self._estimate(model, guide, args, kwargs)
        warn_if_nan(bound, "loss")
        return -bound.detach() - (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; adds its gradient to the `.grad` of the parameters."""
        bound, surrogate = self._estimate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            (-surrogate).backward()
        loss = -torch_item(bound)
        warn_if_nan(loss, "loss")
        return loss

    def _estimate(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The bound, and what to differentiate in its place."""
        paths = self.gradient != "iwae" and torch.is_grad_enabled()
        if paths and isinstance(poutine.unwrap(guide), Messenger):
            raise ValueError(
                f"gradient={self.gradient!r}: expected a guide that runs by itself, got the messenger "
                f'{type(poutine.unwrap(guide)).__name__}; use gradient="iwae"'
            )
        traces: list[tuple[Trace, Trace]] = []
        lives: list[Tensor] = []
        cuts: list[Tensor] = []
        for model_trace, guide_trace, cut in self._particles(model, guide, args, kwargs, paths):
            traces.append((model_trace, guide_trace))
            lives += cut.live.values()
            cuts += cut.cuts.values()
        weights = self._weights(traces, cut.cuts if paths else ())
        if not paths:
            return weights.bound, weights.bound
        power = 2 if self.gradient == "dreg" else 1
        signals = through_draws(weights.through_draws(power), lives, cuts)
        surrogate = weights.bound.new_zeros(())
        for live, signal in zip(lives, signals, strict=True):
            surrogate = surrogate + (live * signal).sum()
        rest = weights.around_draws()
        if has_parameters(rest, cuts):
            surrogate = surrogate + rest
        return weights.bound, surrogate

    def _weights(self, traces: list[tuple[Trace, Trace]], cut: Collection[str] = ()) -> Weights:
        vectorized = self.vectorize_particles and self.num_particles > 1
        return importance_weights(
            traces,
            cut,
            self.num_bounds,
            self.num_particles // self.num_bounds,
            int(self.max_plate_nesting) if vectorized else None,
        )

    def _particles(
        self, model: Program, guide: Program, args: Any, kwargs: Any, paths: bool
    ) -> Iterator[tuple[Trace, Trace, CutMessenger]]:
        """Traces of model and guide, of all particles at once or one after the other."""
        repeats = self.num_particles
        if self.vectorize_particles and self.num_particles > 1:
            if math.isinf(self.max_plate_nesting):
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            model, guide = map(self._vectorized_num_particles, (model, guide))
            repeats = 1
        with _SharedSubsample():
            for _ in range(repeats):
                cut = CutMessenger()
                program = cut(guide) if paths else guide
                yield *self._get_trace(model, program, args, kwargs), cut

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        messenger = poutine.unwrap(guide)
        if isinstance(messenger, GuideMessenger):
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        check_reparameterized(model_trace, guide_trace)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        traces = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        for trace in traces:
            trace.compute_log_prob()
            if is_validation_enabled():
                for site in trace.nodes.values():
                    if site["type"] == "sample":
                        check_site_shape(site, self.max_plate_nesting)
        return traces

    def _guess_max_plate_nesting(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> None:
        super()._guess_max_plate_nesting(model, guide, args, kwargs)
        if isinstance(poutine.unwrap(guide), Messenger):
            return
        with torch.random.fork_rng(devices=[]):
            check_reparameterized(*traces_of(model, guide, args, kwargs))
        reason = vectorization_error(model, guide, args, kwargs)
        if reason is not None:
            raise ValueError(
                f"particles cannot run at once: {reason}. Or pass vectorize_particles=False; or, where the model draws "
                "noise that is no sample site, max_plate_nesting, which leaves out this check"
            )


class _SharedSubsample(Messenger):
    """Gives every run within it the subsamples of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            name = msg["name"]
            if name not in self.values:
                self.values[name] = draw_subsample(msg["fn"])
            msg["value"] = self.values[name]
