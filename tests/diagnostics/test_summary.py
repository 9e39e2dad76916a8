import math
from dataclasses import astuple, fields

import numpy as np
import pytest
import torch

from pyro_flows_ext.diagnostics import ParameterSummary, flatten_samples, summary


def test_flatten_names_and_values() -> None:
    x = torch.arange(12.0).reshape(2, 2, 3)
    flat = flatten_samples(
        {"x": x, "s": np.array([1, 2]), "v": torch.ones(2, 1, requires_grad=True)}
    )
    assert list(flat) == ["x[0,0]", "x[0,1]", "x[0,2]", "x[1,0]", "x[1,1]", "x[1,2]", "s", "v[0]"]
    np.testing.assert_array_equal(flat["x[1,0]"], [3.0, 9.0])
    np.testing.assert_array_equal(flat["s"], [1.0, 2.0])
    assert all(v.dtype == np.float64 and v.shape == (2,) for v in flat.values())


def test_flatten_skips_sites_of_no_elements() -> None:
    assert list(flatten_samples({"none": torch.zeros(3, 0), "x": torch.zeros(3)})) == ["x"]


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ({"x": torch.tensor(1.0)}, "first dimension"),
        ({"x": torch.zeros(0, 2)}, "first dimension"),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, "as many draws"),
    ],
    ids=["scalar", "empty", "unequal"],
)
def test_flatten_refuses(samples: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        flatten_samples(samples)


def test_summary_of_known_draws() -> None:
    assert [f.name for f in fields(ParameterSummary)] == [
        "parameter",
        "mean",
        "sd",
        "q05",
        "q50",
        "q95",
    ]
    line = torch.arange(101.0)
    a, b = summary({"a": line, "b": torch.stack([-line], -1)})
    assert a.parameter == "a"
    assert astuple(a)[1:] == pytest.approx((50.0, line.std().item(), 5.0, 50.0, 95.0))
    assert b.parameter == "b[0]"
    assert astuple(b)[1:] == pytest.approx((-50.0, line.std().item(), -95.0, -50.0, -5.0))


def test_one_draw_has_no_sd() -> None:
    (row,) = summary({"x": torch.tensor([3.0])})
    assert math.isnan(row.sd)
    assert row.q05 == row.q95 == 3.0
