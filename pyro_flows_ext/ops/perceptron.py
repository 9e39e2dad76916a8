"""Multilayer perceptrons as one operation: forward in place, backward in place, three products a layer and little else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .fused import may_fuse, may_write_gradient, needs_graph, plain_gradient

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation whose derivative is a function of its result, so that both can be written over their arguments."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    # (cotangent, result, out) -> cotangent of the argument
    backward: Callable[[Tensor, Tensor, Tensor], Any]


def _relu_backward(g: Tensor, a: Tensor, out: Tensor) -> None:
    _aten.threshold_backward.grad_input(g, a, 0, grad_input=out)


def _tanh_backward(g: Tensor, a: Tensor, out: Tensor) -> None:
    _aten.tanh_backward.grad_input(g, a, grad_input=out)


def _sigmoid_backward(g: Tensor, a: Tensor, out: Tensor) -> None:
    _aten.sigmoid_backward.grad_input(g, a, grad_input=out)


RELU = Activation(torch.relu, torch.relu_, _relu_backward)
TANH = Activation(torch.tanh, torch.tanh_, _tanh_backward)
SIGMOID = Activation(torch.sigmoid, torch.sigmoid_, _sigmoid_backward)


def is_worthwhile(x: Tensor, width: int) -> bool:
    """Whether `perceptron` is faster than a chain of operations for x `(*, D)` and hidden layers of this width."""
    return x.dim() > 1 and x.numel() * width >= fused.MIN_NUMEL * x.shape[-1]


def perceptron(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: Activation,
    *,
    residual: bool = False,
) -> Tensor:
    """A multilayer perceptron with one activation after every layer but the last: `(*, D) -> (*, out)`.

    Args:
        x: `(*, D)`.
        weights: `(out, in)` by layer.
        biases: `(out)` by layer; that of the first layer may be `(*, out)`, such as what a context adds.
        activation: `RELU`, `TANH` or `SIGMOID`.
        residual: whether a hidden layer as wide as the one before it is added to it.

    Example:
        >>> perceptron(torch.ones(5, 2), [torch.ones(3, 2), torch.ones(1, 3)], [torch.zeros(3), torch.zeros(1)], RELU).shape
        torch.Size([5, 1])
    """
    rows, shape = x.shape[:-1], biases[0].shape
    tensors = (x, *weights, *biases)
    has_bias = len(shape) == 1 or shape[:-1] == rows
    if x.dim() < 2 or not has_bias or not may_fuse(*tensors):
        return chain(x, weights, biases, activation, residual)
    if x.dim() > 2:
        x = x.flatten(0, -2)
        first = biases[0] if len(shape) == 1 else biases[0].flatten(0, -2)
        biases = (first, *biases[1:])
    if needs_graph(*tensors):
        y = _Perceptron.apply(activation, residual, len(weights), x, *weights, *biases)
    else:
        y = run_layers(x, weights, biases, activation, residual)[0]
    return y if len(rows) == 1 else y.unflatten(0, rows)


def chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: Activation,
    residual: bool,
) -> Tensor:
    """The perceptron by ordinary operations."""
    h = x
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h_in = h
        h = F.linear(h, weight, bias) if bias.dim() == 1 else F.linear(h, weight) + bias
        if i < len(weights) - 1:
            h = activation.apply(h)
            # The first layer reads x, which is no hidden layer.
            h = h_in + h if residual and i and h.shape[-1] == h_in.shape[-1] else h
    return h


def run_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: Activation,
    residual: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output, the inputs of all layers but the first, and the activations of all layers but the last."""
    inputs, activations = run_hidden(x, weights[:-1], biases[:-1], activation, residual)
    h = inputs[-1] if inputs else x
    return _linear(h, weights[-1], biases[-1]), inputs, activations


def run_hidden(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: Activation,
    residual: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of hidden layers, and their activations, which differ where a layer is residual."""
    h = x
    outputs, activations = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        a = activation.apply_(_linear(h, weight, bias))
        h = h + a if residual and i and a.shape[-1] == h.shape[-1] else a
        outputs.append(h)
        activations.append(a)
    return outputs, activations


def _linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if h.device.type == "cpu":
        # addmm would first write the bias to memory that is in no cache yet: a tenth of the time of a small product.
        return torch.mm(h, weight.t()).add_(bias)
    return torch.addmm(bias, h, weight.t())


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        residual: bool,
        num_layers: int,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        weights, biases = tensors[:num_layers], tensors[num_layers:]
        y, inputs, activations = run_layers(x, weights, biases, activation, residual)
        ctx.activation, ctx.residual, ctx.num_layers = activation, residual, num_layers
        ctx.save_for_backward(x, *tensors, *inputs, *activations)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        n = ctx.num_layers
        x, *saved = ctx.saved_tensors
        weights, biases = saved[:n], saved[n : 2 * n]
        needed = ctx.needs_input_grad[3:]
        if not may_write_gradient(g):
            run = partial(_chain_of, ctx.activation, ctx.residual, n)
            return None, None, None, *plain_gradient(run, (x, *weights, *biases), needed, (g,))
        inputs, activations = [x, *saved[2 * n : 3 * n - 1]], saved[3 * n - 1 :]
        g, by_weights, by_biases = layer_gradients(
            g, weights, biases, inputs, activations, ctx.activation, ctx.residual, needed[1:]
        )
        by_x = g.mm(weights[0]) if needed[0] else None
        return None, None, None, by_x, *by_weights, *by_biases


def layer_gradients(
    g: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    inputs: Sequence[Tensor],
    activations: Sequence[Tensor],
    activation: Activation,
    residual: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """From the cotangent of the output: that of the first layer's sums, and the gradients by weights and biases.

    `inputs` are of all layers, `activations` of all but the last, as `run_layers` returns them, or of all if the last is a
    hidden layer too: then g is overwritten. `needed` is for the weights and then for the biases.
    """
    n = len(weights)
    by_weights: list[Tensor | None] = [None] * n
    by_biases: list[Tensor | None] = [None] * n
    skipped = None  # the cotangent that goes past a residual layer
    for i in range(n - 1, -1, -1):
        if i < len(activations):
            a = activations[i]
            is_residual = residual and i and a.shape[-1] == inputs[i].shape[-1]
            skipped, out = (g, torch.empty_like(g)) if is_residual else (None, g)
            activation.backward(g, a, out)
            g = out
        if needed[i]:
            by_weights[i] = torch.mm(g.t(), inputs[i])
        if needed[n + i]:
            by_biases[i] = g.sum(0) if biases[i].dim() == 1 else g
        if i:
            # A buffer of this pass, over which the next layer's cotangent may be written.
            g = g.mm(weights[i]) if skipped is None else skipped.addmm_(g, weights[i])
    return g, by_weights, by_biases


def _chain_of(
    activation: Activation, residual: bool, n: int, x: Tensor, *tensors: Tensor
) -> tuple[Tensor]:
    return (chain(x, tensors[:n], tensors[n:], activation, residual),)
