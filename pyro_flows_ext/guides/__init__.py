"""Flow guides: Pyro AutoGuides whose density is a normalizing flow."""

from .base import AutoFlow
from .flows import AutoPlanar, AutoRadial, AutoSylvester

__all__ = ["AutoFlow", "AutoPlanar", "AutoRadial", "AutoSylvester"]
