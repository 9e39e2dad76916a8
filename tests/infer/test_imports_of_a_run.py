"""Imports of a run of training: torch's compiler takes longer than many a fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pyro_flows_ext.infer._adam import Adam
from pyro_flows_ext.ops import broadcast_shapes

FIT = """
import sys
import pyro, torch
import pyro.distributions as dist
from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import fit, fit_density
import pyro_flows_ext as pf

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + share, tau), obs=y)

y = torch.arange(10.0)
fit(model, AutoIAF(model), y, num_steps=5, seed=0, progress=False)
fit_density(pf.flows.MAF(2), torch.randn(200, 2), num_steps=5, seed=0, progress=False)
print([name for name in ("torch._dynamo",) if name in sys.modules])
"""


def test_fit_and_fit_density_leave_the_compiler_unimported() -> None:
    out = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"


def test_adam_takes_the_steps_of_torch() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = [Adam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1, fused=True)]
    for i in range(4):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p in params:
                p.grad = torch.sin(p.detach() * (i + 1))
            optimizer.step()
        if i == 1:
            copy = Adam(ours, lr=0.5)
            copy.load_state_dict(optimizers[0].state_dict())
            optimizers[0] = copy
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shapes", [(), ((),), ((2,), (3, 1)), ((1, 4), (3, 1), ()), ((0,), (1,)), ((5, 0, 2), (1, 2))]
)
def test_shapes_broadcast_as_those_of_torch(shapes: tuple[tuple[int, ...], ...]) -> None:
    assert broadcast_shapes(*shapes) == torch.broadcast_shapes(*shapes)
    assert isinstance(broadcast_shapes(*shapes), torch.Size)


def test_shapes_that_do_not_broadcast_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"\(2, 3\), \(4, 3\).* got 2 and 4 in dimension -2"):
        broadcast_shapes((2, 3), (4, 3))
