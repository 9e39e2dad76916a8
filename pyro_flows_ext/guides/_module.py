"""What flow guides share as modules: copies, files, and names in Pyro's parameter store."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import Tensor
from typing_extensions import Self

from ..transforms.base import forget_param_store


class PortableGuide(AutoGuide):
    """A guide that copies and pickles, and knows its parameters in the store from those of another guide.

    Pyro's own guides lose the model when a copy is taken. Here the original keeps it, a copy has it too, and a guide in
    a file goes without: the model and what is named in `_until_set_up` may be local functions, and a guide with
    parameters needs neither.
    """

    _until_set_up: ClassVar[tuple[str, ...]] = ("_flow_factory",)

    # The model as it was given (`model` is that with `init_loc_fn`), and the arguments of the last call where a guide needs them.
    _program: tuple[Any] = (None,)
    _arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent, elementwise, from 10,000 draws; shapes as in `quantiles`, less the first."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def _check_param_store(self) -> None:
        """The store must not hold another object's parameters under our names: they would be trained, not ours."""
        if pyro.settings.get("module_local_params"):
            return
        held = dict(pyro.get_param_store().named_parameters())
        for child, module in self._modules.items():
            prefix = f"{self._pyro_name}.{child}"
            for name, parameter in module.named_parameters():  # type: ignore[union-attr]
                # The one for a plain module, the other for a PyroModule.
                for key in (param_with_module_name(prefix, name), f"{prefix}.{name}"):
                    if held.get(key, parameter) is not parameter:
                        raise ValueError(
                            f"the parameter store already holds {self._pyro_name!r} parameters of another guide, and "
                            "would train those in place of this one's: call pyro.clear_param_store() first, or keep "
                            "them apart with `with pyro.get_param_store().scope():`"
                        )

    def __getstate__(self) -> dict[str, Any]:
        return self._portable_state()

    def _portable_state(self) -> dict[str, Any]:
        forget_param_store(self)
        state = dict(self.__dict__)
        state.update(_model=(None,), _program=(None,), _arguments=None, master=None)
        if self.prototype_trace is not None:
            state.update(dict.fromkeys(self._until_set_up))
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self._portable_state(), memo))
        kept = {name: self.__dict__[name] for name in self._until_set_up}
        new.__dict__.update(
            _model=self._model, _program=self._program, _arguments=self._arguments, **kept
        )
        return new
