"""The way to the Jacobian of graphs of one structure: the rows of each operation by samples.

It is found by trying, once for each structure: gradients by the results of all operations, made
with samples of different weights, tell which sample each row belongs to, and whether it is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_secondorder._autograd.graph import Overwritten, explained
from torch_secondorder._autograd.parameter_uses import (
    Survey,
    Unsupported,
    Use,
    params_below,
    selected_entries,
    uses_of,
)
from torch_secondorder._autograd.use_factors import factors_of, has_factors
from torch_secondorder._foundation.private_torch import output_shape, plainly
from torch_secondorder.curvature._residuals import ResidualBlock
from torch_secondorder.curvature._sample_layout import Layout, Probe, layouts

__all__ = ["NOISE", "Deltas", "GraphPlan", "NotFinite", "Target", "plan_of"]

# Times that operations are counted to the parameters, see `Use.raises`.
_ROUNDS = 8
# A tensor made of parameters may have so many times their entries.
_GROWTH = 4
# Gradients so many times smaller than the largest, in units of rounding, may be rounding errors.
NOISE = 16


# A use, and the reason why its rows do not come apart by samples.
_Mixed: TypeAlias = tuple[Use, str]


class NotFinite(Exception):
    """Gradients are not finite, so that nothing was found out."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The tensor that some uses take, and the columns of its entries.

    Attributes:
        use: One of the uses.
        param: The index of the parameter whose entries these are; None where the tensor is a
            function of parameters.
        columns: The column of each entry, relative to the parameter, where `order` is `"other"`.
        params: The parameters that it is made of.
        order: `"natural"` if these are all entries of the parameter in their order, `"swapped"` if
            the last two dimensions are the other way round.
    """

    use: Use
    param: int | None
    columns: Tensor | None
    params: Sequence[int]
    order: Literal["natural", "swapped", "other"] = "other"

    @classmethod
    def of(cls, use: Use, param: int, columns: Tensor, count: int) -> Target:
        """Some entries of a parameter that has `count` of them."""
        numbers = torch.arange(len(columns), device=columns.device)
        order: Literal["natural", "swapped", "other"] = "other"
        if len(columns) == count and torch.equal(columns, numbers):
            order = "natural"
        elif len(columns) == count and len(use.shape) > 1:
            swapped = columns.view(use.shape).mT.reshape(-1)
            order = "swapped" if torch.equal(swapped, numbers) else "other"
        return cls(use, param, columns if order == "other" else None, [param], order)

    def ordered(self, tensor: Tensor) -> Tensor:
        """From the order `(..., entries)` of the tensor to that of the parameter, if it has all."""
        if self.order == "natural":
            return tensor
        return torch.unflatten(tensor, -1, self.use.shape).mT.flatten(tensor.dim() - 1)


@dataclass(slots=True)
class GraphPlan:
    """The uses and layouts of graphs of one structure.

    Attributes:
        uses: The uses of parameters.
        targets: The tensors that the uses take.
        passes: The outputs that share a backward pass.
        entries: For each output whether all its entries are samples of their own.
        layouts: For each pass and use the layouts of the rows, by outputs.
        silent: For each pass and use the rows whose sample is not known, as they were zero; None
            for all of them. While they are zero nothing is missing.
    """

    uses: list[Use]
    targets: list[Target]
    passes: list[list[int]]
    entries: list[bool]
    layouts: list[list[dict[int, Layout]]] = field(default_factory=list)
    silent: list[list[Tensor | None]] = field(default_factory=list)


class Deltas:
    """Gradients of residual blocks by the results of the uses.

    Args:
        tensors: The outputs.
        blocks: The residuals.
        survey: The graph.
        uses: The uses.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[ResidualBlock],
        survey: Survey,
        uses: Sequence[Use],
    ) -> None:
        self._tensors, self._blocks = tensors, blocks
        self._places = list(dict.fromkeys(use.node for use in uses))
        self._edges = [GradientEdge(survey.nodes[at], 0) for at in self._places]

    def of(
        self, chosen: Sequence[int], cotangents: Sequence[Sequence[Tensor]]
    ) -> dict[int, Tensor | None]:
        """The gradients by the results of all nodes.

        Args:
            chosen: Some of the blocks.
            cotangents: For each its outputs' cotangents, `(k, *output.shape)`; where some blocks
                have fewer, zeros are added.

        Returns:
            By the places of the nodes: `(k, ...)`; None for zeros.
        """
        if not self._edges:
            return {}
        count = max(parts[0].shape[0] for parts in cotangents)
        tensors, stacked = [], []
        for i, parts in zip(chosen, cotangents, strict=True):
            for output, part in zip(self._blocks[i].outputs, parts, strict=True):
                tensors.append(self._tensors[output])
                missing = count - len(part)
                if missing:
                    part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
                stacked.append(part)
        if count > 1:
            try:
                return self._run(tensors, stacked, batched=True)
            except RuntimeError as error:
                if isinstance(error, Overwritten):
                    raise
        each = [self._run(tensors, [s[k] for s in stacked], batched=False) for k in range(count)]
        if count == 1:
            return {at: None if d is None else d[None] for at, d in each[0].items()}
        return {at: _stacked([d[at] for d in each]) for at in self._places}

    def _run(
        self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool
    ) -> dict[int, Tensor | None]:
        if not self._edges:
            return {}
        try:
            with plainly():
                found = torch.autograd.grad(
                    tensors,
                    self._edges,
                    cotangents,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except RuntimeError as error:
            raise explained(error) from error
        return dict(zip(self._places, found, strict=True))


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [p for p in parts if p is not None]
    return torch.stack(there) if there else None


def plan_of(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    params: Sequence[Tensor],
    survey: Survey,
) -> GraphPlan:
    """Finds the way to the Jacobian of a graph.

    Args:
        tensors: The outputs.
        blocks: The residuals.
        params: The parameters.
        survey: The graph.

    Raises:
        Unsupported: There is none, by the operation that the text names.
        NotFinite: Gradients are not finite.
    """
    raised: set[int] = set()
    reason = ""
    for _ in range(_ROUNDS):
        try:
            uses = uses_of(survey, raised)
        except Unsupported as error:
            raise Unsupported(reason or str(error)) from error
        mixed = [
            (use, survey.nodes[use.node].name())
            for use in uses
            if not has_factors(survey.nodes[use.node], use.slot)
        ]
        for use, name in mixed:
            if not use.raises:
                raise Unsupported(reason or name)
        if not mixed:
            found = _arranged(tensors, blocks, params, survey, uses)
            if isinstance(found, GraphPlan):
                found.targets = _targets(survey, params, uses)
                return found
            mixed = found
        reason = reason or mixed[0][1]
        raising = [use.node for use, _ in mixed if use.raises and _is_small(survey, use)]
        if not raising:
            raise Unsupported(reason)
        raised.update(raising)
    raise Unsupported(reason)


def _is_small(survey: Survey, use: Use) -> bool:
    """True if what a node makes has not many more entries than what it takes."""
    made = output_shape(survey.nodes[use.node], 0)
    return made is not None and math.prod(made) <= _GROWTH * max(1, math.prod(use.shape))


def _arranged(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    params: Sequence[Tensor],
    survey: Survey,
    uses: list[Use],
) -> GraphPlan | list[_Mixed]:
    """A plan, or the uses whose rows do not come apart."""
    deltas = Deltas(tensors, blocks, survey, uses)
    every = list(range(len(blocks)))
    # Of the least precise numbers on the way.
    dtype = max((t.dtype for t in (*tensors, *params)), key=lambda t: torch.finfo(t).eps)
    owners: list[list[Tensor | None]] = []
    entries: list[bool] = []
    mixed: list[_Mixed] = []
    for block in blocks:
        # With the entries of a sample apart, if that goes.
        divisible = block.scale is not None and block.channels > 1
        for alone in (True, False) if divisible else (False,):
            own, mixed = _owners(tensors, block, survey, deltas, uses, len(owners), alone, dtype)
            if not mixed:
                break
        if mixed:
            return mixed
        owners.append(own)
        entries.append(alone)
    # All in one pass, where no row is of several blocks; else block by block.
    passes = [every] if _are_apart(owners) else [[i] for i in every]
    counts = [b.samples * (b.channels if e else 1) for b, e in zip(blocks, entries, strict=True)]
    plan = GraphPlan(uses, [], passes, entries)
    for chosen in passes:
        found = [_layouts_in(chosen, [own[k] for own in owners], counts) for k in range(len(uses))]
        plan.layouts.append([own for own, _ in found])
        plan.silent.append([rows for _, rows in found])
    return plan


def _are_apart(owners: Sequence[Sequence[Tensor | None]]) -> bool:
    """True if no row of any use belongs to several blocks."""
    for parts in zip(*owners, strict=True):
        known = [own >= 0 for own in parts if own is not None]
        if len(known) > 1 and bool((torch.stack(known).sum(0) > 1).any()):
            return False
    return True


def _layouts_in(
    chosen: Sequence[int], owners: Sequence[Tensor | None], counts: Sequence[int]
) -> tuple[dict[int, Layout], Tensor | None]:
    """The layouts of a use in a pass of some blocks, and its silent rows, see `GraphPlan`."""
    joined: Tensor | None = None
    begin = 0
    for i in chosen:
        own = owners[i]
        if own is not None:
            shifted = torch.where(own >= 0, own + begin, -1)
            joined = shifted if joined is None else torch.maximum(joined, shifted)
        begin += counts[i]
    if joined is None:
        return {}, None
    found, silent = layouts(joined, [counts[i] for i in chosen])
    return {chosen[k]: own for k, own in found.items()}, silent


def _owners(
    tensors: Sequence[Tensor],
    block: ResidualBlock,
    survey: Survey,
    deltas: Deltas,
    uses: Sequence[Use],
    place: int,
    alone: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], list[_Mixed]]:
    """The samples of a block that the rows of each use belong to; the uses where they do not.

    Blocks are tried one by one: beside another one that is thousands of times larger, a block might
    be taken for its rounding errors.
    """
    probe = Probe(block.samples * (block.channels if alone else 1), dtype)
    weights = probe.weights(tensors[0].device)
    cotangents = [_varied(tensors[output], weights) for output in block.outputs]
    each = [
        deltas.of([place], [[c[k : k + 1] for c in cotangents]]) for k in range(1 + probe.count)
    ]
    sizes = [d.abs().amax() for d in each[0].values() if d is not None and d.numel()]
    noise = NOISE * torch.finfo(dtype).eps * float(torch.stack(sizes).amax()) if sizes else 0.0
    found: list[Tensor | None] = []
    mixed: list[_Mixed] = []
    for use in uses:
        made = [d for d in (made[use.node] for made in each) if d is not None]
        found.append(None)
        if not made:
            continue
        if made[0].is_complex():
            mixed.append((use, "gradients that are complex"))
            continue
        try:
            factors = factors_of(survey.nodes[use.node], use.slot, torch.cat(made), use.shape)
        except Unsupported as error:
            mixed.append((use, str(error)))
            continue
        if factors is None:
            continue
        first, *others = factors.delta.transpose(1, 2).flatten(2)
        if not bool(factors.delta.isfinite().all()):
            raise NotFinite
        found[-1] = probe.owners(first, others, noise)
        if found[-1] is None:
            name = survey.nodes[use.node].name()
            mixed.append((use, f"{name}, whose rows depend on several samples"))
    return found, mixed


def _varied(z: Tensor, weights: Tensor) -> Tensor:
    """Cotangents of an output, the first without weights of its samples: `(1 + k, *z.shape)`."""
    # Of numbers that differ: equal ones give zeros behind many a normalization.
    numbers = torch.arange(1, z.numel() + 1, device=z.device, dtype=torch.float64)
    base = (1 + (numbers * 0.6180339887498949) % 1).view(weights.shape[1], -1)
    rows = torch.cat([base[None], base * weights[:, :, None]])
    return rows.view(-1, *z.shape).to(z.dtype)


def _targets(survey: Survey, params: Sequence[Tensor], uses: Sequence[Use]) -> list[Target]:
    targets: dict[tuple[int, int], Target] = {}
    for use in uses:
        place = use.source, use.output
        if place in targets:
            continue
        chosen = selected_entries(survey, use, params)
        if chosen is None:
            targets[place] = Target(use, None, None, params_below(survey, use.source))
        else:
            param, columns = chosen
            targets[place] = Target.of(use, param, columns, params[param].numel())
    return list(targets.values())
