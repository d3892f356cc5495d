"""Derivatives of pure functions, in the style of `torch.func`.

Functions take and return trees of tensors, and compose with `torch.func.vmap`, `grad` and
`torch.compile`.
"""

from torch_secondorder.func.derivative_checks import (
    DerivativeReport,
    Discrepancy,
    check_derivatives,
)
from torch_secondorder.func.hessian_products import ggnvp, hessian_diagonal, hvp, vhp
from torch_secondorder.func.jacobians import batch_jacobian, jacobian, module_jacobian
from torch_secondorder.func.transforms import jvp, vjp

__all__ = [
    "DerivativeReport",
    "Discrepancy",
    "batch_jacobian",
    "check_derivatives",
    "ggnvp",
    "hessian_diagonal",
    "hvp",
    "jacobian",
    "jvp",
    "module_jacobian",
    "vhp",
    "vjp",
]


def __dir__() -> list[str]:
    return __all__
