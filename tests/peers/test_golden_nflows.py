"""Values and log-dets of the transforms of nflows, at the same parameters."""

import pytest
import torch
import torch.nn.functional as F
from golden import (
    ROWS,
    Pair,
    ParametersFirst,
    ReadAs,
    affine,
    celu_inverse,
    compare,
    copy_made,
    of_module,
    raw_of_durkan,
)
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.ops import rq_spline
from pyro_flows_ext.testing import perturb

N = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
nets = pytest.importorskip("nflows.nn.nets", reason="nflows is not installed")

# Their inverses solve by a function that torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")

D = 4
IMAGE = (4, 2, 2)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def theirs(module):
    return perturb(module.double()).eval()


def set_lu(ours, linear):
    """L, U and the bias; their diagonal is softplus + 0.001."""
    lower, upper = linear._create_lower_upper()
    diagonal = celu_inverse(upper.diagonal() - 1)
    with torch.no_grad():
        ours.lu.copy_(torch.diagonal_scatter(lower + upper, diagonal))
        ours.bias.copy_(linear.bias)


def lu_linear():
    linear = theirs(N.LULinear(D))
    ours = T.LULinear(D).double()
    set_lu(ours, linear)
    return Pair(ours, **of_module(linear))


def qr_linear():
    linear = theirs(N.QRLinear(D, num_householder=3))
    ours = T.QRLinear(D, num_reflections=3).double()
    upper = linear._create_upper()
    with torch.no_grad():
        ours.v.copy_(linear.orthogonal.q_vectors.flip(0))  # applied first to last there
        ours.r.copy_(torch.diagonal_scatter(upper, celu_inverse(upper.diagonal() - 1)))
        ours.bias.copy_(linear.bias)
    return Pair(ours, **of_module(linear))


def svd_linear():
    linear = theirs(N.SVDLinear(D, num_householder=4))
    ours = T.ComposeFlow(
        [
            T.HouseholderLinear(D, num_reflections=4),
            T.ElementwiseAffine(D),
            T.HouseholderLinear(D, num_reflections=4),
            T.ElementwiseAffine(D),
        ]
    ).double()
    with torch.no_grad():
        ours[0].v.copy_(linear.orthogonal_2.q_vectors.flip(0))
        ours[1].log_scale.copy_(linear.log_diagonal)
        ours[2].v.copy_(linear.orthogonal_1.q_vectors.flip(0))
        ours[3].loc.copy_(linear.bias)
    return Pair(ours, **of_module(linear))


def one_by_one_convolution():
    convolution = theirs(N.OneByOneConvolution(4))
    # Channels are permuted before the product there, after it here.
    ours = T.ComposeFlow(
        [
            T.Pixelwise(T.Permute(convolution.permutation._permutation)),
            T.Invertible1x1Conv(4, bias=True, permute=False).double(),
        ]
    )
    set_lu(ours[1].transform, convolution)
    return Pair(ours, **of_module(convolution), event_shape=IMAGE)


def squeeze():
    return Pair(T.Squeeze(2), **of_module(N.SqueezeTransform(2)), event_shape=(2, 4, 6))


def actnorm(pixels=False):
    norm = theirs(N.ActNorm(D))
    ours = T.ActNorm(D).double()
    with torch.no_grad():
        ours.loc.copy_(norm.shift)
        ours.log_scale.copy_(norm.log_scale)
    if pixels:
        return Pair(T.Pixelwise(ours), **of_module(norm), event_shape=(D, 3, 2))
    return Pair(ours, **of_module(norm))


def actnorm_of_images():
    return actnorm(pixels=True)


def batchnorm():
    norm = theirs(N.BatchNorm(D))
    norm.running_mean += randn(D)
    norm.running_var += 0.1 + randn(D).square()
    ours = T.batchnorm(D, eps=norm.eps).double().eval()
    with torch.no_grad():
        ours.beta.copy_(norm.bias)
        ours.gamma.copy_(norm.weight.log())
        ours.moving_mean.copy_(norm.running_mean)
        ours.moving_var.copy_(norm.running_var)
    return Pair(ours.inv, **of_module(norm))  # the forward pass normalises there


# --- networks ---


