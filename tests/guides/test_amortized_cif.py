"""`AutoAmortizedFlow(flow="cif")`: a continuously indexed posterior for each datum, its density, copies and refusals."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_models import (
    CIF,
    LATENT,
    NOISE,
    REVERSE,
    SITES,
    W,
    at,
    encoder,
    linear,
    perturbed,
    several,
    simulate,
    terms,
)
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.guides.cif import IndexedFlow, IndexedLayer
from pyro_flows_ext.infer import fit
from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import ElementwiseAffine, Radial

NUM_DATA = 300
INDEX = torch.arange(1, 151, 3).flip(0)  # 50 of them
WAYS = {
    "all": (lambda x: x, {}),
    "mini-batch": (lambda x: x[INDEX], {}),
    "drawn": (lambda x: x, {"size": 50}),
    "given": (lambda x: x, {"index": INDEX}),
    "permuted": (lambda x: x, {"index": torch.arange(NUM_DATA).flip(0)}),
}


@pytest.mark.parametrize(("data", "kwargs"), WAYS.values(), ids=WAYS)
def test_a_datum_has_the_same_posterior_in_every_batch(data, kwargs):
    x = simulate(NUM_DATA, torch.float64)
    guide = perturbed(linear, x, **CIF)
    trace = poutine.trace(guide).get_trace(data(x), **kwargs)
    index = INDEX if data(x) is not x else trace.nodes["data"]["value"]
    value = torch.zeros(NUM_DATA, 4, dtype=x.dtype)
    value[index] = trace.nodes[LATENT]["value"].detach()
    assert torch.equal(trace.nodes["z"]["value"], trace.nodes[LATENT]["value"][:, :2])
    for here, among_all in zip(terms(trace), terms(at(guide, value, x)), strict=True):
        torch.testing.assert_close(among_all[index], here, atol=1e-8, rtol=0)
        assert len(here.unique()) == len(index)
    scale = len(data(x)) / len(index)
    assert all(trace.nodes[name]["scale"] == scale for name in ("z", LATENT, REVERSE))


# --- densities ---


@pytest.mark.parametrize("point", [POINTS[n] for n in (1, 2, 3, 6, 7, 8, 9, 11)], ids=str)
def test_latents_with_indices_at_a_context_are_a_flow_under_contract(point):
    def make():
        layers = [IndexedLayer(Radial(3, context_dim=2), 3, context_dim=2) for _ in range(2)]
        return IndexedFlow(layers, ElementwiseAffine(3, context_dim=2))

    for dtype in point.dtypes:
        point.check(make, dtype=dtype)


def one_latent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.slow
@torch.no_grad()
def test_the_density_of_every_datum_and_its_bound_by_integration():
    """Over a grid of z and u: q(z, u) and r(u | z) have mass one, and the bound has q(z) = ∫ q(z, u) du for mean."""
    x = simulate(3, torch.float64)
    guide = perturbed(one_latent, x, **CIF, num_layers=1, init_scale=1.0)
    z, u = (torch.linspace(-20, 20, n, dtype=torch.float64) for n in (401, 801))
    grid = torch.stack(torch.meshgrid(z, u, indexing="ij"), -1).unsqueeze(-2).expand(-1, -1, 3, -1)
    joint, reverse = (t.exp() for t in terms(at(guide, grid, x)))
    marginal = torch.trapezoid(joint, u, dim=1)
    ones = torch.ones_like(marginal)
    torch.testing.assert_close(torch.trapezoid(marginal, z, dim=0), ones[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.trapezoid(reverse, u, dim=1), ones, atol=1e-3, rtol=0)
    # E_r [q(z, u) / r(u | z)] = q(z), and logarithms fall short on average, the less the more particles.
    some = torch.arange(170, 240, 10)  # -3 to 3
    short = []
    for num_particles in (1, 20):
        points = {"z": z[some, None].expand(2000, -1, 3)}
        bound = guide.log_prob_bound(points, x, num_particles=num_particles)
        log_ratio = bound - marginal[some].log()
        ratio = log_ratio.exp()
        error = ratio.std(0) / 2000**0.5
        assert (error < 0.15).all()
        assert ((ratio.mean(0) - 1).abs() < 5 * error).all()
        short.append(-log_ratio.mean(0))
    assert (short[0] > 2 * short[1]).all()
    assert (short[1] > 0).all()


def test_the_bound_outside_a_support():
    x = simulate(3)
    guide = AutoAmortizedFlow(several, encoder(), **CIF)
    samples = guide.sample_posterior(2, x)
    samples["tau"][1] = -1.0
    inside = guide.log_prob_bound(samples, x, num_particles=3).isfinite()
    assert inside.tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("size", [None, 5], ids=["all", "subsample"])
@pytest.mark.parametrize("particles", [0, 3], ids=["alone", "particles"])
def test_several_latents_in_and_out_of_a_plate_within_the_datum(size, particles):
    x = simulate(6, torch.float64)
    guide = perturbed(several, x, **CIF)
    program = pyro.plate("particles", particles, dim=-3)(guide) if particles else guide
    trace = poutine.trace(program).get_trace(x, size)
    index = trace.nodes["data"]["value"]
    lead = (particles,) * bool(particles) + (len(index),)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in SITES}
    assert shapes == {name: lead + shape for name, shape in SITES.items()}
    assert (trace.nodes["tau"]["value"] > 0).all()
    flat = trace.nodes[LATENT]["value"].squeeze(-2).detach().clone()
    posterior = guide._posterior(x[index])
    for here, afresh in zip(
        terms(trace),
        (posterior.log_prob(flat), posterior.transforms[0].log_reverse(flat)),
        strict=True,
    ):
        torch.testing.assert_close(here, afresh.unsqueeze(-1), atol=1e-7, rtol=0)


def test_draws_and_quantiles_for_new_data_of_any_number():
    x = simulate(20)
    guide = perturbed(linear, x, dtype=torch.float32, **CIF)
    for new in (simulate(1), simulate(33)):
        draws = guide.sample_posterior(7, new)["z"]
        assert draws.shape == (7, len(new), 2)
        assert not draws.requires_grad
        assert guide.log_prob_bound({"z": draws}, new, num_particles=3).shape == (7, len(new))
    quantiles = guide.quantiles([0.1, 0.9], x[:3])["z"]
    draws = guide.sample_posterior(10_000, x[:3])["z"]
    error = quantiles - draws.quantile(torch.tensor([0.1, 0.9]), 0)
    assert (error.abs() < 0.1 * draws.std(0)).all()


def test_scale_and_mask_in_the_model_hold_in_the_guide():
    mask = torch.tensor([True, False, True, True])

    def model(x):
        with poutine.scale(scale=0.3), pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=x)

    x = simulate(4, torch.float64)
    trace = poutine.trace(perturbed(model, x, **CIF)).get_trace(x)
    log_q, log_r = terms(trace)
    torch.testing.assert_close(trace.log_prob_sum(), 0.3 * (log_q - log_r)[mask].sum())


# --- beside other guides, copies, files, what it refuses ---


def hierarchy(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        rows = x if index is None else x[index]
        loc = z.unsqueeze(-1).expand([*z.shape, 2])
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=rows)


def test_in_a_list_with_a_global_guide():
    x = 1.0 + torch.randn(20, 2)
    local = AutoAmortizedFlow(poutine.block(hierarchy, hide=["mu"]), encoder(2), **CIF)
    guide = AutoGuideList(hierarchy, create_plates=local.data_plate)
    guide.append(AutoNormal(poutine.block(hierarchy, expose=["mu"])))
    guide.append(local)
    options = {"num_steps": 20, "num_particles": 2, "progress": False}
    assert fit(hierarchy, guide, x, size=5, **options).skipped_steps == 0
    for kwargs, scale in (({}, 1), ({"size": 5}, 4)):
        trace = poutine.trace(guide).get_trace(x, **kwargs)
        for name in ("z", "_AutoGuideList.1_latent", "_AutoGuideList.1_r"):
            assert trace.nodes[name]["scale"] == scale
        assert trace.nodes["mu"]["scale"] == 1
    assert {k: tuple(v.shape) for k, v in guide.median(x).items()} == {"mu": (), "z": (20,)}


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_complete(make):
    x = simulate(5)
    guide = perturbed(linear, x, dtype=torch.float32, **CIF)
    Trace_ELBO().loss_and_grads(linear, guide, x)
    value = torch.randn(5, 4)
    before = [t.detach() for t in terms(at(guide, value, x))]
    other = make(guide)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1)
    assert (terms(at(guide, value, x))[0] != before[0]).all()
    with pyro.get_param_store().scope():
        for here, there in zip(before, terms(at(other, value, x)), strict=True):
            torch.testing.assert_close(there, here)


def test_state_dict_round_trip_loads_with_weights_only():
    x = simulate(5)
    guide = perturbed(linear, x, dtype=torch.float32, **CIF)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    value = torch.randn(5, 4)
    before = [t.detach() for t in terms(at(guide, value, x))]
    pyro.clear_param_store()
    fresh = AutoAmortizedFlow(linear, encoder(), **CIF)
    fresh.setup(x)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for here, there in zip(before, terms(at(fresh, value, x)), strict=True):
        torch.testing.assert_close(there, here)


def test_what_has_no_density_says_what_has():
    x = simulate(4)
    guide = AutoAmortizedFlow(linear, encoder(), **CIF)
    with pytest.raises(ValueError, match=r"call guide\.setup"):
        guide.log_prob_bound({}, x)
    samples = guide.sample_posterior(3, x)
    assert not guide.exact_log_prob
    with pytest.raises(TypeError, match=r'flow="cif".*use log_prob_bound.*ImportanceWeightedELBO'):
        guide.log_prob(samples, x)
    with pytest.raises(ValueError, match=r"expected values of shape \(\*, 2, \*\)"):
        guide.log_prob_bound(samples, x[:2])
    with pytest.raises(ValueError, match="num_particles: expected a positive integer"):
        guide.log_prob_bound(samples, x, num_particles=0)
    with pytest.raises(ValueError, match="num_layers: expected a positive integer"):
        AutoAmortizedFlow(linear, encoder(), flow="cif", num_layers=0).setup(x)
    exact = perturbed(linear, x, flow="realnvp", dtype=torch.float32)
    assert exact.exact_log_prob
    torch.testing.assert_close(exact.log_prob_bound(samples, x), exact.log_prob(samples, x))
