"""`pyro-flows density` and `score`: learn the density of rows of numbers, and score rows by it."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from ..datasets import Rows, Split, load_rows, split_rows, table_bytes
from ..diagnostics import pit, plots_density, rank_histogram
from ..diagnostics.scores import Comparison, compare_to_gaussian, mean_and_se, score
from ..diagnostics.summary import print_table
from ..distributions import Density, Dequantized
from ..flows import FLOWS
from ..infer import DensityFitResult, fit_density
from ..results import SavedDensity, density_to_bytes, load
from .failures import failing_with
from .output import CHECKPOINT, Output, json_bytes, png_bytes

# Test rows below which ranks show nothing.
MIN_CALIBRATION = 50


@dataclass(frozen=True)
class Learned:
    """A trained density, how training went, and how the test rows score."""

    rows: Rows
    split: Split
    flow: str
    num_layers: int | None
    result: DensityFitResult
    scores: Comparison

    @property
    def density(self) -> Any:
        """The density."""
        return self.result.density


def density_command(args: argparse.Namespace, output: Output) -> None:
    """Trains a density, and writes it with its scores and pictures."""
    pyro.set_rng_seed(args.seed)
    with failing_with(2, ValueError, TypeError, OSError):
        rows = load_rows(
            args.target,
            num_rows=args.rows,
            seed=args.seed,
            key=args.key,
            columns=args.columns,
            context=args.context,
        )
        density = _density(rows, args)
        split = Split(*(part.reshape(density.event_shape) for part in split_rows(rows, args.seed)))
        _check_varies(rows, split, density)
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        result = _train(split, density, args)
    if not output.is_mine:
        return
    with failing_with(1, Exception):
        learned = _scored(rows, split, result, args)
        report = summary(learned, args)
        content = density_to_bytes(density, rows.columns, rows.context_columns or None, rows.name)
        output.save({"density.pt": content, "density.json": json_bytes(report)})
    output.add("samples.png", lambda: _samples_png(learned))
    is_real = rows.image_shape is None and not isinstance(density, Dequantized)
    if is_real and len(split.test) >= MIN_CALIBRATION:
        output.add("calibration.png", lambda: _calibration_png(learned))
    output.add("loss.png", lambda: png_bytes(plots_density.loss(result)))
    written = {"files": output.written, "not_written": output.failed}
    output.add("density.json", lambda: json_bytes({**report, **written}))
    if not result.interrupted:
        (args.output / CHECKPOINT).unlink(missing_ok=True)
    if not args.quiet:
        print_learned(learned)
        print(f"wrote {', '.join(output.written)} to {args.output}")
    if result.interrupted:
        raise KeyboardInterrupt


def score_command(args: argparse.Namespace, output: Output) -> None:
    """Writes the log densities of the rows of a file, by a density that an earlier run wrote."""
    pyro.set_rng_seed(args.seed)
    with failing_with(2, ValueError, TypeError, OSError):
        saved = load(args.directory)
        if not isinstance(saved, SavedDensity):
            raise ValueError(f"{str(args.directory)!r}: expected a density, found a guide")
        is_table = not args.data.lower().endswith(".npz")
        rows = load_rows(
            args.data,
            key=args.key,
            columns=saved.columns if is_table else None,
            context=saved.context_columns if is_table else None,
            min_rows=1,
        )
        values = rows.values.reshape(len(rows.values), *saved.density.event_shape)
    with failing_with(1, RuntimeError, ValueError):
        found = score(saved.density, values, args.particles, rows.context)
        content = table_bytes(args.suffix, {"log_density": found.values.numpy()})
        output.save({args.file: content})
    mean = f"{found.mean:.3f}" if len(values) == 1 else str(found)
    print(f"{mean} nats a row ({found.known}); wrote {len(values)} log densities to {args.output / args.file}")  # fmt: skip


def _train(split: Split, density: Density, args: argparse.Namespace) -> DensityFitResult:
    train, validation = split.train, split.validation
    return fit_density(
        density,
        train.values,
        train.context,
        validation=(validation.values, validation.context),
        # Angles have units of their own.
        standardize="auto" if args.flow == "circular-nsf" else True,
        batch_size=args.batch_size,
        num_steps=args.steps,
        lr=args.lr,
        patience=args.patience,
        seed=args.seed,
        checkpoint=args.output / CHECKPOINT if args.checkpoint or args.resume else None,
        resume=args.resume,
        progress=not args.quiet and sys.stderr.isatty(),  # a log would fill with bars
    )


def _scored(
    rows: Rows, split: Split, result: DensityFitResult, args: argparse.Namespace
) -> Learned:
    contexts = [part.context for part in split if part.context is not None]
    scores = compare_to_gaussian(
        result.density, [part.values for part in split], contexts or None, args.particles
    )
    num_layers = args.num_layers or FLOWS[args.flow].num_layers
    return Learned(rows, split, args.flow, num_layers, result, scores)


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
    options: dict[str, Any] = {"num_layers": args.num_layers}
    if rows.context is not None:
        if not flow.takes_context:
            raise ValueError(
                f"--context: expected a flow that takes one, such as nsf, got {args.flow}"
            )
        options["context_dim"] = rows.context.shape[-1]
    density = flow(event_shape, **options)
    dequantize, num_levels = args.dequantize, rows.num_levels
    if dequantize is None:
        dequantize = "no" if num_levels is None else "uniform"
    if dequantize == "no":
        return density
    if rows.context is not None:
        raise ValueError(
            "--dequantize: expected no --context; in Python, fit_density(Dequantized(flow), rows, context) trains such a density"
        )
    if num_levels is None:
        if not ((rows.values == rows.values.round()) & (rows.values >= 0)).all():
            raise ValueError(
                f"--dequantize {dequantize}: expected whole numbers from 0 on, got others"
            )
        num_levels = int(rows.values.max()) + 1
    # Without logits, which would pull the ends of the range, where most pixels are, far out.
    return Dequantized(density, dequantize, num_levels=num_levels, logit_alpha=None)


def _check_varies(rows: Rows, split: Split, density: Density) -> None:
    if isinstance(density, Dequantized):
        return
    values, names = split.train.values.flatten(1), rows.columns
    if split.train.context is not None:
        values, names = torch.cat([values, split.train.context], 1), names + rows.context_columns
    constant = (values == values[0]).all(0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(names[i] for i in constant[:5])
        raise ValueError(
            f"{rows.name}: {len(constant)} of {values.shape[1]} columns are constant in the training rows, and have no "
            f"density: {shown}{' ...' if len(constant) > 5 else ''}; leave them out, or --dequantize whole numbers"
        )


# --- pictures ---


def _samples_png(learned: Learned) -> bytes:
    rows, parts = learned.rows, learned.split[::-1]
    contexts = [part.context for part in parts if part.context is not None]
    figure = plots_density.samples(
        learned.density,
        torch.cat([part.values for part in parts]).flatten(1),
        rows.columns,
        context=torch.cat(contexts) if contexts else None,
        image_shape=rows.image_shape,
        verdict=learned.scores.verdict,
        trusted=learned.scores.is_better,
    )
    return png_bytes(figure)


def _calibration_png(learned: Learned) -> bytes:
    test = learned.split.test
    result = pit(learned.density, test.values, test.context, columns=learned.rows.columns)
    return png_bytes(rank_histogram(result).flat[0].figure)


# --- what came of it ---


def summary(learned: Learned, args: argparse.Namespace) -> dict[str, Any]:
    """Settings and results, for a file."""
    result, scores, density = learned.result, learned.scores, learned.density
    is_dequantized = isinstance(density, Dequantized)
    names = ("steps", "batch_size", "lr", "patience", "seed")
    outcome = ("best_step", "steps", "first_steps", "stopped_early", "skipped_steps", "seconds")
    return {
        "target": learned.rows.name,
        "status": "unfinished" if result.interrupted else "finished",
        "columns": list(learned.rows.columns),
        "context": list(learned.rows.context_columns),
        "flow": learned.flow,
        "num_layers": learned.num_layers,
        "event_shape": list(density.event_shape),
        "dequantize": density.kind if is_dequantized else "no",
        "num_levels": density.num_levels if is_dequantized else None,
        "num_parameters": _num_parameters(density),
        "rows": {name: len(part) for name, part in learned.split._asdict().items()},
        "settings": {name: getattr(args, name) for name in names},
        "test_log_likelihood": scores.test.as_dict(),
        "gaussian_log_likelihood": scores.baseline.as_dict(),
        "gain_over_gaussian": dict(zip(("mean", "se"), scores.gain, strict=True)),
        "entropy": learned.rows.entropy,
        "validation_loss": result.best_loss,
        **{name: getattr(result, name) for name in outcome},
    }


def print_learned(learned: Learned) -> None:
    """A table of test log-likelihoods, and how training went."""
    rows, result, scores = learned.rows, learned.result, learned.scores
    test, baseline = scores.test, scores.baseline
    size = rows.values.shape[1]
    layers = "" if learned.num_layers is None else f", {learned.num_layers} transforms"
    lines = [
        [learned.flow + layers, str(test), mean_and_se(*scores.gain), test.known],
        ["Gaussian", str(baseline), "", baseline.known],
    ]
    if rows.entropy is not None:
        lines.append(["the best there is", f"{-rows.entropy:.3f}", "", "minus the entropy"])
    train, validation, _ = map(len, learned.split)
    given = f" given {', '.join(rows.context_columns)}" if rows.context_columns else ""
    title = f"{rows.name}, log-likelihood of {len(test.values)} test rows of {size}{given}"
    print_table(title, "density", ["nats a row", "over the Gaussian", "known"], lines)
    if isinstance(learned.density, Dequantized):
        bits, last = -test.mean / (size * math.log(2)), learned.density.num_levels - 1
        print(f"{bits:.3f} bits a number at most, of whole numbers 0 to {last}")
    networks = f", the first {result.first_steps} of the networks alone," if result.first_steps else ""  # fmt: skip
    print(
        f"{result.steps} steps{networks} on {train} rows in {result.seconds:.1f} s, "
        f"{_num_parameters(learned.density)} parameters; kept are those of step {result.best_step}, "
        f"the best on {validation} validation rows"
    )
    if result.stopped_early and not result.interrupted:
        print("Stopped early: the validation rows fitted no better for a while.")
    if not scores.is_better:
        print(f"No better than the Gaussian, to two standard errors: {_cure(learned)}.")


def _cure(learned: Learned) -> str:
    if learned.num_layers is None:
        return "it is linear, and so a Gaussian itself"
    steps = "" if learned.result.stopped_early else "more steps, "
    return f"take {steps}fewer layers or more data"


def _num_parameters(density: Density) -> int:
    return sum(p.numel() for p in density.parameters())
