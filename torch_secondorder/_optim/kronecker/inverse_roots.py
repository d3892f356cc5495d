"""Inverse roots of stacks of symmetric positive semidefinite matrices.

All functions take a stack `(k, n, n)` and work on it at once. Matrices are scaled to one before
anything else, so that neither squares of small gradients nor inverse roots of large ones leave the
range of float32.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

#: How the roots are computed.
RootMethodName: TypeAlias = Literal["eigh", "newton"]

#: In Newton's iteration, the smallest ridge in units of the machine precision.
_LEAST_RIDGE = 8.0
#: The first iterations of Newton multiply the smallest eigenvalue by 2.25 to 2.7 each; then a few
#: more, in which the number of digits doubles.
_GROWTH, _LAST_ITERATIONS = 2.25, 8
_LARGEST_NUMERATOR, _LARGEST_ROOT = 4, 8


def inverse_roots(
    matrices: Tensor, power: float, ridge: float = 0.0, method: RootMethodName = "eigh"
) -> Tensor:
    """The matrices `(A + ridge * |A| * I)^(-power)`, where `|A|` is the largest eigenvalue.

    Negative eigenvalues, which are rounding errors, count as zero. A matrix that is zero gives the
    identity. One with entries that are not finite, where squares of gradients were too large, gives
    zeros: nothing is to move then.

    Args:
        matrices: Symmetric and positive semidefinite, `(k, n, n)`.
        power: The inverse exponent, such as `1 / 4`.
        ridge: Added to the eigenvalues, relative to the largest one. It bounds the roots of
            singular matrices; at least the machine precision is used.
        method: `"eigh"` for an eigendecomposition; `"newton"` for the coupled Newton iteration,
            which consists of matrix products only and reads no numbers on the host. On a CPU the
            eigendecomposition is faster.

    Returns:
        The roots, `(k, n, n)`, in the precision of the matrices, at least float32.

    Raises:
        ValueError: Newton's iteration needs a power that is a fraction of small integers.

    >>> roots = inverse_roots(torch.diag_embed(torch.tensor([[16.0, 81.0], [0.0, 0.0]])), 0.25)
    >>> torch.allclose(roots[0], torch.diag(torch.tensor([1 / 2, 1 / 3])))
    True
    >>> torch.equal(roots[1], torch.eye(2))
    True
    """
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    scaled, scale, finite = _scaled(wide)
    if method == "eigh":
        values, vectors = eigendecomposed(scaled)
        roots = (vectors * inverse_powers(values, power, ridge).unsqueeze(-2)) @ vectors.mT
    else:
        roots = _newton(scaled, power, ridge)
    return roots.mul_(torch.where(finite, scale.pow(-power), 0.0)[:, None, None])


def inverse_powers(values: Tensor, power: float, ridge: float = 0.0) -> Tensor:
    """Inverse powers of the eigenvalues of positive semidefinite matrices.

    Args:
        values: Eigenvalues, `(..., n)`; negative ones count as zero.
        power: The inverse exponent.
        ridge: See `inverse_roots`.
    """
    if not values.numel():
        return values.clone()
    values = values.clamp(min=0.0)
    least = max(ridge, torch.finfo(values.dtype).eps)
    largest = values.amax(-1, keepdim=True)
    return (values + torch.where(largest > 0, least * largest, 1.0)).pow_(-power)


def eigendecomposed(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(k, n)` in rising order, and eigenvectors in the columns of `(k, n, n)`.

    Where LAPACK or cuSOLVER give up in the precision of the matrices, double precision is tried.

    Args:
        matrices: Symmetric and finite, `(k, n, n)`.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        double = torch.linalg.eigh(matrices.to("cpu", torch.float64))
        values, vectors = (part.to(matrices) for part in double)
    return values, vectors


def exact_fraction(power: float) -> Fraction | None:
    """The fraction of small integers that equals the power; None if there is none.

    >>> exact_fraction(0.25), exact_fraction(1 / 6), exact_fraction(0.3)
    (Fraction(1, 4), Fraction(1, 6), None)
    """
    fraction = Fraction(power).limit_denominator(_LARGEST_ROOT)
    if abs(fraction - Fraction(power)) > 1e-9 or not 0 < fraction.numerator <= _LARGEST_NUMERATOR:
        return None
    return fraction


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices with a largest diagonal entry of one.

    That is what bounds all entries of a positive semidefinite matrix, and the largest eigenvalue is
    at most `n` times as large.

    Returns:
        The matrices, with the identity for those that are zero or not finite; the factors `(k,)`
        that were taken out; and which matrices are finite, `(k,)`.
    """
    if not matrices.shape[-1]:
        ones = matrices.new_ones(len(matrices))
        return matrices, ones, ones > 0
    scale = matrices.diagonal(dim1=-2, dim2=-1).amax(-1)
    # Sums are not finite if a term is not; those of the scaled matrix cannot overflow.
    scaled = matrices / torch.where(scale > 0, scale, 1.0)[:, None, None]
    finite = scaled.sum((-2, -1)).isfinite() & scale.isfinite()
    usable = finite & (scale > 0)
    scaled = torch.where(usable[:, None, None], scaled, _identity(matrices))
    return scaled, torch.where(usable, scale, 1.0), finite


def _newton(matrices: Tensor, power: float, ridge: float) -> Tensor:
    """Inverse roots by the coupled Newton iteration (Higham 2008, "Functions of matrices", 7.3).

        X = c I,  M = c^p A,  then  X = X T,  M = T^p M  with  T = ((p + 1) I - M) / p

    where `M` goes to the identity and `X` to `A^(-1/p)`. The number of iterations follows from the
    ridge. Further ones do no harm: rounding errors do not grow.

    Args:
        matrices: Scaled, `(k, n, n)`.
        power: The inverse exponent, a fraction `q / p`.
        ridge: See `inverse_roots`.
    """
    fraction = exact_fraction(power)
    if fraction is None:
        raise ValueError(
            f"Newton's iteration needs an exponent that is a fraction of small integers, such as "
            f"1/4, got {power}: use the eigendecomposition"
        )
    p, size, finfo = fraction.denominator, matrices.shape[-1], torch.finfo(matrices.dtype)
    if not matrices.numel():
        return matrices.clone()
    identity = _identity(matrices)
    # An upper bound of the largest eigenvalue, at most sqrt(n) too large.
    bound = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    bound = torch.minimum(bound, matrices.abs().sum(-1).amax(-1))[:, None, None]
    least = max(ridge, _LEAST_RIDGE * finfo.eps * size**0.5)
    m = torch.addcmul(matrices, identity, least * bound).div_(bound * (1 + least))
    x = identity.expand_as(m)
    for _ in range(_iterations(least)):
        t = torch.add((1 + 1 / p) * identity, m, alpha=-1 / p)
        x = x @ t
        m = torch.linalg.matrix_power(t, p) @ m
    x = (x + x.mT) / 2
    roots = x * (bound * (1 + least)).pow(-1 / p)
    result: Tensor = torch.linalg.matrix_power(roots, fraction.numerator)
    return result


def _iterations(ridge: float) -> int:
    """The number of iterations that brings eigenvalues between `ridge` and one to one."""
    count = 0
    while ridge < 1:
        ridge *= _GROWTH
        count += 1
    return count + _LAST_ITERATIONS


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
