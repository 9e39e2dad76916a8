"""The linear layers that tests go through, and what to hold them against."""

import pytest
import torch

from pyro_flows_ext.transforms import (
    Permute,
    householder_linear,
    lu_linear,
    qr_linear,
)

D = 4


def permuted_lu():
    t = lu_linear(D, permute=True)
    t.permutation.copy_(torch.tensor([2, 0, 3, 1]))  # not its own inverse
    return t


LAYERS = {
    "lu": lambda: lu_linear(D),
    "lu-permuted": permuted_lu,
    "lu-no-bias": lambda: lu_linear(D, bias=False),
    "qr": lambda: qr_linear(D),
    "qr-1": lambda: qr_linear(D, num_reflections=1),
    "qr-9": lambda: qr_linear(D, num_reflections=9, bias=False),
    "householder": lambda: householder_linear(D),
    "householder-1": lambda: householder_linear(D, num_reflections=1),
    "householder-9": lambda: householder_linear(D, num_reflections=9),
    "permute": lambda: Permute([1, 2, 3, 0]),
}
EVERY = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def matrix_of(transform):
    """W and b of y = W x + b, from the passes of the unit vectors and of zero."""
    eye = torch.eye(transform.input_dim, dtype=torch.float64)
    b = transform.forward_and_ladj(torch.zeros_like(eye[0]))[0]
    return (transform.forward_and_ladj(eye)[0] - b).mT, b


def diagonal(raw):
    """The exponential linear unit that keeps a diagonal above 1e-3, written out."""
    a = 1 - 1e-3
    return torch.where(raw >= 0, 1 + raw, 1 - a + a * (raw.clamp_max(0) / a).exp())
