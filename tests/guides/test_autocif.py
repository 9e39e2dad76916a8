"""`AutoCIF` as a user of Pyro meets it."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from cif_models import SHAPES, Y, model, perturbed
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import NeuTraReparam

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoCIF, AutoFlow
from pyro_flows_ext.infer import fit
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import radial, sylvester


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(1), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(z**2, 1.0).to_event(1), obs=torch.tensor([4.0]))


@pytest.mark.slow
def test_two_separate_modes():
    guide = AutoCIF(
        two_modes,
        2,
        "nsf-ar",
        hidden_dims=[16, 16],
        base_scale=10.0,
        init_scale=1.0,
        init_loc_fn=init_to_value(values={"z": torch.zeros(1)}),
    )
    fit(
        two_modes,
        guide,
        num_steps=400,
        num_particles=128,
        lr=5e-3,
        warm_start=False,
        progress=False,
        seed=0,
    )
    z = torch.linspace(-8, 8, 4001)
    log_joint = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z**2, 1.0).log_prob(
        torch.tensor(4.0)
    )
    evidence = torch.trapezoid(log_joint.exp(), z).log().item()
    result = importance(two_modes, guide, num_samples=4000)
    assert evidence - 0.3 < result.elbo < evidence + 3 * result.elbo_se  # one mode: log 2 less
    assert 0.2 < (result.samples["z"] > 0).float().mean() < 0.8


@pytest.mark.slow
def test_fit_whitens_and_bounds_the_evidence():
    cov = torch.tensor([[1.0, 9.0], [9.0, 100.0]])

    def scaled():
        pyro.sample("z", dist.MultivariateNormal(torch.tensor([30.0, -70.0]), cov))

    guide = AutoCIF(scaled, 2)
    result = fit(scaled, guide, num_steps=30, num_particles=32, lr=1e-3, progress=False, seed=0)
    assert result.warm_start is not None
    assert result.elbo == pytest.approx(0, abs=0.1)
    torch.testing.assert_close(
        guide.whitening.scale_tril @ guide.whitening.scale_tril.mT, cov, rtol=0.3, atol=0.0
    )
    weighed = importance(scaled, guide, num_samples=500)
    assert weighed.log_evidence == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    "transform",
    ["realnvp", "nsf", "nsf-ar", "iaf", "maf", sylvester],
    ids=lambda t: t if isinstance(t, str) else t.__name__,
)
def test_every_transform_starts_at_location_and_scale_and_moves(transform):
    start = init_to_value(
        values={"mu": torch.tensor(3.0, dtype=torch.float64), "tau": Y[0], "theta": Y}
    )
    guide = AutoCIF(model, 3, transform, base_scale=2.0, init_loc_fn=start, init_scale=0.01)
    draws = guide.sample_posterior(2000, Y)
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == SHAPES
    assert draws["mu"].mean().item() == pytest.approx(3.0, abs=0.01)
    assert draws["mu"].std().item() == pytest.approx(0.02, rel=0.1)
    before = copy.deepcopy(guide).requires_grad_(False)
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    )
    for _ in range(3):
        svi.step(Y)
    for (name, p), old in zip(guide.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert (p != old).any(), name


def test_quantiles_and_median_agree_with_draws():
    guide = perturbed(2, scale=0.3)
    draws = guide.sample_posterior(20_000)
    quantiles, median = guide.quantiles([0.25, 0.75]), guide.median()
    for name in SHAPES:
        sd = draws[name].std(0)
        error = quantiles[name] - draws[name].quantile(
            torch.tensor([0.25, 0.75], dtype=torch.float64), 0
        )
        assert (error.abs() < 0.1 * sd).all()
        assert ((median[name] - draws[name].median(0).values).abs() < 0.1 * sd).all()


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_complete(make):
    guide = perturbed(2)
    Trace_ELBO().loss_and_grads(model, guide, Y)
    other = make(guide)
    pyro.set_rng_seed(0)
    samples = guide.sample_posterior(3)
    bound = guide.log_prob_bound(samples)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(other.sample_posterior(3), samples)
    torch.testing.assert_close(other.log_prob_bound(samples), bound)
    perturb(guide.transform)
    assert (
        other.transform.layers[0].reverse_net[-1].bias
        != guide.transform.layers[0].reverse_net[-1].bias
    ).any()


def test_state_dict_round_trip_loads_with_weights_only():
    guide = perturbed(2)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    fresh = AutoCIF(model, 2)
    fresh.setup(Y)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    pyro.set_rng_seed(0)
    samples = guide.sample_posterior(3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(fresh.sample_posterior(3), samples)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_predictive(parallel):
    predictive = Predictive(model, guide=perturbed(1), num_samples=5, parallel=parallel)
    draws = predictive(Y)
    assert draws["theta"].reshape(5, -1).shape == (5, 3)


def test_in_a_guide_list():
    guide = AutoGuideList(model)
    guide.append(AutoCIF(poutine.block(model, expose=["mu", "tau"]), 1))
    guide.append(AutoNormal(poutine.block(model, expose=["theta"])))
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    )
    svi.step(Y)
    before = guide[0].transform.layers[0].reverse_net[-1].weight.detach().clone()
    svi.step(Y)
    assert (guide[0].transform.layers[0].reverse_net[-1].weight != before).any()


def test_one_pass_samples_scores_and_gives_the_reverse_model():
    guide = AutoCIF(model, 2)
    guide.setup(Y)
    calls = []
    for k, layer in enumerate(guide.transform.layers):
        for name in ("push", "pull"):
            method = getattr(layer, name)
            layer.__dict__[name] = lambda *args, call=(name, k), method=method: (
                calls.append(call),
                method(*args),
            )[1]
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss.loss_and_grads(model, guide, Y)
    assert calls == [("push", 0), ("push", 1)]


# --- what must be refused ---


def test_there_is_no_exact_density():
    guide = perturbed(1)
    assert AutoFlow.exact_log_prob
    assert not guide.exact_log_prob
    assert not isinstance(guide, AutoFlow)
    assert not hasattr(guide, "log_prob")
    with pytest.raises(AttributeError, match="use log_prob_bound"):
        guide.log_prob(guide.sample_posterior(2))
    with pytest.raises(ValueError, match="NeuTraReparam only supports guides"):
        poutine.trace(poutine.reparam(model, config=lambda _: NeuTraReparam(guide))).get_trace(Y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"index_dim": 1.5}, ValueError, "index_dim"),
        ({"base_scale": 0.0}, ValueError, "base_scale"),
        ({"transform": "spiral"}, ValueError, "expected one of realnvp"),
        ({"transform": 3}, TypeError, "transform: expected a name or a callable"),
        ({"transform": radial, "hidden_dims": [8]}, ValueError, "hidden_dims"),
        ({"transform": lambda D: D}, TypeError, "expected a FlowTransform"),
        ({"init_scale": -1.0}, ValueError, "init_scale"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        AutoCIF(model, **options).setup(Y)
