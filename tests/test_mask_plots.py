"""What leaves a multi-scale flow, and when: pictures, and masks of the same places in every block."""

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_flows_ext.diagnostics import plots_images
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.flows import Glow, RealNVPImage
from pyro_flows_ext.transforms import Squeeze

SMALL = {"hidden_dims": (4,), "num_layers": 2}


@pytest.fixture(autouse=True)
def _leaves_matplotlib_alone():
    before = dict(matplotlib.rcParams.copy())
    yield
    assert dict(matplotlib.rcParams.copy()) == before


def by_likelihood(make, shape, num_levels=2):
    """A factored flow, and the contributions that its masks are from."""
    torch.manual_seed(0)
    unfactored = make(shape, num_levels=num_levels, factor_out="none", **SMALL)
    with torch.no_grad():
        for p in unfactored.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, *shape)
    return unfactored.factored(unfactored.likelihood_masks(x)), unfactored.contributions(x)


def panels(figure):
    """The pictures of a figure, row by row."""
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def test_exit_levels_are_where_the_latents_go():
    """Latents of the last level come first: with layers that are the identity, a pixel is found again in its share of z."""
    flow = RealNVPImage((1, 8, 8), num_levels=3, factor_out="checkerboard", **SMALL)
    exits = plots_images.exit_levels(flow)
    assert exits.flatten().bincount().tolist() == [0, 32, 16, 16]
    pixels = torch.arange(64.0).reshape(1, 8, 8)
    z = flow.transform.inverse_and_ladj(pixels)[0]
    for level, latents in zip((3, 2, 1), z.split([16, 16, 32]), strict=True):
        assert set(latents.tolist()) == set(pixels[exits == level].tolist())


def test_exit_levels_of_one_mask_are_the_mask():
    flow, _ = by_likelihood(RealNVPImage, (2, 4, 4))
    torch.testing.assert_close(plots_images.exit_levels(flow), 2 - flow.multiscale.masks[0].long())


def test_nothing_leaves_an_unfactored_flow():
    flow = RealNVPImage((1, 4, 4), factor_out="none", **SMALL)
    assert (plots_images.exit_levels(flow) == 2).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_panels_have_the_numbers(channels):
    flow, shares = by_likelihood(RealNVPImage, (channels, 8, 8), num_levels=3)
    figure = plots_images.factoring(flow, shares)
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()  # constrained layout and formatters run without a warning
    expected = [
        picture[c] for c in range(channels) for picture in (plots_images.exit_levels(flow), *shares)
    ]
    found = panels(figure)
    assert len(found) == 4 * channels
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a.data), b)


def test_a_squeezed_image_is_drawn_in_the_places_of_its_pixels():
    flow, shares = by_likelihood(Glow, (1, 8, 8))
    found = panels(plots_images.factoring(flow, shares))
    assert [a.shape for a in found] == 3 * [(8, 8)]
    torch.testing.assert_close(
        torch.as_tensor(found[1].data), Squeeze().inverse_and_ladj(shares[0])[0][0]
    )


def test_masks_alone_and_on_a_figure_of_yours():
    flow, _ = by_likelihood(RealNVPImage, (1, 4, 4))
    mine = Figure()
    part = mine.subfigures(1, 2)[0]
    assert plots_images.factoring(flow, figure=part) is part
    assert len(panels(part)) == 1


def test_refusals():
    flow, shares = by_likelihood(RealNVPImage, (1, 4, 4))
    with pytest.raises(ValueError, match=r"2 tensors of shape \(1, 4, 4\)"):
        plots_images.factoring(flow, shares[:1])
    with pytest.raises(TypeError, match="expected a MultiScaleFlow"):
        plots_images.factoring(FlowDistribution(flow.base, flow.transform))


def test_the_same_places_leave_every_block():
    flow, _ = by_likelihood(RealNVPImage, (2, 16, 16), num_levels=3)
    unfactored = flow.factored("none")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in unfactored.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, 2, 16, 16)
    masks = unfactored.likelihood_masks(x, same_places=True)
    exits = plots_images.exit_levels(unfactored.factored(masks))
    # One pattern of 2 x 2 blocks of the second level, which are 4 x 4 pixels, fills the image.
    torch.testing.assert_close(exits, exits[:, :4, :4].repeat(1, 4, 4))
    share = unfactored.contributions(x)[0].reshape(2, 8, 2, 8, 2).mean((1, 3)).flatten(1)
    leaves = masks[0][:, :2, :2].flatten(1)
    assert (leaves.sum(1) == 2).all()
    assert (
        share.where(leaves, -torch.inf).amax(1) <= share.where(~leaves, torch.inf).amin(1)
    ).all()
