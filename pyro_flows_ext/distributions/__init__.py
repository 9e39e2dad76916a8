"""Densities and test energies."""

from .energies import ENERGIES as ENERGIES
from .energies import Energy as Energy