class Theirs(nn.Module):
    """A network of ours as the conditioner that a coupling layer there builds."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        return self.net(x)


def linear_net(in_features, out_features):
    return Theirs(nn.Linear(in_features, out_features))


def affine_coupling():
    coupling = theirs(N.AffineCouplingTransform([0, 1, 1, 0, 1], linear_net))
    # Theirs scales by sigmoid(· + 2) + 0.001.
    convert = affine(lambda scale: ((scale + 2).sigmoid() + 1e-3).log())
    mask = [True, False, False, True, False]
    ours = T.Coupling(
        5, transformer=ReadAs(T.Affine(), convert), mask=mask, net=coupling.transform_net
    )
    return Pair(ours, **of_module(coupling), event_shape=(5,))


def additive_coupling():
    coupling = theirs(N.AdditiveCouplingTransform([1, 0, 1, 0], linear_net))
    ours = T.Coupling(
        4, transformer=T.Additive(), mask="alternating", flip=True, net=coupling.transform_net
    )
    return Pair(ours, **of_module(coupling))


SPLINE = {"num_bins": 5, "tails": "linear", "tail_bound": 2.5}
NUM_PARAMS = 3 * 5 - 1


def spline_coupling():
    coupling = theirs(
        N.PiecewiseRationalQuadraticCouplingTransform(
            [0, 1, 0, 1], lambda n, m: nets.ResidualNet(n, m, 9), **SPLINE
        )
    )
    # Theirs divides widths and heights by √(hidden units).
    ours = T.Coupling(
        D,
        transformer=ReadAs(T.RationalQuadratic(5, 2.5), lambda theta: raw_of_durkan(theta, 9**0.5)),
        mask="alternating",
        net=ParametersFirst(coupling.transform_net, NUM_PARAMS),
    )
    return Pair(ours, **of_module(coupling))


def spline_coupling_of_images():
    coupling = theirs(
        N.PiecewiseRationalQuadraticCouplingTransform(
            [0, 0, 1, 1], lambda n, m: nets.ConvResidualNet(n, m, 9), **SPLINE
        )
    )
    ours = T.Coupling(
        IMAGE,
        transformer=ReadAs(T.RationalQuadratic(5, 2.5), lambda theta: raw_of_durkan(theta, 9**0.5)),
        mask="channel",
        net=ParametersFirst(coupling.transform_net, NUM_PARAMS),
    )
    return Pair(ours, **of_module(coupling), event_shape=IMAGE)


MADE = {"hidden_features": 12, "num_blocks": 1, "use_residual_blocks": False}
OPTIONS = {"activation": nn.ReLU, "residual": False}


def copy(ours, made):
    blocks = [made.initial_layer, *(block.linear for block in made.blocks), made.final_layer]
    copy_made(ours.net, [(layer.weight, layer.bias, layer.mask) for layer in blocks])


def affine_autoregressive():
    flow = theirs(N.MaskedAffineAutoregressiveTransform(D, **MADE))
    convert = affine(lambda scale: (F.softplus(scale) + 1e-3).log(), scale_first=True)
    ours = T.Autoregressive(
        D, (12, 12), transformer=ReadAs(T.Affine(), convert), **OPTIONS
    ).double()
    copy(ours, flow.autoregressive_net)
    return Pair(ours, **of_module(flow))


def spline_autoregressive():
    flow = theirs(N.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, **MADE, **SPLINE))
    ours = T.Autoregressive(
        D, (12, 12), transformer=ReadAs(T.RationalQuadratic(5, 2.5), raw_of_durkan), **OPTIONS
    ).double()
    copy(ours, flow.autoregressive_net)
    return Pair(ours, **of_module(flow))


CASES = [
    lu_linear,
    qr_linear,
    svd_linear,
    one_by_one_convolution,
    squeeze,
    actnorm,
    actnorm_of_images,
    batchnorm,
    affine_coupling,
    additive_coupling,
    spline_coupling,
    spline_coupling_of_images,
    affine_autoregressive,
    spline_autoregressive,
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_values_and_log_dets(make):
    compare(make())


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_spline(inverse):
    K = 8
    theta = 2 * randn(ROWS, 3 * K - 1)
    widths, heights, slopes = theta.split([K, K, K - 1], -1)
    x = 4 * torch.randn(ROWS, dtype=torch.float64)
    expected = N.splines.unconstrained_rational_quadratic_spline(
        x, widths, heights, slopes, inverse=inverse, tail_bound=3.0
    )
    raw = raw_of_durkan(theta.mT).mT
    torch.testing.assert_close(
        rq_spline(x, raw, bound=3.0, inverse=inverse), expected, rtol=0, atol=1e-9
    )
