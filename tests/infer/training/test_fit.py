"""`fit` until trusted: verdicts against known posteriors, and the contract of a run."""

import math
import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_flows_ext.guides import AutoIAF, AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import fit, importance
from pyro_flows_ext.infer.refine import refine_density
from pyro_flows_ext.infer.training.posterior import FlowPosterior
from pyro_flows_ext.programs import LogJoint

X = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64)
Y = 2 * X + 0.3 * torch.sin(17 * X)


def regression(X=X, y=Y):
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(b * X, 0.5), obs=y)


def slope():
    """Mean and sd of the posterior of `regression`."""
    precision = 1 / 25 + (X.square() / 0.25).sum()
    return ((X * Y / 0.25).sum() / precision).item(), precision.rsqrt().item()


def evidence():
    covariance = 25 * X[:, None] * X + 0.25 * torch.eye(30, dtype=torch.float64)
    zeros = torch.zeros(30, dtype=torch.float64)
    return dist.MultivariateNormal(zeros, covariance).log_prob(Y).item()


def test_ends_trusted_at_the_exact_posterior():
    result = fit(regression, AutoIAF(regression), seed=0, progress=False)
    assert result.trusted
    assert result.reason == "trusted"
    assert result.advice == ()
    mean, sd = slope()
    draws = result.sample(4000)["b"]
    assert draws.mean().item() == pytest.approx(mean, abs=0.1 * sd)
    assert draws.std().item() == pytest.approx(sd, rel=0.1)
    assert result.importance.log_evidence == pytest.approx(evidence(), abs=0.02)
    assert str(result).startswith("Trusted: the draws follow the posterior (ESS")
    assert result.summary().loc["b", "mean"] == pytest.approx(mean, abs=0.1 * sd)


def test_chains_before_any_training_run_in_the_coordinates_of_the_warm_start():
    guide = AutoIAF(regression)
    fit(regression, guide, num_steps=1, lr=1e-9, seed=0, progress=False)
    log_joint = LogJoint(regression, latents=guide.latents)
    posterior = FlowPosterior(log_joint, guide, is_placed=True)
    draws = []
    for first in (False, True):
        torch.manual_seed(0)
        _, start = posterior.start(first)
        assert (start.transform is guide.whitening) == first
        draws.append(start.draw_latents(200))
        refined = refine_density(log_joint, start, num_chains=8, max_gradients=60)
        u = refined.chains.u
        expected = log_joint(u) - guide.get_posterior().log_prob(u)
        torch.testing.assert_close(posterior.chain_log_weights(refined), expected.detach())
    torch.testing.assert_close(draws[0], draws[1])


def funnel():
    tau = pyro.sample("tau", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), tau.exp()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.4, -0.7, 1.0, 0.2]).double())


def test_a_guide_that_cannot_fit_is_refined_by_chains():
    result = fit(funnel, AutoMultivariateNormal(funnel), seed=0, progress=False, max_steps=400)
    # E tau by quadrature: z sums out to y ~ N(0, 1 + exp(2 tau)).
    tau = torch.linspace(-14, 8, 4001, dtype=torch.float64)
    scale = (1 + (2 * tau).exp()).sqrt()
    y = torch.tensor([0.4, -0.7, 1.0, 0.2]).double()
    log_p = dist.Normal(0.0, 2.0).log_prob(tau)
    log_p = log_p + dist.Normal(0.0, scale[:, None]).log_prob(y).sum(-1)
    weights = log_p.softmax(0)
    mean = (weights * tau).sum()
    sd = (weights * (tau - mean).square()).sum().sqrt()
    assert result.refined is not None
    draws = result.sample(8000)["tau"]
    error = abs(draws.mean() - mean) / sd
    assert (not result.trusted) or error < 0.15


