"""The straight ways stay straight: calls of Python functions of the package in a pass, at most."""

import os
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.transforms import Coupling, nsf

ROOT = os.path.dirname(pyro_flows_ext.__file__)


def own_calls(run):
    """How many functions of the package the third call of `run` enters: the first two may set things up."""
    run(), run()
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(ROOT)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def scoring(transform):
    density = FlowDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), transform)
    x = torch.randn(5, 2)
    return lambda: density.log_prob(x)


@pytest.mark.parametrize(
    ("make", "limit"), [(Coupling, 25), (nsf, 120)], ids=["affine coupling", "nsf"]
)
def test_log_prob(make, limit):
    assert 10 < own_calls(scoring(make(2))) <= limit


def test_draw_of_a_guide():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))

    guide = AutoIAF(model)
    guide.setup()
    assert 10 < own_calls(guide) <= 100
