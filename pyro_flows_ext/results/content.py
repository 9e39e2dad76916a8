"""Versioned files of tensors, numbers and names. Reading one runs no code."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "pyro_flows_ext "


def to_bytes(kind: str, version: int, content: dict[str, Any]) -> bytes:
    """The content of a file of this kind, by `torch.save`."""
    # In memory: torch aborts the process where a disk is full.
    buffer = io.BytesIO()
    torch.save({"format": f"{PREFIX}{kind}", "version": version, **content}, buffer)
    return buffer.getvalue()


def read_content(path: str | os.PathLike[str], versions: dict[str, int]) -> dict[str, Any]:
    """The content of a file by `to_bytes`; nothing but tensors, numbers and strings is ever read.

    Args:
        path: the file.
        versions: the version that this release reads, for each kind that is expected.

    Raises:
        ValueError: for a file that is missing, cut short, of another kind or of another version.
    """
    path, nouns = Path(path), " or ".join(versions)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no file {str(path)!r}: expected a {nouns} of an earlier run") from None
    except OSError as error:
        raise ValueError(f"{str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen kinds for bytes that make no sense
        raise ValueError(f"{str(path)!r} is not a {nouns}, or only half of one") from error
    form = content.get("format") if isinstance(content, dict) else None
    kind = str(form).removeprefix(PREFIX)
    if not isinstance(form, str) or not form.startswith(PREFIX) or kind not in versions:
        raise ValueError(f"{str(path)!r} is not a {nouns} written by pyro_flows_ext")
    version, known = content.get("version"), versions[kind]
    if version != known:
        is_newer = isinstance(version, int) and version > known
        cure = (
            "install a newer pyro_flows_ext" if is_newer else "run it again with this one, or install the older release"
        )  # fmt: skip
        raise ValueError(
            f"{str(path)!r} has format version {version!r}, and this release reads {known}: {cure}"
        )
    return content


def misfit(path: str | os.PathLike[str], kind: str) -> ValueError:
    """The error for a file whose entries make no sense together."""
    return ValueError(f"{str(path)!r} is not a {kind} that pyro_flows_ext wrote: its entries do not fit")  # fmt: skip


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, on the CPU."""
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def are_tensors(value: Any) -> bool:
    """Whether this is a dict of tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )
