"""The table and the figure of `posteriors.py`.

    python benchmarks/posteriors_report.py benchmark-output/posteriors.json --output benchmark-output

Prints a row a guide, and a row a posterior for the first guide; writes posteriors.png: by posterior and guide the share of
10,000 draws that count after weighting, and the largest error of a mean in reference sds, medians over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Row = dict[str, Any]
Cells = dict[tuple[str, str], list[Row]]
# Past these the colours end: a mean off by three sds is as lost as one off by three hundred.
WORST_ESS, WORST_ERROR, BEST_ERROR = 0.01, 3.0, 0.01


def median(rows: list[Row], name: str) -> float:
    """The median over seeds, NaN where there is nothing."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else math.nan


def print_guides(cells: Cells, targets: list[str], guides: list[str]) -> None:
    """A Markdown table with a row for each guide."""
    print(
        "| guide | passes | ESS >= .3 and k-hat < .7 | median ESS | median mean error | median seconds |"
    )
    print("|---|---|---|---|---|---|")
    for guide in guides:
        rows = [row for target in targets for row in cells[target, guide]]
        trusted = sum(row["ess"] >= 0.3 and row["k_hat"] < 0.7 for row in rows)
        print(
            f"| {guide} | {sum(row['passes'] for row in rows)} of {len(rows)} | {trusted} | {median(rows, 'ess'):.0%} | "
            f"{median(rows, 'mean_error'):.3f} | {median(rows, 'seconds'):.0f} |"
        )


def print_targets(cells: Cells, targets: list[str], guide: str) -> None:
    """A Markdown table with a row for each posterior, a number a seed."""
    print(
        f"\n{guide}\n\n| posterior | k-hat | ESS | mean error | sd ratio | resampled | seconds | passes |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for target in targets:
        rows = cells[target, guide]

        def show(name: str, form: str, rows: list[Row] = rows) -> str:
            return ", ".join(format(row.get(name, math.nan), form) for row in rows)

        low, high = (
            min((r["sd_ratio_low"] for r in rows), default=math.nan),
            max((r["sd_ratio_high"] for r in rows), default=math.nan),
        )
        print(
            f"| {target} | {show('k_hat', '.2f')} | {show('ess', '.0%')} | {show('mean_error', '.3f')} | "
            f"{low:.2f} to {high:.2f} | {show('mean_error_resampled', '.3f')} | {show('seconds', '.0f')} | "
            f"{', '.join('yes' if row['passes'] else 'no' for row in rows)} |"
        )


def draw(cells: Cells, targets: list[str], guides: list[str]) -> Figure:
    """Two maps, posteriors by guides: effective sample size, and error of the mean."""
    ess, error = (
        np.array([[median(cells[t, g], name) for g in guides] for t in targets])
        for name in ("ess", "mean_error")
    )
    figure = Figure(
        figsize=(3.2 + 0.95 * len(guides), 1.6 + 0.3 * len(targets)), layout="constrained"
    )
    left, right = figure.subplots(1, 2, sharey=True)
    span = math.log10(WORST_ERROR) - math.log10(BEST_ERROR)
    panels = (
        (left, "effective sample size, share of the draws", ess, ".0%", 1 - np.log10(np.clip(ess, WORST_ESS, 1)) / -2),
        (right, "largest error of a mean, reference sds", error, ".2f",
         1 - (np.log10(np.clip(error, BEST_ERROR, WORST_ERROR)) - math.log10(BEST_ERROR)) / span),
    )  # fmt: skip
    for axes, title, values, form, shade in panels:
        axes.imshow(shade, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if math.isnan(value):
                text = "–"
            else:
                text = format(value, form) if value < 100 else f"{value:.0e}"
            dark = shade[i, j] < 0.15 or shade[i, j] > 0.85  # neither where nothing was run
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(guides)), guides, rotation=35, ha="right", fontsize=8)
        axes.set_yticks(range(len(targets)), targets, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of posteriors.py")
    parser.add_argument("--output", type=Path, help="folder for posteriors.png")
    options = parser.parse_args()
    cells: Cells = defaultdict(list)
    seen: dict[tuple[str, str, int], Row] = {}  # of a run that was repeated, the last
    for row in (row for path in options.results for row in json.loads(path.read_text())):
        seen[row["target"], row["guide"], row["seed"]] = row
    for row in seen.values():
        row["target"] = row["target"].split("-", 1)[-1][:26]  # the model's name, without the data's
        row["guide"] = {"iaf": "AutoIAF"}.get(row["guide"], row["guide"])
        cells[row["target"], row["guide"]].append(row)
    targets, guides = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    print_guides(cells, targets, guides)
    print_targets(cells, targets, guides[0])
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(cells, targets, guides).savefig(options.output / "posteriors.png", dpi=130)


if __name__ == "__main__":
    main()
