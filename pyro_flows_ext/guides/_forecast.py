"""Guides of `pyro.contrib.forecast`: latents of the training period, whatever the period of the forecast."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from pyro.poutine.messenger import unwrap


def training_arguments(
    model: Any, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a `ForecastingModel` with covariates as long as its data; those of other models as they are.

    A `Forecaster` calls its guide with covariates of the period to forecast, and extends the draws by those of the prior.
    """
    module = sys.modules.get("pyro.contrib.forecast.forecaster")
    if module is not None:
        model = unwrap(model)
        model = getattr(model, "fn", model)  # of poutine.reparam
        if isinstance(model, module.ForecastingModel):
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
            data, covariates = bound.arguments["data"], bound.arguments["covariates"]
            bound.arguments["covariates"] = covariates[..., : data.shape[-2], :]
            return bound.args, bound.kwargs
    return tuple(args), dict(kwargs)
