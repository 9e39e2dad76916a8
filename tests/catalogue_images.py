"""The transforms of images, on images of a few pixels: a part of the catalogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from entries import CONTEXT_DIM, Entry
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


def _permuted_conv() -> T.Invertible1x1Conv:
    transform = T.Invertible1x1Conv(3, bias=True)
    transform.transform.permutation.copy_(torch.tensor([1, 2, 0]))
    return transform


def _channel_actnorm() -> T.Pixelwise:
    return T.Pixelwise(T.ActNorm(2, initialize_on_first_batch=True)).eval()


def _standardize() -> T.Standardize:
    return T.Standardize(torch.randn(2, 1, 1), torch.rand(2, 1, 1) + 0.5)


def _glow_step() -> T.ComposeFlow:
    return T.ComposeFlow(
        [
            T.Squeeze(2),
            T.Pixelwise(T.ActNorm(4)),
            T.Invertible1x1Conv(4, permute=False),
            T.affine_coupling((4, 1, 1), HIDDEN),
            T.Squeeze(2).inv,
        ]
    )


def _multiscale(factor_out, context_dim: int = 0) -> T.MultiScale:
    """Two levels over images of 4 x 4 pixels, of which the first may depend on a context."""
    levels = [
        T.Coupling((1, 4, 4), HIDDEN, mask="checkerboard", context_dim=context_dim),
        T.affine_coupling((2, 2, 2), HIDDEN),
    ]
    return T.MultiScale(levels, (1, 4, 4), factor_out)


IMAGES: dict[str, Entry] = {
    # --- coupling ---
    "image-additive-coupling": image(
        lambda: T.Coupling(SHAPE, HIDDEN, transformer=T.Additive()), "Coupling"
    ),
    "image-additive-coupling-checkerboard": image(
        lambda: T.Coupling(FLAT, HIDDEN, transformer=T.Additive(), mask="checkerboard"),
        "Coupling",
        event_shape=FLAT,
    ),
    "image-affine-coupling": image(
        lambda: T.affine_coupling(SHAPE, HIDDEN, mask="channel", flip=True), "Coupling"
    ),
    "image-affine-coupling-alternating": image(
        lambda: T.affine_coupling((3, 1, 2), HIDDEN, mask="alternating"),
        "Coupling",
        event_shape=(3, 1, 2),
    ),
    "image-affine-coupling-checkerboard": image(
        lambda: T.affine_coupling(FLAT, HIDDEN, mask="checkerboard", flip=True),
        "Coupling",
        event_shape=FLAT,
    ),
    "image-affine-coupling-mask": image(
        lambda: T.affine_coupling(SHAPE, HIDDEN, mask=MIXED), "Coupling"
    ),
    "image-spline-coupling": image(
        lambda: T.spline_coupling(SHAPE, HIDDEN, num_bins=3), "Coupling"
    ),
    "image-spline-coupling-checkerboard": image(
        lambda: T.spline_coupling(FLAT, HIDDEN, mask="checkerboard", num_bins=3),
        "Coupling",
        event_shape=FLAT,
    ),
    "image-spline-coupling-mask": image(
        lambda: T.spline_coupling(SHAPE, HIDDEN, mask=MIXED, num_bins=3), "Coupling"
    ),
    "context-image-affine-coupling": image(
        lambda: T.conditional_affine_coupling(SHAPE, CONTEXT_DIM, HIDDEN), "Coupling"
    ),
    "context-image-affine-coupling-checkerboard": image(
        lambda: T.Coupling(SHAPE, HIDDEN, context_dim=CONTEXT_DIM, mask="checkerboard"), "Coupling"
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
    "invertible-1x1-conv": image(_permuted_conv, "Invertible1x1Conv", event_shape=(3, 2, 1)),
    "context-pixelwise": image(
        lambda: T.Pixelwise(T.conditional_planar(2, CONTEXT_DIM, HIDDEN)), "Pixelwise"
    ),
    "context-pixelwise-coupling": image(
        lambda: T.Pixelwise(T.Coupling(2, HIDDEN, context_dim=CONTEXT_DIM)), "Pixelwise"
    ),
    "context-invertible-1x1-conv": image(
        lambda: T.Invertible1x1Conv(2, bias=True, context_dim=CONTEXT_DIM, hidden_dims=HIDDEN),
        "Invertible1x1Conv",
    ),
    "residual-image": image(
        lambda: T.ResidualFlow(FLAT, HIDDEN).eval(), "ResidualFlow", event_shape=FLAT
    ),
    # --- shapes and preparation ---
    "squeeze": image(lambda: T.Squeeze(2), "Squeeze", event_shape=(1, 2, 4)),
    "squeeze-3": image(lambda: T.Squeeze(3), "Squeeze", event_shape=(1, 3, 3)),
    "unsqueeze": image(lambda: T.Squeeze(2).inv, "InverseFlow", event_shape=(4, 1, 2)),
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
    "multiscale": Entry(lambda _: _multiscale("channel"), ["MultiScale"], event_shape=(16,)),
    "multiscale-mask": Entry(
        lambda _: _multiscale([torch.tensor([[[0, 1], [0, 1]]]).bool().repeat(1, 2, 2)]),
        ["MultiScale"],
        event_shape=(16,),
    ),
    "context-multiscale": Entry(
        lambda _: _multiscale("channel", context_dim=CONTEXT_DIM),
        ["MultiScale"],
        event_shape=(16,),
    ),
    "glow-step": image(_glow_step, "ComposeFlow", event_shape=FLAT),
}
