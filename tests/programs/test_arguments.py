import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows_ext.programs import (
    check_finite_log_joint,
    describe_nonfinite,
    nonfinite_arguments,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(3), None),
        (torch.tensor([1, 2]), None),
        ("text", None),
        (torch.tensor([1.0, NAN]), "y: 1 of 2 values is NaN, the first in row 1 (y[1], rows counted from 0)"),
        (torch.tensor([[1.0, 2.0], [INF, -INF]]), "y: 2 of 4 values are infinite, the first in row 1 (y[1, 0],"),
        (np.array([NAN, INF, 1.0]), "y: 2 of 3 values are NaN (1) or infinite, the first in row 0"),
        (NAN, "y: expected a finite number, got nan"),
        (torch.tensor(INF), "y: expected a finite number, got inf"),
    ],
)  # fmt: skip
def test_values_are_named_by_count_and_row(value: object, expected: str | None) -> None:
    found = describe_nonfinite("y", value)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(expected)


def test_large_arguments_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, isfinite = [], torch.Tensor.isfinite

    def recorded(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return isfinite(x)

    monkeypatch.setattr(torch.Tensor, "isfinite", recorded)
    x = torch.zeros(2**18 + 5, 8)
    assert describe_nonfinite("x", x) is None
    assert sum(sizes) == x.numel()
    assert max(sizes) <= 2**20
    x[-1, 3] = NAN
    expected = "x: 1 of 2097192 values is NaN, the first in row 262148 (x[262148, 3]"
    assert describe_nonfinite("x", x).startswith(expected)


def test_arguments_are_named_as_the_program_names_them() -> None:
    def model(x: Tensor, data: dict, *rest: Tensor, **options: Tensor) -> None: ...

    bad, good = torch.tensor([NAN]), torch.ones(2)
    found = nonfinite_arguments(model, (good, {"a": bad, "b": [good, bad]}, bad), {"z": bad})
    assert [text.split(":")[0] for text in found] == [
        "data['a']", "data['b'][1]", "rest[0]", "z",
    ]  # fmt: skip


def plain(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(~y.isnan()), obs=y)


def scaled(y: Tensor, scale: Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def test_nan_that_reaches_the_log_joint_is_refused() -> None:
    y = torch.tensor([0.0, 1.0, NAN])
    with pytest.raises(
        ValueError, match=r"^y: 1 of 3 values is NaN, the first in row 2 .*obs_mask"
    ):
        check_finite_log_joint(plain, (y,))
    with pytest.raises(ValueError, match=r"^scale: expected a finite number, got nan"):
        check_finite_log_joint(scaled, (), {"y": torch.ones(()), "scale": torch.tensor(NAN)})


def test_nan_that_the_model_masks_is_fine() -> None:
    check_finite_log_joint(masked, (torch.tensor([0.0, NAN]),))


def test_a_model_with_finite_arguments_is_not_run() -> None:
    def model(y: Tensor) -> None:
        raise RuntimeError("run")

    check_finite_log_joint(model, (torch.ones(2),))


def test_the_check_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    check_finite_log_joint(masked, (torch.tensor([0.0, NAN]),))
    assert torch.equal(state, torch.get_rng_state())
    assert not pyro.get_param_store()
