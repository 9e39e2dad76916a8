"""Every transform of the package, once in each form: what the tests of the contract run over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from catalogue_images import IMAGES
from entries import CONTEXT_DIM, Entry, conditional
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
    transform = T.lu_linear(dim, permute=True)
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


def _estimated_residual(dim: int) -> T.ResidualFlow:
    """In training mode, with noise that makes the estimate exact: one probe a coordinate, and all terms that count."""
    transform = T.residual_flow(dim, _HIDDEN, lipschitz=0.2)
    return transform.with_noise(T.LogDetNoise(dim**0.5 * torch.eye(dim).double(), (1.0,) * 12))


def _presets() -> dict[str, Entry]:
    """Two steps of every preset, plain and conditional."""
    entries = {}
    for name in ("nice", "realnvp", "glow_vector", "nsf", "maf", "iaf", "residual"):
        preset = getattr(T, name)

        def make(dim: int, preset: Callable = preset, **options: int) -> nn.Module:
            # The log-det of a residual flow is exact in eval mode.
            return preset(dim, num_layers=2, hidden_dims=_HIDDEN, **options).eval()

        # Condition numbers of layers multiply: what is .7 to one of them is less to a stack.
        entries[f"preset-{name}"] = Entry(make, [name], scale=0.3)
        entries[f"preset-{name}-conditional"] = conditional(
            partial(make, context_dim=CONTEXT_DIM), name, scale=0.3
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
    "elementwise-affine": Entry(T.elementwise_affine, ["elementwise_affine", "ElementwiseAffine"]),
    "sinh-arcsinh": Entry(T.sinh_arcsinh, ["sinh_arcsinh", "SinhArcsinh"]),
    "whitening": Entry(_whitening, ["Whitening"]),
    "compose": Entry(_compose, ["ComposeFlow"]),
    # --- the inverse orientation ---
    "planar-inverse": Entry(lambda D: T.planar(D).inv, ["InverseFlow"]),
    "sylvester-inverse": Entry(lambda D: T.sylvester(D).inv, ["InverseFlow"]),
    "compose-inverse": Entry(lambda D: _compose(D).inv, ["InverseFlow"]),
    # --- conditional ---
    "conditional-planar": conditional(
        lambda D: T.conditional_planar(D, CONTEXT_DIM, _HIDDEN, num_layers=2),
        "conditional_planar",
        "ConditionalPlanar",
    ),
    "conditional-planar-inverse": conditional(
        lambda D: T.conditional_planar(D, CONTEXT_DIM, _HIDDEN).inv, "ConditionalPlanar"
    ),
    "conditional-radial": conditional(
        lambda D: T.conditional_radial(D, CONTEXT_DIM, _HIDDEN, num_layers=2),
        "conditional_radial",
        "ConditionalRadial",
    ),
    "conditional-sylvester-orthogonal": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN),
        "conditional_sylvester",
        "ConditionalOrthogonalSylvester",
    ),
    "conditional-sylvester-householder": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN, kind="householder"),
        "ConditionalHouseholderSylvester",
    ),
    "conditional-sylvester-triangular": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN, kind="triangular"),
        "ConditionalTriangularSylvester",
    ),
    "conditional-sylvester-low-rank": conditional(
        lambda D: T.ConditionalOrthogonalSylvester(D, CONTEXT_DIM, _HIDDEN, rank=D - 1),
        "ConditionalOrthogonalSylvester",
    ),
    "conditional-sinh-arcsinh": conditional(
        lambda D: T.conditional_sinh_arcsinh(D, CONTEXT_DIM, _HIDDEN),
        "conditional_sinh_arcsinh",
        "ConditionalSinhArcsinh",
    ),
    "conditional-flow": conditional(
        lambda D: T.ConditionalFlow(T.ElementwiseAffine(D), CONTEXT_DIM, _HIDDEN),
        "ConditionalFlow",
    ),
    # --- linear and normalisation layers ---
    "lu-linear": Entry(T.lu_linear, ["lu_linear", "LULinear"]),
    "lu-linear-permuted": Entry(_permuted_lu, ["LULinear"]),
    "lu-linear-1d": Entry(lambda D: T.lu_linear(D, bias=False), ["LULinear"], dim=1),
    "qr-linear": Entry(T.qr_linear, ["qr_linear", "QRLinear"]),
    "qr-linear-odd": Entry(
        lambda D: T.qr_linear(D, num_reflections=3, bias=False), ["QRLinear"], dim=4
    ),
    "householder-linear": Entry(T.householder_linear, ["householder_linear", "HouseholderLinear"]),
    "householder-linear-odd": Entry(
        lambda D: T.householder_linear(D, num_reflections=1), ["HouseholderLinear"]
    ),
    "permute": Entry(lambda D: T.Permute(torch.arange(D).roll(1)), ["Permute"]),
    "permute-reverse": Entry(T.permute, ["permute"]),
    "actnorm": Entry(T.actnorm, ["actnorm", "ActNorm"]),
    "actnorm-first-batch": Entry(
        lambda D: T.actnorm(D, initialize_on_first_batch=True).eval(), ["ActNorm"]
    ),
    "batchnorm": Entry(_batchnorm, ["batchnorm", "BatchNorm"]),
    "batchnorm-inverse": Entry(lambda D: _batchnorm(D).inv.eval(), ["BatchNorm"]),
    "conditional-elementwise-affine": conditional(
        lambda D: T.conditional_elementwise_affine(D, CONTEXT_DIM, _HIDDEN),
        "conditional_elementwise_affine",
        "ConditionalElementwiseAffine",
    ),
    "conditional-lu-linear": conditional(
        lambda D: T.conditional_lu_linear(D, CONTEXT_DIM, _HIDDEN, permute=True),
        "conditional_lu_linear",
        "ConditionalLULinear",
    ),
    "conditional-qr-linear": conditional(
        lambda D: T.conditional_qr_linear(D, CONTEXT_DIM, _HIDDEN),
        "conditional_qr_linear",
        "ConditionalQRLinear",
    ),
    "conditional-householder-linear": conditional(
        lambda D: T.conditional_householder_linear(D, CONTEXT_DIM, _HIDDEN),
        "conditional_householder_linear",
        "ConditionalHouseholderLinear",
    ),
    # --- autoregressive ---
    "affine-autoregressive": Entry(
        lambda D: T.affine_autoregressive(D, (5, 5)),
        ["affine_autoregressive", "AffineAutoregressive", "Autoregressive"],
    ),
    "affine-autoregressive-1d": Entry(T.affine_autoregressive, ["AffineAutoregressive"], dim=1),
    "affine-autoregressive-inverse": Entry(
        lambda D: T.affine_autoregressive(D, order=list(range(D))[::-1]).inv,
        ["AffineAutoregressive"],
    ),
    "spline-autoregressive": Entry(
        lambda D: T.spline_autoregressive(D, (5, 5), num_bins=4),
        ["spline_autoregressive", "SplineAutoregressive"],
    ),
    "spline-autoregressive-inverse": Entry(
        lambda D: T.spline_autoregressive(D, (6,), num_bins=3).inv, ["SplineAutoregressive"]
    ),
    "conditional-affine-autoregressive": conditional(
        lambda D: T.conditional_affine_autoregressive(D, CONTEXT_DIM, (5, 5)),
        "conditional_affine_autoregressive",
        "ConditionalAffineAutoregressive",
    ),
    "conditional-affine-autoregressive-1d": conditional(
        lambda D: T.conditional_affine_autoregressive(D, CONTEXT_DIM, _HIDDEN),
        "ConditionalAffineAutoregressive",
        dim=1,
    ),
    "conditional-spline-autoregressive": conditional(
        lambda D: T.conditional_spline_autoregressive(D, CONTEXT_DIM, _HIDDEN, num_bins=3),
        "conditional_spline_autoregressive",
        "ConditionalSplineAutoregressive",
    ),
    # --- coupling ---
    "additive-coupling": Entry(
        lambda D: T.additive_coupling(D, _HIDDEN),
        ["additive_coupling", "AdditiveCoupling", "Coupling"],
    ),
    "affine-coupling": Entry(
        lambda D: T.affine_coupling(D, _HIDDEN), ["affine_coupling", "AffineCoupling"]
    ),
    "spline-coupling": Entry(
        lambda D: T.spline_coupling(D, _HIDDEN), ["spline_coupling", "SplineCoupling"]
    ),
    "spline-coupling-alternating": Entry(
        lambda D: T.spline_coupling(D, _HIDDEN, mask="alternating", flip=True), ["SplineCoupling"]
    ),
    "conditional-additive-coupling": conditional(
        lambda D: T.conditional_additive_coupling(D, CONTEXT_DIM, _HIDDEN),
        "conditional_additive_coupling",
        "ConditionalAdditiveCoupling",
    ),
    "conditional-affine-coupling": conditional(
        lambda D: T.conditional_affine_coupling(D, CONTEXT_DIM, _HIDDEN),
        "conditional_affine_coupling",
        "ConditionalAffineCoupling",
    ),
    "conditional-spline-coupling": conditional(
        lambda D: T.conditional_spline_coupling(D, CONTEXT_DIM, _HIDDEN, mask="alternating"),
        "conditional_spline_coupling",
        "ConditionalSplineCoupling",
    ),
    # --- leapfrog steps on a position and its momentum, D / 2 numbers each ---
    "leapfrog": Entry(
        lambda D: T.leapfrog(_Well(D // 2), D // 2, 3), ["leapfrog", "Leapfrog"], dim=4
    ),
    "leapfrog-tempered": Entry(
        lambda D: T.leapfrog(_Well(D // 2), D // 2, 2, tempering="quadratic"), ["Leapfrog"], dim=4
    ),
    "leapfrog-tempered-free": Entry(
        lambda D: T.leapfrog(_Well(D // 2), D // 2, 2, tempering="free"), ["Leapfrog"], dim=4
    ),
    "leapfrog-inverse": Entry(
        lambda D: T.leapfrog(_Well(D // 2), D // 2, 1).inv, ["Leapfrog"], dim=2
    ),
    "conditional-leapfrog": conditional(
        lambda D: T.conditional_leapfrog(_Well(D // 2, CONTEXT_DIM), D // 2, CONTEXT_DIM, 2),
        "conditional_leapfrog",
        "ConditionalLeapfrog",
        dim=4,
    ),
    # --- residual ---
    "residual": Entry(
        lambda D: T.residual_flow(D, _HIDDEN).eval(), ["residual_flow", "ResidualFlow"]
    ),
    "residual-1d": Entry(lambda D: T.residual_flow(D).eval(), ["ResidualFlow"], dim=1),
    "residual-inverse": Entry(lambda D: T.residual_flow(D, (5, 5)).eval().inv, ["ResidualFlow"]),
    "residual-estimated": Entry(_estimated_residual, ["ResidualFlow"]),
    "conditional-residual": conditional(
        lambda D: T.conditional_residual_flow(D, CONTEXT_DIM, _HIDDEN).eval(),
        "conditional_residual_flow",
        "ConditionalResidualFlow",
    ),
    # --- composed and indexed ---
    "conditional-compose": conditional(
        lambda D: T.ConditionalComposeFlow(
            [
                T.conditional_planar(D, CONTEXT_DIM, _HIDDEN),
                T.elementwise_affine(D),
                T.conditional_affine_coupling(D, CONTEXT_DIM, _HIDDEN).inv,
            ]
        ),
        "ConditionalComposeFlow",
    ),
    "indexed-planar": conditional(
        lambda D: T.indexed(T.planar(D), CONTEXT_DIM, _HIDDEN), "indexed", "IndexedTransform"
    ),
    "indexed-affine-coupling": conditional(
        lambda D: T.indexed(T.affine_coupling(D, _HIDDEN), CONTEXT_DIM, _HIDDEN),
        "IndexedTransform",
    ),
    "indexed-spline-autoregressive": conditional(
        lambda D: T.indexed(T.spline_autoregressive(D, (4,), num_bins=3), CONTEXT_DIM),
        "IndexedTransform",
    ),
    # --- presets ---
    **_presets(),
}
