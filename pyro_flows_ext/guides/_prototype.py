"""What a guide keeps of the run of its model that it was set up on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..distributions.tensors import map_tensors
from ..programs import support_of


def slim(sites: list[tuple[str, Any]]) -> Trace:
    """A trace of these sites with their supports in place of their distributions: the part of a run that a file can hold."""
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
    """Event shape and plate sizes, in the plates of the prototype (others, such as particles, may be around)."""
    names = {frame.name for frame in prototype["cond_indep_stack"]}
    plates = {f.name: f.size for f in site["cond_indep_stack"] if f.name in names}
    return tuple(site["fn"].event_shape), tuple(sorted(plates.items()))
