"""Points 1 to 8: values, log-dets, shapes and gradients."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..transforms import FlowTransform
from .case import Case, Factory, Options

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]


def check_round_trip(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 1: f⁻¹(f(x)) = x and f(f⁻¹(y)) = y, at values that f has never drawn."""
    with Case(1, "round trip", factory, **options) as case, torch.no_grad():
        transform = case.bind(case.module, case.context(32))
        x, y = case.x(32), case.y(32)
        there = transform.forward_and_ladj(x.clone())[0]
        case.close("inverse(forward(x))", transform.inverse_and_ladj(there)[0], x)
        back = transform.inverse_and_ladj(y.clone())[0]
        case.close("forward(inverse(y))", transform.forward_and_ladj(back)[0], y)


def check_ladj(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 2: ladj is log|det| of the Jacobian that autograd gives, both ways, and `sign` is its sign, or 0."""
    with Case(2, "ladj", factory, **options) as case:
        for _ in range(6):
            transform = case.bind(case.module, case.context())
            for what, run, value in (
                ("forward ladj", transform.forward_and_ladj, case.x()),
                ("inverse ladj", transform.inverse_and_ladj, case.y()),
            ):
                jacobian = torch.autograd.functional.jacobian(lambda v, run=run: run(v)[0], value)
                sign, expected = torch.linalg.slogdet(jacobian.reshape(2 * (value.numel(),)))
                case.close(what, run(value.clone())[1].detach(), expected)
                claimed = torch.as_tensor(transform.sign)
                case.require(
                    bool(((claimed == sign.sign()) | (claimed == 0)).all()),
                    f"{what}: sign {claimed.tolist()}, but the determinant's is {sign.item():+.0f}",
                )


def check_inverse_ladj(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 3: the inverse's ladj at y = f(x) is minus the forward one at x, and the same from an unseen y."""
    with Case(3, "inverse ladj", factory, **options) as case, torch.no_grad():
        transform = case.bind(case.module, case.context(32))
        y, ladj = transform.forward_and_ladj(case.x(32))
        case.close("inverse ladj at f(x)", transform.inverse_and_ladj(y)[1], -ladj)
        x, ladj = transform.inverse_and_ladj(case.y(32))
        case.close("forward ladj at f⁻¹(y)", transform.forward_and_ladj(x)[1], -ladj)


def check_one_pass(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 4: the separate calls of the torch protocol agree with the one pass, and repeat none that is still good."""
    with Case(4, "one pass", factory, **options) as case:
        transform = case.bind(case.module, case.context(5))
        case.require(transform.inv.inv is transform, "inv.inv is another object")
        for arrow, to, value in (("f", transform, case.x(5)), ("f⁻¹", transform.inv, case.y(5))):
            out, ladj = to.forward_and_ladj(value.clone())
            for what, actual in (
                (f"{arrow}(x)", to(value.clone())),
                (f"{arrow}._call(x)", to._call(value.clone())),
                (f"{arrow}.inv._inverse(x)", to.inv._inverse(value.clone())),
            ):
                case.close(what, actual, out)
            for what, actual in (
                ("log_abs_det_jacobian", to.log_abs_det_jacobian(value.clone(), out)),
                ("inv.log_abs_det_jacobian", -to.inv.log_abs_det_jacobian(out, value.clone())),
                ("inv.inverse_and_ladj", to.inv.inverse_and_ladj(value.clone())[1]),
            ):
                case.close(f"{arrow}.{what}", actual, ladj)
            with _counted_passes(to) as passes:
                first = to(value)
                again = to.log_abs_det_jacobian(value, first)
                back = to.inv(first)
            case.close(f"{arrow}.log_abs_det_jacobian", again, ladj)
            case.require(back is value, f"{arrow}.inv({arrow}(x)) does not remember x")
            case.require(
                len(passes) == 1, f"{arrow}: value, log-det and inverse cost the passes {passes}"
            )


@contextlib.contextmanager
def _counted_passes(transform: FlowTransform) -> Iterator[list[str]]:
    """A list that grows by a name with every pass of the transform or its inverse."""
    passes: list[str] = []

    def counted(name: str, run: Pass) -> Pass:
        def one_pass(value: Tensor) -> tuple[Tensor, Tensor]:
            passes.append(name)
            return run(value)

        return one_pass

    parts, methods = (transform, transform.inv), ("forward_and_ladj", "inverse_and_ladj")
    for part, method in itertools.product(parts, methods):
        part.__dict__[method] = counted(method, getattr(part, method))
    try:
        yield passes
    finally:
        for part, method in itertools.product(parts, methods):
            del part.__dict__[method]


def check_batch_shapes(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 5: a batch `()`, `(3,)` or `(3, 4)` of inputs and contexts is a loop over its rows, and rows are independent."""
    with Case(5, "batch shapes", factory, **options) as case:
        for batch in ((), (3,), (3, 4)):
            _check_rows(case, batch, case.context(*batch))
        if case.context_dim is not None:
            _check_rows(case, (3, 4), case.context(4))
            context, x = case.context(3), case.x()
            transform = case.bind(case.module, context)
            case.close(
                "one input, three contexts",
                transform.forward_and_ladj(x)[0],
                transform.forward_and_ladj(x.expand(3, *x.shape))[0],
            )
        _check_draws(case)


def _check_rows(case: Case, batch: tuple[int, ...], context: Tensor | None) -> None:
    transform = case.bind(case.module, context)
    rows = context
    if context is not None:
        rows = context.expand(*batch, context.shape[-1])
    for what, method, value in (
        ("forward", "forward_and_ladj", case.x(*batch)),
        ("inverse", "inverse_and_ladj", case.y(*batch)),
    ):
        what = f"{what}, batch {batch}"
        out, ladj = getattr(transform, method)(value)
        case.require(tuple(ladj.shape) == batch, f"{what}: ladj has the shape {tuple(ladj.shape)}")
        shape_of = transform.forward_shape if "forward" in what else transform.inverse_shape
        case.require(
            tuple(shape_of(value.shape)) == tuple(out.shape),
            f"{what}: predicted shape {tuple(shape_of(value.shape))}, got {tuple(out.shape)}",
        )
        for index in itertools.product(*map(range, batch)):
            row = case.bind(case.module, None if rows is None else rows[index])
            out_row, ladj_row = getattr(row, method)(value[index])
            case.close(f"{what}: row {index} against the row alone", out[index], out_row)
            case.close(f"{what}: ladj of row {index} against the row alone", ladj[index], ladj_row)


def _check_draws(case: Case) -> None:
    """Three draws, at equal contexts where there is one, are three draws and not one copied."""
    context = case.context()
    rows = None if context is None else context.expand(3, -1)
    density = case.density(case.bind(case.module, rows))
    batch = (3,) if context is not None else ()
    case.require(
        tuple(density.batch_shape) == batch,
        f"density: expected batch_shape {batch}, got {tuple(density.batch_shape)}",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(case.seed)
        draws = density.sample(torch.Size((3,))[len(batch) :])
    case.require(draws.shape[0] == 3, f"draws: expected three rows, got {tuple(draws.shape)}")
    case.require(
        not any(torch.equal(draws[i], draws[j]) for i, j in ((0, 1), (0, 2), (1, 2))),
        "draws: rows share one draw",
    )


def check_dtype(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 6: results have the dtype of the input, and no digit depends on torch's default dtype."""
    with Case(6, "dtype", factory, **options) as case, torch.no_grad():
        context, x, y = case.context(5), case.x(5), case.y(5)
        default = torch.get_default_dtype()
        results = []
        try:
            for other in (torch.float32, torch.float64):
                torch.set_default_dtype(other)
                transform = case.bind(case.module, context)
                tensors = (*transform.forward_and_ladj(x), *transform.inverse_and_ladj(y))
                for what, tensor in zip(("y", "ladj", "x", "inverse ladj"), tensors, strict=True):
                    case.require(
                        tensor.dtype == case.dtype,
                        f"{what} is {tensor.dtype} under the default dtype {other}",
                    )
                results.append(tensors)
        finally:
            torch.set_default_dtype(default)
        for a, b in zip(*results, strict=True):
            case.close("change with the default dtype", a, b, case.tolerance * 1e-2)


def check_gradients(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 7: a finite gradient for every parameter through both directions; in float64 also right, by `gradcheck`."""
    with Case(7, "gradients", factory, **options) as case:
        context = case.context(2)
        for method, value in (("forward_and_ladj", case.x(2)), ("inverse_and_ladj", case.y(2))):

            def run(value: Tensor, *_: Tensor, method: str = method) -> tuple[Tensor, Tensor]:
                return getattr(case.bind(case.module, context), method)(value)

            leaves = _leaves(case, value, context)
            out, ladj = run(value)
            loss = (case.normal(*out.shape) * out).sum() + (case.normal(*ladj.shape) * ladj).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, grad in zip(leaves, grads, strict=True):
                what = f"{method}: the gradient of {name} is"
                case.require(grad is not None, f"{what} None")
                case.require(grad is not None and bool(grad.isfinite().all()), f"{what} not finite")
            if case.dtype == torch.float64:
                torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


def check_per_sample_gradients(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 8: the gradient of Σ wₙ log q(yₙ | cₙ) is the sum of the gradients of its terms, taken one at a time."""
    with Case(8, "per-sample gradients", factory, **options) as case:
        context, y, weight = case.context(4), case.y(4), case.normal(4)
        leaves = _leaves(case, y, context)

        def gradients(loss: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )

        together = gradients((weight * case.log_q(case.bind(case.module, context), y)).sum())
        terms = []
        for n in range(4):
            row = case.bind(case.module, None if context is None else context[n])
            terms.append(gradients(weight[n] * case.log_q(row, y[n])))
        for name, a, b in zip(leaves, together, zip(*terms, strict=True), strict=True):
            case.close(f"gradient of {name}: batch against loop", a, torch.stack(b).sum(0))


def _leaves(case: Case, value: Tensor, context: Tensor | None) -> dict[str, Tensor]:
    """Everything that shall get a gradient, by name: the input, the context, the parameters."""
    leaves = {"the input": value.requires_grad_()}
    if context is not None:
        leaves["the context"] = context.requires_grad_()
    leaves.update((n, p) for n, p in case.module.named_parameters() if p.requires_grad)
    return leaves
