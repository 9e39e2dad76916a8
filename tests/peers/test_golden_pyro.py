"""Values and log-dets of Pyro's own transforms, at the same parameters."""

import pyro.distributions.transforms as P
import pytest
import torch
import torch.nn.functional as F
from golden import (
    ROWS,
    Pair,
    ReadAs,
    affine,
    celu_inverse,
    compare,
    copy_made,
    of_transform,
    raw_of_knots,
    softplus_inverse,
)
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from pyro.ops.integrator import velocity_verlet
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.ops import rq_spline
from pyro_flows_ext.testing import perturb

D = 4


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def forward_of(transform):
    """Pyro's planar and radial transforms invert what they have just drawn, and nothing else."""
    return {"forward": of_transform(transform)["forward"]}


def planar_by_row():
    b, u, w = randn(ROWS, 1), randn(ROWS, D), randn(ROWS, D)
    theirs = ConditionedPlanar((b, u, w))
    # The same û, whose part along w is softplus(wᵀu) - 1 there and keeps above -0.999 here.
    u_hat = theirs.u_hat(u, w)
    wu_hat = (w * u_hat).sum(-1, keepdim=True)
    ours_u = u_hat + (celu_inverse(wu_hat) - wu_hat) * w / (w * w).sum(-1, keepdim=True)
    parameters = {"w": w, "u": ours_u, "b": b}
    ours = T.planar(D).double().bind({name: p.unsqueeze(-2) for name, p in parameters.items()})
    return Pair(ours, **forward_of(theirs))


def radial_by_row():
    x0, alpha_prime, beta_prime = randn(ROWS, D), randn(ROWS, 1), randn(ROWS, 1)
    alpha = F.softplus(alpha_prime)
    beta = F.softplus(beta_prime) - alpha
    ours = (
        T.radial(D)
        .double()
        .bind(
            {
                "x0": x0.unsqueeze(-2),
                "alpha_raw": softplus_inverse(alpha - 1e-3),
                "beta_raw": celu_inverse(beta / alpha),
            }
        )
    )
    return Pair(ours, **forward_of(ConditionedRadial((x0, alpha_prime, beta_prime))))


def householder():
    theirs = perturb(P.Householder(D, count_transforms=3).double())
    ours = T.HouseholderLinear(D, num_reflections=3).double()
    with torch.no_grad():
        ours.v.copy_(theirs.u_unnormed.flip(0))  # the first row is applied first there, last here
    return Pair(ours, **of_transform(theirs))


def whitening():
    loc, scale_tril = randn(D), randn(D, D).tril(-1) + torch.diag(0.5 + torch.rand(D).double())
    theirs = P.LowerCholeskyAffine(loc, scale_tril)
    return Pair(T.Whitening(loc, scale_tril), **of_transform(theirs))


def permute():
    permutation = torch.tensor([2, 0, 3, 1])
    return Pair(T.Permute(permutation), **of_transform(P.Permute(permutation)))


def batchnorm():
    theirs = perturb(P.BatchNorm(D).double(), scale=0.2).eval()
    ours = T.batchnorm(D).double().eval()
    theirs.moving_mean += randn(D)
    theirs.moving_variance += randn(D).square()
    with torch.no_grad():
        ours.beta.copy_(theirs.beta)
        ours.gamma.copy_(theirs.constrained_gamma.log())
        ours.moving_mean.copy_(theirs.moving_mean)
        ours.moving_var.copy_(theirs.moving_variance)
    return Pair(ours, **of_transform(theirs))


def convolution():
    permutation = torch.tensor([1, 2, 0])
    theirs = P.GeneralizedChannelPermute(channels=3, permutation=permutation).double()
    ours = T.Invertible1x1Conv(3).double()
    ours.transform.permutation.copy_(permutation)
    with torch.no_grad():
        # Ours has a positive diagonal.
        diagonal = 0.5 + torch.rand(3).double()
        theirs.LU.copy_(torch.diagonal_scatter(randn(3, 3), diagonal))
        ours.transform.lu.copy_(torch.diagonal_scatter(theirs.LU, celu_inverse(diagonal - 1)))
    return Pair(ours, **of_transform(theirs, 3), event_shape=(3, 4, 2))


def leapfrog():
    mass, step, num_steps = 0.5 + torch.rand(2).double(), 0.3, 4
    mix = randn(2, 2)

    def potential(z):
        return (z**2).sum(-1) / 2 + (z @ mix).cos().sum(-1)

    def theirs(x):
        z, r = x.split(2, -1)
        z, r, _, _ = velocity_verlet(
            {"z": z},
            {"z": r},
            lambda z: potential(z["z"]).sum(),
            lambda r: {"z": r["z"] / mass},
            step,
            num_steps,
        )
        return torch.cat([z["z"], r["z"]], -1).detach(), x.new_zeros(x.shape[:-1])

    ours = T.Leapfrog(potential, 2, num_steps).double()
    with torch.no_grad():
        ours.log_step.fill_(step).log_()
        ours.log_mass.copy_(mass.log())
    return Pair(ours, forward=theirs)


