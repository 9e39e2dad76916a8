"""Rows to learn a density of, and their split."""

import math

import pytest
import torch

from pyro_flows_ext.datasets import DATASETS, Rows, load_rows, split_rows
from pyro_flows_ext.distributions import TOYS

NEEDS_SKLEARN = {"swiss-roll", "iris", "wine", "diabetes", "breast-cancer", "digits"}


@pytest.mark.parametrize("name", list(DATASETS))
def test_sets_by_name(name: str) -> None:
    if name in NEEDS_SKLEARN:
        pytest.importorskip("sklearn")
    rows = load_rows(name.replace("-", "_"), num_rows=30, seed=1)
    assert rows.values.isfinite().all()
    assert rows.values.shape[1] == len(rows.columns)
    assert torch.equal(rows.values, load_rows(name, num_rows=30, seed=1).values)
    if rows.num_levels is not None:
        assert rows.values.max() == rows.num_levels - 1
        assert math.prod(rows.image_shape) == rows.values.shape[1]
    if name in TOYS:
        assert len(rows.values) == 30
        assert rows.entropy == TOYS[name].entropy
        assert not torch.equal(rows.values, load_rows(name, num_rows=30, seed=2).values)


def test_the_split_is_one() -> None:
    values = torch.arange(205.0)[:, None]
    rows = Rows("mine", values, ("x",), context=-values, context_columns=("c",))
    split = split_rows(rows, seed=3)
    assert list(map(len, split)) == [165, 20, 20]
    together = torch.cat([part.values for part in split])
    assert sorted(together.flatten().tolist()) == values.flatten().tolist()
    assert all(torch.equal(part.context, -part.values) for part in split)
    assert torch.equal(split.test.values, split_rows(rows, seed=3).test.values)
    assert not torch.equal(split.test.values, split_rows(rows, seed=4).test.values)
