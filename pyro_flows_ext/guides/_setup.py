"""The state of a guide: initial values of the latents, the prototype trace, copies, files, parameter names in the store."""

from __future__ import annotations

import copy
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide, initialization
from pyro.nn.module import _PyroModuleMeta
from pyro.params.param_store import param_with_module_name
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import transform_to
from typing_extensions import Self

from ..distributions.tensors import map_tensors
from ..programs import SPHERICAL, bijection, support_of, tensors_of
from ..transforms.base import forget_param_store


class _GuideMeta(_PyroModuleMeta, ABCMeta):
    """The metaclass of Pyro's modules, with abstract methods."""


class PortableGuide(AutoGuide, metaclass=_GuideMeta):
    """A guide that can be copied and pickled, and that refuses the parameters of another guide in the parameter store.

    Pyro's own guides lose the model when they are copied. Here a copy shares the model with the original, and a pickle
    contains neither the model nor the attributes named in `_until_set_up`: these may be local functions.
    """

    prototype_trace: Any
    _until_set_up: ClassVar[tuple[str, ...]] = ("_flow_factory",)

    # `_program` holds the model as it was given, in a tuple, since a module would become a part of the guide; `self.model` is
    # the model under `init_loc_fn`. `_arguments`: those of the last call, for guides that need them.
    _program: tuple[Any] = (None,)
    _arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on these arguments to find its latents, and creates the parameters."""
        self._setup_prototype(*args, **kwargs)

    def _require_setup(self) -> None:
        if self.prototype_trace is None:
            raise ValueError("the guide has no parameters yet: call guide.setup(*args) first")

    @abstractmethod
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws, without gradient: site -> `(num_samples, *)`."""

    @abstractmethod
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, elementwise: site -> `(len(quantiles), *)`."""

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each latent, elementwise, from 10,000 draws; shapes as in `quantiles`, less the first."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def _check_param_store(self) -> None:
        """Raises `ValueError` if the store holds another object's parameters under this guide's names.

        Pyro would train those in place of the guide's own.
        """
        if pyro.settings.get("module_local_params"):
            return
        held = dict(pyro.get_param_store().named_parameters())
        for child, module in self.named_children():
            prefix = f"{self._pyro_name}.{child}"
            for name, parameter in module.named_parameters():
                # The one for a plain module, the other for a PyroModule.
                for key in (param_with_module_name(prefix, name), f"{prefix}.{name}"):
                    if held.get(key, parameter) is not parameter:
                        raise ValueError(
                            f"the parameter store already holds parameters under the name {self._pyro_name!r}, of "
                            "another guide or from a file, which would be trained in place of this guide's. To restore "
                            "a guide, call its setup(*args) in an empty store and load_state_dict. To train a new one, "
                            "enter `with pyro.get_param_store().scope():`, which keeps what the store holds, or call "
                            "pyro.clear_param_store(), which deletes it"
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


def check_init_scale(init_scale: float) -> float:
    """Returns a positive, finite scale. Raises `ValueError` for any other."""
    if not 0 < init_scale < float("inf"):
        raise ValueError(f"init_scale: expected a positive number, got {init_scale!r}")
    return init_scale


# --- initial values ---


def init_to_median(site: Mapping[str, Any]) -> Tensor:
    """The prior's median, by Pyro's function of this name.

    For a prior that cannot be sampled: the image of zero in its support, or any direction on a sphere.
    """
    fn, value = site["fn"], None
    with suppress(NotImplementedError):
        value = initialization.init_to_median(site)
    try:
        support = support_of(site["name"], fn)
    except ValueError:  # a reparametriser may still remove the latent
        if value is not None:
            return value
        if isinstance(fn, SPHERICAL):
            return transform_to(fn.support)(_zeros(fn, fn.shape()) + 1)
        raise
    if value is None or not bool(support.check(value).all()):
        constrain = bijection(support)
        value = constrain(_zeros(fn, constrain.inverse_shape(fn.shape())))
    return value


def _zeros(fn: Any, shape: Any) -> Tensor:
    """Zeros of the dtype and device of a distribution's parameters."""
    like = next((t for t in tensors_of(fn) if t.is_floating_point()), torch.zeros(()))
    return like.new_zeros(shape)


# --- the prototype: what a guide keeps of the run of its model at setup ---


def slim(sites: list[tuple[str, Any]]) -> Trace:
    """A trace of these sites with their supports in place of their distributions, which can be pickled."""
    slim = Trace()
    for name, site in sites:
        fn = site["fn"]
        support = map_tensors(support_of(name, fn), lambda t: t.detach().clone())
        node = {**site, "args": (), "kwargs": {}, "infer": {}}
        node["value"] = site["value"].detach().clone()
        node["fn"] = dist.ImproperUniform(support, fn.batch_shape, fn.event_shape)
        slim.add_node(name, **node)
    return slim


def argument_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The shapes of all tensors among the arguments, numbers and names, and the types of everything else."""
    return tuple(map(_outline, _leaves((args, sorted(kwargs.items())))))


def same_objects(old: Any, new: Any) -> bool:
    """Whether two trees of arguments have the same objects for leaves."""
    a, b = _leaves(old), _leaves(new)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _leaves(tree: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves  # private, so not imported with the module

    return tree_leaves(tree)


def _outline(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape)
    return x if isinstance(x, (bool, int, str)) else type(x).__name__


def extent(site: Mapping[str, Any], prototype: Mapping[str, Any]) -> tuple[Any, ...]:
    """Event shape and plate sizes, in the plates of the prototype; other plates, such as one of particles, are left out."""
    names = {frame.name for frame in prototype["cond_indep_stack"]}
    plates = {f.name: f.size for f in site["cond_indep_stack"] if f.name in names}
    return tuple(site["fn"].event_shape), tuple(sorted(plates.items()))
