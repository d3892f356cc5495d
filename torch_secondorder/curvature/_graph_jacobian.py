"""The Jacobian of residuals from one backward pass, by the uses of each parameter in the graph.

Where row `n` of an output depends on sample `n` alone, the gradients by the results of all
operations that take parameters, made in one backward pass for all samples, come apart by samples.
With what these operations have saved they give the whole Jacobian (per-sample gradients as in
Goodfellow 2015, "Efficient per-example gradient computations", for any graph).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
    surveyed,
    uses_of,
)
from torch_secondorder._autograd.use_factors import Factors, factors_of, has_factors
from torch_secondorder._autograd.vectorized import several
from torch_secondorder._foundation.private_torch import output_shape, plainly
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature._jacobian_columns import (
    Columns,
    DenseColumns,
    FactoredColumns,
    Pair,
    Rows,
)
from torch_secondorder.curvature._residuals import ResidualBlock
from torch_secondorder.curvature._sample_layout import Layout, Probe, layouts

__all__ = ["GraphPlan", "Rejected", "graph_columns"]

# Times that operations are counted to the parameters, see `Use.raises`.
_ROUNDS = 8
# A tensor made of parameters may have so many times their entries.
_GROWTH = 4


class Rejected(Exception):
    """The Jacobian cannot be made this way; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
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
    def of(cls, use: Use, param: int, columns: Tensor, count: int) -> _Target:
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
        return tensor.unflatten(-1, self.use.shape).mT.flatten(tensor.dim() - 1)


@dataclass(slots=True)
class GraphPlan:
    """What was found out about graphs of one structure.

    Attributes:
        uses: The uses of parameters.
        targets: The tensors that the uses take.
        passes: The outputs that share a backward pass.
        entries: For each output whether all its entries are samples of their own.
        layouts: For each pass and use the layouts of the rows, by outputs.
    """

    uses: list[Use]
    targets: list[_Target]
    passes: list[list[int]]
    entries: list[bool]
    layouts: list[list[dict[int, Layout]]] = field(default_factory=list)


