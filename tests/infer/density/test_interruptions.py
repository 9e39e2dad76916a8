"""Checkpoints, callbacks and Ctrl-C of `fit_density`."""

import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import FlowDistribution, FlowVAE
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.infer.training import checkpoint

OPTIONS = {"num_steps": 30, "batch_size": 30, "lr": 0.02, "progress": False, "evaluate_every": 3}
X = 50 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + 1000


def flow(seed=0):
    torch.manual_seed(seed)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return FlowDistribution(base, T.nsf(2, num_layers=1, hidden_dims=(8,)))


def vae(seed=0):
    torch.manual_seed(seed)
    return FlowVAE(T.nsf(2, num_layers=1, hidden_dims=(8,)), 2, 1, hidden_dims=(8,))


class Killed(Exception):
    """In place of a signal that ends the process."""


def killed_after(evaluations):
    def callback(state):
        calls.append(state.step)
        if len(calls) == evaluations:
            raise Killed

    calls = []
    return callback


@pytest.mark.parametrize("evaluations", [2, 7])
@pytest.mark.parametrize("make", [flow, vae], ids=["flow", "parts"])
@pytest.mark.parametrize("seed", [3, None])
def test_a_killed_run_goes_on_to_the_same_losses(make, evaluations, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    density = make()
    torch.manual_seed(1)
    expected = fit_density(density, X, seed=seed, **OPTIONS)
    path = tmp_path / "density.pt"
    killed = make()
    torch.manual_seed(1)
    with pytest.raises(Killed):
        fit_density(killed, X, seed=seed, checkpoint=path, callback=killed_after(evaluations), **OPTIONS)  # fmt: skip
    resumed = make(seed=5)
    torch.manual_seed(9)
    found = fit_density(resumed, X, seed=seed, checkpoint=path, resume=True, **OPTIONS)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.validation_losses, expected.validation_losses)
    assert (found.best_step, found.first_steps) == (expected.best_step, expected.first_steps)
    for name, value in density.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.standardization is not None


def test_a_finished_run_takes_no_more_steps(tmp_path):
    path = tmp_path / "density.pt"
    density = flow()
    expected = fit_density(density, X, seed=0, checkpoint=path, resume=True, **OPTIONS)
    again = flow(1)
    found = fit_density(again, X, seed=0, checkpoint=path, resume=True, **OPTIONS)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(again.log_prob(X), density.log_prob(X))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "density.pt"
    fit_density(flow(), X, seed=0, checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match=r"expected one of \(num_steps, first_steps, rows\) .*, got"):  # fmt: skip
        fit_density(flow(), X[:100], seed=0, checkpoint=path, resume=True, **OPTIONS)
    checkpoint.save(path, {"step": 3})
    with pytest.raises(ValueError, match="expected a checkpoint of fit_density, got one of fit"):
        fit_density(flow(), X, checkpoint=path, resume=True, **OPTIONS)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="got a file that does not load"):
        fit_density(flow(), X, checkpoint=path, resume=True, **OPTIONS)
    with pytest.raises(ValueError, match="resume: expected checkpoint="):
        fit_density(flow(), X, resume=True, **OPTIONS)


@pytest.mark.parametrize("validation", [0.1, None])
def test_ctrl_c_returns_the_best_so_far(validation):
    def callback(state):
        if state.step == 9:
            raise KeyboardInterrupt

    density = flow()
    result = fit_density(density, X, validation=validation, seed=0, callback=callback, **OPTIONS)
    assert (result.steps, result.interrupted, result.stopped_early) == (9, True, True)
    assert not density.training
    if validation:
        assert result.best_loss == result.validation_losses.min()


def test_a_callback_sees_every_evaluation_and_can_stop():
    seen = []

    def callback(state):
        seen.append((state.step, len(state.losses), state.best_loss, len(state.validation_losses)))
        state.stop = state.step >= 12

    result = fit_density(flow(), X, seed=0, callback=callback, **OPTIONS)
    assert [row[0] for row in seen] == [3, 6, 9, 12]
    assert [row[1] for row in seen] == [3, 6, 9, 12]
    assert seen[-1][2] == result.best_loss
    assert seen[-1][3] == 5
    assert (result.steps, result.interrupted) == (12, True)
