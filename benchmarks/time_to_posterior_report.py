"""The tables and the figure of `time_to_posterior.py`.

    python benchmarks/time_to_posterior_report.py benchmark-output/time_to_posterior.json --output benchmark-output

Prints a row a posterior, the verdicts of `fit` against the truth, and the ratios of CPU seconds, `fit` over NUTS; writes
time_to_posterior.png, CPU seconds against the largest error of a mean, one point a posterior and method. Numbers are
medians over seeds. `--references` compares again, for rows that were written before their reference was there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from time_to_posterior_problems import NAMES, errors, is_right

Row = dict[str, Any]
Cells = dict[tuple[str, str], list[Row]]
# Effective draws of the worst scalar that a posterior mean is usually reported from (Vehtari et al. 2021).
ENOUGH_DRAWS = 400
# The figure ends here: a mean off by three sds is as lost as one off by three hundred.
LARGEST_ERROR = 3.0
STYLES = {
    "fit": ("fit, AutoIAF", "C0", "o"),
    "nuts": ("NumPyro NUTS, 1000 + 1000", "C1", "s"),
    "AutoNormal": ("Pyro AutoNormal, 2000 steps", "C2", "^"),
    "AutoMultivariateNormal": ("Pyro AutoMultivariateNormal, 2000 steps", "C3", "v"),
}


def read(paths: Iterable[Path], references: Path | None) -> Cells:
    """(posterior, method) -> rows, one a seed: the last where a run was repeated."""
    known = json.loads(references.read_text()) if references else {}
    seen: dict[tuple[str, str, int], Row] = {}
    for row in (row for path in paths for row in json.loads(path.read_text())):
        if row["model"] in known and "moments" in row:
            row |= errors(row["moments"], known[row["model"]]["moments"])
            row["right"] = is_right(row)
        seen[row["model"], row["method"], row["seed"]] = row
    cells: Cells = {}
    for (model, method, _), row in seen.items():
        cells.setdefault((model, method), []).append(row)
    return cells


def short(name: str) -> str:
    """The model's name, without the data's."""
    return name.split("-", 1)[-1].split("_minnesota")[0][:32]


def median(rows: list[Row], name: str) -> float:
    """The median over seeds; NaN where no run has the number."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else math.nan


def seconds_per_400(rows: list[Row]) -> float:
    """CPU seconds for 400 effective draws of the worst scalar, compilation included."""
    values = [row["cpu"] * ENOUGH_DRAWS / row["ess"] for row in rows if row.get("ess")]
    return statistics.median(values) if values else math.nan


def ratio(fit: list[Row], nuts: list[Row]) -> float:
    """CPU seconds of `fit` over those of NUTS, medians over seeds; NaN where one of them is not there."""
    return median(fit, "cpu") / median(nuts, "cpu")


def verdicts(rows: Iterable[Row]) -> Counter[tuple[bool, bool]]:
    """(trusted, right) -> number of runs."""
    return Counter(
        (row["trusted"], row["right"]) for row in rows if {"trusted", "right"} <= set(row)
    )


def verdict_words(rows: list[Row]) -> str:
    """ "trusted", or the reason; several seeds by commas where they differ."""
    words = []
    for row in rows:
        if "failed" in row:
            words.append("failed")
        else:
            words.append("trusted" if row["trusted"] else f"no: {row['reason']}")
    return words[0] if len(set(words)) == 1 else ", ".join(words)


def number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def span(rows: list[Row]) -> str:
    """The range of the ratios of sds."""
    low, high = median(rows, "sd_low"), median(rows, "sd_high")
    return "–" if math.isnan(low) else f"{low:.2f} to {high:.2f}"