def test_a_latent_without_a_variance_is_named_and_does_not_cost_the_trust():
    def model():
        pyro.sample("scale", dist.HalfCauchy(torch.ones((), dtype=torch.float64)))
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    result = fit(model, AutoIAF(model), seed=0, progress=False, max_steps=1000)
    assert result.trusted
    (sentence,) = result.advice
    assert sentence.startswith("Scale has tails without a variance: use quantiles")
    # Quartiles of a half-Cauchy: tan(π / 8), 1, tan(3 π / 8).
    draws = result.sample(4000)["scale"].quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    expected = torch.tan(torch.pi / 8 * torch.tensor([1.0, 2.0, 3.0]).double())
    torch.testing.assert_close(draws, expected, rtol=0.2, atol=0)


def test_a_run_whose_chains_never_mix_ends_at_their_budget(monkeypatch):
    verdict = import_module("pyro_flows_ext.infer.training.verdict")
    monkeypatch.setattr(verdict, "TOTAL_GRADIENTS", 30)
    few = partial(refine_density, num_chains=8)
    monkeypatch.setattr(
        verdict, "refine_density", lambda *args, **kw: few(*args, **{**kw, "max_gradients": 40})
    )
    result = fit(funnel, AutoMultivariateNormal(funnel), seed=0, progress=False)
    assert result.reason == "level"
    assert not result.trusted
    assert result.steps <= 500
    assert any("Chains do not mix" in text for text in result.advice)


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 10.0))
    parts = dist.Normal(torch.tensor([-6.0, 6.0], dtype=torch.float64), 0.3)
    pyro.factor("parts", parts.log_prob(z.unsqueeze(-1)).logsumexp(-1))


def test_a_mode_that_is_not_covered_is_named():
    result = fit(two_modes, AutoIAF(two_modes), seed=0, progress=False, max_steps=300)
    if result.trusted:  # only where draws visit both
        assert 0.3 < (result.sample(2000)["z"] > 0).double().mean() < 0.7
    else:
        assert any("not covered" in line or "mix" in line for line in result.advice)


@config_enumerate
def enumerated(y=Y):
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(b * X + 0.2 * z, 0.5), obs=y)


def test_enumerated_latents_are_summed_out_by_themselves():
    guide = AutoIAF(poutine.block(enumerated, hide=["z"]))
    result = fit(enumerated, guide, seed=0, progress=False)
    covariance = 25 * X[:, None] * X + 0.25 * torch.eye(30, dtype=torch.float64)
    means = torch.tensor([0.0, 0.2], dtype=torch.float64)[:, None].expand(2, 30)
    parts = dist.MultivariateNormal(means, covariance).log_prob(Y)
    expected = (parts + torch.tensor([0.7, 0.3]).log()).logsumexp(0).item()
    assert result.trusted
    assert result.importance.log_evidence == pytest.approx(expected, abs=0.02)
    again = importance(enumerated, guide, num_samples=500)
    assert again.log_evidence == pytest.approx(expected, abs=0.05)


# --- refusals ---


def test_a_broadcast_likelihood_is_refused_as_by_svi():
    with pytest.raises(ValueError, match=r"invalid log_prob shape"):
        fit(regression, AutoIAF(regression), X[:, None], Y, progress=False)


def test_forgotten_data_are_named_at_once():
    guide = AutoIAF(regression)
    guide.setup(X, Y)
    with pytest.raises(ValueError, match="latent 'y' of the model"):
        fit(regression, guide, X, None, progress=False)
    with pytest.raises(ValueError, match="latent 'y' of the model"):
        importance(regression, guide, X, None)


def test_points_have_no_weights():
    guide = AutoDelta(regression)
    with pytest.warns(UserWarning, match="points"):
        result = fit(regression, guide, num_steps=20, progress=False)
    assert not result.trusted
    with pytest.raises(ValueError, match=r"\['b'\] are points"):
        importance(regression, guide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ess": 1.0}, r"target_ess: expected a number in \(0, 1\)"),
        ({"max_steps": 0}, "max_steps: expected a positive integer"),
        ({"refine": "never"}, 'refine: expected True, False or "auto"'),
        ({"resume": True}, "resume: expected checkpoint="),
    ],
    ids=["ess", "steps", "refine", "resume"],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        fit(regression, AutoIAF(regression), progress=False, **options)


