"""The contract of `pyro_flows_ext.testing` on every transform of the catalogue: one test an entry, point and dtype."""

import inspect

import pytest
import torch
from catalogue import CATALOGUE

import pyro_flows_ext.transforms
from pyro_flows_ext.testing import POINTS, check_import_is_pure, check_transform

# A compiled inverse unrolls its root finder, one piece a hidden unit: seconds each. A grid has at most two dimensions.
SMALL = {13, 14}


def applies(entry, point):
    if point.number == 13:
        return entry.dim > 1  # in one dimension the graph is that of two
    return point.number != 14 or entry.is_vector


def is_slow(name, point, dtype):
    """The second dtype repeats the points of the first, and some graphs take more than five seconds to compile."""
    long = ("indexed-", "residual", "context-residual", "context-sylvester", "context-compose")
    return dtype != torch.float64 or (point.number == 13 and name.startswith(long))


CASES = [
    pytest.param(
        entry,
        point,
        dtype,
        id=f"{name}-{point}-{str(dtype)[6:]}",
        marks=[pytest.mark.slow] * is_slow(name, point, dtype),
    )
    for name, entry in CATALOGUE.items()
    for point in POINTS.values()
    for dtype in point.dtypes
    if applies(entry, point)
]


@pytest.mark.parametrize(("entry", "point", "dtype"), CASES)
def test_contract(entry, point, dtype):
    dim = min(entry.dim, 2) if point.number in SMALL else entry.dim
    point.check(entry.factory(dim), dtype=dtype, **entry.options)


def test_catalogue_is_complete():
    abstract = {"FlowTransform"}
    no_transforms = {"LogDetNoise", "Pad"}  # a value, and a surjection
    public = set(pyro_flows_ext.transforms.__all__) - no_transforms
    covered = {name for entry in CATALOGUE.values() for name in entry.covers}
    assert public - abstract - covered == set(), "transforms without an entry in the catalogue"
    assert covered - public == set(), "names in the catalogue that the package does not export"


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        pytest.param(entry, name, id=f"{key}-{name}")
        for key, entry in CATALOGUE.items()
        for name in entry.covers
    ],
)
def test_catalogue_entry_is_what_it_says(entry, name):
    member = getattr(pyro_flows_ext.transforms, name)
    if inspect.isclass(member):
        parts = list(entry.factory()().modules())
        parts += [part.transformer for part in parts if hasattr(part, "transformer")]
        assert any(isinstance(part, member) for part in parts)


def test_import_is_pure():
    check_import_is_pure("pyro_flows_ext")


def test_check_transform_runs_all_points():
    check_transform(lambda: pyro_flows_ext.transforms.radial(2))


def test_check_transform_selects_points():
    with pytest.raises(ValueError, match="points: expected numbers of"):
        check_transform(lambda: pyro_flows_ext.transforms.radial(2), points=[17])


def test_check_transform_reads_the_event_shape():
    with pytest.raises(ValueError, match="give event_shape"):
        check_transform(lambda: pyro_flows_ext.transforms.ComposeFlow([_Shift()]), points=[1])
    check_transform(
        lambda: pyro_flows_ext.transforms.ComposeFlow([_Shift()]), event_shape=(3,), points=[1, 2]
    )


class _Shift(pyro_flows_ext.transforms.FlowTransform):
    def forward_and_ladj(self, x):
        return x + 1, torch.zeros_like(x[..., 0])

    def inverse_and_ladj(self, y):
        return y - 1, torch.zeros_like(y[..., 0])


@pytest.mark.parametrize(
    ("factory", "options", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "expected a FlowTransform, got Linear"),
        (
            lambda: pyro_flows_ext.transforms.IndexedTransform(pyro_flows_ext.transforms.Planar(2)),
            {},
            ValueError,
            "context_dim: expected the size of the context of IndexedTransform",
        ),
        (
            lambda: pyro_flows_ext.transforms.planar(2),
            {"context_dim": 3},
            ValueError,
            "context_dim: expected 0, that of Planar, got 3",
        ),
    ],
    ids=["no-transform", "no-context", "another-context"],
)
def test_check_transform_refuses(factory, options, error, message):
    with pytest.raises(error, match=message):
        check_transform(factory, points=[1], **options)


def test_check_transform_reads_the_context_dim():
    planar = pyro_flows_ext.transforms.Planar
    check_transform(lambda: planar(2, context_dim=3), points=[1, 2])
