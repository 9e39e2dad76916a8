"""The cache of a pass: it spares the work that it can, and never returns what has stopped being true."""

import copy
import gc
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from pyro_flows_ext.transforms import (
    ComposeFlow,
    Planar,
    planar,
    sylvester,
)


class Counting(Planar):
    """A planar flow that counts its passes."""

    def __init__(self, input_dim=2):
        super().__init__(input_dim)
        self.passes = []

    def forward_and_ladj(self, x):
        self.passes.append("forward")
        return super().forward_and_ladj(x)

    def inverse_and_ladj(self, y):
        self.passes.append("inverse")
        return super().inverse_and_ladj(y)


def normal(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def flow(*parts):
    return dist.TransformedDistribution(normal(), list(parts))


# --- what it spares ---


@pytest.mark.parametrize("method", ["rsample", "sample"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_scoring_a_sample_costs_one_forward_pass_a_part(method, num_parts):
    parts = [Counting() for _ in range(num_parts)]
    q = flow(*parts)
    with torch.set_grad_enabled(method == "rsample"):
        y = getattr(q, method)(torch.Size((5,)))  # in the chain, only the last output is held
        log_prob = q.log_prob(y)
    assert [part.passes for part in parts] == [["forward"]] * num_parts
    torch.testing.assert_close(log_prob, flow(*copy.deepcopy(parts)).log_prob(y.clone()))


@pytest.mark.parametrize("compose", [ComposeFlow, ComposeTransformModule], ids=lambda c: c.__name__)
def test_composed_parts_cost_one_forward_pass(compose):
    parts = [Counting(), Counting()]
    q = flow(compose(parts))
    q.log_prob(q.rsample(torch.Size((5,))))
    assert [part.passes for part in parts] == [["forward"]] * 2


def test_inverse_orientation_costs_one_inverse_pass_to_sample_and_one_forward_to_score():
    part = Counting()
    q = flow(part.inv)
    q.log_prob(q.rsample())
    assert part.passes == ["inverse"]
    part.passes.clear()
    q.log_prob(torch.randn(5, 2))
    assert part.passes == ["forward"]


def test_scoring_given_values_costs_one_inverse_pass():
    part = Counting()
    q, y = flow(part), torch.randn(5, 2)
    q.log_prob(y)
    assert part.passes == ["inverse"]


def test_another_tensor_with_the_same_values_is_a_pass_of_its_own():
    part, x = Counting(), torch.randn(5, 2)
    y = part(x)
    torch.testing.assert_close(part(x.clone()), y)
    torch.testing.assert_close(part.inv(y.clone()), x)
    assert part.passes == ["forward", "forward", "inverse"]


def test_the_last_pass_alone_is_remembered():
    part = Counting()
    x1, x2 = torch.randn(2, 5, 2)
    y1, y2 = part(x1), part(x2)
    assert part.inv(y2) is x2
    assert part.passes == ["forward"] * 2
    torch.testing.assert_close(part.inv(y1), x1, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        part.log_abs_det_jacobian(x1, y1), part.forward_and_ladj(x1.clone())[1]
    )


# --- what it must not return ---


@pytest.fixture
def passed():
    """A transform, its parameters perturbed, with a pass that it remembers."""
    part = sylvester(3, num_layers=2)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.5 * torch.randn_like(p))
    x = torch.randn(4, 3)
    return part, x, part(x)


def is_fresh(part, x, y):
    """Whether what the transform says about these tensors is what it says about their copies."""
    ladj = part.log_abs_det_jacobian(x, y)
    value = part(x)
    same = torch.equal(ladj, part.log_abs_det_jacobian(x.clone(), y.clone()))
    return same and torch.equal(value, part(x.clone()))


def refill(parameter):
    with torch.no_grad():
        parameter.copy_(torch.randn_like(parameter))


CHANGES = {
    "parameter in place": lambda part, x, y: refill(part.b),
    "parameter replaced": lambda part, x, y: setattr(
        part, "b", nn.Parameter(torch.randn_like(part.b))
    ),
    "load_state_dict": lambda part, x, y: part.load_state_dict(
        sylvester(3, num_layers=2).state_dict()
    ),
    "x in place": lambda part, x, y: x.add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(passed, change):
    part, x, y = passed
    old = part.log_abs_det_jacobian(x, y)
    change(part, x, y)
    assert is_fresh(part, x, y)
    back = part.inv(y.detach())
    torch.testing.assert_close(part(back), y.detach(), rtol=1e-3, atol=1e-4)
    assert not torch.equal(old, part.log_abs_det_jacobian(x, y))


def test_y_changed_in_place_is_inverted_anew(passed):
    part, x, _ = passed
    with torch.no_grad():
        y = part(x)
        assert part.inv(y) is x
        y.mul_(2.0)
        back = part.inv(y)
    assert back is not x
    torch.testing.assert_close(part.forward_and_ladj(back)[0], y, rtol=1e-3, atol=1e-4)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_step_is_seen(passed, make):
    part, x, y = passed
    optimizer = make(list(part.parameters()))

    def loss():
        optimizer.zero_grad()
        value = part.forward_and_ladj(x)[1].sum()
        value.backward()
        return value

    loss()
    optimizer.step(loss)
    assert is_fresh(part, x, y)


def test_data_written_by_hand_needs_clear_cache(passed):
    part, x, y = passed
    part.b.data.add_(1.0)
    part.clear_cache()
    assert is_fresh(part, x, y)


def test_change_of_training_mode_is_seen():
    class Modal(Counting):
        def forward_and_ladj(self, x):
            y, ladj = super().forward_and_ladj(x)
            return (y, ladj) if self.training else (y + 1, ladj)

    part, x = Modal(), torch.randn(5, 2)
    y = part(x)
    torch.testing.assert_close(part.eval()(x), y + 1)


# --- gradients ---


def test_sample_under_no_grad_then_log_prob_with_gradient():
    part = planar(2)
    q = flow(part)
    with torch.no_grad():
        y = q.sample(torch.Size((5,)))
    log_prob = q.log_prob(y)
    grads = torch.autograd.grad(log_prob.sum(), list(part.parameters()))
    expected = torch.autograd.grad(q.log_prob(y.clone()).sum(), list(part.parameters()))
    torch.testing.assert_close(grads, expected)
    assert all(grad.abs().max() > 0 for grad in grads)


def test_log_prob_with_gradient_then_under_no_grad():
    part, x = planar(2), torch.randn(5, 2)
    y = part(x)
    with torch.no_grad():
        assert not part(x).requires_grad
        assert not part.log_abs_det_jacobian(x, y).requires_grad


@pytest.mark.parametrize("who", ["parameter", "input"])
def test_requires_grad_switched_on_after_a_pass(who):
    part, x = planar(2).requires_grad_(False), torch.randn(5, 2)
    y = part(x)
    target = part.w if who == "parameter" else x
    target.requires_grad_()
    assert not y.requires_grad
    assert torch.autograd.grad(part(x).sum(), target)[0].abs().max() > 0
    ladj = part.log_abs_det_jacobian(x, y)
    assert torch.autograd.grad(ladj.sum(), target)[0].abs().max() > 0


@pytest.mark.parametrize("through", ["value", "log-det"])
def test_a_graph_is_not_offered_again_after_its_backward_pass(through):
    part, y = planar(2), torch.randn(5, 2)
    for _ in range(
        2
    ):  # gradients add up over two backward passes, while the name x keeps the first one's tensor
        x = part.inv(y)
        ladj = part.inv.log_abs_det_jacobian(y, x)
        (x if through == "value" else ladj).sum().backward()
    twice = part.b.grad.clone()
    part.zero_grad()
    out, ladj = part.inverse_and_ladj(y)
    (out if through == "value" else ladj).sum().backward()
    torch.testing.assert_close(twice, 2 * part.b.grad)


def test_rsample_and_log_prob_give_the_gradient_of_the_pure_passes():
    part, noise = planar(2), torch.randn(5, 2)
    y = part(noise)
    grads = torch.autograd.grad(
        (y**2).sum() - part.log_abs_det_jacobian(noise, y).sum(), list(part.parameters())
    )
    y, ladj = part.forward_and_ladj(noise)
    expected = torch.autograd.grad((y**2).sum() - ladj.sum(), list(part.parameters()))
    torch.testing.assert_close(grads, expected)


# --- memory ---


def test_the_entry_dies_with_its_output():
    part = planar(2)
    y = part(torch.randn(5, 2))
    ladj = weakref.ref(part.log_abs_det_jacobian(part.inv(y), y))
    x = weakref.ref(part.inv(y))
    assert x() is not None
    assert ladj() is not None
    gc.disable()  # without the collector: nothing may hang in a cycle
    try:
        del y
        assert x() is None
        assert ladj() is None
    finally:
        gc.enable()


def test_a_chain_dies_with_its_last_output():
    parts = [planar(2), planar(2)]
    y = parts[1](parts[0](torch.randn(5, 2)))
    middle = weakref.ref(parts[1].inv(y))
    del y
    assert middle() is None
    assert parts[0]._pass_cache._entry is None


def test_a_dead_output_does_not_take_its_successor():
    part, x = Counting(), torch.randn(5, 2)
    first = part(torch.randn(5, 2))
    second = part(x)
    del first
    assert part.inv(second) is x
    assert part.passes == ["forward", "forward"]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_do_not_carry_the_cache(twin):
    part = planar(2)
    y = part(torch.randn(100_000, 2))
    part.inv(y)
    assert len(pickle.dumps(part)) < 10_000
    copied = twin(part)
    assert copied.inv.inv is copied
    assert copied.inv is not part.inv
    assert "_pass_cache" not in copied.__dict__


def test_hooks_on_optimizers_do_not_pile_up():
    planar(2)(torch.randn(2)).sum()
    before = len(_global_optimizer_post_hooks)
    for _ in range(5):
        planar(2)(torch.randn(2))
    assert before >= 1
    assert len(_global_optimizer_post_hooks) == before


# --- modes in which it stays out of the way ---


def test_inference_mode():
    part = Counting()
    q = flow(part)
    with torch.inference_mode():
        y = q.sample(torch.Size((5,)))
        log_prob = q.log_prob(y)
    torch.testing.assert_close(log_prob, q.log_prob(y.clone()).detach(), rtol=1e-4, atol=1e-4)
    x = torch.randn(5, 2)
    out = part(x)
    with torch.inference_mode():
        assert not part(x).requires_grad
    assert part(x) is out


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        part = planar(2)
        x = torch.randn(5, 2)
        torch.testing.assert_close(part.inv(part(x)), x, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y = part(torch.ones(5, 2))
        torch.testing.assert_close(part.inv(y), torch.ones(5, 2), rtol=1e-4, atol=1e-5)
