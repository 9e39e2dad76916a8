"""Data and checks for tests of the normalising layers."""

import pyro.distributions as dist
import pytest
import torch

D = 3
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def data(*batch, dtype=torch.float64):
    scale = torch.tensor([0.01, 1.0, 300.0])
    return (torch.randn(*batch, D) * scale + torch.tensor([5.0, 0.0, -1e3])).to(dtype)


def through(transform, batch, inverse):
    return transform.inverse_and_ladj(batch) if inverse else transform.forward_and_ladj(batch)


def is_standard(out, tolerance=1e-10):
    rows = out.detach().reshape(-1, D)
    return (
        rows.mean(0).abs().max() < tolerance
        and (rows.std(0, correction=0) - 1).abs().max() < tolerance
    )


def base():
    return dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
