"""The contract of a density as functions that anybody can call on a density of their own: its numbers.

    from pyro_flows_ext.testing import check_density_contract

    def test_my_density():
        check_density_contract(lambda: MyDensity(2))
        check_density_contract(lambda: MyConditionalDensity(2, context_dim=3), context_dim=3)

or one test a point, over `DENSITY_POINTS`. As for transforms, every check builds the density anew, at perturbed
parameters. A density whose `log_prob` is a random bound is scored with the same noise where two results have to agree.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor
from typing_extensions import Unpack

from ..distributions import Density
from .density_case import DensityCase, DensityFactory, DensityOptions
from .programs import DENSITY_TOLERANCE, on_grid

# Draws of a bound at every point of a grid: its exponential is unbiased, and the grid averages over many points.
GRID_PARTICLES = 20


def check_density_integral(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 1: over one or two dimensions the density integrates to 1 ± 0.01, and draws have its moments.

    The moments are those of a grid, first and second; tolerance: five standard errors of 20,000 draws. A bound with
    `log_prob_bound(value, num_particles)` is taken for the exponential of that, whose mean is the density (± 0.05).
    Raises `ValueError` for events of three numbers and more, for a batch, and for a bound without `log_prob_bound`.
    """
    case = DensityCase(1, "integral", factory, **options)
    if not has_integral(case.at(case.module, case.context())):
        raise ValueError(
            "check_density_integral: expected an exact density or one with log_prob_bound, without batch, and an event of "
            f"one or two numbers, got shape {tuple(case.event_shape)}"
        )
    with case, torch.no_grad(), case.seeded():
        density = case.at(case.module, case.context())
        if density.exact_log_prob:
            tolerance = DENSITY_TOLERANCE
            grid, mass = on_grid(density, seed=case.seed)
        else:
            tolerance = 5 * DENSITY_TOLERANCE
            grid, mass = on_grid(_Estimated(density), seed=case.seed, resolutions=(200,))
        total = mass.sum().item()
        case.require(
            abs(total - 1) <= tolerance,
            f"the density integrates to {total:.4f}, tolerance {tolerance}",
        )
        draws = density.sample(Size((20_000,))).double()
        middle, spread = draws.mean(0), draws.std(0)
        seen, expected = (_moments((x - middle) / spread) for x in (draws, grid))
        error = seen.std(0) / len(seen) ** 0.5 + 1e-3  # the grid has an error as well
        most = ((seen.mean(0) - mass @ expected) / error).abs().max().item()
        bound = 5 if density.exact_log_prob else 10
        case.require(
            most <= bound,
            f"moments of draws and of the density differ by {most:.1f} standard errors, tolerance {bound}",
        )


def has_integral(density: Density) -> bool:
    """Whether `check_density_integral` applies."""
    known = density.exact_log_prob or hasattr(density, "log_prob_bound")
    return known and not density.batch_shape and density.event_shape.numel() <= 2


class _Estimated:
    """A bound's unbiased estimate in place of the density."""

    def __init__(self, density: Density):
        self.sample, self.support = density.sample, density.support
        self._bound = density.log_prob_bound

    def log_prob(self, value: Tensor) -> Tensor:
        return self._bound(value, GRID_PARTICLES)  # type: ignore[operator]


def _moments(x: Tensor) -> Tensor:
    """First and second powers and products, `(*, D)` -> `(*, M)`."""
    i, j = torch.tril_indices(x.shape[-1], x.shape[-1])
    return torch.cat([x, x[..., i] * x[..., j]], -1)


