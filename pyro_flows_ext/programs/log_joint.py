"""The log joint of a model as a function on ℝᴰ, evaluated for many particles at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .enumeration import enumerate_in_parallel, marginal_log_prob
from .latents import (
    Latent,
    is_constant,
    read_latent,
    split,
    to_support,
    unconstrain,
)
from .masks import completing_log_prob, is_masked, masked_entries
from .supports import bijection, support_of, true_support
from .traces import (
    Program,
    Site,
    evaluation_mode,
    is_latent,
    nesting_of,
    nonfinite_ignored,
    sample_sites,
)

# Particles at which the batched evaluation is compared with single runs, and their distance from the first value.
NUM_CHECKED, CHECK_SPREAD = 3, 0.1
# Errors of a batched run that mean "not in this way"; also those of a model at a value that it does not accept.
ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError, ArithmeticError)

# A batch in which more than this share raises is an error of the model; smaller batches are single trials of an optimiser.
MAX_RAISED, LEAST_BATCH = 0.5, 8

Values = Mapping[str, Tensor]


class LogJoint:
    """log p(x, T(u)) + log|det T'(u)| of a model's continuous latents, in nats; T maps ℝᴰ to their supports.

    The supports are those of each run: bounds may depend on other latents and on the arguments. Batches of particles run
    through Pyro's handlers with the batch dimension left of all plates, where this agrees with single runs; otherwise
    through `torch.vmap` over the unchanged model (`alpha[group]`, `X @ w`); otherwise one by one. Discrete latents marked
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
        self.method = "loop"
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
        value = self._guarded(lambda part: self._evaluate(part, fixed), rows)
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

        log_joint = self._guarded(evaluate, torch.arange(num).unsqueeze(-1))
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
            model = _Substitute({x.name: x.inside for x in latents})(model)
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
            reasons = []
            for method in ("vmap",) if self.enumerated else ("handlers", "vmap"):
                self.method = method
                try:
                    many = evaluate(parts)
                except ERRORS as error:
                    reasons.append(f"{method}: {type(error).__name__}: {_first_line(error)}")
                    continue
                if torch.allclose(many, single, rtol=1e-4, atol=1e-3, equal_nan=True):
                    return
                numbers = f"{single[0].item():.6g} alone and {many[0].item():.6g} in a batch"
                reasons.append(f"{method}: the log joint of a particle is {numbers}")
        self.method, self.vectorization_error = "loop", "; ".join(reasons)

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
        return {name: fn() for name, fn in self._subsamples.items()}

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

        # Validation reads values, which vmap cannot do; callers make Pyro's checks on single traces.
        with poutine.block(), pyro.validation_enabled(False), nonfinite_ignored():
            if self.method == "handlers":
                value, sites = self._run(parts, fixed, num, constrained, collect, proper)
            elif self.method == "vmap":
                value, sites = torch.vmap(single, randomness="error")(dict(parts))
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
        put = _Substitute(
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
            self.parameters = [_leaf(s) for s in trace.nodes.values() if s["type"] == "param"]
            return value, put.latents if collect is None else {}
        total = _Total(num, self.nesting, proper, bool(collect))
        with total, put:
            self.model(*self.args, **self.kwargs)
        self.parameters = total.parameters
        for ladj in put.ladjs:
            total.add(ladj)
        return total.value, put.latents if collect is None else total.sites

    def _guarded(self, evaluate: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`evaluate(rows)`, with -inf for rows that raise; raises where most rows of a batch do."""
        try:
            return evaluate(rows)
        except ERRORS as error:
            first = error
        raised: list[int] = []
        limit = MAX_RAISED * len(rows) if len(rows) >= LEAST_BATCH else len(rows)
        values = self._bisect(evaluate, rows, 0, raised, limit)
        if len(raised) > limit:
            where = ", ".join(f"{v:.4g}" for v in rows[raised[0]].tolist()[:8])
            raise ValueError(
                f"the model raised {type(first).__name__} for more than half of {len(rows)} particles, first at the "
                f"unconstrained latents [{where}]: {_first_line(first)}"
            ) from first
        self.num_raised += len(raised)
        return values

    def _bisect(
        self,
        evaluate: Callable[[Tensor], Tensor],
        rows: Tensor,
        start: int,
        raised: list[int],
        limit: float,
    ) -> Tensor:
        """The values of rows in halves, down to those that raise."""
        if len(raised) <= limit:
            try:
                return evaluate(rows)
            except ERRORS:
                if len(rows) == 1:
                    raised.append(start)
        if len(rows) == 1 or len(raised) > limit:
            dtype = rows.dtype if rows.is_floating_point() else torch.get_default_dtype()
            return torch.full((len(rows),), -torch.inf, dtype=dtype, device=rows.device)
        half = len(rows) // 2
        left = self._bisect(evaluate, rows[:half], start, raised, limit)
        return torch.cat([left, self._bisect(evaluate, rows[half:], start + half, raised, limit)])


def value_and_gradient(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A log density `(*)` at u `(*, D)` and its gradient `(*, D)`, detached; where one is not finite, -inf and 0."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = log_density(u)
        if not value.requires_grad:  # every particle raised
            return value.detach(), torch.zeros_like(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
    finite = value.isfinite() & gradient.isfinite().all(-1)
    return (
        torch.where(finite, value.detach(), -torch.inf),
        torch.where(finite.unsqueeze(-1), gradient, 0.0),
    )


def completed_latents(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    latents: Sequence[Latent],
    trace: Trace,
) -> frozenset[str]:
    """The latents masked in a trace whose masked entries nothing else depends on: those can have the density of their prior."""
    masked = [x.name for x in latents if is_masked(trace.nodes[x.name])]
    if not masked:
        return frozenset()
    points = {x.name: x.inside.detach().clone().requires_grad_() for x in latents}
    with torch.enable_grad(), poutine.block(), nonfinite_ignored():
        replayed = poutine.trace(_Substitute(points)(model)).get_trace(*args, **kwargs)
        total = torch.as_tensor(replayed.log_prob_sum())
        if not total.requires_grad:
            return frozenset(masked)
        grads = torch.autograd.grad(
            total, list(points.values()), allow_unused=True, materialize_grads=True
        )
    gradients = dict(zip(points, grads, strict=True))
    return frozenset(
        name
        for name in masked
        if not bool((gradients[name] * masked_entries(replayed.nodes[name])).any())
    )


def check_marginalised(name: str, site: Site) -> None:
    """Raises `ValueError` for a latent outside of the guide that is not enumerated."""
    if site["infer"].get("enumerate") and site["fn"].has_enumerate_support:
        return
    fn = type(site["fn"]).__name__
    if site["fn"].has_enumerate_support:
        raise ValueError(
            f"latent {name!r} of the model ({fn}) is not in the guide: expected a draw of the guide for every latent, or "
            "enumeration; decorate the model with pyro.infer.config_enumerate to sum it out exactly"
        )
    raise ValueError(
        f"latent {name!r} of the model ({fn}) is not in the guide: expected a draw of the guide for every latent. If "
        f"{name!r} is data, pass the same data as to the guide; if not, add it to the guide or condition the model on it"
    )


def _continuous(trace: Trace) -> list[Latent]:
    found = []
    for name, site in sample_sites(trace):
        if is_latent(site) and not site["infer"].get("enumerate"):
            support_of(name, site["fn"])
            found.append(read_latent(name, site))
    return found


def _leaf(site: Site) -> Tensor:
    """The trained tensor behind a parameter site."""
    unconstrained = getattr(site["value"], "unconstrained", None)
    leaf = None if unconstrained is None else unconstrained()
    return site["value"] if leaf is None else leaf


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _Substitute(Messenger):
    """Puts latents at given values, constrained or not, and plates at given subsamples."""

    def __init__(
        self,
        values: Values,
        unconstrained: Values | None = None,
        latents: Mapping[str, Latent] | None = None,
        *,
        fixed: Values | None = None,
        batch_dim: int | None = None,
    ):
        super().__init__()
        self.values, self.unconstrained = values, unconstrained or {}
        self.names, self.fixed, self.batch_dim = latents or {}, fixed or {}, batch_dim
        self.ladjs: list[Tensor] = []
        self.latents: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.fixed and site_is_subsample(msg):
            msg["value"] = self.fixed[name]
        elif msg["is_observed"] or msg["done"]:
            return
        elif name in self.values:
            value = self.values[name]
            if self.batch_dim is not None:
                value = self._beside_plates(name, value)
            msg["value"], msg["done"] = value, True
        elif name in self.unconstrained:
            part, latent = self.unconstrained[name], self.names[name]
            if self.batch_dim is not None:
                part = self._beside_plates(name, part)
            value, ladj = to_support(part, true_support(name, msg["fn"]), latent.event_dim)
            self.ladjs.append(ladj)
            shape = latent.shape if self.batch_dim is None else (len(part), *latent.shape)
            self.latents[name] = value.reshape(shape)
            msg["value"], msg["done"] = value, True

    def _beside_plates(self, name: str, value: Tensor) -> Tensor:
        """A batch of values with its first dimension at `batch_dim` of the site's batch shape."""
        latent = self.names[name]
        gap = -1 - self.batch_dim - (len(latent.shape) - latent.event_dim)  # type: ignore[operator]
        if gap < 0:
            raise ValueError(
                f"latent {name!r} has more batch dimensions than there are plates around it"
            )
        return value.reshape(len(value), *[1] * gap, *value.shape[1:])


class _Total(Messenger):
    """Adds up the log densities of all sites, scaled and masked: a scalar, or one value for each of `num` particles."""

    def __init__(self, num: int | None, nesting: int, completed: frozenset[str], collect: bool):
        super().__init__()
        self.num, self.nesting, self.completed, self.collect = num, nesting, completed, collect
        self.terms: list[Tensor] = []
        self.sites: dict[str, Tensor] = {}
        self.parameters: list[Tensor] = []

    @property
    def value(self) -> Tensor:
        total = self.terms[0]
        for term in self.terms[1:]:
            total = total + term
        return total

    def add(self, log_prob: Tensor) -> None:
        if self.num is None or log_prob.dim() <= self.nesting:
            self.terms.append(log_prob.sum())
        elif log_prob.dim() > self.nesting + 1:
            raise ValueError(
                f"a log density has {log_prob.dim()} batch dimensions for particles within {self.nesting} plates; declare "
                "every batch dimension by pyro.plate"
            )
        else:
            self.terms.append(log_prob.flatten(1).sum(-1) if log_prob.dim() > 1 else log_prob)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.add(scale_and_mask(log_prob, msg["scale"], msg["mask"]))
        if msg["name"] in self.completed:
            self.add(completing_log_prob(msg))
        if self.collect and msg["is_observed"] and not isinstance(msg["fn"], dist.Unit):
            likelihood = scale_and_mask(log_prob, 1.0, msg["mask"])
            if self.num is not None and likelihood.dim() <= self.nesting:
                likelihood = likelihood.expand(self.num, *likelihood.shape)
            self.sites[msg["name"]] = likelihood

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters.append(_leaf(msg))
