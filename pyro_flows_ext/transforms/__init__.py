"""Invertible transforms with parameters, as Pyro `TransformModule`s."""

from .affine import ElementwiseAffine, Whitening
from .autoregressive import Autoregressive
from .base import FlowTransform, InverseFlow
from .compose import ComposeFlow
from .coupling import Coupling
from .hamiltonian import Leapfrog
from .helpers import (
    affine_autoregressive,
    affine_coupling,
    batchnorm,
    conditional_affine_autoregressive,
    conditional_affine_coupling,
    conditional_planar,
    conditional_radial,
    conditional_spline_autoregressive,
    permute,
    planar,
    radial,
    spline_autoregressive,
    spline_coupling,
)
from .image import LogitPreprocess, Squeeze, Standardize
from .indexed import IndexedTransform
from .linear import HouseholderLinear, LULinear, QRLinear
from .multiscale import MultiScale
from .normalization import ActNorm, BatchNorm
from .pad import Pad
from .permute import Permute
from .pixelwise import Invertible1x1Conv, Pixelwise
from .planar import Planar
from .presets import circular_nsf, glow_vector, iaf, maf, nice, nsf, realnvp, residual
from .radial import Radial
from .residual import LogDetNoise, ResidualFlow
from .sinh_arcsinh import SinhArcsinh
from .sylvester import (
    HouseholderSylvester,
    OrthogonalSylvester,
    Sylvester,
    TriangularSylvester,
    sylvester,
)
from .transformers import Additive, Affine, CircularSpline, RationalQuadratic, Transformer

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "BatchNorm",
    "CircularSpline",
    "ComposeFlow",
    "Coupling",
    "ElementwiseAffine",
    "FlowTransform",
    "HouseholderLinear",
    "HouseholderSylvester",
    "IndexedTransform",
    "InverseFlow",
    "Invertible1x1Conv",
    "LULinear",
    "Leapfrog",
    "LogDetNoise",
    "LogitPreprocess",
    "MultiScale",
    "OrthogonalSylvester",
    "Pad",
    "Permute",
    "Pixelwise",
    "Planar",
    "QRLinear",
    "Radial",
    "RationalQuadratic",
    "ResidualFlow",
    "SinhArcsinh",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "Transformer",
    "TriangularSylvester",
    "Whitening",
    "affine_autoregressive",
    "affine_coupling",
    "batchnorm",
    "circular_nsf",
    "conditional_affine_autoregressive",
    "conditional_affine_coupling",
    "conditional_planar",
    "conditional_radial",
    "conditional_spline_autoregressive",
    "glow_vector",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "permute",
    "planar",
    "radial",
    "realnvp",
    "residual",
    "spline_autoregressive",
    "spline_coupling",
    "sylvester",
]
