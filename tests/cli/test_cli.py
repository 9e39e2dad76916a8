import csv
import io
import json
import math
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_flows_ext.cli.fit as fit_cli
from pyro_flows_ext.cli import main
from pyro_flows_ext.results import load
from pyro_flows_ext.results.guides import GUIDES

TINY = ["--steps", "5", "--num-samples", "300", "--particles", "2"]
QUICK = ["--guide", "normal", "--steps", 5, "--num-samples", 300, "--particles", 1, "--quiet"]
FILES = ["fit.json", "guide.pt", "loss.png", "posterior.nc", "posterior.png", "summary.csv"]
Run = Callable[..., Any]

MODEL = """
import os, signal
from pathlib import Path
import pyro, torch, pyro.distributions as dist

STOP = 30
Path(__file__).with_name("ran").touch()

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

def other(y):
    mu = pyro.sample("nu", dist.Normal(torch.zeros(3), 10.0).to_event(1))

def never_finite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("zero", (mu - mu).sqrt())  # its gradient is inf - inf

def breaks(y):
    torch.ones(2) @ pyro.sample("mu", dist.Normal(0.0, 1.0)).expand(3)

def looks_up(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    {}["gone"]

def has_factor(y, group):
    alpha = pyro.sample("alpha", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha[group], 1.0), obs=y)

def masks(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    present = ~y.isnan()
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=present):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.where(present, y, torch.zeros_like(y)))

calls = []

def stopped(y, how):
    calls.append(1)
    if len(calls) == STOP:
        how()
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

def interrupted(y):
    stopped(y, lambda: os.kill(os.getpid(), signal.SIGINT))

def terminated(y):
    stopped(y, lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text('{"y": [0.5, 1.5, 2.5]}')
    path = tmp_path / "mine.py"
    path.write_text(MODEL)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def fit_mine(model_file: Path, attribute: str, *options: object) -> list[object]:
    data = model_file.with_name("data.json")
    return ["fit", f"{model_file}:{attribute}", "--data", data, *TINY, *options]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of the time of a small run."""
    for name in ("_posterior_png", "_loss_png"):
        monkeypatch.setattr(fit_cli, name, lambda *_: b"")


@pytest.fixture(scope="module")
def eight_schools(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a fit wrote, into a new directory and on the terminal."""
    out = tmp_path_factory.mktemp("eight-schools") / "new" / "results"
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as complaints:
        code = main(["fit", "eight-schools", *TINY, "--output", str(out)])
    assert (code, complaints.getvalue()) == (0, "")
    return out, printed.getvalue()


# --- fit ---


@pytest.mark.slow
def test_fit_writes_files_that_open(eight_schools: tuple[Path, str]) -> None:
    out, printed = eight_schools
    assert sorted(path.name for path in out.iterdir()) == FILES
    for word in ("mu", "theta[7]", "k-hat", "ESS", "ELBO", " ± ", "5 steps", "reference"):
        assert word in printed

    with (out / "summary.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["parameter", "mean", "sd", "q05", "q50", "q95"]
    table = {row[0]: [float(value) for value in row[1:]] for row in rows}
    assert len(table) == 18

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    data = arviz.from_netcdf(str(out / "posterior.nc"))
    theta = data["posterior"]["theta"].values
    assert theta.shape == (1, 300, 8)
    assert table["theta[3]"][0] == pytest.approx(theta[0, :, 3].mean(), rel=1e-4)
    assert table["theta[3]"][1] == pytest.approx(theta[0, :, 3].std(ddof=1), rel=1e-4)

    for name in ("posterior.png", "loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    content = torch.load(out / "guide.pt", weights_only=True)
    assert content["target"] == "eight-schools"
    assert content["guide"] == {"kind": "iaf", "num_layers": 2}


@pytest.mark.slow
def test_fit_own_model(model_file: Path, run: Run) -> None:
    out = model_file.with_name("results")
    done = run(*fit_mine(model_file, "model", "--output", out, "--quiet"))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert sorted(path.name for path in out.iterdir()) == FILES
    saved = load(out)
    assert saved.target == f"{model_file}:model"
    assert saved.data_file == str(model_file.with_name("data.json"))
    content = torch.load(out / "guide.pt", weights_only=True)
    assert set(content) == {"format", "version", "target", "guide", "state", "data"}
    assert set(content["data"]) == {"file", "digest"}  # and not the data
    report = json.loads((out / "fit.json").read_text())
    assert report["status"] == "finished"
    assert report["files"] == [
        "guide.pt", "fit.json", "summary.csv", "posterior.nc", "posterior.png", "loss.png",
    ]  # fmt: skip
    assert report["reason"] == "fixed"
    assert report["guide"] == {"kind": "iaf", "num_layers": 2}
    assert (report["seed"], report["settings"]["steps"], report["settings"]["num_samples"]) == (
        0,
        5,
        300,
    )
    assert math.isfinite(report["log_evidence"])
    assert isinstance(report["trusted"], bool)
    assert {"torch", "pyro-ppl", "pyro_flows_ext"} < set(report["versions"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_seed_decides(tmp_path: Path, run: Run) -> None:
    tables = []
    for i, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(i)
        run("fit", "u1", *TINY, "--quiet", "--seed", seed, "--output", out)
        tables.append((out / "summary.csv").read_text())
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


# --- sample ---

# Coupling layers need two latents at least, and the model has one.
COUPLINGS = ("realnvp", "nice", "glow-vector")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", [kind for kind in GUIDES if kind not in COUPLINGS])
def test_sample_from_the_trained_guide(kind: str, model_file: Path, run: Run) -> None:
    out = model_file.with_name("results")
    # mu's posterior is N(1.5, .58). Normals start near N(0, .1) and walk there, flows start there and move their layers.
    steps = 150 if "normal" in kind else 40
    lr = 0.005 if kind == "nsf" else 0.1
    options = ["--guide", kind, "--steps", steps, "--lr", lr, "--output", out, "--quiet"]
    assert run(*fit_mine(model_file, "model", *options)).code == 0
    target = ["--target", f"{model_file}:model"]
    done = run("sample", out, "--num-samples", 500, *target)
    assert done.code == 0
    # Short runs of some guides are not good ones, and a warning says so.
    assert not done.err or done.err.startswith("pyro-flows: warning: draws of the guide itself")
    draws = np.load(out / "draws.npz")["mu"]
    assert draws.shape == (500,)
    with (out / "summary.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    mean, sd = float(row["mean"]), float(row["sd"])
    assert mean == pytest.approx(1.5, abs=0.5)
    assert draws.mean() == pytest.approx(mean, abs=5 * sd * (1 / 500 + 1 / 300) ** 0.5)
    assert draws.std() == pytest.approx(sd, rel=0.3)


@pytest.mark.usefixtures("no_pictures")
def test_sample_built_in(tmp_path: Path, run: Run) -> None:
    fitted = tmp_path / "results"
    assert run("fit", "eight-schools", *TINY, "--output", fitted).code == 0
    files = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        files.append(tmp_path / "draws" / f"{name}.npz")
        done = run("sample", fitted, "--num-samples", 7, "--output", files[-1], "--seed", seed)
        assert done.code == 0
    a, b, c = (dict(np.load(file)) for file in files)
    assert {name: value.shape for name, value in a.items()} == {
        "mu": (7,), "tau": (7,), "theta_trans": (7, 8), "theta": (7, 8),
    }  # fmt: skip
    np.testing.assert_allclose(
        a["theta"], a["mu"][:, None] + a["tau"][:, None] * a["theta_trans"], rtol=1e-5
    )
    assert np.array_equal(a["mu"], b["mu"])
    assert not np.array_equal(a["mu"], c["mu"])


@pytest.mark.usefixtures("no_pictures")
def test_sample_runs_no_code_that_the_file_names(model_file: Path, run: Run) -> None:
    out = model_file.with_name("results")
    run(*fit_mine(model_file, "model", "--output", out, "--quiet"))
    model_file.with_name("ran").unlink()
    done = run("sample", out)
    assert done.code == 2
    assert f"add --target {model_file}:model if you trust it" in done.err
    assert not model_file.with_name("ran").exists()
    done = run("sample", out, "--target", f"{model_file}:other")
    assert done.code == 2
    assert "got other latents" in done.err


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


BAD_GUIDES = {
    "missing": (None, "expected guide.pt or density.pt; it holds neither"),
    "pickled code": ({"format": Payload()}, "is not a guide or density, or only half of one"),
    "foreign": ({"weights": torch.zeros(2)}, "is not a guide or density written by"),
    "foreign tensor": (torch.zeros(2), "is not a guide or density written by"),
    "newer": (
        {"format": "pyro_flows_ext guide", "version": 99},
        "format version 99, and this release reads 3: install a newer",
    ),
    "older": (
        {"format": "pyro_flows_ext guide", "version": 1},
        "format version 1, .* run it again",
    ),
    "entries": ({"format": "pyro_flows_ext guide", "version": 3, "guide": 3}, "entries do not fit"),
}


@pytest.mark.parametrize("name", list(BAD_GUIDES))
def test_bad_guide_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = BAD_GUIDES[name]
    if content is not None:
        torch.save(content, tmp_path / "guide.pt")
    run("sample", tmp_path).failed(2, message)
    assert not Path("ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_half_a_guide_file(share: float, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "guide.pt"
    torch.save({"format": "pyro_flows_ext guide", "version": 1, "state": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    run("sample", tmp_path).failed(2, "is not a guide or density, or only half of one")


# --- failures: one line, an exit code, and earlier results as they were ---


BAD_INPUT = {
    "no command": ([], "required: COMMAND"),
    "no such target": (["fit", "nine-schools"], "no target 'nine-schools': expected one of"),
    "no such file": (["fit", "gone.py:model"], "no file 'gone.py'"),
    "no such guide": (["fit", "u1", "--guide", "magic"], "invalid choice: 'magic'"),
    "no layers": (
        ["fit", "u1", "--guide", "normal", "--num-layers", "3"],
        "the guide 'normal' has no layers",
    ),
    "steps": (["fit", "u1", "--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
    "rate": (["fit", "u1", "--lr", "nan"], "--lr: expected a positive number, got 'nan'"),
    "seed": (["fit", "u1", "--seed", "4294967296"], "--seed: expected an integer below 2"),
    "wrong keys": (["fit", "eight-schools", "--data", "keys.json"], "missing sigma; unexpected s"),
    "no data wanted": (["fit", "u1", "--data", "keys.json"], "unexpected y, s; expected no data"),
    "nan": (
        ["fit", "eight-schools", "--data", "nan.csv"],
        "sigma: 1 of 2 values is NaN, the first in row 1 .sigma.1.",
    ),
    "no data": (["fit", "eight-schools", "--data", "gone.csv"], "No such file"),
    "not a directory": (["fit", "u1", "--output", "keys.json"], "Not a directory: 'keys.json'"),
    "below a file": (["fit", "u1", "--output", "keys.json/x"], "Not a directory: 'keys.json/x'"),
    "not an npz": (["sample", ".", "--output", "a.txt"], "ends in .npz or .csv or .parquet, got"),
}


@pytest.mark.parametrize("name", list(BAD_INPUT))
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.json").write_text('{"y": [1.0], "s": [1.0]}')
    Path("nan.csv").write_text("y,sigma\n1,2\n3,nan\n")
    before = contents(tmp_path)
    argv, message = BAD_INPUT[name]
    run(*argv).failed(2, message)
    assert contents(tmp_path) == before
    assert not (tmp_path / "pyro-flows-output").exists()


def line_of(text: str) -> int:
    """The line of the model's file with this text."""
    [line] = [i for i, line in enumerate(MODEL.splitlines(), 1) if text in line]
    return line


FAILURES = {
    "never_finite": (1, "no finite loss and gradient in 100 steps"),
    "breaks": (1, rf"mine\.py:{line_of('torch.ones(2) @')}: inconsistent tensor size"),
    "looks_up": (1, rf"mine\.py:{line_of('gone')}: KeyError: 'gone'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("attribute", list(FAILURES))
@pytest.mark.parametrize("earlier", [True, False], ids=["earlier results", "new directory"])
def test_failing_fit(attribute: str, earlier: bool, model_file: Path, run: Run) -> None:
    out = model_file.with_name("results")
    if earlier:
        before = write_earlier(out)
    options = [*QUICK[:2], "--steps", 200, "--particles", 1, "--output", out]
    done = run(*fit_mine(model_file, attribute, *options))
    done.failed(*FAILURES[attribute])
    if earlier:
        assert contents(out) == before
        assert len(list(out.iterdir())) == len(FILES)
    else:
        assert not out.exists()


def write_earlier(out: Path) -> dict[str, bytes]:
    out.mkdir()
    for name in FILES:
        (out / name).write_text("earlier")
    return contents(out)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("attribute", "code", "word"), [("interrupted", 130, "interrupted"), ("terminated", 143, "terminated")]
)  # fmt: skip
def test_a_stopped_fit_keeps_its_state(
    attribute: str, code: int, word: str, model_file: Path, run: Run
) -> None:
    out = model_file.with_name("results")
    done = run(*fit_mine(model_file, attribute, *QUICK, "--steps", 200, "--output", out))
    assert (done.code, done.out) == (code, "")
    done.complained(f"{word}; wrote guide.pt, fit.json, summary.csv, posterior.nc")
    report = json.loads((out / "fit.json").read_text())
    assert (report["status"], report["trusted"]) == ("unfinished", False)
    target = f"{model_file}:model"
    done = run("sample", out, "--num-samples", 5, "--target", target)
    assert done.code == 0
    done.complained("warning: draws of the guide itself, which differ from the posterior's: k-hat")
    assert np.load(out / "draws.npz")["mu"].shape == (5,)


def test_a_fit_stopped_before_its_first_step_leaves_nothing(model_file: Path, run: Run) -> None:
    model_file.write_text(MODEL.replace("STOP = 30", "STOP = 1"))
    out = model_file.with_name("results")
    done = run(*fit_mine(model_file, "interrupted", *QUICK, "--output", out))
    done.failed(130, "interrupted; earlier results are as they were")
    assert not out.exists()


@pytest.mark.usefixtures("no_pictures")
def test_resume_goes_on_from_the_checkpoint(
    model_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_flows_ext.infer.training.checkpoint.SAVE_SECONDS", 0.0)
    out = model_file.with_name("results")
    options = [*QUICK, "--steps", 60, "--checkpoint", "--output", out]
    assert run(*fit_mine(model_file, "interrupted", *options)).code == 130
    assert (out / "checkpoint.pt").exists()
    first = json.loads((out / "fit.json").read_text())["steps"]
    assert 0 < first < 60
    model_file.write_text(MODEL.replace("STOP = 30", "STOP = None"))
    assert run(*fit_mine(model_file, "interrupted", *options, "--resume")).code == 0
    report = json.loads((out / "fit.json").read_text())
    assert (report["status"], report["steps"]) == ("finished", 60)
    assert not (out / "checkpoint.pt").exists()


@pytest.mark.usefixtures("no_pictures")
def test_columns_select_the_data(model_file: Path, run: Run) -> None:
    """The model has no parameter for the other column."""
    table = model_file.with_name("table.csv")
    table.write_text("y,other\n" + "1.5,2\n2.5,3\n0.5,4\n")
    out = model_file.with_name("results")
    options = [*QUICK, "--steps", 5, "--output", out]
    target = f"{model_file}:model"
    run("fit", target, "--data", table, *options).failed(2, "unexpected other")
    assert run("fit", target, "--data", table, "--columns", "y", *options).code == 0
    run("fit", target, "--data", table, "--columns", "z", *options).failed(2, "no column 'z'")
    run("fit", "eight-schools", "--columns", "y", *options).failed(2, "add --data")
    draws = out / "draws.csv"
    done = run("sample", out, "--target", target, "--columns", "y", "--output", draws)
    assert done.code == 0
    assert len(draws.read_text().splitlines()) == 1001


# --- a verdict ---


@pytest.mark.usefixtures("no_pictures")
def test_a_fit_ends_when_its_draws_can_be_trusted(model_file: Path, run: Run) -> None:
    out = model_file.with_name("results")
    options = ["--num-samples", 1000, "--output", out]
    done = run("fit", f"{model_file}:model", "--data", model_file.with_name("data.json"), *options)
    assert (done.code, done.err) == (0, "")
    assert "Trusted: the " in done.out
    report = json.loads((out / "fit.json").read_text())
    assert (report["trusted"], report["reason"], report["advice"]) == (True, "trusted", [])
    with (out / "summary.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    # The posterior is N(4.5 / 3.01, 1 / 3.01).
    assert float(row["mean"]) == pytest.approx(4.5 / 3.01, abs=0.1)
    assert float(row["sd"]) == pytest.approx(3.01**-0.5, rel=0.1)


# --- files that cannot be written ---


def test_an_exporter_that_fails_costs_its_own_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise ImportError("no module named 'h5py'")

    monkeypatch.setattr(fit_cli, "to_netcdf_bytes", fail)
    monkeypatch.setattr(fit_cli, "_posterior_png", fail)
    write_earlier(tmp_path / "out")
    (tmp_path / "out" / "posterior.png").unlink()
    done = run("fit", "u1", *QUICK, "--output", tmp_path / "out")
    assert (done.code, done.out) == (3, "")
    done.complained(
        r"could not write posterior\.nc \(ImportError: no module named 'h5py'; the one there is of an earlier run\), "
        r"posterior\.png \(ImportError: .*'h5py'\); wrote guide\.pt, fit\.json, summary\.csv, loss\.png"
    )
    assert (tmp_path / "out" / "posterior.nc").read_text() == "earlier"
    assert not (tmp_path / "out" / "posterior.png").exists()
    report = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert report["files"] == ["guide.pt", "fit.json", "summary.csv", "loss.png"]
    assert set(report["not_written"]) == {"posterior.nc", "posterior.png"}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk(tmp_path: Path, run: Run) -> None:
    before = write_earlier(tmp_path / "out")
    with file_size_limit(100):
        done = run("fit", "u1", *QUICK, "--output", tmp_path / "out")
    done.failed(1, "File too large: .*guide.pt")
    assert contents(tmp_path / "out") == before
    assert len(list((tmp_path / "out").iterdir())) == len(FILES)
    with file_size_limit(10_000):
        done = run("fit", "u1", *QUICK, "--output", tmp_path / "out")
    done.failed(3, r"could not write posterior\.nc \(File too large: .*wrote guide.pt, fit.json")
    assert (tmp_path / "out" / "posterior.nc").read_text() == "earlier"
    assert load(tmp_path / "out").target == "u1"


@pytest.mark.usefixtures("no_pictures")
def test_what_a_killed_run_left_is_removed(tmp_path: Path, run: Run) -> None:
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    left = tmp_path / f".unfinished-{host}-999999999-1-guide.pt"
    left.touch()
    assert run("fit", "u1", *QUICK, "--output", tmp_path).code == 0
    assert not left.exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_long_log_likelihood_is_written_when_asked_for(
    model_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_flows_ext.diagnostics.export.MAX_LOG_LIKELIHOOD", 899)
    out = model_file.with_name("results")
    found = []
    for options in ([], ["--log-likelihood"]):
        assert run(*fit_mine(model_file, "model", *QUICK, *options, "--output", out)).code == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
        data = arviz.from_netcdf(str(out / "posterior.nc"))
        names = data.groups() if callable(data.groups) else data.groups
        found.append(any("log_likelihood" in name for name in names))
    assert found == [False, True]


# --- pictures ---


@pytest.mark.parametrize("trusted", [True, False])
def test_pictures_carry_the_verdict(
    trusted: bool, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    fit = fit_cli.fit

    def judged(*args: Any, **kwargs: Any) -> Any:
        result = fit(*args, **kwargs)
        weights = replace(result.importance, k_hat=0.2 if trusted else 0.9)
        return replace(result, trusted=trusted, reason="level", importance=weights)

    monkeypatch.setattr(fit_cli, "fit", judged)
    monkeypatch.setattr(fit_cli, "png_bytes", lambda figure: figures.append(figure) or b"")
    assert run("fit", "u1", *QUICK, "--output", tmp_path).code == 0
    assert len(figures) == 2
    for figure in figures:
        title = figure.get_suptitle().replace("\n", " ")
        assert title.startswith("Trusted" if trusted else "Not trusted: more steps gain nothing")
        assert f"k-hat {0.2 if trusted else 0.9:.2f}" in title
        is_red = figure._suptitle.get_color() == fit_cli.plots.WARNING_COLOR
        assert is_red != trusted
    # Without reliable weights there are no draws but the guide's.
    labels = [text.get_text() for ax in figures[0].axes for text in _legend_texts(ax)]
    assert ("reweighted" in labels) == trusted


def _legend_texts(ax: Any) -> list[Any]:
    legend = ax.get_legend()
    return [] if legend is None else legend.get_texts()


# --- data ---


@pytest.mark.usefixtures("no_pictures")
def test_strings_in_a_csv_are_a_factor(model_file: Path, run: Run) -> None:
    data = model_file.with_name("data.csv")
    data.write_text("y,group\n1,west\n2,east\n3,west\n")
    out = model_file.with_name("results")
    options = ["--data", data, *QUICK[:-1], "--output", out]
    done = run("fit", f"{model_file}:has_factor", *options)
    assert (done.code, done.err) == (0, "")
    assert "group: 0 = east, 1 = west" in done.out
    assert json.loads((out / "fit.json").read_text())["data"]["levels"]["group"] == ["east", "west"]


@pytest.mark.usefixtures("no_pictures")
def test_missing_values_may_be_masked(model_file: Path, run: Run) -> None:
    model_file.with_name("data.json").write_text('{"y": [0.5, null, 2.5]}')
    out = model_file.with_name("results")
    done = run(*fit_mine(model_file, "masks", *QUICK, "--output", out))
    assert (done.code, done.err) == (0, "")
    done = run(*fit_mine(model_file, "model", *QUICK, "--output", out))
    done.failed(2, r"y: 1 of 3 values is NaN, the first in row 1 .*mask")


# --- the rest ---


@pytest.mark.slow
def test_demo(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "demo"
    done = run("demo", *TINY, "--output", out)
    assert (done.code, done.err) == (0, "")
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.split()}
    assert "4.41 ± 3.31" in rows["reference"]
    assert "3.60 ± 3.20" in rows["reference"]
    assert "±" in rows["normal"]
    assert "±" in rows["iaf"]
    assert {path.name for path in out.glob("*.png")} >= {
        "posterior-normal.png",
        "posterior-iaf.png",
    }


@pytest.mark.parametrize("argv", [["--help"], ["fit", "--help"], ["sample", "--help"]], ids=str)
def test_help(argv: list[str], run: Run) -> None:
    done = run(*argv)
    assert done.code == 0
    assert "pyro-flows" in done.out


@pytest.mark.parametrize("argv", [["--list"], ["fit", "--list"]], ids=str)
def test_list(argv: list[str], run: Run) -> None:
    done = run(*argv)
    assert done.code == 0
    assert "eight-schools-centered" in done.out
    assert "multivariate-normal" in done.out


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyro_flows_ext",
            "fit",
            "nine-schools",
            "--output",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pyro-flows: error: no target 'nine-schools'")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
