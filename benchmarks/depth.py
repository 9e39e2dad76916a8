"""Depth and conditioning of coupling flows, after Koehler, Mehta & Risteski (2021) and Behrmann et al. (2021).

    python benchmarks/depth.py --study linear padding invertibility three modes --seeds 3 --output out

linear: how many affine couplings of one fixed partition make a random linear map. padding: condition number and
sample quality of a RealNVP on data padded with nothing, zeros or noise. invertibility: Lipschitz constants and float32
round trips of three families while they learn a target in two pieces. three: three couplings that approach a target,
and their smallest singular value. modes: KL to k modes on a sphere by the number of couplings. Prints a table for each, and writes the numbers
(JSON) and a figure (PNG).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import depth_invertibility
import depth_linear
import depth_modes
import depth_padding
import depth_three


def linear(seeds: int, quick: bool, picture: Path) -> list[dict]:
    rows = depth_linear.run(seeds, quick)
    depth_linear.draw(rows, picture)
    return rows


def padding(seeds: int, quick: bool, picture: Path) -> list[dict]:
    rows, samples = depth_padding.run(seeds, quick)
    depth_padding.draw(rows, samples, picture)
    return rows


def invertibility(seeds: int, quick: bool, picture: Path) -> list[dict]:
    rows = depth_invertibility.run(seeds, quick)
    depth_invertibility.draw(rows, picture)
    return rows


def three(seeds: int, quick: bool, picture: Path) -> list[dict]:
    rows = depth_three.run(seeds, quick)
    depth_three.draw(rows, picture)
    return rows


def modes(seeds: int, quick: bool, picture: Path) -> list[dict]:
    rows = depth_modes.run(seeds, quick)
    depth_modes.draw(rows, picture)
    return rows


STUDIES = {
    "linear": linear,
    "padding": padding,
    "invertibility": invertibility,
    "three": three,
    "modes": modes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: a smoke test")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.study:
        start, cpu = time.perf_counter(), time.process_time()
        picture = options.output / f"depth_{name}.png"
        rows = STUDIES[name](options.seeds, options.quick, picture)
        (options.output / f"depth_{name}.json").write_text(json.dumps(rows, indent=2))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{name}: {seconds:.0f} s, {cpu:.0f} s of CPU time, {picture}\n", flush=True)


if __name__ == "__main__":
    main()
