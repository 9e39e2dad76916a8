"""What `AutoFlow` refuses, and what looks alike and is fine."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_guides import Y, model, trained
from pyro import poutine
from pyro.infer import (
    SVI,
    TraceEnum_ELBO,
    config_enumerate,
)

from pyro_flows_ext.guides import (
    AutoFlow,
    AutoPlanar,
    AutoSylvester,
)
from pyro_flows_ext.guides.base import FlowGuide
from pyro_flows_ext.infer import fit
from pyro_flows_ext.transforms import planar

# --- what must be refused ---


def test_a_guide_without_its_parts_is_abstract():
    class Half(FlowGuide):
        def get_base_dist(self):
            return dist.Normal(torch.zeros(1), 1.0).to_event(1)

    with pytest.raises(TypeError, match=r"abstract class Half .*_make_transform.*whitening"):
        Half(model, planar)


def test_a_discrete_latent_is_refused_by_name():
    def discrete():
        pyro.sample("z", dist.Bernoulli(0.5))

    guide = AutoPlanar(discrete)
    with pytest.raises(ValueError, match="'z' is discrete"):
        guide.setup()
    assert guide.prototype_trace is None


def test_a_hidden_discrete_latent_is_no_obstacle():
    @config_enumerate
    def mixture():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=Y)

    guide = AutoPlanar(poutine.block(mixture, hide=["z"]), 2)
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert svi.step() > 0


def test_a_local_latent_under_a_subsampled_plate_is_refused():
    def subsampled():
        with pyro.plate("data", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' is local to plate 'data', which subsamples 4 of 10"):
        AutoPlanar(subsampled).setup()


def test_a_global_latent_beside_a_subsampled_plate_is_fine():
    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    guide = AutoPlanar(subsampled, 2)
    result = fit(subsampled, guide, Y, num_steps=20, progress=False, warm_start=False, seed=0)
    assert result.skipped_steps == 0


def test_arguments_that_resize_a_latent_are_refused_and_others_are_not():
    guide = AutoPlanar(model, 1)
    guide.setup(Y)
    with pytest.raises(ValueError, match=r"'theta' has size .*'J', 5"):
        guide(torch.zeros(5))

    def regression(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = AutoPlanar(regression, 1)
    guide.setup(Y, Y)
    assert guide(torch.zeros(5))["w"].shape == ()


def test_a_second_guide_is_refused_until_the_store_is_cleared():
    first = trained(AutoSylvester)
    second = AutoSylvester(model)
    with pytest.raises(ValueError, match="already holds parameters under the name 'AutoSylvester'"):
        second.setup(Y)
    with pyro.get_param_store().scope():
        fit(model, second, Y, num_steps=2, progress=False, warm_start=False)
    fit(model, first, Y, num_steps=2, progress=False, warm_start=False)
    pyro.clear_param_store()
    fit(model, second, Y, num_steps=2, progress=False, warm_start=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AutoPlanar(model, init_scale=0.0), ValueError, "init_scale"),
        (lambda: AutoFlow(model, "spiral"), ValueError, "flow: expected one of nsf"),
        (lambda: AutoFlow(model, 3), TypeError, "flow: expected a name or a callable"),
        (lambda: AutoFlow(model, lambda d: d).setup(Y), TypeError, "return a FlowTransform"),
        (lambda: AutoSylvester(model, rank=9).setup(Y), ValueError, "rank: expected at most"),
        (lambda: AutoPlanar(model).get_posterior(), ValueError, "call guide.setup"),
    ],
    ids=["scale", "name", "type", "factory", "rank", "not-set-up"],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_flows_by_name_and_by_factory():
    for flow in ("planar", "radial", "sylvester", lambda d: planar(d, num_layers=2)):
        pyro.clear_param_store()
        guide = AutoFlow(model, flow)
        guide.setup(Y)
        assert guide.sample_posterior(2)["theta"].shape == (2, 3)
