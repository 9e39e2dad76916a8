"""Values, log-dets and densities of the flows of zuko, at the same parameters."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from golden import (
    TOLERANCE,
    ReadAs,
    affine,
    celu_inverse,
    compare_at,
    copy_made,
    copy_mlp,
    raw_of_knots,
)
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.ops import rq_spline

# Not imported here: see the script.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("zuko") is None, reason="zuko is not installed"
)

D, BINS = 4, 5
HIDDEN = (12, 12)


@pytest.fixture(scope="module")
def zuko(tmp_path_factory):
    """What the script writes."""
    path = tmp_path_factory.mktemp("zuko") / "values.pt"
    script = Path(__file__).with_name("zuko_values.py")
    process = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return torch.load(path, weights_only=True)


def bounded(raw):
    """Their way to keep a log-scale, or the logarithm of a slope, between ±log 1000."""
    return raw / (1 + (raw / math.log(1000)).abs())


def raw_of_zuko(theta, dim=-2):
    """Splines: sizes by a softmax of what is bounded by ±log 1000 / 2, with no least part; slopes by the exponential."""
    *sizes, slopes = theta.split([BINS, BINS, BINS - 1], dim)
    widths, heights = ((bounded(2 * part) / 2).softmax(dim) for part in sizes)
    return raw_of_knots(widths, heights, bounded(slopes).exp(), dim)


def spline(found):
    raw = raw_of_zuko(found["theta"], -1)

    class Spline:
        def forward_and_ladj(self, x):
            return self.run(x, inverse=False)

        def inverse_and_ladj(self, y):
            return self.run(y, inverse=True)

        def run(self, x, inverse):
            y, ladj = rq_spline(x, raw, bound=3.0, inverse=inverse)
            return y, ladj.sum(-1)

    return Spline()


def lu_linear(found):
    """The factor below has the diagonal there, the one above here: L U = (L D⁻¹) (D U)."""
    lu, ours = found["lu"], T.LULinear(D, bias=False).double()
    diagonal = lu.diagonal()
    lower, upper = lu.tril(-1) / diagonal, diagonal[:, None] * lu.triu(1)
    with torch.no_grad():
        ours.lu.copy_(torch.diagonal_scatter(lower + upper, celu_inverse(diagonal - 1)))
    return ours


def permute(found):
    return T.Permute(found["permutation"])


# --- flows, of which the forward pass goes from the data to the base ---


def autoregressive(transformer, convert):
    def make(found):
        context_dim = found["context"].shape[-1]
        parts = []
        for part in found["parts"]:
            ours = T.Autoregressive(
                D,
                HIDDEN,
                transformer=ReadAs(transformer, convert),
                order=part["order"].argsort(),  # theirs is the place of each variable
                residual=False,
                context_dim=context_dim,
            ).double()
            layers = [(layer["weight"], layer["bias"], layer["mask"]) for layer in part["layers"]]
            (weight, bias, mask), *rest = layers
            first = weight[:, :D], bias, mask[:, :D]
            context_weight = weight[:, D:] if context_dim else None
            copy_made(ours.net, [first, *rest], context_weight=context_weight)
            parts.append(ours.condition(found["context"]))
        return T.ComposeFlow(parts)

    return make


def coupling(transformer, convert):
    def make(found):
        parts = []
        for part in found["parts"]:
            ours = T.Coupling(
                D,
                HIDDEN,
                transformer=ReadAs(transformer, convert),
                mask=part["mask"],
                activation=nn.Tanh,
            ).double()
            layers = [(layer["weight"], layer["bias"]) for layer in part["layers"]]
            copy_mlp(ours.net, layers, ours.transformer.num_params)
            parts.append(ours)
        return T.ComposeFlow(parts)

    return make


AFFINE = affine(bounded)
SPLINE = T.RationalQuadratic(BINS, 5.0)

FLOWS = {
    "maf": autoregressive(T.Affine(), AFFINE),
    "maf_in_a_context": autoregressive(T.Affine(), AFFINE),
    "nsf": autoregressive(SPLINE, raw_of_zuko),
    "realnvp": coupling(T.Affine(), AFFINE),
    "nsf_c": coupling(SPLINE, raw_of_zuko),
}
TRANSFORMS = {"spline": spline, "lu_linear": lu_linear, "permute": permute, **FLOWS}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_log_dets(name, zuko):
    found = zuko[name]
    ours = TRANSFORMS[name](found)
    compare_at(found["x"], ours.forward_and_ladj, (found["forward"], found["forward ladj"]))
    compare_at(found["y"], ours.inverse_and_ladj, (found["inverse"], found["inverse ladj"]))


@pytest.mark.parametrize("name", FLOWS)
def test_densities(name, zuko):
    found = zuko[name]
    base = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    ours = dist.TransformedDistribution(base, [FLOWS[name](found).inv])
    torch.testing.assert_close(
        ours.log_prob(found["x"]), found["log_prob"], rtol=TOLERANCE, atol=TOLERANCE
    )
