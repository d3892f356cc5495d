"""The objective of a data set for one step, whose passes all see the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Multiply, Overwritten
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.runner import ModuleRegistry, Replay, Run
from torch_secondorder._closure.validation import differentiable
from torch_secondorder._objective.base import (
    Curvature,
    Evaluation,
    Linearization,
    Regularization,
    Slot,
)
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.dataset._loader import fingerprint, generators_of
from torch_secondorder.dataset.closure import DatasetClosure, UseBatch

_Fingerprint: TypeAlias = tuple[list[torch.Size], list[Tensor]]


class Passes:
    """Passes over a data set within one step, all with the same batches.

    Args:
        closure: The closure over the data set.
    """

    def __init__(self, closure: DatasetClosure) -> None:
        self.closure = closure
        self._states = [(g, g.get_state()) for g in generators_of(closure.loader)]
        self._first: list[_Fingerprint] | None = None  # of the batches in the first pass

    def __call__(self) -> Tensor:
        """See `DatasetClosure.__call__`."""
        return self.closure.accumulate(self.for_each_batch)

    def for_each_batch(self, use: UseBatch, label: str) -> None:
        """See `DatasetClosure.for_each_batch`.

        Raises:
            RuntimeError: The loader gave other batches than in the first pass.
        """
        for generator, state in self._states:
            generator.set_state(state)
        found: list[_Fingerprint] = []
        self.closure.for_each_batch(use, label, lambda batch: found.append(fingerprint(batch)))
        if self._first is None:
            self._first = found
        elif not _equal(found, self._first):
            raise RuntimeError(
                "the loader gave other batches than before in the same step: all evaluations of a "
                "step have to see the same data in the same order. Orders and augmentations drawn "
                "from PyTorch's generators are repeated; those from NumPy, Python's random or "
                "persistent workers are not: fix them for the step, or use an optimizer that "
                "evaluates once (SOAP, AdaHessian)"
            )


def _equal(found: list[_Fingerprint], expected: list[_Fingerprint]) -> bool:
    """Compares fingerprints one by one; waits for a device only once."""
    if [shapes for shapes, _ in found] != [shapes for shapes, _ in expected]:
        return False
    left, right = ([n for _, numbers in side for n in numbers] for side in (found, expected))
    if not left:
        return True
    device = left[0].device
    return torch.equal(*(torch.stack([n.to(device) for n in side]) for side in (left, right)))


class DatasetObjective(ClosureObjective):
    """The objective of a closure over a data set.

    It evaluates like any closure's objective, but keeps no graph: the curvature comes from further
    passes over the loader, see `BatchSum`.

    Args:
        closure: See `ClosureObjective`.
        params: See `ClosureObjective`.
        curvature_closure: See `ClosureObjective`. Products come from this closure, or from
            `closure` without it, which has to be a `DatasetClosure`.

    Attributes:
        passes: Passes over the data that products come from.
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
        assert isinstance(self.source, Passes)
        self.passes = self.source
        self._evaluated_here = False  # True if the last evaluation was at the current position
        # Kept, though it holds a gradient: evaluating again would take a pass over the data.
        self._trial: Evaluation | None = None

    @property
    def replay(self) -> Replay:
        """The random state and buffers from which every evaluation of the step starts."""
        return self._replay

    def evaluate(self, *, curvature: Curvature = False) -> Evaluation:
        """See `Objective.evaluate`; an accepted trial is not evaluated again."""
        last = None if self._last_evaluation is None else self._last_evaluation()
        if last is not None and self._evaluated_here:
            return last
        return super().evaluate(curvature=curvature)

    def trial(self, step: Tensor, t: float = 1.0, *, curvature: Curvature = False) -> Evaluation:
        """See `Objective.trial`."""
        self._trial = super().trial(step, t, curvature=curvature)
        return self._trial

    def for_each_batch(
        self,
        use: Callable[[Callable[[], Evaluation], float], None],
        label: str,
        curvature: Curvature = True,
    ) -> None:
        """Makes another pass over the batches at the current parameters.

        Args:
            use: Called for each batch with a function that evaluates it, and with its weight. The
                evaluation has curvature, but leaves out weight decay and other ranks.
            label: The label of the progress bar.
            curvature: The kind of curvature, see `Objective.evaluate`.
        """

        def one(compute: Callable[[], Tensor], weight: float) -> None:
            use(partial(self._of_batch, compute, curvature is True), weight)

        with torch.enable_grad():
            self._replay.run(partial(self.passes.for_each_batch, one, label))

    def complete(self, total: Tensor, direction: Tensor) -> Tensor:
        """Completes a sum over the batches to a product with the objective's curvature.

        Adds the other ranks and weight decay.

        Args:
            total: The sum, `(n,)` or `(k, n)`.
            direction: The vectors that were multiplied, of that shape.
        """
        total = self.ranks.average(total)
        if self._decays:
            scaled = self.vector.scaled
            total.add_(scaled(self._decay * scaled(direction)))
        if self.manifold is not None:
            total = self.manifold.tangent(self.position, total)
        return total

    def _run(self, position: Tensor, curvature: Curvature) -> Run:
        self._evaluated_here, self._trial = False, None
        raw = super()._run(position, False)
        self._evaluated_here = position is self.position
        return raw

    def _go(self, position: Tensor, *, there: bool = False, unseen: bool = False) -> None:
        super()._go(position, there=there, unseen=unseen)
        self._evaluated_here = there

    def _move_buffers_on(self, there: bool) -> None:
        super()._move_buffers_on(there)
        self._evaluated_here = self._evaluated_here and not self.renewed

    def _of_batch(self, compute: Callable[[], Tensor], twice: bool) -> Evaluation:
        closure = self.passes.closure
        self.settle()
        copies = self._copies(closure)
        with Capture(self.vector.params, copies=copies, twice=twice) as capture:
            loss = differentiable(capture.checked(compute()))
            gradients = capture.differentiate(loss)
        if closure.keep_graphs and not copies and not self.vector.holds(self.position):
            raise Overwritten("the closure moves parameters that its graph has saved")
        capture.graph.check_once(self.registry.graphs, twice)
        value = loss.detach()
        flatten = partial(self._share, gradients)
        place = self._place_of(capture)
        linearization = _OfBatch(self, capture.graph, copies=copies, place=place)
        if self.manifold is not None:
            linearization.ambient = self._share(gradients)
        return Evaluation(self._sign * value, value, flatten, linearization)

    def copy_saved(self) -> bool:
        """Makes graphs save copies from now on; returns False if they do already."""
        if self._copies(self.passes.closure):
            return False
        self._note_writes(self.passes.closure)
        return True

    def _share(self, parts: Sequence[Tensor | None], batch: Sequence[int] = ()) -> Tensor:
        """One batch's contribution to the gradient or a product, from parts like the parameters."""
        flat = self.vector.gather(parts, batch=batch)
        if self._sign < 0:
            flat.neg_()
        return self.vector.scaled(flat)


