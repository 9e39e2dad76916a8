"""The contract of a density: as a module that is copied, moved and compiled, and as a part of Pyro programs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import Unpack

from ..distributions import Density
from .density_case import DensityCase, DensityFactory, DensityOptions

ROWS = 6
STEPS = 3


def check_density_plates(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 5: the density in plates, drawn and observed, with the scale of `subsample_size`, and replayed."""
    with DensityCase(5, "plates", factory, **options) as case, torch.no_grad(), case.seeded():
        batch = len(case.at(case.module, case.context()).batch_shape)
        contexts, rows = case.context(ROWS), torch.Size((ROWS,))
        if batch:  # the rows of the plate are the density's own
            rows = case.module.batch_shape
        data = case.values(4, *rows)

        def at(index: Tensor) -> Density:
            return case.at(case.module, None if contexts is None else contexts[index])

        def model(subsample_size: int | None = None, is_observed: bool = False) -> Tensor:
            pyro.module("density", case.module)
            with (
                pyro.plate("outer", 4, dim=-2),
                pyro.plate("data", rows[0], subsample_size=subsample_size, dim=-1) as index,
            ):
                chosen = torch.as_tensor(index)
                obs = data[:, chosen] if is_observed else None
                return pyro.sample("y", at(chosen), obs=obs)

        def score(value: Tensor, index: Tensor) -> Tensor:
            if batch or not case.module.exact_log_prob:
                return case.log_prob(at(index), value).sum()
            # Row by row, so that nothing can depend on how many there are.
            parts = [at(i).log_prob(v).sum() for i, v in zip(index, value.unbind(1), strict=True)]
            return torch.stack(parts).sum()

        def check(what: str, trace: Trace, size: int = rows[0]) -> None:
            value, index = (torch.as_tensor(trace.nodes[name]["value"]) for name in ("y", "data"))
            shape = (4, size, *case.event_shape)
            case.require(
                tuple(value.shape) == shape,
                f"{what}: expected a value of shape {shape}, got {tuple(value.shape)}",
            )
            expected = rows[0] / size * score(value, index)
            with case.seeded():
                case.close(f"{what}: log_prob_sum", torch.as_tensor(trace.log_prob_sum()), expected)

        with pyro.validation_enabled(True), poutine.block():
            trace = poutine.trace(model).get_trace()
            check("draws in plates", trace)
            replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
            case.require(
                replayed.nodes["y"]["value"] is trace.nodes["y"]["value"],
                "replay: the value was drawn again",
            )
            check("obs", poutine.trace(model).get_trace(is_observed=True))
            if not batch:
                check("subsample", poutine.trace(model).get_trace(2), 2)
                check("obs, subsample", poutine.trace(model).get_trace(2, is_observed=True), 2)


