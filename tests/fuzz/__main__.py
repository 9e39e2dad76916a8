"""Generated calls: each gives a right answer or an error of the package.

    python -m tests.fuzz --calls 10000 --seed 0
    python -m tests.fuzz --only transform:1234        one call again, with its traceback

A call is drawn from its kind and number alone, so that every failure is reproducible. Counts by kind are printed:
right, refused (an error that this package raises on purpose, or one of the model, with its line in the traceback), foreign (an error of another package, or of a kind that
is no answer) and wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import pyro
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from .calls import CALLS

OURS = (ValueError, TypeError, FloatingPointError, NotImplementedError)


def run_one(function, number: int) -> tuple[str, str]:
    """The outcome of a call, and what was wrong."""
    seed = number * 1_000_003 + len(function.__name__)
    pyro.set_rng_seed(seed % 2**31)
    pyro.clear_param_store()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            fault = function(random.Random(seed))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = frames[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            ours = "pyro_flows_ext" in last.filename and isinstance(error, OURS)
            # An error of the model or of a network given to a density, with its line in the traceback.
            users = ("densities.py", "catalogue.py")
            ours = ours or any(
                frame.name == "_model"
                or (frame.name == "forward" and frame.filename.endswith(users))
                for frame in frames
            )
            # Pyro's own checks of a model's shapes and values name the site and the way out.
            by_pyro = (
                "within the support",
                "invalid log_prob shape",
                "not broadcastable with batch",
            )
            ours = ours or any(text in str(error) for text in by_pyro)
            return (
                "refused" if ours else "foreign",
                f"{type(error).__name__} at {where}: {str(error)[:150]}",
            )
    return ("right", "") if fault is None else ("wrong", fault)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kind:number, one call with its traceback")
    parser.add_argument("--show", type=int, default=5, help="examples of each fault")
    args = parser.parse_args()
    kinds = {function.__name__: function for function in CALLS}
    if args.only:
        name, number = args.only.split(":")
        seed = int(number) * 1_000_003 + len(name)
        pyro.set_rng_seed(seed % 2**31)
        print(kinds[name](random.Random(seed)) or "right")
        return 0
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    faults: dict[str, list[str]] = defaultdict(list)
    total = sum(CALLS.values())
    for function, share in CALLS.items():
        name = function.__name__
        for i in range(max(1, args.calls * share // total)):
            number = args.seed * 1_000_000 + i
            outcome, what = run_one(function, number)
            counts[name][outcome] += 1
            if outcome in ("foreign", "wrong"):
                faults[f"{name}, {outcome}: {what.split(':')[0]}"].append(
                    f"--only {name}:{number}  {what}"
                )
        print(name, dict(counts[name]), flush=True)
    for fault, examples in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(examples)} x {fault}")
        print("\n".join(f"    {example}" for example in examples[: args.show]))
    bad = sum(c["foreign"] + c["wrong"] for c in counts.values())
    print(f"\n{sum(map(Counter.total, counts.values()))} calls, {bad} faults")
    return bool(bad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
