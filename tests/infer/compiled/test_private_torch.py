"""Private interfaces of torch that a version lacks: imports work, and steps are eager with one warning."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
import torch, pyro, pyro.distributions as dist
from pyro.infer import Trace_ELBO

sys.modules[{missing!r}] = None  # an import of it raises ImportError
from pyro_flows_ext.infer import CompiledSVI

def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

def guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

svi = CompiledSVI(model, guide, pyro.optim.Adam({{"lr": 0.1}}), Trace_ELBO(), steps_per_call=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    svi.run(7)
reasons = [str(w.message) for w in caught if "CompiledSVI takes eager steps" in str(w.message)]
assert len(reasons) == 1, reasons
assert {missing!r}.split(".")[-1] in reasons[0], reasons
assert pyro.param("loc").item() != 0
"""


@pytest.mark.parametrize(
    "missing",
    [
        "torch._inductor.decomposition",
        "torch._higher_order_ops.while_loop",
    ],
)
def test_a_missing_interface_leaves_eager_steps(missing: str) -> None:
    script = SCRIPT.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
