"""Optimizers in the graph: they read and write the state of the very objects that would take the step eagerly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import is_scheduler
from torch import Tensor

from .guards import StateGuard
from .refusal import Refusal
from .rules import ClippedAdam, Group, Rule, rule_of

# As `torch.nn.utils.clip_grad_norm_` has it.
_CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Owner:
    """Who updates a parameter: a torch optimizer, its group of settings, and clipping of this parameter's gradient."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    clip: Mapping[str, Any] = field(default_factory=dict)


def owner_in(optim: PyroOptim, p: Tensor) -> Owner:
    """Of a parameter that a `PyroOptim` has seen."""
    holder = optim.optim_objs[p]
    optimizer = holder.optimizer if is_scheduler(holder) else holder
    clip = optim._get_grad_clip_args(p)  # type: ignore[arg-type]
    return Owner(optimizer, optimizer.param_groups[0], clip)


class _Cohort:
    """Parameters that share rule, settings, rate and count of steps, and so the numbers of a step."""

    def __init__(self, rule: Rule, group: Group, lr: float, t: int):
        self.rule, self.lr, self.t = rule, lr, t
        self.settings: Group = {name: group[name] for name in rule.settings}
        self.width = len(rule.numbers(self.settings, lr, t + 1))

    def numbers(self, num_steps: int) -> list[tuple[float, ...]]:
        """What changes, for each of the next steps."""
        rows, lr = [], self.lr
        for t in range(self.t + 1, self.t + num_steps + 1):
            lr = self.rule.rate_after(self.settings, lr)
            rows.append(self.rule.numbers(self.settings, lr, t))
        return rows

    def take(self, num_steps: int) -> None:
        self.t += num_steps
        for _ in range(num_steps):
            self.lr = self.rule.rate_after(self.settings, self.lr)


