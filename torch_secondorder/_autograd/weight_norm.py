"""Weight normalization with the right second derivative.

PyTorch's fused operation saves the norms, and its second derivative takes them for constants. Both
`torch.nn.utils.parametrizations.weight_norm` and `torch.nn.utils.weight_norm` call it.
"""

from __future__ import annotations

from torch import Tensor

from torch_secondorder._foundation.private_torch import FUSED_WEIGHT_NORM

#: The function that `weight_norm` stands in for.
WEIGHT_NORM = FUSED_WEIGHT_NORM


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g * v / |v|` with derivatives of any order.

    Args:
        v: The direction.
        g: The length for each index of a dimension, broadcast to `v`.
        dim: Which one; -1 for one length of all.

    Returns:
        Shaped like `v`.
    """
    others = [i for i in range(v.dim()) if dim == -1 or i != dim % v.dim()]
    if not others:
        return v * (g / v.abs())
    # Of operations that have all rules: those of `vector_norm` fail inside vmap of jvp.
    squares = (v * v).sum(others, keepdim=dim != -1)
    return v * (g / squares.sqrt())
