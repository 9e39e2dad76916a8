"""The table and the figure of `svi.py`.

    python benchmarks/svi_report.py benchmark-output/*/svi.json --output docs/figures

Prints the machines and a Markdown table with a row for each model, guide and number of particles: milliseconds a step by
column, and the ratios that matter; a dash where a column was not run, failed, or has no such guide. Writes svi.png: the same
times on a logarithmic axis, a panel for each number of particles.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
MODELS = {
    "schools": "eight schools",
    "logistic": "logistic 1000 x 50",
    "radon": "radon-like",
    "vae": "VAE on digits",
}
GUIDES = {
    "normal": "AutoNormal",
    "mvn": "AutoMultivariateNormal",
    "pyro-iaf": "Pyro's IAF x 2",
    "pyro-planar": "Pyro's planar x 8",
    "iaf": "AutoIAF",
    "planar": "AutoPlanar x 16",
    "sylvester": "AutoSylvester x 4",
    "nsf": "AutoNSF",
    "cif": "AutoCIF",
    "encoder": "its encoder",
}
# column -> heading, colour, marker; ours are filled, NumPyro's open.
COLUMNS = {
    "SVI": ("Pyro SVI", "#7f7f7f", "s"),
    "jit": ("Pyro Jit", "#bcbd22", "D"),
    "eager": ("graph, interpreted", "#ff9f40", "o"),
    "compiled": ("compiled", "#d62728", "o"),
    "several": ("compiled, {size} steps a call", "#7b1fa2", "o"),
    "numpyro": ("NumPyro update", "#1f77b4", "^"),
    "scan": ("NumPyro scan", "#17a2a2", "v"),
}
RATIOS = {
    "SVI / compiled": "SVI / compiled",
    "compiled / numpyro": "compiled / NumPyro update",
    "several / scan": "several / scan",
}


def number(value: float | None, ratio: bool = False) -> str:
    """Three figures at most, in the places that matter."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if ratio or value >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if text.startswith("0.") else text


def print_machines(reports: list[dict[str, Any]]) -> None:
    """What the runs had in common, and the command of each."""
    for report in reports:
        print(f"`{report['command']}`")
    keys = ("machine", "cpus", "threads", "rounds", "versions", "versions of the other environment")
    for facts in dict.fromkeys(json.dumps({k: r[k] for k in keys}) for r in reports):
        print(facts)
    loads = ", ".join(f"{r['load at the start']:.1f}" for r in reports)
    print(f"load at the start: {loads}\n")


def print_table(rows: list[Row], sizes: set[int]) -> None:
    """A Markdown table of milliseconds a step, and ratios."""
    names = [heading(name, sizes) for name in COLUMNS]
    headings = ["model", "guide", "particles", *names, *RATIOS.values()]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        cells = [MODELS[row["model"]], guide_name(row), str(row["particles"])]
        cells += [number(row.get(name)) for name in COLUMNS]
        cells += [number(row.get(name), ratio=True) for name in RATIOS]
        print(f"| {' | '.join(cells)} |")


def heading(column: str, sizes: set[int]) -> str:
    return COLUMNS[column][0].format(size=" or ".join(map(str, sorted(sizes))))


def guide_name(row: Row) -> str:
    return GUIDES[row["guide"]]


def draw(rows: list[Row], sizes: set[int]) -> Figure:
    """A line a model and guide, a panel a number of particles."""
    lines = list(dict.fromkeys((row["model"], row["guide"]) for row in rows))
    particles = sorted({row["particles"] for row in rows})
    heights, models = {}, {}
    for i, (model, guide) in enumerate(lines):  # a space between models
        models.setdefault(model, i + 0.9 * len(models))
        heights[model, guide] = i + 0.9 * (len(models) - 1)
    figure = Figure(
        figsize=(3.0 + 4.2 * len(particles), 1.7 + 0.27 * max(heights.values())),
        layout="constrained",
    )
    panels = figure.subplots(1, len(particles), sharey=True, sharex=True, squeeze=False)[0]
    for axes, count in zip(panels, particles, strict=True):
        here = [row for row in rows if row["particles"] == count]
        for row in here:
            y = heights[row["model"], row["guide"]]
            times = [row[name] for name in COLUMNS if name in row]
            if times:
                axes.plot([min(times), max(times)], [y, y], color="0.88", lw=1, zorder=0)
        for name, (_, colour, marker) in COLUMNS.items():
            points = [
                (row[name], heights[row["model"], row["guide"]]) for row in here if name in row
            ]
            axes.plot(
                *(zip(*points, strict=True) if points else ((math.nan,), (math.nan,))),
                marker, ms=5.5, mew=1.4, color=colour, mfc="w" if name in ("numpyro", "scan") else colour,
                label=heading(name, sizes),
            )  # fmt: skip
        for model, top in models.items():
            axes.text(0.0, top - 0.75, MODELS[model], transform=axes.get_yaxis_transform(),
                      fontsize=8, fontweight="bold", va="center", ha="left")  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="x", color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_title(f"{count} particle" + "s" * (count > 1), fontsize=10)
        axes.set_xlabel("milliseconds a step", fontsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(list(heights.values()), [GUIDES[guide] for _, guide in lines], fontsize=8)
    panels[0].set_ylim(max(heights.values()) + 0.6, -1.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of svi.py")
    parser.add_argument("--output", type=Path, help="folder for svi.png")
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in options.results]
    found: dict[tuple[str, str, int], Row] = {}  # of a row that was repeated, the last
    for row in (row for report in reports for row in report["rows"]):
        found[row["model"], row["guide"], row["particles"]] = row
    models, guides = list(MODELS), list(GUIDES)
    order = sorted(found, key=lambda key: (models.index(key[0]), guides.index(key[1]), key[2]))
    rows = [found[key] for key in order]
    sizes = {report["steps_per_call"] for report in reports}
    print_machines(reports)
    print_table(rows, sizes)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(rows, sizes).savefig(options.output / "svi.png", dpi=130)


if __name__ == "__main__":
    main()
