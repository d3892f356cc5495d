"""AdaSecant in plain numbers, one coordinate after the other, written from the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, sqrt

import torch
from torch import Tensor


@dataclass
class Average:
    """A moving average whose memory is up to the caller."""

    value: float = 0.0

    def add(self, x: float, memory: float) -> None:
        self.value = (1.0 - 1.0 / memory) * self.value + x / memory


class Coordinate:
    """What is known about one entry of a parameter."""

    def __init__(self) -> None:
        names = ("g", "g2", "alpha", "alpha2", "delta", "delta2", "product", "above", "below")
        for name in names:
            setattr(self, name, Average())
        self.memory, self.before, self.adagrad = 2.2, 0.0, 0.0

    def begin(self, g: float, alpha: float, delta: float) -> None:
        self.__init__()
        self.before = g
        self.g.value, self.g2.value = g, g * g
        self.alpha.value, self.alpha2.value = alpha, alpha * alpha
        self.delta.value, self.delta2.value = delta, delta * delta
        self.product.value = alpha * delta

    def gamma(self, clip: float) -> float:
        above, below = self.above.value, self.below.value
        if below <= 0.0:
            return clip if above > 0.0 else 0.0
        return min(max(above / below, 0.0), clip)

    def learn(self, g: float, alpha: float | None, delta: float, deviations: float | None) -> bool:
        outlier = False
        seen = [(g, self.g, self.g2)]
        if alpha is not None:
            seen.append((alpha, self.alpha, self.alpha2))
        if deviations is not None:
            for x, average, square in seen:
                variance = square.value - average.value**2
                variance = max(variance, 2.220446049250313e-16 * square.value)
                outlier = outlier or abs(x - average.value) > deviations * sqrt(variance)
        if outlier:
            self.memory = 2.2
        memory, mean = self.memory, self.g.value
        deviation = self.before - mean
        if abs(deviation) <= 4 * 2.220446049250313e-16 * abs(self.before):
            deviation = 0.0
        self.above.add((self.before - g) * deviation, memory)
        self.below.add(deviation * (g - mean), memory)
        self.g.add(g, memory)
        self.g2.add(g * g, memory)
        self.before = g
        if alpha is None:
            return outlier
        for average, x in (
            (self.alpha, alpha),
            (self.alpha2, alpha * alpha),
            (self.delta, delta),
            (self.delta2, delta * delta),
            (self.product, alpha * delta),
        ):
            average.add(x, memory)
        steady = self.delta.value**2 / self.delta2.value if self.delta2.value else 0.0
        self.memory = min(max((1.0 - steady) * memory + 1.0, 1.5), 1e8)
        return outlier


def norm(numbers: list[float]) -> float:
    return hypot(*numbers)


class Reference:
    """AdaSecant for blocks of numbers.

    Args:
        blocks: The numbers of each parameter.
        rates: The learning rate of each parameter.
    """

    def __init__(
        self,
        blocks: list[list[float]],
        rates: list[float],
        *,
        update_period: int = 5,
        gamma_clip: float = 1.8,
        secant: str = "block",
        start_var_reduction: int = 0,
        delta_clip: float | None = None,
        use_adagrad: bool = False,
        outlier_deviations: float | None = 4.0,
    ) -> None:
        self.blocks = [list(block) for block in blocks]
        self.rates, self.period = rates, update_period
        self.gamma_clip, self.secant = gamma_clip, secant
        self.start_var_reduction, self.delta_clip = start_var_reduction, delta_clip
        self.use_adagrad, self.outlier_deviations = use_adagrad, outlier_deviations
        self.known = [[Coordinate() for _ in block] for block in blocks]
        self.updates = self.outliers = 0
        self.begun = [False] * len(blocks)

    def step(self, gradient: Callable[[list[list[float]]], list[list[float]]]) -> None:
        """One step on a mini-batch, given by the function that computes its gradient."""
        raw = gradient(self.blocks)
        norms = [norm(g) for g in raw]
        moves = [n > 0.0 and rate > 0.0 for n, rate in zip(norms, self.rates, strict=True)]
        unit = [[x / n for x in g] if n else g for g, n in zip(raw, norms, strict=True)]
        if any(m and not begun for m, begun in zip(moves, self.begun, strict=True)):
            self._probe(gradient, raw, unit, norms, moves)
        deltas = [
            self._delta(b, unit[b]) if moves[b] else [0.0] * len(unit[b]) for b in range(len(unit))
        ]
        self.blocks = self._moved(deltas)
        due = self.updates < self.period or self.updates % self.period == 0
        there = gradient(self.blocks) if due else raw
        self.outliers = 0
        for b, block in enumerate(self.known):
            if not moves[b]:
                continue
            for i, coordinate in enumerate(block):
                alpha = (there[b][i] - raw[b][i]) / norms[b] if due else None
                self.outliers += coordinate.learn(
                    unit[b][i], alpha, deltas[b][i], self.outlier_deviations
                )
        self.updates += 1

    def _moved(self, deltas: list[list[float]]) -> list[list[float]]:
        return [
            [x + d for x, d in zip(block, delta, strict=True)]
            for block, delta in zip(self.blocks, deltas, strict=True)
        ]

    def _probe(self, gradient, raw, unit, norms, moves) -> None:
        fresh = [m and not begun for m, begun in zip(moves, self.begun, strict=True)]
        deltas = []
        for b, block in enumerate(self.blocks):
            length = 1e-3 * (norm(block) + sqrt(len(block))) if fresh[b] else 0.0
            deltas.append([-length * x for x in unit[b]])
        there = gradient(self._moved(deltas))
        for b in range(len(unit)):
            if fresh[b]:
                self.begun[b] = True
                for i, coordinate in enumerate(self.known[b]):
                    alpha = (there[b][i] - raw[b][i]) / norms[b]
                    coordinate.begin(unit[b][i], alpha, deltas[b][i])

    def _delta(self, b: int, unit: list[float]) -> list[float]:
        known = self.known[b]
        mean_alpha2 = sum(c.alpha2.value for c in known) / len(known)
        mean_delta2 = sum(c.delta2.value for c in known) / len(known)
        delta = []
        for c, g in zip(known, unit, strict=True):
            reduces = self.updates >= self.start_var_reduction
            gamma = c.gamma(self.gamma_clip) if reduces else 0.0
            corrected = (g + gamma * c.g.value) / (1.0 + gamma)
            alpha2 = max(c.alpha2.value + 1e-2 * mean_alpha2, 2.220446049250313e-16**2)
            if self.secant == "block":
                rate = sqrt(mean_delta2 / alpha2)
            else:
                rate = max(sqrt(c.delta2.value / alpha2) - c.product.value / alpha2, 0.0)
            if self.delta_clip is not None:
                rate = min(rate, self.delta_clip)
            if self.use_adagrad:
                c.adagrad += corrected**2
                rate /= max(1.0, sqrt(c.adagrad))
            delta.append(-self.rates[b] * rate * corrected)
        longest = 10.0 * sqrt(sum(c.delta2.value for c in known))
        length = norm(delta)
        return [d * longest / length for d in delta] if length > longest else delta

    def memories(self) -> list[float]:
        return [c.memory for block in self.known for c in block]


def gradient_of(loss: Callable[[list[Tensor]], Tensor], shapes: list[torch.Size]):
    """The gradient of a function of tensors as one of lists of numbers, complex ones in pairs."""

    def gradient(blocks: list[list[float]]) -> list[list[float]]:
        tensors = [
            torch.tensor(block, dtype=torch.float64).reshape(shape).requires_grad_()
            for block, shape in zip(blocks, shapes, strict=True)
        ]
        value = loss(tensors)
        grads = torch.autograd.grad(value, tensors, allow_unused=True)
        return [
            (torch.zeros_like(t) if g is None else g).flatten().tolist()
            for t, g in zip(tensors, grads, strict=True)
        ]

    return gradient
