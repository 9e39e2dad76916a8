"""Checkpoints of a run: written atomically, read without running code."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...files import write_atomically

# Seconds between two checkpoints within a round.
SAVE_SECONDS = 5.0
# The version of the format; files of a newer one are refused.
FORMAT = 4


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values to a file that is either the old one or the new one, whatever happens."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch may abort the process where it cannot write
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(target, buffer.getvalue())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a file of `save`. Raises `ValueError` for a newer format or a file of another kind."""
    try:
        # The process that wrote it may have had another GPU, or one at all.
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: expected a checkpoint of fit, got a file that does not load: {error}"
        ) from error
    version = state.get("format") if isinstance(state, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, got {version}")
    return state


class Saver:
    """Writes the checkpoints of a run to `path`; does nothing where that is None."""

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path, self.saved_at = path, time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether the last one is more than a few seconds old."""
        return self.path is not None and time.perf_counter() - self.saved_at >= SAVE_SECONDS

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes one."""
        if self.path is not None:
            save(self.path, state)
            self.saved_at = time.perf_counter()


def random_state() -> dict[str, Any]:
    """The states of the generators that Pyro seeds, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores `random_state()`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
