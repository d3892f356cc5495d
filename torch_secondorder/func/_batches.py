"""Jacobians of functions that treat the rows of a batch independently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder.func._limits import Mode, spans
from torch_secondorder.func._recorded import composing
from torch_secondorder.func._trees import flatten
from torch_secondorder.func.jacobians import check_matrix, forward_pays, reverse
from torch_secondorder.func.transforms import push

__all__ = ["batch_jacobian", "check_batch", "differs"]


def batch_jacobian(
    f: Callable[[Tensor], Tensor], x: Tensor, mode: Mode = "auto", chunk_size: int | None = None
) -> Tensor:
    """The Jacobian of each row of a batch by its own input, for independent rows.

    All rows share one backward pass for each entry of an output's row, and these run together; in
    forward mode likewise for each entry of an input's row. Only where row `i` of `f(x)` depends on
    row `i` of `x` alone are these the Jacobians: the first row is also evaluated by itself, and
    compared. Inside transformations of `torch.func` and `torch.compile`, where values cannot be
    looked at, it is not.

    Args:
        f: A function from shape `(B, ...)` to `(B, ...)`.
        x: The batch.
        mode: `"forward"`, `"reverse"` or `"auto"`.
        chunk_size: How many entries of a row are done at once; all by default.

    Returns:
        Shape `(B, *f(x).shape[1:], *x.shape[1:])`, in the dtype of `x`. See `jacobian` on what can
        be differentiated again.

    Raises:
        TypeError: `x` or `f(x)` is no tensor of real numbers.
        ValueError: `mode` is unknown, `chunk_size` below one, `x` has no batch or `f(x)` another.
        RuntimeError: Rows depend on each other, as with batch norm in train mode, or are random,
            as with dropout: there is no Jacobian of a single row then.
        MemoryError: The Jacobian has over 2**31 elements, or takes more memory than is free.

    >>> batch_jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[[2., 0.],
             [0., 4.]],
    <BLANKLINE>
            [[6., 0.],
             [0., 8.]]])
    """
    check_choice("mode", mode, Mode)
    check_integer("chunk_size", chunk_size, optional=True)
    check_batch("x", x, None)
    f = with_second_derivatives(f)

    def checked(x: Tensor) -> tuple[Tensor]:
        y = f(x)
        check_batch("f(x)", y, len(x))
        return (y,)

    if mode == "forward":
        with torch.no_grad():
            (y,) = checked(x)
    else:
        pull, (y,) = reverse(checked, [x])
    _check_rows(f, x, y)
    inputs, outputs = x[:1].numel(), y[:1].numel()
    if x.numel() == 0 or y.numel() == 0:
        return x.new_zeros(*y.shape, *x.shape[1:])
    if mode == "forward":
        return _columns(checked, x, y, chunk_size)
    if mode == "auto" and forward_pays(inputs, outputs, len(x)):
        try:
            return _columns(checked, x, y, chunk_size)
        except (RuntimeError, NotImplementedError):  # an operation without forward mode
            pass
    check_matrix(y.numel(), inputs, outputs, [x], chunk_size)
    made = [pull([_units(y, *span)])[0] for span in spans(outputs, chunk_size)]
    rows = made[0] if len(made) == 1 else torch.cat(made)
    return rows.transpose(0, 1).reshape(*y.shape, *x.shape[1:])


def differs(one: Tensor, other: Tensor) -> bool:
    """True if two evaluations of the same rows differ by more than rounding."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    gap, size = torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(other)
    if float(gap) <= tolerance * float(size):
        return False
    finite = other.isfinite()
    rounding = tolerance * float(torch.linalg.vector_norm(other[finite]))
    return not torch.allclose(one, other, rtol=0.0, atol=rounding, equal_nan=True)


def _units(like: Tensor, start: int, stop: int) -> Tensor:
    """Unit vectors of a row's space, for all rows of a batch: `(stop - start, *like.shape)`."""
    count, batch = stop - start, len(like)
    units = torch.zeros(count, like[:1].numel(), dtype=like.dtype, device=like.device)
    units.diagonal(start).fill_(1.0)
    return units.view(count, 1, *like.shape[1:]).expand(count, batch, *like.shape[1:])


def _columns(
    f: Callable[[Tensor], tuple[Tensor]], x: Tensor, y: Tensor, chunk_size: int | None
) -> Tensor:
    inputs = x[:1].numel()
    check_matrix(y.numel(), inputs, inputs, [x], chunk_size)
    made = [push(f, [x], [_units(x, *span)])[0] for span in spans(inputs, chunk_size)]
    columns = made[0] if len(made) == 1 else torch.cat(made)
    return columns.to(x.dtype).movedim(0, -1).reshape(*y.shape, *x.shape[1:])


def check_batch(name: str, value: Any, rows: int | None) -> None:
    """Raises TypeError or ValueError unless a value is a batch, with as many rows if given."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is {type(value).__name__}: batch_jacobian is for functions from one tensor "
            "to one; `jacobian` takes trees"
        )
    flatten(value, name)
    if value.dim() == 0 or (rows is not None and len(value) != rows):
        wanted = "(B, ...)" if rows is None else f"({rows}, ...), a row for each of x"
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but batch_jacobian needs {wanted}; for one "
            "input without a batch take `jacobian`"
        )


def _check_rows(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Raises where the first row alone does not give what it gives within the batch."""
    if len(x) < 2 or composing([x]) or y.numel() == 0:
        return
    problem: Sequence[Exception | None] = [None]
    with torch.no_grad():
        try:
            alone = f(x[:1].detach())
            mixed = alone.shape != y[:1].shape or differs(alone, y[:1].detach())
        except ValueError as error:  # batch norm refuses a single row
            mixed, problem = True, [error]
    if mixed:
        raise RuntimeError(
            "row 0 of f(x) is not what f gives for row 0 of x alone: the rows of the batch depend "
            "on each other (batch norm in train mode, statistics over the batch) or are random "
            "(dropout in train mode), and per-sample Jacobians are undefined then; put the module "
            "into eval mode, or take `jacobian` of the whole batch"
        ) from problem[0]
