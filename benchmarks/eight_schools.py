"""Eight schools against the gold-standard posterior of posteriordb.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/eight_schools.py --seeds 3

fits the non-centred model with a flow guide (and `AutoNormal` beside it) at the settings `fit` has by default, and
prints the largest error of a posterior mean over mu, tau and theta in reference standard deviations, from 20,000 draws.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pyro
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoIAF, AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import fit
from pyro_flows_ext.testing.targets import TARGETS

GUIDES = {
    "iaf": AutoIAF,
    "sylvester": AutoSylvester,
    "planar": AutoPlanar,
    "normal": AutoNormal,
}


def reference() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation of each parameter, from posteriordb."""
    root = os.environ.get("PYRO_FLOWS_DATA")
    name = "eight_schools-eight_schools_noncentered"
    if root is None or not (Path(root) / "posteriordb" / name).is_dir():
        sys.exit(f"set PYRO_FLOWS_DATA to the folder that holds posteriordb/{name} (now: {root!r})")
    path = Path(root) / "posteriordb" / name / "summary.json"
    summary = json.loads(path.read_text())["parameters"]
    return {
        key: tuple(
            torch.tensor(
                [summary[f"theta[{i}]"][which] for i in range(1, 9)]
                if key == "theta"
                else summary[key][which]
            )
            for which in ("mean", "sd")
        )
        for key in ("mu", "tau", "theta")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--guides", nargs="+", choices=GUIDES, default=["iaf", "sylvester", "normal"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth, target = reference(), TARGETS["eight-schools"]
    data = target.data()
    for name in options.guides:
        for seed in range(options.seeds):
            pyro.clear_param_store()
            guide = GUIDES[name](target.model)
            result = fit(target.model, guide, **data, seed=seed, progress=False)
            torch.manual_seed(seed)
            weighed = importance(guide, target.model, **data, num_samples=20_000)
            draws = dict(weighed.samples)
            draws["theta"] = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_trans"]
            errors = {
                key: ((draws[key].mean(0) - mean).abs() / sd).max().item()
                for key, (mean, sd) in truth.items()
            }
            shown = ", ".join(f"{key} {error:.3f}" for key, error in errors.items())
            print(
                f"{name:10s} seed {seed}: k-hat {weighed.k_hat:.2f}, ESS {weighed.efficiency:.0%}, "
                f"ELBO {weighed.elbo:.3f} ± {weighed.elbo_se:.3f}, mean errors in sd: {shown}; "
                f"{result.seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
