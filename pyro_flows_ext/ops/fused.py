"""Hand-written gradients in place of a chain of small operations, where a first derivative in eager mode is all that is asked.

Under `torch.compile`, `torch.func`, vmap, forward-mode derivatives and autocast the chain itself runs, and a derivative of
the gradient is that of the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .roots import may_branch_on

# Numbers in the largest tensor below which the calls to torch cost more than the passes over memory that fusing saves.
# Callers compare with it themselves, as `fused.MIN_NUMEL`, before they call `may_fuse`.
MIN_NUMEL = 8192


def may_fuse(*tensors: Tensor) -> bool:
    """Whether a custom gradient may replace the operations on these tensors: plain ones of one dtype, in eager mode."""
    first = tensors[0]
    if not may_branch_on(first) or not first.is_floating_point():
        return False
    dtype, is_wrapped = first.dtype, torch._C._functorch.is_functorch_wrapped_tensor
    for t in tensors:
        if t.dtype != dtype or type(t) not in (Tensor, torch.nn.Parameter) or is_wrapped(t):
            return False
        if forward_ad.unpack_dual(t).tangent is not None:
            return False
    return not torch.is_autocast_enabled(first.device.type)


def needs_graph(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these tensors now."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def may_write_gradient(*cotangents: Tensor | None) -> bool:
    """Whether a backward pass may compute in place: nothing differentiates it again, and no batch of it runs at once."""
    if torch.is_grad_enabled():
        return False
    # `is_grads_batched` of torch.autograd.grad wraps tensors in a way of its own.
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return all(c is None or (may_branch_on(c) and not is_batched(c)) for c in cotangents)


def plain_gradient(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of `run(*inputs)` by autograd, with a graph of its own where one is asked for.

    Args:
        run: the chain of operations.
        inputs: its arguments, as a backward pass has saved them.
        needed: which of them need a gradient.
        cotangents: one for each output, None for zero.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may depend on another outside of `run`, and that path is not a part of this gradient.
        aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needed, strict=True)]
        pairs = [(o, c) for o, c in zip(run(*aliases), cotangents, strict=True) if c is not None]
        outputs, vectors = zip(*pairs, strict=True)
        wanted = [a for a, need in zip(aliases, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                outputs, wanted, vectors, create_graph=create_graph, allow_unused=True
            )
        )
    return [next(found) if need else None for need in needed]
