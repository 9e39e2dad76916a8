"""`fit`: train a guide, watch it, and come back with numbers rather than hope."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim
from torch import Tensor

from ..guides import AutoFlow
from ..programs import Program, nonfinite_ignored, plate_nesting, vectorization_error
from ._loop import MAX_BAD_STEPS, OptimFactory, check_settings, decay, seeded, warn_of_skipped
from .compiled.arguments import Call, parameters_met
from .compiled.refusal import Refusal
from .compiled.training import CompiledTraining, Timing
from .compiled.updates import Owner, owner_in
from .importance import ImportanceWeightedELBO
from .warm_start import WarmStart
from .warm_start import warm_start as find_warm_start

# Windows of this share of the run, in its middle and at its end, are compared for convergence. The last two would
# not do: a rate that falls to nothing levels any loss.
WINDOW = 0.1


@dataclass(frozen=True)
class FitResult:
    """What came of a training run. `losses` are the negative bounds of every step, in nats (NaN where skipped).

    `elbo` ± `elbo_se` is the mean bound over the last tenth of the run, while the parameters still move a little;
    `diagnostics.importance` estimates it afresh. `converged` says that the bound rose by less than `tolerance` nats,
    or not significantly, from the tenth in the middle of the run to the last one: that more steps would change
    little, not that the guide is right. `seconds` counts the warm start too. `compiled`: whether the last steps were.
    """

    losses: Tensor
    elbo: float
    elbo_se: float
    converged: bool
    steps: int
    skipped_steps: int
    seconds: float
    guide: Program = field(repr=False)
    warm_start: WarmStart | None = field(repr=False, default=None)
    compiled: bool = False


def fit(
    model: Program,
    guide: Program,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_steps: int = 2000,
    lr: float = 0.02,
    num_particles: int | None = None,
    loss: ELBO | None = None,
    optim: OptimFactory | PyroOptim | None = None,
    schedule: str = "cosine",
    final_lr: float = 0.01,
    clip_norm: float | None = 10.0,
    tolerance: float = 0.1,
    warm_start: bool | str = "auto",
    compile: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains `guide` on `model(*args, **model_kwargs)` by stochastic gradient ascent on the bound.

    By default the ELBO with `num_particles` particles in one pass, or one by one, with a warning, where model or guide
    does not vectorise (None: 64 in one pass, which takes little longer than 16, and 8 one by one). An `AutoFlow` with an
    exact density is trained by path gradients (`ImportanceWeightedELBO` of one particle, "stl"), whose noise vanishes as
    the guide nears the posterior; a step takes up to three times as long, where the flow inverts by sweeps. Other guides
    get Pyro's `Trace_ELBO`, whose gradient is the quieter one far from the posterior. `loss` is any Pyro ELBO, and then
    decides about particles.

    Adam's rate falls from `lr` to `final_lr * lr` (`schedule`: "cosine", "exponential" or "constant"); `optim` makes a
    torch optimizer from parameters, or is a `PyroOptim` and then decides about rates. Gradients are clipped to
    `clip_norm` jointly.

    `warm_start`: whether to whiten the guide first by the best of several Gaussians (see `infer.warm_start`), so that
    the flow trains on what they leave. "auto" does so for an `AutoFlow` that this call sets up: one that was set up
    before may have been whitened or trained already.

    `compile`: whether steps run in a compiled graph, with the same numbers to rounding: see docs/compiled.md. "auto" does
    so where the eager steps that are left would take more than a minute, as compiling takes 10 to 40 seconds. What does
    not compile is trained eagerly, with a warning for True.

    A step whose loss or gradient is not finite changes nothing and is counted. `seed` makes the run reproducible,
    initial parameters included where the guide has none yet, and leaves the global generators as they were.

    Raises `ValueError` for arguments out of range and `FloatingPointError` after 100 steps in a row without a finite
    gradient.
    """
    particles = 1 if num_particles is None else num_particles
    check_settings(lr, schedule, num_steps=num_steps, num_particles=particles)
    for name, value in (("warm_start", warm_start), ("compile", compile)):
        if value not in (True, False, "auto"):
            raise ValueError(f'{name}: expected True, False or "auto", got {value!r}')
    kwargs = dict(model_kwargs or {})
    with seeded(seed):
        start = time.perf_counter()
        is_new = _set_up(guide, args, kwargs)
        begun = None
        why_not = functools.cache(lambda: vectorization_error(model, guide, args, kwargs))
        if warm_start is True or (warm_start == "auto" and is_new and isinstance(guide, AutoFlow)):
            begun = find_warm_start(model, guide, *args, model_kwargs=kwargs)  # type: ignore[arg-type]
        if loss is None:
            loss = _elbo(model, guide, args, kwargs, num_particles, why_not)
        timing = Timing(num_steps, compile)
        trainer = _Trainer(model, guide, args, kwargs, loss, clip_norm, timing)
        trainer.use(optim, lr, decay(schedule, num_steps, final_lr))
        losses, skipped = _run(trainer, num_steps, progress)
        seconds = time.perf_counter() - start
    warn_of_skipped(skipped, num_steps)
    elbo, elbo_se, converged = _verdict(losses, tolerance)
    return FitResult(
        losses=losses,
        elbo=elbo,
        elbo_se=elbo_se,
        converged=converged,
        steps=num_steps,
        skipped_steps=skipped,
        seconds=seconds,
        guide=guide,
        warm_start=begun,
        compiled=trainer.compiled is not None,
    )


