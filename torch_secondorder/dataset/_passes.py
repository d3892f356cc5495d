"""Going over a data set several times within one step."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from torch_secondorder.dataset._batches import fingerprint
from torch_secondorder.dataset._loader import generators
from torch_secondorder.dataset.closure import DatasetClosure, Use

__all__ = ["Passes"]

_Fingerprint: TypeAlias = tuple[list[torch.Size], list[Tensor]]


class Passes:
    """A dataset closure for the length of one step: all passes see the same batches.

    Args:
        closure: The closure.
    """

    def __init__(self, closure: DatasetClosure) -> None:
        self.closure = closure
        self._states = [(g, g.get_state()) for g in generators(closure.loader)]
        self._seen: list[_Fingerprint] | None = None  # fingerprints of the batches

    def __call__(self) -> Tensor:
        """See `DatasetClosure.__call__`."""
        return self.closure.accumulate(self.over)

    def over(self, use: Use, label: str) -> None:
        """See `DatasetClosure.over`.

        Raises:
            RuntimeError: The loader gave other batches than in the first pass.
        """
        for generator, state in self._states:
            generator.set_state(state)
        seen: list[_Fingerprint] = []
        self.closure.over(use, label, lambda batch: seen.append(fingerprint(batch)))
        if self._seen is None:
            self._seen = seen
        elif not _alike(seen, self._seen):
            raise RuntimeError(
                "the loader gave other batches than before in the same step: all evaluations of a "
                "step have to see the same data in the same order. Orders and augmentations drawn "
                "from PyTorch's generators are drawn again; those from NumPy, Python's random or "
                "persistent workers are not: fix them for the step, or use an optimizer that "
                "evaluates once (AdaHessian, Sophia)"
            )


def _alike(first: list[_Fingerprint], second: list[_Fingerprint]) -> bool:
    """Whether fingerprints are the same, one by one; waits for a device once."""
    if [shapes for shapes, _ in first] != [shapes for shapes, _ in second]:
        return False
    ours, theirs = ([n for _, numbers in some for n in numbers] for some in (first, second))
    if not ours:
        return True
    device = ours[0].device
    return torch.equal(*(torch.stack([n.to(device) for n in some]) for some in (ours, theirs)))
