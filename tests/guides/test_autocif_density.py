"""The density behind `AutoCIF`, of latents and indices together: by hand, in closed form and by integration."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cif_models import SHAPES, Y, linear_guide, model, one_latent, one_layer, perturbed
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch.autograd.functional import jacobian

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoFlow
from pyro_flows_ext.guides.cif import IndexedFlow, IndexedLayer
from pyro_flows_ext.infer import ImportanceWeightedELBO
from pyro_flows_ext.programs import draw_particles
from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import ComposeFlow, ElementwiseAffine, radial

# --- the density of latents and indices ---


# Not 4, which counts calls of `forward_and_ladj`: see `test_one_pass`. Nor 13: compiling takes long.
@pytest.mark.parametrize("point", [p for p in POINTS.values() if p.number not in (4, 13)], ids=str)
def test_latents_with_indices_are_a_flow_under_contract(point):
    dim = 1 if point.number == 14 else 3

    def make():
        layers = [IndexedLayer(radial(dim), dim) for _ in range(1 if dim == 1 else 2)]
        return IndexedFlow(layers, ComposeFlow([ElementwiseAffine(dim)]))

    for dtype in point.dtypes:
        point.check(make, dtype=dtype)


def by_hand(guide, latent):
    """log q(z, u) and log r(u | z) of one latent, from normal densities and the Jacobian of w -> z at fixed u."""
    flow, D = guide.transform, guide.latent_dim
    noise = flow.inv(latent)
    indices = latent[D:].reshape(len(flow.layers), -1)

    def normal(net, at, u):
        loc, raw = net(at).chunk(2, -1)
        c = math.log(1000)
        return dist.Normal(loc, (c * (raw / c).tanh()).exp()).log_prob(u).sum()

    def place(w):
        for layer, u in zip(flow.layers, indices, strict=True):
            w = layer.indexed.condition(u)(w)
        return flow.placement(w)

    z, log_r = noise[:D], 0.0
    log_q = dist.Normal(torch.zeros_like(z), guide._base_scale).log_prob(z).sum()
    log_q = log_q - torch.linalg.slogdet(jacobian(place, z))[1]
    for layer, u in zip(flow.layers, indices, strict=True):
        log_q = log_q + normal(layer.index_net, z, u)
        z = layer.indexed.condition(u)(z)
        log_r = log_r + normal(layer.reverse_net, layer.indexed.transform.inv(z), u)
    torch.testing.assert_close(flow.placement(z), latent[:D])
    return log_q, log_r


LOSSES = {
    "trace": Trace_ELBO,
    "mean-field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "enum": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "jit": JitTrace_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=1),
    "importance-weighted": ImportanceWeightedELBO,
    "stl": lambda: ImportanceWeightedELBO(1, "stl"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit warns of its end
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_is_the_elbo_of_the_extended_space(loss):
    guide = perturbed(3, "nsf", index_dim=2, base_scale=1.5, hidden_dims=[8])
    elbo = loss()
    if isinstance(elbo, JitTrace_ELBO):
        elbo.loss_and_grads(model, guide, Y)  # traces, and draws for it
        guide.zero_grad()
    pyro.set_rng_seed(3)
    value = elbo.loss_and_grads(model, guide, Y)
    pyro.set_rng_seed(3)
    guide_trace = poutine.trace(guide).get_trace(Y)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(Y)
    latent = guide_trace.nodes["_AutoCIF_latent"]["value"].detach()
    log_q, log_r = by_hand(guide, latent)
    log_q = log_q - guide_trace.nodes["tau"]["value"].log()  # tau is the exponential of a latent
    expected = model_trace.log_prob_sum() + log_r - log_q
    assert -value == pytest.approx(expected.item(), abs=1e-6)
    for name, p in guide.transform.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_particles_weigh_latents_with_their_indices():
    guide = perturbed(2, "maf", base_scale=1.5, hidden_dims=[8])
    draws, push = [], guide.transform._push
    guide.transform.__dict__["_push"] = lambda x: (draws.append(push(x)), draws[-1])[1]
    particles = draw_particles(model, guide, (Y,), num_samples=4)
    del guide.transform.__dict__["_push"]
    assert {k: tuple(v.shape[1:]) for k, v in particles.samples.items()} == SHAPES
    latents = draws[-1][0].reshape(4, -1)
    torch.testing.assert_close(latents[:, 1].exp(), particles.samples["tau"])
    for i, latent in enumerate(latents):
        log_q, log_r = by_hand(guide, latent)
        torch.testing.assert_close(particles.log_guide[i], log_q - log_r - latent[1])


# --- closed forms ---


def test_linear_layers_make_a_normal_distribution():
    guide, _, posterior = linear_guide()
    samples = guide.sample_posterior(50_000)["z"]
    torch.testing.assert_close(samples.mean(0), posterior.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.mT.cov(), posterior.covariance_matrix, atol=0.1, rtol=0)
    # With the exact r one particle is enough, for any value.
    values = torch.randn(3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(guide.log_prob_bound({"z": values}, 1), posterior.log_prob(values))


def test_every_weight_is_one_where_guide_and_reverse_model_are_exact():
    guide, target, _ = linear_guide()
    weights = importance(target, guide, num_samples=100).log_weights
    torch.testing.assert_close(weights, torch.zeros_like(weights))
    for loss in (
        Trace_ELBO(7, vectorize_particles=True),
        RenyiELBO(0.5, 7, vectorize_particles=True, max_plate_nesting=0),
        ImportanceWeightedELBO(7, "dreg"),
    ):
        assert loss.loss(target, guide) == pytest.approx(0, abs=1e-6)


def test_indices_that_do_nothing_leave_the_plain_flow():
    guide = perturbed(2, "nsf", index_dim=2, hidden_dims=[8])
    parts = []
    with torch.no_grad():
        for layer in guide.transform.layers:
            nets = (layer.indexed.net, layer.index_net, layer.reverse_net)
            for net in nets:
                net[0].weight.zero_()  # what goes in does not matter
            layer.reverse_net.load_state_dict(layer.index_net.state_dict())
            out = layer.indexed.net(torch.zeros(2, dtype=torch.float64))
            affine = ElementwiseAffine(guide.latent_dim).double()
            shift, raw = out.chunk(2)
            affine.loc.copy_(shift)
            affine.log_scale.copy_(math.log(1000) * (raw / math.log(1000)).tanh())
            parts += [affine, copy.deepcopy(layer.indexed.transform)]
    plain = AutoFlow(model, lambda D: ComposeFlow([*parts]), base_df=math.inf)
    plain.setup(Y)
    for i in (-3, -2):
        plain.transform[i].load_state_dict(guide.transform.placement[i].state_dict())
    plain.whiten(guide.whitening.loc, guide.whitening.scale_tril)
    samples = guide.sample_posterior(6)
    torch.testing.assert_close(guide.log_prob_bound(samples, 1), plain.log_prob(samples))
    particles = draw_particles(model, guide, (Y,), num_samples=6)
    torch.testing.assert_close(particles.log_guide, plain.log_prob(particles.samples))


# --- bounds on the marginal density ---


def marginal(guide, s):
    """log q(s) by integration over the index."""
    u = torch.linspace(-15, 15, 601, dtype=torch.float64)
    z = s.log().unsqueeze(-1).expand(*s.shape, len(u))
    joint = guide.get_posterior().log_prob(torch.stack([z, u.expand_as(z)], -1))
    return (torch.trapezoid(joint.exp(), u, dim=-1).log() - s.log()).detach()


@pytest.mark.slow
def test_the_marginal_by_integration_is_that_of_the_draws():
    guide = one_layer()
    z = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    density = (marginal(guide, z.exp()) + z).exp()
    cdf = torch.cumulative_trapezoid(density, z)
    assert cdf[-1].item() == pytest.approx(1, abs=1e-4)
    draws = guide.sample_posterior(20_000)["s"].log()
    shares = (draws.unsqueeze(-1) <= z[1:]).double().mean(0)
    assert (shares - cdf).abs().max() < 0.015  # Kolmogorov: .0138 with a probability of .001


def test_the_bound_rises_to_the_marginal_from_below():
    guide = one_layer()
    s = guide.sample_posterior(20)["s"]
    exact = marginal(guide, s)
    gaps = []
    for num_particles, repeats in ((1, 1000), (10, 200), (5000, 1)):
        with torch.no_grad():
            bounds = guide.log_prob_bound({"s": s.expand(repeats, -1)}, num_particles)
        gaps.append((exact - bounds).mean().item())
        # The exponential is unbiased.
        assert (bounds - exact).exp().mean().item() == pytest.approx(1, abs=0.03)
    assert gaps[0] > 2 * gaps[1] > 0
    assert gaps[2] == pytest.approx(0, abs=0.02)


def test_the_bound_takes_any_leading_shape_and_differentiates():
    guide = perturbed(2, "nsf-ar", index_dim=2, hidden_dims=[8])
    samples = {
        name: value.reshape(2, 3, *value.shape[1:])
        for name, value in guide.sample_posterior(6).items()
    }
    samples["mu"].requires_grad_()
    bound = guide.log_prob_bound(samples, 3)
    assert bound.shape == (2, 3)
    bound.sum().backward()
    assert samples["mu"].grad.abs().min() > 0
    assert all(p.grad.abs().max() > 0 for p in guide.parameters())


def test_the_bound_outside_the_support_is_minus_infinity_and_harms_no_neighbour():
    guide = perturbed(2)
    samples = guide.sample_posterior(2)
    samples["tau"][0] = -1.0
    bound = guide.log_prob_bound(samples)
    assert bound[0] == -torch.inf
    for gradient in torch.autograd.grad(bound[1], list(guide.parameters())):
        assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="same leading shape"):
        guide.log_prob_bound({**samples, "mu": samples["mu"][:1]})


# --- gradients ---


def gradients(guide, program, loss, seed):
    pyro.set_rng_seed(seed)
    guide.zero_grad()
    loss.loss_and_grads(program, guide)
    return {name: p.grad.clone() for name, p in guide.transform.named_parameters()}


def test_path_gradients_vanish_where_guide_and_reverse_model_are_exact():
    guide, target, _ = linear_guide()
    iwae, dreg = (
        gradients(guide, target, ImportanceWeightedELBO(5, kind), seed=0)
        for kind in ("iwae", "dreg")
    )
    # Of r there is the ordinary gradient, also where it depends on the layers behind it.
    for name in dreg:
        if "reverse" in name:
            torch.testing.assert_close(dreg[name], iwae[name])
            assert iwae[name].abs().max() > 1e-3, name
        elif "index_net" in name or "indexed.net" in name:
            assert dreg[name].abs().max() < 1e-6, name
            assert iwae[name].abs().max() > 1e-3, name


@pytest.mark.slow
def test_path_gradients_are_unbiased():
    guide = one_layer(ElementwiseAffine)
    means, errors = [], []
    for kind in ("iwae", "dreg"):
        loss = ImportanceWeightedELBO(3, kind, max_plate_nesting=0)
        draws = [gradients(guide, one_latent, loss, seed) for seed in range(150)]
        rows = torch.stack([torch.cat([g.flatten() for g in d.values()]) for d in draws])
        means.append(rows.mean(0))
        errors.append(rows.std(0) / len(rows) ** 0.5)
    assert ((means[0] - means[1]).abs() <= 5 * errors[0].hypot(errors[1])).all()
