"""The term that constraints add to each evaluation, see `WrapperOptimizer`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor


class TermOwner(Protocol):
    """An optimizer that has constraints."""

    def _seeds(self) -> tuple[Tensor, Tensor, Tensor] | None:  # pragma: no cover - a protocol
        """Values, the term's derivative by them, and the term, for a plain `backward()`."""

    def _term_of(self, tree: tuple[Any, ...]) -> Tensor:  # pragma: no cover - a protocol
        """The term of an evaluation, with its graph."""


class _Values:
    """See `torch_secondorder._optim.wrapper.Values`."""

    def __init__(self, owner: TermOwner, tree: tuple[Any, ...]) -> None:
        self.taken: list[Tensor] = []
        self._owner, self._tree = owner, tree

    def seeds(self) -> tuple[Tensor, Tensor] | None:
        found = None if self.taken else self._owner._seeds()
        if found is None:
            return None
        values, derivative, term = found
        self.taken.append(term)
        return values, derivative

    def take(self) -> Tensor | None:
        if self.taken:  # the constraints count once in an evaluation
            return None
        term = self._owner._term_of(self._tree)
        self.taken.append(term.detach())
        return term


class ConstraintTerm:
    """See `torch_secondorder._optim.wrapper.Term`."""

    def __init__(self, owner: TermOwner) -> None:
        self._owner = owner

    def watching(self, seed: int, tree: Any = None) -> AbstractContextManager[_Values]:
        return nullcontext(_Values(self._owner, () if tree is None else (tree,)))

    def missing(self) -> RuntimeError:  # pragma: no cover - constraints always have a value
        return RuntimeError("the constraints have no value")
