"""Multi-scale transforms: who leaves where, the order of the latents, and masks that are refused."""

import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import ComposeFlow, MultiScale, Squeeze, affine_coupling
from pyro_flows_ext.transforms.multiscale import kept_elements, make_mask

PIXELS = torch.arange(16.0).reshape(1, 4, 4)


def identity(shape):
    return affine_coupling(shape, (4,), mask="checkerboard")  # starts at the identity


def two_levels(factor_out):
    inner = 4 if factor_out == "none" else 2
    return MultiScale([identity((1, 4, 4)), identity((inner, 2, 2))], (1, 4, 4), factor_out)


@pytest.mark.parametrize(
    ("factor_out", "leaves"),
    [
        ("channel", {4, 5, 6, 7, 12, 13, 14, 15}),  # the lower row of each block of 2 x 2
        ("checkerboard", {1, 3, 4, 6, 9, 11, 12, 14}),
        ("none", set()),
        ([torch.tensor([[1, 0], [1, 0]]).bool().repeat(2, 2)[None]], {0, 2, 4, 6, 8, 10, 12, 14}),
    ],
    ids=["channel", "checkerboard", "none", "mask"],
)
def test_who_leaves_comes_last(factor_out, leaves):
    transform = two_levels(factor_out)
    z, ladj = transform.inverse_and_ladj(PIXELS)
    assert ladj == 0
    assert set(z[16 - len(leaves) :].int().tolist()) == leaves
    assert set(z.int().tolist()) == set(range(16))
    assert {int(i) for i in transform.masks[0].flatten().nonzero()} == leaves
    assert torch.equal(transform(z), PIXELS)


def test_channels_stay_as_squeeze_orders_them():
    shape = (3, 4, 6)
    kept = kept_elements(make_mask("channel", shape), shape)
    positions = torch.arange(72).reshape(shape)
    assert torch.equal(kept, Squeeze()(positions.float())[:6].long())


def test_log_det_is_that_of_the_levels():
    transform = perturb(two_levels("channel").double())
    x = torch.randn(3, 16, dtype=torch.float64)
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda z: transform.forward_and_ladj(z)[0].flatten())
    )(x)
    torch.testing.assert_close(
        transform.forward_and_ladj(x)[1], torch.linalg.slogdet(jacobian).logabsdet
    )


def test_a_squeeze_in_front_of_all_levels():
    inner = MultiScale([identity((4, 2, 2))], (4, 2, 2))
    transform = ComposeFlow([inner, Squeeze().inv])
    assert transform.forward_shape((5, 16)) == (5, 1, 4, 4)
    assert transform.inverse_shape((5, 1, 4, 4)) == (5, 16)
    assert torch.equal(transform(transform.inv(PIXELS)), PIXELS)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 4, 4), "booleans"),
        (torch.zeros(1, 2, 4, dtype=torch.bool), "booleans"),
        (torch.ones(1, 4, 4, dtype=torch.bool), "the same number"),
        (torch.arange(16).reshape(1, 4, 4) == 0, "the same number"),
    ],
    ids=["numbers", "shape", "nothing-stays", "uneven"],
)
def test_refused_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        two_levels([mask])


def test_refused_sizes_and_names():
    with pytest.raises(ValueError, match="even height"):
        MultiScale([identity((1, 3, 4)), identity((2, 1, 2))], (1, 3, 4))
    with pytest.raises(ValueError, match="masks or one of"):
        two_levels("half")
    with pytest.raises(ValueError, match="expected 1 masks"):
        two_levels([])
    with pytest.raises(ValueError, match=r"shape \(\*, 16\)"):
        two_levels("channel")(torch.zeros(15))
