"""Where to put the flow of a variational autoencoder: the posterior, the prior, both, or behind the decoder's input.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/flow_places.py --data omniglot --output out
    python benchmarks/flow_places.py --data digits --latent 10 --hidden 100 --steps 1000

The autoencoder of `vae.py`. Posterior: planar, Sylvester, inverse autoregressive. Prior: RealNVP, neural splines. "both": an
inverse autoregressive posterior and a RealNVP prior. "decoder": z ~ N(0, I) goes through that RealNVP before it enters the
decoder, so that the density of images is the one of "prior: RealNVP", and the Gaussian posterior lies on the other side of the flow.

All have the same steps of `fit` on batches of 100, and networks as wide as the number of parameters of "both" at `--hidden` allows.
The KL term is multiplied by t / T, with T a fifth of the steps. ", at once" leaves that out; ", free energy" multiplies log p(x, z)
by β_t = min(1, .01 + t / T) instead, with T a half of the steps (Rezende & Mohamed 2015, eq. 20); ", Adamax" has that optimizer in
place of Adam; ", IWAE K" the weighted bound of K particles as its loss, without annealing (Burda, Grosse & Salakhutdinov 2016).

By place and seed, on test images, in nats an image: ELBO, importance-weighted bound, KL(q(z | x) || p(z)), and the number of
active units: coordinates whose posterior mean has a variance above .01 over images (Burda, Grosse & Salakhutdinov 2016). For
`--gaps`, at the first seed: the gaps of Cremer, Li & Duvenaud (2018). Writes flow_places_DATA.json, and flow_places.png of all sets
in the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from gaps import COLUMNS, measure
from images import SETS, Images, Row, parser, run_all
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from vae import BATCH, FLOWS, Model, bound, networks, program

from pyro_flows_ext.diagnostics import gaps
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer import AnnealedELBO, ImportanceWeightedELBO, fit, linear, rezende
from pyro_flows_ext.transforms import HouseholderSylvester, nsf, realnvp


def sylvester(input_dim: int, context_dim: int) -> HouseholderSylvester:
    """Four layers of rank 8, of about as many parameters as the inverse autoregressive flow."""
    return HouseholderSylvester(
        input_dim, rank=min(input_dim, 8), num_layers=4, context_dim=context_dim, hidden_dims=()
    )


POSTERIORS: dict[str, dict[str, Any]] = {
    "planar": FLOWS["planar"],
    "Sylvester": {"flow": sylvester},
    "IAF": FLOWS["IAF"],
    "both": FLOWS["IAF"],
}
FLOW_OF_Z = {
    "prior: RealNVP": partial(realnvp, num_layers=6),
    "prior: NSF": partial(nsf, num_layers=2),
    "both": partial(realnvp, num_layers=6),
    "decoder": partial(realnvp, num_layers=6),
}
PLACES = (
    "none",
    "planar",
    "Sylvester",
    "IAF",
    "prior: RealNVP",
    "prior: NSF",
    "both",
    "decoder",
)
TRAININGS = ("", ", at once", ", free energy", ", Adamax", ", IWAE 5", ", IWAE 50")
NAMES = [place + training for place in PLACES for training in TRAININGS]


def autoencoder(
    place: str, x: Tensor, hidden: int, options: argparse.Namespace
) -> tuple[Model, AutoAmortizedFlow, int]:
    """Model, guide and their number of parameters, with networks of this width."""
    pyro.clear_param_store()  # else `pyro.module` would go on with the decoder of another width
    latent = options.latent
    encoder, decoder = networks(x, latent, hidden, options.features)
    prior: Any = dist.Normal(x.new_zeros(latent), 1.0).to_event(1)
    if place in FLOW_OF_Z:
        flow = FLOW_OF_Z[place](latent)
        if place == "decoder":
            decoder = nn.Sequential(flow, decoder)
        else:
            prior = FlowDistribution(prior, flow)
    model = program(decoder, prior)
    settings = POSTERIORS.get(place, FLOWS["Gaussian"])
    guide = AutoAmortizedFlow(model, encoder, init_scale=0.5, **settings)
    guide.setup(x[:BATCH], BATCH)
    modules = (m for m in (guide, decoder, prior) if isinstance(m, nn.Module))
    return model, guide, sum(p.numel() for m in modules for p in m.parameters())


def widest(place: str, x: Tensor, budget: int, options: argparse.Namespace) -> int:
    """The largest width of the networks whose model and guide have no more parameters than the budget."""
    low, high = options.hidden, 4 * options.hidden
    while high - low > 1:
        middle = (low + high) // 2
        within = autoencoder(place, x, middle, options)[2] <= budget
        low, high = (middle, high) if within else (low, middle)
    return low


def train(
    model: Model, guide: AutoAmortizedFlow, x: Tensor, training: str, options: argparse.Namespace
) -> None:
    """Trains both by `fit`, Adam or Adamax, the rate falling by a cosine."""
    loss: Any = Trace_ELBO()
    if training == ", free energy":
        loss = AnnealedELBO(loss, rezende(max(1, options.steps // 2)))
    elif training.startswith(", IWAE"):
        loss = ImportanceWeightedELBO(num_particles=int(training.split()[-1]))
    elif training != ", at once":
        loss = AnnealedELBO(loss, linear(max(1, options.steps // 5)), term="kl")
    optim = torch.optim.Adamax if training == ", Adamax" else torch.optim.Adam
    fit(
        model,
        guide,
        x,
        size=BATCH,
        num_steps=options.steps,
        loss=loss,
        optim=partial(optim, lr=options.lr),
        clip_norm=None,
        compile=False,
        seed=options.seed,
        progress=False,
    )


@torch.no_grad()
def parts(model: Model, guide: AutoAmortizedFlow, x: Tensor) -> tuple[float, float]:
    """ELBO and KL(q(z | x) || p(z)), mean over the rows, of ten draws each."""
    x = x.repeat(10, 1)
    drawn = poutine.trace(guide).get_trace(x)
    played = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x)
    elbo = (played.log_prob_sum() - drawn.log_prob_sum()).item() / len(x)
    reconstruction = played.log_prob_sum(lambda name, _: name == "x").item() / len(x)
    return elbo, reconstruction - elbo


def active_units(guide: AutoAmortizedFlow, x: Tensor, num_draws: int = 100) -> int:
    """Coordinates of z with Var_x E[z | x] > .01: the covariance over x of two independent means, so without their noise."""
    first, second = (guide.sample_posterior(num_draws, x)["z"].mean(0) for _ in range(2))
    covariance = ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(x) - 1)
    return int((covariance > 0.01).sum())


def run(name: str, images: Images, seed: int, options: argparse.Namespace) -> Row:
    """One row of the table."""
    place, _, training = name.partition(",")
    options.seed, training = seed, training and "," + training
    x = images.train
    budget = autoencoder("both", x, options.hidden, options)[2]
    hidden = widest(place, x, budget, options)
    pyro.set_rng_seed(seed)
    model, guide, num_parameters = autoencoder(place, x, hidden, options)
    start = time.process_time()
    train(model, guide, x, training, options)
    trained = time.process_time()
    test = images.test[: options.num_test]
    pyro.set_rng_seed(1000)
    elbo, kl = parts(model, guide, test)
    row: Row = {
        "place": name,
        "seed": seed,
        "hidden": hidden,
        "parameters": num_parameters,
        "elbo": elbo,
        "iwae": bound(model, guide, test, options.particles),
        "kl": kl,
        "active": active_units(guide, images.test[:2000]),
        "train_elbo": parts(model, guide, x[: len(test)])[0],
        "cpu_seconds": trained - start,
    }
    if name in options.gaps and seed == options.first_seed:
        pyro.set_rng_seed(2000)
        rows = images.test[: options.num_gaps]
        steps = {"max_steps": options.max_steps, "ais_chains": 8, "ais_steps": 50}
        result = gaps(model, guide, rows, ais_start="gaussian", **steps)
        estimates = {key: {"mean": e[0], "se": e[1]} for key, e in measure(result).items()}
        row["gaps"] = {"by": result.best, **estimates}
    row["cpu_seconds_of_all"] = time.process_time() - start
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[Row], particles: int) -> None:
    """Means over seeds, ± half the range of two seeds or the standard deviation of more."""
    columns = {
        "elbo": "ELBO",
        "iwae": f"IWAE, K = {particles}",
        "kl": "KL to prior",
        "active": "active",
        "train_elbo": "ELBO, training",
    }
    print("| place | width | " + " | ".join(columns.values()) + " | CPU s |")
    print("|---" * (len(columns) + 3) + "|")
    for name in dict.fromkeys(row["place"] for row in rows):
        mine = [row for row in rows if row["place"] == name]
        cells = [_cell([row[key] for row in mine], key == "active") for key in columns]
        seconds = statistics.mean(row["cpu_seconds"] for row in mine)
        print(f"| {name} | {mine[0]['hidden']} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    print("\n| trained with | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        if "gaps" in row:
            cells = [f"{row['gaps'][k]['mean']:.2f} ± {row['gaps'][k]['se']:.2f}" for k in COLUMNS]
            print(f"| {row['place']} | " + " | ".join(cells) + " |")


def _cell(values: list[float], whole: bool) -> str:
    if whole:
        return ", ".join(str(value) for value in values)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    spread = statistics.stdev(values) if len(values) > 2 else abs(values[0] - values[1]) / 2
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def draw(records: dict[str, list[Row]]) -> Figure:
    """By data set: above, both bounds of each place and training, a dot for each seed; below, the gaps."""
    figure = Figure(figsize=(5.4 * len(records), 7.2), layout="constrained")
    cells = figure.subplots(2, len(records), height_ratios=[3, 1.4], squeeze=False)
    for column, (data, rows) in enumerate(records.items()):
        _draw_bounds(cells[0, column], rows)
        cells[0, column].set_title(data)
        _draw_gaps(cells[1, column], [row for row in rows if "gaps" in row])
    return figure


def _draw_bounds(ax: Any, rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["place"] for row in rows))
    heights = [names.index(row["place"]) for row in rows]
    for key, marker, label in (("elbo", "o", "ELBO"), ("iwae", "D", "IWAE")):
        ax.scatter([row[key] for row in rows], heights, marker=marker, s=22, label=label)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("nats an image, test")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(frameon=False, loc="upper left")


def _draw_gaps(ax: Any, rows: list[Row]) -> None:
    """The total gap of the guide, log p(x) - ELBO; and that of a Gaussian and a flow fitted to each image."""
    shown = {"amortized": "guide", "gaussian": "Gaussian, each image", "flow": "flow, each image"}
    for i, (key, label) in enumerate(shown.items()):
        lengths = [row["gaps"]["evidence"]["mean"] - row["gaps"][key]["mean"] for row in rows]
        heights = [height + 0.25 * (i - 1) for height in range(len(rows))]
        ax.barh(heights, lengths, 0.25, label=label)
    ax.set_yticks(range(len(rows)), [row["place"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("log p(x) less the bound, nats an image")
    ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=8)


def main() -> None:
    made = parser(
        __doc__,
        data="digits",
        posteriors=list(PLACES),
        seeds=2,
        steps=1500,
        latent=32,
        hidden=200,
        features=64,
    )
    made.add_argument("--particles", type=int, default=500, help="K of the weighted bound")
    made.add_argument("--num-test", type=int, default=400, help="test images of the bounds")
    names = ["none", "IAF", "prior: RealNVP", "both", "decoder"]
    made.add_argument("--gaps", nargs="*", default=names, choices=NAMES)
    made.add_argument("--num-gaps", type=int, default=30, help="test images of the gaps")
    made.add_argument("--max-steps", type=int, default=600, help="of a local fit")
    rows, options = run_all(run, made, NAMES, "flow_places")
    table(rows, options.particles)
    files = {data: Path(options.output / f"flow_places_{data}.json") for data in SETS}
    found = {
        data: json.loads(file.read_text())["rows"] for data, file in files.items() if file.exists()
    }
    draw(found).savefig(options.output / "flow_places.png", dpi=90)


if __name__ == "__main__":
    main()
