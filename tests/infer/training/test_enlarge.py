"""`guide="auto"`: the simplest guide that does, and one that goes on from where the last ended."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.infer import fit
from pyro_flows_ext.infer.training.enlarge import EXACT, _enlarged


def normal():
    pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 2.0).to_event(1))


def banana():
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("bent", -0.5 * ((z[..., 0] - z[..., 1].square()) / 0.3).square())


def modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 3.0).to_event(1))
    near = dist.Normal(torch.tensor([[-4.0, 0.0], [4.0, 0.0]], dtype=torch.float64), 0.5).to_event(
        1
    )
    pyro.factor("lobes", near.log_prob(z.unsqueeze(-2)).logsumexp(-1))


def run(model, **options):
    return fit(model, "auto", refine=False, seed=0, progress=False, **options)


def test_a_gaussian_is_enough_for_a_gaussian():
    result = run(normal)
    assert result.trusted
    assert result.tried == ("gaussian",)
    assert "Guides tried: gaussian." in str(result)


def test_a_bent_posterior_takes_a_richer_guide():
    result = run(banana)
    assert result.trusted
    assert result.tried[:2] == ("gaussian", "iaf")
    z = result.sample(4000)["z"]
    assert (z[:, 0] - z[:, 1].square()).std().item() == pytest.approx(0.3, rel=0.15)


def test_separate_modes_go_to_the_continuously_indexed_flow_at_once():
    result = run(modes, max_steps=100)
    assert result.tried == ("gaussian", "cif")
    # As wide as both modes: each is 4 away from their mean.
    assert result.guide.whitening.scale_tril[0, 0].item() == pytest.approx(4.0, abs=0.3)


def test_a_larger_guide_starts_at_the_density_of_the_last_one():
    torch.manual_seed(0)
    last = None
    for _, make, _ in EXACT[:2]:
        last = _enlarged(banana, make, last, (), {})
        for p in last.parameters():
            p.data += 0.05 * torch.randn_like(p)
    last.whiten(torch.tensor([1.0, -2.0]).double(), torch.tensor([[2.0, 0.0], [1.0, 0.5]]).double())
    pyro.clear_param_store()
    larger = _enlarged(banana, EXACT[2][1], last, (), {})
    draws = last.sample_posterior(50)
    torch.testing.assert_close(larger.log_prob(draws), last.log_prob(draws), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("guide", "options", "message"),
    [
        ("best", {}, 'guide: expected a Pyro program or "auto"'),
        ("auto", {"num_steps": 10}, "num_steps: expected None"),
        ("auto", {"checkpoint": "fit.ckpt"}, "checkpoint: expected None"),
        ("auto", {"warm_start": False}, "warm_start: expected"),
    ],
    ids=["name", "steps", "checkpoint", "start"],
)
def test_bad_settings(guide, options, message):
    with pytest.raises(ValueError, match=message):
        fit(normal, guide, progress=False, **options)
