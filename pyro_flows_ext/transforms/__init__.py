"""Invertible transforms with parameters, as Pyro `TransformModule`s."""

from .affine import ElementwiseAffine, Whitening
from .base import FlowTransform, InverseFlow
from .compose import ComposeFlow
from .conditional import ConditionalFlow, ContextualFlow
from .planar import ConditionalPlanar, Planar, conditional_planar, planar
from .radial import ConditionalRadial, Radial, conditional_radial, radial
from .sylvester import (
    ConditionalHouseholderSylvester,
    ConditionalOrthogonalSylvester,
    ConditionalSylvester,
    ConditionalTriangularSylvester,
    HouseholderSylvester,
    OrthogonalSylvester,
    Sylvester,
    TriangularSylvester,
    conditional_sylvester,
    sylvester,
)

__all__ = [
    "ComposeFlow",
    "ConditionalFlow",
    "ConditionalHouseholderSylvester",
    "ConditionalOrthogonalSylvester",
    "ConditionalPlanar",
    "ConditionalRadial",
    "ConditionalSylvester",
    "ConditionalTriangularSylvester",
    "ContextualFlow",
    "ElementwiseAffine",
    "FlowTransform",
    "HouseholderSylvester",
    "InverseFlow",
    "OrthogonalSylvester",
    "Planar",
    "Radial",
    "Sylvester",
    "TriangularSylvester",
    "Whitening",
    "conditional_planar",
    "conditional_radial",
    "conditional_sylvester",
    "planar",
    "radial",
    "sylvester",
]
