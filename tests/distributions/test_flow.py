import pyro.distributions as dist
import pytest
import torch
from densities import Counted, LearnedNormal, image_flow, mixture, normal
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.testing import perturb

CONTEXT_DIM = 2


def flow(transform, base=None, scale=0.7):
    density = FlowDistribution(normal(2) if base is None else base, transform)
    return perturb(density, scale=scale).double()


def by_autograd(density, x):
    """log p(x) of one point from the inverse map's Jacobian."""
    transform = density.transform
    jacobian = torch.autograd.functional.jacobian(lambda v: transform.inverse_and_ladj(v)[0], x)
    z = transform.inverse_and_ladj(x)[0]
    size = x.numel()
    return density.base.log_prob(z) + torch.linalg.slogdet(jacobian.reshape(size, size))[1]


# --- values that it never drew ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.planar(2, num_layers=2),
        lambda: T.sylvester(2),
        lambda: T.iaf(2, num_layers=2, hidden_dims=(5,)),
    ],
    ids=["planar", "sylvester", "iaf"],
)
def test_scores_unseen_values(make):
    density = flow(make())
    x = 2 * torch.randn(4, 2, dtype=torch.float64)
    expected = torch.stack([by_autograd(density, row) for row in x])
    torch.testing.assert_close(density.log_prob(x), expected)


# --- any base ---


def truncated():
    return dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1)


BASES = {
    "mixture": mixture,
    "normal by coordinate": lambda: dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])),
    "of torch": lambda: torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])),
    "student": lambda: dist.StudentT(4.0, torch.zeros(2), torch.ones(2)).to_event(1),
    "full rank": lambda: dist.MultivariateNormal(
        torch.ones(2), torch.tensor([[1.0, 0.9], [0.9, 2.0]])
    ),
    "a flow of Pyro": lambda: dist.TransformedDistribution(
        normal(2), dist.transforms.AffineTransform(1.0, 2.0)
    ),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_any_base(base):
    density = flow(T.sylvester(2), base())
    assert (density.batch_shape, density.event_shape) == ((), (2,))
    x = torch.randn(5, 2, dtype=torch.float64)
    z, ladj = density.transform.inverse_and_ladj(x)
    score = density.base.log_prob(z)  # at the dtype that it moved to
    expected = (score if score.dim() == 1 else score.sum(-1)) + ladj
    torch.testing.assert_close(density.log_prob(x), expected)
    assert density.expand((3,)).sample().shape == (3, 2)
    assert density.has_rsample == density.base.has_rsample


def test_a_base_without_rsample_draws_all_the_same():
    density = flow(T.planar(2), mixture())
    assert not density.has_rsample
    assert density.sample((3,)).shape == (3, 2)
    assert not density.sample().requires_grad


def test_outside_of_the_support_of_the_base_the_density_is_zero():
    density = flow(T.affine_coupling(2, (5,)), truncated())
    inside = density.transform(torch.tensor([0.3, -0.9], dtype=torch.float64))
    outside = density.transform(torch.tensor([0.3, 1.1], dtype=torch.float64))
    x = torch.stack([inside, outside]).detach().requires_grad_()
    log_p = density.log_prob(x)
    _, ladj = density.transform.forward_and_ladj(torch.tensor([0.3, -0.9], dtype=torch.float64))
    assert log_p.tolist() == pytest.approx(
        [-2 * torch.log(torch.tensor(2.0)).item() - ladj.item(), -torch.inf]
    )
    (gradient,) = torch.autograd.grad(log_p[0], x)
    assert gradient.isfinite().all()


def test_batch_of_the_base_is_a_batch_of_densities():
    base = dist.Normal(torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 0.0]]), 1.0).to_event(1)
    density = flow(T.radial(2), base)
    assert density.batch_shape == (3,)
    x = torch.randn(2, dtype=torch.float64)
    z, ladj = density.transform.inverse_and_ladj(x)
    expected = dist.Normal(density.base.base_dist.loc, 1.0).log_prob(z).sum(-1) + ladj
    torch.testing.assert_close(density.log_prob(x), expected)


# --- a base that learns ---


def test_a_module_as_base_is_saved():
    density = FlowDistribution(LearnedNormal(2), T.planar(2))
    assert {"base.loc", "base.log_scale"} <= set(density.state_dict())


# --- contexts ---


def conditional():
    density = FlowDistribution(
        normal(2),
        [T.conditional_planar(2, CONTEXT_DIM, (5,)), T.nsf(2, num_layers=1, hidden_dims=(5,))],
    )
    return perturb(density).double()


def test_rows_are_those_of_a_loop_over_contexts():
    density, contexts = conditional(), torch.randn(4, CONTEXT_DIM).double()
    x = torch.randn(3, 4, 2).double()
    together = density.condition(contexts)
    assert (together.batch_shape, together.event_shape) == ((4,), (2,))
    alone = [density.condition(c).log_prob(x[:, i]) for i, c in enumerate(contexts)]
    torch.testing.assert_close(together.log_prob(x), torch.stack(alone, -1))


