"""Every test starts from the same state: an empty parameter store, a fixed seed, one thread."""

import sys

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_state():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if (
        "torch._dynamo" in sys.modules
    ):  # what earlier tests compiled counts against the limit of recompilations
        torch._dynamo.reset()
