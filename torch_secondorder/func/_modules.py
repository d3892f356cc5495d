"""Jacobians of modules, by their inputs or their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder.func._batches import batch_jacobian, check_batch, differs
from torch_secondorder.func._limits import spans
from torch_secondorder.func._recorded import composing
from torch_secondorder.func._trees import basis, numels
from torch_secondorder.func.jacobians import check_matrix, jacobian
from torch_secondorder.func.transforms import pullback, vectorized

__all__ = ["module_jacobian"]

Wrt = Literal["inputs", "parameters"]
Parameters = dict[str, Tensor]


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
    params: Parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "no parameter of the module requires gradients: call requires_grad_() on those that "
            "the Jacobian is wanted for, or take wrt='inputs'"
        )

    @with_second_derivatives
    def call(params: Parameters, x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(model, {**buffers, **params}, (x,)))

    rows = _by_rows(call, params, x, chunk_size)
    return jacobian(lambda p: call(p, x), params, "reverse", chunk_size) if rows is None else rows


def _by_rows(
    call: Callable[[Parameters, Tensor], Tensor],
    params: Parameters,
    x: Tensor,
    chunk_size: int | None,
) -> Parameters | None:
    """The Jacobian row by row of the batch; None where that is not the Jacobian of the batch."""
    if composing([x]) or x.numel() == 0:
        return None

    def of_row(params: Parameters, row: Tensor) -> Tensor:
        return call(params, row.unsqueeze(0)).squeeze(0)

    with torch.no_grad():
        y = call(params, x)
        check_batch("f(x)", y, len(x))
        try:
            alone = vmap(of_row, in_dims=(None, 0))(params, x)
        except (RuntimeError, ValueError):  # random numbers, batch norm, no batching rule
            return None
        if y.numel() == 0 or alone.shape != y.shape or differs(alone, y):
            return None
    inputs, outputs = sum(numels(list(params.values()))), y[:1].numel()
    check_matrix(y.numel(), inputs, outputs, list(params.values()), chunk_size)

    def rows(row: Tensor, units: Tensor) -> Parameters:
        _, pull = pullback(lambda params: of_row(params, row), params)
        return cast(Parameters, vectorized(lambda unit: pull(unit)[0], units))

    made = [
        vmap(rows, in_dims=(0, None))(x, basis([y[0]], *span)[0])
        for span in spans(outputs, chunk_size)
    ]
    whole = {name: torch.cat([part[name] for part in made], dim=1) for name in params}
    return {name: g.reshape(*y.shape, *params[name].shape) for name, g in whole.items()}
