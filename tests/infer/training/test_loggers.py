"""Callbacks that write numbers of a run."""

import sys
from types import ModuleType

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext as pf
from pyro_flows_ext.infer import CSVLogger, TensorBoardLogger

OPTIONS = {"num_steps": 20, "evaluate_every": 5, "progress": False, "seed": 0}


def fitted(**options):
    torch.manual_seed(0)
    data = torch.randn(100, 2)
    return pf.fit_density(pf.flows.NSF(2, num_layers=1), data, **{**OPTIONS, **options})


def test_a_row_for_every_evaluation(tmp_path):
    result = fitted(callback=CSVLogger(tmp_path / "losses.csv"))
    found = pd.read_csv(tmp_path / "losses.csv")
    assert list(found) == ["step", "loss", "validation_loss", "best_loss"]
    assert found["step"].tolist() == [5, 10, 15, 20]
    expected = result.validation_losses[1:].tolist()
    assert found["validation_loss"].tolist() == pytest.approx(expected)
    assert found["loss"].tolist() == pytest.approx(result.losses[4::5].tolist())
    fitted(callback=CSVLogger(tmp_path / "losses.csv"), validation=None)
    more = pd.read_csv(tmp_path / "losses.csv")
    assert len(more) == 8
    assert more["validation_loss"][4:].isna().all()


def test_the_numbers_of_a_guide(tmp_path):
    def model():
        pyro.sample("z", dist.Normal(1.0, 2.0))

    pf.fit(model, pf.AutoIAF(model), num_steps=100, warm_start=False, progress=False, callback=CSVLogger(tmp_path / "fit.csv"))  # fmt: skip
    found = pd.read_csv(tmp_path / "fit.csv")
    assert list(found) == ["step", "round", "loss", "ess", "k_hat"]
    assert found["step"].tolist() == [50, 100]


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"expected a file with the columns step, loss, .*got a, b"
    ):
        fitted(callback=CSVLogger(tmp_path / "other.csv"))


def test_scalars_for_tensorboard(tmp_path, monkeypatch):
    """Against a stand-in, as TensorBoard is no dependency."""
    written = []

    class SummaryWriter:
        def __init__(self, directory):
            written.append(directory)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flush")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    result = fitted(callback=TensorBoardLogger(tmp_path), validation=None)
    steps = [(5 * k, result.losses[5 * k - 1].item()) for k in range(1, 5)]
    assert written == [str(tmp_path), *(x for k, v in steps for x in (("loss", v, k), "flush"))]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"expected the package tensorboard.*pip install"):
        TensorBoardLogger(tmp_path)
