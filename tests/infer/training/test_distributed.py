"""Training on two processes by `torchrun`, beside the same run on one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pytest
import torch
import torch.distributed as dist
from pyro.infer import Trace_ELBO

from pyro_flows_ext.infer import CompiledSVI, _messages
from pyro_flows_ext.infer.distributed import Group, Processes, find_processes

SCRIPT = Path(__file__).with_name("processes.py")
# A start of two processes takes some ten seconds, most of it imports.
slow = pytest.mark.slow


def start(scenario, folder, num):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    command = [sys.executable, *(launcher if num > 1 else []), str(SCRIPT), scenario, str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run(scenario, folder, num=2):
    """The results by process."""
    process = start(scenario, folder, num)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    names = [scenario, f"{scenario}-1"][:num]
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def assert_same(found, expected, tolerance):
    for name in ("losses", "validation"):
        actual, wanted = torch.tensor(found[name]), torch.tensor(expected[name])
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert found["parameters"] == pytest.approx(expected["parameters"], rel=tolerance)
    assert found["skipped"] == expected["skipped"]


@slow
@pytest.mark.parametrize("scenario", ["table", "actnorm", "weights", "dataset"])
def test_losses_are_those_of_one_process(scenario, tmp_path):
    (one,) = run(scenario, tmp_path, num=1)
    first, second = run(scenario, tmp_path)
    assert_same(first, second, 0.0)
    assert_same(first, one, 1e-4)
    assert len(set(one["losses"])) > 1
    if scenario == "dataset":
        # 16 of the 32 rows of a batch, beside those that all processes look at before training.
        read = [json.loads((tmp_path / f"read-{rank}.json").read_text()) for rank in (0, 1)]
        assert read[0] == read[1]


@slow
def test_a_distributed_sampler_gives_each_process_its_rows(tmp_path):
    first, second = run("sampler", tmp_path)
    assert_same(first, second, 0.0)


@slow
def test_every_process_draws_noise_of_its_own(tmp_path):
    (one,) = run("noise", tmp_path, num=1)
    first, second = run("noise", tmp_path)
    assert_same(first, second, 0.0)
    draws = [json.loads((tmp_path / f"draws-{rank}.json").read_text()) for rank in (0, 1)]
    assert draws[0] == draws[1]  # the seed is over, and with it what differed
    assert first["validation"][-1] == pytest.approx(one["validation"][-1], abs=0.2)


@slow
def test_all_skip_the_step_of_one_and_stop_with_one(tmp_path):
    first, second = run("infinite", tmp_path)
    assert_same(first, second, 0.0)
    assert first["skipped"] == 2
    first, second = run("stopped", tmp_path)
    assert first["steps"] == second["steps"] == 10


@slow
def test_a_checkpoint_of_two_goes_on_in_one(tmp_path):
    (whole,) = run("table", tmp_path, num=1)
    assert run("half", tmp_path)[0]["steps"] == 10
    (rest,) = run("resumed", tmp_path, num=1)
    assert rest["steps"] == 20
    assert_same(rest, whole, 1e-4)


@slow
def test_a_killed_process_ends_all_and_one_goes_on(tmp_path):
    process = start("killed", tmp_path, 2)
    _, errors = process.communicate(timeout=400)
    killed_at, step = json.loads((tmp_path / "killed.json").read_text())
    assert time.time() - killed_at < 30
    assert process.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors
    assert "ProcessLost: process 0 of 2: expected all 2 processes, but another one ended" in errors
    (rest,) = run("revived", tmp_path, num=1)
    assert 0 < rest["steps"] <= step + 5
    assert torch.tensor(rest["losses"]).isfinite().all()


@slow
def test_arguments_that_differ_are_refused(tmp_path):
    process = start("other", tmp_path, 2)
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert r"batch_size: expected the same in all 2 processes, got [32, 33]" in errors


@slow
@pytest.mark.parametrize("scenario", ["posterior", "batches"])
def test_fit(scenario, tmp_path):
    first, second = run(scenario, tmp_path)
    assert_same(first, second, 0.0)
    assert first["steps"] > 10
    if scenario == "batches":
        drawn = [json.loads((tmp_path / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
        assert drawn[0] != drawn[1]


def test_one_process_changes_nothing():
    processes = find_processes()
    assert type(processes) is Processes
    state = torch.get_rng_state()
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.arange(3.0)
    with processes.alike():
        assert processes.average(2.0, [p], 5.0) == 2.0
    processes.spread()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(p.grad, torch.arange(3.0))
    assert list(range(7))[processes.part(7)] == list(range(7))
    assert processes.total(1.0, 2.0) == [1.0, 2.0]
    assert repr(processes) == "process 0 of 1"


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group()
    dist.destroy_process_group()


def test_gradients_are_sent_in_several_messages_during_the_backward_pass(group, monkeypatch):
    monkeypatch.setattr(_messages, "MESSAGE_BYTES", 64)
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4)]
    params = [p for layer in layers for p in layer.parameters()]
    sent = []
    monkeypatch.setattr(dist, "all_reduce", _recording(dist.all_reduce, sent))
    for scale in (1.0, -2.0):  # the second step takes the messages of the first
        x = layers[1](layers[0](torch.ones(3, 4)).double())
        loss = scale * x.square().sum()
        expected = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        sent.clear()
        with group.sending(params, 3.0):
            loss.backward()
        assert sent == []  # the last layer comes first, and has no gradient
        value = group.average(5.0, params, 3.0)
        assert value == 5.0
        assert sent == [20, 20, 20, 8]
        for p, grad in zip(params, expected, strict=True):
            if grad is None:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, grad)
            p.grad = None
    reached = params[:4]
    sent.clear()
    with group.sending(reached, 1.0):
        layers[1](layers[0](torch.ones(3, 4)).double()).sum().backward()
    assert sent == [20, 20]
    group.average(0.0, reached, 1.0)


def test_a_second_backward_pass_is_refused_where_gradients_were_sent(group):
    p = torch.ones(3, requires_grad=True)
    with group.sending([p], 1.0):
        p.sum().backward()
        with pytest.raises(RuntimeError, match="expected one backward pass a step"):
            p.sum().backward()
    p.grad = None
    # Nothing is left of it: the next step is as any other.
    with group.sending([p], 1.0):
        (2 * p).sum().backward()
    group.average(0.0, [p], 1.0)
    assert p.grad.tolist() == [2.0, 2.0, 2.0]


def _recording(reduce, sent):
    def recorded(tensor, **options):
        sent.append(tensor.numel())
        return reduce(tensor, **options)

    return recorded


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo"])
def test_a_group_starts_on_a_backend_for_each_device(backend):
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = torch.nn.Linear(2, 1)
        weight = module.weight.detach().clone()
        Group().start(module, {"lr": 0.1})
        assert torch.equal(module.weight, weight)
    finally:
        dist.destroy_process_group()


def test_compiled_svi_is_refused_on_several_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    optim = pyro.optim.Adam({"lr": 0.1})
    with pytest.raises(RuntimeError, match="CompiledSVI: expected one process, got 2; fit"):
        CompiledSVI(lambda: None, lambda: None, optim, Trace_ELBO())
