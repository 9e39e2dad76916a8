"""Points 9 to 13: the transform as a module that is copied, moved, trained and compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import Unpack

from ..transforms import FlowTransform
from .case import Case, Factory, Options

# Changes the parameters of a module in place.
Update = Callable[[nn.Module], object]

# A log-det that is fresh differs from the same one computed again, or in the other direction, by rounding alone.
SAME = 1e-2


def check_copies(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 9: deepcopy, pickle and state_dict after use give an equal module that shares nothing with the first."""
    with Case(9, "copies", factory, **options) as case:
        module, context, x, y = case.build(), case.context(3), case.x(3), case.y(3)
        transform = case.bind(module, context)
        used = transform(
            x.requires_grad_()
        )  # with a graph, and held: what a cache would drag along
        transform.log_abs_det_jacobian(x, used)
        transform.inv(y)

        loaded = case.build(case.seed + 1)
        case.require(
            list(loaded.state_dict()) == list(module.state_dict()),
            f"state_dict: use changed its keys to {list(module.state_dict())}",
        )
        loaded.load_state_dict(module.state_dict())
        expected = _both_ways(transform, x, y)
        own = {id(p) for p in module.parameters()}
        for what, twin in (
            ("deepcopy", copy.deepcopy(module)),
            ("pickle", pickle.loads(pickle.dumps(module))),
            ("load_state_dict", loaded),
        ):
            case.require(
                not any(id(p) in own for p in twin.parameters()), f"{what}: parameters are shared"
            )
            for a, b in zip(_both_ways(case.bind(twin, context), x, y), expected, strict=True):
                case.close(f"{what}: result of the copy", a, b, case.tolerance * SAME)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.add_(1.0)
            for a, b in zip(_both_ways(case.bind(module, context), x, y), expected, strict=True):
                case.close(f"{what}: the original after a change of the copy", a, b, 0.0)


