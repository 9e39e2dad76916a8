"""The top-level names: complete, lazy, light, and seen by type checkers."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pyro_flows_ext as pf


def output_of(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_every_name_is_there():
    assert set(pf.__all__) <= set(dir(pf))
    for name in pf.__all__:
        assert getattr(pf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = pf.nope


def test_every_room_is_there():
    rooms = {path.parent.name for path in Path(pf.__file__).parent.glob("*/__init__.py")}
    assert rooms - set(pf.__all__) == {"cli"}  # which is the command


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import time; begin = time.process_time(); import sys, pyro_flows_ext; "
        "print(time.process_time() - begin < 0.2, "
        "[m for m in ('torch', 'pyro', 'arviz', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    assert output_of(code) == "True []"


def test_training_imports_no_plots_or_tables():
    code = (
        "import sys, torch, pyro, pyro.distributions as dist, pyro_flows_ext as pf\n"
        "def model(): pyro.sample('z', dist.Normal(0., 1.))\n"
        "pf.fit(model, pf.AutoPlanar(model), num_steps=2, progress=False)\n"
        "pf.fit_density(pf.flows.NSF(2), torch.randn(50, 2), num_steps=2, progress=False)\n"
        "print([m for m in ('arviz', 'matplotlib', 'pandas', 'rich') if m in sys.modules])"
    )
    assert output_of(code) == "[]"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy")
def test_type_checkers_see_every_name(tmp_path):
    lines = [f"pf.{name}" for name in pf.__all__]
    script = tmp_path / "script.py"
    script.write_text(
        "import pyro_flows_ext as pf\n"
        + "\n".join(lines)
        + "\nreveal_type(pf.flows.NSF(3))\npf.flows.NSF(3, num_layers='two')\npf.nope_at_all\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", tmp_path, script],
        capture_output=True,
        text=True,
    )  # fmt: skip
    problems = [line for line in run.stdout.splitlines() if "error:" in line]
    assert "flow.FlowDistribution" in run.stdout
    assert len(problems) == 2, run.stdout
    assert 'incompatible type "str"' in problems[0]
    assert "nope_at_all" in problems[1]
