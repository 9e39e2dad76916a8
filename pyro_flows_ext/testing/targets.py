"""Models with data of their own, and their posteriors where these are known: for the command, benchmarks and tests."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..datasets import load_data, scikit_learn_datasets
from ..distributions.energies import u1
from ..programs.data import check_keywords, meet_floats
from ..programs.errors import located

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A model with data of its own. `data()` gives the keyword arguments of `model`.

    `reference`: the posterior (mean, sd) of scalars by name, vectors as `theta[0]`, where they are known.
    """

    name: str
    model: Callable[..., Any]
    data: Callable[[], Data]
    description: str
    reference: Mapping[str, tuple[float, float]] | None = None


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred: y_j ~ N(mu + tau theta_trans_j, sigma_j)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centred: theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j); a funnel in (theta, log tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic_regression(x: Tensor, y: Tensor) -> None:
    """y_n ~ Bernoulli(σ(intercept + x_nᵀ weights)), N(0, 5) and N(0, 1) priors."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + (x * weights).sum(-1)), obs=y)


def linear_regression(x: Tensor, y: Tensor) -> None:
    """y_n ~ N(intercept + x_nᵀ weights, noise), N(0, 1) priors and a half-normal one for the noise."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + (x * weights).sum(-1), noise), obs=y)


def energy_u1() -> None:
    """log p(z) = -U1(z): a ring with two lobes, log Z = 1.8775."""
    # Masked: something to draw a start from that adds nothing to the log joint.
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([2]).to_event(1).mask(False))
    pyro.factor("minus_u1", -u1(z))


def funnel() -> None:
    """v ~ N(0, 3), x_i ~ N(0, exp(v / 2)), i = 1 ... 9; log Z = 0."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("I", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


# --- data ---


def _schools_data() -> Data:
    return {
        "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
        "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    }


def _sklearn_data(name: str, standardize_y: bool) -> Data:
    """A data set of scikit-learn with standardised columns; nothing is downloaded."""
    x, y = getattr(scikit_learn_datasets(), f"load_{name}")(return_X_y=True)
    tensors = {
        key: torch.as_tensor(value, dtype=torch.get_default_dtype())
        for key, value in {"x": x, "y": y}.items()
    }
    for key in ("x", "y") if standardize_y else ("x",):
        value = tensors[key]
        tensors[key] = (value - value.mean(0)) / value.std(0, correction=0)
    return tensors


# Mean and sd of 10,000 draws of Stan's NUTS, from posteriordb (BSD-3): eight_schools-eight_schools_noncentered.
_SCHOOLS_REFERENCE = {
    "mu": (4.411, 3.309),
    "tau": (3.602, 3.198),
    "theta[0]": (6.151, 5.616),
    "theta[1]": (4.940, 4.646),
    "theta[2]": (3.906, 5.281),
    "theta[3]": (4.796, 4.771),
    "theta[4]": (3.614, 4.615),
    "theta[5]": (4.051, 4.796),
    "theta[6]": (6.317, 5.003),
    "theta[7]": (4.884, 5.318),
}

TARGETS = {
    target.name: target
    for target in (
        Target(
            "eight-schools",
            eight_schools,
            _schools_data,
            "eight schools, non-centred; 10 latents, mild skew",
            _SCHOOLS_REFERENCE,
        ),
        Target(
            "eight-schools-centered",
            eight_schools_centered,
            _schools_data,
            "eight schools, centred; 10 latents, a funnel",
            _SCHOOLS_REFERENCE,
        ),
        Target(
            "logistic-regression",
            logistic_regression,
            lambda: _sklearn_data("breast_cancer", standardize_y=False),
            "breast cancer, 569 rows; 31 latents, strongly correlated (needs scikit-learn)",
        ),
        Target(
            "linear-regression",
            linear_regression,
            lambda: _sklearn_data("diabetes", standardize_y=True),
            "diabetes, 442 rows; 12 latents, correlated (needs scikit-learn)",
        ),
        Target(
            "u1",
            energy_u1,
            dict,
            "the energy U1 of Rezende & Mohamed (2015); 2 latents, a ring with two lobes, log Z = 1.8775",
        ),
        Target(
            "funnel",
            funnel,
            dict,
            "Neal's funnel (2003); 10 latents, log Z = 0",
            # x_i has variance E[exp(v)] = exp(9 / 2).
            {"v": (0.0, 3.0), **{f"x[{i}]": (0.0, 9.488) for i in range(9)}},
        ),
    )
}


# --- targets by name or file ---


def load_target(
    spec: str,
    data: str | Path | Mapping[str, Tensor] | None = None,
    columns: Sequence[str] | None = None,
) -> tuple[Target, Data]:
    """The target that `spec` names, built in or `path/to/file.py:model`, and its data, from the file `data` if given.

    `columns`: those of the file to take; by default all.

    Whole numbers stay whole wherever the model runs with them, and become floats where it does not: see `meet_floats`.
    A file of Python is run, as by an import: name only files that you trust. Raises `ValueError` when there is no such
    target, the file does not run, or the keys of the data do not fit the model's parameters.
    """
    target = _load_model(spec) if ".py:" in spec else _built_in(spec)
    where = "no data given" if data is None else "the data given"
    if isinstance(data, str | Path):
        where, data = f"data {str(data)!r}", load_data(data, columns)
    elif columns is not None:
        raise ValueError("columns: expected some with a file of data only; add --data")
    values = target.data() if data is None else data if isinstance(data, dict) else dict(data)
    check_keywords(f"{target.name}, {where}", target.model, values)
    return target, values if data is None else meet_floats(target.model, values)


def _built_in(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(
            f"no target {name!r}: expected one of {', '.join(TARGETS)}, or path/to/file.py:model"
        )
    return TARGETS[name]


def _load_model(spec: str) -> Target:
    file, _, attribute = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {file!r} for the target {spec!r}")
    # A name of its own, so that no installed module is shadowed; in sys.modules, as dataclasses look there.
    name = f"_pyro_flows_target_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{file!r} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as when Python runs a script
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file!r} raised {located(error)}") from error
    finally:
        sys.path.pop(0)
    model = getattr(module, attribute, None)
    if not callable(model):
        found = "nothing" if model is None else type(model).__name__
        raise ValueError(
            f"{file!r}: expected a model named {attribute!r}, a function, found {found}"
        )
    return Target(spec, model, dict, inspect.getdoc(model) or "")
