"""Flow-VAE beside a plain VAE and a plain flow on images, by their bounds on test images.

    python benchmarks/flow_vae.py --seeds 2 --output benchmark-output
    PYRO_FLOWS_DATA=... python benchmarks/flow_vae.py --data fashion --latent 128 64 32 16 --names VAE flow Flow-VAE

`FlowVAE` (Das, Abbeel & Spanos 2019): an exact Glow-like flow between images and z, and a small VAE of z. Beside it the same
networks without the flow (one affine map of all pixels in its place), a VAE with wider networks that has as many parameters
as `FlowVAE`, and the flow alone with a standard normal z. `FlowVAE` is trained in two ways: all at once, or first the
networks, with the flow as it starts, and then all.

All are densities of the same logits of dequantised pixels, the best step chosen by validation images. Printed for each seed and
length of ε: the ELBO and the importance-weighted bound on test images, as log-density of the pixels in [0, 1] in nats and, of the
latter, as bits by pixel; and how many of ε's coordinates are in use (variance of their posterior mean above .01). Writes
flow_vae_DATA.json and .png.

Images are scikit-learn's digits, 8 x 8 (the default); or Fashion-MNIST or CIFAR-10 at 16 x 16, as in factoring.py, from the folder
named by PYRO_FLOWS_DATA. A row stays in the output folder, and a run that was stopped goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.distributions import Dequantized, FlowVAE, MultiScaleFlow
from pyro_flows_ext.flows import Glow
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.transforms import ActNorm, LogitPreprocess, Pixelwise

ALPHA = 0.05
LOGIT = LogitPreprocess(ALPHA)
NAMES = ("VAE", "VAE, wide", "flow", "Flow-VAE, at once", "Flow-VAE")


class Images(NamedTuple):
    """Images `(N, C, H, W)` of whole numbers below `num_greys`."""

    train: Tensor
    validation: Tensor
    test: Tensor
    num_greys: int


def load(name: str, seed: int) -> Images:
    """A data set, parted by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if name != "digits":
        from factoring import load as load_halved

        rest, test = load_halved(name)
        rest = rest[torch.randperm(len(rest), generator=generator)]
        return Images(rest[500:], rest[:500], test[:500], 256)
    from sklearn import datasets

    images = torch.as_tensor(datasets.load_digits().images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=generator)
    test, validation, train = images[order].split([360, 200, len(images) - 560])
    return Images(train, validation, test, 17)


