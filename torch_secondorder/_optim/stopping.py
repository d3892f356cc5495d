"""Whether iterations still get anywhere."""

from __future__ import annotations

from math import inf

__all__ = ["Progress"]


class Progress:
    """What the iterations of a step have changed.

    Args:
        loss: At the start.
        grad_norm: There.
        size: Norm of the parameters there.

    Attributes:
        change: The larger of the relative changes of loss and parameters in the last iteration.
        stalled: Iterations since the lowest loss or gradient.
    """

    def __init__(self, loss: float, grad_norm: float, size: float) -> None:
        self.change = inf
        self.stalled = 0
        self._size = size
        self._best = (loss, grad_norm)

    def note(
        self, before: float, loss: float, grad_norm: float, moved: float, held: bool = False
    ) -> None:
        """Takes note of an iteration.

        Args:
            before: The loss before it.
            loss: The loss after it.
            grad_norm: The largest entry of the gradient after it.
            moved: How far it moved the parameters.
            held: Whether it could have moved them further, and was not allowed to: that little has
                changed then means nothing.
        """
        loss_change = abs(before - loss) / abs(loss) if loss else inf if before else 0.0
        self.change = inf if held else max(loss_change, moved / self._size if self._size else inf)
        best_loss, best_grad = self._best
        improved = loss < best_loss or grad_norm < best_grad
        self.stalled = 0 if improved or held else self.stalled + 1
        self._best = (min(loss, best_loss), min(grad_norm, best_grad))
