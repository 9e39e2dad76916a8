"""Flow guides in `pyro.contrib.forecast`, which calls them for the training period and for the forecast."""

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.forecast import Forecaster, ForecastingModel

from pyro_flows_ext.guides import AutoIAF, AutoSylvester
from pyro_flows_ext.infer import fit

T, AHEAD = 12, 3


class RandomWalk(ForecastingModel):
    def model(self, zero_data, covariates):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(torch.zeros(1), 0.3).to_event(1))
        self.predict(dist.Normal(0, scale), drift.cumsum(-2))


def test_forecasts_of_a_random_walk():
    torch.manual_seed(0)
    data = (0.3 * torch.randn(T)).cumsum(0).unsqueeze(-1)
    covariates = torch.zeros(T + AHEAD, 0)
    model = RandomWalk()
    guide = AutoSylvester(model, 2)
    forecaster = Forecaster(
        model, data, covariates[:T], guide=guide, num_steps=200, learning_rate=0.02, log_every=0
    )
    samples = forecaster(data, covariates, num_samples=800)
    assert samples.shape == (800, AHEAD, 1)
    last = guide.sample_posterior(800, data, covariates)["drift"].cumsum(-2)[:, -1]
    torch.testing.assert_close(samples[:, 0].mean(), last.mean(), atol=0.1, rtol=0)
    # Three steps of sd .3 and the noise of the observation on top of the last level.
    extra = samples[:, 2].var() - samples[:, 0].var()
    torch.testing.assert_close(extra, torch.tensor(2 * 0.09), atol=0.1, rtol=0)


def test_the_guide_takes_the_training_period_by_itself():
    data, covariates = torch.randn(T, 1), torch.zeros(T + AHEAD, 0)
    model = RandomWalk()
    guide = AutoIAF(model)
    fit(model, guide, data, covariates[:T], num_steps=2, progress=False, warm_start=False)
    assert guide(data, covariates)["drift"].shape == (T, 1)
    assert guide(data, covariates=covariates)["drift"].shape == (T, 1)
