"""Every transform of the package, once in each form: what the tests of the contract run over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from catalogue_images import IMAGES
from entries import CONTEXT_DIM, Entry
from torch import nn

import pyro_flows_ext.transforms as T


def _whitening(dim: int) -> T.Whitening:
    scale_tril = torch.randn(dim, dim).tril(-1) + torch.diag(torch.rand(dim) + 0.5)
    return T.Whitening(torch.randn(dim), scale_tril)


def _compose(dim: int) -> T.ComposeFlow:
    return T.ComposeFlow(
        [T.radial(dim), T.planar(dim).inv, T.ElementwiseAffine(dim), _whitening(dim)]
    )


def _permuted_lu(dim: int) -> T.LULinear:
    transform = T.LULinear(dim, permute=True)
    transform.permutation.copy_(torch.arange(dim).roll(1))  # not its own inverse, for dim > 2
    return transform


def _batchnorm(dim: int) -> T.BatchNorm:
    transform = T.batchnorm(dim).eval()  # batch statistics are no transform of a row
    transform.set_statistics(torch.randn(5, dim) * 2 + 1)
    return transform


class _Well(nn.Module):
    """A smooth potential with several minima, of z and of a context where it is given one; every parameter counts."""

    def __init__(self, dim: int, context_dim: int = 0):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(dim))
        self.mix = nn.Parameter(torch.randn(dim + context_dim, dim) / dim**0.5)

    def forward(self, z, context=None):
        inner = z if context is None else torch.cat([z, context], -1)
        return ((z - self.loc) ** 2).sum(-1) / 2 + (inner @ self.mix).cos().sum(-1)


_HIDDEN = (4,)
_CONTEXT = {"context_dim": CONTEXT_DIM, "hidden_dims": _HIDDEN}


class Wave(T.Transformer):
    """x + a sin(x + b): a user's elementwise map, whose inverse is a root."""

    num_params = 2

    def forward(self, x, theta):
        a, b = theta.unbind(-2)
        a = 0.5 * a.tanh()
        return x + a * (x + b).sin(), (a * (x + b).cos()).log1p()


def _estimated_residual(dim: int) -> T.ResidualFlow:
    """In training mode, with noise that makes the estimate exact: one probe a coordinate, and all terms that count."""
    transform = T.ResidualFlow(dim, _HIDDEN, lipschitz=0.2)
    return transform.with_noise(T.LogDetNoise(dim**0.5 * torch.eye(dim).double(), (1.0,) * 12))


def _presets() -> dict[str, Entry]:
    """Two steps of every preset, without and with a context."""
    entries = {}
    for name in ("nice", "realnvp", "glow_vector", "nsf", "circular_nsf", "maf", "iaf", "residual"):
        preset = getattr(T, name)

        def make(dim: int, preset: Callable = preset, **options: int) -> nn.Module:
            # The log-det of a residual flow is exact in eval mode.
            return preset(dim, num_layers=2, hidden_dims=_HIDDEN, **options).eval()

        # Condition numbers of layers multiply: what is .7 to one of them is less to a stack.
        entries[f"preset-{name}"] = Entry(make, [name], scale=0.3)
        entries[f"preset-{name}-context"] = Entry(
            partial(make, context_dim=CONTEXT_DIM), [name], scale=0.3
        )
    return entries


