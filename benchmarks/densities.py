"""What the papers behind the densities report, beside what was measured here.

    for part in nested_dropout nested_digits toy_densities factoring flow_vae tabular; do
        python benchmarks/$part.py --output benchmark-output
    done
    python benchmarks/densities.py benchmark-output

Prints a Markdown table for each of those experiments whose JSON file lies in the folder: means over seeds ± their standard
deviation, in the order of the papers' own tables. Sizes of networks, data and budgets differ, as docs/results.md says for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Value = Callable[[Row], float]


def cell(rows: Sequence[Row], value: Value, digits: int = 3) -> str:
    """Mean ± standard deviation over rows."""
    values = [value(row) for row in rows]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    for line in (header, ["---"] * len(header), *lines):
        print(f"| {' | '.join(line)} |")


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that agree in `keys`, in order of appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def nested_dropout(rows: list[Row]) -> None:
    reported = {"QR": (".240", ".321"), "QR*": (".003", ".037"), "LU": (".051", ".257"), "LU*": (".008", ".037")}  # fmt: skip
    lines = [
        [flow, cell(mine, lambda r: r["mse2"], 4), reported[flow][0], cell(mine, lambda r: r["mse1"], 4), reported[flow][1],
         cell(mine, lambda r: r["gap"], 4)]
        for (flow,), mine in groups(rows, "flow").items()
    ]  # fmt: skip
    header = ["flow", "MSE(2)", "reported", "MSE(1)", "reported", "log-likelihood less the truth's"]
    table("Nested dropout, 3-D normal (Bekasov & Murray 2020, table 1)", header, lines)


def nested_digits(rows: list[Row]) -> None:
    """The paper has curves for Fashion-MNIST, no table: likelihood about 4 % worse, errors far better."""
    lines = [
        [flow, cell(mine, lambda r: r["log_likelihood"], 2), cell(mine, lambda r: r["mse"][5], 4)]
        for (flow,), mine in groups(rows, "flow").items()
    ]
    header = ["flow", "log-likelihood (nats)", "MSE from 6 of 64 latents"]
    table("Nested dropout, digits (sec. 3.2 there)", header, lines)


def toy_densities(rows: list[Row]) -> None:
    lines = [
        [toy, f"{mine[0]['entropy']:.3f}"]
        + [cell([r for r in mine if r["flow"] == flow], lambda r: r["nll"]) for flow in ("MAF-20", "CIF-MAF-5")]
        for (toy,), mine in groups(rows, "toy").items()
    ]  # fmt: skip
    header = ["data", "entropy", "MAF, 20 layers", "indexed MAF, 5 layers"]
    table("Negative log-likelihood on the plane (Cornish et al. 2020)", header, lines)


def factoring(rows: list[Row]) -> None:
    """Reported, bits a dimension by channel and by likelihood: CIFAR-10 3.49, 3.43; CelebA 3.02, 2.71; ImageNet32 4.28, 4.21."""
    arms = groups(rows, "arm").items()
    lines = [[arm, cell(mine, lambda r: r["bits"], 4)] for (arm,), mine in arms]
    table("Factoring out (Das, Abbeel & Spanos 2019, table 1)", ["leaves by", "bits/dim"], lines)


def flow_vae(rows: list[Row]) -> None:
    lines = [
        [name, cell(mine, lambda r: r["elbo"], 2), cell(mine, lambda r: r["iwae"], 2), cell(mine, lambda r: r["bits"])]
        for (name,), mine in groups(rows, "density").items()
    ]  # fmt: skip
    table("Flow-VAE (sec. 3.1 there)", ["density", "ELBO", "weighted", "bits/dim"], lines)


def tabular(rows: list[Row]) -> None:
    """Reported on the whole of POWER, nats: MAF .19, indexed MAF .48, RQ-NSF .66; the others are other data."""
    tables = [name for (name,) in groups(rows, "table")]
    lines = [
        [flow] + [cell([r for r in mine if r["table"] == name], lambda r: r["log_likelihood"]) for name in tables]
        for (flow,), mine in groups(rows, "flow").items()
    ]  # fmt: skip
    table("Test log-likelihood of tables (nats, standardised)", ["flow", *tables], lines)


PARTS: dict[str, Callable[[list[Row]], None]] = {
    "nested_dropout": nested_dropout,
    "nested_digits": nested_digits,
    "toy_densities": toy_densities,
    "factoring_cifar": factoring,
    "flow_vae": flow_vae,
    "tabular": tabular,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the experiments wrote their JSON files")
    folder = parser.parse_args().folder
    found = {name: folder / f"{name}.json" for name in PARTS if (folder / f"{name}.json").is_file()}
    if not found:
        parser.error(f"none of {', '.join(f'{name}.json' for name in PARTS)} in {folder}")
    for name, path in found.items():
        PARTS[name](json.loads(path.read_text()))


if __name__ == "__main__":
    main()
