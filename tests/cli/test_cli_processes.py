"""The command line under `torchrun` with two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("commands.py")


@pytest.mark.slow  # a start of two processes takes some ten seconds
def test_the_first_process_prints_and_writes(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 3))
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", header="a,b,c", comments="")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(SCRIPT), str(tmp_path)], env=environment, check=True, timeout=900)
    first, second = (json.loads((tmp_path / f"found-{i}.json").read_text()) for i in (0, 1))
    for name in ("fit", "density"):
        assert first[name]["code"] == second[name]["code"] == 0, (first[name], second[name])
        assert first[name]["out"].count("wrote ") == 1
        assert second[name]["out"] == second[name]["err"] == ""
        report = json.loads((tmp_path / name / f"{name}.json").read_text())
        assert report["status"] == "finished"
        # No checkpoint, and no unfinished file of the other process.
        found = {path.name for path in (tmp_path / name).iterdir()}
        assert found == {f"{name}.json", "guide.pt" if name == "fit" else "density.pt"}
    assert first["bad"]["code"] == second["bad"]["code"] == 2
    assert first["bad"]["err"].startswith("pyro-flows: error: ")
    assert second["bad"]["err"].startswith("pyro-flows: process 1 of 2: error: ")
    for found in (first, second):
        assert found["demo"]["code"] == 2
        assert "demo: expected one process, got 2; fit and density alone" in found["demo"]["err"]
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "demo").exists()
