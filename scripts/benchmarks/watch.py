"""A curvature for Newton-CG that counts and times its products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import GaussNewton


class Watch:
    """A `curvature` for `NewtonCG`: the Gauss-Newton matrix, with its products counted.

    Args:
        around: Makes a context for each product; a time limit may raise in it.

    Attributes:
        products: Number of products with single vectors; a backward pass for the diagonal counts
            as one.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.products = 0
        self._around = around
        self._inside = False

    def __call__(self, evaluation: Evaluation) -> GaussNewton:
        """The operator at an evaluated point."""
        return _Watched(evaluation, self)

    @contextmanager
    def counted(self, products: int) -> Iterator[None]:
        """A context that counts products, unless it is inside another such context."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with self._around():
                yield
        finally:
            self._inside = False
        self.products += products


class _Watched(GaussNewton):
    """A counting `GaussNewton`; the preconditioner "martens" needs this class."""

    def __init__(self, evaluation: Evaluation, watch: Watch) -> None:
        super().__init__(evaluation)
        self._watch = watch

    def matvec(self, v: Tensor) -> Tensor:
        """See `GaussNewton.matvec`."""
        with self._watch.counted(1):
            return super().matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        """See `GaussNewton.matmat`."""
        with self._watch.counted(V.shape[1]):
            return super().matmat(V)

    def diagonal(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """See `GaussNewton.diagonal`."""
        with self._watch.counted(n_samples):
            return super().diagonal(n_samples, generator)
