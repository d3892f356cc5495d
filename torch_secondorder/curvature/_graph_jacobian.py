"""The Jacobian of residuals from one backward pass, by the uses of each parameter in the graph.

Where row `n` of an output depends on sample `n` alone, the gradients by the results of all
operations that take parameters, made in one backward pass for all samples, come apart by samples.
With what these operations have saved they give the whole Jacobian (per-sample gradients as in
Goodfellow 2015, "Efficient per-example gradient computations", for any graph).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Overwritten
from torch_secondorder._autograd.parameter_uses import Survey, Unsupported, surveyed
from torch_secondorder._autograd.use_factors import Factors, factors_of
from torch_secondorder._autograd.vectorized import in_turn, several
from torch_secondorder._foundation.memory import TooLarge, check_fits
from torch_secondorder._foundation.private_torch import plainly
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature._jacobian_columns import (
    Columns,
    DenseColumns,
    FactoredColumns,
    Pair,
    Rows,
)
from torch_secondorder.curvature._jacobian_plan import (
    NOISE,
    Deltas,
    GraphPlan,
    NotFinite,
    Target,
    plan_of,
)
from torch_secondorder.curvature._residuals import ResidualBlock
from torch_secondorder.curvature._sample_layout import Layout

__all__ = ["Rejected", "graph_columns"]


# Elements of a tensor made of parameters, times rows, that are pulled back in one pass.
_AT_ONCE = 2**22


class Rejected(Exception):
    """The Jacobian cannot be made this way; the text says why."""


class _Outdated(Exception):
    """A plan does not fit a graph of the same structure."""


def graph_columns(
    tensors: Sequence[Tensor],
    blocks: Sequence[ResidualBlock],
    params: Sequence[Tensor],
    vector: ParameterVector,
    plans: dict[Any, GraphPlan | str],
    *,
    again: bool = False,
) -> tuple[list[Columns], list[Rows]]:
    """The columns of the Jacobian, and the rows of the blocks.

    Args:
        tensors: The outputs.
        blocks: The residuals.
        params: The leaves of the graph that stand for the parameters.
        vector: The parameters.
        plans: What is known of graphs met before; that of a new one is added.
        again: Whether what is known is to be found out again.

    Raises:
        Rejected: It cannot be made this way.
    """
    for tensor in (*tensors, *params):
        if tensor.dtype not in (torch.float64, torch.float32):
            raise Rejected(f"numbers of type {tensor.dtype}")
    key: Any = None
    try:
        survey = surveyed(tensors, params)
        key = (
            survey.key,
            tuple((z.shape, z.dtype) for z in tensors),
            tuple((b.outputs, b.samples, b.channels, b.scale is None) for b in blocks),
        )
        plan = None if again else plans.get(key)
        if isinstance(plan, str):
            raise Rejected(plan)
        with torch.no_grad():
            if plan is not None:
                try:
                    return _Assembly(tensors, blocks, params, vector, survey, plan, False).columns()
                except _Outdated:
                    pass
            plan = plans[key] = plan_of(tensors, blocks, params, survey)
            return _Assembly(tensors, blocks, params, vector, survey, plan, True).columns()
    except NotFinite as error:
        raise Rejected("gradients that are not finite") from error
    except (Unsupported, _Outdated) as error:
        if key is not None:
            plans[key] = str(error)
        raise Rejected(str(error)) from error
    except (Overwritten, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        # Whatever an operation objects to: the other ways ask less of it.
        raise Rejected(str(error).partition("\n")[0]) from error


class _Assembly:
    """Columns from the gradients by the results of all uses.

    Raises:
        _Outdated: The plan does not fit.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        blocks: Sequence[ResidualBlock],
        params: Sequence[Tensor],
        vector: ParameterVector,
        survey: Survey,
        plan: GraphPlan,
        fresh: bool,
    ) -> None:
        self._tensors, self._blocks = tensors, blocks
        self._params, self._vector = params, vector
        self._survey, self._plan, self._fresh = survey, plan, fresh
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
        takers: dict[int, list[Target]] = {}
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
            matrix = matrix if factor == 1 else matrix * factor
            found[start] = DenseColumns(start, matrix, self.rows)
        return [found[start] for start in sorted(found)], self.rows

    def _pieces(self) -> dict[Target, dict[int, list[_Piece]]]:
        """The pieces of each target from its uses, by blocks."""
        deltas = Deltas(self._tensors, self._blocks, self._survey, self._plan.uses)
        targets = {(t.use.source, t.use.output): t for t in self._plan.targets}
        pieces: dict[Target, dict[int, list[_Piece]]] = {}
        plan = self._plan
        for chosen, by_uses, silent_rows in zip(
            plan.passes, plan.layouts, plan.silent, strict=True
        ):
            made = deltas.of(chosen, [self._roots(i) for i in chosen])
            for use, found, silent in zip(plan.uses, by_uses, silent_rows, strict=True):
                delta = made[use.node]
                if delta is None:
                    continue
                factors = factors_of(self._survey.nodes[use.node], use.slot, delta, use.shape)
                if factors is None:
                    continue
                if not self._fresh and self._speaks(factors, silent, made):
                    raise _Outdated("rows of no known sample")
                if not found:
                    continue
                own = pieces.setdefault(targets[use.source, use.output], {})
                for i, layout in found.items():
                    if layout.total != factors.rows:
                        raise _Outdated("another number of rows")
                    piece = _Piece.of(factors, layout, self.rows[i].channels)
                    own.setdefault(i, []).append(piece)
        return pieces

    @staticmethod
    def _speaks(factors: Factors, silent: Tensor | None, made: Mapping[int, Tensor | None]) -> bool:
        """True if rows that were zero when the plan was made are none now."""
        rows = factors.delta
        if silent is not None:
            if not len(silent) or int(silent[-1]) >= factors.rows:
                return False
            rows = rows[:, :, silent]
        if not bool(rows.any()):  # the usual case
            return False
        largest = max(float(d.abs().amax()) for d in made.values() if d is not None and d.numel())
        return float(rows.abs().amax()) > NOISE * torch.finfo(rows.dtype).eps * largest

    def _roots(self, i: int) -> Sequence[Tensor]:
        block = self._blocks[i]
        if self._plan.entries[i]:
            assert block.scale is not None
            return [block.scale[None]]
        return block.roots()

    def _factored(
        self, param: int, found: Sequence[tuple[Target, Mapping[int, list[_Piece]]]]
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
        self, target: Target, own: Mapping[int, list[_Piece]], dense: dict[int, Tensor]
    ) -> None:
        """Adds a target's part of the Jacobian to the matrices of its parameters."""
        count = math.prod(target.use.shape)
        self._check_fits(count)
        whole = next(iter(own.values()))[0].delta.new_zeros(self._total, count)
        for i, parts in own.items():
            rows = self.rows[i].of(whole)
            for part in parts:
                rows += part.by_entries().matrix()
        if target.param is not None:
            matrix = self._matrix(dense, target.param)
            if target.columns is None:
                matrix += self._moved(target.ordered(whole))
            else:
                matrix[:, target.columns] += self._moved(whole)
            return
        for param, made_of in zip(target.params, self._through(target, whole), strict=True):
            if made_of is not None:
                self._matrix(dense, param).add_(self._moved(made_of))

    def _check_fits(self, count: int) -> None:
        dtype, device = self._vector.dtype, self._vector.device
        try:
            check_fits("a part of the Jacobian", (self._total, count), dtype, device, "")
        except TooLarge as error:
            raise Unsupported(f"a part that does not fit: {error}") from error

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

    def _through(self, target: Target, whole: Tensor) -> list[Tensor | None]:
        """From the Jacobian by a tensor to those by the parameters that it is made of."""
        edge, params = self._survey.source(target.use), self._params
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

        products = several if len(rows) > 1 else in_turn
        parts = rows.split(max(1, _AT_ONCE // rows.shape[1]))
        found = [products(pull, [part.view(-1, *target.use.shape)]) for part in parts]
        result: list[Tensor | None] = []
        for each in zip(*found, strict=True):
            made = [f.reshape(len(f), -1) for f in each if f is not None]
            joined = torch.cat(made) if made else None
            result.append(whole @ joined if joined is not None and small else joined)
        return result


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

    def pair(self, target: Target) -> Pair | None:
        """As a pair, in the order of the entries of the parameter; None where that is none."""
        pair = self.by_entries()
        if target.order == "natural":
            return pair.upright()
        if target.order == "swapped" and target.use.shape[-2:] == pair.shape[1:]:
            assert pair.right is not None
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
