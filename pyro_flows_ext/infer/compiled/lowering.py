"""Graphs in the operations that Inductor compiles well, and their compilation by Inductor."""

from __future__ import annotations

import math
import operator
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# torch fills tensors of fewer elements one by one, and larger ones by another algorithm.
MOST_ONE_BY_ONE = 15
# A library call costs as much as this number of multiplications.
MOST_MULTIPLICATIONS = 1024


# --- simpler operations ---


def simplify(graph: GraphModule) -> None:
    """Replaces constants and in-place operations by functions, which loops require, and merges small draws.

    The merged draws have the same values, from the same generator.
    """
    for node in graph.graph.nodes:
        with graph.graph.inserting_before(node):
            if node.target is aten.lift_fresh_copy.default and node.args[0].op == "get_attr":
                value = getattr(graph, node.args[0].target)
                options = {"dtype": value.dtype, "device": value.device}
                new = graph.graph.call_function(aten.full.default, ([], value.item()), options)
            elif _is_standard_draw(node):
                empty = node.args[0]
                new = graph.graph.call_function(aten.randn.default, empty.args[:1], empty.kwargs)
            elif node.target is aten.masked_fill_.Scalar and _is_private(node.args[0]):
                new = graph.graph.call_function(aten.masked_fill.Scalar, node.args)
                new.meta = node.meta
            else:
                continue
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    for draws in _small_draws(graph):
        _merge(graph, draws)


def _is_standard_draw(node: Node) -> bool:
    """Whether a node fills a new tensor with standard normal draws."""
    if node.target is not aten.normal_.default or len(node.args) > 1 or node.kwargs:
        return False
    empty = node.args[0]
    return (
        isinstance(empty, Node)
        and empty.target is aten.empty.memory_format
        and "memory_format" not in empty.kwargs
        and _is_private(empty)
    )


def _is_private(node: Node) -> bool:
    """Whether only one operation reads the memory of the result of a node."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.users) > 1:
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def _small_draws(graph: GraphModule) -> list[list[Node]]:
    """Groups of consecutive draws of one dtype with at most `MOST_ONE_BY_ONE` elements together."""
    groups: list[list[Node]] = [[]]
    for node in filter(is_draw, graph.graph.nodes):
        if not _is_small(node):
            groups.append([])
            continue
        group = [*groups[-1], node]
        is_one_type = len({draw.kwargs.get("dtype") for draw in group}) == 1
        if is_one_type and sum(map(_numel, group)) <= MOST_ONE_BY_ONE:
            groups[-1] = group
        else:
            groups.append([node])
    return [group for group in groups if len(group) > 1]


def _is_small(node: Node) -> bool:
    is_on_cpu = torch.device(str(node.kwargs.get("device") or "cpu")).type == "cpu"
    return node.target is aten.randn.default and is_on_cpu and _numel(node) <= MOST_ONE_BY_ONE


def _numel(draw: Node) -> int:
    return math.prod(draw.args[0])  # type: ignore[arg-type]


def _merge(graph: GraphModule, draws: Sequence[Node]) -> None:
    """Replaces several draws by one of the same numbers, which torch draws one after the other."""
    sizes = list(map(_numel, draws))
    with graph.graph.inserting_before(draws[0]):
        merged = graph.graph.call_function(aten.randn.default, ([sum(sizes)],), draws[0].kwargs)
        parts = graph.graph.call_function(aten.split_with_sizes.default, (merged, sizes))
        for i, draw in enumerate(draws):
            part = graph.graph.call_function(operator.getitem, (parts, i))
            shaped = graph.graph.call_function(aten.view.default, (part, draw.args[0]))
            draw.replace_all_uses_with(shaped)
    for draw in draws:
        graph.graph.erase_node(draw)


def is_draw(node: Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


# --- small matrix products ---


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k a_ik b_kj; `NotImplemented`, which keeps the library call, for large products."""
    (m, k), n = a.shape, b.shape[1]
    if k == 1:
        return a * b
    if m * k * n > MOST_MULTIPLICATIONS:
        return NotImplemented
    return (a.unsqueeze(-1) * b).sum(1)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """bias + a b."""
    product = mm(a, b) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else bias + product


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k a_nik b_nkj for every n."""
    if a.shape[-1] == 1:
        return a * b
    if a.numel() * b.shape[-1] > MOST_MULTIPLICATIONS:
        return NotImplemented
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


# A table of decompositions for `make_fx`. Inductor fuses sums of products with the operations around them.
SMALL_PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: mm,
    aten.addmm.default: addmm,
    aten.bmm.default: bmm,
}


# --- Inductor ---


def options_for(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Options of Inductor. Draws come from torch's generators in the order of the program, as in eager steps."""
    options: dict[str, Any] = {"fallback_random": True}
    if any(t.device.type == "cuda" for t in tensors):
        options["triton.cudagraphs"] = True
    elif shutil.which("g++") or shutil.which("clang++"):
        options["cpp_wrapper"] = True
    return options


def decompositions(options: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Inductor's table of decompositions."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(options):
        return dict(select_decomp_table())  # depends on `fallback_random`


def compile_graph(
    graph: GraphModule, example: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """The compiled function of a graph whose inputs require no gradients.

    AOTAutograd is left out where the graph needs no functionalization: its wrappers cost a tenth of a small step.
    """
    if "cpp_wrapper" in options and writes_last(graph):
        return _compile_functional(graph, options)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, example, config_patches=options)  # type: ignore[return-value]


def writes_last(graph: GraphModule) -> bool:
    """Whether the only writes of a graph are those of results into its inputs, after all other operations."""
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
