"""Named tensors from files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flows_ext.datasets import load_data


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_json(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", '{"n": 8, "y": [1.5, 2], "x": [[1, 2], [3, 4]], "b": [true]}')
    data = load_data(path)
    assert data["n"].shape == ()
    assert data["n"].dtype == data["x"].dtype == torch.int64
    assert data["y"].dtype == torch.get_default_dtype()
    assert data["x"].tolist() == [[1, 2], [3, 4]]
    assert data["b"].dtype == torch.bool


def test_csv(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "d.csv", "x, count\n1.5,3\n-2,4\n\n"))
    assert data["x"].tolist() == [1.5, -2.0]
    assert data["count"].tolist() == [3, 4]
    assert data["count"].dtype == torch.int64


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.ones((2, 3)), n=np.array([1, 2], dtype=np.uint8))
    data = load_data(path)
    assert data["x"].dtype == torch.get_default_dtype()
    assert data["n"].dtype == torch.int64


def test_strings_become_factors(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "d.csv", "school,y\nwest,1\n Eton,2\nwest,3\n"))
    assert data["school"].tolist() == [1, 0, 1]
    assert data["school"].dtype == torch.int64
    assert data.levels == {"school": ["Eton", "west"]}
    assert load_data(write(tmp_path / "d.json", '{"s": ["b", "a"]}'))["s"].tolist() == [1, 0]


def test_missing_numbers_are_nan(tmp_path: Path) -> None:
    for path in (
        write(tmp_path / "d.csv", "y,x\n1,2\n,3\nNA,4\n"),
        write(tmp_path / "d.json", '{"y": [1, null, NaN]}'),
    ):
        y = load_data(path)["y"]
        assert y.isnan().tolist() == [False, True, True]


BAD_FILES = {
    "large.csv": ("y\n1e99\n", "y: 1e.99 is beyond the range of torch.float32"),
    "words.csv": (
        "x,y\n1,2\n3,four\n",
        "column y, row 2: expected a number as in 1 other rows, got 'four'",
    ),
    "factor.csv": ("x,y\na,2\n,3\nNA,4\n", "x: 2 of 3 entries are missing, the first in row 2"),
    "short.csv": ("x,y\n1,2\n3\n", "row 2 has 1 entries, the header 2"),
    "empty.csv": ("x,y\n", "expected a header and at least one row"),
    "twice.csv": ("x,x\n1,2\n", "columns named twice: x"),
    "words.json": ('{"y": [["one"]]}', "y: expected numbers"),
    "mixed.json": ('{"y": [1, {}]}', "y: expected numbers"),
    "ragged.json": ('{"y": [[1], [2, 3]]}', "y: expected lists of equal lengths"),
    "list.json": ("[1, 2]", "expected an object of names and numbers, got list"),
    "empty.json": ('{"y": []}', "y: expected at least one value"),
    "cut.json": ('{"y": [1', "cut.json': Expecting"),
    "not.npz": ("no archive", "not.npz': "),
    "d.txt": ("1", "expected a file that ends in .json, .csv, .parquet, .npz"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_file(tmp_path: Path, name: str) -> None:
    text, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message):
        load_data(write(tmp_path / name, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv': No such file"):
        load_data(tmp_path / "gone.csv")


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_data(tmp_path / "d.npz")
