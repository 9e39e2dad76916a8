"""Commands of one process of several: `torchrun commands.py FOLDER` writes exit codes and output of each by process."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from pyro_flows_ext.cli import main
from pyro_flows_ext.cli.output import Output


def run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in argv])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def commands(folder):
    yield "bad", ["fit", "no-such-model", "--output", folder / "bad"]
    yield "demo", ["demo", "--output", folder / "demo"]
    quick = ["--guide", "normal", "--steps", 5, "--num-samples", 50, "--particles", 2]
    yield "fit", ["fit", "eight-schools", *quick, "--output", folder / "fit"]
    rows = ["density", folder / "rows.csv", "--steps", 20, "--num-layers", 2, "--checkpoint"]
    yield "density", [*rows, "--output", folder / "density"]


# Pictures are for other tests, and take most of the time.
Output.add = lambda self, name, make: None
folder = Path(sys.argv[1])
found = {}
for name, argv in commands(folder):
    found[name] = run(*argv)
    # The first process writes for a while, in which the other one starts no other command.
    torch.distributed.barrier()
(folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
