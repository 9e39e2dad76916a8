"""Values and log-dets of the flows of normflows, at the same parameters."""

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
    of_module,
    raw_of_durkan,
    softplus_inverse,
)
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms.residual import LogDetNoise

flows = pytest.importorskip("normflows.flows", reason="normflows is not installed")
residual = pytest.importorskip("normflows.flows.residual", reason="normflows is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning"),  # theirs
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script:DeprecationWarning"
    ),  # torch's own formulas
]

D = 4
IMAGE = (4, 4, 2)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def theirs(module):
    return perturb(module.double()).eval()


def planar():
    flow = theirs(flows.Planar((D,)))
    w, u = flow.w, flow.u
    wu = (w * u).sum()
    wu_hat = F.softplus(wu) - 1  # of their û
    ours = T.planar(D).double()
    with torch.no_grad():
        ours.w.copy_(w)
        ours.u.copy_(u + (celu_inverse(wu_hat) - wu) * w / (w * w).sum())
        ours.b.copy_(flow.b)
    return Pair(ours, forward=flow.forward)


def radial():
    flow = flows.Radial((D,)).double()
    with torch.no_grad():
        flow.alpha.fill_(-0.8)
        flow.beta.fill_(1.5)
    alpha = flow.alpha.abs()
    beta = F.softplus(flow.beta) - alpha
    ours = T.radial(D).double()
    with torch.no_grad():
        ours.x0.copy_(flow.z_0)
        ours.alpha_raw.copy_(softplus_inverse(alpha - 1e-3))
        ours.beta_raw.copy_(celu_inverse(beta / alpha))
    return Pair(ours, forward=flow.forward)


def lu_linear_with_permutation():
    flow = theirs(flows.LULinearPermute(D))
    lower, upper = flow.linear._create_lower_upper()
    lu = torch.diagonal_scatter(lower + upper, celu_inverse(upper.diagonal() - 1))
    # Permuted before the product there, after it here.
    ours = T.ComposeFlow([T.Permute(flow.permutation._permutation), T.LULinear(D).double()])
    with torch.no_grad():
        ours[1].lu.copy_(lu)
        ours[1].bias.copy_(flow.linear.bias)
    return Pair(ours, **of_module(flow, inverted=True))


def squeeze():
    # Theirs squeezes in the inverse pass.
    return Pair(T.Squeeze(2), **_expanded(flows.Squeeze(), inverted=True), event_shape=(3, 4, 2))


def _expanded(flow, **options):
    """Some of their log-dets are one number for all rows, or no tensor."""

    def expand(run):
        def with_rows(x):
            y, ladj = run(x)
            return y, torch.as_tensor(ladj, dtype=x.dtype).expand(len(x))

        return with_rows

    return {name: expand(run) for name, run in of_module(flow, **options).items()}


# --- couplings ---


SCALES = {
    "exp": lambda scale: scale,
    "sigmoid": lambda scale: -F.logsigmoid(scale + 2),
    "sigmoid_inv": lambda scale: F.logsigmoid(scale + 2),
}


def affine_coupling(scale_map="exp"):
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
    flow = theirs(flows.AffineCouplingBlock(net, scale_map=scale_map))
    ours = T.Coupling(
        4, transformer=ReadAs(T.Affine(), affine(SCALES[scale_map])), net=ParametersFirst(net, 2)
    )
    return Pair(ours, **of_module(flow))


def affine_coupling_sigmoid():
    return affine_coupling("sigmoid")


def masked_affine_of_images():
    """With a checkerboard: what is to be transformed is zero in the input of the network, here as there."""
    shape = (2, 3, 4)
    ours = T.Coupling(
        shape, transformer=ReadAs(T.Affine(), affine(SCALES["exp"])), mask="checkerboard"
    )
    shift, scale = (perturb(nn.Conv2d(2, 2, 3, padding=1).double()) for _ in range(2))

    class Both(nn.Module):
        def forward(self, x):
            return torch.cat([shift(x), scale(x)], -3)

    ours.net = Both()
    flow = flows.MaskedAffineFlow(ours.mask.double(), shift, scale)
    return Pair(ours, **of_module(flow), event_shape=shape)


