"""The Kronecker-factored preconditioner."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._objective.base import Slot
from torch_secondorder.curvature import FromOutputs, LinearOperator
from torch_secondorder.solvers._units import power_of_two
from torch_secondorder.solvers.base import Preconditioner

__all__ = ["KFAC"]


class KFAC(Preconditioner):
    """Inverts the Gauss-Newton blocks of linear layers as Kronecker products.

    Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature", where the approximation itself gives the step. Here it preconditions conjugate
    gradients on the exact matrix: what the factors leave out is made up for in few iterations.

    Parameters that are no weight or bias of a linear layer (those of convolutions and norms, say)
    are treated by their diagonal, see `GaussNewton.diagonal`. So are the projections inside
    `nn.MultiheadAttention` and `nn.RNN`, which PyTorch does not show.

    Args:
        period: Operators that the same factors serve.
        decay: Weight of the former factors in the new ones; 0 to forget them. Averages help where
            batches are smaller than layers are wide.
        largest: Layers with more inputs or outputs are treated by their diagonal.

    Raises:
        ValueError: A number is out of range.

    >>> from torch_secondorder import NewtonCG
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = NewtonCG(layer.parameters(), preconditioner=KFAC(period=5))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(layer(torch.eye(2)), torch.ones(2, 1))
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.preconditioner
    'KFAC'
    """

    def __init__(self, period: int = 1, decay: float = 0.0, largest: int = 4096) -> None:
        check_integer("period", period)
        check_integer("largest", largest)
        check_number("decay", decay, low=0, below=1)
        self._period, self._decay, self._largest = period, decay, largest
        self._age = 0
        self._factors: list[_Layer] = []
        self._diagonal: Tensor | None = None
        self._layout: list[list[float]] = []  # what factors and diagonal are of

    def refresh(self, operator: LinearOperator, generator: torch.Generator | None) -> int:
        """See `Preconditioner.refresh`.

        Raises:
            TypeError: The operator is not made from model outputs.
            FloatingPointError: A factor or the diagonal was not finite.
        """
        if not isinstance(operator, FromOutputs):
            raise TypeError(
                f"the preconditioner 'kfac' is made from model outputs, which "
                f"{type(operator).__name__} does not know; use curvature='ggn', or 'nystrom'"
            )
        self._slots = operator.slots()
        self._like = torch.empty(0, dtype=operator.dtype, device=operator.device)
        self._fit()
        self._age += 1
        if self._layout and self._age < self._period:
            return 0
        found = [
            (f.weight, f.bias, f.inputs.to(self._like), f.outputs.to(self._like))
            for f in operator.factors(generator, self._largest)
        ]
        products = 1 if found else 0
        covered = {i for weight, bias, *_ in found for i in (weight, bias)}
        diagonal = None
        if not covered.issuperset(range(len(self._slots))):
            diagonal = self._smoothed(operator.diagonal(1, generator))
            products += 1
        self._learn(found, diagonal)
        return products

    def _smoothed(self, diagonal: Tensor) -> Tensor:
        """Draws entries halfway to their parameter's mean.

        Among the squares of one random vector some are close to zero by chance, and their inverses
        would spoil the whole.
        """
        for slot in self._slots:
            part = diagonal[slot.start : slot.stop]
            part.lerp_(part.mean(), 0.5)
        return diagonal

    def _fit(self) -> None:
        """Drops what is of other parameters; what was loaded may be elsewhere."""
        if self._layout != self._places:
            self.load_state_dict({})
        self._factors = [
            (w, b, inputs.to(self._like), outputs.to(self._like))
            for w, b, inputs, outputs in self._factors
        ]
        if self._diagonal is not None:
            self._diagonal = self._diagonal.to(self._like)

    @property
    def _places(self) -> list[list[float]]:
        return [[slot.start, slot.stop, slot.scale] for slot in self._slots]

    def _learn(self, found: list[_Layer], diagonal: Tensor | None) -> None:
        """Takes new factors, mixed with the former where these are of the same layers."""
        learned = [m for _, _, *both in found for m in both]
        if diagonal is not None:
            learned.append(diagonal)
        if not all(bool(torch.isfinite(m).all()) for m in learned):
            raise FloatingPointError("a Kronecker factor or the diagonal was not finite")
        same = [f[:2] for f in found] == [f[:2] for f in self._factors]
        self._age = 0
        if self._decay and same and (diagonal is None) == (self._diagonal is None):
            keep = self._decay
            found = [
                (*new[:2], old[2].lerp(new[2], 1 - keep), old[3].lerp(new[3], 1 - keep))
                for old, new in zip(self._factors, found, strict=True)
            ]
            if diagonal is not None:
                assert self._diagonal is not None
                diagonal = self._diagonal.lerp(diagonal, 1 - keep)
        self._factors, self._diagonal, self._layout = found, diagonal, self._places

    def inverse(self, damping: float) -> LinearOperator:
        """See `Preconditioner.inverse`."""
        return _BlockInverse(self._factors, self._diagonal, self._slots, damping, self._like)

    def state_dict(self) -> dict[str, Any]:
        """See `Preconditioner.state_dict`."""
        if not self._layout or (self._period == 1 and not self._decay):
            return {}
        factors = [list(layer) for layer in self._factors]
        kept = {"factors": factors, "diagonal": self._diagonal, "layout": self._layout}
        return {"age": self._age, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Preconditioner.load_state_dict`."""
        self._age = state.get("age", 0)
        self._factors = [tuple(layer) for layer in state.get("factors", ())]
        self._diagonal = state.get("diagonal")
        self._layout = state.get("layout", [])


