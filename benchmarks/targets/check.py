"""Every model against its reference: Stein's identities at the reference draws, and the time of an evaluation.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/targets/check.py

For draws u of p, unconstrained, and scores s = grad log p(u): E[s] = 0 and E[(u - c) s] = -1 in every coordinate. The
table has the largest |z| of each over the coordinates; one of 4 or more fails. `by hand` is the largest relative difference
to a log-density written out again; `ms` the best time of a log joint with gradient at 64 particles, in one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions.constraints import real

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pyro_flows_ext.programs import vectorization_error
from targets import TARGETS, Target, load
from targets.by_hand import largest_difference

LARGEST_Z = 4.0
LARGEST_DIFFERENCE = 1e-9  # relative


def stein(target: Target) -> tuple[Tensor, Tensor] | None:
    """z-scores of E[s] = 0 and of E[(u - c) s] = -1, `(dim)` each, at the reference draws; None where there are none.

    The draws count as independent, which those of posteriordb are, thinned.
    """
    parameters = target.reference.parameters
    if parameters is None:
        return None
    u = target.unconstrain(target.from_parameters(parameters))
    score = torch.cat([target.score(part)[1] for part in u.split(500)])

    def z_score(terms: Tensor) -> Tensor:
        return terms.mean(0) / (terms.std(0) / len(terms) ** 0.5)

    return z_score(score), z_score((u - u.mean(0)) * score + 1)


def points(target: Target, num: int) -> dict[str, Tensor]:
    """Latent samples for timing: reference draws, or around the reference means where there are no draws."""
    parameters = target.reference.parameters
    if parameters is not None:
        return {k: v[:num] for k, v in target.from_parameters(parameters).items()}
    generator = torch.Generator().manual_seed(0)
    samples = {}
    for name, site in target.sites.items():
        shape, support = site["value"].shape, site["fn"].support
        names = [name] if not shape else [f"{name}[{i + 1}]" for i in range(*shape)]
        mean, sd = (
            torch.tensor([moment[name] for name in names], dtype=torch.float64).reshape(shape)
            for moment in (target.reference.mean, target.reference.sd)
        )
        noise = torch.randn(num, *shape, dtype=torch.float64, generator=generator)
        is_real = getattr(support, "base_constraint", support) is real
        samples[name] = mean + sd * noise if is_real else mean * (sd / mean * noise).exp()
    return samples


def milliseconds(target: Target, num_particles: int = 64, repeats: int = 20) -> float:
    """Best wall time of the log joint with its gradient."""
    u = target.unconstrain(points(target, num_particles))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.score(u)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def why_not(target: Target) -> str | None:
    """Why particles do not run in one pass, or with numbers other than float64; None if all is well."""
    pyro.clear_param_store()
    guide = AutoNormal(target.model)
    guide(*target.args)
    for name, value in guide.median(*target.args).items():
        if value.dtype != torch.float64:
            return f"{name} is {value.dtype}"
    return vectorization_error(target.model, guide, target.args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="names; all if none")
    names = parser.parse_args().targets or list(TARGETS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'target':45s} {'dim':>4s} {'z of E[s]':>10s} {'z of E[us]':>10s} {'by hand':>9s} {'ms':>7s}"
    )
    failures = []
    for name in names:
        target = load(name)
        z = stein(target)
        largest = None if z is None else [v.abs().max().item() for v in z]
        difference = largest_difference(target, points(target, 200))
        shown = ["-", "-"] if largest is None else [f"{v:.1f}" for v in largest]
        by_hand = "-" if difference is None else f"{difference:.0e}"
        print(
            f"{name:45s} {target.dim:4d} {shown[0]:>10s} {shown[1]:>10s} {by_hand:>9s} {milliseconds(target):7.1f}",
            flush=True,
        )
        if target.log_density.dim != target.dim:
            failures.append(f"{name}: the model has another number of latents than the reference")
        if largest is not None and not max(largest) < LARGEST_Z:
            failures.append(f"{name}: Stein's identities, |z| = {max(largest):.1f}")
        if difference is not None and not difference < LARGEST_DIFFERENCE:
            failures.append(f"{name}: differs from the density by hand by {difference:.1e}")
        if (reason := why_not(target)) is not None:
            failures.append(f"{name}: {reason}")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
