"""Inductor, which makes one function of a graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def options_for(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Draws by torch's own generators, in the order of the program: the same seeds give what the handlers give."""
    options: dict[str, Any] = {"fallback_random": True}
    if any(t.device.type == "cuda" for t in tensors):
        options["triton.cudagraphs"] = True
    elif shutil.which("g++") or shutil.which("clang++"):
        options["cpp_wrapper"] = True
    return options


def decompositions(options: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Of the operations that it has none of its own for."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(options):
        return dict(select_decomp_table())  # other ones for other kinds of draws


def compile_graph(
    graph: GraphModule, example: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """The function of a graph, of tensors without gradients.

    Goes past AOTAutograd where that has nothing to do: its wrappers cost a tenth of the step of a small model.
    """
    if "cpp_wrapper" in options and writes_last(graph):
        return _compile_functional(graph, options)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, example, config_patches=options)  # type: ignore[return-value, arg-type]


def writes_last(graph: GraphModule) -> bool:
    """Whether a graph writes nothing but results into its inputs, after all else."""
    for module in graph.modules():
        is_over = False
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            if module is graph and _is_result(node):
                is_over = True
            elif is_over or node.target._schema.is_mutable:
                return False
    return True


def _is_result(node: Node) -> bool:
    target = node.args[0] if node.target is aten.copy_.default else None
    return isinstance(target, Node) and target.op == "placeholder"


def _compile_functional(graph: GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    written = [i for i, node in enumerate(inputs) if any(map(_is_result, node.users))]
    fakes = [node.meta["val"] for node in inputs]
    mode = fakes[0].fake_mode
    with config.patch(options), V.set_fake_mode(mode), tracing(TracingContext(mode)):
        joint_graph_passes(graph)
        compiled: Any = compile_fx_inner(graph, fakes, cpp_wrapper=True, is_inference=True)
    call = compiled.current_callable

    def run(*tensors: Tensor) -> Any:
        result = call(list(tensors))
        increment_version([tensors[i] for i in written])
        return result

    return run
