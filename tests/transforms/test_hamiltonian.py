"""Leapfrog flows: the dynamics against closed forms, tempering, the gradient of the potential, a variational bound."""

import copy
import math
import pickle
import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    Leapfrog,
)


class Quadratic(nn.Module):
    """U(z) = ½ zᵀ (LLᵀ + I) z."""

    def __init__(self, dim):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(dim, dim))

    def precision(self):
        return self.factor @ self.factor.mT + torch.eye(len(self.factor)).to(self.factor)

    def forward(self, z):
        return (z @ self.precision() * z).sum(-1) / 2


def quartic(z):
    return (z**4 / 4 + z.sin()).sum(-1)


def contextual(z, context):
    return ((z - context) ** 2).sum(-1) / 2 + quartic(z)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


TEMPERING = pytest.mark.parametrize("tempering", [False, "quadratic", "free"], ids=str)


# --- the dynamics ---


@TEMPERING
def test_quadratic_potential_gives_the_product_of_the_shears(tempering):
    D, K = 2, 3
    potential = Quadratic(D)
    flow = perturb(Leapfrog(potential, D, K, tempering=tempering).double())
    H, one, zero = potential.precision(), torch.eye(D).double(), torch.zeros(D, D).double()
    whole = torch.eye(2 * D).double()
    alpha = torch.ones(K) if not tempering else flow._log_alpha().exp()
    for step, scale in zip(flow.step_size, alpha, strict=True):  # all half steps, none merged
        kick = torch.cat([torch.cat([one, zero], 1), torch.cat([-step.diag() @ H / 2, one], 1)])
        drift = torch.cat(
            [torch.cat([one, (step / flow.mass).diag()], 1), torch.cat([zero, one], 1)]
        )
        cool = torch.block_diag(one, scale * one)
        whole = cool @ kick @ drift @ kick @ whole
    x = randn(5, 2 * D)
    torch.testing.assert_close(flow(x), x @ whole.mT)


def test_reverse_is_the_flow_of_the_flipped_momentum():
    flow = perturb(Leapfrog(quartic, 3, 4).double())
    backward = copy.deepcopy(flow)
    with torch.no_grad():
        backward.log_step.copy_(flow.log_step.flip(0))
    flip, x = torch.tensor([1.0] * 3 + [-1.0] * 3).double(), randn(5, 6)
    torch.testing.assert_close(flip * backward(flip * x), flow.inv(x.clone()))


def test_equal_steps_are_symplectic():
    flow = Leapfrog(Quadratic(2), 2, 3, step_size=0.3).double()
    with torch.no_grad():
        flow.log_mass.normal_()
    J = torch.autograd.functional.jacobian(flow, randn(4))
    omega = torch.zeros(4, 4).double()
    omega[:2, 2:], omega[2:, :2] = torch.eye(2), -torch.eye(2)
    torch.testing.assert_close(J.mT @ omega @ J, omega)
    with torch.no_grad():
        flow.log_step[:, 0] += 1.0  # by coordinate
    J = torch.autograd.functional.jacobian(flow, randn(4))
    assert not torch.allclose(J.mT @ omega @ J, omega, atol=1e-3)
    torch.testing.assert_close(J.det(), torch.ones(()).double())


def test_energy_error_is_of_second_order():
    potential, x = Quadratic(3).double(), randn(64, 6)

    def energy(x):
        return potential(x[:, :3]) + (x[:, 3:] ** 2).sum(-1) / 2

    errors = []
    for num_layers in (40, 80):  # the same time, at half the step
        flow = Leapfrog(potential, 3, num_layers, step_size=2.0 / num_layers).double()
        errors.append((energy(flow(x)) - energy(x)).abs().mean().item())
    assert 0 < errors[0] < 0.5
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


# --- tempering ---


