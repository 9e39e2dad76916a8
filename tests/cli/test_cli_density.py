import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_flows_ext.cli.density as density_cli
from pyro_flows_ext.datasets import DATASETS, load_rows, split_rows
from pyro_flows_ext.distributions import TOYS
from pyro_flows_ext.flows import FLOWS
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.results import load

Run = Callable[..., Any]
FILES = ["density.json", "density.pt", "loss.png", "samples.png"]
TINY = ["--rows", 100, "--steps", 5, "--num-layers", 1, "--particles", 3]


def rows_of(num: int, dim: int = 2) -> torch.Tensor:
    """Correlated normals."""
    return torch.randn(num, dim) @ (torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)) + 3


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def write_csv(path: Path, values: torch.Tensor, names: str = "height,weight") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names.split(","))
        writer.writerows(values.tolist())
    return path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a small run."""
    monkeypatch.setattr(density_cli, "_samples_png", lambda *_: b"")
    monkeypatch.setattr(density_cli, "png_bytes", lambda *_: b"")


# --- the command ---


def test_density_writes_files_that_open(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "new" / "results"
    done = run("density", "moons", *TINY, "--output", out)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == FILES
    words = (
        "nsf, 1 transforms",
        "Gaussian",
        "exactly",
        "-1.008",
        "10 test rows",
        "5 steps on 80 rows",
    )
    for word in words:
        assert word in done.out
    for name in ("samples.png", "loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "density.json").read_text())
    assert report["rows"] == {"train": 80, "validation": 10, "test": 10}
    assert (report["target"], report["flow"], report["num_layers"]) == ("moons", "nsf", 1)
    assert report["entropy"] == TOYS["moons"].entropy
    assert torch.load(out / "density.pt", weights_only=True)["made"][0]["arguments"][
        "event_shape"
    ] == [2]

    # The numbers are those of the density in the file, on rows that it was not trained on.
    test = split_rows(load_rows("moons", num_rows=100, seed=0), seed=0).test.values
    saved = load(out / "density.pt")
    with torch.no_grad():
        values = saved.density.log_prob(test).double()
    found = report["test_log_likelihood"]
    assert found["kind"] == "exact"
    assert found["mean"] == pytest.approx(values.mean().item(), abs=1e-6)
    assert found["se"] == pytest.approx(values.std().item() / 10**0.5, abs=1e-6)
    gain = report["gain_over_gaussian"]["mean"]
    assert gain == pytest.approx(found["mean"] - report["gaussian_log_likelihood"]["mean"])


@pytest.mark.usefixtures("no_pictures")
def test_likelihoods_are_in_the_units_of_the_data(tmp_path: Path, run: Run) -> None:
    values, means = rows_of(200), []
    for scale in (1.0, 1000.0):
        path = write_csv(tmp_path / "data.csv", scale * values)
        run("density", path, *TINY, "--output", tmp_path / "out", "--quiet")
        report = json.loads((tmp_path / "out" / "density.json").read_text())
        means.append([report[f"{k}_log_likelihood"]["mean"] for k in ("test", "gaussian")])
        means[-1].append(-report["validation_loss"])
    np.testing.assert_allclose(np.subtract(*means), 2 * math.log(1000), atol=1e-3)


@pytest.mark.usefixtures("no_pictures")
def test_training_helps_and_the_seed_decides(tmp_path: Path, run: Run) -> None:
    found = []
    for i, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(i)
        options = ["--rows", 1000, "--steps", 60, "--num-layers", 1, "--lr", 0.03]
        done = run("density", "sign", *options, "--seed", seed, "--quiet", "--output", out)
        assert (done.code, done.out, done.err) == (0, "", "")
        report = json.loads((out / "density.json").read_text())
        found.append(report["test_log_likelihood"]["mean"])
        assert report["gain_over_gaussian"]["mean"] > 3 * report["gain_over_gaussian"]["se"]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_bounds_say_so(tmp_path: Path, run: Run) -> None:
    done = run("density", "abs", "--flow", "cif-maf", *TINY, "--output", tmp_path)
    assert done.code == 0
    assert "a lower bound, 3 draws" in done.out
    assert "exactly" in done.out  # the Gaussian
    report = json.loads((tmp_path / "density.json").read_text())
    assert report["test_log_likelihood"]["kind"] == "bound"
    assert report["test_log_likelihood"]["num_particles"] == 3


@pytest.mark.usefixtures("no_pictures")
def test_networks_behind_a_flow_train_first(tmp_path: Path, run: Run) -> None:
    argv = ["density", "moons", *TINY, "--steps", 7, "--flow", "flow-vae", "--output", tmp_path]
    assert "7 steps, the first 3 of the networks alone, on 80 rows" in run(*argv).out
    assert json.loads((tmp_path / "density.json").read_text())["first_steps"] == 3


@pytest.mark.usefixtures("no_pictures")
def test_ordered_latents_of_whole_numbers(tmp_path: Path, run: Run) -> None:
    path = write_csv(tmp_path / "data.csv", rows_of(100).abs().round())
    argv = ["density", path, *TINY, "--flow", "nested-nsf", "--dequantize", "uniform"]
    done = run(*argv, "--output", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "bits a number at most" in done.out


@pytest.mark.usefixtures("no_pictures")
def test_a_density_no_better_than_a_gaussian_says_so(tmp_path: Path, run: Run) -> None:
    path = write_csv(tmp_path / "data.csv", rows_of(100))
    done = run("density", path, *TINY, "--output", tmp_path)
    assert "No better than the Gaussian, to two standard errors: take more steps" in done.out
    linear = ["--flow", "nested-lu", "--steps", 5, "--output", tmp_path]
    assert "it is linear, and so a Gaussian itself" in run("density", path, *linear).out


@pytest.mark.parametrize("flow", ["glow", "nsf"])
def test_images(flow: str, tmp_path: Path, run: Run) -> None:
    images = np.random.default_rng(0).integers(0, 8, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images, label=np.arange(60))
    argv = ["density", tmp_path / "images.npz", "--key", "x", "--flow", flow, *TINY[2:]]
    done = run(*argv, "--dequantize", "uniform", "--output", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "bits a number at most, of whole numbers 0 to 7" in done.out
    run("sample", tmp_path / "out", "--num-samples", 5)
    draws = np.load(tmp_path / "out" / "draws.npz")["x"]
    assert draws.shape == ((5, 1, 4, 4) if flow == "glow" else (5, 16))
    assert np.array_equal(draws, draws.round())
    assert draws.min() >= 0
    assert draws.max() <= 7


def test_several_columns_and_one(tmp_path: Path, run: Run) -> None:
    path = write_csv(tmp_path / "data.csv", rows_of(40, 3), "a, b,c")
    for columns, dim in (("a,b,c", 3), ("c", 1)):
        done = run("density", path, "--columns", columns, *TINY, "--output", tmp_path)
        assert (done.code, done.err) == (0, "")
        assert load(tmp_path / "density.pt").columns == tuple(columns.split(","))
        assert f"test rows of {dim}" in done.out


# --- sample ---


@pytest.mark.usefixtures("no_pictures")
def test_sample(tmp_path: Path, run: Run) -> None:
    run("density", "annulus", *TINY, "--quiet", "--output", tmp_path)
    draws = []
    for seed in (1, 1, 2):
        done = run("sample", tmp_path, "--num-samples", 400, "--seed", seed)
        assert (done.code, done.err) == (0, "")
        draws.append(np.load(tmp_path / "draws.npz")["x"])
    assert draws[0].shape == (400, 2)
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    # In the units of the data: the annulus has variance 5 / 4 by coordinate.
    assert draws[0].std(0) == pytest.approx(1.12, abs=0.35)
    run("sample", tmp_path, "--target", "u1").failed(2, "--target, --data: expected neither")
    (tmp_path / "guide.pt").touch()
    run("sample", tmp_path).failed(2, "holds a guide and a density")


@pytest.mark.usefixtures("no_pictures")
def test_draws_in_a_table_have_the_names_of_the_columns(tmp_path: Path, run: Run) -> None:
    path = write_csv(tmp_path / "data.csv", rows_of(40))
    run("density", path, *TINY, "--quiet", "--output", tmp_path)
    done = run("sample", tmp_path, "--num-samples", 30, "--output", tmp_path / "draws.csv")
    assert (done.code, done.err) == (0, "")
    draws = pd.read_csv(tmp_path / "draws.csv")
    assert (list(draws), len(draws)) == (["height", "weight"], 30)
    run("sample", tmp_path, "--num-samples", 30)
    found = np.load(tmp_path / "draws.npz")
    assert found["columns"].tolist() == ["height", "weight"]
    np.testing.assert_allclose(found["x"], draws.to_numpy(), rtol=1e-5)


# --- a density given other columns ---


def write_regression(path: Path, num: int = 600) -> pd.DataFrame:
    """price = 2 size + rooms + noise of sd 0.5, in large units."""
    size, rooms = torch.randn(2, num)
    price = 2 * size + rooms + 0.5 * torch.randn(num)
    frame = pd.DataFrame({"size": 100 + 20 * size, "price": 1e5 * (3 + price), "rooms": rooms})
    frame.to_csv(path, index=False)
    return frame


def test_a_density_given_other_columns(tmp_path: Path, run: Run) -> None:
    frame = write_regression(tmp_path / "houses.csv")
    out = tmp_path / "out"
    options = ["--steps", 300, "--num-layers", 1, "--lr", 0.01, "--output", out]
    done = run(
        "density",
        tmp_path / "houses.csv",
        "--columns",
        "price",
        "--context",
        "size,rooms",
        *options,
    )
    assert (done.code, done.err) == (0, "")
    assert "test rows of 1 given size, rooms" in done.out
    names = ["calibration.png", "density.json", "density.pt", "loss.png", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    report = json.loads((out / "density.json").read_text())
    assert (report["columns"], report["context"]) == (["price"], ["size", "rooms"])
    entropy = math.log(0.5e5) + 0.5 * math.log(2 * math.pi * math.e)
    # The conditional Gaussian is the truth.
    assert report["gaussian_log_likelihood"]["mean"] == pytest.approx(-entropy, abs=0.25)
    assert report["test_log_likelihood"]["mean"] == pytest.approx(-entropy, abs=0.35)

    # Scores are those of the density, columns by name in any order.
    frame[["rooms", "price", "size"]].head(7).to_csv(tmp_path / "new.csv", index=False)
    done = run("score", out, tmp_path / "new.csv")
    assert (done.code, done.err) == (0, "")
    saved = load(out)
    rows = torch.tensor(frame.head(7)[["price"]].to_numpy()).float()
    at = torch.tensor(frame.head(7)[["size", "rooms"]].to_numpy()).float()
    with torch.no_grad():
        expected = saved.density.condition(at).log_prob(rows)
    scores = pd.read_csv(out / "scores.csv")
    np.testing.assert_allclose(scores["log_density"], expected, rtol=1e-4)
    assert f"{expected.mean():.3f}" in done.out

    # Draws at the contexts of a file.
    pd.DataFrame({"rooms": [0.0, 2.0], "size": [100.0, 100.0]}).to_csv(
        tmp_path / "at.csv", index=False
    )
    table = out / "draws.csv"
    done = run(
        "sample", out, "--context", tmp_path / "at.csv", "--num-samples", 500, "--output", table
    )
    assert (done.code, done.err) == (0, "")
    draws = pd.read_csv(table)
    assert list(draws) == ["size", "rooms", "price"]
    means = draws.groupby("rooms")["price"].mean()
    assert means[0.0] == pytest.approx(3e5, abs=0.3e5)
    assert means[2.0] == pytest.approx(5e5, abs=0.4e5)
    run("sample", out).failed(2, "--context: expected a file with the columns size, rooms")


BAD_CONTEXTS = {
    "both": (["--columns", "price,size", "--context", "size"], "size: expected columns or context, not both"),
    "missing": (["--context", "age"], "no column 'age': expected some of size, price, rooms"),
    "nothing left": (["--context", "size,price,rooms"], "expected a column beside the context"),
    "a flow without": (["--context", "size", "--flow", "nested-qr"], "--context: expected a flow that takes one"),
    "twice": (["--context", "size,size"], "expected different names with commas between"),
    "whole": (["--context", "size", "--dequantize", "uniform"], "--dequantize: expected no --context"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_CONTEXTS))
def test_bad_contexts(name: str, tmp_path: Path, run: Run) -> None:
    write_regression(tmp_path / "houses.csv", 40)
    argv, message = BAD_CONTEXTS[name]
    run("density", tmp_path / "houses.csv", *argv, "--output", tmp_path / "out").failed(2, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_scores_of_images_and_refusals(tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).normal(size=(40, 4, 4)))
    run(
        "density", tmp_path / "images.npz", "--flow", "glow", *TINY, "--quiet", "--output", tmp_path
    )
    done = run("score", tmp_path, tmp_path / "images.npz", "--output", tmp_path / "s.csv")
    assert (done.code, done.err) == (0, "")
    assert len(pd.read_csv(tmp_path / "s.csv")) == 40
    write_csv(tmp_path / "data.csv", rows_of(40))
    run("score", tmp_path, tmp_path / "data.csv").failed(2, "no column 'x")
    run("score", tmp_path, tmp_path / "s.csv", "--output", "s.npz").failed(
        2, "ends in .csv or .parquet"
    )


@pytest.mark.usefixtures("no_pictures")
def test_parquet_in_and_out(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("pyarrow")
    frame = write_regression(tmp_path / "houses.csv", 60)
    frame.to_parquet(tmp_path / "houses.parquet")
    results = []
    for suffix in ("csv", "parquet"):
        out = tmp_path / suffix
        done = run("density", tmp_path / f"houses.{suffix}", *TINY, "--quiet", "--output", out)
        assert (done.code, done.err) == (0, "")
        run("score", out, tmp_path / f"houses.{suffix}", "--output", out / "scores.parquet")
        results.append(pd.read_parquet(out / "scores.parquet")["log_density"])
    np.testing.assert_allclose(*results, rtol=1e-5)


# --- interruption ---


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_keeps_what_there_is_and_resume_goes_on(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_flows_ext.infer.training.checkpoint.SAVE_SECONDS", 0.0)
    path = write_csv(tmp_path / "data.csv", rows_of(100))
    options = ["--steps", 40, "--num-layers", 1]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        def callback(state: Any) -> None:
            if state.step == 10:
                raise KeyboardInterrupt

        return fit_density(*args, **kwargs, callback=callback)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(density_cli, "fit_density", interrupted)
        done = run("density", path, *options, "--checkpoint", "--output", out)
    assert done.code == 130
    assert "interrupted; wrote density.pt, density.json" in done.err
    report = json.loads((out / "density.json").read_text())
    assert (report["status"], report["steps"]) == ("unfinished", 10)
    assert load(out).density.log_prob(torch.zeros(1, 2)).isfinite().all()
    assert run("density", path, *options, "--resume", "--output", out).code == 0
    report = json.loads((out / "density.json").read_text())
    assert report["status"] == "finished"
    assert not (out / "checkpoint.pt").exists()
    run("density", path, *options, "--quiet", "--output", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "density.json").read_text())
    assert whole["steps"] == report["steps"] > 10
    assert whole["test_log_likelihood"] == report["test_log_likelihood"]


# --- files that are none ---


MADE = {"name": "NSF", "arguments": {"event_shape": 2, "num_layers": 1}}
FINE = {
    "format": "pyro_flows_ext density",
    "version": 2,
    "target": "moons",
    "columns": ["a", "b"],
    "made": [MADE],
    "state": {},
}
BAD_FILES = {
    "foreign": ({"weights": torch.zeros(2)}, "is not a guide or density written by"),
    "newer": (
        {**FINE, "version": 3},
        "format version 3, and this release reads 2: install a newer",
    ),
    "parameters": (FINE, "entries do not fit"),
    "columns": ({**FINE, "columns": 3}, "entries do not fit"),
    "made": ({**FINE, "made": None}, "entries do not fit"),
    "flow": ({**FINE, "made": [{**MADE, "name": "magic"}]}, "entries do not fit"),
    "shape": (
        {**FINE, "made": [{"name": "NSF", "arguments": {"event_shape": "2"}}]},
        "entries do not fit",
    ),
    "missing": ({**FINE, "made": [{"name": "NSF"}]}, "entries do not fit"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_density_file(name: str, tmp_path: Path, run: Run) -> None:
    content, message = BAD_FILES[name]
    torch.save(content, tmp_path / "density.pt")
    run("sample", tmp_path).failed(2, message)
    (tmp_path / "density.pt").write_bytes(b"")
    run("sample", tmp_path).failed(2, "is not a guide or density, or only half of one")


# --- failures ---

BAD_INPUT = {
    "no such data": (["suns"], "no data 'suns': expected one of two-uniforms, .*, or a file"),
    "no such file": (["gone.csv"], "No such file"),
    "no such flow": (["moons", "--flow", "magic"], "invalid choice: 'magic'"),
    "few rows": (["few.csv"], "few.csv: expected at least 20 rows .*, got 5"),
    "no header": (["bare.csv"], "names of the columns in the first row, got numbers"),
    "strings": (["words.csv"], "got strings in name: take the columns height,weight"),
    "no column": (["data.csv", "--columns", "height,age"], "no column 'age': expected some of height"),
    "nan": (["nan.csv"], "weight: 1 of 40 values is NaN, the first in row 3 "),
    "constant": (["constant.csv"], "1 of 2 columns are constant .*: weight; leave them out"),
    "no key": (["two.npz"], "expected a key, one of a, b"),
    "wrong key": (["two.npz", "--key", "c"], "no 'c': expected a key, one of a, b"),
    "key of a csv": (["data.csv", "--key", "a"], "columns and context with a .csv or .parquet, and key with an .npz"),
    "key of a set": (["moons", "--key", "a"], "expected key, columns and context with a file only"),
    "a number": (["scalar.npz"], r"expected rows \(N, D\) or images .*, got \(\)"),
    "images by rows": (["moons", "--flow", "glow"], "--flow glow: expected images .C, H, W., got rows of 2 numbers"),
    "one layer": (["moons", "--flow", "nested-qr", "--num-layers", 2], "for flow='qr', which is one linear layer, got 2"),
    "fractions": (["data.csv", "--dequantize", "uniform"], "expected whole numbers from 0 on"),
    "one dimension": (["data.csv", "--columns", "weight", "--flow", "realnvp"], "input_dim"),
    "steps": (["moons", "--steps", 0], "--steps: expected an integer of at least 1"),
    "not a directory": (["moons", "--output", "data.csv"], "Not a directory: 'data.csv'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_INPUT))
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(tmp_path)
    values = rows_of(40)
    write_csv(Path("data.csv"), values)
    write_csv(Path("few.csv"), values[:5])
    Path("words.csv").write_text("height,name,weight\n" + 30 * "1,a,2\n")
    write_csv(Path("bare.csv"), values, "1.5,2")
    write_csv(Path("constant.csv"), torch.stack([values[:, 0], torch.ones(40)], -1))
    write_csv(Path("nan.csv"), torch.where(torch.arange(80).reshape(40, 2) == 7, math.nan, values))
    np.savez("two.npz", a=np.zeros(3), b=np.zeros(3))
    np.savez("scalar.npz", a=1.0)
    before = contents(tmp_path)
    argv, message = BAD_INPUT[name]
    run("density", *argv).failed(2, message)
    assert contents(tmp_path) == before
    assert not (tmp_path / "pyro-flows-density").exists()


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    run("density", "iris").failed(2, "pip install scikit-learn")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FloatingPointError("no finite loss"), 1, "no finite loss"),
        (KeyboardInterrupt(), 130, "interrupted; earlier results are as they were"),
    ],
    ids=["failing", "interrupted"],
)
def test_failing_run(
    error: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "density.json").write_text("earlier")
    monkeypatch.setattr(density_cli, "fit_density", fail)
    run("density", "moons", *TINY, "--output", tmp_path).failed(code, message)
    assert contents(tmp_path) == {"density.json": b"earlier"}


@pytest.mark.parametrize("argv", [["--list"], ["density", "--list"]], ids=str)
def test_list(argv: list[str], run: Run) -> None:
    done = run(*argv)
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines() if line.startswith("  ")]
    assert set(DATASETS) | set(FLOWS) <= set(names)
    assert ("sylvester" in names and "eight-schools" in names) == (len(argv) == 1)
