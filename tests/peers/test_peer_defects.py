"""What other flow libraries are known to get wrong, and no other test of ours looks at.

Most of it is in the contract, which every transform of the catalogue is under: log-dets against autograd away from the
initial values, fresh log-dets after a step, copies after use, gradients of inverses and of each row, draws by row.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from catalogue import CATALOGUE
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.guides import AutoFlow
from pyro_flows_ext.guides.flows import FLOWS
from pyro_flows_ext.ops import rq_spline
from pyro_flows_ext.testing.case import Case


def case_of(entry):
    return Case(0, "peers", entry.factory(), **entry.options)


def entries(condition):
    chosen = {name: entry for name, entry in CATALOGUE.items() if condition(name, entry)}
    return pytest.mark.parametrize("entry", chosen.values(), ids=chosen)


# --- Pyro: `sample()`, then `log_prob()` of the draw: the cached pass has no graph, and parameters no gradient ---

NOTHING_TO_LEARN = ("permute", "squeeze", "whitening", "standardize", "logit-preprocess")


def learns(name, entry):
    return not name.removeprefix("un").removeprefix("pixelwise-").startswith(NOTHING_TO_LEARN)


@entries(learns)
def test_a_draw_without_a_graph_is_scored_with_one(entry):
    case = case_of(entry)
    transform = case.bind(case.module, case.context(5))
    density = case.density(transform)
    y = density.sample(torch.Size(() if density.batch_shape else (5,)))
    assert not y.requires_grad
    parameters = list(case.module.parameters())

    def gradients(log_prob):
        return torch.autograd.grad(
            log_prob.sum(),
            parameters,
            retain_graph=True,  # of the network that the context went through
            allow_unused=True,
            materialize_grads=True,
        )

    actual = gradients(density.log_prob(y))
    assert any((grad != 0).any() for grad in actual)
    torch.testing.assert_close(
        actual, gradients(case.log_q(transform, y.clone())), rtol=1e-6, atol=1e-9
    )


# --- nflows, normflows: what comes from outside is written to ---


@entries(lambda name, entry: "context" in name or "indexed" in name)
def test_a_context_is_not_written_to(entry):
    case = case_of(entry)
    context = case.context(3)
    before = context.clone()
    transform = case.bind(case.module, context)
    with torch.no_grad():
        transform.forward_and_ladj(case.x(3))
        transform.inverse_and_ladj(case.y(3))
    assert torch.equal(context, before)
    assert context._version == 0


class Constant(nn.Module):
    """A network that hands out its own parameter."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return self.theta.expand(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "transformer", [T.Additive(), T.Affine(), T.RationalQuadratic()], ids=lambda g: type(g).__name__
)
def test_the_output_of_a_network_is_not_written_to(transformer):
    net = Constant(2 * transformer.num_params)
    before = net.theta.detach().clone()
    transform = T.Coupling(4, transformer=transformer, net=net)
    with torch.no_grad():
        first = transform.forward_and_ladj(torch.ones(3, 4))
        transform.inverse_and_ladj(torch.ones(3, 4))
    assert torch.equal(net.theta, before)
    torch.testing.assert_close(transform.forward_and_ladj(torch.ones(3, 4)), first)


# --- nflows: batches that lie in the tails of a spline altogether, or not at all ---


@entries(lambda name, entry: "spline" in name and "indexed" not in name)
@pytest.mark.parametrize("scale", [0.1, 1e3], ids=["inside", "tails"])
def test_batches_on_one_side_of_the_bound(entry, scale):
    case = case_of(entry)
    transform = case.bind(case.module, case.context(3))
    x = scale * (1 + torch.rand(3, *case.event_shape, dtype=torch.float64))
    for run, back in (
        (transform.forward_and_ladj, transform.inverse_and_ladj),
        (transform.inverse_and_ladj, transform.forward_and_ladj),
    ):
        y, ladj = run(x)
        assert torch.equal(y, x) == (scale > 1)  # the identity in the tails, and nowhere else
        torch.testing.assert_close(back(y), (x, -ladj), rtol=1e-9, atol=1e-9)
        grads = torch.autograd.grad(
            y.sum() + ladj.sum(), list(case.module.parameters()), allow_unused=True
        )
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


# --- nflows: the discriminant of the inverse of a spline is negative by rounding in float32 ---

BOUND = 3.0


def textbook_inverse(y, raw):
    """Discriminant and root of Durkan et al. 2019, eqs. 6 to 8, for two bins, by their formulas as they stand."""
    part = (raw[:, :4].unflatten(-1, (2, 2)) / 2).softmax(-1)[..., 0]
    inner = 2 * BOUND * (1e-3 + (1 - 2e-3) * part) - BOUND
    slope = 1e-3 + F.softplus(raw[:, 4] + math.log(math.expm1(1 - 1e-3)))
    # The lower bin, between -bound, where the slope is 1, and the inner knot.
    (w, h), d0, d1 = (inner + BOUND).unbind(-1), 1.0, slope
    s, t = h / w, y + BOUND
    a = h * (s - d0) + t * (d1 + d0 - 2 * s)
    b = h * d0 - t * (d1 + d0 - 2 * s)
    c = -s * t
    discriminant = b**2 - 4 * a * c
    return discriminant, 2 * c / (-b - discriminant.sqrt()) * w - BOUND


def test_spline_inverse_where_the_discriminant_cancels():
    # A steep bin that ends flat: right below its upper knot, terms a million times as large cancel.
    n = 2000
    raw = torch.cat([torch.rand(n, 1) * -4 - 4, torch.zeros(n, 1), torch.randn(n, 2)], -1)
    raw = torch.cat([raw, -5 - 5 * torch.rand(n, 1)], -1)
    part = (raw[:, 2:4].double() / 2).softmax(-1)[:, 0]
    knot = (2 * BOUND * (1e-3 + (1 - 2e-3) * part) - BOUND).float()
    y = knot.nextafter(torch.tensor(-BOUND))

    discriminant, naive = textbook_inverse(y, raw)
    assert (discriminant < 0).any()
    assert naive.isnan().any()
    # Away from the knot, and in float64, the textbook is right.
    middle = (-BOUND + knot.double()) / 2
    _, root = textbook_inverse(middle, raw.double())
    torch.testing.assert_close(
        rq_spline(middle, raw.double(), bound=BOUND, inverse=True)[0], root, rtol=0, atol=1e-9
    )

    raw.requires_grad_()
    x, ladj = rq_spline(y, raw, bound=BOUND, inverse=True)
    exact, log_slope = rq_spline(y.double(), raw.double(), bound=BOUND, inverse=True)
    # Rounding y alone moves x by the slope times as much.
    assert ((x - exact).abs() / (1 + log_slope.exp())).max() < 5e-6
    assert ladj.isfinite().all()
    assert torch.autograd.grad(x.sum() + ladj.sum(), raw)[0].isfinite().all()
    torch.testing.assert_close(rq_spline(x, raw, bound=BOUND)[0], y, rtol=0, atol=2e-6)


# --- Pyro: "optimizer got an empty parameter list", because parameters come with the first loss ---


@pytest.mark.parametrize("flow", FLOWS)
def test_all_parameters_of_a_guide_exist_after_setup(flow):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoFlow(model, flow)
    guide.setup()
    names = [name for name, _ in guide.named_parameters()]
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    Trace_ELBO().differentiable_loss(model, guide).backward()
    optimizer.step()
    assert [name for name, _ in guide.named_parameters()] == names
    changed = [(a != b).any() for a, b in zip(guide.parameters(), before, strict=True)]
    assert any(changed)