@pytest.mark.parametrize("tempering", ["quadratic", "free"])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_tempering_cools_from_beta_0(tempering, num_layers):
    D = 3
    flow = Leapfrog(quartic, D, num_layers, tempering=tempering).double()
    x, beta_0 = randn(5, 2 * D), torch.tensor(0.9).double()  # the initial value of both schedules
    _, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(ladj, (D / 2 * beta_0.log()).expand(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.momentum_scale, beta_0.rsqrt().expand(D), rtol=1e-6, atol=0)
    log_alpha = perturb(flow)._log_alpha()
    assert (log_alpha < 0).all()
    torch.testing.assert_close(flow.forward_and_ladj(x)[1], (D * log_alpha.sum()).expand(5))
    torch.testing.assert_close(flow.momentum_scale, flow.mass.sqrt() * (-log_alpha.sum()).exp())


def test_quadratic_schedule():
    K = 4
    flow = perturb(Leapfrog(quartic, 2, K, tempering="quadratic").double())
    root = flow.tempering_logit.sigmoid().sqrt()  # √β_0
    k = torch.arange(K + 1)
    root_beta = 1 / ((1 - 1 / root) * k**2 / K**2 + 1 / root)
    assert root_beta[-1] == 1
    torch.testing.assert_close(flow._log_alpha().exp(), root_beta[:-1] / root_beta[1:])


# --- the potential ---


@TEMPERING
def test_gradients_of_all_parameters(tempering):
    flow = perturb(Leapfrog(Quadratic(2), 2, 2, tempering=tempering).double())
    names = {"log_step", "log_mass", "potential.factor"} | (
        {"tempering_logit"} if tempering else set()
    )
    parameters = dict(flow.named_parameters())
    assert set(parameters) == names
    inputs = (randn(2, 4).requires_grad_(), *parameters.values())
    for run in (flow.forward_and_ladj, flow.inverse_and_ladj):
        torch.autograd.gradcheck(lambda x, *_, run=run: run(x), inputs, fast_mode=True)
        torch.autograd.gradgradcheck(lambda x, *_, run=run: run(x)[0], inputs, fast_mode=True)


def test_gradients_reach_what_a_callable_closes_over():
    scale = nn.Parameter(randn(2).exp())
    flow = Leapfrog(lambda z: (scale * z**4).sum(-1), 2).double()
    assert {name for name, _ in flow.named_parameters()} == {"log_step", "log_mass"}
    x = randn(3, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x, _: flow.forward_and_ladj(x)[0], (x, scale), fast_mode=True)

    by_func = torch.func.vmap(torch.func.jacrev(flow))(x)
    by_loop = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in x])
    torch.testing.assert_close(by_func, by_loop)
    weight, run = randn(3, 4), lambda x: flow.forward_and_ladj(x)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad((weight * r(x)).sum(), [x, scale]) for r in (run, compiled)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_works_where_gradients_are_off(mode):
    flow, x = Leapfrog(Quadratic(2), 2), torch.randn(3, 4)
    expected = flow.forward_and_ladj(x)[0].detach()
    with mode():
        y = flow(x.clone())
        assert not y.requires_grad
        assert flow.log_abs_det_jacobian(x, y).shape == (3,)
    torch.testing.assert_close(y.clone(), expected)
    with torch.no_grad():
        torch.testing.assert_close(flow.inv(y), x)


def test_a_callable_is_asked_again_each_time():
    # What it closes over may be another batch of data by now, which nothing can see.
    data = {"loc": torch.zeros(2)}
    flow = Leapfrog(lambda z: ((z - data["loc"]) ** 2).sum(-1), 2)
    for whole in (flow, ComposeFlow([flow]), ComposeFlow([flow.inv])):
        data["loc"] = torch.zeros(2)
        x = torch.randn(3, 4)
        y = whole(x)
        data["loc"] = torch.ones(2)
        assert not torch.allclose(whole(x), y)
    known = Leapfrog(Quadratic(2), 2)
    assert known(x) is known(x)


SHAPES = {
    "(3, 2)": lambda z: z**2,
    "()": lambda z: (z**2).sum(),
    "(3, 1)": lambda z: (z**2).sum(-1, keepdim=True),
    "float": lambda z: 1.0,
}


@pytest.mark.parametrize(("got", "potential"), SHAPES.items(), ids=SHAPES)
def test_potential_of_another_shape(got, potential):
    message = rf"potential: expected one number a row.* of shape \(3,\), got {re.escape(got)}$"
    for run in (Leapfrog(potential, 2).forward_and_ladj, Leapfrog(potential, 2).inverse_and_ladj):
        with pytest.raises(ValueError, match=message):
            run(torch.randn(3, 4))


def test_potential_without_gradient():
    with pytest.raises(ValueError, match="potential: its value has no gradient"):
        Leapfrog(torch.no_grad()(quartic), 2)(torch.randn(3, 4))


def test_potential_that_ignores_the_position_leaves_free_motion():
    weight = nn.Parameter(torch.ones(()))
    flow, x = (
        Leapfrog(lambda z: weight.expand(z.shape[:-1]), 2, 5, step_size=0.1),
        torch.randn(3, 4),
    )
    z, momentum = x.chunk(2, -1)
    torch.testing.assert_close(flow(x), torch.cat([z + 0.5 * momentum, momentum], -1))


# --- as a module ---


def test_copies():
    x = torch.randn(3, 4)
    flow = perturb(Leapfrog(lambda z: (z**4).sum(-1), 2))
    y = flow(x)
    torch.testing.assert_close(copy.deepcopy(flow)(x), y)
    flow = perturb(Leapfrog(Quadratic(2), 2))
    y = flow(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(flow))(x), y)