def to_logits(images: Tensor, num_greys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of dequantised images, the noise fixed by `seed`, and log|ds / dy| of y in [0, 1]: as `images`, `(N)`."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return LOGIT.forward_and_ladj((images + noise) / num_greys)  # type: ignore[no-any-return]


def make(
    name: str, logits: Tensor, latent: int, options: argparse.Namespace
) -> FlowVAE | MultiScaleFlow:
    """One of the densities, its ActNorms started at the moments of the data."""
    shape, size = tuple(logits.shape[1:]), logits[0].numel()
    if "flow" in name.lower():
        flow = Glow(shape, num_levels=2, num_layers=options.layers, hidden_dims=(24, 24))
    else:
        flow = MultiScaleFlow(shape, lambda s: Pixelwise(ActNorm(s[0])), num_levels=1)
    flow.initialize(logits[:2000])
    if name == "flow":
        return flow
    hidden = (options.hidden, options.hidden)
    if name == "VAE, wide":
        target = num_parameters(make("Flow-VAE", logits, latent, options))
        while num_parameters(FlowVAE(flow.transform, size, latent, hidden_dims=hidden)) < target:  # type: ignore[arg-type]
            hidden = (hidden[0] + 8, hidden[1] + 8)
    return FlowVAE(flow.transform, size, latent, hidden_dims=hidden)  # type: ignore[arg-type]


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def file_of(name: str, latent: int, seed: int, options: argparse.Namespace) -> Path:
    """The file of the parameters of a density that was trained."""
    words = name.replace(",", "").replace(" ", "-")
    return Path(options.output / f"flow_vae_{options.data}_{words}_{latent}_{seed}.pt")


def run(name: str, latent: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; the parameters of the trained density of logits stay in its file."""
    images = load(options.data, seed)
    torch.manual_seed(100 + seed)
    density = make(name, to_logits(images.train[:5000], images.num_greys, seed)[0], latent, options)
    start = time.process_time()
    steps = options.vae_steps if name.startswith("VAE") else options.steps
    first_steps = options.first_steps if name == "Flow-VAE" else 0
    best_step = fit_density(
        Dequantized(density, num_levels=images.num_greys, logit_alpha=ALPHA),
        images.train,
        validation=images.validation,
        batch_size=options.batch,
        num_steps=first_steps + steps,
        first_steps=first_steps,
        lr=options.lr,
        patience=None,
        evaluate_every=None if options.data == "digits" else max(1, (first_steps + steps) // 8),
        seed=seed,
        progress=False,
    ).best_step
    seconds = time.process_time() - start
    torch.manual_seed(1000)
    if options.output:
        torch.save(density.state_dict(), file_of(name, latent, seed, options))
    row = {
        "density": name,
        "latent": 0 if name == "flow" else latent,
        "seed": seed,
        "parameters": num_parameters(density),
        **score(density, images, options.particles),
    }
    return {**row, "best_step": best_step, "cpu_seconds": seconds}


@torch.no_grad()
def score(density: FlowVAE | MultiScaleFlow, images: Images, particles: int) -> dict[str, float]:
    """Bounds on log p(y) of the test images, y in [0, 1], with the same noise for every density."""
    logits, ladj = to_logits(images.test, images.num_greys, 0)
    if isinstance(density, FlowVAE):
        elbo = torch.stack([density.log_prob(logits) for _ in range(10)]).mean(0)
        weighted = density.log_prob_bound(logits, particles, chunk_size=50)
        used = int((density.encode(logits).var(0) > 0.01).sum())
    else:
        elbo = weighted = density.log_prob(logits)
        used = 0
    elbo, weighted = elbo + ladj, weighted + ladj
    error = weighted.std().item() / math.sqrt(len(ladj))
    bits = math.log2(images.num_greys) - weighted.mean().item() / (logits[0].numel() * math.log(2))
    return {"elbo": elbo.mean().item(), "iwae": weighted.mean().item(), "standard_error": error, "bits": bits, "used": used}  # fmt: skip


@torch.no_grad()
def draw(densities: dict[str, Any], images: Images) -> Figure:
    """For each density, three abreast: test images and what their codes tell, samples, and ways between two codes."""
    logits = to_logits(images.test[:10], images.num_greys, 0)[0]
    abreast = min(3, len(densities))
    lines = math.ceil(len(densities) / abreast)
    figure = Figure(figsize=(2.8 * abreast, 3.6 * lines), layout="constrained")
    cells = figure.subplots(3 * lines, abreast, height_ratios=[2, 3, 3] * lines, squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    for i, (name, density) in enumerate(densities.items()):
        line, position = divmod(i, abreast)
        column = cells[3 * line : 3 * line + 3, position]
        torch.manual_seed(3)
        _show(column[1], density.sample((30,)), f"{name}: samples", images.num_greys)
        if isinstance(density, FlowVAE):
            codes = torch.cat([logits, density.decode(density.encode(logits))])
            _show(column[0], codes, f"{name}: test, and f(μ(ε))", images.num_greys)
            ways = [density.interpolate(logits[i], logits[i + 1], 10) for i in (0, 2, 6)]
            _show(column[2], torch.cat(ways), f"{name}: between codes", images.num_greys)
    return figure


def _show(cell: Any, logits: Tensor, title: str, num_greys: int) -> None:
    """Rows of ten images."""
    greys = (LOGIT.inv(logits) * num_greys).floor().clamp(0, num_greys - 1) / (num_greys - 1)
    images = F.pad(greys, (1, 1, 1, 1))
    rows = [torch.cat(list(part), -1) for part in images.split(10)]
    whole = torch.cat(rows, -2).permute(1, 2, 0).squeeze(-1)
    cell.imshow(whole, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    cell.set_title(title, fontsize=8)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "fashion", "cifar"), default="digits")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800, help="of all with a flow")
    parser.add_argument("--first-steps", type=int, default=600, help="of the networks alone")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--latent", type=int, nargs="+", default=[10], help="lengths of ε")
    parser.add_argument("--hidden", type=int, default=128, help="width of the networks")
    parser.add_argument("--layers", type=int, default=2, help="steps of Glow by level")
    parser.add_argument("--particles", type=int, default=200, help="K of the weighted bound")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, help="folder for flow_vae_DATA.json and .png")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    file = options.output / f"flow_vae_{options.data}.json" if options.output else None
    if file:
        options.output.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text()) if file and file.exists() else []
    done = {(row["density"], row["latent"], row["seed"]) for row in rows}
    first = options.latent[0]
    arms = [(n, x) for x in options.latent for n in options.names if n != "flow" or x == first]
    print("| density | ε | seed | parameters | ELBO | weighted | bits by pixel | ε in use | best step | CPU s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print_row(row)
    for seed in range(options.seeds):
        for name, latent in arms:
            if (name, 0 if name == "flow" else latent, seed) in done:
                continue
            rows.append(run(name, latent, seed, options))
            print_row(rows[-1])
            if file:
                file.write_text(json.dumps(rows, indent=1))
    if file:
        draw_all(arms, options).savefig(file.with_suffix(".png"), dpi=80)


def print_row(row: dict[str, Any]) -> None:
    print(
        f"| {row['density']} | {row['latent'] or ''} | {row['seed']} | {row['parameters']} | {row['elbo']:.2f} "
        f"| {row['iwae']:.2f} ± {row['standard_error']:.2f} | {row['bits']:.3f} | {row['used']} | {row['best_step']} "
        f"| {row['cpu_seconds']:.0f} |",
        flush=True,
    )


def draw_all(arms: list[tuple[str, int]], options: argparse.Namespace) -> Figure:
    """The figure of the densities of the first seed, from their files."""
    images = load(options.data, 0)
    logits = to_logits(images.train[:5000], images.num_greys, 0)[0]
    drawn = {}
    for name, latent in arms:
        density = make(name, logits, latent, options)
        density.load_state_dict(torch.load(file_of(name, latent, 0, options)))
        density.eval()
        drawn[name if name == "flow" else f"{name}, {latent}"] = density
    return draw(drawn, images)


if __name__ == "__main__":
    main()
