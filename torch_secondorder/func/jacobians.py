"""Whole Jacobians: of functions, of batches row by row, and of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder.func._recorded import Recorded, composing
from torch_secondorder.func._trees import basis, flatten, flattened, numels, spans, unflatten
from torch_secondorder.func.transforms import pullback, push, vectorized

__all__ = ["Mode", "Wrt", "batch_jacobian", "jacobian", "module_jacobian", "reverse"]

#: The ways of making a Jacobian: by columns, by rows, or whichever is faster.
Mode: TypeAlias = Literal["auto", "forward", "reverse"]
#: The variables of a module's Jacobian.
Wrt: TypeAlias = Literal["inputs", "parameters"]

_Pull: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_Parameters: TypeAlias = dict[str, Tensor]

_INSTEAD = (
    "multiply with it instead (`jvp` for its columns, `vjp` for its rows), or take the Jacobian of "
    "a projection or of a part of the output"
)
_CHUNK = "pass a smaller chunk_size, the number of rows or columns made at once"


def _forward_pays(inputs: int, outputs: int, batch: int = 1) -> bool:
    """True where the columns of a Jacobian are cheaper than its rows."""
    # A column takes 1 to 1.4 times as long as a row, and vmap with dual numbers 0.8 ms more before
    # the first. Three tanh layers of width w on w / 4 numbers, forward / reverse in ms: one input,
    # w = 64: 1.2 / 0.3, w = 256: 2.0 / 1.6; batch of 64, w = 64: 2.2 / 2.3, w = 256: 25 / 79.
    return batch * (outputs - 2 * inputs) >= 1024


def jacobian(
    f: Callable[[Any], Any], x: Any, mode: Mode = "auto", chunk_size: int | None = None
) -> Any:
    """The Jacobian of a function at one input.

    In reverse mode `f` is called once, and all rows are pulled back through its graph together; in
    forward mode all columns are pushed through it together. `"auto"` compares the shapes. Works
    inside `torch.func.vmap`, `grad` and `torch.compile`. The result can be differentiated where
    `x`, or what `f` closes over, requires gradients; under `torch.no_grad()` nothing is recorded
    for that, which is faster.

    Random numbers inside `f` are drawn once in reverse mode, and the Jacobian is that of this draw;
    forward mode refuses them. For a batch whose rows are independent see `batch_jacobian`.

    Args:
        f: A function of a tree of tensors that returns a tree of tensors.
        x: Where the Jacobian is taken.
        mode: `"forward"`, `"reverse"` or `"auto"`.
        chunk_size: How many columns (forward) or rows (reverse) are made at once; all by default.

    Returns:
        For a tensor `x` and a tensor `f(x)` one tensor of shape `(*f(x).shape, *x.shape)`, in the
        dtype of `x`. For trees one like `f(x)`, with one like `x` in the place of each leaf.
        Outputs that depend on `x` through no differentiable operation have the Jacobian zero.

    Raises:
        TypeError: A leaf of `x` or `f(x)` is no tensor of real numbers.
        ValueError: `mode` is unknown, or `chunk_size` below one.
        MemoryError: The Jacobian has over 2**31 elements, or takes more memory than is free.
        RuntimeError: `f` draws random numbers in forward mode.
        NotImplementedError: An operation in `f` has no rule for `mode="forward"`.

    >>> jacobian(lambda x: torch.stack([x[0] * x[1], x[1]]), torch.tensor([2.0, 3.0]))
    tensor([[3., 2.],
            [0., 1.]])
    >>> jacobian(lambda p: p["w"] ** 2, {"w": torch.ones(1), "b": torch.ones(2)})
    {'w': tensor([[2.]]), 'b': tensor([[0., 0.]])}
    """
    check_choice("mode", mode, Mode)
    check_integer("chunk_size", chunk_size, optional=True)
    leaves, spec = flatten(x, "x")
    of_leaves, specs = flattened(f, spec)
    if mode == "forward":
        with torch.no_grad():
            outputs: Sequence[Tensor] = of_leaves(*leaves)
        rows = _columns(of_leaves, leaves, outputs, chunk_size)
    else:
        pull, outputs = reverse(of_leaves, leaves)
        if mode == "auto" and _forward_pays(sum(numels(leaves)), sum(numels(outputs))):
            try:
                rows = _columns(of_leaves, leaves, outputs, chunk_size)
            except (RuntimeError, NotImplementedError):  # random numbers, or no forward mode
                rows = _rows(pull, outputs, leaves, chunk_size)
        else:
            rows = _rows(pull, outputs, leaves, chunk_size)
    return unflatten([unflatten(row, spec) for row in rows], specs[0])


def reverse(
    f: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor]
) -> tuple[_Pull, Sequence[Tensor]]:
    """A function that pulls many cotangents back at once, and the outputs."""
    if not composing(leaves):
        recorded = Recorded(f, leaves)
        return recorded.pull, recorded.outputs
    outputs, pull = pullback(f, *leaves)
    return lambda cotangents: vectorized(pull, tuple(cotangents)), outputs


def _check_matrix(
    rows: int, columns: int, at_once: int, leaves: Sequence[Tensor], chunk_size: int | None
) -> None:
    """Raises MemoryError where the Jacobian, or the unit vectors it is made with, are too large."""
    if torch.compiler.is_compiling() or not leaves:
        return
    dtype, device = leaves[0].dtype, leaves[0].device
    check_fits("the Jacobian", (rows, columns), dtype, device, _INSTEAD)
    width = at_once if chunk_size is None else min(chunk_size, at_once)
    check_fits("the matrix of unit vectors", (width, at_once), dtype, device, _CHUNK)


def _rows(
    pull: _Pull, outputs: Sequence[Tensor], leaves: Sequence[Tensor], chunk_size: int | None
) -> list[list[Tensor]]:
    """For each output the derivatives by each input, in reverse mode."""
    sizes, inputs = numels(outputs), sum(numels(leaves))
    count = sum(sizes)
    _check_matrix(count, inputs, count, leaves, chunk_size)
    if count == 0 or inputs == 0:
        return [[x.new_zeros((*y.shape, *x.shape)) for x in leaves] for y in outputs]
    made = [pull(basis(outputs, *span)) for span in spans(count, chunk_size)]
    whole = made[0] if len(made) == 1 else [torch.cat(parts) for parts in zip(*made, strict=True)]
    blocks = [[g] if len(sizes) == 1 else g.split(sizes) for g in whole]
    return [
        [block[i].reshape((*y.shape, *x.shape)) for block, x in zip(blocks, leaves, strict=True)]
        for i, y in enumerate(outputs)
    ]


def _columns(
    f: Callable[..., tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    outputs: Sequence[Tensor],
    chunk_size: int | None,
) -> list[list[Tensor]]:
    """The same, in forward mode."""
    sizes, count = numels(leaves), sum(numels(outputs))
    inputs = sum(sizes)
    _check_matrix(count, inputs, inputs, leaves, chunk_size)
    if count == 0 or inputs == 0:
        return [[x.new_zeros((*y.shape, *x.shape)) for x in leaves] for y in outputs]
    made = [push(f, leaves, basis(leaves, *span)) for span in spans(inputs, chunk_size)]
    whole = made[0] if len(made) == 1 else [torch.cat(parts) for parts in zip(*made, strict=True)]
    return [
        [
            part.to(x.dtype).movedim(0, -1).reshape((*y.shape, *x.shape))
            for part, x in zip(columns.split(sizes), leaves, strict=True)
        ]
        for y, columns in zip(outputs, whole, strict=True)
    ]


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
        A tensor of shape `(B, *out, *in)` in the dtype of `x`, with `f(x)` of shape `(B, *out)` and
        `x` of shape `(B, *in)`. See `jacobian` on what can be differentiated again.

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
    _check_batch("x", x, None)
    f = with_second_derivatives(f)

    def checked(x: Tensor) -> tuple[Tensor]:
        y = f(x)
        _check_batch("f(x)", y, len(x))
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
        return _columns_of_rows(checked, x, y, chunk_size)
    if mode == "auto" and _forward_pays(inputs, outputs, len(x)):
        try:
            return _columns_of_rows(checked, x, y, chunk_size)
        except (RuntimeError, NotImplementedError):  # an operation without forward mode
            pass
    _check_matrix(y.numel(), inputs, outputs, [x], chunk_size)
    made = [pull([_units_of_rows(y, *span)])[0] for span in spans(outputs, chunk_size)]
    rows = made[0] if len(made) == 1 else torch.cat(made)
    return rows.transpose(0, 1).reshape(*y.shape, *x.shape[1:])


def _differs(one: Tensor, other: Tensor) -> bool:
    """True where two evaluations of the same rows differ by more than rounding."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    gap, size = torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(other)
    gap_there, size_there = read_numbers(gap, size)
    if gap_there <= tolerance * size_there:
        return False
    finite = other.isfinite()
    rounding = tolerance * float(torch.linalg.vector_norm(other[finite]))
    return not torch.allclose(one, other, rtol=0.0, atol=rounding, equal_nan=True)


