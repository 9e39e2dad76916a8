"""`ContinuouslyIndexedFlow`: its bounds against quadrature over the indices, its draws, its model and guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import LearnedNormal, by_quadrature, mixture, normal
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import ContinuouslyIndexedFlow, FlowDistribution, check_guide_site
from pyro_flows_ext.infer import ImportanceWeightedELBO
from pyro_flows_ext.testing import integrate, perturb

HIDDEN = (6,)
INNER = {
    "maf": lambda D: T.maf(D, num_transforms=2, hidden_dims=HIDDEN),
    "realnvp": lambda D: T.realnvp(D, num_transforms=2, hidden_dims=HIDDEN),
    "nsf": lambda D: T.nsf(D, num_transforms=2, hidden_dims=HIDDEN, num_bins=4, linear=False),
    "residual": lambda D: [T.residual_flow(D, HIDDEN).eval() for _ in range(2)],
    "planar": lambda D: [T.planar(D), T.planar(D).inv],
}


def indexed(transforms, dim=2, index_dim=1, scale=0.4, base=None):
    base = normal(dim) if base is None else base
    density = ContinuouslyIndexedFlow(base, transforms, index_dim, (5,), HIDDEN)
    return perturb(density, scale=scale).double()


def one_layer(dim=2, scale=0.4):
    inner = T.affine_autoregressive(dim, HIDDEN) if dim > 1 else T.elementwise_affine(1)
    return indexed(inner, dim, scale=scale)


def points(*shape):
    return 1.5 * torch.randn(*shape, dtype=torch.float64)


# --- numbers ---


@pytest.mark.parametrize("name", INNER)
def test_starts_as_the_flow_without_indices(name):
    """s = t = 0 and q = p = N(0, 1): every weight is the density of the plain flow."""
    parts = list(INNER[name](2))
    density = ContinuouslyIndexedFlow(normal(2), parts, 2).double()
    for part in parts:
        perturb(part, scale=0.5)
    plain = FlowDistribution(normal(2).expand(()), parts).double()
    x = points(6, 2)
    torch.testing.assert_close(density.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(density.log_prob_bound(x, 7), plain.log_prob(x))


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


def weights_by_hand(density, x, indices):
    """log p(x, u) and log q(u | x), layer by layer in the notation of the paper."""
    log_p, log_q, z = 0.0, 0.0, x
    for layer, u in zip(reversed(density.layers), reversed(indices), strict=True):
        a = layer.indexed.transform.inv(z)

        def normal_of(params):
            loc, raw = params.chunk(2, -1)
            c = math.log(1000)
            return dist.Normal(loc, (c * (raw / c).tanh()).exp()).to_event(1)

        log_q = log_q + normal_of(layer.reverse_net(a)).log_prob(u)
        previous, ladj = layer.indexed.condition(u).inverse_and_ladj(z)
        log_p = log_p + normal_of(layer.index_net(previous)).log_prob(u) + ladj
        z = previous
    return log_p + density.base.log_prob(z), log_q


def by_row(trace):
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)


def check_sites(density, x, rows):
    """Model and guide at the same indices, by row, against the paper's formulas."""

    def program(run):
        with pyro.plate("data", rows):
            run("x", x)

    guide_trace = poutine.trace(program).get_trace(density.guide)
    indices = [guide_trace.nodes[f"x_u{l}"]["value"] for l in range(1, len(density.layers) + 1)]
    assert {u.shape for u in indices} == {(rows, density.index_dim)}
    model_trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(density.model)
    log_p, log_q = weights_by_hand(density, x, indices)
    torch.testing.assert_close(by_row(model_trace), log_p)
    torch.testing.assert_close(by_row(guide_trace), log_q)


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
        torch.testing.assert_close(
            density.log_prob_bound(x, 100_000, 20_000), exact, rtol=0, atol=0.1
        )


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
        sample = density.sample

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


# --- in Pyro ---


def programs(density, x, size=None):
    def model():
        pyro.module("density", density)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            density.model("x", x[index])

    def guide():
        pyro.module("density", density)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            density.guide("x", x[index])

    return model, guide


