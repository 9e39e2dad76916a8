"""Inputs of another dtype are refused by name, in place of an error of a matrix product deep inside."""

import pytest
import torch
from catalogue import CATALOGUE

from pyro_flows_ext.transforms import IndexedTransform, Planar

WITH_PARAMETERS = sorted(
    name
    for name, entry in CATALOGUE.items()
    if not isinstance(transform := entry.factory()(), IndexedTransform)
    and transform.context_dim == 0
    and any(True for _ in transform.parameters())
)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.complex64])
def test_another_dtype_is_refused(name, dtype):
    entry = CATALOGUE[name]
    transform = entry.factory()()
    x = torch.zeros(2, *(entry.event_shape or (entry.dim,)), dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype|floating-point"):
        transform.forward_and_ladj(x)


def test_context_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="context: expected a tensor of the parameters' dtype"):
        Planar(2, context_dim=3).condition(torch.zeros(3, dtype=torch.float64))


def test_autocast_converts():
    x = torch.randn(4, 3)
    expected, _ = (transform := Planar(3)).forward_and_ladj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = transform.forward_and_ladj(x.bfloat16())
    assert torch.allclose(y.float(), expected, atol=0.1)


def test_batch_that_does_not_fit_the_context_is_refused():
    transform = Planar(2, context_dim=3).condition(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"expected a batch that broadcasts against \(4,\)"):
        transform.forward_and_ladj(torch.zeros(5, 2))
