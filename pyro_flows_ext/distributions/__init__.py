"""Densities: modules that are Pyro distributions, and test energies and data on the plane."""

from .base import Density as Density
from .base import check_guide_site as check_guide_site
from .circle import UniformAngles as UniformAngles
from .dequantize import Dequantized as Dequantized
from .energies import ENERGIES as ENERGIES
from .energies import Energy as Energy
from .flow import FlowDistribution as FlowDistribution
from .indexed import ContinuouslyIndexedFlow as ContinuouslyIndexedFlow
from .latent_prior import FlowVAE as FlowVAE
from .multiscale import MultiScaleFlow as MultiScaleFlow
from .ordered import NestedDropoutFlow as NestedDropoutFlow
from .toy import TOYS as TOYS
from .toy import Toy as Toy
from .transformed import TransformedDensity as TransformedDensity
