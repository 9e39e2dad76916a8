"""`Target`: a model, its data, and what is known of its posterior."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows_ext.programs import LogJoint

Samples = Mapping[str, Tensor]


def data_root() -> Path:
    """The folder named by PYRO_FLOWS_DATA, which holds `posteriordb/` and `inference_gym/`.

    Raises `FileNotFoundError` when the variable is not set or the folder lacks them.
    """
    root = os.environ.get("PYRO_FLOWS_DATA")
    missing = [
        part
        for part in ("posteriordb", "inference_gym")
        if not root or not (Path(root) / part).is_dir()
    ]
    if root is None or missing:
        raise FileNotFoundError(
            "set PYRO_FLOWS_DATA to the folder that holds posteriordb/ and inference_gym/ "
            f"(now: {root!r}, without {' and '.join(missing)})"
        )
    return Path(root)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file as tensors, floating point ones in float64."""
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def flatten(parameters: Samples) -> dict[str, Tensor]:
    """Parameter -> `(N, *shape)` as scalars -> `(N)`, named as Stan does: `theta[1]`, from one."""
    scalars: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if value.dim() == 1:
            scalars[name] = value
            continue
        for index in np.ndindex(*value.shape[1:]):
            label = ",".join(str(i + 1) for i in index)
            scalars[f"{name}[{label}]"] = value[(slice(None),) + index]  # noqa: RUF005
    return scalars


@dataclass(frozen=True)
class Reference:
    """The posterior by somebody else's sampler. `mean` and `sd` by scalar; `parameters`: name -> `(N, *shape)` draws.

    `parameters` is None where no draws are at hand. `origin` says whose they are: means and draws may differ in it.
    """

    mean: Mapping[str, float]
    sd: Mapping[str, float]
    parameters: Samples | None
    origin: str

    @cached_property
    def draws(self) -> dict[str, Tensor] | None:
        """The draws by scalar, `(N)` each."""
        return None if self.parameters is None else flatten(self.parameters)


def _identity(samples: Samples) -> Samples:
    return samples


@dataclass(frozen=True)
class Target:
    """`model(*args)` with `dim` unconstrained latents, and its posterior by `reference`.

    `to_parameters` takes samples (latent site -> `(N, *shape)`, constrained) to the parameters of the reference, and
    `from_parameters` back: the identity, but where the reference parametrises in another way.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    dim: int
    reference: Reference
    to_parameters: Callable[[Samples], Samples] = field(default=_identity, repr=False)
    from_parameters: Callable[[Samples], Samples] = field(default=_identity, repr=False)

    def quantities(self, samples: Samples) -> dict[str, Tensor]:
        """Latent site -> `(N, *shape)`, constrained, as the scalars of the reference -> `(N)`."""
        flat = flatten(self.to_parameters(samples))
        return {name: flat[name] for name in self.reference.mean}

    # --- the density over unconstrained space, where the reference draws can be put to the test ---

    @cached_property
    def sites(self) -> dict[str, Any]:
        """The latent sites of one run of the model, in its order."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
            trace = poutine.trace(self.model).get_trace(*self.args)
        return {
            name: site
            for name, site in trace.iter_stochastic_nodes()
            if not site_is_subsample(site)
        }

    @cached_property
    def log_density(self) -> LogJoint:
        """log p(x, constrain(u)) + log |dconstrain/du|, `(N, dim)` -> `(N)`, in one pass; -inf where it is NaN."""
        return LogJoint(self.model, self.args)

    def unconstrain(self, samples: Samples) -> Tensor:
        """Latent site -> `(N, *shape)` as `(N, dim)`, by `biject_to` of each site's support."""
        parts = [
            biject_to(site["fn"].support).inv(samples[name]) for name, site in self.sites.items()
        ]
        return torch.cat([part.reshape(len(part), -1) for part in parts], -1)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """The inverse of `unconstrain`."""
        return self.log_density.constrain(u)[0]

    def score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`log_density` `(N)` and its gradient `(N, dim)`, both detached."""
        u = u.detach().requires_grad_()
        value = self.log_density(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient
