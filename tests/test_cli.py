import csv
import io
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import assert_one_line, contents, run

import pyro_flows_ext.cli as cli
from pyro_flows_ext.cli.checkpoint import GUIDES, read_guide

TINY = ["--steps", "20", "--num-samples", "300", "--particles", "2"]
FILES = ["guide.pt", "loss.png", "posterior.nc", "posterior.png", "summary.csv"]

MODEL = """
from pathlib import Path
import pyro, torch, pyro.distributions as dist

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

calls = []

def interrupted(y):
    calls.append(1)
    if len(calls) == 15:
        raise KeyboardInterrupt
    pyro.sample("mu", dist.Normal(0.0, 1.0))
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text('{"y": [0.5, 1.5, 2.5]}')
    path = tmp_path / "mine.py"
    path.write_text(MODEL)
    return path


def fit_mine(model_file: Path, attribute: str, *options: object) -> list[object]:
    data = model_file.with_name("data.json")
    return ["fit", f"{model_file}:{attribute}", "--data", data, *TINY, *options]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of the time of a small run."""
    monkeypatch.setattr(cli, "write_figures", lambda *_: None)


@pytest.fixture(scope="module")
def eight_schools(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a fit wrote, into a new directory and on the terminal."""
    out = tmp_path_factory.mktemp("eight-schools") / "new" / "results"
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as complaints:
        code = cli.main(["fit", "eight-schools", *TINY, "--output", str(out)])
    assert (code, complaints.getvalue()) == (0, "")
    return out, printed.getvalue()


# --- fit ---


@pytest.mark.slow
def test_fit_writes_files_that_open(eight_schools: tuple[Path, str]) -> None:
    out, printed = eight_schools
    assert sorted(path.name for path in out.iterdir()) == FILES
    for word in ("mu", "theta[7]", "k-hat", "ESS", "ELBO", " ± ", "20 steps in", "reference"):
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
def test_fit_own_model(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model_file.with_name("results")
    done = run(capsys, *fit_mine(model_file, "model", "--output", out, "--quiet"))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert torch.equal(read_guide(out / "guide.pt").data["y"], torch.tensor([0.5, 1.5, 2.5]))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_seed_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for i, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(i)
        run(capsys, "fit", "u1", *TINY, "--quiet", "--seed", seed, "--output", out)
        tables.append((out / "summary.csv").read_text())
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


# --- sample ---


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", [kind for kind in GUIDES if kind != "realnvp"])  # of one latent
def test_sample_from_the_trained_guide(
    kind: str, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model_file.with_name("results")
    # mu's posterior is N(1.5, .58). Normals start near N(0, .1) and walk there, flows start there and move their layers.
    steps = 150 if "normal" in kind else 40
    lr = 0.005 if kind == "nsf" else 0.1
    options = ["--guide", kind, "--steps", steps, "--lr", lr, "--output", out, "--quiet"]
    assert run(capsys, *fit_mine(model_file, "model", *options)).code == 0
    target = ["--target", f"{model_file}:model"]
    done = run(capsys, "sample", out, "--num-samples", 500, *target)
    assert (done.code, done.err) == (0, "")
    draws = np.load(out / "draws.npz")["mu"]
    assert draws.shape == (500,)
    with (out / "summary.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    mean, sd = float(row["mean"]), float(row["sd"])
    assert mean == pytest.approx(1.5, abs=0.5)
    assert draws.mean() == pytest.approx(mean, abs=5 * sd * (1 / 500 + 1 / 300) ** 0.5)
    assert draws.std() == pytest.approx(sd, rel=0.3)


def test_sample_built_in(
    eight_schools: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted, _ = eight_schools
    files = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        files.append(tmp_path / "draws" / f"{name}.npz")
        done = run(
            capsys, "sample", fitted, "--num-samples", 7, "--output", files[-1], "--seed", seed
        )
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


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_sample_runs_no_code_that_the_file_names(
    model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model_file.with_name("results")
    run(capsys, *fit_mine(model_file, "model", "--output", out, "--quiet"))
    model_file.with_name("ran").unlink()
    done = run(capsys, "sample", out)
    assert done.code == 2
    assert f"add --target {model_file}:model if you trust it" in done.err
    assert not model_file.with_name("ran").exists()
    done = run(capsys, "sample", out, "--target", f"{model_file}:other")
    assert done.code == 2
    assert "other latents" in done.err


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


BAD_GUIDES = {
    "missing": (None, "no file .*guide.pt': run pyro-flows fit first"),
    "pickled code": ({"format": Payload()}, "is not a guide, or only half of one"),
    "foreign": ({"weights": torch.zeros(2)}, "is not a guide written by pyro-flows"),
    "foreign tensor": (torch.zeros(2), "is not a guide written by pyro-flows"),
    "newer": ({"format": "pyro_flows_ext guide", "version": 99}, "format version 99"),
    "entries": ({"format": "pyro_flows_ext guide", "version": 1, "guide": 3}, "entries do not fit"),
}


@pytest.mark.parametrize("name", list(BAD_GUIDES))
def test_bad_guide_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = BAD_GUIDES[name]
    if content is not None:
        torch.save(content, tmp_path / "guide.pt")
    assert_one_line(run(capsys, "sample", tmp_path), 2, message)
    assert not Path("ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_half_a_guide_file(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "guide.pt"
    torch.save({"format": "pyro_flows_ext guide", "version": 1, "state": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_one_line(run(capsys, "sample", tmp_path), 2, "is not a guide, or only half of one")


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
    "nan": (["fit", "eight-schools", "--data", "nan.csv"], "sigma: 1 of 2 values are NaN"),
    "no data": (["fit", "eight-schools", "--data", "gone.csv"], "No such file"),
    "not a directory": (["fit", "u1", "--output", "keys.json"], "Not a directory: 'keys.json'"),
    "below a file": (["fit", "u1", "--output", "keys.json/x"], "Not a directory: 'keys.json/x'"),
    "not an npz": (["sample", ".", "--output", "draws.csv"], "ends in .npz, got 'draws.csv'"),
}


@pytest.mark.parametrize("name", list(BAD_INPUT))
def test_bad_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.json").write_text('{"y": [1.0], "s": [1.0]}')
    Path("nan.csv").write_text("y,sigma\n1,2\n3,nan\n")
    before = contents(tmp_path)
    argv, message = BAD_INPUT[name]
    assert_one_line(run(capsys, *argv), 2, message)
    assert contents(tmp_path) == before
    assert not (tmp_path / "pyro-flows-output").exists()


FAILURES = {
    "never_finite": (1, "no finite loss and gradient in 100 steps"),
    "breaks": (1, "inconsistent tensor size"),
    "looks_up": (1, "KeyError: 'gone'"),
    "interrupted": (130, "interrupted; earlier results are as they were"),
}


@pytest.mark.slow
@pytest.mark.parametrize("attribute", list(FAILURES))
@pytest.mark.parametrize("earlier", [True, False], ids=["earlier results", "new directory"])
def test_failing_fit(
    attribute: str, earlier: bool, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model_file.with_name("results")
    if earlier:
        out.mkdir()
        for name in FILES:
            (out / name).write_text("earlier")
        before = contents(out)
    options = ["--output", out, "--steps", 200, "--particles", 1]
    done = run(capsys, *fit_mine(model_file, attribute, *options))
    assert_one_line(done, *FAILURES[attribute])
    if earlier:
        assert contents(out) == before
        assert len(list(out.iterdir())) == len(FILES)
    else:
        assert not out.exists()


# --- the rest ---


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    done = run(capsys, "demo", *TINY, "--output", out)
    assert (done.code, done.err) == (0, "")
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.split()}
    assert "4.41 ± 3.31" in rows["reference"]
    assert "3.60 ± 3.20" in rows["reference"]
    assert "±" in rows["normal"]
    assert "±" in rows["iaf"]
    assert len(list(out.glob("*.png"))) == 4


@pytest.mark.parametrize("argv", [["--help"], ["fit", "--help"], ["sample", "--help"]], ids=str)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, *argv)
    assert done.code == 0
    assert "pyro-flows" in done.out


@pytest.mark.parametrize("argv", [["--list"], ["fit", "--list"]], ids=str)
def test_list(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, *argv)
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
