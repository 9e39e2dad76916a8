"""Every test starts from the same state, in any order: seeded generators, an empty parameter store, one thread.

pytest --draws 7         the same tests at other draws: a test that passes at seed 0 alone is a chance
pytest --shuffle 7       the same tests in another order
"""

import gc
import random
import sys

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, default=0, help="seed of every test's generators")
    parser.addoption("--shuffle", type=int, default=None, help="seed of the order of the tests")


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


def pytest_collection_finish():
    """Leaves the imported modules, half a million objects, out of the collections of cycles, and makes those rarer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collectstart(collector):
    """Draws at import do not depend on the modules imported before."""
    pyro.set_rng_seed(collector.config.getoption("--draws"))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture that several tests share is the same whichever of them comes first."""
    if fixturedef.scope != "function":
        pyro.set_rng_seed(request.config.getoption("--draws"))
        pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _fresh_state(request):
    pyro.clear_param_store()
    pyro.set_rng_seed(request.config.getoption("--draws"))
    # Graphs compiled by earlier tests count against the limit of recompilations.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    before = _global_state()
    yield
    after = _global_state()
    _restore(before)
    # torch.compile switches this off at its first call, for good: hence restored, and not the test's doing.
    for state in (before, after):
        state["pyro"].pop("validate_distributions_torch")
    assert after == before, "the test left a global setting changed, which the next one would see"


def _global_state():
    return {
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "pyro": pyro.settings.get(),
    }


def _restore(state):
    torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(state["gradients"])
    pyro.settings.set(**state["pyro"])
