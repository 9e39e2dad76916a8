"""`AutoAmortizedFlow` in use: training to closed forms, beside other guides, what it encodes, copies and files."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_models import FLOWS, NOISE, W, closed_form, encoder, linear, perturbed, simulate
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_flows_ext.guides import AutoAmortizedFlow, AutoSylvester
from pyro_flows_ext.infer import fit
from pyro_flows_ext.transforms import ComposeFlow, conditional_radial


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_training_finds_the_posterior_of_every_datum(flow):
    x = simulate(60)
    guide = AutoAmortizedFlow(linear, encoder(), flow=flow, num_layers=flow and 2)
    options = {"num_steps": 250, "lr": 0.05, "num_particles": 4, "progress": False, "seed": 0}
    fit(linear, guide, x, size=20, **options)
    for data, tolerance in ((x, 0.12), (simulate(30), 0.2)):  # the second never seen
        mean, sd, evidence = closed_form(data)
        samples = guide.sample_posterior(2000, data)
        off = (samples["z"].mean(0) - mean).abs() / sd
        assert off.mean() < tolerance
        log_joint = dist.Normal(0.0, 1.0).log_prob(samples["z"]).sum(-1)
        log_joint = log_joint + dist.Normal(samples["z"] @ W.mT, NOISE).log_prob(data).sum(-1)
        gap = evidence - (log_joint - guide.log_prob(samples, data)).mean(0)
        # The best Gaussian of independent coordinates stays away by the posterior's correlation.
        assert gap.mean() < (0.15 if flow is None else 0.05)


# --- beside other guides ---


def hierarchy(x, size=None, index=None):
    """x_n ~ N(z_n, .25), z_n ~ N(mu, 1), mu ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size, subsample=index) as chosen:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        x = x if chosen is None else x[chosen]
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.5).expand([*z.shape, 2]).to_event(1), obs=x)


def joined(block, make_global, **options):
    local = AutoAmortizedFlow(poutine.block(hierarchy, **block), encoder(2), flow="iaf")
    options = {k: getattr(local, v) for k, v in options.items()}
    guide = AutoGuideList(hierarchy, **options)
    guide.append(make_global(poutine.block(hierarchy, expose=["mu"])))
    guide.append(local)
    return guide


@pytest.mark.parametrize("block", [{"hide": ["mu"]}, {"expose": ["z"]}], ids=["hide", "expose"])
@pytest.mark.parametrize(
    "make_global", [AutoNormal, lambda m: AutoSylvester(m, 1)], ids=["AutoNormal", "AutoFlow"]
)
def test_in_a_list_with_a_global_guide(block, make_global):
    guide = joined(block, make_global)
    x = 1.0 + torch.randn(20, 2)
    result = fit(hierarchy, guide, x, size=5, num_steps=20, num_particles=2, progress=False)
    assert result.skipped_steps == 0
    trace = poutine.trace(guide).get_trace(x, size=5)
    assert trace.nodes["z"]["scale"] == 4
    assert trace.nodes["mu"]["scale"] == 1
    index = trace.nodes["data"]["value"]
    log_q = trace.nodes["_AutoGuideList.1_latent"]
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(
        guide[1].log_prob({"z": z}, x[index]), log_q["fn"].log_prob(log_q["value"])
    )
    assert {k: tuple(v.shape) for k, v in guide.median(x).items()} == {"mu": (), "z": (20,)}


def test_a_list_with_the_guides_own_plate_follows_the_arguments():
    guide = joined({"expose": ["z"]}, AutoNormal, create_plates="data_plate")
    x = torch.randn(20, 2)
    for data, kwargs, size, scale in (
        (x, {}, 20, 1),
        (x, {"size": 5}, 5, 4),
        (x[:6], {}, 6, 1),
        (x, {"index": torch.tensor([4, 2])}, 2, 10),
    ):
        trace = poutine.trace(guide).get_trace(data, **kwargs)
        assert trace.nodes["z"]["value"].shape == (size,)
        assert trace.nodes["z"]["scale"] == scale
        assert torch.as_tensor(Trace_ELBO().loss(hierarchy, guide, data, **kwargs)).isfinite()
    assert trace.nodes["data"]["value"].tolist() == [4, 2]