def print_posteriors(cells: Cells, names: list[str]) -> None:
    """A Markdown table with a row for each posterior."""
    print(
        "| posterior | D | fit: CPU s (wall) | verdict | worst mean error | sds | right "
        "| NUTS: CPU s (wall) | worst mean error | sds | least ESS, divergences | CPU s per 400 draws | fit / NUTS |"
    )
    print("|" + "---|" * 13)
    for name in names:
        fit, nuts = cells.get((name, "fit"), []), cells.get((name, "nuts"), [])

        def columns(rows: list[Row]) -> tuple[str, str, str]:
            cpu, wall = median(rows, "cpu"), median(rows, "wall")
            timing = "–" if math.isnan(cpu) else f"{cpu:.1f} ({wall:.0f})"
            return timing, number(median(rows, "mean_error"), ".3f"), span(rows)

        ours, theirs = columns(fit), columns(nuts)
        right = ", ".join("yes" if row["right"] else "no" for row in fit if "right" in row)
        ess, divergences = median(nuts, "ess"), median(nuts, "divergences")
        draws = "–" if math.isnan(ess) else f"{ess:.0f}, {divergences:.0f}"
        print(
            f"| {short(name)} | {(fit + nuts)[0]['dim']} | {ours[0]} | {verdict_words(fit) if fit else '–'} | {ours[1]} "
            f"| {ours[2]} | {right or '–'} | {theirs[0]} | {theirs[1]} | {theirs[2]} "
            f"| {draws} | {number(seconds_per_400(nuts), '.1f')} "
            f"| {number(ratio(fit, nuts), '.2f')} |"
        )


def print_stock(cells: Cells, names: list[str]) -> None:
    """The same for Pyro's own guides, where they were run."""
    kinds = [kind for kind in list(STYLES)[2:] if any(method == kind for _, method in cells)]
    for kind in kinds:
        print(f"\n| {kind} | CPU s | worst mean error | sds |\n|---|---|---|---|")
        for name in names:
            if rows := cells.get((name, kind)):
                print(
                    f"| {short(name)} | {number(median(rows, 'cpu'), '.1f')} "
                    f"| {number(median(rows, 'mean_error'), '.3f')} "
                    f"| {span(rows)} |"
                )


def print_summary(cells: Cells, names: list[str]) -> None:
    """Verdict against truth, and the ratios."""
    rows = [row for name in names for row in cells.get((name, "fit"), [])]
    counts = verdicts(rows)
    print("\n| `fit` | right | wrong |\n|---|---|---|")
    for trusted in (True, False):
        label = "trusted" if trusted else "not trusted"
        print(f"| {label} | {counts[trusted, True]} | {counts[trusted, False]} |")
    ratios = [ratio(cells.get((n, "fit"), []), cells.get((n, "nuts"), [])) for n in names]
    ratios = [value for value in ratios if not math.isnan(value)]
    if ratios:
        print(
            f"\nCPU seconds of fit over those of NUTS: median {statistics.median(ratios):.2f}; "
            f"{sum(value <= 1 for value in ratios)} of {len(ratios)} at most 1."
        )
    for row in rows:
        if "failed" in row:
            print(f"{short(row['model'])}, seed {row['seed']}: {row['failed']}")


def draw(cells: Cells, names: list[str]) -> Figure:
    """CPU seconds against the worst error, both logarithmic; a thin line joins `fit` and NUTS on the same posterior."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    places: dict[tuple[str, str], tuple[float, float]] = {}
    for (name, method), rows in cells.items():
        x, y = median(rows, "cpu"), median(rows, "mean_error")
        if name in names and not math.isnan(x + y):
            places[name, method] = x, min(y, LARGEST_ERROR)
    for method, (label, color, marker) in STYLES.items():
        points = {name: place for (name, kind), place in places.items() if kind == method}
        if not points:
            continue
        x, y = zip(*points.values(), strict=True)
        axes.scatter(x, y, s=34, c=color, marker=marker, label=label, alpha=0.85, zorder=3)
    for name in names:
        ends = [places.get((name, method)) for method in ("fit", "nuts")]
        if ends[0] and ends[1]:
            axes.plot(*zip(*[e for e in ends if e], strict=True), c="0.8", lw=0.8, zorder=1)
    axes.axhline(0.15, c="k", lw=0.8, ls="--")
    axes.text(0.995, 0.155, "0.15 sd", transform=axes.get_yaxis_transform(), ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("CPU seconds, compilation included")
    axes.set_ylabel("largest error of a posterior mean, reference sds")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25, which="both", lw=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of time_to_posterior.py")
    parser.add_argument("--references", type=Path, help="JSON of the plain models' moments")
    parser.add_argument("--output", type=Path, help="folder for time_to_posterior.png")
    options = parser.parse_args()
    cells = read(options.results, options.references)
    names = [name for name in NAMES if any(model == name for model, _ in cells)]
    print_posteriors(cells, names)
    print_stock(cells, names)
    print_summary(cells, names)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(cells, names).savefig(options.output / "time_to_posterior.png", dpi=130)


if __name__ == "__main__":
    main()
