"""Constraint functions, evaluated to one vector."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.traversal import leaves_of, nodes_of
from torch_secondorder._foundation.subclasses import plain

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
        names: The names of the functions.
        shapes: The shape that each function returned; None before the first evaluation.

    Raises:
        TypeError: Something given is no function.
        ValueError: There is no constraint, or two have one name.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> functions = ConstraintFunctions(lambda: x.sum() - 1, {"bound": lambda: x - 3})
    >>> functions().tolist(), functions.inequality.tolist(), functions.name(2)
    ([2.0, -2.0, -1.0], [False, True, True], 'bound[1]')
    """

    def __init__(self, equalities: Constraints, inequalities: Constraints) -> None:
        named = _named(equalities, "equalities"), _named(inequalities, "inequalities")
        twice = named[0].keys() & named[1].keys()
        if twice:
            raise ValueError(
                f"an equality and an inequality are both called {min(twice)!r}: multipliers go by "
                "name, so give each its own"
            )
        self._functions = [*named[0].items(), *named[1].items()]
        self._n_first = len(named[0])
        if not self._functions:
            raise ValueError("there is no constraint: pass equalities, inequalities or both")
        self.names = [name for name, _ in self._functions]
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

    def __call__(self, *tree: Any, params: Sequence[Tensor] | None = None) -> Tensor:
        """The values `(m,)`, with their graph.

        Args:
            *tree: The tree of parameters, beside a `FunctionalObjective`.
            params: The leaves that are trained; where given, each value must depend on one.

        Raises:
            TypeError: A function returned no tensor of real numbers.
            ValueError: A function returned a tensor without entries.
            RuntimeError: A value has no graph or no parameter in it, or its shape has changed.
        """
        if self.shapes is None:
            self._check_arguments(tree)
        graph = torch.is_grad_enabled()
        values = [_checked(name, function(*tree), graph) for name, function in self._functions]
        shapes = [value.shape for value in values]
        if self.shapes != shapes:
            self._check_shapes(shapes)
        if params is not None:
            self._check_dependence(values, params)
        self.shapes = shapes
        if len(values) == 1:
            return values[0].reshape(-1)
        device = values[0].device
        return torch.cat([value.reshape(-1).to(device) for value in values])

    def _check_arguments(self, tree: tuple[Any, ...]) -> None:
        given = "the tree of parameters" if tree else "no argument"
        for name, function in self._functions:
            try:
                inspect.signature(function).bind(*tree)
            except ValueError:  # it has no signature, as some functions in C
                continue
            except TypeError as error:
                raise TypeError(
                    f"the constraint {name} is called with {given}: {error}. Beside a closure, "
                    "write lambda: ... of the parameters themselves; beside a FunctionalObjective, "
                    "a function of its tree"
                ) from None

    def _check_shapes(self, shapes: Sequence[torch.Size]) -> None:
        for name, shape in zip(self.names, shapes, strict=True):
            if not shape.numel():
                raise ValueError(
                    f"the constraint {name} returned a tensor of shape {tuple(shape)}, which has "
                    "no entry: there is nothing to keep"
                )
        for name, shape, before in zip(self.names, shapes, self.shapes or shapes, strict=True):
            if shape != before:
                raise RuntimeError(
                    f"the constraint {name} returned a tensor of shape {tuple(shape)} after one of "
                    f"shape {tuple(before)}: every entry has a multiplier, so the shape must stay; "
                    "reduce what varies, for instance with .mean()"
                )

    def _check_dependence(self, values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        known = {id(p) for p in params}
        for name, value in zip(self.names, values, strict=True):
            if not any(id(leaf) in known for leaf in leaves_of(nodes_of([value]))):
                raise RuntimeError(
                    f"the constraint {name} depends on none of the parameters that the optimizer "
                    "trains: compute it from those (not from copies, nor from another model or "
                    "frozen parameters), and beside a FunctionalObjective from the tree that it "
                    "is given"
                )

    def name(self, index: int) -> str:
        """The name of a constraint, such as `equalities[0]` or `volume[3]`."""
        assert self.shapes is not None
        for name, shape in zip(self.names, self.shapes, strict=True):
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
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def _checked(name: str, value: Any, graph: bool) -> Tensor:
    if type(value) is not Tensor:
        value = plain(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"the constraint {name} must return a tensor of real numbers, got {found}: return what "
            "is to be zero, or zero or less, as a tensor that is computed from the parameters"
        )
    if graph and not value.requires_grad:
        raise RuntimeError(
            f"the constraint {name} returned a tensor without a graph: compute it from parameters "
            "that are trained, without detach(), item() or torch.no_grad()"
        )
    return value


def _named(given: Constraints, argument: str) -> dict[str, Constraint]:
    if given is None:
        return {}
    named: dict[str, Any]
    if isinstance(given, Mapping):
        named = {str(name): function for name, function in given.items()}
    elif isinstance(given, Sequence):
        named = {f"{argument}[{i}]": function for i, function in enumerate(given)}
    else:
        named = {argument: given}
    for name, function in named.items():
        if not callable(function):
            value = isinstance(function, (Tensor, float, int, bool))
            hint = ": give the function itself, not its value, as in lambda: w.norm() - 1"
            raise TypeError(
                f"{name} must be a function that returns a tensor, got "
                f"{type(function).__name__}{hint if value else ''}"
            )
    return named
