"""The contract of densities on every density of the catalogue: one test an entry and point."""

import inspect

import pyro.distributions as dist
import pytest
from densities import DENSITIES

import pyro_flows_ext.distributions as D
from pyro_flows_ext.testing import DENSITY_POINTS, check_density_contract, density_point_applies

# Transforms compile or not by a contract of their own; of the densities around them there are these kinds.
COMPILED = {"flow-learned-base", "flow-standardized", "conditional-flow", "indexed-maf"}


def applies(name, entry, number):
    if number == 10 and name not in COMPILED:
        return False
    return density_point_applies(number, entry.make, **entry.options)


CASES = [
    pytest.param(
        entry, number, id=f"{name}-{number}-{check.__name__.removeprefix('check_density_')}"
    )
    for name, entry in DENSITIES.items()
    for number, check in DENSITY_POINTS.items()
    if applies(name, entry, number)
]


@pytest.mark.parametrize(("entry", "number"), CASES)
def test_contract(entry, number):
    DENSITY_POINTS[number](entry.make, **entry.options)


def test_catalogue_is_complete():
    abstract = {D.Density, D.TransformedDensity}
    whole_numbers = {D.Dequantized}  # with tests of its own: no gradient, no grid
    public = {d for d in vars(D).values() if inspect.isclass(d) and issubclass(d, D.Density)}
    made = {type(entry.make()) for entry in DENSITIES.values()}
    assert public - abstract - whole_numbers - made == set(), (
        "densities without an entry in the catalogue"
    )


def test_check_density_contract_selects_points():
    with pytest.raises(ValueError, match="points: expected numbers of"):
        check_density_contract(DENSITIES["flow-planar"].make, points=[11])


def test_check_density_contract_refuses_what_is_no_density():
    with pytest.raises(TypeError, match=r"expected a pyro_flows_ext.distributions.Density, got N"):
        check_density_contract(lambda: dist.Normal(0.0, 1.0), points=[2])


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (1, "flow-sylvester", r"event of one or two numbers, got shape \(3,\)"),
        (4, "flow-planar", "exact_log_prob=False and a reference"),
        (4, "indexed-realnvp", "exact_log_prob=False and a reference"),
    ],
)
def test_points_that_do_not_apply(number, name, message):
    with pytest.raises(ValueError, match=message):
        DENSITY_POINTS[number](DENSITIES[name].make)