@pytest.mark.parametrize("size", [None, 20], ids=["all", "subsample"])
def test_weights_by_datum(size):
    """Σ_n log 1/K Σ_k w_nk, scaled by 40 / size: the mean of many bounds is that of log_prob_bound."""
    density, x, K = one_layer(), points(2).expand(40, 2), 5
    model, guide = programs(density, x, size)
    elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
    draws = torch.tensor([-elbo.loss(model, guide) for _ in range(200)])
    with torch.no_grad():
        expected = density.log_prob_bound(x.expand(1000, 40, 2), K).sum(-1)
    error = math.hypot(draws.std() / 200**0.5, expected.std() / 1000**0.5)
    assert abs(draws.mean() - expected.mean()) < 5 * error
    # One weight for all data, which is what a mean inside the wrong logarithm gives, is far below.
    with torch.no_grad():
        joint = density.log_prob(x.expand(1000, K, 40, 2)).sum(-1).logsumexp(1) - math.log(K)
    assert joint.mean() < draws.mean() - 5 * error


@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_gradients_of_the_weighted_bound(gradient):
    """The mean over draws of the gradient of every parameter is the one of log_prob_bound."""
    density, x, K = one_layer(scale=0.3), points(3, 2), 3
    model, guide = programs(density, x)
    elbo = ImportanceWeightedELBO(K, gradient, max_plate_nesting=1, num_bounds=3000)
    parameters = list(density.parameters())
    ours = torch.autograd.grad(elbo.differentiable_loss(model, guide), parameters)
    value = -density.log_prob_bound(x.expand(30_000, 3, 2), K).mean(0).sum()
    theirs = torch.autograd.grad(value, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO], ids=lambda e: e.__name__)
def test_elbos_of_pyro_are_the_one_sample_bound(elbo):
    density, x = one_layer(), points(3, 2)
    model, guide = programs(density, x)
    estimate = -elbo(20_000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide)
    with torch.no_grad():
        draws = density.log_prob(x.expand(20_000, 3, 2)).sum(-1)
    assert estimate == pytest.approx(draws.mean().item(), abs=10 * draws.std().item() / 20_000**0.5)


def test_model_without_data_draws():
    density = one_layer()
    with pyro.plate("rows", 4):
        trace = poutine.trace(lambda: density.model("x")).get_trace()
    assert trace.nodes["x"]["value"].shape == (4, 2)
    assert set(trace.nodes) == {"_INPUT", "x", "_RETURN"}


def test_training_finds_two_parts_and_the_hole_between():
    """On [-2, -1] and [1, 2] alike, affine maps alone give a normal: here their indices make the parts."""

    def draw(n):
        return (torch.randint(2, (n, 1)) * 2.0 - 1) * (1 + torch.rand(n, 1))

    parts = [T.ElementwiseAffine(1) for _ in range(4)]
    density = ContinuouslyIndexedFlow(normal(1), parts, 1, (10,), (20,))

    def model(x):
        pyro.module("density", density)
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.995})
    svi = SVI(model, lambda x: None, optimizer, Trace_ELBO())
    for _ in range(450):
        svi.step(draw(100))
    x = draw(4000)
    with torch.no_grad():
        bound = density.log_prob_bound(x, 100).mean().item()
        inside = (density.sample((4000,)).abs() < 0.5).double().mean()
    normal_score = -0.5 * (math.log(2 * math.pi * 7 / 3) + 1)
    assert normal_score + 0.3 < bound < -math.log(2) + 0.05
    assert inside < 0.1


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
    with pytest.raises(ValueError, match="site 'z' of the guide: the log_prob of Continuously"):
        check_guide_site("z", wrap(one_layer()))
    check_guide_site("z", wrap(FlowDistribution(normal(2), T.planar(2))))
    check_guide_site("z", normal(2))


def test_importance_weights_refuse_it_in_a_guide():
    density = one_layer()
    prior = normal(2).expand(())

    def model():
        pyro.sample("z", prior)

    def guide():
        pyro.module("density", density)
        pyro.sample("z", density)

    with pytest.raises(ValueError, match="site 'z' of the guide"):
        ImportanceWeightedELBO(2, max_plate_nesting=0).loss(model, guide)


def test_is_a_prior_that_learns():
    """In the model log_prob is a bound on log p(z), and the ELBO still one on log p(x)."""
    density = one_layer().float()
    posterior = FlowDistribution(normal(2), T.planar(2))

    def model():
        pyro.module("density", density)
        z = pyro.sample("z", density)
        pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=torch.tensor(1.0))

    def guide():
        pyro.module("posterior", posterior)
        pyro.sample("z", posterior)

    loss = ImportanceWeightedELBO(4, max_plate_nesting=0).loss_and_grads(model, guide)
    assert math.isfinite(loss)
    assert all(p.grad.any() for p in [*density.parameters(), *posterior.parameters()])
