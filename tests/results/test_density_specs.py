"""Densities by name, and in files."""

import math
from pathlib import Path

import pytest
import torch

from pyro_flows_ext.diagnostics.scores import score
from pyro_flows_ext.results import DensitySpec, density_to_bytes, load
from pyro_flows_ext.results.densities import FLOWS
from pyro_flows_ext.testing import perturb


@pytest.mark.parametrize("name", list(FLOWS))
def test_every_flow_is_saved_and_read(name: str, tmp_path: Path) -> None:
    kind = FLOWS[name]
    shape = (1, 4, 4) if kind.of_images else (3,)
    spec = DensitySpec(name, shape, None if kind.num_layers is None else 1)
    rows = 5 + 2 * torch.randn(64, *shape)
    density = perturb(spec.build(rows), scale=0.1).eval()
    (tmp_path / "density.pt").write_bytes(density_to_bytes("mine", ("a",), spec, density))
    saved = load(tmp_path / "density.pt")
    assert (saved.target, saved.columns) == ("mine", ("a",))
    results = []
    for one in (density, saved.density):
        torch.manual_seed(0)
        found = score(one, rows, 4)
        results.append(torch.cat([found.values, one.sample((6,)).flatten().double()]))
        assert found.kind == ("exact" if one.exact_log_prob else "bound")
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0].isfinite().all()
    assert len(results[0]) == 64 + 6 * math.prod(shape)
