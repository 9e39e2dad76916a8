"""`pyro-flows density`: learn the density of rows of numbers, and say how well rows that it has not seen fit it."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ..datasets import Rows, Split, load_rows, split_rows
from ..diagnostics import plots_density
from ..diagnostics.scores import Score, gaussian, score, standard_error
from ..diagnostics.summary import print_table
from ..distributions import Density, Dequantized
from ..flows import FLOWS
from ..infer import DensityFitResult, fit_density
from ..results import density_to_bytes
from .failures import failing_with
from .output import Output, json_bytes, png_bytes


@dataclass(frozen=True)
class Learned:
    """A trained density, how training went, and how the test rows score by it and by a Gaussian."""

    rows: Rows
    split: Split
    flow: str
    num_layers: int | None
    result: DensityFitResult
    test: Score
    baseline: Score

    @property
    def gain(self) -> tuple[float, float]:
        """Nats a row over the Gaussian, row by row, and their standard error."""
        gain = self.test.values - self.baseline.values
        return gain.mean().item(), standard_error(gain)

    @property
    def is_better(self) -> bool:
        """Whether it fits better than the Gaussian, to two standard errors."""
        return self.gain[0] >= 2 * self.gain[1]


def density_command(args: argparse.Namespace, output: Output) -> None:
    """Trains a density, and writes it with its scores and pictures."""
    pyro.set_rng_seed(args.seed)
    with failing_with(2, ValueError, TypeError, OSError):
        rows = load_rows(
            args.target, num_rows=args.rows, seed=args.seed, key=args.key, columns=args.columns
        )
        density = _density(rows, args)
        shaped = [
            part.reshape(len(part), *density.event_shape)
            for part in split_rows(rows.values, args.seed)
        ]
        split = Split(*shaped)
        if not isinstance(density, Dequantized):
            _check_varies(rows, split.train.flatten(1))
    with failing_with(1, Exception):
        learned = _learn(rows, split, density, args)
        report = summary(learned, args)
        output.save(
            {
                "density.pt": density_to_bytes(density, rows.columns, target=rows.name),
                "density.json": json_bytes(report),
            }
        )
    shuffled = torch.cat([split.test, split.validation, split.train]).flatten(1)
    output.add("samples.png", lambda: _samples_png(learned, shuffled))
    output.add("loss.png", lambda: png_bytes(plots_density.loss(learned.result)))
    written = {"files": output.written, "not_written": output.failed}
    output.add("density.json", lambda: json_bytes({**report, **written}))
    if not args.quiet:
        print_learned(learned)
        print(f"wrote {', '.join(output.written)} to {args.output}")


def _samples_png(learned: Learned, data: Tensor) -> bytes:
    rows, gain = learned.rows, learned.gain
    verdict = f"{_with_se(*gain)} nats a row over the Gaussian, on test rows"
    figure = plots_density.samples(
        learned.result.density,
        data,
        rows.columns,
        image_shape=rows.image_shape,
        verdict=verdict if learned.is_better else f"No better than the Gaussian: {verdict}",
        trusted=learned.is_better,
    )
    return png_bytes(figure)


def _learn(rows: Rows, split: Split, density: Density, args: argparse.Namespace) -> Learned:
    result = fit_density(
        density,
        split.train,
        validation=split.validation,
        standardize=True,
        batch_size=args.batch_size,
        num_steps=args.steps,
        lr=args.lr,
        patience=args.patience,
        seed=args.seed,
        progress=not args.quiet and sys.stderr.isatty(),  # a log would fill with bars
    )
    test = score(density, split.test, args.particles)
    num_particles = test.num_particles or args.particles  # an estimate has the bound of one draw
    num_levels = density.num_levels if isinstance(density, Dequantized) else None
    by_moments = gaussian(split.train, split.validation, num_levels)
    baseline = score(by_moments, split.test.flatten(1), num_particles)
    num_layers = args.num_layers or FLOWS[args.flow].num_layers
    return Learned(rows, split, args.flow, num_layers, result, test, baseline)


# --- what is asked for ---


def _density(rows: Rows, args: argparse.Namespace) -> Density:
    """The density that the arguments and the rows call for."""
    flow = FLOWS[args.flow]
    event_shape: tuple[int, ...] = tuple(rows.values.shape[1:])
    if flow.of_images:
        if rows.image_shape is None:
            raise ValueError(
                f"--flow {args.flow}: expected images (C, H, W), got rows of {event_shape[0]} numbers"
            )
        event_shape = rows.image_shape
    density = flow(event_shape, num_layers=args.num_layers)
    dequantize, num_levels = args.dequantize, rows.num_levels
    if dequantize is None:
        dequantize = "no" if num_levels is None else "uniform"
    if dequantize == "no":
        return density
    if num_levels is None:
        if not ((rows.values == rows.values.round()) & (rows.values >= 0)).all():
            raise ValueError(
                f"--dequantize {dequantize}: expected whole numbers from 0 on, got others"
            )
        num_levels = int(rows.values.max()) + 1
    # Without logits, which would pull the ends of the range, where most pixels are, far out.
    return Dequantized(density, dequantize, num_levels=num_levels, logit_alpha=None)


def _check_varies(rows: Rows, train: Tensor) -> None:
    constant = (train == train[0]).all(0).nonzero().flatten().tolist()
    if constant:
        names = ", ".join(rows.columns[i] for i in constant[:5])
        raise ValueError(
            f"{rows.name}: {len(constant)} of {train.shape[1]} columns are constant in the training rows, and have no "
            f"density: {names}{' ...' if len(constant) > 5 else ''}; leave them out, or --dequantize whole numbers"
        )


# --- what came of it ---


def summary(learned: Learned, args: argparse.Namespace) -> dict[str, Any]:
    """Settings and results, for a file."""
    result, gain = learned.result, learned.gain
    density = result.density
    dequantized = density if isinstance(density, Dequantized) else None
    return {
        "target": learned.rows.name,
        "flow": args.flow,
        "num_layers": learned.num_layers,
        "event_shape": list(density.event_shape),
        "dequantize": "no" if dequantized is None else dequantized.kind,
        "num_levels": None if dequantized is None else dequantized.num_levels,
        "num_parameters": _num_parameters(density),
        "rows": {name: len(part) for name, part in learned.split._asdict().items()},
        "settings": {
            name: getattr(args, name) for name in ("steps", "batch_size", "lr", "patience", "seed")
        },
        "test_log_likelihood": learned.test.as_dict(),
        "gaussian_log_likelihood": learned.baseline.as_dict(),
        "gain_over_gaussian": {"mean": gain[0], "se": gain[1]},
        "entropy": learned.rows.entropy,
        "validation_loss": result.best_loss,
        "best_step": result.best_step,
        "steps": result.steps,
        "first_steps": result.first_steps,
        "stopped_early": result.stopped_early,
        "skipped_steps": result.skipped_steps,
        "seconds": result.seconds,
    }


def print_learned(learned: Learned) -> None:
    """A table of test log-likelihoods, and how training went."""
    rows, result, test = learned.rows, learned.result, learned.test
    layers = learned.num_layers
    name = learned.flow + ("" if layers is None else f", {layers} transforms")
    baseline = learned.baseline
    lines = [
        [name, _with_se(test.mean, test.se), _with_se(*learned.gain), _kind(test)],
        ["Gaussian", _with_se(baseline.mean, baseline.se), "", _kind(baseline)],
    ]
    if rows.entropy is not None:
        lines.append(["the best there is", f"{-rows.entropy:.3f}", "", "minus the entropy"])
    columns = ["nats a row", "over the Gaussian", "known"]
    train, validation, _ = map(len, learned.split)
    title = f"{rows.name}, log-likelihood of {len(test.values)} test rows of {rows.values.shape[1]}"
    print_table(title, "density", columns, lines)
    if isinstance(result.density, Dequantized):
        bits = -test.mean / (rows.values.shape[1] * math.log(2))
        print(
            f"{bits:.3f} bits a number at most, of whole numbers 0 to {result.density.num_levels - 1}"
        )
    networks = f", the first {result.first_steps} of the networks alone," if result.first_steps else ""  # fmt: skip
    print(
        f"{result.steps} steps{networks} on {train} rows in {result.seconds:.1f} s, "
        f"{_num_parameters(result.density)} parameters; kept are those of step {result.best_step}, "
        f"the best on {validation} validation rows"
    )
    if result.stopped_early:
        print("Stopped early: the validation rows fitted no better for a while.")
    if not learned.is_better:
        print(f"No better than the Gaussian, to two standard errors: {_cure(learned)}.")


def _cure(learned: Learned) -> str:
    if learned.num_layers is None:
        return "it is linear, and so a Gaussian itself"
    steps = "" if learned.result.stopped_early else "more steps, "
    return f"take {steps}fewer layers or more data"


def _kind(value: Score) -> str:
    if value.kind == "bound":
        return f"a lower bound, {value.num_particles} draw{'s' if value.num_particles != 1 else ''}"
    return {"exact": "exactly", "estimate": "an unbiased estimate"}[value.kind]


def _with_se(mean: float, se: float) -> str:
    return f"{mean:.3f} ± {se:.3f}"


def _num_parameters(density: Density) -> int:
    return sum(p.numel() for p in density.parameters())
