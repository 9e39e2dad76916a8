"""Steps of an optimizer on an objective, eager or compiled, with everything that a checkpoint needs."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .._adam import Adam
from .._loop import OptimFactory, SchedulerFactory
from ..compiled import CompiledTraining, UnsupportedForCompilation
from ..distributed import Processes
from .objectives import ELBOObjective, Objective
from .timing import Timing


class Trainer:
    """Updates the parameters of an objective; a step without a finite loss and gradient changes nothing.

    Args:
        objective: the loss with its gradients.
        optim: makes a torch optimizer from parameters, or a `PyroOptim`, which keeps its own rates; None for Adam.
        lr: Adam's rate.
        clip_norm: the largest joint norm of the gradients; None for no clipping.
        scheduler: makes a `torch.optim.lr_scheduler` from the optimizer, which then sets the rates.
        processes: over which gradients and losses are averaged, weighted by `objective.weight` where it has one.
    """

    def __init__(
        self,
        objective: Objective,
        optim: OptimFactory | PyroOptim | None = None,
        lr: float = 0.02,
        clip_norm: float | None = 10.0,
        scheduler: SchedulerFactory | None = None,
        processes: Processes | None = None,
    ):
        self.objective = objective
        self.processes = Processes() if processes is None else processes
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.pyro_optim = optim if isinstance(optim, PyroOptim) else None
        self.factory: OptimFactory = partial(Adam, lr=lr)
        if optim is not None and not isinstance(optim, PyroOptim):
            self.factory = optim
        self.optimizer: torch.optim.Optimizer | None = None
        self.make_scheduler = scheduler
        self.scheduler: LRScheduler | None = None
        self.base_lrs: list[float] = []
        self.params: list[Tensor] = []
        self.compiled: CompiledTraining | None = None

    def step(self, rate: float = 1.0) -> float | None:
        """The loss before the update at `rate` times the learning rate, or None where nothing was updated."""
        if self.compiled is not None:
            try:
                self._set_rates(rate)
                return self.compiled.step()
            except UnsupportedForCompilation as unsupported:
                self.compiled = None
                warnings.warn(f"fit goes on with eager steps: {unsupported}", stacklevel=6)
        value, params = self.objective()
        params = [p for p in params if p.requires_grad]
        value = self.processes.average(value, params, getattr(self.objective, "weight", 1.0))
        active = [p for p in params if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(active, self.clip_norm)
        finite = math.isfinite(value) and bool(norm.isfinite())
        if finite:
            self._update(params, rate)
        for p in params:
            p.grad = None
        return value if finite else None

    def restart(self) -> None:
        """Forgets the optimizer's averages: for a round that starts from other parameters than the last one ended at."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def _update(self, params: list[Tensor], rate: float) -> None:
        if self.pyro_optim is not None:
            self.params = params
            self.pyro_optim(params)
            return
        known = {id(p) for p in self.params}
        new = [p for p in params if id(p) not in known]  # some guides make parameters as they go
        if new:
            self.processes.copy(new)
        self.params += new
        optimizer = self.optimizer
        if optimizer is None:
            optimizer = self._make_optimizer(new)
        elif new:
            if self.scheduler is not None:
                raise ValueError(
                    f"scheduler: expected all parameters at the first step, got {len(new)} later ones, which it would "
                    "leave out; use schedule= instead"
                )
            optimizer.add_param_group({"params": new})
            self.base_lrs.append(self.base_lrs[0])
        self._set_rates(rate)
        optimizer.step()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def evaluated(self, loss: float) -> None:
        """Tells a scheduler that goes by it the loss of an evaluation."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and math.isfinite(loss):
            self.scheduler.step(loss)

    def _make_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        self.optimizer = optimizer = self.factory(params)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        if self.make_scheduler is not None:
            self.scheduler = self.make_scheduler(optimizer)
        return optimizer

    def _set_rates(self, rate: float) -> None:
        if self.optimizer is not None and self.scheduler is None:
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * rate

    # --- states ---

    def state(self) -> dict[str, Any]:
        """The parameters and the optimizer's state, as tensors and plain values."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        params = [p.detach().clone() for p in self.params]
        return {"params": params, "optimizer": optimizer, "scheduler": scheduler}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any], params: list[Tensor] | None = None) -> None:
        """Restores `state()` of a trainer of the same objective. Raises `ValueError` where the parameters do not fit.

        `params`: those of the objective, which is evaluated once to find them where it is None.
        """
        if self.pyro_optim is not None:
            raise ValueError("optim: expected a torch optimizer for a checkpoint, got a PyroOptim")
        if params is None:
            with torch.enable_grad():
                _, params = self.objective()
        params = [p for p in params if p.requires_grad]
        for p in params:
            p.grad = None
        if not state["params"]:  # of a run that was stopped before its first step
            return
        shapes = [tuple(p.shape) for p in params], [tuple(p.shape) for p in state["params"]]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"checkpoint: expected parameters of shapes {shapes[0]}, got {shapes[1]}; the model or guide has changed"
            )
        for p, saved in zip(params, state["params"], strict=True):
            p.copy_(saved)
        if state["optimizer"] is not None:
            self.params = params
            self._make_optimizer(params).load_state_dict(state["optimizer"])
        if state["scheduler"] is not None and self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    # --- compiled steps ---

    def compile(self, timing: Timing) -> None:
        """Compiles the steps to come; where that is not possible they stay eager, with a warning if it was asked for."""
        objective, optim = self.objective, self.pyro_optim or self.optimizer
        try:
            if self.processes.count > 1:
                raise UnsupportedForCompilation("gradients are averaged over processes")
            if not isinstance(objective, ELBOObjective):
                raise UnsupportedForCompilation("the loss is no Pyro ELBO")
            if optim is None:
                raise UnsupportedForCompilation("no step has been taken yet")
            self.compiled = CompiledTraining(
                objective.loss,
                objective.model,
                objective.guide,
                objective.args,
                objective.kwargs,
                params=objective.named,
                optim=optim,
                clip_norm=self.clip_norm,
            )
        except UnsupportedForCompilation as unsupported:
            if timing.when is True:
                warnings.warn(f"fit takes eager steps: {unsupported}", stacklevel=5)
