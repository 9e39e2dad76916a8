"""What may change between two calls of `CompiledSVI`: parameters, modules, and what the graph has as a constant."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from test_steps import DATA, Graphs, compiled, guide, model
from torch import nn

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import AnnealedELBO, linear
from pyro_flows_ext.infer.compiled import CompiledSVI
from pyro_flows_ext.infer.compiled.signature import FACTOR, FIRST_CHECK


def test_parameters_written_by_hand_are_seen() -> None:
    svi = compiled(lr=0.0)
    svi.run(3)
    with torch.no_grad():
        pyro.param("loc").unconstrained().fill_(7.0)
    pyro.set_rng_seed(0)
    loss = svi.step()
    pyro.set_rng_seed(0)
    assert loss == pytest.approx(svi.evaluate_loss(), rel=1e-5)
    assert svi.fallback_reason is None


def test_a_store_that_was_cleared_is_seen() -> None:
    svi = compiled()
    svi.run(5)
    pyro.clear_param_store()
    svi.run(3)
    assert svi.fallback_reason is None
    assert abs(pyro.param("loc").item()) < 1
    assert pyro.param("loc").item() != 0


@pytest.mark.filterwarnings("ignore:bias was not registered")
def test_a_frozen_parameter_stays() -> None:
    net = nn.Linear(1, 1)

    def with_net() -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(z.reshape(1)), 1.0).to_event(1), obs=torch.ones(1))

    svi = compiled(with_net, lambda: guide())
    svi.run(3)
    net.bias.requires_grad_(False)
    before, weight = net.bias.item(), net.weight.item()
    svi.run(3)
    assert net.bias.item() == before
    assert net.weight.item() != weight


def test_views_of_a_parameter_are_refused() -> None:
    net = nn.Linear(2, 2)
    view = net.weight.detach().t()

    def tied() -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(view[0] * z), 1.0).to_event(1), obs=DATA[:2])

    svi = compiled(tied, lambda: guide())
    with pytest.warns(UserWarning, match="shares its memory"):
        svi.run(3)


def test_modes_and_buffers_of_modules_are_seen() -> None:
    """Running statistics are those of the handlers, and evaluation mode, where they are used, makes another graph."""
    graphs, states = Graphs(), []
    for make in ("eager", "compiled"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = nn.BatchNorm1d(1, momentum=0.3)

        def normalized(net: nn.Module = net) -> None:
            pyro.module("net", net)
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(net(z.unsqueeze(-1)), 1.0).to_event(2), obs=DATA.unsqueeze(-1)
            )

        def wide_guide() -> None:
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0).to_event(1))

        if make == "eager":
            svi: Any = SVI(normalized, wide_guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
        else:
            svi = compiled(normalized, wide_guide, backend=graphs)
        losses = [svi.step() for _ in range(5)]
        net.eval()
        losses += [svi.step() for _ in range(3)]
        states.append((losses, {k: v.clone() for k, v in net.state_dict().items()}))
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)
    assert states[0][1]["num_batches_tracked"] == 5
    assert graphs.count == 2


def test_a_constant_of_the_graph_that_changes_is_noticed_later() -> None:
    """Large arrays of numpy are not compared at every step, and the graph is compared with the handlers."""
    scales = np.ones(10_000)

    def changing() -> None:
        z = pyro.sample("z", dist.Normal(0.0, float(scales[0])))
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[0])

    svi = compiled(changing, lambda: guide())
    svi.run(FIRST_CHECK + 2)
    assert svi.fallback_reason is None
    scales[0] = 0.5
    with pytest.warns(UserWarning, match="does not reproduce the program"):
        svi.run(FACTOR * FIRST_CHECK)
    svi.retrace()
    svi.run(3)
    assert svi.fallback_reason is None


def test_flow_guides_are_read_at_any_time() -> None:
    """Draws and densities between calls are those of the present parameters, not of a pass that a flow remembers."""
    guide = AutoIAF(model)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="eager")
    at = {"z": torch.tensor([0.1, 0.5])}
    means = []
    for steps in (3, 20):
        svi.run(steps)
        means.append(guide.sample_posterior(1000)["z"].mean())
        with torch.no_grad():
            assert torch.equal(guide.log_prob(at), copy.deepcopy(guide).log_prob(at))
    assert abs(means[1] - means[0]) > 0.05
    assert svi.fallback_reason is None


def test_annealing_counts_every_step() -> None:
    loss = AnnealedELBO(Trace_ELBO(), linear(40), term="likelihood")
    compiled(loss=loss, steps_per_call=3).run(13)
    assert loss.steps == 13
