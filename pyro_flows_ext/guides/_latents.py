"""The latents of a model, their supports, plates and masks: at setup, and for the arguments of later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.trace_struct import Trace
from torch import Tensor

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
from ._forecast import training_arguments
from ._plates import PlateReader, check_plates
from ._setup import PortableGuide, argument_shapes, extent, same_objects, slim


class ModelLatents(PortableGuide, AutoContinuous):
    """A guide over all latents of a model: ℝᴰ on one side, constrained values of the sites on the other."""

    def __init__(self, model: Callable[..., Any], init_loc_fn: Callable[..., Any]):
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._program = (model,)
        self._known_shapes: set[Any] = set()
        # Latents whose supports or masks come from each run of the model. Of the masked ones: those that keep the density of
        # their prior where they are masked (completed), and those whose flat prior the likelihood makes proper.
        self._chosen_plates: frozenset[str] = frozenset()
        self._needed: tuple[str, ...] = ()
        self._maskable: frozenset[str] = frozenset()
        self._completed: frozenset[str] = frozenset()
        self._flat: frozenset[str] = frozenset()

    @property
    def latents(self) -> list[Latent]:
        """The latent sites, in the order in which they are laid out in the unconstrained vector."""
        return [read_latent(name, site) for name, site in self._sites()]

    # --- at setup ---

    def _learn_latents(self, *args: Any, **kwargs: Any) -> None:
        """Sets the prototype trace, and the shapes and plates of its latents."""
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
                    f"plate {frame.name!r}: expected `with pyro.plate(...)` around latents, got a sequential plate"
                )
        self.prototype_trace = slim(sites)
        if not sites:
            raise ValueError(
                "model: expected at least one unobserved, continuous site, got a model without latents"
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
                    f"latent {name!r}: expected a support that depends on arguments and on latents of this guide alone, got one "
                    f"that changes from run to run ({first[name]}, then {again[name]}). Sample on a fixed support, and transform"
                )

    def _init_loc(self) -> Tensor:
        """The values of the prototype, unconstrained `(D)`."""
        values = {latent.name: latent.inside for latent in self.latents}
        return unconstrain(values, self.latents)[0]

    # --- between constrained and unconstrained values ---

    def _sites(self) -> list[tuple[str, Any]]:
        """The latent sites of the prototype."""
        self._require_setup()
        return list(self.prototype_trace.iter_stochastic_nodes())

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

    # --- for the arguments of a call ---

    def _following(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Following | None:
        """The maps of latents to supports that the model has for these arguments; None if no support depends on the run."""
        if not self._needed:
            return None
        if self._program[0] is None:
            raise ValueError(
                f"the supports of latents {list(self._needed)} come from the model, and a guide from a file has no model: "
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
            settled = self._completed | self._flat
            is_new = is_new or bool(self._chosen_plates) or not self._maskable <= settled
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
                    f"latent {name!r} of the setup is not a latent of the model for these arguments: set up a new guide on them"
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
        settled = self._completed | self._flat
        masked = frozenset(n for n in self._maskable - settled if is_masked(run[n]))
        if masked:
            completed = completed_latents(self._program[0], args, kwargs, latents, trace)
            self._completed |= completed & masked
            self._flat |= masked - completed
        if self._needed or self._chosen_plates:
            self._arguments = (args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a file, which leaves the model out: constant supports are those of the setup."""
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
