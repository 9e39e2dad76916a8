"""The bound and the density behind `AutoHamiltonian`: in closed form, against evidence, by hand and by integration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hamiltonian_models import (
    DESIGN,
    LOG_EVIDENCE,
    NOISE,
    PRIOR,
    Empirical,
    X,
    Y,
    closed_form,
    linear_gaussian,
    linear_guide,
    model,
    perturbed,
)
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoHamiltonian
from pyro_flows_ext.guides.hamiltonian import HamiltonianFlow
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit
from pyro_flows_ext.programs import draw_particles
from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import Leapfrog, Whitening

# --- the bound ---


@pytest.mark.parametrize("tempering", [False, "quadratic", "free"], ids=str)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_elbo_is_that_of_linear_maps_of_normal_noise(num_steps, tempering):
    guide = linear_guide(num_steps, tempering=tempering)
    with torch.no_grad():
        log_weights = draw_particles(linear_gaussian, guide, num_samples=4000).log_weights
        exact = closed_form(guide).item()
    assert exact < LOG_EVIDENCE
    error = log_weights.std().item() / len(log_weights) ** 0.5
    assert log_weights.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.1 * (LOG_EVIDENCE - exact)  # so that the gap is seen


def test_a_quarter_of_a_turn_puts_the_momentum_in_place_of_the_latents():
    """Where the posterior is N(0, I), z_K is ρ_0 and ρ_K is -z_0 but for the size of steps: any start becomes exact."""

    def posterior():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    gaps = []
    for num_steps in (2, 8, 32):
        guide = AutoHamiltonian(
            posterior,
            num_steps,
            step_size=math.pi / 2 / num_steps,
            init_loc_fn=init_to_value(values={"z": torch.zeros(2, dtype=torch.float64)}),
            init_scale=1.0,
        )
        guide.setup()
        with torch.no_grad():
            guide.transform.start.log_scale.fill_(math.log(0.2))
            guide.transform.reverse_net[-1].bias[2:] = math.log(0.2)  # almost: it is bounded
            log_weights = draw_particles(posterior, guide, num_samples=500).log_weights
        gaps.append(-log_weights.mean().item())
        pyro.clear_param_store()
    assert gaps[0] > 3 * abs(gaps[1])
    assert gaps[2] == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_more_steps_tighten_the_bound():
    """On a correlated posterior, with the best step sizes, masses, start and r for each number of steps."""
    bounds = []
    for num_steps in (1, 2, 4):
        pyro.clear_param_store()
        guide = linear_guide(num_steps, scale=0.01)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
        for _ in range(150):
            loss = -closed_form(guide)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bounds.append(-loss.item())
    gaps = [LOG_EVIDENCE - bound for bound in bounds]
    assert gaps[0] > 2 * gaps[1] > 2 * gaps[2] > 0
    assert gaps[0] > 5 * gaps[2]


@pytest.mark.parametrize("seed", range(3))
def test_weights_average_to_the_evidence_and_the_bound_stays_below(seed):
    pyro.set_rng_seed(seed)
    guide = perturbed(3, scale=0.15, program=linear_gaussian, args=(), tempering="free")
    precision = PRIOR.inverse() + DESIGN.outer(DESIGN) / NOISE**2
    cov = precision.inverse()
    # Wider than the posterior: weights of a narrower guide have no variance.
    guide.whiten(cov @ DESIGN * X / NOISE**2, 1.2 * torch.linalg.cholesky(cov))
    log_weights = draw_particles(linear_gaussian, guide, num_samples=10_000).log_weights
    ratio = (log_weights - LOG_EVIDENCE).exp()
    error = ratio.std().item() / len(ratio) ** 0.5
    assert error < 0.1
    assert ratio.mean().item() == pytest.approx(1, abs=4 * error)
    assert log_weights.mean() + 3 * log_weights.std() / len(log_weights) ** 0.5 < LOG_EVIDENCE


def banana():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([2.0, 1.0])).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2 / 2, 0.5), obs=torch.tensor(0.0))


@pytest.mark.slow
def test_a_bent_posterior_is_followed_further_than_by_independent_normals():
    results = []
    for guide in (AutoHamiltonian(banana, 3, step_size=0.25, init_scale=1.0), AutoNormal(banana)):
        pyro.clear_param_store()
        fit(
            banana,
            guide,
            num_steps=150,
            num_particles=32,
            lr=0.05,
            warm_start=False,
            progress=False,
            seed=0,
        )
        results.append(importance(banana, guide, num_samples=4000))
    ours, theirs = results
    assert ours.elbo > theirs.elbo + 3 * math.hypot(ours.elbo_se, theirs.elbo_se)
    assert ours.ess > 2 * theirs.ess


# --- the density of latents and momentum ---


class _Well(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(dim, dim) / dim**0.5)

    def forward(self, z):
        return z.square().sum(-1) / 2 + (z @ self.mix).cos().sum(-1)


# Not 4, which counts calls of `forward_and_ladj`: see `test_one_pass`. Nor 13: compiling takes long.
@pytest.mark.parametrize("point", [p for p in POINTS.values() if p.number not in (4, 13)], ids=str)
def test_latents_with_momentum_are_a_flow_under_contract(point):
    dim = 1 if point.number == 14 else 3

    def make():
        whitening = Whitening(torch.randn(dim), torch.eye(dim) + torch.ones(dim, dim).tril(-1))
        return HamiltonianFlow(
            Leapfrog(_Well(dim), dim, 2, step_size=0.2, tempering="free"), whitening, (4,)
        )

    for dtype in point.dtypes:
        point.check(make, dtype=dtype)


LOSSES = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=1),
    "importance-weighted": ImportanceWeightedELBO,
    "stl": lambda: ImportanceWeightedELBO(1, "stl"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_is_the_elbo_of_the_extended_space(loss):
    guide = perturbed()
    pyro.set_rng_seed(3)
    value = loss().loss_and_grads(model, guide, Y)
    pyro.set_rng_seed(3)
    guide_trace = poutine.trace(guide).get_trace(Y)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(Y)
    flow, latent = guide.transform, guide_trace.nodes["_AutoHamiltonian_latent"]["value"].detach()
    noise, ladj = flow.inverse_and_ladj(latent)
    log_q = dist.Normal(torch.zeros_like(noise), 1.0).log_prob(noise).sum() + ladj
    z, momentum = flow.whitening.inv(latent[:5]), latent[5:]
    shift, raw = flow.reverse_net(z).chunk(2, -1)
    root, c = flow.leapfrog.mass.sqrt(), math.log(1000)
    r = dist.Normal(root * shift, root * (c * (raw / c).tanh()).exp())
    log_q = log_q - guide_trace.nodes["tau"]["value"].log()  # tau is the exponential of a latent
    expected = model_trace.log_prob_sum() + r.log_prob(momentum).sum() - log_q
    assert -value == pytest.approx(expected.item(), abs=1e-6)
    for name, p in guide.transform.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_the_potential_is_the_models_log_joint_in_whitened_coordinates():
    guide = perturbed()
    guide.whiten(torch.arange(5.0) / 10, torch.eye(5) + 0.2 * torch.ones(5, 5).tril(-1))
    z = torch.randn(2, 4, 5, dtype=torch.float64)
    mu, log_tau, *theta = guide.whitening(z).unbind(-1)
    theta = torch.stack(theta, -1)
    expected = (
        dist.Normal(0.0, 2.0).log_prob(mu)
        + dist.Normal(0.0, 0.5).log_prob(log_tau)
        + dist.Normal(mu[..., None], log_tau.exp()[..., None]).log_prob(theta).sum(-1)
        + dist.Normal(theta, 1.0).log_prob(Y).sum(-1)
    )
    torch.testing.assert_close(guide.transform.leapfrog.potential(z), -expected)


def one_latent():
    pyro.sample("s", dist.Gamma(torch.tensor(3.0, dtype=torch.float64), 1.0))


@pytest.mark.slow
def test_the_bound_on_the_density_rises_to_that_of_the_draws():
    guide = perturbed(3, program=one_latent, args=(), scale=0.5)
    s = torch.linspace(0.02, 60, 1500, dtype=torch.float64)
    with torch.no_grad():
        density = guide.log_prob_bound({"s": s}, 1000).exp()
        draws = guide.sample_posterior(20_000)["s"]
    cdf = torch.cumulative_trapezoid(density, s)
    assert cdf[-1].item() == pytest.approx(1, abs=0.02)
    shares = (draws[:, None] <= s[1:]).double().mean(0)
    assert (shares - cdf).abs().max() < 0.03
    few = {"s": s[25:250:25]}
    with torch.no_grad():
        one = torch.stack([guide.log_prob_bound(few, 1) for _ in range(300)]).mean(0)
    gap = density[25:250:25].log() - one
    assert gap.mean() > 0
    assert (gap > -0.1).all()
    assert guide.log_prob_bound({"s": torch.tensor([-1.0], dtype=torch.float64)}) == -torch.inf


# --- gradients ---


@pytest.mark.parametrize(
    "loss",
    [lambda: Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1), Trace_ELBO],
    ids=["vectorized", "single"],
)
def test_the_models_parameters_get_the_gradient_of_the_bound(loss):
    program = Empirical()
    guide = perturbed(program=program, args=(Y,))

    def value():
        pyro.set_rng_seed(1)
        return loss().loss(program, guide, Y)

    pyro.set_rng_seed(1)
    loss().loss_and_grads(program, guide, Y)
    leaves = [program.loc, program.noise_unconstrained, pyro.param("width").unconstrained()]
    leaves.append(guide.transform.leapfrog.log_step)
    for leaf in leaves:
        gradient, flat = leaf.grad.clone(), leaf.data.view(-1)
        ends = []
        for eps in (1e-5, -1e-5):
            flat[0] += eps
            guide.transform.clear_cache()
            ends.append(value())
            flat[0] -= eps
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope) > 1e-4
        assert gradient.view(-1)[0].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.slow
def test_path_gradients_are_unbiased():
    guide = perturbed(1, program=one_latent, args=())
    means, errors = [], []
    for kind in ("iwae", "dreg"):
        rows = []
        for seed in range(100):
            pyro.set_rng_seed(seed)
            guide.zero_grad()
            ImportanceWeightedELBO(3, kind, max_plate_nesting=0).loss_and_grads(one_latent, guide)
            rows.append(torch.cat([p.grad.flatten() for p in guide.transform.parameters()]))
        rows = torch.stack(rows)
        means.append(rows.mean(0))
        errors.append(rows.std(0) / len(rows) ** 0.5)
    assert ((means[0] - means[1]).abs() <= 5 * errors[0].hypot(errors[1])).all()
