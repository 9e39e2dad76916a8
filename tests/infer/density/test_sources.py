"""Data of `fit_density` from arrays, DataFrames, tensors, datasets, loaders and files; contexts and weights beside them."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import Dequantized, FlowDistribution
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.infer.density.rows import read_rows

OPTIONS = {"num_steps": 8, "batch_size": 50, "lr": 0.02, "seed": 0, "progress": False}
X = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
C = torch.randn(200, 1, generator=torch.Generator().manual_seed(1))


def normal(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def flow(dim=2, context_dim=0):
    torch.manual_seed(0)
    options = {"num_layers": 1, "hidden_dims": (8,), "context_dim": context_dim}
    return FlowDistribution(normal(dim), T.nsf(dim, **options))


class Items(Dataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        items = tuple(t[i] for t in self.tensors)
        return items[0] if len(items) == 1 else items


class Endless(IterableDataset):
    def __iter__(self):
        yield from X


def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


class Arraylike:
    def __array__(self, dtype=None, copy=None):
        return X.numpy()


TABLES = {
    "array": lambda _: X.numpy(),
    "frame": lambda _: pd.DataFrame(X.numpy(), columns=["a", "b"]),
    "nullable": lambda _: pd.DataFrame(X.numpy()).convert_dtypes(dtype_backend="numpy_nullable"),
    "mapped": mapped,
    "fortran": lambda _: np.asfortranarray(X.numpy()),
    "reversed": lambda _: X.numpy()[::-1][::-1],
    "big endian": lambda _: X.numpy().astype(">f4"),
    "masked": lambda _: np.ma.masked_array(X.numpy(), np.zeros((200, 2), bool)),
    "objects": lambda _: X.numpy().astype(object),
    "array-like": lambda _: Arraylike(),
    "tensors": lambda _: TensorDataset(X),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_is_the_tensor(name, tmp_path):
    expected = fit_density(flow(), X, **OPTIONS)
    density = flow()
    found = fit_density(density, TABLES[name](tmp_path), **OPTIONS)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.validation_losses, expected.validation_losses)
    assert found.columns == (["a", "b"] if name == "frame" else {"nullable": ["0", "1"]}.get(name))


def test_the_rows_of_a_file_are_read_as_they_are_used(tmp_path):
    class Watched(np.memmap):
        pass

    data = mapped(tmp_path)
    before = data.copy()
    density = flow()
    fit_density(density, data, **OPTIONS)
    assert np.array_equal(before, data)
    assert not data.flags.writeable


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64"])
def test_a_mapped_file_is_not_copied(kind, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40).reshape(20, 2).astype(kind))
    data = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = read_rows("data", data, None, None, False, 10)
    assert rows.parts[0].data_ptr() == data.ctypes.data
    assert rows.take(slice(3, 5)).values.tolist() == [[6, 7], [8, 9]]


def test_rows_of_bytes_train_as_numbers():
    x = (X.abs() * 20).clamp(max=255).floor()
    expected = fit_density(Dequantized(flow(), num_levels=256), x, **OPTIONS)
    found = fit_density(Dequantized(flow(), num_levels=256), x.numpy().astype("uint8"), **OPTIONS)
    torch.testing.assert_close(found.losses, expected.losses)


STREAMS = {
    "dataset": lambda: Items(X),
    "loader": lambda: DataLoader(Items(X), batch_size=50, shuffle=True),
    "loader in order": lambda: DataLoader(TensorDataset(X), batch_size=50, collate_fn=collate),
}


def collate(items):
    return torch.stack([item[0] for item in items])


@pytest.mark.parametrize("name", list(STREAMS))
def test_datasets_and_loaders_are_split_and_trained_on(name):
    result = fit_density(flow(), STREAMS[name](), **OPTIONS, patience=None)
    assert result.losses.isfinite().all()
    assert len(result.validation_losses) == 9
    again = fit_density(flow(), STREAMS[name](), **OPTIONS, patience=None)
    assert torch.equal(result.losses, again.losses)


def test_the_held_out_rows_of_a_dataset_are_not_trained_on():
    seen = []

    class Recorder(Items):
        def __getitem__(self, i):
            seen.append(i)
            return X[i]

    class Marked(FlowDistribution):
        def log_prob(self, value):
            (trained if self.training else evaluated).update(value[:, 0].tolist())
            return super().log_prob(value)

    trained, evaluated = set(), set()
    density = Marked(normal(), T.nsf(2, num_layers=1, hidden_dims=(8,)))
    fit_density(density, Recorder(X), **{**OPTIONS, "num_steps": 40, "standardize": False})
    assert len(trained) == 180
    assert len(set(X[:, 0].tolist()) - trained) == 20
    assert set(X[:, 0].tolist()) - trained <= evaluated
    assert set(seen) == set(range(200))


def test_batches_without_an_index_take_validation_rows_of_their_own():
    batches = list(X[:150].split(50))
    for data in (batches, DataLoader(Endless(), batch_size=50)):
        with pytest.raises(ValueError, match="validation: expected rows or a loader of its own"):
            fit_density(flow(), data, **OPTIONS)
        result = fit_density(flow(), data, **OPTIONS, validation=X[150:])
        assert len(result.validation_losses) == 9
        assert len(fit_density(flow(), data, **OPTIONS, validation=None).losses) == 8


def test_data_that_can_be_read_once_are_refused():
    with pytest.raises(TypeError, match="read again in the next epoch, got an iterator"):
        fit_density(flow(), iter([X, X]), **OPTIONS)


def test_nan_in_a_batch_that_comes_late_is_named():
    bad = X.clone()
    bad[120, 0] = torch.nan
    # Beyond the rows that are read before training.
    batches = [*torch.randn(60, 200, 2), bad]
    with pytest.raises(ValueError, match="1 of 400 values is NaN, the first in row 120"):
        fit_density(flow(), batches, **{**OPTIONS, "num_steps": 70}, validation=None)


def test_labels_are_not_taken_for_contexts():
    with pytest.raises(ValueError, match="batches of rows alone, got 2 parts; let the dataset return no labels"):  # fmt: skip
        fit_density(flow(), Items(X, C), **OPTIONS)
    with pytest.raises(ValueError, match=r"TensorDataset of rows alone .* pass data.tensors"):
        fit_density(flow(), TensorDataset(X, C), **OPTIONS)


def test_columns_that_are_no_numbers_are_named():
    frame = pd.DataFrame({"a": X[:, 0].numpy(), "kind": ["x"] * 200})
    with pytest.raises(TypeError, match="expected columns of numbers, got others: kind"):
        fit_density(flow(), frame, **OPTIONS)
    frame = pd.DataFrame({"a": X[:, 0].numpy(), "b": X[:, 1].numpy()})
    frame.loc[3, "b"] = None
    with pytest.raises(
        ValueError, match=r"data: 1 of 400 values is NaN, the first in row 3 \(column 'b', rows"
    ):
        fit_density(flow(), frame, **OPTIONS)


def test_numbers_are_rows_of_one():
    density = flow(1)
    result = fit_density(density, X[:, 0].numpy(), **OPTIONS)
    assert result.losses.isfinite().all()


# --- weights ---


def test_weights_count_as_repetitions():
    weights = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(2))
    repeated = X.repeat_interleave(weights, 0)
    losses = []
    for data, w in ((X, weights), (repeated, None)):
        options = {**OPTIONS, "batch_size": len(data), "num_steps": 30, "validation": None}
        density = FlowDistribution(normal(), T.LULinear(2))
        losses.append(fit_density(density, data, weights=w, **options).losses)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "weights: expected one row for each of the 200"),
        (torch.ones(200, 1), r"weights: expected shape \(N,\)"),
        (-torch.ones(200), "weights: expected finite numbers >= 0"),
        (torch.zeros(200), "weights: .* a positive sum"),
    ],
    ids=["few", "matrix", "negative", "zero"],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        fit_density(flow(), X, weights=weights, **OPTIONS)


# --- contexts ---


def linear(num=1000, seed=0, scale=1.0, offset=0.0):
    """y = 2 c + noise of scale .5, at contexts in units of their own."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(num, 1, generator=generator)
    y = 2 * c + 0.5 * torch.randn(num, 1, generator=generator)
    return y, offset + scale * c


