"""Several products with one graph: in one vectorized pass where that works, else in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, Overwritten
from torch_secondorder._foundation.memory import free_memory

Parts: TypeAlias = Sequence[Tensor | None]
#: Gives the product with a direction, or with True those with the slices of the first dimension.
_Multiply: TypeAlias = Callable[[Any, bool], Parts]

# Vectors multiplied in one vectorized pass, which needs memory for as many sets of activations. On
# a CPU eight take 0.4 times the time of one by one where operations are small and many, and 1.7
# times where they are large: beyond so many parameters they are done one by one.
AT_ONCE = 8
_LARGE = 100_000
# The same of elements of intermediate results: from here on eight do not fit into caches, and took
# twice the time of one by one with a network of width 64 and 512 samples.
_SPILLING = 2**17
# Sets of intermediate results that a product with one vector takes, at most, in its passes.
_SETS = 3
# Elements of intermediate results that a vectorized pass may have where many products are wanted:
# on a CPU what caches hold, on a device what keeps it busy. Most vectors in one such pass.
_CACHED, _BUSY, _MOST = 2**19, 2**25, 64


def many_at_once(graph: Graph, device: torch.device) -> int:
    """The number of vectors to multiply in one pass where there are as many as parameters.

    It follows from the sizes of the graph and not from times, so that results can be repeated.
    """
    size = graph.size()
    if not size:
        return AT_ONCE
    return max(1, min((_CACHED if device.type == "cpu" else _BUSY) // size, _MOST))


def products_at_once(graph: Graph, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of vectors to multiply in one pass where there are a few; one for one by one.

    On a CPU it depends on sizes alone. On a device it is a number that keeps the device busy, less
    if that would take over half of the memory that is free.

    Args:
        graph: The graph of an evaluation.
        size: The number of parameters.
        dtype: Of the vectors.
        device: Of the vectors.
    """
    if device.type == "cpu":
        small = vectorizing_pays(size, device) and graph.size() <= _SPILLING
        return AT_ONCE if small else 1
    bytes_for_each = _SETS * dtype.itemsize * (graph.size() + size)
    return max(1, int(min(many_at_once(graph, device), free_memory(device) / 2 / bytes_for_each)))


def vectorizing_pays(size: int, device: torch.device) -> bool:
    """True where several products take less time in one pass, for `size` parameters."""
    return not (device.type == "cpu" and size > _LARGE)


def several(multiply: _Multiply, directions: Parts) -> Parts:
    """Products with several directions, stacked along the first dimension as these are."""
    found = at_once(multiply, directions)
    return in_turn(multiply, directions) if found is None else found


def at_once(multiply: _Multiply, directions: Parts) -> Parts | None:
    """The same in one pass; None where an operation has no batching rule."""
    try:
        return multiply(directions, True)
    except Overwritten:
        raise
    except (RuntimeError, NotImplementedError):
        return None


def in_turn(multiply: _Multiply, directions: Parts) -> Parts:
    """The same, one by one."""
    count = next(len(d) for d in directions if d is not None)
    each = [[None if d is None else d[i] for d in directions] for i in range(count)]
    columns = zip(*(multiply(direction, False) for direction in each), strict=True)
    return [None if any(p is None for p in c) else torch.stack(c) for c in columns]


def hessian_products(
    graph: Graph, tangents: Sequence[Sequence[Tensor]], vectorizes: bool, retain: bool
) -> list[Parts]:
    """The Hessian of the loss times several directions.

    Args:
        graph: The graph of an evaluation.
        tangents: The directions, in parts shaped like the parameters.
        vectorizes: Whether to multiply several in one pass.
        retain: Whether the graph is needed again.
    """
    if len(tangents) > 1 and vectorizes:
        products: list[Parts] = []
        for start in range(0, len(tangents), AT_ONCE):
            some = tangents[start : start + AT_ONCE]
            stacked = [torch.stack(parts) for parts in zip(*some, strict=True)]
            batch = at_once(graph.hessian_product, stacked)
            if batch is None:
                break
            products += [[None if b is None else b[i] for b in batch] for i in range(len(some))]
        else:
            return products
    last = len(tangents) - 1
    return [
        graph.hessian_product(parts, retain=retain or i < last) for i, parts in enumerate(tangents)
    ]
