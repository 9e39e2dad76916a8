"""Reading results back: safe, versioned, and with words that help."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.flows import NSF
from pyro_flows_ext.results import (
    GuideSpec,
    SavedDensity,
    SavedGuide,
    density_to_bytes,
    digest,
    guide_to_bytes,
    load,
)


def model(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


def other(y: torch.Tensor) -> None:
    pyro.sample("nu", dist.Normal(torch.zeros(3), 1.0).to_event(1))


Y = torch.tensor([1.5, 2.5])


def write_guide(path: Path, kind: str = "realnvp") -> torch.Tensor:
    spec = GuideSpec(kind)
    guide = spec.build(model)
    guide(y=Y)
    path.write_bytes(guide_to_bytes("mine", spec, guide, {"y": Y}, "y.csv"))
    torch.manual_seed(3)
    return guide(y=Y)["mu"]


@pytest.mark.parametrize("kind", ["realnvp", "multivariate-normal"])
def test_a_guide_draws_what_it_drew_before(kind: str, tmp_path: Path) -> None:
    expected = write_guide(tmp_path / "guide.pt", kind)
    saved = load(tmp_path)
    assert isinstance(saved, SavedGuide)
    assert (saved.target, saved.data_file) == ("mine", "y.csv")
    assert saved.data_digest == digest({"y": Y})
    pyro.clear_param_store()
    guide = saved.rebuild(model, Y)
    torch.manual_seed(3)
    torch.testing.assert_close(guide(Y)["mu"], expected, rtol=0, atol=0)
    assert "tensor" not in repr(saved)
    with pytest.raises(ValueError, match="a model with the latents of 'mine', got other latents"):
        saved.rebuild(other, Y)


def test_a_guide_file_holds_no_data(tmp_path: Path) -> None:
    secret = torch.linspace(0.1234, 0.5678, 50)
    spec = GuideSpec("normal")
    guide = spec.build(model)
    guide(y=secret)
    content = guide_to_bytes("mine", spec, guide, {"y": secret})
    assert secret.numpy().tobytes() not in content
    assert secret[3:7].numpy().tobytes() not in content


def test_the_digest_is_of_names_types_shapes_and_values() -> None:
    base = {"y": Y, "x": torch.ones(2, 3)}
    others = [
        {"z": Y, "x": base["x"]},
        {**base, "y": Y + 1},
        {**base, "y": Y.double()},
        {**base, "x": torch.ones(3, 2)},
    ]
    assert digest(base) == digest(dict(reversed(base.items())))
    assert len({digest(base), *map(digest, others)}) == 5


def test_a_directory_must_hold_one_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected guide\.pt or density\.pt; it holds neither"):
        load(tmp_path)
    write_guide(tmp_path / "guide.pt")
    content = density_to_bytes(NSF(2, num_layers=1), ("a", "b"), target="moons")
    (tmp_path / "density.pt").write_bytes(content)
    with pytest.raises(ValueError, match="holds a guide and a density: name one of them"):
        load(tmp_path)
    assert isinstance(load(tmp_path / "density.pt"), SavedDensity)
    with pytest.raises(ValueError, match=r"no file .*: expected a guide or density"):
        load(tmp_path / "gone.pt")


def test_a_newer_format_names_the_cure(tmp_path: Path) -> None:
    torch.save({"format": "pyro_flows_ext guide", "version": 9}, tmp_path / "guide.pt")
    with pytest.raises(ValueError, match=r"version 9, and this release reads 3: install a newer"):
        load(tmp_path)
    torch.save({"format": "pyro_flows_ext guide", "version": 1}, tmp_path / "guide.pt")
    with pytest.raises(ValueError, match="version 1, and this release reads 3: run it again"):
        load(tmp_path)
