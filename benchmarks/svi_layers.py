"""What compiling a stack of equal layers costs: its graph as traced, and with layers computed at once.

    python benchmarks/svi_layers.py --layers 4 8 16 32 --output benchmark-output

Eight schools, Pyro's planar or radial layers in `AutoNormalizingFlow`, single steps of Adam. Columns: operations of the
graph; seconds to compile it, with an empty cache each time (what Inductor finds out about the machine, once, is not
counted); milliseconds a step, medians over rounds in which both run in turn; and the ratios of merged to flat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions.transforms import iterated, planar, radial
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from svi import schools, take
from torch._inductor.utils import fresh_cache

from pyro_flows_ext.infer import CompiledSVI
from pyro_flows_ext.infer.compiled import program, tracing

KINDS = {"planar": planar, "radial": radial}
MERGE, COMPILE = tracing.merge_layers, program._compile


def compiled(
    model: Any, guide: Any, kwargs: Any, is_merged: bool
) -> tuple[CompiledSVI, dict[str, Any]]:
    """Steps of a model and a guide, and what it took to compile them."""
    facts: dict[str, Any] = {}

    def timed(graph: Any, *rest: Any) -> Any:
        facts["operations"] = sum(node.op == "call_function" for node in graph.graph.nodes)
        start = time.perf_counter()
        run = COMPILE(graph, *rest)
        facts["compile s"] = time.perf_counter() - start
        return run

    tracing.merge_layers = MERGE if is_merged else lambda graph, _: graph
    program._compile = timed
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with fresh_cache():
        take(svi, (), kwargs, 2)
    return svi, facts


def measure(kind: str, count: int, rounds: int, steps: int) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, _, kwargs = schools()
    guide = AutoNormalizingFlow(model, partial(iterated, count, KINDS[kind]))
    variants = {
        name: compiled(model, guide, kwargs, name == "merged") for name in ("flat", "merged")
    }
    times = [
        {name: take(svi, (), kwargs, steps) for name, (svi, _) in variants.items()}
        for _ in range(rounds)
    ]
    row: dict[str, Any] = {"layer": kind, "layers": count}
    for name, (_, facts) in variants.items():
        row[name] = facts | {"ms": statistics.median(t[name] for t in times)}
    row["ms merged / flat"] = statistics.median(t["merged"] / t["flat"] for t in times)
    row["compile s merged / flat"] = row["merged"]["compile s"] / row["flat"]["compile s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="folder for svi_layers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.compile(torch.sin)(torch.ones(2))  # lets Inductor look at the machine
    rows = []
    for kind in options.kinds:
        for count in options.layers:
            rows.append(row := measure(kind, count, options.rounds, options.steps))
            print(json.dumps(row, default=str), flush=True)
            if options.output is not None:
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / "svi_layers.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
