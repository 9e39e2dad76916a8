"""What `AutoAmortizedFlow` refuses, rather than train it silently wrong."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_models import encoder, linear, simulate
from pyro import poutine
from torch import nn

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoAmortizedFlow, AutoPlanar
from pyro_flows_ext.transforms import planar, realnvp

X = simulate(6)


def normal(loc=0.0):
    return dist.Normal(loc, 1.0)


def local(fn=normal, **options):
    """One latent in the plate of the data."""

    def model(x):
        with pyro.plate("data", len(x), **options):
            pyro.sample("z", fn())

    return model


def global_latents(x):
    mu, nu = pyro.sample("mu", normal()), pyro.sample("nu", normal())
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(mu + nu))


def two_plates(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal())
    with pyro.plate("others", 3):
        pyro.sample("w", normal())


def crossed(x):
    with pyro.plate("data", len(x), dim=-1), pyro.plate("groups", 3, dim=-2):
        pyro.sample("z", normal())


def within(x, subsample_size=2):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, subsample_size=2, dim=-1):
        pyro.sample("z", normal())


def loop(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z{i}", normal())


def none(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", normal(), obs=x[:, 0])


def undeclared(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))


def bounds_by_datum(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.0, torch.arange(1.0, 7.0)))


def bounds_by_latent(x):
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.0, tau))


def scales(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal())
        with poutine.scale(scale=0.5):
            pyro.sample("w", normal())


def mask_within(x):
    mask = poutine.mask(mask=torch.tensor([True, True, False]))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, dim=-1), mask:
        pyro.sample("z", normal())


MODELS = {
    "global": (global_latents, {}, r"latents \['mu', 'nu'\] are global.*AutoGuideList"),
    "two-plates": (two_plates, {}, "latents have no plate in common"),
    "named-plate": (two_plates, {"plate": "data"}, r"\['w'\] are outside of plate 'data'"),
    "unknown-plate": (
        two_plates,
        {"plate": "rows"},
        r"expected a plate that has latents in it, one of \['data', 'others'\]",
    ),
    "which-plate": (crossed, {}, r"latents lie in the plates \['data', 'groups'\]: name"),
    "left": (crossed, {"plate": "data"}, "'groups' at dim -2, left of the data plate"),
    "subsample-within": (
        within,
        {"plate": "data"},
        "'items', which subsamples 2 of 3 within a datum",
    ),
    "loop": (loop, {}, "plate 'data': expected one with a size, used by `with`"),
    "none": (none, {}, "model: expected latents in a plate"),
    "undeclared": (undeclared, {}, "more dimensions than its plates"),
    "discrete": (local(lambda: dist.Bernoulli(0.5)), {}, "'z' is discrete"),
    "support-by-datum": (bounds_by_datum, {}, "'z' has a support that differs between data"),
    "support-by-latent": (
        poutine.block(bounds_by_latent, hide=["tau"]),
        {},
        "'z' has a support that changes from run to run",
    ),
    "scales": (scales, {}, "same poutine.scale, since .* got a scale of their own each"),
    "mask-within": (mask_within, {"plate": "data"}, "mask of shape .* differs within a datum"),
    "boundary": (
        local(lambda: dist.Exponential(1.0)),
        {"init_loc_fn": lambda site: torch.zeros(6)},
        "boundary of its support",
    ),
}


@pytest.mark.parametrize(("model", "options", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_it_cannot_stand_for(model, options, message):
    guide = AutoAmortizedFlow(model, encoder(), **options)
    with pytest.raises(ValueError, match=message):
        guide.setup(X)
    assert guide.prototype_trace is None


ARGUMENTS = {
    "encoder": (lambda: AutoAmortizedFlow(linear, torch.tanh), TypeError, "encoder: expected"),
    "name": (lambda: make(flow="spiral"), ValueError, "expected one of planar"),
    "type": (lambda: make(flow=3), TypeError, "flow: expected a name, None or a callable"),
    "options": (
        lambda: make(flow=None, num_layers=2),
        ValueError,
        "expected None where flow is not a name",
    ),
    "scale": (lambda: make(init_scale=0.0), ValueError, "init_scale"),
    "inputs": (lambda: make(encoder_inputs="x"), TypeError, "encoder_inputs: expected a function"),
    "not-set-up": (lambda: make().log_prob({}, X), ValueError, "call guide.setup"),
    "layers": (lambda: make(num_layers=0).setup(X), ValueError, "num_layers"),
    "no-flow": (lambda: make(flow=lambda d, h: nn.Linear(d, h)).setup(X), TypeError, "parts"),
    "dimension": (lambda: make(flow=lambda d, h: planar(d + 1)).setup(X), ValueError, "shape"),
    "one-dimension": (
        lambda: AutoAmortizedFlow(local(), encoder(), flow="realnvp").setup(X),
        ValueError,
        "a coupling layer needs two elements",
    ),
    "features": (
        lambda: AutoAmortizedFlow(linear, nn.Flatten(0)).setup(X),
        ValueError,
        r"encoder: expected an output of shape \(6, H\)",
    ),
    "no-rows": (
        lambda: AutoAmortizedFlow(local(), encoder()).setup([0.0] * 6),
        ValueError,
        "expected a tensor with the 6 rows of plate 'data'",
    ),
}


def make(**options):
    return AutoAmortizedFlow(linear, encoder(), **options)


@pytest.mark.parametrize(("call", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_arguments_that_change_the_latents_of_a_datum():
    def model(x, dim):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(int(dim)), 1.0).to_event(1))

    guide = AutoAmortizedFlow(model, encoder())
    guide.setup(X, 2)
    with pytest.raises(ValueError, match=r"the latents of a datum are .*\(3,\)"):
        guide(X, 3)
    assert guide(X[:4], 2)["z"].shape == (4, 2)


def test_a_latent_that_appears_with_other_arguments_is_named():
    """The guide cannot tell it from data that are left out; whoever runs both refuses."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal())
            if len(x) == 5:
                pyro.sample("w", normal())

    guide = AutoAmortizedFlow(model, encoder())
    guide.setup(X)
    with pytest.raises(ValueError, match="latent 'w' of the model"):
        importance(model, guide, X[:5])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "expected the sites"),
        ({"z": torch.zeros(4, 6, 3)}, r"samples\['z'\]: expected shape"),
        ({"z": torch.zeros(4, 5, 2)}, r"expected values of shape \(\*, 6, \*\)"),
    ],
    ids=["sites", "shape", "rows"],
)
def test_log_prob_refuses_what_does_not_fit(samples, message):
    guide = make()
    guide.setup(X)
    with pytest.raises(ValueError, match=message):
        guide.log_prob(samples, X)


def test_guides_over_all_latents_name_it():
    with pytest.raises(ValueError, match=r"which subsamples 4 of 6.*AutoAmortizedFlow"):
        AutoPlanar(local(subsample_size=4)).setup(X)


def test_a_flow_that_sees_no_context_is_one():
    """A flow of its own, the same for every datum, is placed by the datum."""
    guide = make(flow=lambda d, h: realnvp(d, num_layers=2))
    guide.setup(X)
    assert guide.log_prob(guide.sample_posterior(3, X), X).shape == (3, 6)


def test_bounds_that_change_with_the_value_of_an_argument():
    """Arguments of the same shapes: the bounds of the setup would be wrong in silence."""

    def bounded(x, top):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = AutoAmortizedFlow(bounded, encoder())
    guide.setup(X, torch.tensor(1.0))
    guide(X, torch.tensor(1.0))
    with pytest.raises(ValueError, match="latent 'z' has a support that changes"):
        guide(X, torch.tensor(10.0))
