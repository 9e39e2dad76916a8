"""Guides against reference posteriors, at one setting for all of them.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/posteriors.py --output benchmark-output
    PYRO_FLOWS_DATA=path/to/data python benchmarks/posteriors.py --targets arK --guides sylvester nsf --seeds 1

Every guide is fitted with the defaults of `fit`; Pyro's own guides get the same number of steps and particles, plain (Adam,
.01 to .001) and tuned (ClippedAdam, .1 to .001). From 10,000 draws it reports k-hat, the effective sample size, the ELBO,
and by scalar of the reference the error of the mean in reference sds and the ratio of sds: the largest of each, raw and
after importance resampling. A run passes with ESS >= .3, k-hat < .7, raw mean errors <= .15 and sd ratios in [.85, 1.15].
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from targets import TARGETS, Target, load

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoIAF, AutoNSF, AutoPlanar, AutoRealNVP, AutoSylvester
from pyro_flows_ext.infer import FitResult, fit
from pyro_flows_ext.transforms import planar

GUIDES: dict[str, Callable[..., Any]] = {
    "sylvester": AutoSylvester,
    "nsf": AutoNSF,
    "realnvp": AutoRealNVP,
    "iaf": AutoIAF,
    "planar": AutoPlanar,
}
STOCK: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, num_transforms=2),
    "AutoNormalizingFlow": lambda model: AutoNormalizingFlow(
        model, lambda D: planar(D, num_layers=16)
    ),
}
NUM_DRAWS, NUM_PARTICLES = 10_000, 64


def run(target: Target, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Fits one guide to one target and weighs 10,000 draws of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in GUIDES:
            guide = GUIDES[name](target.model)
            result = fit(
                target.model, guide, *target.args, num_steps=steps, seed=seed, progress=False
            )
        else:
            kind, tuned = name.split()
            with default_dtype(torch.float64):
                guide = STOCK[kind](target.model)
                result = fit_stock(target, guide, tuned == "tuned", seed, steps)
        seconds = time.perf_counter() - start
        pyro.set_rng_seed(1000 + seed)
        weighed = importance(guide, target.model, *target.args, num_samples=NUM_DRAWS)
    row: dict[str, Any] = {
        "target": target.name,
        "guide": name,
        "seed": seed,
        "start": result.warm_start.name if result.warm_start else None,
        "k_hat": weighed.k_hat,
        "ess": weighed.efficiency,
        "elbo": weighed.elbo,
        "log_evidence": weighed.log_evidence,
        "seconds": seconds,
    }
    row |= compare(target, weighed.samples, "")
    if math.isfinite(weighed.k_hat):
        row |= compare(target, weighed.resample(), "_resampled")
    row["passes"] = bool(
        row["ess"] >= 0.3
        and row["k_hat"] < 0.7
        and row["mean_error"] <= 0.15
        and 0.85 <= row["sd_ratio_low"] <= row["sd_ratio_high"] <= 1.15
    )
    return row


def fit_stock(target: Target, guide: Any, tuned: bool, seed: int, steps: int) -> FitResult:
    """One of Pyro's guides by its own loss, and the rate that falls as stated above.

    Its flows make their parameters in torch's default dtype, whatever the model's.
    """
    lr = 0.1 if tuned else 0.01
    if tuned:
        optim: Any = pyro.optim.ClippedAdam(
            {"lr": lr, "lrd": (0.001 / lr) ** (1 / steps), "clip_norm": 10.0}
        )
    else:
        optim = None
    return fit(
        target.model,
        guide,
        *target.args,
        num_steps=steps,
        num_particles=NUM_PARTICLES,
        lr=lr,
        final_lr=0.001 / lr,
        optim=optim,
        schedule="exponential",
        seed=seed,
        progress=False,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_nuts(target: Target, seed: int) -> dict[str, Any]:
    """500 draws of NUTS after 500 of warm-up: how long they take, and how far off their means are."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    mcmc = MCMC(NUTS(target.model), num_samples=500, warmup_steps=500, disable_progbar=True)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(*target.args)
    row = {"target": target.name, "guide": "NUTS", "seed": seed}
    return row | {"seconds": time.perf_counter() - start} | compare(target, mcmc.get_samples(), "")


def compare(target: Target, samples: dict[str, torch.Tensor], suffix: str) -> dict[str, float]:
    """The largest errors over the scalars of the reference."""
    reference, errors, ratios = target.reference, [], []
    for name, draws in target.quantities(samples).items():
        mean, sd = reference.mean[name], reference.sd[name]
        errors.append(abs(draws.mean().item() - mean) / sd)
        ratios.append(draws.std().item() / sd)
    return {
        f"mean_error{suffix}": max(errors, key=lambda e: e if math.isfinite(e) else math.inf),
        f"sd_ratio_low{suffix}": min(ratios),
        f"sd_ratio_high{suffix}": max(ratios),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['target'][:34]:34s} {row['guide'][:30]:30s} {row['seed']}  k-hat {row['k_hat']:5.2f}  "
        f"ESS {row['ess']:4.0%}  ELBO {row['elbo']:10.3f}  mean {row['mean_error']:7.3f}  "
        f"sd {row['sd_ratio_low']:5.2f} to {row['sd_ratio_high']:5.2f}  "
        f"resampled {row.get('mean_error_resampled', math.nan):5.3f}  {row['seconds']:5.0f} s  "
        f"{'pass' if row['passes'] else '    '}  {row['start'] or ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stock = [f"{name} {how}" for name in STOCK for how in ("plain", "tuned")]
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--guides", nargs="+", choices=[*GUIDES, *stock], default=["sylvester"])
    parser.add_argument("--stock", action="store_true", help="Pyro's own guides too")
    parser.add_argument("--nuts", action="store_true", help="only NUTS, 500 + 500, and its seconds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="folder for posteriors.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in TARGETS if any(part in name for part in options.targets)]
    if options.nuts:
        for target in map(load, names):
            row = run_nuts(target, 0)
            print(
                f"{target.name}: {row['seconds']:.0f} s, mean error {row['mean_error']:.3f}",
                flush=True,
            )
        return
    rows = []
    for target in map(load, names):
        for guide in options.guides + (stock if options.stock else []):
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                try:
                    row = run(target, guide, seed, options.steps)
                except (FloatingPointError, ValueError, RuntimeError, NotImplementedError) as error:
                    print(f"{target.name} {guide} {seed}: {type(error).__name__}: {error}")
                    continue
                rows.append(row)
                show(row)
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    (options.output / "posteriors.json").write_text(json.dumps(rows, indent=1))
    for guide in dict.fromkeys(row["guide"] for row in rows):
        mine = [row for row in rows if row["guide"] == guide]
        print(
            f"{guide}: {sum(row['passes'] for row in mine)} of {len(names) * options.seeds} pass; median ESS "
            f"{statistics.median(row['ess'] for row in mine):.0%}, {sum(r['seconds'] for r in mine):.0f} s"
        )


if __name__ == "__main__":
    main()
