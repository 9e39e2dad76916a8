"""`AutoFlow`: a flow over all latent variables of a model, as a Pyro AutoGuide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypedDict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..ops import quantiles as elementwise_quantiles
from ..programs import (
    Following,
    JacobianDelta,
    Latent,
    check_inside,
    check_log_prob,
    completed_latents,
    constrain,
    is_maskable,
    is_masked,
    leading_shape,
    needs_run,
    read_latent,
    tensors_of,
    unconstrain,
)
from ..transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    SinhArcsinh,
    Whitening,
)
from ..transforms.affine import check_whitening
from ..transforms.presets import PRESETS
from ._forecast import training_arguments
from ._module import PortableGuide
from ._neutra import called_by_neutra, for_neutra
from ._plates import PlateReader, check_plates
from ._prototype import argument_shapes, extent, same_objects, slim
from .initialization import init_to_median

FlowFactory = Callable[[int], FlowTransform]


# What `AutoFlow(model, "name")` stands for.
FLOWS: dict[str, FlowFactory] = {
    name: partial(preset.make, num_layers=preset.guide_layers, **preset.guide_options)
    for name, preset in PRESETS.items()
}

# Draws behind `median` and `quantiles`: the 5 % quantile of a normal then has a standard error of .02 sd.
QUANTILE_DRAWS = 10_000


# A normal base leaves a flow thinner tails than most posteriors have; there the importance weights grow without bound, and
# k-hat says so even where all draws but a few count alike. Student's t with this many degrees of freedom is nearly normal (.001
# nats a coordinate) and bounds them.
BASE_DF = 30.0


class GuideOptions(TypedDict, total=False):
    """Keywords that all flow guides share: see `AutoFlow`."""

    init_loc_fn: Callable[..., Any]
    init_scale: float


class FlowOptions(GuideOptions, total=False):
    """Keywords of the guides with an exact density: see `AutoFlow`."""

    base_df: float


class AutoFlow(PortableGuide, AutoContinuous):
    """A flow guide: latents = constrain(loc + L (m + s ⊙ t(flow(z)))), exact density.

    The base z has independent coordinates of mean 0 and variance 1: Student's t with `base_df` degrees of freedom, which
    keeps importance weights bounded where a normal base would not, or normal for `base_df=math.inf`.

    `flow` maps the latent dimension D to a `FlowTransform`, or names one of `FLOWS`; "iaf" is the one that did best on
    reference posteriors (docs/results.md). Behind it learn a sinh-arcsinh map t,
    which gives each coordinate tails and skewness of its own, and an elementwise affine map (m, s); a fixed one (loc, L)
    places the guide: at first at `init_loc_fn`'s point with scale `init_scale`, or wherever `whiten` puts it. Device and
    dtype follow the model.

    Parameters exist after `setup(*args)` or the first call. Raises `ValueError` for a discrete latent, for a local
    latent under a subsampled plate, for arguments that change the shape of a latent, and when the parameter store
    already holds another guide's parameters under this one's names.
    """

    exact_log_prob = True

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | FlowFactory = "iaf",
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        base_df: float = BASE_DF,
    ):
        if not base_df > 2:
            raise ValueError(
                f"base_df: expected more than 2 degrees of freedom, for a variance, got {base_df!r}"
            )
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
        self._init_scale, self.base_df = init_scale, base_df
        self._known_shapes: set[Any] = set()
        self._set_up_as: tuple[float, ...] = ()
        # In a tuple: a module would become a part of the guide.
        self._program = (model,)
        # The latents that take supports or masks from each run; of masked ones, those with the density of their prior where
        # they are masked, and those whose flat prior the likelihood makes proper.
        self._chosen_plates: frozenset[str] = frozenset()
        self._needed: tuple[str, ...] = ()
        self._maskable: frozenset[str] = frozenset()
        self._completed: frozenset[str] = frozenset()
        self._flat: frozenset[str] = frozenset()

    # --- setting up ---

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on these arguments to learn its latents, and creates the parameters."""
        self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():  # a graph in the prototype could not be copied
                self._learn_latents(*args, **kwargs)
                loc = self._init_loc()
                transform = self._make_transform(loc).to(dtype=loc.dtype, device=loc.device)
        except Exception:
            self.prototype_trace = None  # a failed setup leaves the guide as it was: not set up
            raise
        self._known_shapes = {argument_shapes(args, kwargs)}
        self.transform = transform
        self._set_up_as = _fingerprint(transform)
        self._check_param_store()

    def _make_transform(self, loc: Tensor) -> FlowTransform:
        """The transform from noise to the unconstrained latents, placed at `loc`."""
        flow = self._flow_factory(self.latent_dim) if self._flow_factory is not None else None
        if not isinstance(flow, FlowTransform):
            raise TypeError(f"flow: expected it to return a FlowTransform, got {flow!r}")
        return ComposeFlow([flow, *self._placement(loc)])

    def _placement(self, loc: Tensor) -> list[FlowTransform]:
        """The layers behind the flow: learned tails, location and scale by coordinate, and the whitening."""
        scale_tril = self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        D = self.latent_dim
        return [SinhArcsinh(D), ElementwiseAffine(D), Whitening(loc, scale_tril)]

    def _learn_latents(self, *args: Any, **kwargs: Any) -> None:
        """The prototype trace, and the shapes and plates of its latents."""
        trace, plates = self._run_model(args, kwargs)
        self.prototype_trace = trace
        if self.master is not None:
            self.master()._check_prototype(trace)
        check_plates(trace, plates)
        self._chosen_plates = frozenset(plates.chosen)
        sites = self._sites()
        stacks = {name: site["cond_indep_stack"] for name, site in sites}
        self._cond_indep_stacks, self._unconstrained_shapes = stacks, {}
        self._prototype_frames = {f.name: f for stack in stacks.values() for f in stack}
        for frame in self._prototype_frames.values():
            if not frame.vectorized:
                raise ValueError(
                    f"plate {frame.name!r} is a sequential one with latents in it: expected `with pyro.plate(...)`"
                )
        self.prototype_trace = slim(sites)
        if not sites:
            raise ValueError(
                "the model has no latents: expected at least one unobserved, continuous site"
            )
        self._needed, self._completed, self._flat = (), frozenset(), frozenset()
        for latent, (name, site) in zip(self.latents, sites, strict=True):
            check_inside(name, latent.support, latent.inside)
            check_log_prob(name, site["fn"], latent.inside)
            self._unconstrained_shapes[name] = latent.unconstrained_shape
        self.latent_dim = sum(shape.numel() for shape in self._unconstrained_shapes.values())
        self._read_masks_and_supports(trace, args, kwargs)
        self._check_supports_repeat()
        if self.master is None:
            with poutine.block():
                self._create_plates()  # NeuTraReparam reads them

    def _check_supports_repeat(self) -> None:
        """Raises `ValueError` for supports that depend on anything but latents of the guide and arguments."""
        following = self._following((), {})
        if following is None:
            return
        loc = self._init_loc()
        first, again = following.supports(loc), following.supports(loc)
        for name in self._needed:
            a, b = tensors_of(first[name]), tensors_of(again[name])
            if any(s.shape != t.shape or not torch.equal(s, t) for s, t in zip(a, b, strict=True)):
                raise ValueError(
                    f"latent {name!r} has a support that changes from run to run ({first[name]}, then {again[name]}): expected "
                    "one that depends on arguments and on latents of this guide. Sample on a fixed support, and transform"
                )

    def _init_loc(self) -> Tensor:
        """The values of the prototype, unconstrained `(D)`."""
        values = {latent.name: latent.inside for latent in self.latents}
        return unconstrain(values, self.latents)[0]

    @property
    def whitening(self) -> Whitening:
        """The fixed affine map behind the flow; `whiten` sets it."""
        self._require_setup()
        return self._modules["transform"][-1]  # type: ignore[index, return-value]

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Places the guide at mean loc and covariance L Lᵀ in unconstrained space, for `loc` `(D)` and `scale_tril` L `(D, D)`.

        The flow goes on in the whitened coordinates with the parameters it has; before training it is near the identity.
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

    @property
    def is_untrained(self) -> bool:
        """Whether the guide is set up and its parameters and whitening are as the setup left them."""
        return self.prototype_trace is not None and _fingerprint(self.transform) == self._set_up_as

    # --- the AutoContinuous protocol ---

    def get_base_dist(self) -> dist.TorchDistribution:
        """The base distribution of the flow on `(D,)`: mean 0, variance 1, `base_df` degrees of freedom."""
        zeros = torch.zeros_like(self.whitening.loc)
        if math.isinf(self.base_df):
            return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        scale = math.sqrt(1 - 2 / self.base_df)
        df, scales = (torch.full_like(zeros, value) for value in (self.base_df, scale))
        return dist.StudentT(df, zeros, scales).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from the base to the unconstrained latents."""
        self._require_setup()
        if called_by_neutra():
            return for_neutra(self.transform, self.latents, dict(self._sites()))  # type: ignore[return-value]
        return self.transform

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent; the same arguments as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_arguments(args, kwargs)
        if torch.is_grad_enabled():
            self._check_param_store()
        vector = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for latent, image in self._images(vector, args, kwargs):
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[latent.name]:
                    stack.enter_context(plates[frame.name])
                if latent.name in self._completed:
                    # The masked entries are in the density of the `Delta`: the site has the mask of the model already.
                    stack.enter_context(poutine.mask(mask=True))
                result[latent.name] = pyro.sample(latent.name, image)
        return result

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws: site -> `(num_samples, *shape)`, without gradient.

        Bounds that depend on the arguments are those of the last call where no arguments are given.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        vector = self.get_posterior().sample(torch.Size([num_samples]))[..., : self.latent_dim]
        images = self._images(vector, args, kwargs, in_plates=False)
        return {latent.name: image.v for latent, image in images}

    def log_prob(self, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q(samples), exact, in constrained space: site -> `(*, *shape)` gives `(*)`.

        For values from anywhere; -inf outside the support. Bounds that depend on the arguments are those of the last call
        where no arguments are given. Raises `ValueError` when the sites or shapes do not fit.
        """
        latent, ladj, inside = self._unconstrain(samples, args, kwargs)
        return torch.where(inside, self.get_posterior().log_prob(latent) - ladj, -torch.inf)

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, elementwise, from 10,000 draws: site -> `(len(quantiles), *shape)`."""
        samples = self.sample_posterior(QUANTILE_DRAWS, *args, **kwargs)
        return {name: elementwise_quantiles(value, quantiles) for name, value in samples.items()}

    def _sites(self) -> list[tuple[str, Any]]:
        """The latent sites of the prototype."""
        self._require_setup()
        return list(self.prototype_trace.iter_stochastic_nodes())  # type: ignore[union-attr]

    def _images(
        self,
        vector: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_plates: bool = True,
    ) -> Iterator[tuple[Latent, JacobianDelta]]:
        """The latents at unconstrained vectors `(*, D)`; `in_plates`: see `programs.split`."""
        latents, following = self.latents, self._following(args, kwargs)
        if following is None:
            yield from constrain(vector, latents, in_plates=in_plates)
            return
        found = following.constrain(vector.reshape(-1, vector.shape[-1]))
        for latent in latents:
            value, term = found[latent.name]
            num_plates = len(latent.shape) - latent.event_dim if in_plates else 0
            outside = vector.shape[: max(0, vector.dim() - 1 - num_plates)]
            value = value.reshape(outside + latent.shape)
            yield (
                latent,
                JacobianDelta(value, term.reshape(outside + term.shape[1:]), latent.event_dim),
            )

    def _unconstrain(
        self,
        samples: Mapping[str, Tensor],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The unconstrained latents `(*, D)`, log|det| of their map to `samples` `(*)`, and whether those are in the support."""
        latents, following = self.latents, self._following(args, kwargs or {})
        if following is None:
            return unconstrain(samples, latents)
        leading = leading_shape(samples, latents)
        rows = {x.name: samples[x.name].reshape(-1, *x.shape) for x in latents}
        vector, ladj, inside = following.unconstrain(rows)
        return vector.reshape(*leading, -1), ladj.reshape(leading), inside.reshape(leading)

    @property
    def latents(self) -> list[Latent]:
        """The latent sites, in the order in which they are laid out in the unconstrained vector."""
        return [read_latent(name, site) for name, site in self._sites()]

    # --- what could go wrong in silence ---

    def _require_setup(self) -> None:
        if self.prototype_trace is None:
            raise ValueError("the guide has no parameters yet: call guide.setup(*args) first")

    def _following(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Following | None:
        """The maps of latents to supports as the model gives them for these arguments; None where nothing depends on the run."""
        if not self._needed:
            return None
        if self._program[0] is None:
            raise ValueError(
                f"the supports of latents {list(self._needed)} come from the model, and a guide from a file is without one: "
                "expected the guide that was trained, or a model with constant bounds, such as b = a * dist.Uniform(0, 1)"
            )
        if args or kwargs or self._arguments is None:
            args, kwargs = training_arguments(self._program[0], args, kwargs)
        else:
            args, kwargs = self._arguments
        return Following(
            self._program[0], args, kwargs, self.latents, self._needed, self._completed
        )

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `ValueError` for arguments that change the shapes of latents; the model runs once for arguments of new shapes."""
        if self._program[0] is None or torch.jit.is_tracing():
            return
        args, kwargs = training_arguments(self._program[0], args, kwargs)
        shapes = argument_shapes(args, kwargs)
        is_new = shapes not in self._known_shapes and bool(args or kwargs)
        if (self._needed or self._chosen_plates) and not same_objects(
            self._arguments, (args, kwargs)
        ):
            self._arguments = (args, kwargs)
            judged = self._completed | self._flat
            is_new = is_new or bool(self._chosen_plates) or not self._maskable <= judged
        if is_new:
            self._read_run(args, kwargs)
            self._known_shapes.add(shapes)

    def _run_model(self, args: Any, kwargs: Any) -> tuple[Trace, PlateReader]:
        """The latents of a run of the model, and its plates."""
        plates = PlateReader()
        with poutine.block():
            model = poutine.block(plates(self.model), self._prototype_hide_fn)
            return poutine.trace(model).get_trace(*args, **kwargs), plates

    @torch.no_grad()
    def _read_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares the latents of a new run of the model with those of the setup."""
        trace, plates = self._run_model(args, kwargs)
        check_plates(trace, plates)
        self._chosen_plates = frozenset(plates.chosen)
        for name, site in self._sites():
            if name not in trace.nodes:
                raise ValueError(
                    f"latent {name!r} of the setup is not a latent of the model for these arguments; set up a new guide on them"
                )
            old, new = extent(site, site), extent(trace.nodes[name], site)
            if old != new:
                raise ValueError(
                    f"latent {name!r} has size {new} for these arguments, but the guide was set up for {old}; "
                    "set up a new guide on these arguments"
                )
        self._read_masks_and_supports(trace, args, kwargs)

    def _read_masks_and_supports(
        self, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Finds the latents whose supports and masks come from the runs of the model."""
        latents = self.latents
        run: dict[str, Any] = {latent.name: trace.nodes[latent.name] for latent in latents}
        self._needed = tuple(n for n, site in run.items() if n in self._needed or needs_run(site))
        self._maskable = frozenset(n for n, site in run.items() if is_maskable(site))
        judged = self._completed | self._flat
        masked = frozenset(n for n in self._maskable - judged if is_masked(run[n]))
        if masked:
            completed = completed_latents(self._program[0], args, kwargs, latents, trace)
            self._completed |= completed & masked
            self._flat |= masked - completed
        if self._needed or self._chosen_plates:
            self._arguments = (args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a guide in a file, which is without its model: constant supports are those of the setup."""
        state = super().__getstate__()
        if self._needed and not self._completed and self._supports_are_constant():
            state["_needed"] = ()
        return state

    @torch.no_grad()
    def _supports_are_constant(self) -> bool:
        """Whether two runs of the model, far from each other, have the supports of the setup."""
        following = None if self._program[0] is None else self._following((), {})
        if following is None:
            return False
        loc = self._init_loc()
        with torch.random.fork_rng(devices=[]):
            runs = [following.supports(loc), following.supports(loc + torch.randn_like(loc))]
        known = {latent.name: tensors_of(latent.support) for latent in self.latents}
        return all(
            s.shape == t.shape and torch.equal(s, t)
            for run in runs
            for name in self._needed
            for s, t in zip(tensors_of(run[name]), known[name], strict=True)
        )


@torch.no_grad()
def _fingerprint(module: torch.nn.Module) -> tuple[float, ...]:
    """Numbers that change whenever a parameter or a buffer does."""
    return tuple(
        float(
            (
                t.double()
                * torch.linspace(1, 2, t.numel(), dtype=torch.float64, device=t.device).reshape(
                    t.shape
                )
            ).sum()
        )
        for t in module.state_dict().values()
        if t.is_floating_point()
    )
