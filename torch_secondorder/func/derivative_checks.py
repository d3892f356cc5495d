"""Derivatives against central finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder.func._trees import basis, flatten, flattened, named, numels, unflatten
from torch_secondorder.func.jacobians import reverse
from torch_secondorder.func.transforms import push

__all__ = ["DerivativeReport", "Discrepancy", "check_derivatives"]

_KINDS = ("jacobian", "gradient", "hessian")

_COORDINATES = 16  # looked at one by one in each leaf
_TINY = 1e-300


@dataclass(frozen=True)
class Discrepancy:
    """The worst entry of one kind of derivative.

    Attributes:
        error: Its distance from the finite difference, over the largest entry of the same product.
        where: Its name, such as `x['weight'][2, 0]`.

    >>> report = check_derivatives(lambda x: x.exp().sum(), torch.ones(2))
    >>> report.gradient.where[:1], report.gradient.error < 1e-3
    ('x', True)
    """

    error: float
    where: str

    def __str__(self) -> str:
        return f"{self.error:.1e} at {self.where}"


@dataclass(frozen=True)
class DerivativeReport:
    """The result of `check_derivatives`; true where all errors are within the tolerance.

    Attributes:
        passed: Whether every error is within the tolerance.
        tolerance: The largest relative error allowed.
        jacobian: The worst entry of products with the Jacobian.
        gradient: Of gradients of a random combination of the outputs, of the output if it is one.
        hessian: Of products with the Hessian of that combination.

    >>> report = check_derivatives(lambda x: x.square().sum(), torch.ones(3))
    >>> report.passed, report.hessian.error < report.tolerance
    (True, True)
    """

    passed: bool
    tolerance: float
    jacobian: Discrepancy
    gradient: Discrepancy
    hessian: Discrepancy

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [f"derivatives {'agree' if self.passed else 'DIFFER'} (to {self.tolerance:.0e})"]
        for kind in _KINDS:
            found = getattr(self, kind)
            mark = "" if found.error <= self.tolerance else "  <- wrong"
            lines.append(f"  {kind:<9} worst relative error {found}{mark}")
        return "\n".join(lines)


def check_derivatives(
    f: Callable[[Any], Any],
    x: Any,
    *,
    directions: int = 5,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> DerivativeReport:
    """Compares first and second derivatives with central finite differences in float64.

    Products with the Jacobian and the Hessian are checked along random directions through the whole
    tree and through each leaf alone; gradients along these, and entry by entry at up to 16 random
    places of each leaf, so that a wrong one is named. Where `f` has kinks nearby (ReLU at zero)
    finite differences are wrong, not the derivatives.

    Args:
        f: A function of a tree of tensors that returns a tree of tensors, the same for the same
            input. What it closes over has to work with float64.
        x: Where; it is taken to float64.
        directions: Random directions through the whole tree.
        tolerance: The largest relative error that passes.
        generator: Where directions come from, on the CPU; a fixed seed by default.

    Returns:
        A report, which is true where all derivatives agree, and prints as a table.

    Raises:
        TypeError: A leaf of `x` or `f(x)` is no tensor of real numbers.
        ValueError: `directions` is below one, or `x` or `f(x)` has no entries.

    >>> bool(check_derivatives(lambda x: x.sin().sum(), torch.ones(3)))
    True
    >>> class Wrong(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return x.clone()
    ...
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return 2 * g
    >>> check_derivatives(lambda x: Wrong.apply(x).sum(), torch.ones(3)).passed
    False
    """
    check_integer("directions", directions)
    leaves, spec = flatten(x, "x")
    generator = generator or torch.Generator().manual_seed(0)
    check = _Comparison(f, [leaf.detach().double() for leaf in leaves], spec, generator)
    for tangents in check.directions(directions):
        check.along(tangents)
    check.entry_by_entry()
    worst = {kind: check.worst[kind] for kind in _KINDS}
    passed = all(found.error <= tolerance for found in worst.values())
    return DerivativeReport(passed, tolerance, **worst)


class _Comparison:
    """One function at one point, and the worst that was found so far."""

    def __init__(
        self,
        f: Callable[[Any], Any],
        leaves: list[Tensor],
        spec: pytree.TreeSpec,
        generator: torch.Generator,
    ) -> None:
        self.f, specs = flattened(f, spec)
        self.x, self.generator = leaves, generator
        with torch.no_grad():
            outputs = self.f(*leaves)
        if sum(numels(leaves)) == 0 or sum(numels(outputs)) == 0:
            raise ValueError("x or f(x) has no entries, and no derivatives to check")
        self.inputs = [name for name, _ in named(unflatten(leaves, spec), "x")]
        self.outputs = [name for name, _ in named(unflatten(outputs, specs[0]), "f(x)")]
        alone = sum(numels(outputs)) == 1
        self.weights = [torch.ones_like(y) if alone else self._random(y) for y in outputs]
        self.worst = {kind: Discrepancy(0.0, "-") for kind in _KINDS}
        self.gradient = self._gradient(leaves)
        self.rounding = 0.0  # in the last finite difference

    def directions(self, count: int) -> list[list[Tensor]]:
        """Random ones through the whole tree, and through each leaf alone."""
        found = [[self._random(x) for x in self.x] for _ in range(count)]
        if len(self.x) > 1:
            found += [
                [self._random(x) if i == j else x * 0 for j, x in enumerate(self.x)]
                for i in range(len(self.x))
            ]
        return found

    def along(self, tangents: Sequence[Tensor]) -> None:
        """Looks at products with one direction."""
        change = self._difference(lambda x: self.f(*x), tangents)
        self._compare("jacobian", self._product(tangents), change, self.outputs)
        slope, expected = _dot(self.gradient, tangents), _dot(self.weights, change)
        moved = [name for name, t in zip(self.inputs, tangents, strict=True) if bool(t.any())]
        where = moved if len(moved) == 1 else ["x"]
        # What the slope could be at most: relative to this, a wrong entry shows more by itself.
        most = (_dot(self.gradient, self.gradient) * _dot(tangents, tangents)).sqrt()
        self._compare("gradient", [slope], [expected], where, float(most))
        curved = self._difference(self._gradient, tangents)
        self._compare("hessian", self._hessian_product(tangents), curved, self.inputs)

    def entry_by_entry(self) -> None:
        """Looks at single entries of the gradient."""
        sizes = numels(self.x)
        expected = [g.clone() for g in self.gradient]
        for i, size in enumerate(sizes):
            places = torch.randperm(size, generator=self.generator)[:_COORDINATES]
            for place in places.tolist():
                start = sum(sizes[:i]) + place
                unit = [part[0] for part in basis(self.x, start, start + 1)]
                change = self._difference(lambda x: self.f(*x), unit)
                expected[i].view(-1)[place] = _dot(self.weights, change)
        self._compare("gradient", self.gradient, expected, self.inputs)

    def _compare(
        self,
        kind: str,
        found: Sequence[Tensor],
        expected: Sequence[Tensor],
        names: Sequence[str],
        largest: float = 0.0,
    ) -> None:
        """Keeps the entry that is farthest off, if it is farther than what was found before."""
        entries = [t for t in (*found, *expected) if t.numel() > 0]
        largest = max([largest, _TINY, *(float(t.abs().max()) for t in entries)])
        for name, a, b in zip(names, found, expected, strict=True):
            if a.numel() == 0:
                continue
            # Derivatives that are zero would have no digit right, but for the rounding left out.
            error = ((a - b).abs() - self.rounding).clamp(min=0.0) / largest
            error = torch.nan_to_num(error, nan=torch.inf)  # it differs from everything
            place = int(error.argmax())
            worst = float(error.reshape(-1)[place])
            if worst > self.worst[kind].error or self.worst[kind].where == "-":
                self.worst[kind] = Discrepancy(worst, name + _index(place, a.shape))

    def _difference(
        self, g: Callable[[Sequence[Tensor]], Sequence[Tensor]], tangents: Sequence[Tensor]
    ) -> list[Tensor]:
        # The error is the step squared and rounding over the step: best at the cube root.
        size = max(1.0, max(float(x.abs().max()) for x in self.x if x.numel()))
        length = max(float(t.abs().max()) for t in tangents if t.numel())
        step = torch.finfo(torch.float64).eps ** (1 / 3) * size / max(length, _TINY)
        with torch.no_grad():
            pairs = list(zip(self.x, tangents, strict=True))
            after = g([x + step * t for x, t in pairs])
            before = g([x - step * t for x, t in pairs])
        sizes = [float(t.abs().max()) for t in (*after, *before) if t.numel()]
        self.rounding = 4 * torch.finfo(torch.float64).eps * max(sizes, default=0.0) / step
        return [((a - b) / (2 * step)).double() for a, b in zip(after, before, strict=True)]

    def _product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        try:
            products = push(self.f, self.x, [t.unsqueeze(0) for t in tangents])
            return [p[0].double() for p in products]
        except (RuntimeError, NotImplementedError):  # an operation without forward mode: by rows
            pull, outputs = reverse(self.f, self.x)
            rows = pull(basis(outputs, 0, sum(numels(outputs))))
            flat = sum(
                row.reshape(len(row), -1) @ t.reshape(-1)
                for row, t in zip(rows, tangents, strict=True)
            )
            parts = torch.as_tensor(flat).detach().split(numels(outputs))
            return [part.view(y.shape).double() for part, y in zip(parts, outputs, strict=True)]

    def _gradient(self, x: Sequence[Tensor], again: bool = False) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in x]
            return self._gradient_at(leaves, again)

    def _gradient_at(self, leaves: Sequence[Tensor], again: bool) -> list[Tensor]:
        value = _dot(self.weights, [y.double() for y in self.f(*leaves)])
        if not value.requires_grad:
            return [torch.zeros_like(t) for t in leaves]
        found = torch.autograd.grad(
            value, leaves, create_graph=again, allow_unused=True, materialize_grads=True
        )
        return list(found)

    def _hessian_product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in self.x]
            gradient = self._gradient_at(leaves, again=True)
            slope = _dot(gradient, tangents)
            if not slope.requires_grad:
                return [torch.zeros_like(t) for t in leaves]
            found = torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)
            return list(found)

    def _random(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(like.device)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


def _index(place: int, shape: torch.Size) -> str:
    indices = []
    for size in reversed(shape):
        indices.append(place % size)
        place //= size
    return f"[{', '.join(map(str, reversed(indices)))}]" if indices else ""
