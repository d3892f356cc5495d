"""Derivatives against central finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_secondorder._foundation.checks import check_integer
from torch_secondorder.func._differences import KINDS, Comparison, Discrepancy
from torch_secondorder.func._trees import flatten

__all__ = ["DerivativeReport", "Discrepancy", "check_derivatives"]


@dataclass(frozen=True)
class DerivativeReport:
    """The findings of `check_derivatives`; true if all is within the tolerance.

    Attributes:
        passed: Whether every error is within the tolerance.
        tolerance: The largest relative error allowed.
        jacobian: The worst entry of products with the Jacobian.
        gradient: Of gradients of a random combination of the outputs, of the output if it is one.
        hessian: Of products with the Hessian of that combination.
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
        for kind in KINDS:
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
    check = Comparison(f, [leaf.detach().double() for leaf in leaves], spec, generator)
    for tangents in check.directions(directions):
        check.along(tangents)
    check.entry_by_entry()
    worst = {kind: check.worst[kind] for kind in KINDS}
    passed = all(found.error <= tolerance for found in worst.values())
    return DerivativeReport(passed, tolerance, **worst)
