"""netCDF files of draws, for `arviz.from_netcdf`."""

from __future__ import annotations

import inspect
import io
import os
from typing import Any

from ..files import write_atomically


def save_netcdf(data: Any, path: str | os.PathLike[str]) -> None:
    """Writes the groups of `to_inference_data` to a netCDF file, for `arviz.from_netcdf`.

    The file is made in memory and then written: HDF5 crashes the process when a disk is full. An earlier file stays
    as it was unless the new one is whole.

    Args:
        data: `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x).
        path: the file.

    Raises:
        TypeError: for anything else.
        OSError: where the file cannot be written.
    """
    write_atomically(path, to_netcdf_bytes(data))


def to_netcdf_bytes(data: Any) -> bytes:
    """The content of the file that `save_netcdf` writes."""
    from xarray import DataTree

    if isinstance(data, DataTree):
        tree = data
    elif hasattr(data, "to_netcdf") and callable(getattr(data, "groups", None)):
        tree = DataTree.from_dict({name: data[name] for name in data.groups()})
    else:
        raise TypeError(f"data: expected an InferenceData or a DataTree, got {type(data).__name__}")
    if inspect.signature(DataTree.to_netcdf).parameters["filepath"].default is None:
        return bytes(tree.to_netcdf(engine="h5netcdf"))
    return _by_store(tree)


def _by_store(tree: Any) -> bytes:
    """The same for xarray before 2025.9, whose `DataTree.to_netcdf` writes to a path alone."""
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        for name, child in tree.children.items():
            child.to_dataset().dump_to_store(H5NetCDFStore(file, group=name, mode="a"))
    return buffer.getvalue()
