"""Importance-sampling evidence of small models against its exact value.

    python benchmarks/evidence.py

fits `AutoIAF` to each model of `evidence_models.py`, weighs fresh draws of it and prints the log evidence (nats), the
exact value, their difference in standard errors, k-hat and the effective sample size. `--models` picks by number.
"""

from __future__ import annotations

import argparse
import time
import warnings

import pyro
import torch
from evidence_models import CASES, ENUMERATED, STARTS
from pyro import poutine
from pyro.infer.autoguide import init_to_median, init_to_value

import pyro_flows_ext as pf

# Rounding of a log joint of some hundred terms in float64: a perfect guide has no standard error but this.
ROUNDING = 1e-10
MAX_K_HAT, MAX_ERRORS = 0.7, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=int, default=range(len(CASES)))
    parser.add_argument("--max-steps", type=int, default=800)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    names, counts = list(CASES), {"within": 0, "off": 0, "not reliable": 0, "no evidence": 0}
    for i in options.models:
        model, exact = CASES[names[i]]()
        pyro.clear_param_store()
        begin = time.process_time()
        try:
            start = {site: torch.tensor(value) for site, value in STARTS.get(names[i], {}).items()}
            continuous = poutine.block(model, hide=ENUMERATED.get(names[i], []))
            guide = pf.AutoIAF(
                continuous, init_loc_fn=init_to_value(values=start, fallback=init_to_median)
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fitted = pf.fit(
                    model,
                    guide,
                    max_steps=options.max_steps,
                    refine=False,
                    seed=options.seed,
                    progress=False,
                )
                torch.manual_seed(options.seed + 1)
                weighed = pf.importance(model, guide, num_samples=options.draws)
        except (ValueError, FloatingPointError) as error:
            counts["no evidence"] += 1
            print(f"{i:2d} {names[i]:22s} exact {exact:.4f}, no fit: {error}", flush=True)
            continue
        error = weighed.log_evidence - exact
        errors = error / (weighed.log_evidence_se + ROUNDING)
        if weighed.k_hat >= MAX_K_HAT:
            verdict = "not reliable"
        else:
            verdict = "within" if abs(errors) <= MAX_ERRORS else "off"
        counts[verdict] += 1
        print(
            f"{i:2d} {names[i]:22s} {weighed.log_evidence:9.4f} ± {weighed.log_evidence_se:.1e}, exact {exact:9.4f}: "
            f"{errors:+5.1f} se ({verdict}), k-hat {weighed.k_hat:5.2f}, ESS {weighed.efficiency:4.0%}; "
            f"{fitted.reason}, {fitted.steps} steps, {time.process_time() - begin:.0f} s",
            flush=True,
        )
        for message in sorted({str(w.message) for w in caught}):
            print(f"   warning: {message}")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    main()
