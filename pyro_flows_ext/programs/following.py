"""Latents whose supports or masks come from the run of a model: mapped in the model's order, at the values of each call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .latents import Latent, split, to_support
from .masks import completing_log_prob, is_maskable
from .raising import ERRORS
from .supports import bijection, tensors_of, true_support
from .traces import Program, Site

Row = Mapping[str, Tensor]


def needs_run(site: Site) -> bool:
    """Whether the support or the mask of a latent may change from call to call: it has tensors among its parameters."""
    return bool(tensors_of(true_support(site["name"], site["fn"]))) or is_maskable(site)


class Following:
    """The maps between ℝᴰ and the latents of a model, with the supports and masks of a run of the model.

    A run ends at the last latent in `needed`. Batches of particles run under `torch.vmap`, or one by one where the model
    does not allow it.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments.
        latents: the latents in the order in which they are laid out in u.
        needed: names of the latents whose supports or masks are read.
        completed: names of masked latents whose masked entries have the density of their prior.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        latents: Sequence[Latent],
        needed: Collection[str],
        completed: Collection[str] = (),
    ):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.latents, self.needed, self.completed = latents, frozenset(needed), frozenset(completed)
        self._vectorizes = True

    def constrain(self, u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Latent -> its values `(N, *shape)` at u `(N, D)`, and what they add to log q, `(N, *batch)`.

        That is minus log|det| of the map into the support, and minus the prior density of masked entries.
        """
        parts = {latent.name: part for latent, part in split(u, self.latents)}

        def single(row: Row) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            found = self._run(row, constrained=False)
            return {k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}

        values, terms = self._by_row(single, parts)
        return {x.name: (values[x.name], terms[x.name]) for x in self.latents}

    def unconstrain(self, samples: Row) -> tuple[Tensor, Tensor, Tensor]:
        """u `(N, D)` of values `(N, *shape)`, what these add to log q with the sign changed `(N)`, and whether they lie inside."""

        def single(row: Row) -> tuple[Tensor, Tensor, Tensor]:
            found = self._run(row, constrained=True)
            parts = torch.cat([found[x.name][0].flatten() for x in self.latents])
            terms = torch.stack([found[x.name][1].sum() for x in self.latents]).sum()
            inside = torch.stack([found[x.name][2] for x in self.latents]).all()
            return parts, -terms, inside

        return self._by_row(single, samples)

    def supports(self, u: Tensor) -> dict[str, Any]:
        """The supports of the latents in one run at u `(D)`."""
        messenger = _AtLatents(self, {x.name: part for x, part in split(u, self.latents)}, False)
        self._go(messenger)
        return messenger.supports

    def _by_row(self, single: Callable[[Row], Any], rows: Row) -> Any:
        num = len(next(iter(rows.values())))
        if num > 1 and self._vectorizes:
            try:
                return torch.vmap(single, randomness="different")(dict(rows))
            except ERRORS:
                self._vectorizes = False  # single runs raise what is an error of the model
        results = [single({k: v[i] for k, v in rows.items()}) for i in range(num)]
        return torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *results)

    def _run(self, row: Row, *, constrained: bool) -> dict[str, Any]:
        messenger = _AtLatents(self, row, constrained)
        self._go(messenger)
        for latent in self.latents:
            if latent.name not in messenger.found:
                messenger.put(latent, latent.support)
        return messenger.found

    def _go(self, messenger: _AtLatents) -> None:
        # Validation reads values, which vmap cannot do; the model itself is validated where it is scored.
        with poutine.block(), pyro.validation_enabled(False):
            try:
                with messenger:
                    self.model(*self.args, **self.kwargs)
            except _LastLatent:
                return
        raise ValueError(
            f"latents {sorted(messenger.missing)} are not latents of the model for these arguments; set up a new guide"
        )


class _LastLatent(Exception):
    """Ends a run of the model."""


class _AtLatents(Messenger):
    """Puts the latents of a run at given values, or at the images of unconstrained ones in the supports of the run."""

    def __init__(self, following: Following, row: Row, constrained: bool):
        super().__init__()
        self.latents = {latent.name: latent for latent in following.latents}
        self.missing = set(following.needed)
        self.completed, self.row, self.constrained = following.completed, row, constrained
        self.found: dict[str, Any] = {}
        self.supports: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.latents or msg["is_observed"] or msg["done"]:
            return
        latent, fn = self.latents[name], msg["fn"]
        if fn.shape() != latent.shape:
            raise ValueError(
                f"latent {name!r} has shape {tuple(fn.shape())} for these arguments, and the guide was set up for "
                f"{tuple(latent.shape)}; set up a new guide on these arguments"
            )
        self.supports[name] = true_support(name, fn)
        msg["value"], msg["done"] = self.put(latent, self.supports[name]), True
        if name in self.completed:
            unconstrained, term, *inside = self.found[name]
            self.found[name] = (unconstrained, term - completing_log_prob(msg), *inside)
        self.missing.discard(name)
        if not self.missing:
            raise _LastLatent

    def put(self, latent: Latent, support: Any) -> Tensor:
        """The value of a latent; remembers it with what it adds to log q."""
        given = self.row[latent.name]
        if not self.constrained:
            value, ladj = to_support(given, support, latent.event_dim)
            self.found[latent.name] = (value, -ladj)
            return value
        transform = bijection(support)
        inside = support.check(given).all()
        # The image of zero is inside; a value outside would make gradients NaN.
        zero = transform(given.new_zeros(latent.unconstrained_shape))
        safe = torch.where(inside, given, zero)
        part = transform.inv(safe)
        ladj = transform.log_abs_det_jacobian(part, safe)
        ladj = sum_rightmost(ladj, ladj.dim() - safe.dim() + latent.event_dim)
        self.found[latent.name] = (part, -ladj, inside)
        return safe