@pytest.mark.parametrize(
    ("scale", "offset"),
    [pytest.param(1.0, 0.0, id="unit", marks=pytest.mark.slow), pytest.param(1e4, 3e5, id="far")],
)
@pytest.mark.parametrize("kind", ["tensor", "array", "frame", "dataset", "loader", "tensors"])
def test_conditional_densities_learn_from_any_pair(kind, scale, offset):
    y, c = linear(scale=scale, offset=offset)
    torch.manual_seed(0)
    density = FlowDistribution(normal(1), T.maf(1, num_layers=1, hidden_dims=(16,), context_dim=1))
    data = {
        "tensor": (y, c),
        "array": (y.numpy(), c.numpy()),
        "frame": (pd.DataFrame(y.numpy()), pd.DataFrame(c.numpy())[0]),
        "dataset": (Items(y, c),),
        "loader": (DataLoader(Items(y, c), batch_size=100, shuffle=True),),
        "tensors": (TensorDataset(y, c),),
    }[kind]
    options = {**OPTIONS, "num_steps": 150, "batch_size": 100}
    result = fit_density(density, *data, **options, validation=None)
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.25)
    assert result.losses[-30:].mean() == pytest.approx(entropy, abs=0.15)
    at = density.condition(torch.tensor([[offset], [offset + scale]]))
    means = at.sample((2000,)).mean(0).flatten()
    torch.testing.assert_close(means, torch.tensor([0.0, 2.0]), rtol=0, atol=0.25)
    fresh = FlowDistribution(normal(1), T.maf(1, num_layers=1, hidden_dims=(16,), context_dim=1))
    fresh.load_state_dict(density.state_dict())
    assert torch.equal(
        fresh.condition(c).log_prob(y).detach(), density.condition(c).log_prob(y).detach()
    )


@pytest.mark.parametrize(
    ("context_dim", "context", "message"),
    [
        (1, None, r"data: expected a context \(1, 1\) beside the rows"),
        (0, C, "data: expected no context for a density without context_dim"),
        (1, C[:7], "context: expected one row for each of the 200 rows of data"),
        (1, C.repeat(1, 2), r"data context: expected shape \(N, 1\), got \(N, 2\)"),
        (
            1,
            C.masked_fill(C > 2, torch.nan),
            r"context: \d+ of 200 values are NaN, the first in row",
        ),
    ],
    ids=["none", "unwanted", "few", "wide", "nan"],
)
def test_bad_contexts(context_dim, context, message):
    with pytest.raises(ValueError, match=message):
        fit_density(flow(2, context_dim), X, context, **OPTIONS)


def test_validation_rows_with_contexts():
    y, c = linear()
    density = flow(1, 1)
    result = fit_density(density, y, c, **OPTIONS, validation=linear(100, 1))
    assert len(result.validation_losses) == 9
    with pytest.raises(ValueError, match="validation: expected a context"):
        fit_density(density, y, c, **OPTIONS, validation=y)
