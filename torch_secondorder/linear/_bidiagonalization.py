"""The process of Golub and Kahan on a matrix-free operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, isfinite

import torch
from torch import Tensor

from torch_secondorder._params.space import WHOLE
from torch_secondorder.linear.operators import OperatorLike, RectangularOperator
from torch_secondorder.solvers._units import unit_of


class Bidiagonalization:
    """The process of Golub and Kahan 1965: `A V = U B` with a lower bidiagonal `B`.

    The first column of `U` is `b / beta`. Each step adds a column to `V` and to `U`, for one
    product with `A` and one with `A'`, and waits for the device once.

    Attributes:
        u: The newest column of `U`, zero if `U` cannot grow.
        v: That of `V`.
        alpha: The newest entry on the diagonal of `B`.
        beta: The newest entry below the diagonal; at first `|b|`.
        unit: The unit of `A`, which `alpha` and `beta` are in. It is a power of two, and not one
            only if squares might leave the range of the dtype.
        unit_of_b: That of `b`, which the first `beta` is in.
        finite: False from the first product on that is not finite.
    """

    def __init__(self, A: RectangularOperator, b: Tensor) -> None:
        self._A = A
        self.u, self.unit_of_b, self.beta = _normalized(b)
        if not isfinite(self.beta):
            raise ValueError(f"b must be finite, but its norm is {self.beta}")
        product = checked("A.rmatvec", A.rmatvec(self.u), b, None)
        self.v, self.unit, self.alpha = _normalized(product)
        self.finite = isfinite(self.alpha)

    def step(self, *others: Tensor, basis: Tensor | None = None) -> Sequence[float]:
        """Adds a column to `U` and to `V`.

        Args:
            others: 0-dim tensors that are read on the same occasion.
            basis: All columns of `V`, as rows, which the new one is made orthogonal to, shape
                `(k, n)`.

        Returns:
            The values of `others`.
        """
        product = checked("A.matvec", self._A.matvec(self.v), self.u, self.u.shape)
        torch.add(self._in_unit(product), self.u, alpha=-self.alpha, out=self.u)
        beta = torch.linalg.vector_norm(self.u)
        self.u.div_(torch.where(beta > 0, beta, 1.0))
        product = checked("A.rmatvec", self._A.rmatvec(self.u), self.v, self.v.shape)
        torch.addcmul(self._in_unit(product), self.v, beta, value=-1, out=self.v)
        if basis is not None:
            for _ in range(2):  # twice is enough for rounding
                self.v.sub_((basis.T @ (basis @ self.v.flatten())).view_as(self.v))
        alpha = torch.linalg.vector_norm(self.v)
        self.v.div_(torch.where(alpha > 0, alpha, 1.0))
        self.beta, self.alpha, *found = WHOLE.to_host(whole=(beta, alpha, *others))
        self.finite = isfinite(self.beta) and isfinite(self.alpha)
        return found

    def _in_unit(self, product: Tensor) -> Tensor:
        return product if self.unit == 1.0 else product / self.unit


def _normalized(v: Tensor) -> tuple[Tensor, float, float]:
    """The vector over its norm (a vector of zeros as it is), a unit, and the norm in this unit."""
    largest, norm = WHOLE.to_host(largest=[v], norms=[torch.linalg.vector_norm(v)])
    unit = unit_of(largest, v.dtype)
    if unit != 1.0:
        v = v / unit
        (norm,) = WHOLE.to_host(norms=[torch.linalg.vector_norm(v)])
    return v / (norm or 1.0), unit, norm


def true_norms(*vectors: Tensor) -> list[float]:
    """Euclidean norms, also where squares leave the range of the dtype."""
    norms = [torch.linalg.vector_norm(v) for v in vectors]
    found = WHOLE.to_host(largest=vectors, norms=norms)
    half = len(vectors)
    return [
        WHOLE.true_norm(v, largest, norm)
        for v, largest, norm in zip(vectors, found[:half], found[half:], strict=True)
    ]


def checked(name: str, product: Tensor, like: Tensor, shape: torch.Size | None) -> Tensor:
    """A product, detached; raises if it has another shape, dtype or device than it should."""
    if not isinstance(product, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(product).__name__}")
    if shape is not None and product.shape != shape:
        raise ValueError(
            f"{name} must return shape {tuple(shape)} here, got {tuple(product.shape)}"
        )
    if product.dtype != like.dtype or product.device != like.device:
        raise ValueError(
            f"{name} must return {like.dtype} on {like.device}, as b is, got {product.dtype} on "
            f"{product.device}"
        )
    return product.detach()


def check_right_hand_side(A: OperatorLike, b: Tensor, x0: Tensor | None = None) -> None:
    """Raises unless `b` and a start fit a matrix, as far as can be seen."""
    for name, vector in (("b", b), ("x0", x0)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
        if vector.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {vector.dtype}")
    if x0 is not None and (x0.dtype != b.dtype or x0.device != b.device):
        raise ValueError(
            f"x0 must be {b.dtype} on {b.device}, as b is, got {x0.dtype} on {x0.device}"
        )
    if isinstance(A, Tensor) and A.dim() == 2:
        if A.dtype != b.dtype or A.device != b.device:
            raise ValueError(
                f"A and b must have one dtype and device, got {A.dtype} on {A.device} and "
                f"{b.dtype} on {b.device}"
            )
        for name, vector, size in (("b", b, A.shape[0]), ("x0", x0, A.shape[1])):
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}")


def rotation(a: float, b: float) -> tuple[float, float, float]:
    """The cosine and the sine that turn `(a, b)` to `(r, 0)`, and `r`."""
    r = hypot(a, b)
    return (a / r, b / r, r) if r else (1.0, 0.0, 0.0)
