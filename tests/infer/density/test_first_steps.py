"""`fit_density` where a part of the density trains later: the networks behind a flow are used, and nothing else changes."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import Dequantized, FlowVAE
from pyro_flows_ext.infer import fit_density

OPTIONS = {"num_steps": 30, "batch_size": 50, "lr": 0.01, "seed": 0, "patience": None, "progress": False}  # fmt: skip


def on_a_surface(num, seed):
    """Points near a bent surface of two dimensions in four."""
    generator = torch.Generator().manual_seed(7)
    slopes = torch.randn(2, 4, generator=generator)
    generator.manual_seed(seed)
    across = torch.randn(num, 2, generator=generator) @ slopes
    return across.tanh() + 0.5 * across.sin() + 0.1 * torch.randn(num, 4, generator=generator)


def flow_vae(num_layers=2):
    flow = T.nsf(4, num_layers=num_layers, hidden_dims=(16,))
    return FlowVAE(flow, 4, 2, hidden_dims=(32,))


def told_by_the_noise(density, x):
    """KL(q(ε | z) ‖ p(ε)) by its closed form, the mean over x in nats."""
    with torch.no_grad():
        loc, raw = density.encoder(density.transform.inv(x)).chunk(2, -1)
    bound = math.log(1000)
    q = dist.Normal(loc, (bound * (raw / bound).tanh()).exp())
    return torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("first_steps", "is_used"), [(None, True), (0, False)], ids=["first", "at once"])  # fmt: skip
def test_networks_behind_a_flow_are_used_if_they_train_first(first_steps, is_used):
    density, data, validation = flow_vae(), on_a_surface(400, 0), on_a_surface(200, 1)
    result = fit_density(
        density,
        data,
        validation=validation,
        first_steps=first_steps,
        **{**OPTIONS, "batch_size": 100, "num_steps": 300},
    )
    told = told_by_the_noise(density, validation)
    assert told > 1 if is_used else told < 0.1
    assert result.first_steps == (150 if is_used else 0)
    assert result.best_loss < result.validation_losses[0] - 2


def test_the_first_part_of_a_run_holds_what_trains_later_and_the_second_begins_where_it_was_best():
    density, data = flow_vae(1), on_a_surface(100, 0).round().clamp(0, 8)
    frozen = next(density.transform.parameters()).requires_grad_(False)
    start = {k: v.clone() for k, v in density.state_dict().items()}
    seen = []

    def optim(parameters):
        seen.append(list(parameters))
        return torch.optim.Adam(seen[-1], lr=0.01)

    wrapped = Dequantized(density, num_levels=9, logit_alpha=None)
    options = {**OPTIONS, "validation": data, "evaluate_every": 2, "first_steps": 0}
    options["standardize"] = False  # the second run starts from the state before the first
    result = fit_density(
        wrapped, data, **{**options, "num_steps": 11, "first_steps": 6}, optim=optim
    )
    networks = [*density.encoder.parameters(), *density.decoder.parameters()]
    assert set(map(id, seen[0])) == set(map(id, networks))
    flow = [p for p in density.transform.parameters() if p is not frozen]
    assert set(map(id, seen[1])) == set(map(id, networks + flow))
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in flow)
    assert result.validation_steps.tolist() == [0, 2, 4, 6, 8, 10, 11]
    assert (result.steps, result.first_steps, len(result.losses)) == (11, 6, 11)
    assert result.best_loss == result.validation_losses.min()
    assert result.best_step == result.validation_steps[result.validation_losses.argmin()]

    # As two runs one after the other, the flow held in the first.
    density.load_state_dict(start)
    density.transform.requires_grad_(False)
    first = fit_density(wrapped, data, **{**options, "num_steps": 6})
    density.transform.requires_grad_(True)
    frozen.requires_grad_(False)
    second = fit_density(wrapped, data, **{**options, "num_steps": 5})
    assert torch.equal(result.losses, torch.cat([first.losses, second.losses]))
    assert result.best_loss == pytest.approx(
        second.best_loss, rel=1e-6
    )  # one kernel of Adam for all parameters, or two


def test_a_failing_first_part_leaves_the_flow_to_train():
    density = flow_vae(1)
    with pytest.raises(ZeroDivisionError):
        fit_density(density, on_a_surface(20, 0), optim=lambda parameters: 1 / 0, **OPTIONS)
    assert all(p.requires_grad for p in density.parameters())
