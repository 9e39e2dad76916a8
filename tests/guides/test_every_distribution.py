"""Every distribution of Pyro as a latent of a flow guide: right, or refused with the way out."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import tensor

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.programs import constrain

TWO = torch.ones(2)
TRIL = tensor([[1.0, 0.0], [0.5, 1.0]])
SUM = tensor([1.0, 2.0])


def normals(locs=(-1.0, 1.0)):
    return dist.Normal(tensor(locs), 1.0)


def mixture(component):
    return dist.MixtureSameFamily(dist.Categorical(TWO), component)


# Name in pyro.distributions -> a distribution with a sampler and a density.
RIGHT = {
    "AVFMultivariateNormal": lambda: dist.AVFMultivariateNormal(
        torch.zeros(2), TRIL, torch.zeros(2, 1, 2)
    ),
    "AffineBeta": lambda: dist.AffineBeta(2.0, 3.0, -1.0, 4.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "Chi2": lambda: dist.Chi2(tensor(3.0)),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(tensor(0.3)),
    "Dirichlet": lambda: dist.Dirichlet(tensor([2.0, 3.0, 4.0])),
    "Exponential": lambda: dist.Exponential(2.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(tensor(4.0), tensor(5.0)),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(0.0, 1.0)),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(0.0, 1.0, 0.3),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(tensor(1.0)),
    "HalfNormal": lambda: dist.HalfNormal(tensor(1.0)),
    "Independent": lambda: dist.Independent(dist.Gamma(SUM, 1.0), 1),
    "InverseGamma": lambda: dist.InverseGamma(tensor(3.0), tensor(2.0)),
    "Kumaraswamy": lambda: dist.Kumaraswamy(tensor(2.0), tensor(3.0)),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "Logistic": lambda: dist.Logistic(0.0, 1.0),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), TWO),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(2), torch.ones(2, 1), TWO
    ),
    "MaskedMixture": lambda: dist.MaskedMixture(
        tensor([True, False]), dist.Normal(SUM, 1.0), dist.Normal(-SUM, 2.0)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(TRIL, torch.ones(2, 2), TWO),
    "MixtureOfDiagNormalsSharedCovariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        TRIL, TWO, TWO
    ),
    "MixtureSameFamily": lambda: mixture(normals()),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), scale_tril=TRIL),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(5.0, torch.zeros(2), TRIL),
    "NanMaskedMultivariateNormal": lambda: dist.NanMaskedMultivariateNormal(
        torch.zeros(2), scale_tril=TRIL
    ),
    "NanMaskedNormal": lambda: dist.NanMaskedNormal(0.0, 1.0),
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "OMTMultivariateNormal": lambda: dist.OMTMultivariateNormal(torch.zeros(2), TRIL),
    "Pareto": lambda: dist.Pareto(2.0, tensor(3.0)),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(tensor(1.0), tensor(0.4)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(tensor(1.0), TWO / 2),
    "SkewLogistic": lambda: dist.SkewLogistic(0.0, 1.0, 2.0),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(0.0, 1.0, 2.0, 0.5),
    "SoftLaplace": lambda: dist.SoftLaplace(0.0, 1.0),
    "Stable": lambda: dist.Stable(1.5, 0.5),
    "StudentT": lambda: dist.StudentT(5.0, 0.0, 1.0),
    "TransformedDistribution": lambda: dist.TransformedDistribution(
        dist.HalfNormal(tensor(1.0)), dist.transforms.AffineTransform(3.0, 2.0)
    ),
    "TruncatedPolyaGamma": lambda: dist.TruncatedPolyaGamma(torch.zeros(())),
    "Uniform": lambda: dist.Uniform(-1.0, 3.0),
    "Weibull": lambda: dist.Weibull(tensor(2.0), tensor(1.5)),
    "Wishart": lambda: dist.Wishart(tensor(5.0), torch.eye(2)),
    # More than one of a kind.
    "Mixture of gammas": lambda: mixture(dist.Gamma(SUM + 1, 1.0)),
    "Mixture of uniforms on one interval": lambda: mixture(dist.Uniform(torch.zeros(2), TWO * 3)),
    "Mixture of vectors": lambda: mixture(dist.MultivariateNormal(torch.eye(2), torch.eye(2))),
    "Wishart, batched": lambda: dist.Wishart(tensor([5.0, 6.0]), torch.eye(2)),
    "Beta, moved": lambda: dist.TransformedDistribution(
        dist.Beta(SUM, 2.0).to_event(1), dist.transforms.AffineTransform(tensor([1.0, -1.0]), 2.0)
    ),
    "LogUniform": lambda: dist.TransformedDistribution(
        dist.Uniform(0.0, 2.0), dist.transforms.ExpTransform()
    ),
}

OUT = "poutine.reparam"
REFUSED = {
    "Delta": (lambda: dist.Delta(tensor(1.0)), "atoms.*pyro.deterministic"),
    "Empirical": (lambda: dist.Empirical(SUM, SUM), "atoms"),
    "GaussianScaleMixture": (
        lambda: dist.GaussianScaleMixture(TWO, TWO, SUM),
        "declares no support",
    ),
    "ImproperUniform": (
        lambda: dist.ImproperUniform(constraints.sphere, (), (3,)),
        "support.*biject_to",
    ),
    "ProjectedNormal": (lambda: dist.ProjectedNormal(torch.ones(3)), OUT),
    "RelaxedBernoulliStraightThrough": (
        lambda: dist.RelaxedBernoulliStraightThrough(tensor(1.0), tensor(0.4)),
        "atoms",
    ),
    "RelaxedOneHotCategoricalStraightThrough": (
        lambda: dist.RelaxedOneHotCategoricalStraightThrough(tensor(1.0), TWO / 2),
        "atoms",
    ),
    "SineBivariateVonMises": (
        lambda: dist.SineBivariateVonMises(0.0, 0.0, 2.0, 2.0, 0.5),
        "angle.*CircularReparam",
    ),
    "SineSkewed": (
        lambda: dist.SineSkewed(dist.VonMises(TWO, TWO).to_event(1), TWO / 3),
        "angle.*CircularReparam",
    ),
    "VonMises": (lambda: dist.VonMises(0.0, 1.0), "angle.*CircularReparam"),
    "VonMises3D": (lambda: dist.VonMises3D(torch.ones(3)), "direction.*CircularReparam"),
    "ZeroInflatedDistribution": (
        lambda: dist.ZeroInflatedDistribution(dist.Normal(0.0, 1.0), gate=tensor(0.3)),
        "atoms",
    ),
    "VonMises in a plate": (lambda: dist.VonMises(SUM, 1.0), "angle"),
    "Mixture of angles": (lambda: mixture(dist.VonMises(SUM, 1.0)), "angle"),
    "Mixture on two supports": (
        lambda: mixture(dist.Uniform(torch.zeros(2), SUM)),
        "different supports",
    ),
    "Square of a normal": (
        lambda: dist.TransformedDistribution(
            dist.Uniform(-1.0, 1.0), dist.transforms.AbsTransform()
        ),
        "not bijective",
    ),
}

DISCRETE = {
    "Bernoulli": lambda: dist.Bernoulli(0.5),
    "BetaBinomial": lambda: dist.BetaBinomial(1.0, 1.0, 5),
    "Binomial": lambda: dist.Binomial(5, 0.5),
    "Categorical": lambda: dist.Categorical(TWO),
    "DirichletMultinomial": lambda: dist.DirichletMultinomial(TWO, 5),
    "GammaPoisson": lambda: dist.GammaPoisson(1.0, 1.0),
    "Geometric": lambda: dist.Geometric(0.5),
    "Multinomial": lambda: dist.Multinomial(5, TWO),
    "NegativeBinomial": lambda: dist.NegativeBinomial(5, 0.5),
    "OneHotCategorical": lambda: dist.OneHotCategorical(TWO),
    "OneHotCategoricalStraightThrough": lambda: dist.OneHotCategoricalStraightThrough(TWO),
    "OrderedLogistic": lambda: dist.OrderedLogistic(tensor(0.0), tensor([0.0, 1.0])),
    "Poisson": lambda: dist.Poisson(3.0),
    "ZeroInflatedNegativeBinomial": lambda: dist.ZeroInflatedNegativeBinomial(
        5, gate=tensor(0.5), probs=tensor(0.5)
    ),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(tensor(3.0), gate=tensor(0.5)),
}

RIGHT["StableWithLogProb"] = RIGHT["Stable"]

# Base classes and wrappers; likelihoods of series, counts and graphs; distributions that are not of latents of fixed size.
NOT_LATENTS = [
    "CoalescentTimes",
    "CoalescentTimesWithRate",
    "DiscreteHMM",
    "ExpandedDistribution",
    "ExponentialFamily",
    "ExtendedBetaBinomial",
    "ExtendedBinomial",
    "GammaGaussianHMM",
    "GaussianHMM",
    "GaussianMRF",
    "GroupedNormalNormal",
    "IndependentHMM",
    "LKJCorrCholesky",
    "LinearHMM",
    "LogNormalNegativeBinomial",
    "MaskedDistribution",
    "OneOneMatching",
    "OneTwoMatching",
    "Rejector",
    "SpanningTree",
    "TorchDistribution",
    "Unit",
]


def test_the_table_has_every_distribution():
    classes = {
        name
        for name, kind in vars(dist).items()
        if inspect.isclass(kind) and issubclass(kind, torch.distributions.Distribution)
    }
    assert classes - {*RIGHT, *BY_PROPOSAL, *REFUSED, *DISCRETE, *NOT_LATENTS} == set()


# torch's sampler of these does not follow their density for more than two dimensions.
BY_PROPOSAL = {"LKJ": lambda: dist.LKJ(3, 2.0), "LKJCholesky": lambda: dist.LKJCholesky(3, 2.0)}


def as_model(make):
    return lambda: pyro.sample("z", make())


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # by the sampler of Wishart
@pytest.mark.parametrize("name", RIGHT)
def test_density_has_mass_one_on_the_support(name):
    # E_prior[h(u) / p(u)] = ∫ h = 1 for any density h of unconstrained u, more narrow than p to bound the ratio.
    guide = AutoIAF(as_model(RIGHT[name]))
    guide.setup()
    fn = RIGHT[name]()
    assert guide()["z"].shape == fn.shape()
    with torch.no_grad():
        u, _, inside = guide._unconstrain({"z": fn.sample((4000,))})
        assert inside.float().mean() > 0.99
        u = u[inside & u.isfinite().all(-1)]
        ((_, image),) = constrain(u, guide.latents)
        z, ladj = image.v, -image.log_density
        log_p = (fn.log_prob(z) + ladj).reshape(len(u), -1).sum(-1)
        loc = u.median(0).values
        spread = (u - loc).abs().median(0).values
        corr = torch.corrcoef(((u - loc) / spread).clamp(-5, 5).T).reshape(len(loc), len(loc))
        h = dist.MultivariateNormal(loc, 0.7 * spread.outer(spread) * corr)
        ratio = (h.log_prob(u) - log_p).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.05
    torch.testing.assert_close(ratio.mean(), tensor(1.0), atol=4 * error + 0.01, rtol=0)
    # The draws of the guide lie in the support, and have the density that their trace has.
    trace = pyro.poutine.trace(guide).get_trace()
    draw = trace.nodes["z"]["value"]
    assert bool(guide.latents[0].support.check(draw).all())
    torch.testing.assert_close(
        guide.log_prob({"z": draw}), trace.log_prob_sum(), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("name", BY_PROPOSAL)
def test_density_of_correlations_has_mass_one(name):
    guide = AutoIAF(as_model(BY_PROPOSAL[name]))
    guide.setup()
    proposal = dist.Normal(torch.zeros(3), 1.2).to_event(1)
    u = proposal.sample((20_000,))
    ((_, image),) = constrain(u, guide.latents)
    z, ladj = image.v, -image.log_density
    ratio = (BY_PROPOSAL[name]().log_prob(z) + ladj - proposal.log_prob(u)).exp()
    torch.testing.assert_close(ratio.mean(), tensor(1.0), atol=0.03, rtol=0)
    torch.testing.assert_close((ratio * z[..., 1, 0] ** 2).mean(), tensor(1 / 6), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_way_out(name):
    make, message = REFUSED[name]
    guide = AutoIAF(as_model(make))
    with pytest.raises(ValueError, match=f"(?s)latent 'z' .*{message}"):
        guide.setup()
    assert guide.prototype_trace is None


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_latents_are_refused(name):
    with pytest.raises(ValueError, match="latent 'z' is discrete"):
        AutoIAF(as_model(DISCRETE[name])).setup()
