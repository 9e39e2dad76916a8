"""Densities of images: contributions that add up, masks by likelihood, and starts from data."""

import pytest
import torch

from pyro_flows_ext.distributions import MultiScaleFlow
from pyro_flows_ext.flows import Glow, NSFImage, RealNVPImage
from pyro_flows_ext.transforms import (
    ComposeFlow,
    ElementwiseAffine,
    Invertible1x1Conv,
    Pixelwise,
    ResidualFlow,
    Squeeze,
    affine_coupling,
)

MAKERS = {"realnvp": RealNVPImage, "glow": Glow, "nsf": NSFImage}
SMALL = {"hidden_dims": (4,), "num_layers": 2}


def perturbed(flow):
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow


def images(num=12, shape=(1, 4, 4)):
    return torch.randn(num, *shape, dtype=torch.float64)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_contributions_add_up_to_the_log_det(make):
    flow = perturbed(make((1, 4, 4), factor_out="none", **SMALL).double())
    x = images()
    shares = flow.contributions(x, chunk_size=5)
    assert len(shares) == 2
    total = flow.transform.inverse_and_ladj(x)[1].mean()
    torch.testing.assert_close(shares[-1].sum(), total)
    assert not torch.allclose(shares[0].sum(), total)


def test_contributions_are_the_logarithms_of_the_slopes():
    """Of one coupling: what passes adds nothing, the rest its own log-derivative."""
    flow = perturbed(
        MultiScaleFlow(
            (1, 4, 4), lambda s: affine_coupling(s, (4,), mask="checkerboard"), 1, "none"
        )
    ).double()
    x = images(1)
    (share,) = flow.contributions(x)
    jacobian = torch.func.jacrev(lambda v: flow.transform.inverse_and_ladj(v)[0].flatten())(x[0])
    slopes = jacobian.reshape(16, 16).diagonal().abs().log().reshape(1, 4, 4)
    torch.testing.assert_close(share, slopes)
    passes = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert (share[0, passes] == 0).all()
    assert (share[0, ~passes] != 0).all()


def test_contributions_of_a_convolution_are_its_log_singular_values():
    """In order, or shared by channel: either adds up to the log-det by autograd."""
    flow = MultiScaleFlow((3, 4, 4), lambda s: Invertible1x1Conv(s[0]), 1, "none").double()
    with torch.no_grad():
        flow.multiscale.levels[0].transform.lu.copy_(0.5 * torch.randn(3, 3))
    x = images(2, (3, 4, 4))
    jacobian = torch.func.jacrev(lambda v: flow.transform.inverse_and_ladj(v)[0].flatten())(x[0])
    jacobian = jacobian.reshape(48, 48)
    matrix = jacobian[::16, ::16]  # of the channels, at the first pixel
    (ordered,), (carried,) = flow.contributions(x, carry=False), flow.contributions(x)
    expected = torch.linalg.svdvals(matrix).log()[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(ordered, expected)
    eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.mT)  # the diagonal of log(M Mᵀ) / 2
    shared = (vectors * eigenvalues.log() / 2 @ vectors.mT).diagonal()
    torch.testing.assert_close(carried, shared[:, None, None].expand(3, 4, 4))
    for share in (ordered, carried):
        torch.testing.assert_close(share.sum(), torch.linalg.slogdet(jacobian)[1])


def test_contributions_move_with_permuted_channels():
    """Behind a permutation, a latent has the share of the pixel that it is."""

    def level(shape):
        return ComposeFlow([Invertible1x1Conv(shape[0]), Pixelwise(ElementwiseAffine(shape[0]))])

    flow = MultiScaleFlow((5, 2, 2), level, 1, "none").double()
    with torch.no_grad():
        flow.multiscale.levels[0][1].transform.log_scale.copy_(torch.arange(5))
    x = images(1, (5, 2, 2))
    jacobian = torch.func.jacrev(lambda v: flow.transform.inverse_and_ladj(v)[0].flatten())(x[0])
    slopes = jacobian.reshape(20, 20).abs().amax(-1)  # one pixel a latent
    assert not torch.equal(slopes.argsort(), torch.arange(19, -1, -1))
    torch.testing.assert_close(flow.contributions(x)[0].flatten(), slopes.log())