class _OfBatch(Linearization):
    """One batch's contribution to the curvature; the sum adds weight decay and ranks once."""

    _objective: DatasetObjective

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = Ranks()

    def product(self, v: Tensor, multiply: Multiply, *, bends: bool = False) -> Tensor:
        self.check()
        objective, manifold = self._objective, self._objective.manifold
        vector, place = objective.vector, objective.position
        if manifold is not None:
            v = manifold.tangent(place, v)
        direction = vector.scaled(v)
        parts = multiply(vector.split(direction), v.dim() == 2)
        product = objective._share(parts, direction.shape[:-1])
        if manifold is not None and bends:
            product = manifold.product(place, direction, product, self.ambient)
        return product

    def slots(self) -> list[Slot]:
        return [slot._replace(decay=0.0) for slot in super().slots()]

    def decay_gradient(self) -> None:
        return None

    def renew(self) -> bool:
        return False  # all batches are affected: `BatchSum` renews them together

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        self.check()
        return self._objective._share(roots, (count,)).square_().mean(0)


def _for_one_step(closure: Callable[[], Any]) -> Callable[[], Any]:
    return Passes(closure) if isinstance(closure, DatasetClosure) else closure


def objective_of(
    closure: Callable[[], Any],
    vector: ParameterVector | Iterable[Tensor],
    regularization: Regularization | None = None,
    master: Tensor | None = None,
    registry: ModuleRegistry | None = None,
    curvature_closure: Callable[[], Any] | None = None,
) -> ClosureObjective:
    """The objective of one step, with closures that may be over data sets.

    Args:
        closure: See `ClosureObjective`.
        vector: See `Objective`.
        regularization: See `Objective`.
        master: See `Objective`.
        registry: See `Objective`.
        curvature_closure: See `ClosureObjective`.
    """
    source = closure if curvature_closure is None else curvature_closure
    kind = DatasetObjective if isinstance(source, DatasetClosure) else ClosureObjective
    closure = _for_one_step(closure)
    return kind.for_step(closure, vector, regularization, master, registry, curvature_closure)