class _Trainer:
    """Loss, gradient and update of one step."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Any,  # an ELBO; its abstract base does not declare loss_and_grads
        clip_norm: float | None,
        timing: Timing,
    ):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.loss, self.clip_norm = loss, math.inf if clip_norm is None else clip_norm
        self.known: dict[int, Tensor] = {}
        self.compiled: CompiledTraining | None = None
        self.timing, self.updates = timing, 0

    def use(
        self, optim: OptimFactory | PyroOptim | None, lr: float, decay: Callable[[int], float]
    ) -> None:
        """Decides who updates the parameters."""
        self.pyro_optim = optim if isinstance(optim, PyroOptim) else None
        if optim is None:

            def factory(params: Iterable[Tensor]) -> torch.optim.Optimizer:
                return torch.optim.Adam(params, lr=lr)

        else:
            factory = optim  # type: ignore[assignment]
        self.factory, self.decay = factory, decay
        self.optimizer: torch.optim.Optimizer | None = None
        self.base_lrs: list[float] = []
        self.count = 0

    def step(self) -> float | None:
        """The loss before the update, or None (and no update) if it or its gradient is not finite."""
        if self.timing.is_due(self.updates):
            self._compile()
        if self.compiled is not None:
            try:
                self._set_rates()
                value = self.compiled.step()
                self.count += 1
                return value
            except Refusal as refusal:
                self._go_on_eagerly(refusal)
        return self._eager_step()

    def _eager_step(self) -> float | None:
        with parameters_met() as self.params:
            value = self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
        params = list({id(p): p for p in self.params.values()}.values())
        active = [p for p in params if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(active, self.clip_norm)
        finite = math.isfinite(value) and bool(norm.isfinite())
        if finite:
            self._update(params)
            self.updates += 1
        for p in params:
            p.grad = None
        self.count += 1
        return float(value) if finite else None

    def _update(self, params: list[Tensor]) -> None:
        if self.pyro_optim is not None:
            self.pyro_optim(params)
            return
        new = [
            p for p in params if id(p) not in self.known
        ]  # some guides make parameters as they go
        self.known.update({id(p): p for p in new})
        if self.optimizer is None:
            self.optimizer = self.factory(new)
            self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        elif new:
            self.optimizer.add_param_group({"params": new})
            self.base_lrs.append(self.base_lrs[0])
        self._set_rates()
        self.optimizer.step()

    def _set_rates(self) -> None:
        if self.optimizer is not None:
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * self.decay(self.count)

    # --- compiled steps ---

    def _compile(self) -> None:
        call = Call(self.loss, self.model, self.guide, self.args, self.kwargs)
        try:
            self.compiled = CompiledTraining(call, self.params, self._owner_of, self.clip_norm)
        except Refusal as refusal:
            self._go_on_eagerly(refusal)

    def _owner_of(self, p: Tensor) -> Owner:
        if self.pyro_optim is not None:
            return owner_in(self.pyro_optim, p)
        if self.optimizer is None:
            raise Refusal("no step has been taken yet")
        [group] = [g for g in self.optimizer.param_groups if any(q is p for q in g["params"])]
        return Owner(self.optimizer, group)

    def _go_on_eagerly(self, refusal: Refusal) -> None:
        self.compiled = None
        if self.timing.when is True:
            warnings.warn(f"fit takes eager steps: {refusal}", stacklevel=5)


def _run(trainer: _Trainer, num_steps: int, progress: bool) -> tuple[Tensor, int]:
    """The losses of all steps, NaN for those that were skipped, and how many these are."""
    losses = torch.full((num_steps,), math.nan, dtype=torch.float64)
    bad, skipped = 0, 0
    for step in _progress(num_steps, losses, progress):
        with _quietly(first=step == 0):
            value = trainer.step()
        if value is not None:
            bad, losses[step] = 0, value
            continue
        bad, skipped = bad + 1, skipped + 1
        if bad == MAX_BAD_STEPS:
            raise FloatingPointError(
                f"no finite loss and gradient in {bad} steps in a row (up to step {step + 1}): check the model for values "
                "outside a support, lower lr, or start closer with init_loc_fn and init_scale"
            )
    return losses, skipped


def _set_up(guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Creates the guide's parameters now, inside the seed, and without a graph; whether it had none before."""
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None:
        return False
    with torch.no_grad(), poutine.block():
        guide(*args, **kwargs)
    return True