def _units_of_rows(like: Tensor, start: int, stop: int) -> Tensor:
    """Unit vectors of a row's space, for all rows of a batch: `(stop - start, *like.shape)`."""
    count, batch = stop - start, len(like)
    units = torch.zeros(count, like[:1].numel(), dtype=like.dtype, device=like.device)
    units.diagonal(start).fill_(1.0)
    return units.view(count, 1, *like.shape[1:]).expand(count, batch, *like.shape[1:])


def _columns_of_rows(
    f: Callable[[Tensor], tuple[Tensor]], x: Tensor, y: Tensor, chunk_size: int | None
) -> Tensor:
    inputs = x[:1].numel()
    _check_matrix(y.numel(), inputs, inputs, [x], chunk_size)
    made = [push(f, [x], [_units_of_rows(x, *span)])[0] for span in spans(inputs, chunk_size)]
    columns = made[0] if len(made) == 1 else torch.cat(made)
    return columns.to(x.dtype).movedim(0, -1).reshape(*y.shape, *x.shape[1:])


def _check_batch(name: str, value: Any, rows: int | None) -> None:
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
            mixed = alone.shape != y[:1].shape or _differs(alone, y[:1].detach())
        except ValueError as error:  # batch norm refuses a single row
            mixed, problem = True, [error]
    if mixed:
        raise RuntimeError(
            "row 0 of f(x) is not what f gives for row 0 of x alone: the rows of the batch depend "
            "on each other (batch norm in train mode, statistics over the batch) or are random "
            "(dropout in train mode), and per-sample Jacobians are undefined then; put the module "
            "into eval mode, or take `jacobian` of the whole batch"
        ) from problem[0]


