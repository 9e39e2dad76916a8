"""The linear layers that tests go through, and what to hold them against."""

import pytest
import torch

from pyro_flows_ext.transforms import (
    HouseholderLinear,
    LULinear,
    Permute,
    QRLinear,
)

D = 4


def permuted_lu():
    t = LULinear(D, permute=True)
    t.permutation.copy_(torch.tensor([2, 0, 3, 1]))  # not its own inverse
    return t


LAYERS = {
    "lu": lambda: LULinear(D),
    "lu-permuted": permuted_lu,
    "lu-no-bias": lambda: LULinear(D, bias=False),
    "qr": lambda: QRLinear(D),
    "qr-1": lambda: QRLinear(D, num_reflections=1),
    "qr-9": lambda: QRLinear(D, num_reflections=9, bias=False),
    "householder": lambda: HouseholderLinear(D),
    "householder-1": lambda: HouseholderLinear(D, num_reflections=1),
    "householder-9": lambda: HouseholderLinear(D, num_reflections=9),
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
