"""Binarised images as rows of zeros and ones: scikit-learn's digits, Caltech 101 Silhouettes, Omniglot; what runs on them share.

The last two are read from `images/` in the folder named by PYRO_FLOWS_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Images(NamedTuple):
    """Rows of pixels in {0, 1}, `(N, side²)`."""

    train: Tensor
    validation: Tensor
    test: Tensor
    side: int


def digits() -> Images:
    """1,797 digits of 8 x 8 pixels, on from 8 of 16: 1,097, 200 and 500, drawn with a fixed seed."""
    from sklearn.datasets import load_digits

    x = load_digits().data
    return _split(x >= 8, 1097, 200, 8)


def caltech() -> Images:
    """Caltech 101 Silhouettes, 28 x 28 (Marlin et al. 2010): the split of the set, 4,100, 2,264 and 2,307, shuffled."""
    arrays = _read("caltech101_silhouettes_28.npz")
    rows, split = _shuffled(arrays["x"].reshape(-1, 784)), _shuffled(arrays["split"])
    train, validation, test = (_rows(rows[split == part]) for part in ("train", "val", "test"))
    return Images(train, validation, test, 28)


def omniglot() -> Images:
    """Omniglot, 28 x 28, on from 128 of 255: 23,000, 1,345 and 8,115, drawn with a fixed seed.

    As many to test as in Burda et al. (2016), but not the same ones.
    """
    x = _read("omniglot_28.npz")["x"].reshape(-1, 784)
    return _split(x >= 128, 23_000, 1345, 28)


SETS = {"digits": digits, "caltech": caltech, "omniglot": omniglot}


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of an experiment with autoencoders; `defaults` by name."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", choices=SETS)
    made.add_argument("--posteriors", nargs="+")
    made.add_argument("--seeds", type=int)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--steps", type=int)
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--latent", type=int)
    made.add_argument("--hidden", type=int)
    made.add_argument("--features", type=int, help="what flows are linear in")
    made.add_argument("--output", type=Path, default=Path("benchmark-output"))
    made.set_defaults(**defaults)
    return made


Row = dict[str, Any]


def run_all(
    run: Callable[[str, Images, int, argparse.Namespace], Row],
    made: argparse.ArgumentParser,
    names: Iterable[str],
    title: str,
) -> tuple[list[Row], argparse.Namespace]:
    """`run(posterior, images, seed, options)` for all that the command line asks for; after each, `{title}_{data}.json`."""
    options = made.parse_args()
    unknown = set(options.posteriors) - set(names)
    if unknown:
        made.error(f"--posteriors: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    try:
        images = SETS[options.data]()
    except FileNotFoundError as error:
        made.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    rows: list[Row] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.posteriors:
            rows.append(run(name, images, seed, options))
            record = json.dumps({"settings": settings, "rows": rows}, indent=1)
            (options.output / f"{title}_{options.data}.json").write_text(record)
    return rows, options


def _read(name: str) -> dict[str, np.ndarray]:
    root = os.environ.get("PYRO_FLOWS_DATA")
    if not root or not (Path(root) / "images" / name).is_file():
        raise FileNotFoundError(
            f"set PYRO_FLOWS_DATA to the folder that holds images/{name} (now: {root!r})"
        )
    with np.load(Path(root) / "images" / name, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _split(x: np.ndarray, num_train: int, num_validation: int, side: int) -> Images:
    rows = _rows(_shuffled(x))
    parts = (num_train, num_validation, len(x) - num_train - num_validation)
    return Images(*rows.split(parts), side)


def _shuffled(x: np.ndarray) -> np.ndarray:
    """The same order every time: sets come sorted by class."""
    return x[np.random.default_rng(0).permutation(len(x))]


def _rows(x: np.ndarray) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32)