def check_density_trains(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 6: SVI trains every parameter, by `pyro.module` and as an attribute of a `PyroModule`, as plain torch would."""
    with DensityCase(6, "training", factory, **options) as case, case.seeded():
        batch = case.module.batch_shape if case.context_dim is None else torch.Size()
        contexts, data = case.context(ROWS), case.values(*(batch or (ROWS,)))

        def observe(density: Density) -> None:
            with pyro.plate("data", len(data)):
                pyro.sample("y", case.at(density, contexts), obs=data)

        def by_module(density: Density) -> Callable[[], None]:
            def model() -> None:
                pyro.module("density", density)
                observe(density)

            return model

        class Program(PyroModule):
            def __init__(self, density: Density):
                super().__init__()
                self.density = density

            def forward(self) -> None:
                observe(self.density)

        plain = case.build()
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (-case.log_prob(case.at(plain, contexts), data).sum()).backward()
            optimizer.step()
        expected = dict(plain.named_parameters())
        for what, make in (("pyro.module", by_module), ("an attribute", Program)):
            density = case.build()
            before = copy.deepcopy(dict(density.named_parameters()))
            with pyro.get_param_store().scope():
                optim = PyroOptim(torch.optim.Adam, {"lr": 0.01})
                svi = SVI(make(density), lambda: None, optim, Trace_ELBO())
                for _ in range(STEPS):
                    with case.seeded():
                        svi.step()
            for name, parameter in density.named_parameters():
                case.require(
                    not torch.equal(parameter, before[name]), f"{what}: {name} does not train"
                )
                case.close(
                    f"{what}: {name}, trained by SVI and by torch",
                    parameter.detach(),
                    expected[name].detach(),
                    1e3 * case.tolerance,
                )


def check_density_copies(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 7: deepcopy, pickle and a saved state_dict, after use in Pyro, give an equal density that shares nothing."""
    with DensityCase(7, "copies", factory, **options) as case, case.seeded():
        density, context = case.build(), case.context()
        value = case.values(3, *case.at(density, context).batch_shape)
        with pyro.get_param_store().scope():
            pyro.module("density", density)
            list(pyro.get_param_store().items())  # hangs weak references on the parameters
            used = case.at(density, context)
            held = used.log_prob(used.sample().requires_grad_())  # with a graph
            expected = case.log_prob(case.at(density, context), value).detach()
            copies = {
                "deepcopy": copy.deepcopy(density),
                "pickle": pickle.loads(pickle.dumps(density)),
                "state_dict": case.build(case.seed + 1),
            }
            file = io.BytesIO()
            torch.save(density.state_dict(), file)
        file.seek(0)
        copies["state_dict"].load_state_dict(torch.load(file, weights_only=True))
        own = {id(p) for p in density.parameters()}
        for what, twin in copies.items():
            case.require(
                not any(id(p) in own for p in twin.parameters()), f"{what}: parameters are shared"
            )
            again = case.log_prob(case.at(twin, context), value).detach()
            case.close(f"{what}: log_prob of the copy", again, expected)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.add_(0.1)
            again = case.log_prob(case.at(density, context), value).detach()
            case.close(f"{what}: the original after a change of the copy", again, expected, 0.0)
        case.require(bool(held.isfinite().all()), "log_prob of a draw is not finite")


def check_density_dtype(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 8: draws and scores have the dtype of the parameters; `.double()` and `.float()` move the base too."""
    with DensityCase(8, "dtype", factory, **options) as case, torch.no_grad(), case.seeded():
        context = case.context()
        value = case.values(3, *case.at(case.module, context).batch_shape)
        density, results = case.build(dtype=torch.float32), {}
        for move in (torch.float32, torch.float64, torch.float32):
            density = density.to(move)
            here = case.at(density, None if context is None else context.to(move))
            with case.seeded():
                draw = here.sample()
            results[move] = case.log_prob(here, value.to(move))
            for what, tensor in (("a draw", draw), ("log_prob", results[move])):
                case.require(tensor.dtype == move, f"{move}: {what} has {tensor.dtype}")
        if here.exact_log_prob:  # noise of another dtype is other noise
            case.close(
                "log_prob in float32 and in float64",
                results[torch.float32].double(),
                results[torch.float64],
                1e-3,
            )


def check_density_device(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 9: the density moves to another device, and draws, scores and gradients stay there.

    On the meta device; again with fake tensors, which compare the devices of all operands; and on a GPU where there is
    one. Validation is off: it reads values, and meta tensors have none.
    """
    with DensityCase(9, "device", factory, **options) as case, pyro.validation_enabled(False):
        context = case.context()
        value = case.values(3, *case.at(case.module, context).batch_shape)

        def run(where: str, density: Density, move: Callable[[Tensor], Tensor]) -> None:
            here = case.at(density, None if context is None else move(context))
            value_ = move(value).requires_grad_()
            log_p = here.log_prob(value_)
            results = [log_p, here.sample()]
            if here.has_rsample:
                results += here.rsample_and_log_prob()
            torch.stack([result.sum() for result in results]).sum().backward()
            grads = [t.grad for t in (value_, *density.parameters()) if t.grad is not None]
            for tensor in (*results, *grads):
                case.require(
                    tensor.device == value_.device,
                    f"{where}: a result or a gradient is on {tensor.device}, not on {value_.device}",
                )

        run("meta", case.build().to("meta"), lambda t: t.to("meta"))
        density = case.build()
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:

            def to_fake(tensor: Tensor) -> Tensor:
                return fake.from_tensor(tensor.detach()).to("meta")

            run("fake", density._apply(to_fake), to_fake)
        if torch.cuda.is_available():
            run("GPU", case.build().to("cuda"), lambda t: t.to("cuda"))


def check_density_compiles(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 10: `torch.compile(fullgraph=True, backend="aot_eager")` of log_prob gives the values and gradients of eager mode.

    Validation is off: it branches on values, and torch itself turns it off when it first compiles anything.
    """
    with DensityCase(10, "compiles", factory, **options) as case, pyro.validation_enabled(False):
        context = case.context(3)
        batch = case.module.batch_shape if context is None else ()
        value = case.values(3, *batch).requires_grad_()

        def run(value: Tensor) -> Tensor:
            return case.at(case.module, context).log_prob(value)

        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        results = []
        for program in (compiled, run):
            with case.seeded():
                log_p = program(value)
            grads = case.gradients(case.module, log_p, value)
            results.append({"log_prob": log_p, **grads})
        for name, tensor in results[0].items():
            case.close(name, tensor.detach(), results[1][name].detach())
        torch._dynamo.reset()
