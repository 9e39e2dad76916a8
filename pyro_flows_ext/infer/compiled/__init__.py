"""Stochastic variational inference at compiled speed."""

from .svi import CompiledSVI

__all__ = ["CompiledSVI"]
