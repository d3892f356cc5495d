"""The squared Frobenius norm of the Jacobian, exact or by random projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._foundation.private_torch import plainly
from torch_secondorder._foundation.subclasses import like, plain
from torch_secondorder.penalties._checks import (
    check_fits_exactly,
    check_outputs,
    check_samples,
    check_separate,
)
from torch_secondorder.penalties._squares import squared_sum

__all__ = ["jacobian_penalty"]


def jacobian_penalty(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    method: Literal["exact", "projection"] = "exact",
    n_projections: int = 1,
    generator: torch.Generator | None = None,
    *,
    outputs: Tensor | None = None,
) -> Tensor:
    """Squared Frobenius norm of the Jacobian of `f` for each sample; the mean over the batch.

    With `C` outputs for a sample, `|J|^2 = C E|J'v|^2` for `v` uniform on the unit sphere of
    `R^C`. `"projection"` draws such vectors for each sample and takes the mean, which is unbiased
    and needs one backward pass of `n_projections` times the batch (Hoffman, Roberts and Yaida 2019,
    "Robust learning with Jacobian regularization"; their loss has half of this value). `"exact"`
    computes the whole Jacobian, by rows or by columns, whichever are fewer. Both take one batched
    pass, and you can differentiate the result any number of times, by parameters and by `x`. Inside
    transforms of `torch.func`, `x` has to be the variable of the transform.

    Args:
        f: Maps a batch to a batch, each sample independently. Its operations need two derivatives,
            and a third for `"exact"` if a sample has many more outputs than inputs.
        x: Shape `(n, ...)`, real and floating-point.
        method: `"exact"` or `"projection"`.
        n_projections: Vectors for each sample.
        generator: Source of these vectors, on the device of the outputs.
        outputs: The output `f(x)`, if the loss has it already and `x` required a gradient. This
            saves another call of `f`, about a third of the cost of one projection. Attention in `f`
            must have used its math backend (`torch.nn.attention.sdpa_kernel`), as in calls from
            this function.

    Returns:
        A 0-dim tensor with a graph, unless gradients are disabled.

    Raises:
        TypeError: `x` or `f(x)` is not a real floating-point tensor.
        ValueError: `f` is a module with BatchNorm that uses the statistics of the batch; `f(x)`
            does not have one output for each sample, or does not depend on `x`; the exact Jacobian
            does not fit into memory; or an argument is out of range.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> jacobian_penalty(lambda x: x**2, x)  # the mean of 4 + 16 and 36 + 64
    tensor(60., grad_fn=<...>)
    """
    check_choice("method", method, ("exact", "projection"))
    check_integer("n_projections", n_projections)
    check_samples(plain(x))
    check_separate(f)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias, so that derivatives are by the argument alone, even if `f` holds `x` itself.
        point = x if outputs is not None else differentiated(plain(x))
        y = with_second_derivatives(f)(like(point, x)) if outputs is None else outputs
        y, n = plain(y), len(plain(x))
        check_outputs(y, n, "f(x)" if outputs is None else "outputs")
        if method == "exact":
            value = squared_sum(exact_rows(y, point)) / n
        else:
            rows, scale = projected_rows(y, point, n_projections, generator)
            value = squared_sum(rows) * scale / n
    return value if differentiable else value.detach()


def differentiated(x: Tensor) -> Tensor:
    """A tensor with the values of `x` to differentiate by, with `x` in its graph if it has one."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def exact_rows(y: Tensor, x: Tensor) -> Tensor:
    """The Jacobian of each sample in one batched pass, along the smaller of its dimensions.

    Args:
        y: Shape `(n, ...)`, computed from `x` with a graph.
        x: Shape `(n, ...)`.

    Returns:
        Shape `(C, n, ...)` with the shape of `x` at the end, or `(d, n, ...)` with that of `y`.

    Raises:
        ValueError: The Jacobian is too large, or `y` does not depend on `x`.
    """
    sample = plain(x)[0]
    count, d = y[0].numel(), sample.numel()
    check_fits_exactly((len(y), count, d), y)
    if count <= 2 * d:
        return pulled(y, x, _units(y))
    # By columns: the product `J'u` is linear in `u`, and its derivative by `u` along `t` is `J t`.
    u = torch.zeros_like(y).requires_grad_()
    return pulled(pulled(y, x, u.unsqueeze(0))[0], u, _units(plain(x)))


def projected_rows(
    y: Tensor,
    x: Tensor,
    n_projections: int,
    generator: torch.Generator | None,
    copies: int = 1,
) -> tuple[Tensor, float]:
    """Products `J'v` with `v` uniform on unit spheres, for `E|J|^2 = scale * sum |J'v|^2`.

    Args:
        y: Shape `(n, ...)`, computed from `x` with a graph.
        x: Shape `(n, ...)`.
        n_projections: Vectors for each sample.
        generator: Source of these vectors.
        copies: Number of batches that are concatenated in `y`; they get the same vectors.

    Returns:
        Shape `(n_projections, n, ...)`, and the scale.
    """
    count = y[0].numel()
    shape = n_projections, len(y) // copies, count
    v = torch.randn(shape, dtype=y.dtype, device=y.device, generator=generator)
    v.div_(torch.linalg.vector_norm(v, dim=2, keepdim=True))
    v = v.repeat(1, copies, 1).view(n_projections, *y.shape)
    return pulled(y, x, v), count / n_projections


def pulled(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Products `J'v` for several `v`, in one pass.

    Args:
        y: Computed from `x` with a graph.
        x: The variable to differentiate by.
        v: Shape `(p, *y.shape)`.

    Returns:
        Shape `(p, *x.shape)`, differentiable.

    Raises:
        ValueError: `y` does not depend on `x`.
    """
    found: tuple[Tensor | None, ...] = (None,)
    with plainly():
        linked = y.requires_grad and x.requires_grad
        if linked and len(v) == 1:
            # Without batching rules, which some functions lack.
            found = torch.autograd.grad(y, x, v[0], create_graph=True, allow_unused=True)
            found = tuple(None if g is None else g.unsqueeze(0) for g in found)
        elif linked:
            found = torch.autograd.grad(
                y, x, v, create_graph=True, allow_unused=True, is_grads_batched=True
            )
    if found[0] is None:
        raise ValueError(
            "f(x) does not depend on x through differentiable operations: detach(), no_grad() or "
            "an operation without a derivative may be between them, or x did not require a "
            "gradient when the given outputs were computed"
        )
    return found[0]


def _units(like: Tensor) -> Tensor:
    """All unit vectors of a sample, the same for each: shape `(size, n, ...)`, without copies."""
    n, shape = like.shape[0], like.shape[1:]
    size = shape.numel()
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.view(size, 1, *shape).expand(size, n, *shape)
