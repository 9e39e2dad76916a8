"""`fit_density` with a compiled loss: the losses of eager steps, or eager steps with a reason."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_flows_ext import fit_density
from pyro_flows_ext.distributions import Dequantized
from pyro_flows_ext.flows import MAF, NSF, RealNVP
from pyro_flows_ext.infer.compiled import UnsupportedForCompilation
from pyro_flows_ext.infer.density import compiling
from pyro_flows_ext.infer.density.batches import BatchObjective
from pyro_flows_ext.infer.density.rows import Batch
from pyro_flows_ext.infer.distributed import Processes

OPTIONS = {"num_steps": 12, "batch_size": 32, "seed": 0, "progress": False, "evaluate_every": 4}


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Graphs with their gradients, but without minutes of a C++ compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def rows(n=200, dim=3):
    return torch.randn(n, dim) @ torch.randn(dim, dim)


def fitted(make, *data, compile, **options):
    torch.manual_seed(3)
    return fit_density(make(), *data, compile=compile, **{**OPTIONS, **options})


def compare(make, *data, **options):
    """A compiled run, whose losses are those of an eager one, step by step."""
    eager, compiled = (fitted(make, *data, compile=c, **options) for c in (False, True))
    assert compiled.compiled
    assert not eager.compiled
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.validation_losses, eager.validation_losses, rtol=1e-4, atol=1e-4)  # fmt: skip
    return compiled


@pytest.mark.parametrize(
    "make",
    [
        lambda: RealNVP(3, num_layers=2, hidden_dims=(8,)),
        lambda: NSF(3, num_layers=2, hidden_dims=(8,)),
        lambda: MAF(3, num_layers=2, hidden_dims=(8,)).double(),
    ],
    ids=["realnvp", "nsf", "maf-float64"],
)
def test_losses_are_those_of_eager_steps(make):
    assert not compare(make, rows()).skipped_steps


def test_contexts_and_weights():
    x, context, weights = rows(), torch.randn(200, 2), torch.rand(200)
    compare(lambda: NSF(3, num_layers=2, hidden_dims=(8,), context_dim=2), x, context, weights=weights)  # fmt: skip


def test_batches_of_other_sizes_run_eagerly(monkeypatch):
    loader = DataLoader(TensorDataset(rows(70)), batch_size=32)  # 32, 32, 6
    sizes = []
    run = compiling.CompiledObjective._eager
    monkeypatch.setattr(
        compiling.CompiledObjective,
        "_eager",
        lambda self, *batch: (sizes.append(len(batch[0])), run(self, *batch))[1],
    )
    compare(lambda: RealNVP(3, num_layers=2, hidden_dims=(8,)), loader, validation=None)
    assert sizes.count(6) == 4


def test_a_continued_run_compiles_again(tmp_path):
    x, path = rows(), tmp_path / "run.pt"
    make = lambda: RealNVP(3, num_layers=2, hidden_dims=(8,))  # noqa: E731
    whole = fitted(make, x, compile=False)

    def stop(state):
        state.stop = state.step >= 8

    fitted(make, x, compile=True, checkpoint=path, callback=stop)
    rest = fitted(make, x, compile=True, checkpoint=path, resume=True)
    assert rest.compiled
    torch.testing.assert_close(rest.losses, whole.losses, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_densities_than_graphs_of_one_function():
    for _ in range(10):
        assert fitted(lambda: RealNVP(2, num_layers=1, hidden_dims=(4,)), rows(dim=2), compile=True, num_steps=3, validation=None).compiled  # fmt: skip


# --- eager steps ---


def test_noise_runs_eagerly_with_the_same_losses():
    x = torch.randint(8, (200, 3))
    make = lambda: Dequantized(RealNVP(3, num_layers=2, hidden_dims=(8,)), num_levels=8)  # noqa: E731
    eager = fitted(make, x, compile=False)
    with pytest.warns(UserWarning, match="takes eager steps: the objective draws random numbers"):
        asked = fitted(make, x, compile=True)
    assert not asked.compiled
    assert torch.equal(asked.losses, eager.losses)


def test_short_runs_are_eager(monkeypatch):
    monkeypatch.setattr(compiling, "_compile", None)
    assert not fitted(lambda: RealNVP(3), rows(), compile="auto").compiled


def test_a_wrong_graph_is_not_used(monkeypatch):
    def wrong(density):
        return lambda values, context, weights: 1.01 * density.log_prob(values)

    monkeypatch.setattr(compiling, "_compile", wrong)
    with pytest.warns(UserWarning, match="values of the compiled objective differ from eager ones"):
        assert not fitted(lambda: RealNVP(3), rows(), compile=True).compiled


def test_a_wrong_gradient_is_not_used(monkeypatch):
    def wrong(density):
        def run(values, context, weights):
            found = density.log_prob(values)
            return found + 0.1 * (density.log_prob(0.9 * values) - density.log_prob(0.9 * values).detach())  # fmt: skip

        return run

    monkeypatch.setattr(compiling, "_compile", wrong)
    with pytest.warns(UserWarning, match="gradients of the compiled objective differ"):
        assert not fitted(lambda: RealNVP(3), rows(), compile=True).compiled


def test_an_objective_that_changes_buffers():
    density = RealNVP(3)
    density.register_buffer("count", torch.zeros(()))

    def counted(x, run=density.objective):
        density.count += 1
        return run(x)

    density.objective = counted
    with pytest.raises(UnsupportedForCompilation, match="changes the buffer count"):
        compiling.CompiledObjective(density, Batch(torch.randn(5, 3)), list(density.parameters()))
    assert density.count == 0


def test_a_compiled_step_that_fails_goes_on_eagerly(monkeypatch):
    calls = []

    def failing(density):
        def run(values, context, weights):
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("no graphs left")
            return density.log_prob(values)

        return run

    monkeypatch.setattr(compiling, "_compile", failing)
    make = lambda: RealNVP(3, num_layers=2, hidden_dims=(8,))  # noqa: E731
    with pytest.warns(UserWarning, match="goes on with eager steps: .*no graphs left"):
        found = fitted(make, rows(), compile=True)
    assert not found.compiled
    assert found.steps == 12


def test_several_processes_take_eager_steps():
    density = RealNVP(3)
    run = BatchObjective.__new__(BatchObjective)
    run.processes = SimpleNamespace(count=2)
    with pytest.raises(UnsupportedForCompilation, match="averaged over processes"):
        run.compile()
    assert Processes().count == 1
    assert density.training


def test_auto_compiles_what_takes_long_and_keeps_what_is_faster(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(compiling, "time", clock)
    monkeypatch.setattr("pyro_flows_ext.infer.training.timing.time", clock)
    for eager, compiled, num_steps in ((1.0, 0.5, 1000), (1.0, 1.5, 1000), (1.0, 0.5, 200)):
        compiler, made, given_up = compiling.Compiler(num_steps, "auto"), [], []
        for step in range(1, 20):
            if not made:
                now[0] += eager
                made += [step] if compiler.compile(step, lambda: True) else []
            elif not given_up:
                now[0] += compiled
                given_up += [step] if compiler.is_slower() else []
        assert made == ([6] if num_steps == 1000 else [])
        assert given_up == ([12] if compiled > eager else [])


def test_other_values_are_named():
    with pytest.raises(ValueError, match="compile: expected True, False or \"auto\", got 'yes'"):
        fit_density(RealNVP(3), rows(), compile="yes")


@pytest.mark.slow
def test_inductor(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    compare(lambda: RealNVP(3, num_layers=2, hidden_dims=(8,)), rows())


def test_gradients_that_are_not_finite_are_no_roundings():
    whole, broken = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(UnsupportedForCompilation, match="gradients of the compiled objective"):
        compiling._check_equal("gradients", [whole, broken], [whole, whole])
