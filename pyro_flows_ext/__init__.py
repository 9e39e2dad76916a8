"""Normalizing flows for Pyro: transforms, guides, bounds and densities."""

__version__ = "0.1.0"
