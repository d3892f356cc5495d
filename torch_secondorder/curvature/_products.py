"""Several products with one graph: in one vectorized pass where that is faster, else in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._params.vector import ParameterVector

__all__ = ["AT_ONCE", "several_products", "vectorizing_pays"]

# Vectors multiplied in one vectorized pass, which needs memory for as many sets of activations. On
# a CPU eight take 0.4 times the time of one by one where operations are small and many, and 1.7
# times where they are large: beyond so many parameters they are done one by one.
AT_ONCE = 8
_LARGE = 100_000


def vectorizing_pays(size: int, device: torch.device) -> bool:
    """True if one pass for several vectors pays, for `size` parameters."""
    return not (device.type == "cpu" and size > _LARGE)


def several_products(
    graph: Graph,
    tangents: Sequence[Sequence[Tensor]],
    vector: ParameterVector,
    retain: bool,
) -> list[Sequence[Tensor | None]]:
    """The Hessian of the loss times several directions.

    Args:
        graph: The graph of an evaluation.
        tangents: The directions, in parts shaped like the parameters.
        vector: The parameters' vector.
        retain: Whether the graph is needed again.
    """
    if len(tangents) > 1 and vectorizing_pays(vector.size, vector.device):
        products: list[Sequence[Tensor | None]] = []
        try:
            for start in range(0, len(tangents), AT_ONCE):
                some = tangents[start : start + AT_ONCE]
                stacked = [torch.stack(parts) for parts in zip(*some, strict=True)]
                batch = graph.hessian_product(stacked, batched=True)
                products += [[None if b is None else b[i] for b in batch] for i in range(len(some))]
        except (RuntimeError, NotImplementedError):  # an operation without a batching rule
            pass
        else:
            return products
    last = len(tangents) - 1
    return [
        graph.hessian_product(parts, retain=retain or i < last) for i, parts in enumerate(tangents)
    ]