def _elbo(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int | None,
    why_not: Callable[[], str | None],
) -> ELBO:
    reason = None if num_particles == 1 else why_not()
    if num_particles is None:
        num_particles = 64 if reason is None else 8
    if reason is not None:
        warnings.warn(f"{num_particles} particles run one by one: {reason}", stacklevel=3)
    options: dict[str, Any] = {
        "max_plate_nesting": plate_nesting(model, guide, args, kwargs),
        "vectorize_particles": reason is None,
    }
    if isinstance(guide, AutoFlow) and guide.exact_log_prob:
        return ImportanceWeightedELBO(1, "stl", num_bounds=num_particles, **options)
    return Trace_ELBO(num_particles=num_particles, **options)


def _progress(num_steps: int, losses: Tensor, show: bool) -> Iterator[int]:
    if not show:
        yield from range(num_steps)
        return
    from tqdm.auto import tqdm

    with tqdm(total=num_steps, desc="fit", unit="step") as bar:
        for step in range(num_steps):
            yield step
            bar.update()
            if step % 50 == 49:
                recent = losses[max(0, step - 99) : step + 1]
                bar.set_postfix_str(f"ELBO {-recent.nanmean().item():.3f}", refresh=False)


def _verdict(losses: Tensor, tolerance: float) -> tuple[float, float, bool]:
    """Mean and standard error of the bound over the last window, and whether it is level with the middle one."""
    size, middle = max(1, int(WINDOW * len(losses))), len(losses) // 2
    mean, se = _mean_and_se(losses[-size:])
    before, before_se = _mean_and_se(losses[middle : middle + size])
    noise = 2 * math.hypot(se, before_se)
    # Comparisons with NaN are False: an estimate that is not there is not level.
    return -mean, se, before - mean <= tolerance + noise


def _mean_and_se(window: Tensor) -> tuple[float, float]:
    window = window[window.isfinite()]
    if len(window) < 2:
        return (window.mean().item() if len(window) else math.nan), math.inf
    return window.mean().item(), (window.std() / len(window) ** 0.5).item()


@contextmanager
def _quietly(first: bool) -> Iterator[None]:
    """Leaves Pyro's checks to the first step, which sees every shape there is: they cost a third of a step.

    Its warning of a loss that is not finite is left out, since such steps are skipped and counted.
    """
    with nonfinite_ignored():
        if first:
            yield
        else:
            with pyro.validation_enabled(False):
                yield
