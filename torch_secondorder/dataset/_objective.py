"""The objective behind a closure over a data set: what one step sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Multiply, Overwritten
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.replay import ModuleRegistry, Replay
from torch_secondorder._closure.validation import differentiable
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.evaluation import Evaluation, Linearization, RawEvaluation
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.dataset._passes import Passes
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["DatasetObjective"]


class DatasetObjective(ClosureObjective):
    """The objective behind a closure over a data set.

    It evaluates as any closure's does, and keeps no graph: the curvature comes from going over the
    loader again, see `BatchSum`.

    Args:
        closure: See `ClosureObjective`.
        params: See `ClosureObjective`.
        curvature_closure: See `ClosureObjective`. One of the two is a `DatasetClosure`.

    Attributes:
        passes: What products come from; None where that is an ordinary closure.
    """

    def _begin(
        self,
        closure: Callable[[], Any],
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
        curvature_closure: Callable[[], Any] | None = None,
    ) -> None:
        own = _for_one_step(closure)
        other = None if curvature_closure is None else _for_one_step(curvature_closure)
        super()._begin(own, vector, regularization, master, registry, other)
        source = own if other is None else other
        self.passes = source if isinstance(source, Passes) else None
        self._here = False  # whether it was evaluated last where it stands
        # Kept, though it holds a gradient: to make it again takes a pass over the data.
        self._trial: Evaluation | None = None

    @property
    def replay(self) -> Replay:
        """What all evaluations of the step start from."""
        return self._replay

    def evaluate(self, *, curvature: bool = False) -> Evaluation:
        """See `Objective.evaluate`; a trial that has become the position is not made again."""
        last = self._last()
        if last is not None and self._here and self.passes is not None:
            return last
        return super().evaluate(curvature=curvature)

    def trial(self, step: Tensor, t: float = 1.0, *, curvature: bool = False) -> Evaluation:
        """See `Objective.trial`."""
        self._trial = super().trial(step, t, curvature=curvature)
        return self._trial

    def over(self, use: Callable[[Callable[[], Evaluation], float], None], label: str) -> None:
        """Goes over the batches once more, where the parameters stand.

        Args:
            use: Called for each batch with a function that evaluates it, with curvature but without
                weight decay and other ranks, and with its weight.
            label: What is done.
        """
        assert self.passes is not None

        def one(compute: Callable[[], Tensor], weight: float) -> None:
            use(partial(self._of_batch, compute), weight)

        with torch.enable_grad():
            self._replay.run(partial(self.passes.over, one, label))

    def whole(self, total: Tensor, direction: Tensor) -> Tensor:
        """Makes a product with the objective's curvature of a sum over the batches.

        Args:
            total: The sum, `(n,)` or `(k, n)`.
            direction: What was multiplied, of that shape.
        """
        total = self.ranks.average(total)
        if self._decays:
            scaled = self.vector.scaled
            total.add_(scaled(self._decay * scaled(direction)))
        return total

    def _run(self, position: Tensor, curvature: bool) -> RawEvaluation:
        self._here, self._trial = False, None
        raw = super()._run(position, curvature and self.passes is None)
        self._here = position is self.position
        return raw

    def _go(self, position: Tensor, *, there: bool = False, unseen: bool = False) -> None:
        super()._go(position, there=there, unseen=unseen)
        self._here = there

    def _move_buffers_on(self, there: bool) -> None:
        super()._move_buffers_on(there)
        self._here = self._here and not self.renewed

    def _of_batch(self, compute: Callable[[], Tensor]) -> Evaluation:
        assert self.passes is not None
        closure = self.passes.closure
        self.settle()
        copies = self._copies(closure)
        with Capture(self.vector.params, copies=copies) as capture:
            loss = differentiable(capture.checked(compute()))
            gradients = capture.differentiate(loss)
        if closure.keep_graphs and not copies and not self.vector.holds(self.position):
            raise Overwritten("the closure moves parameters that its graph has saved")
        capture.graph.check_once(self._registry.graphs)
        value = loss.detach()
        flatten = partial(self._share, gradients)
        place = self._place_of(capture)
        linearization = _OfBatch(self, capture.graph, copies=copies, place=place)
        return Evaluation(self._sign * value, value, flatten, linearization)

    def copy_saved(self) -> bool:
        """Lets graphs be of copies from now on; says whether they were not."""
        assert self.passes is not None
        if self._copies(self.passes.closure):
            return False
        self._note_writes(self.passes.closure)
        return True

    def _share(self, parts: Sequence[Tensor | None], batch: Sequence[int] = ()) -> Tensor:
        """What parts shaped like the parameters add to the objective's gradient or product."""
        flat = self.vector.gather(parts, batch=batch)
        if self._sign < 0:
            flat.neg_()
        return self.vector.scaled(flat)


class _OfBatch(Linearization):
    """What one batch adds to the curvature; weight decay and the ranks come in once, in the sum."""

    _objective: DatasetObjective

    def product(self, v: Tensor, multiply: Multiply) -> Tensor:
        self.check()
        vector = self._objective.vector
        direction = vector.scaled(v)
        parts = multiply(vector.split(direction), v.dim() == 2)
        return self._objective._share(parts, direction.shape[:-1])

    def renew(self) -> bool:
        return False  # the other batches' are no better: `BatchSum` sees to it

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        self.check()
        return self._objective._share(roots, (count,)).square_().mean(0)

    @property
    def ranks(self) -> Ranks:
        return Ranks()


def _for_one_step(closure: Callable[[], Any]) -> Callable[[], Any]:
    return Passes(closure) if isinstance(closure, DatasetClosure) else closure
