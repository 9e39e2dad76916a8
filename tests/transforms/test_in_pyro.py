"""The transforms where Pyro takes one: distributions, modules, guides, reparametrisation and MCMC."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransformedDistribution,
)
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import iterated
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    conditional_planar,
    conditional_radial,
    planar,
    radial,
    sylvester,
)

MAKES = {"planar": planar, "radial": radial, "sylvester": sylvester}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def normal(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


# --- distributions ---


@makes
@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_transformed_distribution(make, inverted):
    transform = perturb(make(2, num_layers=2))
    density = dist.TransformedDistribution(normal(), [transform.inv if inverted else transform])
    assert density.has_rsample
    assert density.event_shape == (2,)
    assert density.support is transform.codomain
    y = torch.randn(5, 2)
    x, ladj = transform.forward_and_ladj(y) if inverted else transform.inverse_and_ladj(y)
    torch.testing.assert_close(density.log_prob(y), normal().log_prob(x) + ladj)
    assert density.rsample((3, 4)).shape == (3, 4, 2)
    assert density.rsample().requires_grad
    assert not density.sample().requires_grad


@makes
def test_monte_carlo_entropy_of_both_orientations(make):
    """E log q(y) over draws of q is what the log-dets say, -H(base) - E ladj: sampling and scoring fit together."""
    transform = perturb(make(2).double())
    for t in (transform, transform.inv):
        base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        x = base.sample((2000,))
        y, ladj = t.forward_and_ladj(x)
        density = dist.TransformedDistribution(base, [t])
        torch.testing.assert_close(density.log_prob(y), base.log_prob(x) - ladj)


@makes
def test_iterated(make):
    transform = iterated(3, partial(make, num_layers=2), 2)
    assert isinstance(transform, ComposeTransformModule)
    assert len(list(transform.parameters())) == 3 * len(list(make(2).parameters()))
    density = dist.TransformedDistribution(normal(), [transform])
    y = density.rsample((5,))
    torch.testing.assert_close(
        density.log_prob(y), density.log_prob(y.clone()), rtol=1e-4, atol=1e-4
    )


@makes
def test_the_inverse_orientation_trains(make):
    transform = make(2)
    whole = ComposeTransformModule([transform.inv, planar(2).inv])
    parameters = list(whole.parameters())
    assert all(any(p is q for q in parameters) for p in transform.parameters())
    density = dist.TransformedDistribution(normal(), [whole])
    data = 2 + 0.5 * torch.randn(200, 2)
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -density.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_compose_of_pyro_copies_and_pickles_with_an_inverse_part():
    whole = ComposeTransformModule([perturb(planar(2)).inv, perturb(radial(2))])
    x = torch.randn(5, 2)
    y = whole(x)
    twin = copy.deepcopy(whole)
    torch.testing.assert_close(twin(x), y)
    assert twin.state_dict().keys() == whole.state_dict().keys()


# --- conditional distributions ---


@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_conditional_transformed_distribution(inverted):
    transform = perturb(conditional_planar(2, 3, (4,)))
    transform = transform.inv if inverted else transform
    density = ConditionalTransformedDistribution(normal(), [transform])
    context, y = torch.randn(5, 3), torch.randn(5, 2)
    bound = density.condition(context)
    assert bound.batch_shape == (5,)
    assert bound.sample().shape == (5, 2)
    rows = torch.stack([density.condition(c).log_prob(v) for c, v in zip(context, y, strict=True)])
    torch.testing.assert_close(bound.log_prob(y), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_conditional_compose_transform_module_trains(inverted):
    stack = ConditionalComposeTransformModule(
        [conditional_planar(2, 1, (8,)), conditional_radial(2, 1, (8,)), planar(2)], cache_size=1
    )
    density = ConditionalTransformedDistribution(normal(), [stack.inv if inverted else stack])
    context = torch.randn(200, 1)
    data = context + 0.3 * torch.randn(200, 2)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -density.condition(context).log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


# --- programs ---


def test_pyro_module_registers_the_parameters():
    transform = planar(2)
    data = 1 + 0.5 * torch.randn(100, 2)

    def model():
        pyro.module("flow", transform)
        with pyro.plate("data", 100):
            pyro.sample("x", dist.TransformedDistribution(normal(), [transform]), obs=data)

    def guide():
        pass

    before = copy.deepcopy(transform.state_dict())
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert set(pyro.get_param_store()) == {"flow$$$w", "flow$$$u", "flow$$$b"}
    assert losses[-1] < losses[0]
    assert not torch.equal(before["u"], transform.u)


def test_as_an_attribute_of_a_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = sylvester(2)

        def forward(self):
            return pyro.sample("x", dist.TransformedDistribution(normal(), [self.flow]))

    model = Model()
    trace = poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    expected = dist.TransformedDistribution(normal(), [model.flow]).log_prob(x.clone())
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-4)
    names = {name for name, _ in sylvester(2).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == {f"flow.{n}" for n in names}
    sites = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert sites == {f"flow$$${n}" for n in names}


def test_sample_site_costs_one_pass():
    class Counting(type(planar(2))):
        passes = 0

        def forward_and_ladj(self, x):
            type(self).passes += 1
            return super().forward_and_ladj(x)

        def inverse_and_ladj(self, y):
            type(self).passes += 1
            return super().inverse_and_ladj(y)

    def program(transform):
        return pyro.sample("x", dist.TransformedDistribution(normal(), [transform]))

    trace = poutine.trace(program).get_trace(Counting(2))
    trace.compute_log_prob()
    assert Counting.passes == 1


# --- guides ---

Y = torch.tensor([0.5, 1.5, -0.2, 0.9])


def model(y=Y):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def trained_guide(make, num_steps=60):
    guide = AutoNormalizingFlow(model, make)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03}), elbo)
    losses = [svi.step() for _ in range(num_steps)]
    return guide, losses


@makes
@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_auto_normalizing_flow(make, inverted):
    def init(dim):
        transform = make(dim, num_layers=4)
        return ComposeTransformModule([transform.inv]) if inverted else transform

    guide, losses = trained_guide(init)
    assert sum(losses[-10:]) < sum(losses[:10]) - 5
    assert len(list(guide.parameters())) == len(list(make(2).parameters()))
    draws = Predictive(model, guide=guide, num_samples=10)()
    assert draws["scale"].numel() == 10
    assert (draws["scale"] > 0).all()


def test_auto_normalizing_flow_with_iterated():
    guide, losses = trained_guide(partial(iterated, 4, planar))
    assert sum(losses[-10:]) < sum(losses[:10]) - 5
    assert len(list(guide.parameters())) == 12


@pytest.fixture
def neutra():
    guide, _ = trained_guide(lambda dim: planar(dim, num_layers=4))
    reparam = NeuTraReparam(guide.requires_grad_(False))
    return guide, reparam, poutine.reparam(model, config=lambda _: reparam)


def test_neutra_potential_is_the_model_through_the_flow(neutra):
    guide, _, warped = neutra
    _, potential_fn, transforms, _ = initialize_model(warped, model_args=())
    z = torch.randn(2, requires_grad=True)
    (name,) = transforms
    potential = potential_fn({name: z})
    # -log p(loc, scale, y) - log|d(loc, log scale)/dz| - log scale, by hand.
    unconstrained, ladj = guide.transform.forward_and_ladj(z)
    values = {site["name"]: v for site, v in guide._unpack_latent(unconstrained)}
    scale = values["scale"].exp()
    conditioned = poutine.condition(model, data={"loc": values["loc"], "scale": scale})
    log_joint = poutine.trace(conditioned).get_trace().log_prob_sum()
    torch.testing.assert_close(potential, -(log_joint + scale.log() + ladj))
    (grad,) = torch.autograd.grad(potential, z)
    assert grad.isfinite().all()


def test_neutra_with_nuts(neutra):
    _, reparam, warped = neutra
    mcmc = MCMC(NUTS(warped), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    (latent,) = mcmc.get_samples().values()
    samples = reparam.transform_sample(latent)
    assert samples["loc"].shape == (5,)
    assert (samples["scale"] > 0).all()
    assert samples["loc"].unique().numel() > 1


def test_kl_to_a_normalised_target_is_not_negative():
    """After training, KL(q ‖ p) = E[log q - log p] stays above zero within its standard error, for a p that is known."""
    target = dist.MultivariateNormal(
        torch.tensor([1.0, -1.0]), scale_tril=torch.tensor([[0.7, 0.0], [0.6, 0.5]])
    )
    transform = sylvester(2, num_layers=4)
    q = dist.TransformedDistribution(normal(), [transform])
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        y = q.rsample((64,))
        (q.log_prob(y) - target.log_prob(y)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        y = q.sample((5000,))
        terms = q.log_prob(y) - target.log_prob(y)
        start = normal().sample((5000,))
        before = (normal().log_prob(start) - target.log_prob(start)).mean()
    kl, error = terms.mean().item(), terms.std().item() / 5000**0.5
    assert kl > -4 * error
    assert kl < 0.1 * before.item()