def module_jacobian(
    model: nn.Module, x: Tensor, wrt: Wrt = "inputs", *, chunk_size: int | None = None
) -> Any:
    """The Jacobian of a module's output on a batch, by the batch or by the parameters.

    By inputs it is `batch_jacobian(model, x)`. By parameters each row of the batch is
    differentiated by itself where that gives what the module gives for the batch; where it does
    not (batch norm in train mode, dropout), the output of the whole batch is, which costs `B` times
    as much and is the Jacobian of the batch statistics and of the random numbers as drawn. Buffers
    of the module stay as they are.

    Args:
        model: Maps a tensor `(B, ...)` to a tensor `(B, ...)`.
        x: The batch.
        wrt: `"inputs"` or `"parameters"`.
        chunk_size: How many entries of an output's row are done at once; all by default.

    Returns:
        By inputs a tensor `(B, *out, *in)`; by parameters a dict with a tensor
        `(B, *out, *parameter)` for the name of each parameter that requires gradients.

    Raises:
        ValueError: `wrt` is unknown, `chunk_size` below one, or no parameter requires gradients.
        TypeError, RuntimeError, MemoryError: See `batch_jacobian`.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> module_jacobian(model, torch.tensor([[3.0, 4.0]]), "parameters")["weight"].detach()
    tensor([[[[3., 4.]]]])
    """
    check_choice("wrt", wrt, Wrt)
    check_integer("chunk_size", chunk_size, optional=True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    if wrt == "inputs":
        return batch_jacobian(
            lambda x: functional_call(model, buffers, (x,)), x, "auto", chunk_size
        )
    params: _Parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "no parameter of the module requires gradients: call requires_grad_() on those that "
            "the Jacobian is wanted for, or take wrt='inputs'"
        )

    @with_second_derivatives
    def call(params: _Parameters, x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(model, {**buffers, **params}, (x,)))

    rows = _by_rows(call, params, x, chunk_size)
    return jacobian(lambda p: call(p, x), params, "reverse", chunk_size) if rows is None else rows


def _by_rows(
    call: Callable[[_Parameters, Tensor], Tensor],
    params: _Parameters,
    x: Tensor,
    chunk_size: int | None,
) -> _Parameters | None:
    """The Jacobian row by row of the batch; None where that is not the Jacobian of the batch."""
    if composing([x]) or x.numel() == 0:
        return None

    def of_row(params: _Parameters, row: Tensor) -> Tensor:
        return call(params, row.unsqueeze(0)).squeeze(0)

    with torch.no_grad():
        y = call(params, x)
        _check_batch("f(x)", y, len(x))
        try:
            alone = vmap(of_row, in_dims=(None, 0))(params, x)
        except (RuntimeError, ValueError):  # random numbers, batch norm, no batching rule
            return None
        if y.numel() == 0 or alone.shape != y.shape or _differs(alone, y):
            return None
    inputs, outputs = sum(numels(list(params.values()))), y[:1].numel()
    _check_matrix(y.numel(), inputs, outputs, list(params.values()), chunk_size)

    def rows(row: Tensor, units: Tensor) -> _Parameters:
        _, pull = pullback(lambda params: of_row(params, row), params)
        return cast(_Parameters, vectorized(lambda unit: pull(unit)[0], units))

    made = [
        vmap(rows, in_dims=(0, None))(x, basis([y[0]], *span)[0])
        for span in spans(outputs, chunk_size)
    ]
    whole = {name: torch.cat([part[name] for part in made], dim=1) for name in params}
    return {name: g.reshape(*y.shape, *params[name].shape) for name, g in whole.items()}