def _both_ways(transform: FlowTransform, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = x.detach().clone(), y.detach().clone()
    return tuple(
        t.detach() for t in (*transform.forward_and_ladj(x), *transform.inverse_and_ladj(y))
    )


def check_device(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 10: the module moves to another device, and passes and gradients stay there.

    On the meta device; again with fake tensors, which compare the devices of all operands as a real device does and
    meta alone does not; and on a GPU where there is one, against the values on the CPU.
    """
    with Case(10, "device", factory, **options) as case:
        context, x, y = case.context(3), case.x(3), case.y(3)
        expected = _both_ways(case.bind(case.module, context), x, y)

        def run(where: str, module: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
            transform = case.bind(module, None if context is None else move(context))
            x_, y_ = move(x).requires_grad_(), move(y).requires_grad_()
            results = *transform.forward_and_ladj(x_), *transform.inverse_and_ladj(y_)
            torch.stack([result.sum() for result in results]).sum().backward()
            grads = [t.grad for t in (x_, y_, *module.parameters()) if t.grad is not None]
            for tensor in (*results, *grads):
                case.require(
                    tensor.device == x_.device,
                    f"{where}: a result or a gradient is on {tensor.device}, not on {x_.device}",
                )
            for tensor, like in zip(results, expected, strict=True):
                if tensor.is_cuda:
                    case.close(where, tensor.detach().cpu(), like)

        run("meta", case.build().to("meta"), lambda t: t.to("meta"))
        module = case.build()
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:

            def to_fake(tensor: Tensor) -> Tensor:
                return fake.from_tensor(tensor.detach()).to("meta")

            run("fake", module._apply(to_fake), to_fake)
        if torch.cuda.is_available():
            run("GPU", case.build().to("cuda"), lambda t: t.to("cuda"))


def check_inputs_untouched(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 11: a pass changes neither its input nor the parameters, nor any `requires_grad` or `training` flag."""
    with Case(11, "inputs untouched", factory, **options) as case:
        context, x, y = case.context(3), case.x(3), case.y(3)
        for flag in (False, True):
            module = case.build()
            first = next(module.parameters(), None)
            if first is not None:
                first.requires_grad_(flag)
            state = copy.deepcopy(module.state_dict())
            flags = [p.requires_grad for p in module.parameters()]
            training = [part.training for part in module.modules()]
            transform = case.bind(module, context)
            for what, to, value in (("forward", transform, x), ("inverse", transform.inv, y)):
                argument = value.clone()
                to.log_abs_det_jacobian(argument, to(argument))
                to.forward_and_ladj(argument)
                case.require(
                    torch.equal(argument, value) and argument._version == 0,
                    f"{what}: the input was written to",
                )
                case.require(not argument.requires_grad, f"{what}: the input requires a gradient")
            for name, tensor in module.state_dict().items():
                case.require(
                    name in state and torch.equal(tensor, state[name]), f"{name} was written to"
                )
            case.require(
                [p.requires_grad for p in module.parameters()] == flags,
                "a parameter's requires_grad changed",
            )
            case.require(
                [part.training for part in module.modules()] == training, "train/eval changed"
            )
            case.require(
                all(p.grad is None for p in module.parameters()), "a parameter was given a .grad"
            )


def check_fresh_after_step(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 12: after an update of the parameters, value and log-det of the very same tensors are new."""
    with Case(12, "fresh after step", factory, **options) as case:
        context, x, y = case.context(4), case.x(4), case.y(4)
        for name, update in _updates(case):
            for what, inverted, value in (("forward", False, x), ("inverse", True, y)):
                module = case.build()

                def direction(
                    module: nn.Module = module, inverted: bool = inverted
                ) -> FlowTransform:
                    transform = case.bind(module, context)
                    return transform.inv if inverted else transform

                to = direction()
                out = to(value)
                ladj = to.log_abs_det_jacobian(value, out)
                module.zero_grad()
                if out.requires_grad:
                    (ladj.sum() + (out**2).mean()).backward()
                update(module)
                to = to if context is None else direction()
                again = to.log_abs_det_jacobian(value, out)
                fresh = to.log_abs_det_jacobian(value.clone(), out.clone())
                where = f"{what} after {name}"
                case.close(f"log-det {where}", again, fresh, case.tolerance * SAME)
                case.close(f"value {where}", to(value), to(value.clone()), case.tolerance * SAME)


def _updates(case: Case) -> Iterator[tuple[str, Update]]:
    """Ways to change parameters in place; tensor versions do not see the first two, nor the last but one."""

    def step(optimizer: Callable[..., torch.optim.Optimizer], **settings: bool) -> Update:
        return lambda module: optimizer(module.parameters(), lr=0.05, **settings).step()

    if any(p.requires_grad for p in case.module.parameters()):
        yield "a step of fused Adam", step(torch.optim.Adam, fused=True)
        yield "a step of ClippedAdam", step(ClippedAdam)
        yield "a step of SGD", step(torch.optim.SGD)
    # bfloat16 on the way, so that the values change although the dtype in the end does not.
    yield "a change of dtype", lambda module: module.bfloat16().to(case.dtype)
    other = case.build(case.seed + 1).state_dict()
    yield "load_state_dict", lambda module: module.load_state_dict(other)


def check_compiles(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 13: `torch.compile(fullgraph=True, backend="aot_eager")` gives the values and gradients of eager mode."""
    with Case(13, "compiles", factory, **options) as case:
        context = case.context(3)
        parameters = [p for p in case.module.parameters() if p.requires_grad]

        for method, value in (("forward_and_ladj", case.x(3)), ("inverse_and_ladj", case.y(3))):

            def run(
                value: Tensor, context: Tensor | None, method: str = method
            ) -> tuple[Tensor, Tensor]:
                return getattr(case.bind(case.module, context), method)(value)

            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            wanted = [value.requires_grad_(), *parameters]
            weights = [case.normal(*t.shape) for t in run(value, context)]
            results = []
            for program in (compiled, run):
                out = program(value, context)
                loss = torch.stack([(w * t).sum() for w, t in zip(weights, out, strict=True)]).sum()
                grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                results.append([*out, *grads])
            names = ["value", "log-det", "gradient of the input"]
            names += [n for n, p in case.module.named_parameters() if p.requires_grad]
            for name, a, b in zip(names, *results, strict=True):
                case.close(f"{method}: {name}", a.detach(), b.detach())
        torch._dynamo.reset()