def check_density_shapes(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 2: shapes of draws and scores; `expand`; every row a draw and a score of its own; contexts as in a loop."""
    with DensityCase(2, "shapes", factory, **options) as case, torch.no_grad(), case.seeded():
        density = case.at(case.module, case.context())
        batch, event = density.batch_shape, case.event_shape
        for shape in ((), (3,), (2, 3)):
            draws = density.sample(Size(shape))
            _expect(case, f"sample({shape})", draws, shape + batch + event)
            _expect(case, "its log_prob", density.log_prob(draws), shape + batch)
            _all_differ(case, f"sample({shape})", draws, len(event))
        wide = density.expand(Size((4,)) + batch)
        case.require(isinstance(wide, type(density)), f"expand gives a {type(wide).__name__}")
        draws = wide.sample()
        _expect(case, "a draw after expand", draws, Size((4,)) + batch + event)
        _all_differ(case, "a draw after expand", draws, len(event))
        value = case.values(4, *batch)
        case.close(
            "log_prob after expand", case.log_prob(wide, value), case.log_prob(density, value)
        )
        if density.exact_log_prob:
            alone = torch.stack([density.log_prob(row) for row in value])
            case.close("log_prob of rows together and one by one", density.log_prob(value), alone)
        own = {id(p) for p in density.parameters()}
        case.require(
            own == {id(p) for p in wide.parameters()}, "expand: the parameters are not shared"
        )
        if batch:
            _expect(case, "log_prob of one event", density.log_prob(case.values()), batch)
        contexts = case.context(3)
        if contexts is not None and not batch:
            _check_contexts(case, contexts)


def _check_contexts(case: DensityCase, contexts: Tensor) -> None:
    density = case.at(case.module, contexts)
    case.require(
        density.batch_shape == (3,),
        f"at a context of shape {tuple(contexts.shape)}: expected batch_shape (3,), got {tuple(density.batch_shape)}",
    )
    draws = density.sample(Size((2,)))
    _expect(case, "a draw at contexts", draws, Size((2, 3)) + case.event_shape)
    _all_differ(case, "a draw at contexts", draws, len(case.event_shape))
    same = case.at(case.module, contexts[:1].expand(3, -1)).sample()
    _all_differ(case, "a draw at equal contexts", same, len(case.event_shape))
    if density.exact_log_prob:
        value = case.values(3)
        loop = [case.at(case.module, c).log_prob(v) for c, v in zip(contexts, value, strict=True)]
        case.close("log_prob at contexts", density.log_prob(value), torch.stack(loop))


def _expect(case: DensityCase, what: str, tensor: Tensor, shape: Size) -> None:
    case.require(
        tensor.shape == shape, f"{what}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}"
    )


def _all_differ(case: DensityCase, what: str, draws: Tensor, event_dim: int) -> None:
    rows = draws.reshape(-1, *draws.shape[draws.dim() - event_dim :]).flatten(1)
    case.require(len(rows.unique(dim=0)) == len(rows), f"{what}: rows share one draw")


def check_density_scores(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 3: `rsample_and_log_prob` = separate calls; unseen values score the same as drawn ones; gradients.

    The gradient of log_prob in the value and in all parameters against a central difference along a random direction,
    and none of them zero.
    """
    with DensityCase(3, "scores", factory, **options) as case:
        context = case.context()
        density = case.at(case.module, context)
        if density.has_rsample:
            with case.seeded():
                value, together = density.rsample_and_log_prob(Size((5,)))
            with case.seeded():
                drawn = density.rsample(Size((5,)))
                apart = density.log_prob(drawn)
            case.close("rsample after rsample_and_log_prob", drawn, value)
            case.close("log_prob of rsample and of rsample_and_log_prob", apart, together)
            for what, out in (("rsample", value), ("log_prob", together)):
                case.require(out.requires_grad, f"{what}: no gradient in the parameters")
        with case.seeded():
            value = density.sample(Size((5,)))
        case.require(not value.requires_grad, "sample: the draw requires a gradient")
        unseen = case.at(case.build(), context)
        case.close(
            "log_prob of a draw, and of its copy by a density that did not draw it",
            case.log_prob(density, value).detach(),
            case.log_prob(unseen, value.clone()).detach(),
            1e3 * case.tolerance,
        )
        if case.dtype == torch.float64:
            _check_gradients(case)


def _check_gradients(case: DensityCase) -> None:
    context, value = case.context(3), case.values(3, *_batch(case)).requires_grad_()
    log_p = case.log_prob(case.at(case.module, context), value)
    case.require(bool(log_p.isfinite().all()), "log_prob of an unseen value is not finite")
    grads = case.gradients(case.module, log_p, value)
    targets = dict(case.module.named_parameters())
    step, slope, ends = 1e-6, torch.zeros((), dtype=case.dtype), []
    directions = {name: case.normal(*grad.shape) for name, grad in grads.items()}
    for name, grad in grads.items():
        case.require(bool(grad.isfinite().all()), f"{name}: the gradient is not finite")
        case.require(bool(grad.any()), f"{name}: the gradient is zero")
        slope = slope + (grad * directions[name]).sum()
    with torch.no_grad():
        for sign in (1, -2):  # forward, then back through the middle
            for name, direction in directions.items():
                target = value if name == "the value" else targets[name]
                target.add_(sign * step * direction)
            ends.append(case.log_prob(case.at(case.module, context), value).sum())
    case.close("directional derivative", (ends[0] - ends[1]) / (2 * step), slope, 1e-4)


def _batch(case: DensityCase) -> Size:
    """The batch shape beside the one of contexts."""
    return Size() if case.context_dim is not None else case.module.batch_shape


def check_density_bound(factory: DensityFactory, **options: Unpack[DensityOptions]) -> None:
    """Point 4: a bound lies below the density it bounds, on average, and more particles bring it closer.

    `reference(density, values)` gives log p(values). Raises `ValueError` without one, or where `log_prob` is exact.
    """
    case = DensityCase(4, "bound", factory, **options)
    density = case.at(case.module, case.context())
    if case.reference is None or density.exact_log_prob:
        raise ValueError(
            "check_density_bound: expected a density with exact_log_prob=False and a reference(density, values) for log p"
        )
    with case, torch.no_grad(), case.seeded():
        with case.seeded():
            value = density.sample(Size((3,)))
        exact = case.reference(density, value)
        estimates = {1: density.log_prob(value.expand(4000, *value.shape))}
        bound = getattr(density, "log_prob_bound", None)
        if bound is not None:
            for num in (4, 64):
                estimates[num] = bound(value.expand(4000 // num, *value.shape), num)
        last, last_error = None, None
        for num, draws in estimates.items():
            mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
            case.require(
                bool((mean <= exact + 5 * error).all()),
                f"{num} particles: the bound is {(mean - exact).max():.4f} nats above log p",
            )
            if last is not None and last_error is not None:
                both = (error**2 + last_error**2) ** 0.5
                case.require(
                    bool((mean >= last - 5 * both).all()),
                    f"{num} particles: the bound is {(last - mean).max():.4f} nats below that of fewer",
                )
            last, last_error = mean, error
        if len(estimates) > 1:
            weight = (estimates[1] - exact).exp()
            off = (weight.mean(0) - 1) / (weight.std(0) / len(weight) ** 0.5)
            case.require(
                bool((off.abs() <= 6).all()),
                f"the mean of exp(log_prob) is {off.abs().max():.1f} standard errors from the density",
            )
