"""`ContinuouslyIndexedFlow`: its bounds against quadrature over the indices, its draws, its gradients."""

import math

import pyro.distributions as dist
import pytest
import torch
from densities import LearnedNormal, by_quadrature, mixture, normal
from indexed_flows import INNER, check_sites, indexed, one_layer, points
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import ContinuouslyIndexedFlow, FlowDistribution, check_guide_site
from pyro_flows_ext.testing import integrate, perturb

# --- numbers ---


@pytest.mark.parametrize("name", INNER)
def test_starts_as_the_flow_without_indices(name):
    """s = t = 0 and q = p: every weight is the density of the plain flow."""
    parts = list(INNER[name](2))
    density = ContinuouslyIndexedFlow(normal(2), parts, 2).double()
    for part in parts:
        perturb(part, scale=0.5)
    plain = FlowDistribution(normal(2).expand(()), parts).double()
    x = points(6, 2)
    torch.testing.assert_close(density.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(density.log_prob_bound(x, 7), plain.log_prob(x))


@pytest.mark.parametrize("hidden_dims", [(50,), (50, 50, 50, 50)], ids=str)
def test_indices_tell_where_they_are_from_the_start(hidden_dims):
    """The mutual information of u and z, about log(1 + var μ / σ²) / 2, is half a nat in the mean of 40 networks."""
    told = []
    for _ in range(40):
        density = ContinuouslyIndexedFlow(normal(2), T.planar(2), 1, index_hidden_dims=hidden_dims)
        loc, log_scale = density.layers[0].index_net(torch.randn(2000, 2)).chunk(2, -1)
        told.append(0.5 * (1 + loc.var() / (2 * log_scale).exp().mean()).log().item())
    assert 0.3 < sum(told) / len(told) < 0.9


def test_training_puts_the_indices_to_use():
    """Two separate bumps under an affine map, which alone is a normal: 2.12 nats at best. The data's entropy is .91."""
    density = ContinuouslyIndexedFlow(normal(1), T.ElementwiseAffine(1))
    optimizer = torch.optim.Adam(density.parameters(), lr=5e-3)

    def loss():
        side = 2.0 * torch.randint(0, 2, (256, 1)) - 1
        return -density.log_prob(2 * side + 0.3 * torch.randn(256, 1)).mean()

    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.stack([loss() for _ in range(20)]).mean() < 1.8


def test_maps_that_do_not_depend_on_their_index_give_the_plain_flow():
    """s and t constant, not zero, and q = p, both dependent on where they are: the same numbers for all draws."""
    density = indexed([T.planar(2), T.planar(2)])
    parts = []
    for layer in density.layers:
        with torch.no_grad():
            layer.indexed.net[-1].weight.zero_()
            for net in (layer.index_net, layer.reverse_net):
                net[
                    -1
                ].weight.zero_()  # p(u | z) sees z, q(u | x) sees f⁻¹(x): equal where neither matters
            layer.reverse_net.load_state_dict(layer.index_net.state_dict())
        affine, f = layer.indexed.condition(torch.zeros(1).double())
        parts += [affine, f]
    plain = FlowDistribution(normal(2), parts).double()
    x = points(6, 2)
    torch.testing.assert_close(density.log_prob(x), plain.log_prob(x))


@pytest.mark.parametrize("name", INNER)
def test_model_and_guide_score_what_the_paper_says(name):
    check_sites(indexed(INNER[name](2), index_dim=2), points(5, 2), 5)


@pytest.mark.parametrize("dim", [1, 2])
def test_bound_against_quadrature_over_the_index(dim):
    density, x = one_layer(dim), points(4, dim)
    exact = by_quadrature(density, x)
    with torch.no_grad():
        weights = (density.log_prob(x.expand(20_000, 4, dim)) - exact).exp()
        error = weights.std(0) / 20_000**0.5
        assert ((weights.mean(0) - 1).abs() <= 5 * error).all()
        found = density.log_prob_bound(x, 100_000, 20_000)
        # Five standard errors of the mean weight, and the bias of its logarithm.
        assert ((found - exact).abs() <= 5 * error / 5**0.5 + 0.02).all()


def test_bound_grows_with_the_number_of_particles():
    density, x = one_layer(), points(4, 2)
    exact = by_quadrature(density, x)
    with torch.no_grad():
        means = torch.stack(
            [density.log_prob_bound(x.expand(2000, 4, 2), K).mean(0) for K in (1, 3, 10, 40)]
        )
    assert (means.mean(1).diff() > 0).all()
    assert (means[-1] <= exact + 0.05).all()
    gaps = (exact - means).mean(1)
    assert gaps[0] > 2 * gaps[-1]


def test_density_by_quadrature_integrates_to_one():
    density = one_layer(1)

    class Exact:
        sample, support = density.sample, density.support

        def log_prob(self, x):
            return torch.cat([by_quadrature(density, part) for part in x.split(50)])

    assert integrate(Exact()).item() == pytest.approx(1, abs=2e-3)


def test_draws_agree_with_the_density_by_quadrature():
    density, n = one_layer(1), 40_000
    edges = torch.linspace(-3, 3, 13, dtype=torch.float64)
    middles = edges[0] + (torch.arange(1200, dtype=torch.float64) + 0.5) * 6 / 1200
    with torch.no_grad():
        p = torch.cat(
            [by_quadrature(density, part).exp() for part in middles.unsqueeze(-1).split(100)]
        )
        expected = p.reshape(12, 100).sum(1) * 6 / 1200
        counts = torch.histogram(density.sample((n,)).flatten(), edges).hist / n
    error = (expected * (1 - expected) / n).sqrt() + 1e-4
    assert ((counts - expected).abs() <= 5 * error).all()


# --- many particles in bounded memory ---


def test_chunks_are_the_same_weights_added_up():
    density, x = indexed(INNER["maf"](2)), points(3, 2)

    def by_hand():
        parts = [density.log_prob(x.expand(n, 3, 2)) for n in (4, 4, 2)]
        return torch.cat(parts).logsumexp(0) - math.log(10)

    results = []
    for bound in (lambda: density.log_prob_bound(x, 10, 4), by_hand):
        torch.manual_seed(3)
        value = bound()
        results.append([value, *torch.autograd.grad(value.sum(), list(density.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_is_that_of_a_chunk():
    density, x = indexed(INNER["maf"](2)), points(3, 2)

    def saved(chunk_size):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            density.log_prob_bound(x, 200, chunk_size)
        return sum(sizes)

    assert saved(10) < saved(None) / 5


# --- gradients ---


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("what", ["log_prob", "log_prob_bound"])
def test_gradients_reach_everything(name, what):
    density = indexed(INNER[name](2), base=LearnedNormal(2))
    value = points(8, 2).requires_grad_()
    score = density.log_prob(value) if what == "log_prob" else density.log_prob_bound(value, 3)
    score.sum().backward()
    for key, parameter in [("value", value), *density.named_parameters()]:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_draws_have_a_gradient_in_p_and_f_alone():
    density = indexed(INNER["realnvp"](2))
    density.rsample((8,)).square().sum().backward()
    for key, parameter in density.named_parameters():
        assert (parameter.grad is not None) == ("reverse_net" not in key), key


# --- shapes, bases ---


def test_expanded_and_batched():
    base = dist.Normal(torch.tensor([[0.0, 0.0], [4.0, 4.0], [-4.0, 0.0]]), 1.0).to_event(1)
    density = indexed(INNER["realnvp"](2), base=base)
    assert (density.batch_shape, density.event_shape) == ((3,), (2,))
    assert density.sample((5,)).shape == (5, 3, 2)
    assert density.expand((4, 3)).sample().unique(dim=0).shape == (4, 3, 2)
    x = points(2)
    assert density.log_prob(x).unique().shape == (3,)  # every row its own index
    check_sites(density, x, 3)
    check_sites(density, points(3, 2), 3)


def test_a_base_without_rsample():
    density = indexed(INNER["maf"](2), base=mixture())
    assert not density.has_rsample
    assert density.sample((3,)).shape == (3, 2)
    assert density.log_prob(density.sample((3,))).isfinite().all()


# --- what it says no to ---


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ContinuouslyIndexedFlow(normal(2), []), ValueError, "at least one FlowTransform"),
        (
            lambda: ContinuouslyIndexedFlow(normal(2), [nn.Linear(2, 2)]),
            TypeError,
            "expected FlowTransforms, got a Linear",
        ),
        (
            lambda: ContinuouslyIndexedFlow(normal(1, 2), T.planar(2)),
            ValueError,
            r"vectors \(\*, D\), got events of shape \(1, 2\)",
        ),
        (lambda: one_layer().log_prob_bound(points(2), 0), ValueError, "num_particles: expected"),
        (lambda: one_layer().log_prob_bound(points(2), 5, 0), ValueError, "chunk_size: expected"),
        (lambda: one_layer().guide("x", points(3)), ValueError, r"shape \(\*, 2\), got \(3,\)"),
    ],
    ids=["none", "part", "event", "particles", "chunk", "obs"],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: d.expand((3,)).mask(True)], ids=["", "masked"]
)
def test_is_refused_as_a_guide_site(wrap):
    with pytest.raises(
        ValueError, match=r"expected an exact log_prob, got a lower bound \(Continuously"
    ):
        check_guide_site("z", wrap(one_layer()))
    check_guide_site("z", wrap(FlowDistribution(normal(2), T.planar(2))))
    check_guide_site("z", normal(2))
