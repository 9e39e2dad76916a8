"""Optimizer updates in the graph, on the state of the optimizer objects that take eager steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import is_scheduler
from torch import Tensor

from .guards import StateGuard
from .rules import ClippedAdam, Group, Rule, rule_of
from .unsupported import UnsupportedForCompilation

# As `torch.nn.utils.clip_grad_norm_` has it.
_CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Owner:
    """The torch optimizer of a parameter, its group of settings, and limits of this parameter's gradient."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    clip: Mapping[str, Any] = field(default_factory=dict)


def owner_of(optim: PyroOptim | torch.optim.Optimizer, p: Tensor) -> Owner:
    """The owner of a parameter that `optim` has updated before."""
    if isinstance(optim, torch.optim.Optimizer):
        for group in optim.param_groups:
            if any(q is p for q in group["params"]):
                return Owner(optim, group)
        raise UnsupportedForCompilation(
            f"{type(optim).__name__} has no parameter of shape {tuple(p.shape)} yet; take an eager step first"
        )
    if p not in optim.optim_objs:
        raise UnsupportedForCompilation("the optimizer has no state yet; take an eager step first")
    holder = optim.optim_objs[p]
    optimizer = holder.optimizer if is_scheduler(holder) else holder
    clip = optim._get_grad_clip_args(p)  # type: ignore[arg-type]
    return Owner(optimizer, optimizer.param_groups[0], clip)


class _Cohort:
    """Parameters that share update rule, settings, learning rate and count of steps."""

    def __init__(self, rule: Rule, group: Group, lr: float, t: int):
        self.rule, self.lr, self.t = rule, lr, t
        self.settings: Group = {name: group[name] for name in rule.settings}
        self.width = len(rule.numbers(self.settings, lr, t + 1))

    def numbers(self, num_steps: int) -> list[tuple[float, ...]]:
        """The numbers that change from step to step, for each of the next steps."""
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

    `tensors`: their state, which the graph writes in place. `numbers`: inputs that change from step to step. `taken`
    advances the counters of the optimizers. With a `joint_clip` the gradients are clipped to this norm together, and a
    step without finite loss and gradient changes nothing and is not counted.

    Raises `UnsupportedForCompilation` for an optimizer without a rule, and for one without its state.
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
                raise UnsupportedForCompilation(
                    f"{type(owner.optimizer).__name__} has no {missing[0]} yet; take an eager step first"
                )
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
        for p, owner, names in zip(self.params, self.owners, self.names, strict=True):
            if names:
                state = owner.optimizer.state[p]
                self.settings.add_slot(owner.optimizer.state, p, state)
                for name in names:
                    self.settings.add_slot(state, name, state[name])
        self.width = sum(cohort.width for cohort in self.distinct)

    def is_current(self, others_stepped: bool) -> bool:
        """Reads new learning rates, and the counts if eager steps came between; returns whether the graph still fits."""
        if not self.settings.holds():
            return False
        if not others_stepped:  # the quick check of nearly every step
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
        """`num_steps` rows of `width` numbers, the inputs of the next steps."""
        columns = [cohort.numbers(num_steps) for cohort in self.distinct]
        if len(columns) == 1:
            return [list(row) for row in columns[0]]
        return [[x for part in row for x in part] for row in zip(*columns, strict=True)]

    def taken(self, num_steps: int) -> None:
        """Advances the counts of steps, those of the optimizers that are Python numbers included, and falling rates."""
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
        """One block for every parameter; or, if `packed`, one for all parameters with the same update."""
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
        """Groups flat lists of parameters and states by parameter."""
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
        """The loss, NaN for a step that is left out, and the values of the blocks after a step with one row of `numbers`."""
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
        """Writes the values of blocks into the tensors of each parameter."""
        for block, vectors in zip(blocks, packed, strict=True):
            for i, new in block.unpack(vectors):
                for old, value in zip(values[i], new, strict=True):
                    old.copy_(value)


@dataclass(frozen=True)
class Block:
    """Parameters with a joint update: their indices, the names of their states, and the shapes of all tensors."""

    members: list[int]
    names: tuple[str, ...]
    shapes: list[list[torch.Size]]

    def pack(self, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The parameter and state tensors of the members, concatenated to vectors where there are several members."""
        mine = [values[i] for i in self.members]
        if len(mine) == 1:
            return list(mine[0])
        return [torch.cat([t.reshape(-1) for t in column]) for column in zip(*mine, strict=True)]

    def unpack(self, packed: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """The index of each member and its tensors; `packed` may hold only the first of them."""
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