# --- the contract of a run ---


def test_a_guide_that_was_only_called_is_warm_started():
    for call in (False, True):
        pyro.clear_param_store()
        guide = AutoPlanar(regression)
        if call:
            guide()
        result = fit(regression, guide, num_steps=5, seed=0, progress=False)
        assert result.warm_start is not None
    trained = fit(regression, guide, num_steps=5, seed=0, progress=False)
    assert trained.warm_start is None


def test_callbacks_see_the_run_and_may_end_it():
    steps = []

    def callback(state):
        steps.append(state.step)
        state.stop = True

    guide = AutoNormal(regression)
    result = fit(regression, guide, callback=callback, refine=False, seed=0, progress=False)
    assert steps
    assert result.steps == steps[-1]
    assert result.reason in ("interrupted", "trusted")


def test_an_interrupt_keeps_the_state_so_far():
    def callback(state):
        if state.step >= 50:
            raise KeyboardInterrupt

    guide = AutoNormal(regression)
    result = fit(regression, guide, num_steps=1000, callback=callback, progress=False)
    assert result.reason == "interrupted"
    assert not result.trusted
    assert result.steps == 50
    assert all(p.isfinite().all() for p in guide.parameters())


def test_a_run_that_stops_being_finite_keeps_the_best_state():
    broken = []

    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("skewed", -((b[..., 0] - b[..., 1].square()) / 0.2).square())
        if broken:  # its gradient is NaN, its value is not
            pyro.factor("broken", (b * 0).sqrt().sum(-1))

    def callback(state):
        if state.round == 1:
            broken.append(1)

    guide = AutoNormal(model)
    with pytest.warns(UserWarning, match="100 of 200 steps had no finite loss"):
        result = fit(
            model, guide, callback=callback, max_steps=2000, refine=False, seed=0, progress=False
        )
    assert result.reason == "not finite"
    assert not result.trusted
    assert "100 steps in a row" in result.advice[0]
    assert str(result).startswith("Not trusted: steps stopped being finite (ESS")
    assert all(p.isfinite().all() for p in guide.parameters())


def test_a_run_that_is_never_finite_raises():
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("broken", (b * 0).sqrt())

    with pytest.raises(FloatingPointError, match="100 steps in a row"):
        fit(model, AutoNormal(model), max_steps=2000, refine=False, seed=0, progress=False)


def losses_of(path, resume, stop_at=None, guide_class=AutoSylvester, **options):
    def callback(state):
        if stop_at is not None and state.step >= stop_at:
            raise RuntimeError("killed")

    pyro.clear_param_store()
    options = {"num_steps": 200, "warm_start": False, **options}
    return fit(
        regression,
        guide_class(regression),
        checkpoint=path,
        resume=resume,
        callback=callback,
        seed=3,
        progress=False,
        **options,
    ).losses


@pytest.mark.parametrize("guide_class", [AutoSylvester, AutoNormal])
def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(
    tmp_path, monkeypatch, guide_class
):
    monkeypatch.setattr("pyro_flows_ext.infer.training.checkpoint.SAVE_SECONDS", 0.0)
    path = tmp_path / "fit.ckpt"
    whole = losses_of(path, False, guide_class=guide_class)
    path.unlink()
    with pytest.raises(RuntimeError, match="killed"):
        losses_of(path, False, stop_at=100, guide_class=guide_class)
    torch.testing.assert_close(
        losses_of(path, True, guide_class=guide_class), whole, rtol=0, atol=0
    )
    assert len(list(tmp_path.iterdir())) == 1


def correlated():
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("close", -0.5 * ((w[..., 0] - w[..., 1]) / 0.05) ** 2)


