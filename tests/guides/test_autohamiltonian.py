"""`AutoHamiltonian` as a user of Pyro meets it."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from hamiltonian_models import SHAPES, Empirical, Y, model, perturbed
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoHamiltonian
from pyro_flows_ext.infer import fit
from pyro_flows_ext.programs import draw_particles, vectorization_error


@pytest.mark.slow
def test_fit_begins_warm_and_whitens():
    cov = torch.tensor([[1.0, 9.0], [9.0, 100.0]])

    def scaled():
        pyro.sample("z", dist.MultivariateNormal(torch.tensor([30.0, -70.0]), cov))

    guide = AutoHamiltonian(scaled, 2)
    result = fit(scaled, guide, num_steps=20, num_particles=16, lr=1e-3, progress=False, seed=0)
    assert result.warm_start is not None
    assert result.elbo == pytest.approx(0, abs=0.1)
    scale_tril = guide.whitening.scale_tril
    torch.testing.assert_close(scale_tril @ scale_tril.mT, cov, rtol=0.3, atol=0.0)
    assert importance(scaled, guide, num_samples=500).log_evidence == pytest.approx(0, abs=0.05)


def test_particles_in_a_batch_are_those_one_by_one():
    guide = perturbed()
    assert vectorization_error(model, guide, (Y,)) is None
    particles = draw_particles(model, guide, (Y,), num_samples=5)
    assert {k: tuple(v.shape[1:]) for k, v in particles.samples.items()} == SHAPES
    draws = guide.sample_posterior(1001)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        k: (1001, *shape) for k, shape in SHAPES.items()
    }
    assert {v.dtype for v in draws.values()} == {torch.float64}


def test_a_model_that_cannot_run_many_particles_moves_them_one_by_one():
    def flat_sum():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("all", -(1 - z.sum()).pow(2))

    guide = perturbed(program=flat_sum, args=())
    z = torch.randn(4, 2)
    y = guide.whitening(z)
    expected = y.square().sum(-1) / 2 + math.log(2 * math.pi) + (1 - y.sum(-1)) ** 2
    torch.testing.assert_close(guide.transform.leapfrog.potential(z), expected)
    assert "the log joint of a particle" in vectorization_error(flat_sum, guide)


def test_other_arguments_do_not_move_the_guide():
    def regression(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)

    x = torch.tensor([1.0, 2.0, 3.0])
    guide = AutoHamiltonian(regression, 2)
    guide.setup(x, 2 * x)
    guide.whiten(torch.tensor([2.0]), torch.tensor([[0.03]]))
    draws = Predictive(regression, guide=guide, num_samples=50, parallel=True)(torch.ones(7))
    assert draws["y"].shape == (50, 7)
    assert draws["w"].mean().item() == pytest.approx(2.0, abs=0.1)


def test_one_pass_samples_scores_and_gives_the_reverse_model():
    guide = perturbed()
    calls = []
    for name in ("_push", "_pull"):
        method = getattr(guide.transform, name)
        guide.transform.__dict__[name] = lambda *args, name=name, method=method: (
            calls.append(name),
            method(*args),
        )[1]
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss.loss_and_grads(model, guide, Y)
    assert calls == ["_push"]


@pytest.mark.parametrize("change", ["step", "by hand"])
def test_no_pass_is_taken_for_that_of_other_parameters_of_the_model(change):
    program = Empirical()
    guide = perturbed(program=program, args=(Y,))
    posterior = guide.get_posterior()
    with torch.no_grad():
        value = posterior.rsample()
        before = posterior.log_prob(value)
        if change == "step":
            program.loc.grad = torch.ones_like(program.loc)
            torch.optim.SGD([program.loc], lr=1.0).step()
        else:
            program.loc += 1.0
        after = posterior.log_prob(value)
        torch.testing.assert_close(after, posterior.log_prob(value.clone()))
    assert abs(after - before) > 1e-3


def test_a_copy_has_model_and_data():
    guide = perturbed()
    Trace_ELBO().loss_and_grads(model, guide, Y)
    other = copy.deepcopy(guide)
    pyro.set_rng_seed(0)
    samples = guide.sample_posterior(3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(other.sample_posterior(3), samples)
    guide.whiten(guide.whitening.loc + 1, guide.whitening.scale_tril)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(other.sample_posterior(3), samples)
    assert (other.transform.whitening.loc != guide.whitening.loc).all()


def test_a_guide_from_a_file_is_given_model_and_data():
    guide = perturbed(tempering="quadratic")
    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match=r"call guide\.attach"):
        loaded.sample_posterior(3)
    loaded.attach(model, Y)
    pyro.set_rng_seed(0)
    samples = guide.sample_posterior(3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(loaded.sample_posterior(3), samples)
    again = copy.deepcopy(loaded)
    assert again.sample_posterior(2)["theta"].shape == (2, 3)


def test_state_dict_round_trip_loads_with_weights_only():
    guide = perturbed()
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    fresh = AutoHamiltonian(model, 2)
    fresh.setup(Y)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    pyro.set_rng_seed(0)
    samples = guide.sample_posterior(3)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(fresh.sample_posterior(3), samples)


def test_in_a_guide_list_beside_latents_that_it_need_not_know():
    def two_parts(y=Y):
        model(y)
        pyro.sample("other", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))

    guide = AutoGuideList(two_parts)
    guide.append(AutoHamiltonian(poutine.block(two_parts, hide=["other"]), 1))
    guide.append(AutoNormal(poutine.block(two_parts, expose=["other"])))
    loss = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(two_parts, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    svi.step(Y)
    before = guide[0].transform.leapfrog.log_step.detach().clone()
    svi.step(Y)
    assert (guide[0].transform.leapfrog.log_step != before).any()


# --- what must be refused ---


def subsampled(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def noisy(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("noise", mu * torch.randn(()))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (subsampled, r"got the subsampled plates \['data'\]"),
        (noisy, "two runs at the same latents gave"),
        (poutine.block(model, hide=["mu"]), "two runs at the same latents gave"),
    ],
    ids=["subsampled", "noise", "hidden"],
)
def test_a_log_joint_that_is_random_is_refused(program, message):
    guide = AutoHamiltonian(program)
    with pytest.raises(ValueError, match=message):
        guide.setup(Y)
    assert guide.prototype_trace is None


def test_a_model_that_draws_more_than_the_latents_is_refused_data():
    def regression(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)

    x = torch.ones(3)
    guide = AutoHamiltonian(regression)
    guide.setup(x, x)
    with pytest.raises(ValueError, match="latent 'y' of the model"):
        guide.attach(regression, x)


def test_there_is_no_exact_density():
    guide = perturbed()
    assert not guide.exact_log_prob
    with pytest.raises(AttributeError, match="use log_prob_bound"):
        guide.log_prob(guide.sample_posterior(2))
    with pytest.raises(TypeError, match="NeuTra"):
        guide.get_transform()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"step_size": -0.1}, "step_size"),
        ({"tempering": "slow"}, "tempering"),
        ({"init_scale": 0.0}, "init_scale"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AutoHamiltonian(model, **options).setup(Y)