def glow_block():
    flow = theirs(flows.GlowBlock(4, 5, scale_map="sigmoid"))
    coupling, convolution, norm = flow.flows
    convolution.sign_S.fill_(1.0)  # our U has a positive diagonal
    net = ParametersFirst(coupling.flows[1].param_map, 2)
    mixing, ours_norm = T.Invertible1x1Conv(4).double(), T.ActNorm(4).double()
    norm.data_dep_init_done = torch.tensor(1.0)
    with torch.no_grad():
        ours_norm.loc.copy_(norm.t.flatten())
        ours_norm.log_scale.copy_(norm.s.flatten())
        upper = convolution.U.triu(1) + convolution.L.tril(-1)
        diagonal = celu_inverse(convolution.log_S.expm1())
        mixing.transform.lu.copy_(torch.diagonal_scatter(upper, diagonal))
        mixing.transform.permutation.copy_(convolution.P.argmax(1))
    ours = T.ComposeFlow(
        [
            T.Coupling(IMAGE, transformer=ReadAs(T.Affine(), affine(SCALES["sigmoid"])), net=net),
            mixing.inv,  # W⁻¹ on the way from base to data there
            T.Pixelwise(ours_norm),
        ]
    )
    return Pair(ours, **of_module(flow), event_shape=IMAGE)


class Constant(nn.Module):
    """Parameters that depend on nothing: a transform of each variable by itself as a coupling."""

    def __init__(self, theta):
        super().__init__()
        self.theta = theta

    def forward(self, x):
        return self.theta.expand(*x.shape[:-1], -1)


def coupled_spline():
    """Some variables by the others, and these by splines of their own."""
    flow = theirs(flows.CoupledRationalQuadraticSpline(5, 1, 7, num_bins=6, tail_bound=3.0))
    coupling = flow.prqct
    mask = torch.ones(5, dtype=torch.bool)
    mask[coupling.transform_features] = False
    own = coupling.unconditional_transform
    theta = [own.unnormalized_widths, own.unnormalized_heights, own.unnormalized_derivatives]
    own = Constant(torch.cat(theta, -1).mT.flatten())
    net = ParametersFirst(coupling.transform_net, 3 * 6 - 1)
    # Theirs divides widths and heights by √(hidden units).
    spline = T.RationalQuadratic(6, 3.0)
    by_others = ReadAs(spline, lambda theta: raw_of_durkan(theta, 7**0.5))
    by_themselves = ReadAs(spline, raw_of_durkan)
    ours = T.ComposeFlow(
        [
            T.Coupling(5, transformer=by_others, mask=mask, net=net),
            T.Coupling(5, transformer=by_themselves, mask=~mask, net=own),
        ]
    )
    return Pair(ours, **of_module(flow, inverted=True), event_shape=(5,))


# --- residual flows ---


def contraction(dim):
    net = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, dim)).double()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(0.8 / torch.linalg.matrix_norm(layer.weight, 2))
    return net


def residual_flow():
    """In two dimensions, where theirs is exact too. Its other direction stops at 1e-3."""
    net = contraction(2)
    ours = T.ResidualFlow(2, net=net, lipschitz=0.7).eval()
    return Pair(ours, forward=flows.Residual(net).eval().inverse, event_shape=(2,))


CASES = [
    planar,
    radial,
    lu_linear_with_permutation,
    squeeze,
    affine_coupling,
    affine_coupling_sigmoid,
    masked_affine_of_images,
    glow_block,
    coupled_spline,
    residual_flow,
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_values_and_log_dets(make):
    compare(make())


def of_residual(net, x, noise, **options):
    flow = T.ResidualFlow(3, net=net, lipschitz=0.7, **options)
    return flow.with_noise(noise).forward_and_ladj(x)[1]


def test_estimated_log_det_of_a_residual_flow():
    net, x, v = contraction(3), randn(ROWS, 3).requires_grad_(), randn(ROWS, 3)
    weights = (1.0, 1.0, 2.0, 4.0, 8.0)
    expected = residual.basic_logdet_estimator(
        net(x), x, len(weights), v, lambda k: weights[k - 1], True
    )
    actual = of_residual(net, x, LogDetNoise(v[None], weights))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_neumann_gradient_of_a_residual_flow():
    """Over all unit vectors, where the estimates of both are a trace."""
    net, x = contraction(3), randn(ROWS, 3).requires_grad_()
    by_row = randn(ROWS)  # a factor for each row, as in importance-weighted bounds
    probes = 3**0.5 * torch.eye(3, dtype=torch.float64)[:, None].expand(3, ROWS, 3)
    # Theirs takes one term more.
    expected = torch.stack(
        [residual.neumann_logdet_estimator(net(x), x, 5, v, lambda k: 1.0, True) for v in probes]
    ).mean(0)
    actual = of_residual(net, x, LogDetNoise(probes, (1.0,) * 6))
    grads = [
        torch.autograd.grad((by_row * ladj).sum(), list(net.parameters())[:3])
        for ladj in (actual, expected)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)
