"""Optimizers of a few lines, one for each kind of state that the package itself does not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder.optim.extending import (
    Block,
    Count,
    Descent,
    DiagonalOptimizer,
    Factors,
    FlatOptimizer,
    Line,
    Matrix,
    Moment,
    Nested,
    Number,
    Random,
    StepInputs,
    StepStatus,
    Vector,
    declare,
    prepare,
)


class Kronecker(DiagonalOptimizer):
    """Gradients divided by the roots of Kronecker factors of their own, as in Shampoo."""

    decoupled = True
    _estimates = False
    _state_fields = declare(factor=Factors(scale=1e-3, max_size=5))

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, {"lr": lr} | more)

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group = block.group
        if group["weight_decay"]:
            block.decay(1 - inputs.lr * group["weight_decay"])
        direction = inputs.gradient.clone()
        with torch.autocast(block.device.type, enabled=False):
            for state, piece in block.members(direction):
                piece.copy_(self._preconditioned(piece, state))
        block.move(inputs.lr, -direction if group["maximize"] else direction)

    def _preconditioned(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        direction = gradient
        for name in [name for name in state if name.startswith("factor_")]:
            dim, factor = int(name.removeprefix("factor_")), state[name]
            rows = gradient.movedim(dim, 0).reshape(len(factor), -1)
            factor.add_(rows @ rows.T)
            values, vectors = torch.linalg.eigh(factor)
            root = vectors @ torch.diag(values.clamp(min=1e-12) ** -0.25) @ vectors.T
            direction = torch.tensordot(root, direction, ([1], [dim])).movedim(0, dim)
        return direction


class Averaging(FlatOptimizer):
    """Descent along noisy averages of gradients; keeps state of all kinds that can be sharded."""

    _state_fields = declare(
        mean=Vector(),
        recent=Vector(rows=lambda optimizer: 3),
        seen=Number(0),
        finished=Number(False),
        generator=Random(),
        inner=Nested("inner"),
        visits=Count(),
        velocity=Moment(),
    )
    _mean: Tensor | None
    _recent: Tensor | None
    _seen: int
    _finished: bool
    _seed = 3
    _carried = ("inner",)

    def __init__(self, params: Any, lr: float = 0.1, max_iter: int = 2, **more: Any) -> None:
        defaults = {"lr": lr, "max_iter": max_iter, "weight_decay": 0.0, "maximize": False}
        super().__init__(params, defaults | more)
        self.inner = Inner()

    def _iterate(self, descent: Descent) -> StepStatus | None:
        vector, grad = descent.objective.vector, descent.point.grad
        self._mean = grad if self._mean is None else 0.5 * (self._mean + grad)
        recent = grad.new_zeros(0, len(grad)) if self._recent is None else self._recent
        self._recent = torch.cat([recent, grad[None]])[-3:]
        self._seen += 1
        self._finished = self._seen > 3
        self.inner.total += descent.space.to_host(sums=(grad.sum(),))[0]
        for p, piece in zip(vector.params, vector.pieces(grad), strict=True):
            prepare(self._parameter_fields, self.state[p], p)
            self.state[p]["visits"].add_(1)
            self.state[p]["velocity"].mul_(0.5).add_(piece)
        old = vector.gather([self.state[p]["velocity"] for p in vector.params])
        visits = max(float(self.state[p]["visits"]) for p in vector.params)
        noise = torch.rand(1, generator=self._random(grad.device), device=grad.device)
        direction = -(self._mean + self._recent.mean(0) + old / visits) * (1 + 0.1 * noise)
        direction /= 3 + abs(self.inner.total) + self._extra(descent, grad)
        slope, square = descent.space.to_host(sums=(grad @ direction, direction @ direction))
        line = Line(descent, direction, slope, square)
        line.accept(line(descent.lr))
        return None

    def _extra(self, descent: Descent, grad: Tensor) -> float:
        return 0.0


class Everything(Averaging):
    """State of all kinds."""

    _state_fields = declare(outer=Matrix(), factor=Factors())
    _outer: Tensor | None

    def _extra(self, descent: Descent, grad: Tensor) -> float:
        outer, vector = torch.outer(grad, grad), descent.objective.vector
        self._outer = outer if self._outer is None else self._outer + outer
        traces = 0.0
        for p, piece in zip(vector.params, vector.pieces(grad), strict=True):
            if piece.dim() == 2:
                self.state[p]["factor_0"].add_(piece @ piece.T)
                traces += float(self.state[p]["factor_0"].trace())
        return float(torch.linalg.vector_norm(self._outer)) + traces


class Inner:
    """A part of an optimizer that has its own state."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state.get("total", 0.0)