def test_contexts_draw_independently():
    density = conditional().condition(torch.zeros(500, CONTEXT_DIM).double())
    draws = density.sample((2,))
    assert len(draws.reshape(-1, 2).unique(dim=0)) == 1000
    correlation = torch.corrcoef(torch.stack([draws[0, :, 0], draws[1, :, 0]]))[0, 1]
    assert abs(correlation) < 5 / 500**0.5


def test_conditioning_again_replaces_the_context():
    density, (a, b) = conditional(), torch.randn(2, CONTEXT_DIM).double()
    x = torch.randn(2).double()
    torch.testing.assert_close(density.condition(b).log_prob(x), density.condition(b).log_prob(x))
    assert not torch.allclose(density.condition(a).log_prob(x), density.condition(b).log_prob(x))
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        density.sample()  # the density itself has none


# --- one pass ---


@pytest.mark.parametrize(
    ("use", "passes"),
    [
        (lambda d: d.log_prob(d.rsample()), ["forward"]),
        (lambda d: d.log_prob(d.expand((3,)).rsample()), ["forward"]),
        (lambda d: d.rsample_and_log_prob(), ["forward"]),
        (lambda d: d.log_prob(torch.zeros(2)), ["inverse"]),
        (lambda d: d.log_prob(d.rsample().clone()), ["forward", "inverse"]),
    ],
    ids=["drawn", "expanded", "together", "unseen", "copied"],
)
def test_passes(use, passes):
    transform = Counted(2)
    use(FlowDistribution(normal(2), transform))
    assert transform.passes == passes


def test_an_unseen_value_is_one_pass_in_inference_mode():
    transform = Counted(2)
    with torch.inference_mode():
        FlowDistribution(normal(2), transform).log_prob(torch.zeros(2))
    assert transform.passes == ["inverse"]


def test_a_score_after_a_step_is_fresh():
    density = flow(T.planar(2))
    x = density.rsample()
    before = density.log_prob(x)
    optimizer = torch.optim.Adam(density.parameters(), lr=0.1, fused=True)
    (-before).backward()
    optimizer.step()
    after = density.log_prob(x)
    torch.testing.assert_close(after, by_autograd(density, x.detach()))
    assert not torch.allclose(after, before)


# --- images ---


def test_images_change_their_shape():
    density = perturb(image_flow(), scale=0.3).double()
    assert (density.batch_shape, density.event_shape) == ((), (1, 4, 4))
    x = torch.randn(1, 4, 4).double()
    torch.testing.assert_close(density.log_prob(x), by_autograd(density, x))
    assert density.expand((2,)).sample((3,)).shape == (3, 2, 1, 4, 4)
    assert density.support.event_dim == 3


# --- what it says no to ---


class NoBase(nn.Module):
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: FlowDistribution(3.0, T.planar(2)),
            TypeError,
            "expected a distribution, or a module",
        ),
        (
            lambda: FlowDistribution(normal(2), [T.planar(2), nn.Linear(2, 2)]),
            TypeError,
            "expected FlowTransforms, got a Linear",
        ),
        (
            lambda: FlowDistribution(dist.Normal(nn.Parameter(torch.zeros(2)), 1.0), T.planar(2)),
            ValueError,
            r"neither train nor be saved\. Pass a module",
        ),
        (
            lambda: FlowDistribution(dist.Normal(0.0, 1.0), T.planar(2)),
            ValueError,
            r"draws of at least 1 dimensions, got shape \(\)",
        ),
        (
            lambda: FlowDistribution(normal(2), T.planar(2)).log_prob(torch.zeros(5, 3)),
            ValueError,
            r"expected a tensor of shape \(\*, 2\), got \(5, 3\)",
        ),
        (
            lambda: FlowDistribution(normal(2), T.planar(2)).condition(torch.zeros(3)),
            ValueError,
            "expected a density with a context, got one without",
        ),
        (
            lambda: FlowDistribution(normal(2), T.conditional_planar(2, 3)).sample(),
            ValueError,
            r"condition\(context\) first",
        ),
        (
            lambda: FlowDistribution(normal(2), T.planar(2)).expand((3,)).expand((4,)),
            ValueError,
            r"expected a shape that \(3,\) broadcasts to, got \(4,\)",
        ),
    ],
    ids=["base", "part", "parameters", "scalar", "event", "context", "no-context", "expand"],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr_shows_base_and_parts():
    text = repr(FlowDistribution(LearnedNormal(2), T.planar(2)).expand((3,)))
    assert text.startswith("FlowDistribution(")
    for part in (
        "batch_shape=(3,), event_shape=(2,)",
        "(transform): Planar(2",
        "(base): LearnedNormal",
    ):
        assert part in text


@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
def test_no_transforms_are_the_base(batch):
    base = dist.Gamma(torch.full((*batch, 2), 3.0), torch.tensor([1.0, 2.0])).to_event(1)
    flow = FlowDistribution(base, [])
    assert (flow.batch_shape, flow.event_shape) == (base.batch_shape, base.event_shape)
    torch.manual_seed(0)
    x = flow.rsample((4,))
    torch.manual_seed(0)
    assert torch.equal(x, base.rsample((4,)))
    assert torch.equal(flow.log_prob(x), base.log_prob(x))
    assert torch.equal(flow.support.check(-x), base.support.check(-x))
    with pytest.raises(ValueError, match="to be within the support"):
        flow.log_prob(-x)