def test_repr_and_sizes():
    flow = Leapfrog(quartic, 3, 2, tempering="free")
    assert repr(flow) == "Leapfrog(latent_dim=3, num_layers=2, tempering='free')"
    assert (flow.latent_dim, flow.input_dim) == (3, 6)
    assert flow.step_size.shape == (2, 3)
    torch.testing.assert_close(flow.step_size, torch.full((2, 3), 0.1))
    plain = perturb(Leapfrog(quartic, 3))
    torch.testing.assert_close(plain.momentum_scale**2, plain.mass)
    assert repr(Leapfrog(contextual, 3, context_dim=3)) == (
        "Leapfrog(latent_dim=3, num_layers=5, context_dim=3)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected a positive integer"),
        ({"num_layers": 0}, "num_layers: expected a positive integer"),
        ({"step_size": 0.0}, "step_size: expected a positive number"),
        ({"tempering": "linear"}, "tempering: expected one of False, quadratic, free"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Leapfrog(quartic, **{"latent_dim": 2, **arguments})


def test_bad_potential_and_input():
    with pytest.raises(TypeError, match="potential: expected a callable, got a int"):
        Leapfrog(2, 2)
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \(\*, 4\)"):
        Leapfrog(quartic, 2)(torch.randn(3, 2))


# --- contexts ---


def test_context_is_the_second_argument_of_the_potential():
    conditional = Leapfrog(contextual, 2, 3, tempering="free", context_dim=2)
    context, x = torch.randn(4, 2), torch.randn(5, 1, 4)
    y, ladj = conditional.condition(context).forward_and_ladj(x)
    assert y.shape == (5, 4, 4)
    assert ladj.shape == (5, 4)
    for i, row in enumerate(context):
        alone = Leapfrog(lambda z, row=row: contextual(z, row), 2, 3, tempering="free")
        torch.testing.assert_close(alone(x[:, 0]), y[:, i])
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        conditional(x)


@TEMPERING
def test_steps_masses_and_temperatures_by_context(tempering):
    flow = Leapfrog(Quadratic(2), 2, 1, tempering=tempering)
    flow.add_hyper_network(3, (4,))
    conditional = perturb(flow)
    context, x = torch.randn(5, 3), torch.randn(4)
    y, ladj = conditional.condition(context).forward_and_ladj(x)
    assert ladj.shape == (5,)
    for i, row in enumerate(context):
        torch.testing.assert_close(conditional.condition(row).forward_and_ladj(x), (y[i], ladj[i]))


def test_one_bound_parameter_is_enough_for_a_batch():
    flow = Leapfrog(quartic, 2, 1, tempering="free")
    logits = torch.tensor([[0.0], [1.0], [2.0]])
    y, ladj = flow.bind({"tempering_logit": logits}).forward_and_ladj(torch.randn(4))
    assert y.shape == (3, 4)
    torch.testing.assert_close(ladj, 2 * nn.functional.logsigmoid(logits[:, 0]))


# --- as a variational family ---


@TEMPERING
def test_bound_of_a_gaussian_target(tempering):
    """E[log p(z_K) + log N(ρ_K; 0, m) - log q(z_0, ρ_0) + ladj] rises with training, and stays below log Z.

    With q(z_0) factorised it ends above what the best factorised Gaussian reaches without the flow.
    """
    target = dist.MultivariateNormal(
        torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.7], [0.7, 1.0]])
    )
    log_Z = 1.5
    flow = Leapfrog(lambda z: -target.log_prob(z), 2, 3, step_size=0.2, tempering=tempering)
    loc, log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def bound(size):
        scale = torch.cat([log_scale.exp(), flow.momentum_scale])
        before = dist.Normal(torch.cat([loc, torch.zeros(2)]), scale)
        x = before.rsample((size,))
        y, ladj = flow.forward_and_ladj(x)
        z, momentum = y.chunk(2, -1)
        log_p = target.log_prob(z) + dist.Normal(0, flow.mass.sqrt()).log_prob(momentum).sum(-1)
        return log_Z + (log_p - before.log_prob(x).sum(-1) + ladj).mean()

    with torch.no_grad():
        start = bound(20_000).item()
    optimizer = torch.optim.Adam([loc, log_scale, *flow.parameters()], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        (-bound(64)).backward()
        optimizer.step()
    with torch.no_grad():
        end = bound(20_000).item()
    factorised = log_Z + 0.5 * math.log(1 - 0.7**2)
    assert start < factorised - 1
    assert factorised < end < log_Z