CATALOGUE: dict[str, Entry] = {
    **IMAGES,
    # --- plain ---
    "planar": Entry(T.planar, ["planar", "Planar"]),
    "planar-2": Entry(lambda D: T.planar(D, num_layers=2), ["Planar"]),
    "planar-1d": Entry(T.planar, ["Planar"], dim=1),
    "radial": Entry(T.radial, ["radial", "Radial"]),
    "radial-2": Entry(lambda D: T.radial(D, num_layers=2), ["Radial"]),
    "radial-1d": Entry(T.radial, ["Radial"], dim=1),
    "sylvester-orthogonal": Entry(T.sylvester, ["sylvester", "OrthogonalSylvester"]),
    "sylvester-householder": Entry(
        lambda D: T.sylvester(D, kind="householder", num_reflections=2), ["HouseholderSylvester"]
    ),
    "sylvester-triangular": Entry(
        lambda D: T.TriangularSylvester(D, flip=True), ["TriangularSylvester"]
    ),
    "sylvester-low-rank": Entry(lambda D: T.sylvester(D, rank=D - 1), ["OrthogonalSylvester"]),
    "sylvester-1d": Entry(T.sylvester, ["OrthogonalSylvester"], dim=1),
    "elementwise-affine": Entry(T.ElementwiseAffine, ["ElementwiseAffine"]),
    "sinh-arcsinh": Entry(T.SinhArcsinh, ["SinhArcsinh"]),
    "whitening": Entry(_whitening, ["Whitening"]),
    "compose": Entry(_compose, ["ComposeFlow"]),
    # --- the inverse orientation ---
    "planar-inverse": Entry(lambda D: T.planar(D).inv, ["InverseFlow"]),
    "sylvester-inverse": Entry(lambda D: T.sylvester(D).inv, ["InverseFlow"]),
    "compose-inverse": Entry(lambda D: _compose(D).inv, ["InverseFlow"]),
    # --- with a context, by a hyper-network ---
    "context-planar": Entry(
        lambda D: T.conditional_planar(D, CONTEXT_DIM, _HIDDEN, num_layers=2),
        ["conditional_planar", "Planar"],
    ),
    "context-planar-inverse": Entry(lambda D: T.Planar(D, **_CONTEXT).inv, ["InverseFlow"]),
    "context-radial": Entry(
        lambda D: T.conditional_radial(D, CONTEXT_DIM, _HIDDEN, num_layers=2),
        ["conditional_radial", "Radial"],
    ),
    "context-sylvester-orthogonal": Entry(
        lambda D: T.sylvester(D, **_CONTEXT), ["OrthogonalSylvester"]
    ),
    "context-sylvester-householder": Entry(
        lambda D: T.HouseholderSylvester(D, **_CONTEXT), ["HouseholderSylvester"]
    ),
    "context-sylvester-triangular": Entry(
        lambda D: T.sylvester(D, kind="triangular", **_CONTEXT), ["TriangularSylvester"]
    ),
    "context-sylvester-low-rank": Entry(
        lambda D: T.OrthogonalSylvester(D, rank=D - 1, **_CONTEXT), ["Sylvester"]
    ),
    "context-sinh-arcsinh": Entry(lambda D: T.SinhArcsinh(D, **_CONTEXT), ["SinhArcsinh"]),
    "context-elementwise-affine": Entry(
        lambda D: T.ElementwiseAffine(D, **_CONTEXT), ["ElementwiseAffine"]
    ),
    "context-lu-linear": Entry(lambda D: T.LULinear(D, permute=True, **_CONTEXT), ["LULinear"]),
    "context-qr-linear": Entry(lambda D: T.QRLinear(D, **_CONTEXT), ["QRLinear"]),
    "context-householder-linear": Entry(
        lambda D: T.HouseholderLinear(D, **_CONTEXT), ["HouseholderLinear"]
    ),
    # --- linear and normalisation layers ---
    "lu-linear": Entry(T.LULinear, ["LULinear"]),
    "lu-linear-permuted": Entry(_permuted_lu, ["LULinear"]),
    "lu-linear-1d": Entry(lambda D: T.LULinear(D, bias=False), ["LULinear"], dim=1),
    "qr-linear": Entry(T.QRLinear, ["QRLinear"]),
    "qr-linear-odd": Entry(
        lambda D: T.QRLinear(D, num_reflections=3, bias=False), ["QRLinear"], dim=4
    ),
    "householder-linear": Entry(T.HouseholderLinear, ["HouseholderLinear"]),
    "householder-linear-odd": Entry(
        lambda D: T.HouseholderLinear(D, num_reflections=1), ["HouseholderLinear"]
    ),
    "permute": Entry(lambda D: T.Permute(torch.arange(D).roll(1)), ["Permute"]),
    "permute-reverse": Entry(T.permute, ["permute"]),
    "actnorm": Entry(T.ActNorm, ["ActNorm"]),
    "actnorm-first-batch": Entry(
        lambda D: T.ActNorm(D, initialize_on_first_batch=True).eval(), ["ActNorm"]
    ),
    "batchnorm": Entry(_batchnorm, ["batchnorm", "BatchNorm"]),
    "batchnorm-inverse": Entry(lambda D: _batchnorm(D).inv.eval(), ["BatchNorm"]),
    # --- autoregressive ---
    "affine-autoregressive": Entry(
        lambda D: T.affine_autoregressive(D, (5, 5)),
        ["affine_autoregressive", "Autoregressive", "Affine"],
    ),
    "affine-autoregressive-1d": Entry(T.affine_autoregressive, ["Autoregressive"], dim=1),
    "affine-autoregressive-inverse": Entry(
        lambda D: T.affine_autoregressive(D, order=list(range(D))[::-1]).inv, ["Autoregressive"]
    ),
    "additive-autoregressive": Entry(
        lambda D: T.Autoregressive(D, (5, 5), transformer=T.Additive()), ["Additive"]
    ),
    "spline-autoregressive": Entry(
        lambda D: T.spline_autoregressive(D, (5, 5), num_bins=4),
        ["spline_autoregressive", "RationalQuadratic"],
    ),
    "spline-autoregressive-inverse": Entry(
        lambda D: T.spline_autoregressive(D, (6,), num_bins=3).inv, ["Autoregressive"]
    ),
    "wave-autoregressive": Entry(
        lambda D: T.Autoregressive(D, (5, 5), transformer=Wave()), ["Transformer"]
    ),
    "context-affine-autoregressive": Entry(
        lambda D: T.conditional_affine_autoregressive(D, CONTEXT_DIM, (5, 5)),
        ["conditional_affine_autoregressive"],
    ),
    "context-affine-autoregressive-1d": Entry(
        lambda D: T.Autoregressive(D, **_CONTEXT), ["Autoregressive"], dim=1
    ),
    "context-spline-autoregressive": Entry(
        lambda D: T.conditional_spline_autoregressive(D, CONTEXT_DIM, _HIDDEN, num_bins=3),
        ["conditional_spline_autoregressive"],
    ),
    # --- coupling ---
    "additive-coupling": Entry(
        lambda D: T.Coupling(D, _HIDDEN, transformer=T.Additive()), ["Coupling"]
    ),
    "affine-coupling": Entry(lambda D: T.affine_coupling(D, _HIDDEN), ["affine_coupling"]),
    "spline-coupling": Entry(lambda D: T.spline_coupling(D, _HIDDEN), ["spline_coupling"]),
    "spline-coupling-alternating": Entry(
        lambda D: T.spline_coupling(D, _HIDDEN, mask="alternating", flip=True), ["Coupling"]
    ),
    "circular-coupling": Entry(
        lambda D: T.Coupling(D, _HIDDEN, transformer=T.CircularSpline(4)), ["CircularSpline"]
    ),
    "circular-autoregressive-1d": Entry(
        lambda D: T.Autoregressive(D, transformer=T.CircularSpline(3)), ["CircularSpline"], dim=1
    ),
    "wave-coupling": Entry(lambda D: T.Coupling(D, _HIDDEN, transformer=Wave()), ["Coupling"]),
    "context-additive-coupling": Entry(
        lambda D: T.Coupling(D, transformer=T.Additive(), **_CONTEXT), ["Coupling"]
    ),
    "context-affine-coupling": Entry(
        lambda D: T.conditional_affine_coupling(D, CONTEXT_DIM, _HIDDEN),
        ["conditional_affine_coupling"],
    ),
    "context-spline-coupling": Entry(
        lambda D: T.spline_coupling(D, mask="alternating", **_CONTEXT), ["Coupling"]
    ),
    # --- leapfrog steps on a position and its momentum, D / 2 numbers each ---
    "leapfrog": Entry(lambda D: T.Leapfrog(_Well(D // 2), D // 2, 3), ["Leapfrog"], dim=4),
    "leapfrog-tempered": Entry(
        lambda D: T.Leapfrog(_Well(D // 2), D // 2, 2, tempering="quadratic"), ["Leapfrog"], dim=4
    ),
    "leapfrog-tempered-free": Entry(
        lambda D: T.Leapfrog(_Well(D // 2), D // 2, 2, tempering="free"), ["Leapfrog"], dim=4
    ),
    "leapfrog-inverse": Entry(
        lambda D: T.Leapfrog(_Well(D // 2), D // 2, 1).inv, ["Leapfrog"], dim=2
    ),
    "context-leapfrog": Entry(
        lambda D: T.Leapfrog(_Well(D // 2, CONTEXT_DIM), D // 2, 2, context_dim=CONTEXT_DIM),
        ["Leapfrog"],
        dim=4,
    ),
    # --- residual ---
    "residual": Entry(lambda D: T.ResidualFlow(D, _HIDDEN).eval(), ["ResidualFlow"]),
    "residual-1d": Entry(lambda D: T.ResidualFlow(D).eval(), ["ResidualFlow"], dim=1),
    "residual-inverse": Entry(lambda D: T.ResidualFlow(D, (5, 5)).eval().inv, ["ResidualFlow"]),
    "residual-estimated": Entry(_estimated_residual, ["ResidualFlow"]),
    "context-residual": Entry(lambda D: T.ResidualFlow(D, **_CONTEXT).eval(), ["ResidualFlow"]),
    # --- composed and indexed ---
    "context-compose": Entry(
        lambda D: T.ComposeFlow(
            [
                T.Planar(D, **_CONTEXT),
                T.ElementwiseAffine(D),
                T.affine_coupling(D, **_CONTEXT).inv,
            ]
        ),
        ["ComposeFlow"],
    ),
    "indexed-planar": Entry(
        lambda D: T.IndexedTransform(T.Planar(D), CONTEXT_DIM, _HIDDEN),
        ["IndexedTransform"],
        context_dim=CONTEXT_DIM,
    ),
    "indexed-affine-coupling": Entry(
        lambda D: T.IndexedTransform(T.affine_coupling(D, _HIDDEN), CONTEXT_DIM, _HIDDEN),
        ["IndexedTransform"],
        context_dim=CONTEXT_DIM,
    ),
    "indexed-spline-autoregressive": Entry(
        lambda D: T.IndexedTransform(T.spline_autoregressive(D, (4,), num_bins=3), CONTEXT_DIM),
        ["IndexedTransform"],
        context_dim=CONTEXT_DIM,
    ),
    # --- presets ---
    **_presets(),
}
