"""Constraint functions, evaluated to one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: Returns a tensor, of which every entry is a constraint: it takes no arguments beside a closure,
#: and the tree of parameters beside a `FunctionalObjective`.
Constraint: TypeAlias = Callable[..., Tensor]
#: One function, a list of them, or functions by name.
Constraints: TypeAlias = Constraint | Sequence[Constraint] | Mapping[str, Constraint] | None


class ConstraintFunctions:
    """The constraints `h = 0` and `g <= 0` of a problem, as one vector: the equalities come first.

    Args:
        equalities: Functions that return `h`.
        inequalities: Functions that return `g`.

    Attributes:
        shapes: The shape that each function returned; None before the first evaluation.

    Raises:
        TypeError: Something given is no function.
        ValueError: There is no constraint.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> functions = ConstraintFunctions(lambda: x.sum() - 1, {"bound": lambda: x - 3})
    >>> functions().tolist(), functions.inequality.tolist(), functions.name(2)
    ([2.0, -2.0, -1.0], [False, True, True], 'bound[1]')
    """

    def __init__(self, equalities: Constraints, inequalities: Constraints) -> None:
        named = _named(equalities, "equalities"), _named(inequalities, "inequalities")
        self._functions = [*named[0].items(), *named[1].items()]
        self._n_first = len(named[0])
        if not self._functions:
            raise ValueError("there is no constraint: pass equalities, inequalities or both")
        self.shapes: list[torch.Size] | None = None

    @property
    def size(self) -> int:
        """The number of constraints `m`, each entry of a tensor one; known once evaluated."""
        assert self.shapes is not None
        return sum(shape.numel() for shape in self.shapes)

    @property
    def n_equalities(self) -> int:
        """The number of equalities; known once evaluated."""
        assert self.shapes is not None
        return sum(shape.numel() for shape in self.shapes[: self._n_first])

    @property
    def inequality(self) -> Tensor:
        """A mask of the inequalities, `(m,)`, on the CPU; known once evaluated."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[: self.n_equalities] = False
        return mask

    def __call__(self, *tree: Any) -> Tensor:
        """The values `(m,)`, with their graph.

        Args:
            *tree: The tree of parameters, beside a `FunctionalObjective`.

        Raises:
            TypeError: A function returned no tensor of real numbers.
            RuntimeError: A value has no graph, or its shape has changed.
        """
        values = [self._checked(name, function(*tree)) for name, function in self._functions]
        shapes = [value.shape for value in values]
        if self.shapes is None:
            self.shapes = shapes
        elif self.shapes != shapes:
            changed = next(i for i, s in enumerate(shapes) if s != self.shapes[i])
            raise RuntimeError(
                f"the constraint {self._functions[changed][0]} returned a tensor of shape "
                f"{tuple(shapes[changed])} after one of shape {tuple(self.shapes[changed])}: every "
                "entry has a multiplier, so the shape must stay"
            )
        return torch.cat([value.reshape(-1) for value in values])

    def name(self, index: int) -> str:
        """The name of a constraint, such as `equalities[0]` or `volume[3]`."""
        assert self.shapes is not None
        for (name, _), shape in zip(self._functions, self.shapes, strict=True):
            if index < shape.numel():
                where = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]
                return f"{name}[{', '.join(map(str, where))}]" if where else name
            index -= shape.numel()
        raise IndexError(index)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `(m,)` in parts by the names of the functions, in their shapes."""
        assert self.shapes is not None
        parts = vector.split([shape.numel() for shape in self.shapes])
        return {
            name: part.reshape(shape)
            for (name, _), part, shape in zip(self._functions, parts, self.shapes, strict=True)
        }

    def _checked(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"the constraint {name} must return a tensor of real numbers, got {found}"
            )
        if not value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"the constraint {name} returned a tensor without a graph: compute it from the "
                "parameters, without detach(), item() or torch.no_grad()"
            )
        return value


def _named(given: Constraints, argument: str) -> dict[str, Constraint]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        named = {str(name): function for name, function in given.items()}
    elif isinstance(given, Sequence):
        named = {f"{argument}[{i}]": function for i, function in enumerate(given)}
    else:
        named = {argument: given}
    for name, function in named.items():
        if not callable(function):
            raise TypeError(
                f"{name} must be a function that returns a tensor, got {type(function).__name__}"
            )
    return named
