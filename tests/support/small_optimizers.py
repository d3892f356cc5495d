"""Optimizers of a few lines, one for each kind of state that the package itself does not use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_secondorder.curvature import Hutchinson
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
    _state_fields = declare(factor=Factors(scale=1e-3, max_size=5))

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "update_period": 1, "seed": 0}
        defaults |= {"accumulation_steps": 1, "maximize": False, "capturable": None}
        super().__init__(params, defaults | more, Hutchinson())

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group = block.group
        if group["weight_decay"]:
            block.decay(1 - inputs.lr * group["weight_decay"])
        with torch.autocast(block.device.type, enabled=False):
            direction = torch.cat([*self._directions(block, inputs.gradient)])
        block.move(inputs.lr, -direction if group["maximize"] else direction)

    def _directions(self, block: Block, gradients: Tensor) -> Iterator[Tensor]:
        for state, gradient in block.members(gradients):
            direction = gradient
            for name in [name for name in state if name.startswith("factor_")]:
                dim, factor = int(name.removeprefix("factor_")), state[name]
                rows = gradient.movedim(dim, 0).reshape(len(factor), -1)
                factor.add_(rows @ rows.T)
                values, vectors = torch.linalg.eigh(factor)
                root = vectors @ torch.diag(values.clamp(min=1e-12) ** -0.25) @ vectors.T
                direction = torch.tensordot(root, direction, ([1], [dim])).movedim(0, dim)
            yield direction.reshape(-1)


class Everything(FlatOptimizer):
    """Gradient descent along noisy averages of old gradients; keeps state of every kind."""

    _state_fields = declare(
        mean=Vector(),
        recent=Vector(rows=lambda optimizer: 3),
        outer=Matrix(),
        seen=Number(0),
        finished=Number(False),
        generator=Random(),
        inner=Nested("inner"),
        visits=Count(),
        velocity=Moment(),
        factor=Factors(),
    )
    _mean: Tensor | None
    _recent: Tensor | None
    _outer: Tensor | None
    _seen: int
    _finished: bool
    _seed = 3

    def __init__(self, params: Any, lr: float = 0.1, max_iter: int = 2, **more: Any) -> None:
        defaults = {"lr": lr, "max_iter": max_iter, "weight_decay": 0.0, "maximize": False}
        super().__init__(params, defaults | more)
        self.inner = Inner()

    _carried = ("inner",)

    def _iterate(self, descent: Descent) -> StepStatus | None:
        vector, grad = descent.objective.vector, descent.point.grad
        mean = grad if self._mean is None else 0.5 * (self._mean + grad)
        recent = grad.new_zeros(0, len(grad)) if self._recent is None else self._recent
        recent = torch.cat([recent, grad[None]])[-3:]
        outer = torch.outer(grad, grad)
        self._mean, self._recent = mean, recent
        self._outer = outer if self._outer is None else self._outer + outer
        self._seen += 1
        self._finished = self._seen > 3
        self.inner.total += float(grad.sum())
        noise = torch.rand(1, generator=self._random(grad.device), device=grad.device)
        for p, piece in zip(vector.params, vector.pieces(grad), strict=True):
            state = self.state[p]
            prepare(self._parameter_fields, state, p)
            state["visits"].add_(1)
            state["velocity"].mul_(0.5).add_(piece)
            if piece.dim() == 2:
                state["factor_0"].add_(piece @ piece.T)
        old = vector.gather([self.state[p]["velocity"] for p in vector.params])
        norm = torch.linalg.vector_norm(self._outer) + abs(self.inner.total)
        direction = -(mean + recent.mean(0) + 0.1 * old) * (1 + 0.1 * noise) / (3 + 1e-3 * norm)
        slope, square = descent.space.to_host(sums=(grad @ direction, direction @ direction))
        line = Line(descent, direction, slope, square)
        line.accept(line(descent.lr))
        return None


class Inner:
    """A part of an optimizer that has its own state."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state.get("total", 0.0)
