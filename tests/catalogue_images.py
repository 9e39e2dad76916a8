"""The transforms of images, on images of a few pixels: a part of the catalogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from entries import CONTEXT_DIM, Entry, conditional
from torch import nn

import pyro_flows_ext.transforms as T

# The smallest with two channels, two rows and two columns, and the smallest that has pixels at all.
SHAPE = (2, 2, 2)
FLAT = (1, 2, 2)
MIXED = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
HIDDEN = (3,)


def image(
    make: Callable[[], nn.Module], *covers: str, event_shape: tuple[int, ...] = SHAPE
) -> Entry:
    return Entry(lambda _: make(), covers, event_shape=event_shape)


def conditional_image(make: Callable[[], nn.Module], *covers: str) -> Entry:
    return conditional(lambda _: make(), *covers, event_shape=SHAPE)


def _permuted_conv() -> T.Invertible1x1Conv:
    transform = T.invertible_1x1_conv(3, bias=True)
    transform.transform.permutation.copy_(torch.tensor([1, 2, 0]))
    return transform


def _channel_actnorm() -> T.Pixelwise:
    return T.Pixelwise(T.actnorm(2, initialize_on_first_batch=True)).eval()


def _standardize() -> T.Standardize:
    return T.Standardize(torch.randn(2, 1, 1), torch.rand(2, 1, 1) + 0.5)


def _glow_step() -> T.ComposeFlow:
    return T.ComposeFlow(
        [
            T.squeeze(2),
            T.Pixelwise(T.actnorm(4)),
            T.invertible_1x1_conv(4, permute=False),
            T.affine_coupling((4, 1, 1), HIDDEN),
            T.unsqueeze(2),
        ]
    )


def _multiscale(factor_out) -> T.MultiScale:
    """Two levels over images of 4 x 4 pixels."""
    levels = [
        T.affine_coupling((1, 4, 4), HIDDEN, mask="checkerboard"),
        T.affine_coupling((2, 2, 2), HIDDEN),
    ]
    return T.multiscale(levels, (1, 4, 4), factor_out)


IMAGES: dict[str, Entry] = {
    # --- coupling ---
    "image-additive-coupling": image(
        lambda: T.additive_coupling(SHAPE, HIDDEN), "AdditiveCoupling"
    ),
    "image-additive-coupling-checkerboard": image(
        lambda: T.additive_coupling(FLAT, HIDDEN, mask="checkerboard"),
        "AdditiveCoupling",
        event_shape=FLAT,
    ),
    "image-affine-coupling": image(
        lambda: T.affine_coupling(SHAPE, HIDDEN, mask="channel", flip=True), "AffineCoupling"
    ),
    "image-affine-coupling-alternating": image(
        lambda: T.affine_coupling((3, 1, 2), HIDDEN, mask="alternating"),
        "AffineCoupling",
        event_shape=(3, 1, 2),
    ),
    "image-affine-coupling-checkerboard": image(
        lambda: T.affine_coupling(FLAT, HIDDEN, mask="checkerboard", flip=True),
        "AffineCoupling",
        event_shape=FLAT,
    ),
    "image-affine-coupling-mask": image(
        lambda: T.affine_coupling(SHAPE, HIDDEN, mask=MIXED), "AffineCoupling"
    ),
    "image-spline-coupling": image(
        lambda: T.spline_coupling(SHAPE, HIDDEN, num_bins=3), "SplineCoupling"
    ),
    "image-spline-coupling-checkerboard": image(
        lambda: T.spline_coupling(FLAT, HIDDEN, mask="checkerboard", num_bins=3),
        "SplineCoupling",
        event_shape=FLAT,
    ),
    "image-spline-coupling-mask": image(
        lambda: T.spline_coupling(SHAPE, HIDDEN, mask=MIXED, num_bins=3), "SplineCoupling"
    ),
    "conditional-image-affine-coupling": conditional_image(
        lambda: T.conditional_affine_coupling(SHAPE, CONTEXT_DIM, HIDDEN),
        "ConditionalAffineCoupling",
    ),
    "conditional-image-affine-coupling-checkerboard": conditional_image(
        lambda: T.conditional_affine_coupling(SHAPE, CONTEXT_DIM, HIDDEN, mask="checkerboard"),
        "ConditionalAffineCoupling",
    ),
    # --- by pixel ---
    "pixelwise-spline-coupling": image(
        lambda: T.Pixelwise(T.spline_coupling(2, HIDDEN, num_bins=3)), "Pixelwise"
    ),
    "pixelwise-permute": image(
        lambda: T.Pixelwise(T.Permute([1, 2, 0])), "Pixelwise", event_shape=(3, 1, 2)
    ),
    "pixelwise-actnorm": image(_channel_actnorm, "Pixelwise", "ActNorm"),
    "pixelwise-inverse": image(lambda: T.Pixelwise(T.planar(2).inv).inv, "Pixelwise"),
    "invertible-1x1-conv": image(
        _permuted_conv, "invertible_1x1_conv", "Invertible1x1Conv", event_shape=(3, 2, 1)
    ),
    "conditional-pixelwise": conditional_image(
        lambda: T.ConditionalPixelwise(T.conditional_planar(2, CONTEXT_DIM, HIDDEN)),
        "ConditionalPixelwise",
    ),
    "conditional-pixelwise-coupling": conditional_image(
        lambda: T.ConditionalPixelwise(T.conditional_affine_coupling(2, CONTEXT_DIM, HIDDEN)),
        "ConditionalPixelwise",
    ),
    "conditional-invertible-1x1-conv": conditional_image(
        lambda: T.conditional_invertible_1x1_conv(2, CONTEXT_DIM, HIDDEN, bias=True),
        "conditional_invertible_1x1_conv",
        "ConditionalInvertible1x1Conv",
    ),
    "residual-image": image(
        lambda: T.residual_flow(FLAT, HIDDEN).eval(), "ResidualFlow", event_shape=FLAT
    ),
    # --- shapes and preparation ---
    "squeeze": image(lambda: T.squeeze(2), "squeeze", "Squeeze", event_shape=(1, 2, 4)),
    "squeeze-3": image(lambda: T.Squeeze(3), "Squeeze", event_shape=(1, 3, 3)),
    "unsqueeze": image(lambda: T.unsqueeze(2), "unsqueeze", event_shape=(4, 1, 2)),
    "logit-preprocess": image(lambda: T.LogitPreprocess(), "LogitPreprocess", event_shape=FLAT),
    "logit-preprocess-vector": Entry(
        lambda _: T.LogitPreprocess(1e-3, event_dim=1).inv, ["LogitPreprocess"], event_shape=(3,)
    ),
    "standardize": image(_standardize, "Standardize"),
    "standardize-vector": Entry(
        lambda _: T.Standardize.from_data(torch.randn(9, 3) * 2 + 1),
        ["Standardize"],
        event_shape=(3,),
    ),
    "multiscale": Entry(
        lambda _: _multiscale("channel"), ["multiscale", "MultiScale"], event_shape=(16,)
    ),
    "multiscale-mask": Entry(
        lambda _: _multiscale([torch.tensor([[[0, 1], [0, 1]]]).bool().repeat(1, 2, 2)]),
        ["MultiScale"],
        event_shape=(16,),
    ),
    "glow-step": image(_glow_step, "ComposeFlow", event_shape=FLAT),
}
