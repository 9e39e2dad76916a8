"""The log joint of a model as a function on ℝᴰ, evaluated for many particles at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .enumeration import enumerate_in_parallel, marginal_log_prob
from .evaluation import Substitute, Total, Values, completed_latents, leaf, value_and_gradient
from .in_place import BatchedWrites
from .latents import (
    Latent,
    is_constant,
    read_latent,
    split,
    unconstrain,
)
from .masks import completing_log_prob
from .match import check_marginalised
from .raising import ERRORS, NaNForFailures, first_line, guarded
from .subsamples import draw_subsample
from .supports import bijection, support_of
from .traces import (
    Program,
    evaluation_mode,
    is_latent,
    nesting_of,
    nonfinite_ignored,
    sample_sites,
)

# Particles at which the batched evaluation is compared with single runs, and their distance from the first value.
NUM_CHECKED, CHECK_SPREAD = 3, 0.1


class LogJoint:
    """log p(x, T(u)) + log|det T'(u)| of a model's continuous latents, in nats; T maps ℝᴰ to their supports.

    The supports are those of each run: bounds may depend on other latents and on the arguments. Batches of particles run
    through Pyro's handlers with the batch dimension left of all plates, where this agrees with single runs; otherwise
    through `torch.vmap` over the unchanged model (`alpha[group]`, `X @ w`, `x[missing] = z`); otherwise one by one. Discrete latents marked
    for enumeration are summed out exactly. Masked latents have the density of their prior where nothing unmasked depends
    on them, so that the density on ℝᴰ stays proper and the evidence is the same. A particle for which the model raises
    has density zero.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments.
        latents: the latents in the order in which they are laid out in u; by default all continuous ones.

    Attributes:
        method: "handlers", "vmap" or "loop".
        vectorization_error: the reason for "loop", else None.
        subsampled: the plates of which each call draws another part of the data.
        num_raised: how many particles raised so far.

    Raises:
        ValueError: for a latent that is neither in `latents` nor enumerated, and for one that the model observes.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> log_joint = LogJoint(model, (torch.tensor(0.5),))
        >>> value, gradient = log_joint.value_and_gradient(torch.zeros(4, 1))
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        latents: Sequence[Latent] | None = None,
    ):
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.num_raised = 0
        self.parameters: list[Tensor] = []
        self._proper: frozenset[str] = frozenset()
        with torch.no_grad(), poutine.block(), evaluation_mode(model):
            trace = self._prototype(latents)
        self.latents = list(latents) if latents is not None else _continuous(trace)
        self.nesting = nesting_of(trace)
        self._check_sites(trace)
        self._proper = completed_latents(model, self.args, self.kwargs, self.latents, trace)
        self.method, self._writes = "loop", False
        self.vectorization_error: str | None = None
        self._choose_method()

    # --- the function ---

    @property
    def dim(self) -> int:
        """D."""
        return sum(latent.unconstrained_shape.numel() for latent in self.latents)

    @property
    def vectorized(self) -> bool:
        """Whether a batch of particles takes one run of the model."""
        return self.method != "loop"

    @property
    def is_stochastic(self) -> bool:
        """Whether each call draws its own part of the data."""
        return bool(self.subsampled)

    def __call__(self, u: Tensor) -> Tensor:
        """The log density `(*)` of u `(*, D)`, differentiable in u and in the model's parameters; -inf in place of NaN."""
        if u.shape[-1] != self.dim:
            raise ValueError(f"u: expected shape (*, {self.dim}), got {tuple(u.shape)}")
        rows = u.reshape(-1, u.shape[-1])
        fixed = self._draw_subsamples()
        value, num_raised = guarded(lambda part: self._evaluate(part, fixed), rows)
        self.num_raised += num_raised
        return value.reshape(u.shape[:-1])

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log density `(N)` of u `(N, D)` and its gradient `(N, D)`, detached; -inf and 0 where one is not finite."""
        return value_and_gradient(self, u)

    def hessian(self, u: Tensor) -> Tensor:
        """The second derivatives `(D, D)` at one u `(D)`, in one run of D particles."""
        with torch.enable_grad():
            copies = u.detach().expand(len(u), -1).clone().requires_grad_()
            (g,) = torch.autograd.grad(self(copies).sum(), copies, create_graph=True)
            if not g.requires_grad:  # a log density that is linear in u
                return torch.zeros(len(u), len(u), dtype=u.dtype, device=u.device)
            (H,) = torch.autograd.grad(g.diagonal().sum(), copies)
        return (H + H.mT) / 2

    def at(
        self, values: Values, *, masked: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x, z) `(N)` at constrained values `(N, *shape)`, and the log-likelihood of each observed site `(N, *batch)`.

        Args:
            values: latent name -> values, for all latents.
            masked: the latents whose masks apply to their own density, as in Pyro's traces; other masked latents have
                the density of their prior (see the class).
        """
        num = len(next(iter(values.values())))
        fixed, proper = self._draw_subsamples(), self._proper.difference(masked)
        found: list[tuple[Tensor, dict[str, Tensor]]] = []

        def evaluate(rows: Tensor) -> Tensor:
            whole = len(rows) == num
            chosen = values if whole else {k: v[rows[:, 0].to(v.device)] for k, v in values.items()}
            total, sites = self._run_all(
                chosen, fixed, constrained=True, collect=True, proper=proper
            )
            shapes = {name: self._batch_shapes[name] for name in sites}
            sites = {name: v.reshape(len(rows), *shapes[name]) for name, v in sites.items()}
            found.append((rows[:, 0], sites))
            return total

        log_joint, num_raised = guarded(evaluate, torch.arange(num).unsqueeze(-1))
        self.num_raised += num_raised
        if len(found) == 1 and len(found[0][0]) == num:
            return log_joint, found[0][1]
        likelihood = {
            name: v.new_full((num, *v.shape[1:]), -torch.inf) for name, v in found[0][1].items()
        }
        for index, sites in found:
            for name, v in sites.items():
                likelihood[name][index] = v
        return log_joint, likelihood

    @torch.no_grad()
    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """The latents T(u) of u `(N, D)`: site -> `(N, *shape)`."""
        parts = {latent.name: part for latent, part in split(u, self.latents)}
        if all(is_constant(latent.support) for latent in self.latents):
            return {x.name: bijection(x.support)(parts[x.name]) for x in self.latents}
        return self._run_all(parts, self._draw_subsamples(), constrained=False, collect=None)[1]

    @torch.no_grad()
    def draw_prior(self, num: int) -> Tensor:
        """Latents drawn by the model itself, unconstrained: at most `(num, D)`, without draws on the boundary."""
        rows = []
        with poutine.block(), nonfinite_ignored():
            for _ in range(num):
                trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
                values: dict[str, Any] = {
                    x.name: trace.nodes[x.name]["value"] for x in self.latents
                }
                latents = [read_latent(x.name, trace.nodes[x.name]) for x in self.latents]
                rows.append(unconstrain(values, latents)[0])
        u = torch.stack(rows)
        return u[u.isfinite().all(-1)]

    # --- what the model consists of ---

    def _prototype(self, latents: Sequence[Latent] | None) -> Trace:
        model = self.model
        if latents is not None:
            model = Substitute({x.name: x.inside for x in latents})(model)
        return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def _check_sites(self, trace: Trace) -> None:
        names = {latent.name for latent in self.latents}
        missing = sorted(names - trace.nodes.keys())
        if missing:
            raise ValueError(f"latents {missing} are not sites of the model for these arguments")
        self.subsampled: list[str] = []
        self.enumerated: list[str] = []
        for name, site in sample_sites(trace):
            if site_is_subsample(site):
                if len(site["value"]) < site["fn"].size and not site["is_observed"]:
                    self.subsampled.append(name)
            elif name in names:
                if site["is_observed"]:
                    raise ValueError(
                        f"latent {name!r} is observed by the model for these arguments"
                    )
            elif not site["is_observed"]:
                check_marginalised(name, site)
                self.enumerated.append(name)
        self._batch_shapes = {
            name: site["fn"].batch_shape
            for name, site in sample_sites(trace)
            if site["is_observed"] and not site_is_subsample(site)
        }
        self._subsamples = {name: trace.nodes[name]["fn"] for name in self.subsampled}

    # --- how it is evaluated ---

    def _choose_method(self) -> None:
        if not self.latents:
            raise ValueError("model: expected at least one continuous latent, got none")
        parts, constrained = self._points()
        fixed = self._draw_subsamples()

        def evaluate(part: Values) -> Tensor:
            return self._run_all(part, fixed, constrained=constrained, collect=False)[0]

        with torch.no_grad(), evaluation_mode(self.model):
            parts, single = self._singly(evaluate, parts)
            reasons = {}
            methods = [("handlers", False), ("vmap", False), ("vmap", True)]
            for method, writes in methods[1:] if self.enumerated else methods:
                self.method, self._writes = method, writes
                try:
                    many = evaluate(parts)
                except ERRORS as error:
                    reasons[method] = f"{type(error).__name__}: {first_line(error)}"
                    continue
                if torch.allclose(many, single, rtol=1e-4, atol=1e-3, equal_nan=True):
                    return
                numbers = f"{single[0].item():.6g} alone and {many[0].item():.6g} in a batch"
                reasons[method] = f"the log joint of a particle is {numbers}"
        self.method = "loop"
        self.vectorization_error = "; ".join(f"{name}: {why}" for name, why in reasons.items())

    def _points(self) -> tuple[dict[str, Tensor], bool]:
        """Values for a few particles near the first one, and whether they are constrained.

        The first particle has the first value itself. Discrete values, in `at` of a guide that draws such, are copied.
        """
        inside = {x.name: x.inside for x in self.latents}
        if any(x.support.is_discrete for x in self.latents):
            return {n: v.expand(NUM_CHECKED, *v.shape) for n, v in inside.items()}, True
        u = unconstrain(inside, self.latents)[0].detach()
        generator = torch.Generator(device=u.device).manual_seed(0)
        noise = torch.randn(
            NUM_CHECKED, len(u), dtype=u.dtype, device=u.device, generator=generator
        )
        noise[0] = 0.0
        return {x.name: v for x, v in split(u + CHECK_SPREAD * noise, self.latents)}, False

    def _singly(
        self, evaluate: Callable[[Values], Tensor], parts: Values
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The particles whose single runs do not raise, the first one included, and their values."""
        self.method = "loop"
        rows = [{name: v[i : i + 1] for name, v in parts.items()} for i in range(NUM_CHECKED)]
        kept, values = [rows[0]], [evaluate(rows[0])]
        for row in rows[1:]:
            try:
                values.append(evaluate(row))
            except ERRORS:
                continue
            kept.append(row)
        return {name: torch.cat([row[name] for row in kept]) for name in parts}, torch.cat(values)

    def _draw_subsamples(self) -> dict[str, Tensor]:
        """One subsample of each subsampled plate, shared by all particles of a call."""
        return {name: draw_subsample(fn) for name, fn in self._subsamples.items()}

    def _evaluate(self, u: Tensor, fixed: Values) -> Tensor:
        """The log density `(N)` of u `(N, D)`, without care for particles that raise."""
        parts = {latent.name: part for latent, part in split(u, self.latents)}
        return self._run_all(parts, fixed, constrained=False, collect=False)[0]

    def _run_all(
        self,
        parts: Values,
        fixed: Values,
        *,
        constrained: bool,
        collect: bool | None,
        proper: frozenset[str] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The log density `(N)` of N particles by the chosen method, and what `collect` names.

        That is the log-likelihood by observed site (True), nothing (False), or the latents (None).
        """
        proper = self._proper if proper is None else proper
        num = len(next(iter(parts.values())))

        def single(part: Values) -> tuple[Tensor, dict[str, Tensor]]:
            return self._run(part, fixed, None, constrained, collect, proper)

        def writing(part: Values) -> tuple[Tensor, dict[str, Tensor]]:
            if not self._writes:
                return single(part)
            with BatchedWrites(next(iter(part.values()))):
                return single(part)

        # Validation reads values, which vmap cannot do; callers make Pyro's checks on single traces.
        with (
            poutine.block(),
            pyro.validation_enabled(False),
            nonfinite_ignored(),
            NaNForFailures(),
        ):
            if self.method == "handlers":
                value, sites = self._run(parts, fixed, num, constrained, collect, proper)
            elif self.method == "vmap":
                value, sites = torch.vmap(writing, randomness="error")(dict(parts))
            else:
                runs = [single({k: v[i] for k, v in parts.items()}) for i in range(num)]
                value = torch.stack([run[0] for run in runs])
                sites = {k: torch.stack([run[1][k] for run in runs]) for k in runs[0][1]}
        value = value.expand(num)
        return torch.where(value.isnan(), -torch.inf, value), sites

    def _run(
        self,
        parts: Values,
        fixed: Values,
        num: int | None,
        constrained: bool,
        collect: bool | None,
        proper: frozenset[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One run of the model: of one particle, or of `num` with the batch dimension left of all plates."""
        put = Substitute(
            parts if constrained else {},
            {} if constrained else parts,
            {x.name: x for x in self.latents},
            fixed=fixed,
            batch_dim=None if num is None else -1 - self.nesting,
        )
        if self.enumerated:
            program = enumerate_in_parallel(put(self.model), self.nesting)
            trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
            terms = [completing_log_prob(trace.nodes[name]) for name in proper]
            value = sum((t.sum() for t in [*put.ladjs, *terms]), start=marginal_log_prob(trace))
            self.parameters = [leaf(s) for s in trace.nodes.values() if s["type"] == "param"]
            return value, put.latents if collect is None else {}
        total = Total(num, self.nesting, proper, bool(collect))
        with total, put:
            self.model(*self.args, **self.kwargs)
        self.parameters = total.parameters
        for ladj in put.ladjs:
            total.add(ladj)
        return total.value, put.latents if collect is None else total.sites


def _continuous(trace: Trace) -> list[Latent]:
    found = []
    for name, site in sample_sites(trace):
        if is_latent(site) and not site["infer"].get("enumerate"):
            support_of(name, site["fn"])
            found.append(read_latent(name, site))
    return found