class _Deltas:
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
        try:
            with plainly():
                found = torch.autograd.grad(
                    tensors,
                    self._edges,  # type: ignore[arg-type]
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


class _Outdated(Exception):
    """A plan does not fit a graph of the same structure."""


def graph_columns(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    vector: ParameterVector,
    plans: dict[Any, GraphPlan | str],
    *,
    again: bool = False,
) -> tuple[list[Columns], list[Rows]]:
    """The columns of the Jacobian, and the rows of the blocks.

    Args:
        tensors: The outputs.
        blocks: The residuals.
        vector: The parameters.
        plans: What is known of graphs met before; that of a new one is added.
        again: Whether what is known is to be found out again.

    Raises:
        Rejected: It cannot be made this way.
    """
    for tensor in (*tensors, *vector.params):
        if tensor.dtype not in (torch.float64, torch.float32):
            raise Rejected(f"numbers of type {tensor.dtype}")
    key: Any = None
    try:
        survey = surveyed(tensors, vector.params)
        key = survey.key, tuple((z.shape, z.dtype) for z in tensors)
        plan = None if again else plans.get(key)
        if isinstance(plan, str):
            raise Rejected(plan)
        with torch.no_grad():
            if plan is not None:
                try:
                    return _Assembly(tensors, blocks, vector, survey, plan).columns()
                except _Outdated:
                    pass
            plan = plans[key] = _learned(tensors, blocks, vector, survey)
            return _Assembly(tensors, blocks, vector, survey, plan).columns()
    except (Unsupported, _Outdated) as error:
        if key is not None:
            plans[key] = str(error)
        raise Rejected(str(error)) from error


# Finding out.


def _learned(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    vector: ParameterVector,
    survey: Survey,
) -> GraphPlan:
    raised: set[int] = set()
    for _ in range(_ROUNDS):
        uses = uses_of(survey, raised)
        mixed = [u for u in uses if not has_factors(survey.nodes[u.node], u.slot)]
        unknown = [u for u in mixed if not u.raises]
        if unknown:
            raise Unsupported(survey.nodes[unknown[0].node].name())
        if not mixed:
            found = _arranged(tensors, blocks, survey, uses)
            if isinstance(found, GraphPlan):
                found.targets = _targets(survey, vector, uses)
                return found
            mixed = found
        raising = [use.node for use in mixed if use.raises and _is_small(survey, use)]
        if not raising:
            name = survey.nodes[mixed[0].node].name()
            raise Unsupported(f"{name}, whose rows depend on several samples")
        raised.update(raising)
    raise Unsupported("a long chain of operations on parameters alone")


def _is_small(survey: Survey, use: Use) -> bool:
    """True if what a node makes has not many more entries than what it takes."""
    made = output_shape(survey.nodes[use.node], 0)
    return made is not None and math.prod(made) <= _GROWTH * max(1, math.prod(use.shape))


def _arranged(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    survey: Survey,
    uses: list[Use],
) -> GraphPlan | list[Use]:
    """A plan, or the uses whose rows depend on several samples."""
    deltas = _Deltas(tensors, blocks, survey, uses)
    every = list(range(len(blocks)))
    divisible = [b.scale is not None and b.channels > 1 for b in blocks]
    found: list[dict[int, Layout]] | list[Use] = []
    # All in one pass, if need be with the entries of a sample apart; else block by block.
    for entries in [divisible, [False] * len(blocks)] if any(divisible) else [divisible]:
        layouts, found = _layouts(tensors, blocks, survey, deltas, uses, every, entries)
        if not found:
            return GraphPlan(uses, [], [every], entries, [layouts])
    if len(blocks) == 1:
        return found
    plan = GraphPlan(uses, [], [], [False] * len(blocks), [])
    for i in every:
        for alone in (True, False) if divisible[i] else (False,):
            entries = [alone and k == i for k in every]
            layouts, found = _layouts(tensors, blocks, survey, deltas, uses, [i], entries)
            if not found:
                break
        if found:
            return found
        plan.entries[i] = alone
        plan.passes.append([i])
        plan.layouts.append(layouts)
    return plan


def _layouts(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    survey: Survey,
    deltas: _Deltas,
    uses: Sequence[Use],
    chosen: list[int],
    entries: Sequence[bool],
) -> tuple[list[dict[int, Layout]], list[Use]]:
    """The layouts of each use in one backward pass, and the uses whose rows are mixed."""
    counts = [blocks[i].samples * (blocks[i].channels if entries[i] else 1) for i in chosen]
    probe = Probe(sum(counts), tensors[0].dtype)
    weights = probe.weights(tensors[0].device).split(counts, dim=1)
    cotangents = [
        [_varied(tensors[output], w) for output in blocks[i].outputs]
        for i, w in zip(chosen, weights, strict=True)
    ]
    each = [
        deltas.of(chosen, [[c[k : k + 1] for c in parts] for parts in cotangents])
        for k in range(1 + probe.count)
    ]
    found: list[dict[int, Layout]] = []
    mixed: list[Use] = []
    for use in uses:
        made = [d for d in (made[use.node] for made in each) if d is not None]
        if not made:
            found.append({})
            continue
        try:
            factors = factors_of(survey.nodes[use.node], use.slot, torch.cat(made), use.shape)
        except Unsupported:
            if not use.raises:
                raise
            mixed.append(use)
            continue
        first, *others = factors.delta.transpose(1, 2).flatten(2)
        if not bool(factors.delta.isfinite().all()):
            raise Rejected("gradients that are not finite")
        owner = probe.owners(first, others)
        if owner is None:
            mixed.append(use)
        else:
            own = layouts(owner, counts)
            found.append({chosen[i]: layout for i, layout in own.items()})
    return found, mixed


def _varied(z: Tensor, weights: Tensor) -> Tensor:
    """Cotangents of an output, the first without weights of its samples: `(1 + k, *z.shape)`."""
    # Of numbers that differ: equal ones give zeros behind many a normalization.
    numbers = torch.arange(1, z.numel() + 1, device=z.device, dtype=torch.float64)
    base = (1 + (numbers * 0.6180339887498949) % 1).view(weights.shape[1], -1)
    rows = torch.cat([base[None], base * weights[:, :, None]])
    return rows.view(-1, *z.shape).to(z.dtype)


def _targets(survey: Survey, vector: ParameterVector, uses: Sequence[Use]) -> list[_Target]:
    targets: dict[tuple[int, int], _Target] = {}
    for use in uses:
        place = use.source, use.output
        if place in targets:
            continue
        chosen = selected_entries(survey, use, vector.params)
        if chosen is None:
            targets[place] = _Target(use, None, None, params_below(survey, use.source))
        else:
            param, columns = chosen
            targets[place] = _Target.of(use, param, columns, vector.params[param].numel())
    return list(targets.values())


# Putting together.


class _Assembly:
    """Columns from the gradients by the results of all uses.

    Raises:
        _Outdated: The plan does not fit.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[ResidualBlock],
        vector: ParameterVector,
        survey: Survey,
        plan: GraphPlan,
    ) -> None:
        self._tensors, self._blocks, self._vector = tensors, blocks, vector
        self._survey, self._plan = survey, plan
        self.rows: list[Rows] = []
        start = 0
        for block, entries in zip(blocks, plan.entries, strict=True):
            samples, channels = block.samples, block.channels
            if entries:
                samples, channels = samples * channels, 1
            # Channels of a root have no order of their own: first is what is faster.
            rows = Rows(start, samples, channels, block.scale is None)
            self.rows.append(rows)
            start = rows.stop
        self._total = start

    def columns(self) -> tuple[list[Columns], list[Rows]]:
        """The columns of all parameters that the residuals depend on."""
        pieces = self._pieces()
        takers: dict[int, list[_Target]] = {}
        for target in pieces:
            for param in target.params:
                takers.setdefault(param, []).append(target)
        found: dict[int, Columns] = {}
        for param, targets in takers.items():
            columns = self._factored(param, [(t, pieces[t]) for t in targets])
            if columns is not None:
                found[columns.start] = columns
        dense: dict[int, Tensor] = {}
        for target, own in pieces.items():
            # One that takes part in a factor has no other parameters.
            if self._vector.slots()[target.params[0]][0] not in found:
                self._add_dense(target, own, dense)
        for param, matrix in dense.items():
            start, _, factor = self._vector.slots()[param]
            found[start] = DenseColumns(start, matrix * factor, self.rows)
        return [found[start] for start in sorted(found)], self.rows

    def _pieces(self) -> dict[_Target, dict[int, list[_Piece]]]:
        """What each target gets from its uses, by blocks."""
        deltas = _Deltas(self._tensors, self._blocks, self._survey, self._plan.uses)
        targets = {(t.use.source, t.use.output): t for t in self._plan.targets}
        pieces: dict[_Target, dict[int, list[_Piece]]] = {}
        for chosen, layouts_of in zip(self._plan.passes, self._plan.layouts, strict=True):
            made = deltas.of(chosen, [self._roots(i) for i in chosen])
            for use, found in zip(self._plan.uses, layouts_of, strict=True):
                delta = made[use.node]
                if delta is None or not found:
                    if delta is not None and bool((delta != 0).any()):
                        raise _Outdated
                    continue
                factors = factors_of(self._survey.nodes[use.node], use.slot, delta, use.shape)
                own = pieces.setdefault(targets[use.source, use.output], {})
                for i, layout in found.items():
                    if layout.total != factors.rows:
                        raise _Outdated
                    piece = _Piece.of(factors, layout, self.rows[i].channels)
                    own.setdefault(i, []).append(piece)
        return pieces

    def _roots(self, i: int) -> Sequence[Tensor]:
        block = self._blocks[i]
        if self._plan.entries[i]:
            assert block.scale is not None
            return [block.scale[None]]
        return block.roots()

    def _factored(
        self, param: int, found: Sequence[tuple[_Target, Mapping[int, list[_Piece]]]]
    ) -> FactoredColumns | None:
        """The columns of a parameter as factors; None where its uses do not fit together."""
        by_block: dict[int, list[Pair]] = {}
        for target, own in found:
            for i, parts in own.items():
                for part in parts:
                    pair = part.pair(target)
                    if pair is None:
                        return None
                    by_block.setdefault(i, []).append(pair)
        start, stop, factor = self._vector.slots()[param]
        shapes = {pair.shape for pairs in by_block.values() for pair in pairs}
        if len(shapes) != 1 or math.prod(shapes.pop()) != stop - start:
            return None
        joined = {i: self._converted(_joined(pairs), factor) for i, pairs in by_block.items()}
        return FactoredColumns(start, stop, self.rows, joined)

    def _converted(self, pair: Pair, factor: float) -> Pair:
        left, right = pair.left, pair.right
        dtype, device = self._vector.dtype, self._vector.device
        if left.dtype != dtype or left.device != device:
            left = left.to(device, dtype)
            right = None if right is None else right.to(device, dtype)
        return Pair(left if factor == 1 else left * factor, right)

    def _add_dense(
        self, target: _Target, own: Mapping[int, list[_Piece]], dense: dict[int, Tensor]
    ) -> None:
        """Adds a target's part of the Jacobian to the matrices of its parameters."""
        count = math.prod(target.use.shape)
        first = next(iter(own.values()))[0].delta
        whole = first.new_zeros(self._total, count)
        for i, parts in own.items():
            rows = self.rows[i].of(whole)
            for part in parts:
                made = torch.empty_like(rows)
                part.by_entries().write(made)
                rows += made
        if target.param is not None:
            matrix = self._matrix(dense, target.param)
            if target.columns is None:
                matrix += self._moved(target.ordered(whole))
            else:
                matrix[:, target.columns] += self._moved(whole)
            return
        for param, part in zip(target.params, self._through(target, whole), strict=True):
            if part is not None:
                self._matrix(dense, param).add_(self._moved(part))

    def _matrix(self, dense: dict[int, Tensor], param: int) -> Tensor:
        if param not in dense:
            vector = self._vector
            start, stop, _ = vector.slots()[param]
            dense[param] = torch.zeros(
                self._total, stop - start, dtype=vector.dtype, device=vector.device
            )
        return dense[param]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._vector.device, self._vector.dtype)

    def _through(self, target: _Target, whole: Tensor) -> list[Tensor | None]:
        """From the Jacobian by a tensor to those by the parameters that it is made of."""
        edge, params = self._survey.source(target.use), self._vector.params
        chosen = [params[i] for i in target.params]
        # Of a small tensor its own Jacobian is made once, of a large one the products.
        small = whole.shape[1] <= len(whole)
        rows = torch.eye(whole.shape[1]).to(whole) if small else whole

        def pull(cotangents: Sequence[Tensor | None], batched: bool) -> Sequence[Tensor | None]:
            with plainly():
                return torch.autograd.grad(
                    edge,
                    chosen,
                    cotangents[0],
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )

        found = several(pull, [rows.view(-1, *target.use.shape)])
        flat = [None if f is None else f.reshape(len(rows), -1) for f in found]
        return [f if f is None or not small else whole @ f for f in flat]


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows of one block at one use, see `Factors`.

    Attributes:
        x: Shape `(samples, 1, groups, each, a)`; None for ones.
        delta: Shape `(samples, channels, groups, each, b)`.
        transposed: See `Factors`.
    """

    x: Tensor | None
    delta: Tensor
    transposed: bool

    @classmethod
    def of(cls, factors: Factors, layout: Layout, channels: int) -> _Piece:
        """The rows of some samples."""
        x = None
        if factors.x is not None:
            x = layout.of(factors.x).transpose(0, 1).unsqueeze(1)
        delta = layout.of(factors.delta[:channels]).permute(2, 0, 1, 3, 4)
        return cls(x, delta, factors.transposed)

    def by_entries(self) -> Pair:
        """As a pair, in the order of the entries of the tensor."""
        if self.transposed and self.x is not None:
            return Pair(self.x, self.delta)
        return Pair(self.delta, self.x)

    def pair(self, target: _Target) -> Pair | None:
        """As a pair, in the order of the entries of the parameter; None where that is none."""
        pair = self.by_entries()
        if target.order == "natural":
            return pair.upright()
        if target.order == "swapped" and pair.right is not None:
            if target.use.shape[-2:] == (pair.left.shape[-1], pair.right.shape[-1]):
                return Pair(pair.right, pair.left).upright()
        return None


def _joined(pairs: Sequence[Pair]) -> Pair:
    """One pair of several whose shapes are the same."""
    if len(pairs) == 1:
        return pairs[0]
    lefts = _with_channels([pair.left for pair in pairs])
    if all(pair.right is None for pair in pairs):
        return Pair(torch.cat(lefts, dim=-2), None)
    rights = [
        torch.ones_like(pair.left[:, :1, :, :, :1]) if pair.right is None else pair.right
        for pair in pairs
    ]
    return Pair(torch.cat(lefts, dim=-2), torch.cat(_with_channels(rights), dim=-2))


def _with_channels(tensors: list[Tensor]) -> list[Tensor]:
    most = max(t.shape[1] for t in tensors)
    return [t.expand(-1, most, -1, -1, -1) if t.shape[1] != most else t for t in tensors]
