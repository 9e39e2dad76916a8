"""`fit`: train a guide until its draws can be trusted, and say whether they can."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim

from ...files import remove_unfinished
from ...guides import AutoAmortizedFlow, AutoFlow
from ...guides.base import FlowGuide
from ...programs import (
    LogJoint,
    Program,
    check_finite_log_joint,
    check_latents,
    check_modules,
    check_shapes,
    latent_sites,
    nesting_of,
    sample_sites,
    traces_of,
    unconstrain,
    vectorization_error,
)
from .._loop import OptimFactory, SchedulerFactory, seeded
from ..distributed import Processes, find_processes
from ..elbo import ImportanceWeightedELBO
from ..importance import model_first
from ..warm_start import Mode, whiten_at_posterior
from .enlarge import fit_enlarging
from .objectives import ELBOObjective, Objective, PathObjective
from .options import options_of
from .outcome import outcome
from .posterior import FlowPosterior, GuidePosterior, Posterior
from .result import FitResult
from .rounds import Callback
from .run import Options, Run

# Options that are the same in all processes of a run.
AGREED = ("max_steps", "is_fixed", "lr", "schedule", "num_particles", "target_ess")
# Particles of a step: in one pass, one by one, and where one pass of all takes longer than the seconds below.
PARTICLES, PARTICLES_IN_A_LOOP, PARTICLES_OF_DEAR_MODELS = 64, 8, 16
DEAR_SECONDS = 0.2
# Above this many numbers no chain runs: such guides are amortized ones in all but name.
MAX_CHAIN_DIM = 3000


def fit(
    model: Program,
    guide: Program | str,
    *args: Any,
    max_steps: int = 5000,
    target_ess: float = 0.5,
    num_steps: int | None = None,
    lr: float = 0.02,
    num_particles: int | None = None,
    loss: ELBO | None = None,
    optim: OptimFactory | PyroOptim | None = None,
    scheduler: SchedulerFactory | None = None,
    schedule: str = "cosine",
    final_lr: float = 0.01,
    clip_norm: float | None = 10.0,
    warm_start: bool | str = "auto",
    refine: bool | str = "auto",
    compile: bool | str = "auto",
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> FitResult:
    """Trains a guide until draws of the posterior can be trusted.

    Flow guides over all latents start at a Gaussian found in about a second and train by path gradients, in rounds; other
    guides train on a Pyro ELBO. After each round draws are weighed. The run ends "trusted" where the effective sample
    size is `target_ess` and k-hat below .7, twice, and chains of HMC from the guide's draws do not drift; or where such
    chains mix, which `result.sample` then returns. It ends "level" where nothing is gained, else "out of steps".

    Args:
        model, guide: Pyro programs of the same arguments. The guide may be "auto": a Gaussian, an IAF, splines and a CIF in turn,
            each from where the last one ended, until one is trusted; `result.tried` names them.
        args, kwargs: these arguments; bind keywords that `fit` has too by `functools.partial`.
        max_steps, target_ess: the most optimizer steps, and the effective share of draws in (0, 1).
        num_steps: a fixed number of steps instead, not verified unless `refine=True`.
        lr, optim, clip_norm: Adam's rate; or a function from parameters to a torch optimizer, or a `PyroOptim`; and the
            largest joint norm of gradients.
        num_particles, loss: draws a step, None for 64, or 8 one by one; or a Pyro ELBO, which ignores it.
        schedule, final_lr: of `num_steps`: "cosine", "exponential" or "constant", to this share of the rate.
        scheduler: with `num_steps`: makes a `torch.optim.lr_scheduler` from the optimizer, in place of `schedule`; stepped
            after every update, or every 50 steps with their mean loss where it goes by it.
        warm_start, refine, compile: True, False or "auto": for guides as their setup left them; where chains find better
            draws; for `num_steps`, where eager steps would take over a minute (docs/compiled.md).
        callback: called with a `TrainingState` after each round and every 50 steps.
        checkpoint, resume: a file written at round ends and every few seconds; an existing one is gone on from.
        seed: makes the run reproducible, and leaves the global generators as they were.
        progress: a bar, or lines where there is no terminal, on standard error.

    Raises:
        ValueError: for arguments out of range, NaN or infinite data that the model does not mask, model and guide that do
            not match, and shapes that Pyro refuses.
        FloatingPointError: after 100 steps in a row without a finite gradient, where no round before them ended well.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit(model, AutoIAF(model), torch.randn(20), seed=0, progress=False).trusted
        True
    """
    if isinstance(guide, str):
        return _fit_auto(dict(locals()))
    options = options_of(locals())
    with seeded(seed):
        return _fit_one(
            model, guide, args, kwargs, options, loss=loss, warm_start=warm_start, resume=resume
        )


def _fit_one(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    *,
    loss: ELBO | None = None,
    warm_start: bool | str = "auto",
    resume: bool = False,
    modes: Sequence[Mode] = (),
) -> FitResult:
    """`fit` of one guide, inside its seed; `modes` are those known where there is no warm start."""
    begin = time.perf_counter()
    model, guide = model_first(model, guide)
    check_finite_log_joint(model, args, kwargs)
    is_new = _set_up(guide, args, kwargs)
    single = traces_of(model, guide, args, kwargs)
    check_latents(*single)
    check_shapes(*single)
    check_modules(*single)
    flow = guide if isinstance(guide, AutoFlow) else None
    log_joint = None
    if flow is not None and loss is None:
        log_joint = LogJoint(model, args, kwargs, latents=flow.latents)
    processes = find_processes()
    path = options.checkpoint
    is_resumed = resume and path is not None and os.path.exists(path)
    if processes.count > 1:
        agreed = {name: getattr(options, name) for name in AGREED}
        processes.start(guide, {**agreed, "checkpoint": is_resumed})
    run = Run(model, guide, args, kwargs, options, processes)
    run.modes = list(modes)
    if path is not None and processes.is_first:
        remove_unfinished(Path(path).parent)
    is_placed = False
    if not is_resumed and isinstance(guide, FlowGuide):
        is_untrained = is_new or guide.is_untrained
        if is_untrained if warm_start == "auto" else warm_start:
            is_placed = is_untrained
            run.announce("warm start")
            found = log_joint or LogJoint(model, args, kwargs, latents=guide.latents)
            run.warm_start = whiten_at_posterior(found, guide)
            processes.copy(guide)
    objective = _objective(model, guide, args, kwargs, log_joint, loss, options)
    _share_particles(objective, loss, processes)
    run.prepare(
        objective,
        _posterior(model, guide, args, kwargs, log_joint, single, is_placed),
    )
    if is_resumed:
        run.resume()
    return outcome(run, *run.train(), begin)


def _share_particles(objective: Objective, loss: ELBO | None, processes: Processes) -> None:
    """Gives every process its part of the particles; of a loss of the user's each takes all."""
    owner: Any = objective.loss if isinstance(objective, ELBOObjective) else objective
    if processes.count > 1 and loss is None:
        # The default depends on the seconds that a gradient takes, which differ between processes.
        num = int(processes.of_first(owner.num_particles))
        owner.num_particles = max(1, num // processes.count)


def _fit_auto(given: dict[str, Any]) -> FitResult:
    """`fit` of `guide="auto"`, from its arguments. Raises `ValueError` for another string and options of a single guide."""
    if given["guide"] != "auto":
        raise ValueError(f'guide: expected a Pyro program or "auto", got {given["guide"]!r}')
    for name in ("num_steps", "checkpoint", "loss", "scheduler"):
        if given[name] is not None:
            raise ValueError(
                f'{name}: expected None with guide="auto"; give a guide, such as AutoIAF'
            )
    if given["warm_start"] != "auto":
        raise ValueError(
            'warm_start: expected "auto" with guide="auto"; give a guide, such as AutoIAF'
        )
    options = options_of(given)
    model, args, kwargs, seed = (given[name] for name in ("model", "args", "kwargs", "seed"))

    def train(guide: Program, max_steps: int, **how: Any) -> FitResult:
        return _fit_one(
            model, guide, args, kwargs, dataclasses.replace(options, max_steps=max_steps), **how
        )

    with seeded(seed):
        return fit_enlarging(train, model, args, kwargs, given["max_steps"])


def _set_up(guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Creates the guide's parameters now, inside the seed, and without a graph; returns whether it had none before."""
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None:
        return False
    with torch.no_grad(), poutine.block():
        guide(*args, **kwargs)
    return True


def _objective(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_joint: LogJoint | None,
    loss: ELBO | None,
    options: Options,
) -> Objective:
    """The path gradient for flow guides on a log joint; otherwise the ELBO given, or one of Pyro's."""
    num_particles = options.num_particles
    if loss is not None:
        return ELBOObjective(loss, model, guide, args, kwargs)
    if log_joint is not None and isinstance(guide, AutoFlow):
        if log_joint.vectorized:
            if options.is_fixed and options.compile is True and log_joint.method == "handlers":
                nesting, num = log_joint.nesting, num_particles or PARTICLES
                stl = ImportanceWeightedELBO(1, "stl", num_bounds=num, max_plate_nesting=nesting)
                return ELBOObjective(stl, model, guide, args, kwargs)
            return PathObjective(log_joint, guide, num_particles or _affordable(log_joint))
        if num_particles != 1:
            num_particles = num_particles or PARTICLES_IN_A_LOOP
            warnings.warn(
                f"{num_particles} particles run one by one: {log_joint.vectorization_error}",
                stacklevel=3,
            )
        return PathObjective(log_joint, guide, num_particles)
    elbo = _elbo(model, guide, args, kwargs, num_particles)
    return ELBOObjective(elbo, model, guide, args, kwargs)


def _affordable(log_joint: LogJoint) -> int:
    """The default number of particles, fewer where a gradient is dear."""
    u = torch.stack([_unconstrained_start(log_joint)] * PARTICLES_OF_DEAR_MODELS)
    log_joint.value_and_gradient(u[:1])

    def timed() -> float:
        begin = time.perf_counter()
        log_joint.value_and_gradient(u)
        return time.perf_counter() - begin

    # The better of two: another process that takes the core for a moment would make a run with a seed another one.
    seconds = min(timed(), timed()) * PARTICLES / PARTICLES_OF_DEAR_MODELS
    return (
        PARTICLES
        if seconds <= DEAR_SECONDS * PARTICLES / PARTICLES_OF_DEAR_MODELS
        else PARTICLES_OF_DEAR_MODELS
    )


def _unconstrained_start(log_joint: LogJoint) -> torch.Tensor:
    return unconstrain({x.name: x.inside for x in log_joint.latents}, log_joint.latents)[0]


def _elbo(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int | None,
) -> ELBO:
    """A Pyro ELBO, with all particles at once where model and guide allow it; enumerated latents are summed out."""
    model_trace, guide_trace = traces_of(model, guide, args, kwargs)
    enumerated = any(name not in guide_trace.nodes for name, _ in latent_sites(model_trace))
    reason = None
    if num_particles != 1 and not enumerated:
        reason = vectorization_error(model, guide, args, kwargs)
    if num_particles is None:
        num_particles = 1 if enumerated else PARTICLES if reason is None else PARTICLES_IN_A_LOOP
    if reason is not None:
        warnings.warn(f"{num_particles} particles run one by one: {reason}", stacklevel=4)
    kind = TraceEnum_ELBO if enumerated else Trace_ELBO
    return kind(
        num_particles=num_particles,
        max_plate_nesting=nesting_of(model_trace, guide_trace),
        vectorize_particles=reason is None and not enumerated,
    )


def _posterior(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_joint: LogJoint | None,
    single: tuple[Any, Any],
    is_placed: bool,
) -> Posterior | None:
    """The guide's draws as a posterior; None for mini-batches, amortized guides and very many latents."""
    if log_joint is not None and isinstance(guide, AutoFlow):
        return None if log_joint.is_stochastic else FlowPosterior(log_joint, guide, is_placed)
    modules = guide.modules() if isinstance(guide, torch.nn.Module) else []
    if any(isinstance(module, AutoAmortizedFlow) for module in modules):
        return None
    sites = [site for _, site in latent_sites(single[1])]
    numbers = sum(site["value"].numel() for site in sites)
    subsampled = any(
        f.full_size not in (None, f.size)
        for trace in single
        for _, site in sample_sites(trace)
        for f in site["cond_indep_stack"]
    )
    if numbers > MAX_CHAIN_DIM or subsampled:
        return None
    return GuidePosterior(model, guide, args, kwargs)
