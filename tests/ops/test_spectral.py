"""Bounds on operator norms: never below the norm, hardly above it, with gradients where singular values tie."""

import pytest
import torch
import torch.nn.functional as F

from pyro_flows_ext.ops import conv_norm_bound, spectral_norm_bound

SHAPES = [(1, 1), (2, 7), (7, 2), (16, 16), (3, 4, 5)]


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_a_tight_bound(shape, scale, dtype):
    A = scale * torch.randn(shape, dtype=dtype)
    norm, bound = torch.linalg.matrix_norm(A, 2), spectral_norm_bound(A)
    assert bound.shape == shape[:-2]
    # The bound is the exponential of a logarithm up to 16 here, whose rounding is relative to its size.
    assert (bound >= norm * (1 - 50 * torch.finfo(dtype).eps)).all()
    assert (bound <= norm * min(shape[-2:]) ** (1 / 2048) * (1 + 1e-5)).all()


@pytest.mark.parametrize("n", [2, 30])
def test_tied_singular_values(n):
    Q = orthogonal(n).requires_grad_()
    bound = spectral_norm_bound(Q)
    torch.testing.assert_close(bound.item(), n ** (1 / 2048), rtol=1e-12, atol=0)
    torch.autograd.gradcheck(spectral_norm_bound, Q, fast_mode=True)


def test_zero_has_a_gradient():
    A = torch.zeros(3, 4, requires_grad=True)
    bound = spectral_norm_bound(A)
    bound.backward()
    assert 0 <= bound.item() < 1e-6
    assert A.grad.isfinite().all()


def as_matrix(weight, size, pad):
    """The convolution of images `size` as a matrix; `pad` takes images and gives the margin that the kernel needs."""
    channels = weight.shape[1]
    eye = torch.eye(channels * size[0] * size[1], dtype=weight.dtype)
    images = eye.reshape(-1, channels, *size)
    return F.conv2d(pad(images), weight).flatten(1).T


def margins(kernel):
    return (kernel[1] // 2,) * 2 + (kernel[0] // 2,) * 2


CONVS = [
    ((1, 1), (1, 1), (2, 2)),
    ((2, 3), (3, 3), (2, 2)),
    ((3, 2), (3, 3), (5, 6)),
    ((2, 2), (5, 3), (6, 4)),
    ((1, 4), (3, 3), (1, 7)),
]


@pytest.mark.parametrize(("channels", "kernel", "size"), CONVS, ids=str)
def test_bounds_the_convolution_with_zero_padding(channels, kernel, size):
    for _ in range(5):
        weight = torch.randn(*channels, *kernel, dtype=torch.float64)
        matrix = as_matrix(weight, size, lambda x: F.pad(x, margins(kernel)))
        norm = torch.linalg.matrix_norm(matrix, 2)
        assert norm <= conv_norm_bound(weight, size) <= 4 * norm


@pytest.mark.parametrize(("channels", "kernel", "size"), CONVS, ids=str)
def test_is_the_norm_of_the_circular_convolution_with_a_margin(channels, kernel, size):
    weight = torch.randn(*channels, *kernel, dtype=torch.float64)
    size_with_margin = [n + k // 2 for n, k in zip(size, kernel, strict=True)]
    matrix = as_matrix(
        weight, size_with_margin, lambda x: F.pad(x, margins(kernel), mode="circular")
    )
    norm = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(conv_norm_bound(weight, size), norm, rtol=2e-3, atol=0)


def test_margin_costs_little_on_larger_images():
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    matrix = as_matrix(weight, (16, 16), lambda x: F.pad(x, (1, 1, 1, 1)))
    assert conv_norm_bound(weight, (16, 16)) <= 1.05 * torch.linalg.matrix_norm(matrix, 2)


def test_gradient_of_a_convolution():
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda w: conv_norm_bound(w, (4, 4)), weight)
    zero = torch.zeros(2, 3, 3, 3, requires_grad=True)
    conv_norm_bound(zero, (4, 4)).backward()
    assert zero.grad.isfinite().all()


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match=r"expected odd kernel sizes, got \(3, 2\)"):
        conv_norm_bound(torch.randn(1, 1, 3, 2), (4, 4))