@pytest.mark.parametrize(
    ("rows", "kwargs"), [(6, {}), (20, {"index": torch.tensor([4, 2])})], ids=["size", "index"]
)
def test_a_list_that_keeps_its_plates_is_refused_other_data(rows, kwargs):
    guide = joined({"expose": ["z"]}, AutoNormal)
    guide(torch.randn(20, 2))
    with pytest.raises(ValueError, match=r"create_plates=guide\.data_plate"):
        guide(torch.randn(rows, 2), **kwargs)


# --- what it encodes ---


def supervised(label, x, *, weight=None, size=None):
    with pyro.plate("data", len(label), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        rows = x if len(x) < len(label) else x[index]
        pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=rows)


def test_a_callable_says_what_is_encoded():
    x = simulate(10, torch.float64)
    guide = perturbed(
        supervised, torch.zeros(10), x, encoder_inputs=lambda label, x, **_: x, flow="iaf"
    )
    z = torch.randn(10, 2, dtype=x.dtype)
    expected = guide.log_prob({"z": z}, torch.zeros(10), x)
    with pytest.raises(ValueError, match=r"encoder_inputs: expected a tensor of rows"):
        guide.sample_posterior(2, torch.zeros(10), torch.tensor(1.0))
    # Rows of all data are indexed, rows of the subsample are not.
    for rows in (x, x[:4]):
        trace = poutine.trace(guide).get_trace(torch.zeros(10), rows, size=4)
        index = trace.nodes["data"]["value"] if rows is x else torch.arange(4)
        values = z.clone()
        values[index] = trace.nodes["z"]["value"].detach()
        log_q = trace.nodes["_AutoAmortizedFlow_latent"]
        torch.testing.assert_close(
            guide.log_prob({"z": values}, torch.zeros(10), x)[index],
            log_q["fn"].log_prob(log_q["value"]),
        )
    assert (guide.log_prob({"z": z}, torch.zeros(10), x) == expected).all()


def test_the_first_tensor_of_as_many_rows_is_encoded_and_stays_the_one():
    def model(scale, *, x, y):
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=x)

    x, y = simulate(8), simulate(8)
    guide = AutoAmortizedFlow(model, encoder(), init_scale=0.5)
    guide.setup(torch.ones(3), x=x, y=y)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z = torch.randn(8, 2)
    log_q = guide.log_prob({"z": z}, torch.ones(3), x=x, y=y)
    assert torch.equal(guide.log_prob({"z": z}, torch.ones(3), y=y, x=x), log_q)
    with pytest.raises(ValueError, match=r"argument 'x': expected a tensor of rows"):
        guide.sample_posterior(2, torch.ones(3), y=y)
    with pytest.raises(ValueError, match=r"rows to encode have shape \(5, 3\): expected 8"):
        guide(torch.ones(3), x=x[:5], y=y)


def test_a_pyro_module_and_a_frozen_encoder_train_what_they_should():
    x = simulate(10)
    layers = PyroModule[nn.Sequential](PyroModule[nn.Linear](3, 4), nn.Tanh())
    frozen = encoder().eval().requires_grad_(False)
    for network, moves in ((layers, True), (frozen, False)):
        pyro.clear_param_store()
        guide = AutoAmortizedFlow(linear, network, flow="planar", num_layers=1)
        guide.setup(x)
        before = [p.detach().clone() for p in network.parameters()]
        fit(linear, guide, x, num_steps=3, num_particles=2, progress=False)
        changed = [bool((a != b).any()) for a, b in zip(before, network.parameters(), strict=True)]
        assert all(changed) if moves else not any(changed)
        assert guide.transform[0].hyper.net[0].weight.abs().max() > 0


def test_dtype_follows_the_encoder():
    x = simulate(6, torch.float64)
    guide = AutoAmortizedFlow(linear, encoder(dtype=torch.float64), flow="sylvester")
    guide.setup(x)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    samples = guide.sample_posterior(2, x)
    assert samples["z"].dtype == guide.log_prob(samples, x).dtype == torch.float64