def test_across_channels_half_of_each_block_leaves():
    flow = perturbed(Glow((1, 8, 8), factor_out="none", **SMALL).double())
    x = images(shape=(1, 8, 8))
    share = Squeeze()(flow.contributions(x)[0])
    (mask,) = flow.likelihood_masks(x, across_channels=True)
    leaves = Squeeze().forward_and_ladj(mask)[0]
    assert (leaves.sum(0) == 8).all()
    largest = torch.where(leaves, share, -torch.inf).amax(0)
    assert (largest <= torch.where(leaves, torch.inf, share).amin(0)).all()
    assert not torch.equal(mask, flow.likelihood_masks(x)[0])
    assert torch.equal(flow.factored([mask]).multiscale.masks[0], mask)


def test_factored_flows_keep_the_permutations_of_the_first_level():
    flow = Glow((1, 8, 8), factor_out="none", num_layers=3, hidden_dims=(4,))
    other = flow.factored("channel")
    name = "levels.0.parts.{}.transform.permutation"
    own, new = (dict(f.multiscale.named_buffers()) for f in (flow, other))
    found = [name.format(i) for i in range(9) if name.format(i) in own]
    assert len(found) == 3
    assert all(torch.equal(own[n], new[n]) for n in found)


def test_the_smaller_shares_leave():
    flow = perturbed(RealNVPImage((1, 4, 4), factor_out="none", **SMALL).double())
    x = images()
    share = flow.contributions(x)[0]
    (mask,) = flow.likelihood_masks(x)
    for h in (0, 2):
        for w in (0, 2):
            block, leaves = (t[0, h : h + 2, w : w + 2].flatten() for t in (share, mask))
            assert leaves.sum() == 2
            assert block[leaves].max() <= block[~leaves].min()


def test_masks_at_deeper_levels_follow_the_elements():
    flow = perturbed(RealNVPImage((1, 8, 8), num_levels=3, factor_out="none", **SMALL).double())
    x = images(shape=(1, 8, 8))
    masks = flow.likelihood_masks(x)
    factored = flow.factored(masks)
    assert [tuple(m.shape) for m in masks] == [(1, 8, 8), (2, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(factored.multiscale.masks, masks, strict=True))
    share = flow.contributions(x)[1].flatten()
    at_level_2 = share[factored.multiscale.kept(0)]
    blocks = at_level_2.unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)
    leaves = masks[1].unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)
    stays_least = torch.where(leaves, torch.inf, blocks).amin(-1)
    leaves_most = torch.where(leaves, blocks, -torch.inf).amax(-1)
    assert (leaves_most <= stays_least).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_initialize_whitens_the_data(make):
    flow = make((1, 4, 4), **SMALL).double()
    x = 3 + 5 * images(200)
    before = flow.log_prob(x).mean()
    flow.initialize(x)
    z = flow.transform.inverse_and_ladj(x)[0]
    assert z.mean().abs() < 0.2
    assert (z.std() - 1).abs() < 0.2
    assert flow.log_prob(x).mean() > before


def test_masks_are_saved_with_the_rest():
    flow = perturbed(RealNVPImage((1, 4, 4), factor_out="none", **SMALL).double())
    x = images()
    saved = perturbed(flow.factored(flow.likelihood_masks(x)))
    loaded = flow.factored("checkerboard")
    assert not torch.allclose(loaded.log_prob(x), saved.log_prob(x))
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded.log_prob(x), saved.log_prob(x))
    assert torch.equal(loaded.multiscale.masks[0], saved.multiscale.masks[0])


def test_refusals():
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        RealNVPImage((4, 4))
    with pytest.raises(ValueError, match='factor_out="none"'):
        RealNVPImage((1, 4, 4), **SMALL).contributions(images().float())
    for level in (
        lambda shape: ResidualFlow(shape, (4,)).eval(),
        lambda shape: Pixelwise(affine_coupling(2, (4,))),
    ):
        flow = MultiScaleFlow((2, 4, 4), level, 1, "none")
        with pytest.raises(TypeError, match="no log-det by"):
            flow.contributions(images(2, (2, 4, 4)).float())
