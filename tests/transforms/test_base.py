"""What the base class derives from two methods: the torch protocol under `torch.func` and the compiler, shapes, errors."""

import pytest
import torch

from pyro_flows_ext.transforms import FlowTransform, conditional_planar, planar, radial, sylvester

MAKES = {"planar": planar, "radial": radial, "sylvester": sylvester}


# The first forward-mode derivative of a process makes torch load rules of its own, with a warning.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@FORWARD_MODE
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("inverted", [False, True], ids=["forward", "inverse"])
def test_vmap_and_jacrev_through_the_protocol(make, inverted):
    part = make(3).double()
    part = part.inv if inverted else part
    x = torch.randn(4, 3, dtype=torch.float64)
    held = part(x[0])  # an entry that must not leak into the transformed calls
    jacobian = torch.vmap(torch.func.jacrev(part))(x)
    ladj = torch.vmap(lambda x: part.log_abs_det_jacobian(x, part(x)))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj)
    _, ladj = part.forward_and_ladj(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj)
    tangent = torch.func.jvp(part, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, jacobian.sum(-1))
    torch.testing.assert_close(part(x[0]), held)


@FORWARD_MODE
@pytest.mark.parametrize("inverted", [False, True], ids=["forward", "inverse"])
def test_hessian_of_the_log_det(inverted):
    part = planar(2).double()
    part = part.inv if inverted else part
    x = torch.randn(2, dtype=torch.float64)

    def ladj(x):
        return part.log_abs_det_jacobian(x, part(x))

    hessian = torch.func.hessian(ladj)(x)
    torch.testing.assert_close(hessian, hessian.mT)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(ladj, x))


def plain():
    transform = planar(2)
    return lambda: transform


def conditioned():
    transform, context = conditional_planar(2, 2, (4,)), torch.randn(5, 2)
    return lambda: transform.condition(context)


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, conditioned], ids=lambda make: make.__name__)
def test_the_protocol_compiles_in_one_graph(make):
    transform = make()

    def step(y):
        bound = transform()
        x = bound.inv(y)
        return x, bound.log_abs_det_jacobian(x, y), bound(x)

    y = torch.randn(5, 2)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y), step(y), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# --- the base class ---


def test_a_subclass_must_define_the_forward_pass():
    with pytest.raises(TypeError, match="forward_and_ladj"):
        type("Bare", (FlowTransform,), {})()


def test_a_subclass_without_an_inverse_says_so():
    class OneWay(FlowTransform):
        def forward_and_ladj(self, x):
            return x, x.new_zeros(x.shape[:-1])

    assert OneWay()(torch.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(NotImplementedError, match=r"define inverse_and_ladj\(y\)"):
        OneWay().inv(torch.ones(2))


def test_with_cache_is_the_transform_itself():
    part = planar(2)
    assert part.with_cache(0) is part
    assert part.inv.inv is part
    assert part.inv.sign == part.sign == 1


@pytest.mark.parametrize("name", ["forward_shape", "inverse_shape"])
def test_shapes_need_the_event(name):
    with pytest.raises(ValueError, match="expected 1 event dimensions, got shape"):
        getattr(planar(2), name)(())
    assert getattr(planar(2), name)((5, 2)) == (5, 2)