# --- copies, files, other machinery of Pyro ---


def test_copies_and_files_leave_the_original_usable():
    x = simulate(8)
    guide = AutoAmortizedFlow(linear, encoder(), flow=lambda d, h: conditional_radial(d, h))
    fit(linear, guide, x, num_steps=3, num_particles=2, progress=False)
    samples = guide.sample_posterior(3, x)
    log_q = guide.log_prob(samples, x)
    deep, loaded = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    fit(linear, guide, x, num_steps=3, num_particles=2, progress=False)
    assert (guide.log_prob(samples, x) != log_q).all()
    for other in (deep, loaded):
        torch.testing.assert_close(other.log_prob(samples, x), log_q)
    with pyro.get_param_store().scope():
        fit(linear, deep, x, size=3, num_steps=2, progress=False)
    with pyro.get_param_store().scope():  # without its model, it takes the data that it is given
        assert loaded(x[:5])["z"].shape == (5, 2)
        draws = Predictive(linear, guide=loaded, num_samples=4, parallel=True)(x)
        assert draws["z"].shape == (4, 8, 2)


def test_a_guide_from_a_file_of_a_subsample():
    x = simulate(8)
    drawn, given = (AutoAmortizedFlow(linear, encoder(), num_layers=1) for _ in range(2))
    drawn.setup(x, size=3)
    given.setup(x, index=torch.tensor([4, 2]))
    drawn, given = (pickle.loads(pickle.dumps(guide)) for guide in (drawn, given))
    trace = poutine.trace(drawn).get_trace(x, size=3)
    assert trace.nodes["z"]["value"].shape == (3, 2)
    assert trace.nodes["z"]["scale"] == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="expected the model, which computes"):
        given(x, index=torch.tensor([4, 2]))
    assert given.sample_posterior(2, x)["z"].shape == (2, 8, 2)


def test_state_dict_round_trip_loads_with_weights_only():
    x = simulate(6)
    guide = perturbed(linear, x, dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    fresh = AutoAmortizedFlow(linear, encoder())
    fresh.setup(x)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    samples = guide.sample_posterior(3, x)
    torch.testing.assert_close(fresh.log_prob(samples, x), guide.log_prob(samples, x))


@pytest.mark.parametrize("make", [encoder, lambda: PyroModule[nn.Linear](3, 4)], ids=["nn", "pyro"])
def test_a_second_guide_is_refused_until_the_store_is_cleared(make):
    x = simulate(5)
    first, second = (AutoAmortizedFlow(linear, make(), num_layers=1) for _ in range(2))
    first(x)
    with pytest.raises(
        ValueError, match="already holds parameters under the name 'AutoAmortizedFlow'"
    ):
        second.setup(x)
    with pyro.get_param_store().scope():
        second(x)
    first(x)


def test_drawing_and_scoring_takes_one_pass_and_no_inverse(monkeypatch):
    x = simulate(5)
    guide = perturbed(linear, x, flow="iaf", dtype=torch.float32)
    calls = []
    for name in ("forward_and_ladj", "inverse_and_ladj"):
        method = getattr(ComposeFlow, name)
        monkeypatch.setattr(
            ComposeFlow, name, lambda t, v, name=name, f=method: (calls.append(name), f(t, v))[1]
        )
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
        linear, guide, x, size=2
    )
    assert calls == ["forward_and_ladj"] * 2  # the chain, and the preset within it


def test_jit():
    x = simulate(6)
    guide = perturbed(linear, x, dtype=torch.float32)
    options = {"num_particles": 20, "vectorize_particles": True, "max_plate_nesting": 1}
    jit, eager = JitTrace_ELBO(**options), Trace_ELBO(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns of its end, and of every shape it sees
        losses = [
            torch.tensor([elbo.loss_and_grads(linear, guide, x) for _ in range(20)])
            for elbo in (jit, eager)
        ]
    error = ((losses[0].var() + losses[1].var()) / 20).sqrt()
    assert error < 0.05 * losses[1].mean()
    assert (losses[0].mean() - losses[1].mean()).abs() < 3 * error