class Updates:
    """Steps of the optimizers of some parameters.

    `tensors` is their state, which the graph writes in place; `numbers` what changes from step to step; `taken` tells
    the optimizers that steps were taken. With a `joint_clip` the gradients are clipped to this norm together, and a
    step without finite loss and gradient changes nothing, which is not to be told.

    Raises `Refusal` for an optimizer without a rule, and for one that has not yet made its state.
    """

    def __init__(
        self, params: Sequence[Tensor], owners: Sequence[Owner], joint_clip: float | None = None
    ):
        self.params, self.owners, self.joint_clip = list(params), list(owners), joint_clip
        self.cohorts: list[_Cohort] = []
        self.tensors: list[Tensor] = []
        self.names: list[tuple[str, ...]] = []
        self.by_hand: list[tuple[dict[str, Any], dict[str, Any], _Cohort]] = []
        distinct: dict[Any, _Cohort] = {}
        for p, owner in zip(self.params, self.owners, strict=True):
            rule, state = rule_of(owner.optimizer, owner.group), owner.optimizer.state.get(p, {})
            names = rule.states(owner.group)
            missing = [name for name in names if not isinstance(state.get(name), Tensor)]
            if missing:
                raise Refusal(f"{type(owner.optimizer).__name__} has not yet made its {missing[0]}")
            lr, t = float(owner.group["lr"]), int(state.get("step", 0))
            settings = tuple((name, owner.group[name]) for name in rule.settings)
            key = (rule, settings, lr, t)
            if key not in distinct:
                distinct[key] = _Cohort(rule, owner.group, lr, t)
            self.cohorts.append(distinct[key])
            step = state.get("step")
            if isinstance(step, Tensor) and step.device == p.device:
                names += ("step",)
            elif step is not None:
                self.by_hand.append((state, owner.group, distinct[key]))
            self.tensors += [state[name] for name in names]
            self.names.append(names)
        self.distinct = list(distinct.values())
        self.watched = [
            (owner.group, cohort, owner.optimizer, owner.optimizer.state)
            for owner, cohort in zip(self.owners, self.cohorts, strict=True)
        ]
        self.settings = StateGuard(())
        for owner, cohort in zip(self.owners, self.cohorts, strict=True):
            for name, value in cohort.settings.items():
                self.settings.add_slot(owner.group, name, value)
            for name, value in owner.clip.items():
                self.settings.add_slot(owner.clip, name, value)
        self.width = sum(cohort.width for cohort in self.distinct)

    def is_current(self, others_stepped: bool) -> bool:
        """Takes over new rates, and counts if others stepped; whether they and the state still suit the graph."""
        if not self.settings.holds():
            return False
        if not others_stepped:  # what nearly every step finds, and finds quickly
            for group, cohort, optimizer, store in self.watched:
                if group["lr"] != cohort.lr or optimizer.state is not store:
                    break
            else:
                return True
        seen: set[int] = set()
        for p, (group, cohort, optimizer, store) in zip(self.params, self.watched, strict=True):
            lr = group["lr"]
            if id(cohort) not in seen:
                seen.add(id(cohort))
                cohort.lr = float(lr)
                if others_stepped:
                    cohort.t = int(store.get(p, {}).get("step", 0))
            if lr != cohort.lr or optimizer.state is not store:
                return False
            if others_stepped and int(store.get(p, {}).get("step", 0)) != cohort.t:
                return False
        return True

    def numbers(self, num_steps: int) -> list[list[float]]:
        """`num_steps` rows of `width` numbers: what changes, for each of the next steps."""
        columns = [cohort.numbers(num_steps) for cohort in self.distinct]
        if len(columns) == 1:
            return [list(row) for row in columns[0]]
        return [[x for part in row for x in part] for row in zip(*columns, strict=True)]

    def taken(self, num_steps: int) -> None:
        """Counts steps, in the optimizers too where they count by Python's numbers, and lets rates fall that they lower."""
        for cohort in self.distinct:
            cohort.take(num_steps)
        for state, group, cohort in self.by_hand:
            if isinstance(state["step"], Tensor):
                state["step"].fill_(cohort.t)
            else:
                state["step"] = cohort.t
            if isinstance(cohort.rule, ClippedAdam):
                group["lr"] = cohort.lr

    # --- inside the graph ---

    def blocks(self, packed: bool) -> list[Block]:
        """Every parameter by itself; or, `packed`, those together whose elements are updated alike."""
        blocks: dict[Any, Block] = {}
        values = self.by_param(self.params, self.tensors)
        for i, (p, cohort, names) in enumerate(
            zip(self.params, self.cohorts, self.names, strict=True)
        ):
            alike = (id(cohort), names, p.dtype, p.device) if packed else i
            block = blocks.setdefault(alike, Block([], names, []))
            block.members.append(i)
            block.shapes.append([t.shape for t in values[i]])
        return list(blocks.values())

    def by_param(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Each parameter with its state, of all parameters and of all states."""
        rest = iter(tensors)
        return [
            [p, *(next(rest) for _ in names)] for p, names in zip(params, self.names, strict=True)
        ]

    def apply(
        self,
        blocks: Sequence[Block],
        loss: Tensor,
        grads: Sequence[Tensor],
        values: Sequence[Sequence[Tensor]],
        numbers: Tensor,
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """The loss, NaN if nothing was to change, and the values of the blocks after a step with one row of `numbers`."""
        finite: Tensor | None = None
        if self.joint_clip is not None:
            norm = torch.stack([g.norm() for g in grads]).norm()
            finite = loss.isfinite() & norm.isfinite()
            loss = torch.where(finite, loss, torch.nan)
            factor = (self.joint_clip / (norm + _CLIP_EPS)).clamp(max=1.0)
            grads = [g * factor for g in grads]
        clipped = [[_clipped(g, owner.clip)] for g, owner in zip(grads, self.owners, strict=True)]
        parts = numbers.split([cohort.width for cohort in self.distinct])
        columns = {id(c): part for c, part in zip(self.distinct, parts, strict=True)}
        known: dict[tuple[int, torch.dtype], Sequence[Tensor]] = {}
        after = []
        for block, (p, *state) in zip(blocks, values, strict=True):
            cohort = self.cohorts[block.members[0]]
            key = id(cohort), p.dtype
            if key not in known:  # the same for all blocks of a cohort
                known[key] = columns[id(cohort)].to(p.dtype).unbind()
            named = dict(zip(block.names, state, strict=True))
            [g] = block.pack(clipped)
            new_p, new = cohort.rule.update(p, g, named, known[key], cohort.settings)
            if "step" in named:
                new["step"] = named["step"] + 1
            moved = [new_p, *(new[name] for name in block.names)]
            if finite is not None:
                moved = [torch.where(finite, x, y) for x, y in zip(moved, (p, *state), strict=True)]
            after.append(moved)
        return loss, after

    def write(
        self,
        blocks: Sequence[Block],
        packed: Sequence[Sequence[Tensor]],
        values: Sequence[Sequence[Tensor]],
    ) -> None:
        """Writes the values of blocks into those of each parameter."""
        for block, vectors in zip(blocks, packed, strict=True):
            for i, new in block.unpack(vectors):
                for old, value in zip(values[i], new, strict=True):
                    old.copy_(value)


@dataclass(frozen=True)
class Block:
    """Parameters that are updated as one: their numbers, the names of their states, and the shapes of what each has."""

    members: list[int]
    names: tuple[str, ...]
    shapes: list[list[torch.Size]]

    def pack(self, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What the members have of `values`, parameter and state for each parameter: as vectors, if they are several."""
        mine = [values[i] for i in self.members]
        if len(mine) == 1:
            return list(mine[0])
        return [torch.cat([t.reshape(-1) for t in column]) for column in zip(*mine, strict=True)]

    def unpack(self, packed: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """The number of each member and what it has, of the first of its values where not all are given."""
        if len(self.members) == 1:
            yield self.members[0], list(packed)
            return
        columns = [
            vector.split([shapes[k].numel() for shapes in self.shapes])
            for k, vector in enumerate(packed)
        ]
        for i, shapes, parts in zip(
            self.members, self.shapes, zip(*columns, strict=True), strict=True
        ):
            yield i, [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]


def _clipped(g: Tensor, clip: Mapping[str, Any]) -> Tensor:
    limits = {name: float(limit) for name, limit in clip.items() if limit is not None}
    if "clip_norm" in limits:
        g = g * (limits["clip_norm"] / (g.norm() + _CLIP_EPS)).clamp(max=1.0)
    if "clip_value" in limits:
        g = g.clamp(-limits["clip_value"], limits["clip_value"])
    return g
