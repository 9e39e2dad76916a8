"""Where a guide begins: Gaussians from several recipes, the one of the highest ELBO taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..programs import LogJoint, Program
from .gaussian import Gaussian, climb, fit_gaussian, laplace, pathfinder

# L-BFGS starts: the guide's own location, and this many less one around it (as wide as Stan's).
NUM_PATHS, PATH_SPREAD = 4, 2.0
# Draws behind the ELBO of a candidate: the standard error is then about .1 sd of the log weights.
NUM_DRAWS = 128
# Above this many latents a full-rank scale has more entries than short runs can learn.
MAX_FULL_RANK = 150


@dataclass(frozen=True)
class WarmStart:
    """A Gaussian N(loc, L Lᵀ) in unconstrained space: `name` says which recipe it came from, `elbos` what each was worth.

    `elbos` are in nats, from 128 draws; -inf for a Gaussian that reaches where the model has no density.
    """

    name: str
    elbos: dict[str, float]
    loc: Tensor = field(repr=False)
    scale_tril: Tensor = field(repr=False)


def warm_start(
    model: Program,
    guide: AutoFlow,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
) -> WarmStart:
    """Finds a Gaussian near the posterior and whitens `guide` with it, so that the flow trains on what is left.

    Candidates are the guide's start as it is; a short mean-field run; the Laplace approximation at every mode that four
    L-BFGS runs find (one where the model does not vectorise), and the best Gaussian along each run (Pathfinder); then a
    short run with a full-rank scale (a diagonal one above 150 latents) in the coordinates of the best so far. The
    highest ELBO wins. No single one does everywhere: modes of funnels lie where there is no mass, and gradient runs do
    not reach badly scaled posteriors.

    Sets the guide up where it is not. Under a subsampled plate, where the log joint is random, only the gradient runs
    are made. Raises `TypeError` for a guide that cannot be whitened, `ValueError` when no candidate has a finite ELBO.
    Cost: about 2000 evaluations of the model with 32 particles, and as many single ones.
    """
    if not isinstance(guide, AutoFlow):
        raise TypeError(
            f"guide: expected an AutoFlow, which can be whitened, got a {type(guide).__name__}"
        )
    kwargs = dict(model_kwargs or {})
    if guide.prototype_trace is None:
        guide.setup(*args, **kwargs)
    target = LogJoint(model, args, kwargs, latents=guide._latents())
    start = guide.whitening
    search = _Search(target, Gaussian(start.loc.clone(), start.scale_tril.clone()))
    search.run()
    name, best = search.best()
    guide.whiten(best.loc, best.scale_tril)
    return WarmStart(name=name, elbos=search.elbos, loc=best.loc, scale_tril=best.scale_tril)


class _Search:
    """Candidates and their ELBOs, over the same draws."""

    def __init__(self, target: LogJoint, start: Gaussian):
        self.target, self.start = target, start
        like = start.loc
        self.noise = torch.randn(NUM_DRAWS, len(like), dtype=like.dtype, device=like.device)
        self.elbos: dict[str, float] = {}
        self.found: dict[str, Gaussian] = {}

    def add(self, name: str, candidate: Gaussian | None) -> None:
        if candidate is not None:
            self.found[name] = candidate
            self.elbos[name] = candidate.elbo(self.target, self.noise)

    def run(self) -> None:
        target, D = self.target, len(self.start.loc)
        num_particles = 32 if target.vectorized else 4
        self.add("start", self.start)
        # In the model's own coordinates: in those of a narrow start it could not go far.
        unit = Gaussian(self.start.loc, torch.eye(D).to(self.start.loc))
        mean_field = fit_gaussian(
            target,
            unit,
            full_rank=False,
            num_steps=400,
            num_particles=num_particles,
            initial_scale=0.1,
        )
        self.add("mean-field", mean_field)
        if not target.is_stochastic:
            self.climb_all()
        name, best = self.best()
        if self.elbos[name] == -math.inf:
            raise ValueError(
                "warm_start: no candidate has a finite ELBO; check the model for values outside a support, or give "
                "init_loc_fn a point and init_scale a scale at which its log joint is finite"
            )
        full_rank = D <= MAX_FULL_RANK
        refined = fit_gaussian(
            target,
            best,
            full_rank=full_rank,
            num_steps=600,
            num_particles=num_particles,
        )
        self.add("full-rank" if full_rank else "diagonal", refined)

    def climb_all(self) -> None:
        loc = self.start.loc
        for i in range(NUM_PATHS if self.target.vectorized else 1):
            spread = PATH_SPREAD * (2 * torch.rand_like(loc) - 1) if i else torch.zeros_like(loc)
            points, gradients = climb(self.target, loc + spread)
            if len(points) > 1:
                self.add(f"pathfinder {i}", pathfinder(self.target, points, gradients))
                self.add(f"laplace {i}", laplace(self.target, points[-1]))

    def best(self) -> tuple[str, Gaussian]:
        """The candidate of the highest ELBO, and its name.

        Where every ELBO is that of another part of the data they do not compare, and it is the last one that has any.
        """
        names = [name for name in self.elbos if self.elbos[name] > -math.inf] or list(self.elbos)
        name = names[-1] if self.target.is_stochastic else max(names, key=self.elbos.__getitem__)
        return name, self.found[name]