# --- networks: mean and log-scale, the latter clamped to [-5, 3] there ---

CLAMPED = ReadAs(T.Affine(), affine(lambda log_scale: log_scale.clamp(-5.0, 3.0)))


class Joined(nn.Module):
    """A network with two outputs as one with both in a row; an image as one long vector."""

    def __init__(self, net, image=None):
        super().__init__()
        self.net, self.image = net, image

    def forward(self, x):
        if self.image is None:
            return torch.cat(self.net(x), -1)
        return torch.cat(self.net(x.flatten(-3)), -1).unflatten(-1, self.image)


def layers(net):
    return [(layer.weight, layer.bias, layer.mask) for layer in net.layers]


def made(ours, net, context_dim=0):
    """Their weights and masks: their degrees are spread another way."""
    theirs = layers(net)
    (weight, bias, mask), *rest = theirs
    first = weight[:, context_dim:], bias, mask[:, context_dim:]
    context_weight = weight[:, :context_dim] if context_dim else None
    copy_made(
        ours.net,
        [first, *rest],
        by_variable=False,
        context_weight=context_weight,
        masks_too=True,
    )


def default_dtype_of_data(run):
    """Their inverse fills a tensor of the default dtype."""

    def with_float64(y):
        torch.set_default_dtype(torch.float64)
        try:
            return run(y)
        finally:
            torch.set_default_dtype(torch.float32)

    return with_float64


OPTIONS = {"activation": nn.ReLU, "residual": False}


def affine_autoregressive():
    order = torch.tensor([2, 0, 3, 1])
    net = perturb(AutoRegressiveNN(D, [10, 9], permutation=order).double())
    theirs = of_transform(P.AffineAutoregressive(net))
    ours = T.Autoregressive(D, (10, 9), transformer=CLAMPED, order=order, **OPTIONS).double()
    made(ours, net)
    return Pair(ours, theirs["forward"], default_dtype_of_data(theirs["inverse"]))


def conditional_affine_autoregressive():
    net = ConditionalAutoRegressiveNN(D, 3, [10, 9], permutation=torch.arange(D).flip(0))
    net = perturb(net.double())
    context = randn(ROWS, 3)
    theirs = of_transform(P.ConditionalAffineAutoregressive(net).condition(context))
    ours = T.Autoregressive(
        D, (10, 9), transformer=CLAMPED, order=range(D)[::-1], context_dim=3, **OPTIONS
    ).double()
    made(ours, net, context_dim=3)
    return Pair(
        ours.condition(context), theirs["forward"], default_dtype_of_data(theirs["inverse"])
    )


def affine_coupling():
    theirs = perturb(P.affine_coupling(5, [8]).double())  # two of five pass
    ours = T.Coupling(5, transformer=CLAMPED, net=Joined(theirs.nn))
    return Pair(ours, **of_transform(theirs), event_shape=(5,))


def affine_coupling_of_images():
    shape = (4, 2, 3)
    theirs = perturb(P.affine_coupling(shape, [8], dim=-3).double())
    ours = T.Coupling(shape, transformer=CLAMPED, net=Joined(theirs.nn, (4, 2, 3)))
    return Pair(ours, **of_transform(theirs, 3), event_shape=shape)


CASES = [
    planar_by_row,
    radial_by_row,
    householder,
    whitening,
    permute,
    batchnorm,
    convolution,
    leapfrog,
    affine_autoregressive,
    conditional_affine_autoregressive,
    affine_coupling,
    affine_coupling_of_images,
]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_values_and_log_dets(make):
    compare(make())


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_spline(inverse):
    theirs = perturb(P.Spline(D, count_bins=6, bound=3.0, order="quadratic").double())
    # Theirs adds its smallest slope, 0.001, to the inner knots, but not to the two ends, whose slopes are 0.999 and leave
    # a kink; with none to add they are 1, as here.
    widths, heights, slopes, _ = theirs._params()
    slopes = slopes + 1e-3
    theirs._params = lambda: (widths, heights, slopes, None)
    x = 2 * randn(ROWS, D)
    expected = theirs.spline_op(x, inverse=inverse, min_derivative=0.0)

    widths, heights = (1e-3 + (1 - 6e-3) * part for part in (widths, heights))
    raw = raw_of_knots(widths, heights, slopes)
    torch.testing.assert_close(
        rq_spline(x, raw, bound=3.0, inverse=inverse), expected, rtol=0, atol=1e-9
    )