def test_a_run_killed_in_its_last_check_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    def run(guide, resume):
        pyro.clear_param_store()
        options = {"refine": False, "max_steps": 3000, "seed": 1, "progress": False}
        path = tmp_path / "fit.ckpt"
        return fit(correlated, guide(correlated), checkpoint=path, resume=resume, **options)

    monkeypatch.setattr("pyro_flows_ext.infer.training.run.LEVEL_ROUNDS", 1)
    whole = run(AutoNormal, False)
    assert whole.reason == "level"
    (tmp_path / "fit.ckpt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("pyro_flows_ext.infer.training.run.Run._is_trusted_at_last", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(AutoNormal, False)
    resumed = run(AutoNormal, True)
    assert resumed.reason == "level"
    torch.testing.assert_close(resumed.losses, whole.losses, rtol=0, atol=0)
    assert resumed.elbo == whole.elbo


def test_a_resumed_run_keeps_its_number_of_particles(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_flows_ext.infer.training.checkpoint.SAVE_SECONDS", 0.0)
    module = import_module(
        "pyro_flows_ext.infer.training.fit"
    )  # the package has a function of this name
    monkeypatch.setattr(module, "DEAR_SECONDS", math.inf)
    path = tmp_path / "fit.ckpt"
    whole = losses_of(path, False, num_steps=60)
    path.unlink()
    with pytest.raises(RuntimeError, match="killed"):
        losses_of(path, False, stop_at=50, num_steps=60)
    # On a slower machine the default would be fewer.
    monkeypatch.setattr(module, "DEAR_SECONDS", 0.0)
    torch.testing.assert_close(losses_of(path, True, num_steps=60), whole, rtol=0, atol=0)


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    write = "import os, sys; os.fsync = lambda _: os.kill(os.getpid(), 9); import pyro_flows_ext.files as f; "
    killed = [sys.executable, "-c", write + "f.write_atomically(sys.argv[1], b'half')"]
    path = tmp_path / "fit.ckpt"
    subprocess.run([*killed, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    losses_of(path, False, num_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_guide_is_refused(tmp_path):
    path = tmp_path / "fit.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_flows_ext.infer.training.checkpoint.SAVE_SECONDS", 0.0)
        losses_of(path, False)
    with pytest.raises((ValueError, RuntimeError)):
        losses_of(path, True, guide_class=AutoIAF)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a checkpoint of fit"):
        losses_of(path, True)


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("pyro_flows_ext.infer.training.progress.LINE_SECONDS", 0.0)
    fit(regression, AutoNormal(regression), num_steps=3, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("training: step 2") for line in lines)
    assert not any("nan" in line for line in lines)
    assert math.isfinite(float(lines[-1].split("ELBO ")[1].split(",")[0]))


def test_misspelled_options_reach_the_model_and_raise():
    with warnings.catch_warnings(), pytest.raises(TypeError, match="num_step"):
        fit(regression, AutoNormal(regression), num_step=3, progress=False)


def test_a_resumed_run_goes_on_counting_rounds_without_chains(monkeypatch, tmp_path):
    verdict = import_module("pyro_flows_ext.infer.training.verdict")
    run = import_module("pyro_flows_ext.infer.training.run")
    monkeypatch.setattr(verdict, "LEAST_EFFICIENCY_AT_START", 2.0)
    monkeypatch.setattr(verdict, "LEAST_EFFICIENCY", 2.0)
    monkeypatch.setattr(verdict, "MAX_DECLINED", 100)
    monkeypatch.setattr(verdict, "MAX_GRADIENTS", 40)
    monkeypatch.setattr(run, "FIRST_ROUND", 5)
    path, declined = tmp_path / "run.ckpt", []

    def stop(state):
        state.stop = True

    for resume in (False, True):
        pyro.clear_param_store()
        fit(
            funnel,
            AutoIAF(funnel),
            seed=0,
            target_ess=0.9999,
            checkpoint=path,
            resume=resume,
            callback=stop,
            progress=False,
        )
        declined.append(torch.load(path, weights_only=True)["num_declined"])
    # One before training and one a round.
    assert declined == [2, 3]