# Where little or nothing is damped, eigenvalues below this share of their mean are noise. Without a
# floor a trust radius, which is a length in this metric, would not bound what the noise moves.
_LEAST = 1e-4
# Relative to the trace, in units of the precision: a matrix is known no better.
_ROUNDING = 10
_Layer = tuple[int, int | None, Tensor, Tensor]


class _Block(NamedTuple):
    """The inverse of one layer's block."""

    weight: slice
    bias: slice | None
    inputs: Tensor  # (A + ...)^-1
    outputs: Tensor  # (S + ...)^-1


class _BlockInverse(LinearOperator):
    """Block by block `(S + ...)^-1 V (A + ...)^-1`, and the inverse of a diagonal elsewhere."""

    def __init__(
        self,
        factors: list[_Layer],
        diagonal: Tensor | None,
        slots: list[Slot],
        damping: float,
        like: Tensor,
    ) -> None:
        self.size, self.dtype, self.device = slots[-1].stop, like.dtype, like.device
        self._elsewhere = None
        if diagonal is not None:
            least = (_LEAST * diagonal.mean()).clamp_(min=torch.finfo(self.dtype).tiny)
            self._elsewhere = torch.maximum(diagonal + damping, least).reciprocal_()
        self._blocks = [_inverted(layer, slots, damping) for layer in factors]

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        result = torch.empty_like(v) if self._elsewhere is None else self._elsewhere * v
        for weight, bias, inputs, outputs in self._blocks:
            n = len(outputs)
            matrix = v[weight].view(n, -1)
            m = matrix.shape[1]
            right = matrix @ inputs[:m, :m]
            if bias is not None:
                column = torch.addmv(v[bias] * inputs[m, m], matrix, inputs[:m, m])
                torch.mv(outputs, column, out=result[bias])
                right.addr_(v[bias], inputs[m, :m])
            torch.mm(outputs, right, out=result[weight].view(n, m))
        return result


def _inverted(layer: _Layer, slots: list[Slot], damping: float) -> _Block:
    """Damps both factors so that their product is damped about as asked for (section 6.3)."""
    weight, bias, inputs, outputs = layer
    slot = slots[weight]
    if slot.scale != 1.0 or (bias is not None and slots[bias].scale != 1.0):
        scale = inputs.new_full((len(inputs),), slot.scale)
        if bias is not None:
            scale[-1] = slots[bias].scale
        inputs = scale[:, None] * inputs * scale
    # In units of their own: those of the outputs are the loss's, and may be very small or large.
    unit_a, unit_s = (power_of_two(factor.diagonal().mean()) for factor in (inputs, outputs))
    inputs, outputs = inputs / unit_a, outputs / unit_s
    mean_a, mean_s = inputs.diagonal().mean().sqrt(), outputs.diagonal().mean().sqrt()
    balance = torch.where((mean_a > 0) & (mean_s > 0), mean_a / mean_s, 1.0)
    # The product has to be positive definite in its own precision.
    rounding = _ROUNDING * len(inputs) * len(outputs) * torch.finfo(inputs.dtype).eps
    floor = max(_LEAST, rounding) ** 0.5 * mean_a * mean_s
    root = torch.maximum(floor, ((damping + slot.decay) / unit_a / unit_s).sqrt())
    return _Block(
        slice(slot.start, slot.stop),
        None if bias is None else slice(slots[bias].start, slots[bias].stop),
        _inverse(inputs, balance * root),
        _inverse(outputs, root / balance).div_(unit_a).div_(unit_s),
    )


def _inverse(matrix: Tensor, shift: Tensor) -> Tensor:
    """The inverse of `matrix + shift I`; of more than that where precision asks for it."""
    numbers = torch.finfo(matrix.dtype)
    rounding = _ROUNDING * numbers.eps * matrix.diagonal().sum()
    shift = torch.maximum(shift, rounding).clamp(min=numbers.tiny**0.25)
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:  # where all of it is at the edge of what the dtype holds
        return shifted.diagonal().reciprocal().diag()
    inverse = torch.cholesky_inverse(factor)
    return (inverse + inverse.T).div_(2)  # a device makes both halves by themselves
