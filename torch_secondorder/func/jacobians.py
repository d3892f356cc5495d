"""Whole Jacobians, by whichever mode is faster for their shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder.func._limits import Mode, spans
from torch_secondorder.func._recorded import Recorded, composing
from torch_secondorder.func._trees import basis, flatten, flattened, numels, unflatten
from torch_secondorder.func.transforms import pullback, push, vectorized

__all__ = ["Pull", "check_matrix", "forward_pays", "jacobian", "reverse"]

Pull = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_INSTEAD = (
    "multiply with it instead (`jvp` for its columns, `vjp` for its rows), or take the Jacobian of "
    "a projection or of a part of the output"
)
_CHUNK = "pass a smaller chunk_size, the number of rows or columns made at once"


def forward_pays(inputs: int, outputs: int, batch: int = 1) -> bool:
    """True if the columns of a Jacobian are cheaper than its rows."""
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
        dtype of `x`. For trees one like `f(x)`, with one like `x` in the place of each leaf. What
        depends on `x` by no operation that has derivatives has the Jacobian zero.

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
        if mode == "auto" and forward_pays(sum(numels(leaves)), sum(numels(outputs))):
            try:
                rows = _columns(of_leaves, leaves, outputs, chunk_size)
            except (RuntimeError, NotImplementedError):  # random numbers, or no forward mode
                rows = _rows(pull, outputs, leaves, chunk_size)
        else:
            rows = _rows(pull, outputs, leaves, chunk_size)
    return unflatten([unflatten(row, spec) for row in rows], specs[0])


def reverse(
    f: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor]
) -> tuple[Pull, Sequence[Tensor]]:
    """A function that pulls many cotangents back at once, and the outputs."""
    if not composing(leaves):
        recorded = Recorded(f, leaves)
        return recorded.pull, recorded.outputs
    outputs, pull = pullback(f, *leaves)
    return lambda cotangents: vectorized(pull, tuple(cotangents)), outputs


def check_matrix(
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
    pull: Pull, outputs: Sequence[Tensor], leaves: Sequence[Tensor], chunk_size: int | None
) -> list[list[Tensor]]:
    """For each output the derivatives by each input, in reverse mode."""
    sizes, inputs = numels(outputs), sum(numels(leaves))
    count = sum(sizes)
    check_matrix(count, inputs, count, leaves, chunk_size)
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
    check_matrix(count, inputs, inputs, leaves, chunk_size)
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
