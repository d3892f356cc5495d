"""Derivatives by the parameters of one operation, before they are summed over its rows.

The gradient by a matrix is a sum of outer products over the rows of a batch, of what was multiplied
with it and of the gradient by the result. Such pairs are kept apart here, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.convolution import geometry_of
from torch_secondorder._autograd.graph import explained
from torch_secondorder._autograd.parameter_uses import Unsupported

__all__ = ["Factors", "factors_of", "has_factors", "unfolded"]


@dataclass(frozen=True, slots=True)
class Factors:
    """The gradient by a tensor as sums of outer products over rows.

    With `x` of shape `(groups, rows, a)` and `delta` of shape `(k, groups, rows, b)`, the tensor
    consists of `groups` matrices, and of `k` gradients number `i` is
    `sum_r delta[i, :, r, :] (x) x[:, r, :]`.

    Attributes:
        x: What was multiplied; None for ones, with `a = 1`.
        delta: Gradients by the result.
        transposed: Whether the matrices are `(a, b)` in the tensor, else `(b, a)`.
    """

    x: Tensor | None
    delta: Tensor
    transposed: bool = False

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.delta.shape[2]


_Formula: TypeAlias = Callable[[Any, int, Tensor, tuple[int, ...]], Factors | None]


def has_factors(node: Any, slot: int) -> bool:
    """True if an operation is known, as far as its name tells."""
    known = _KNOWN.get(type(node).__name__)
    return known is not None and slot in known[1]


def factors_of(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors | None:
    """The gradient by one of a node's inputs; None for zeros.

    Args:
        node: An operation for which `has_factors` says yes.
        slot: Which of its inputs.
        delta: Gradients by its result, `(k, ...)`.
        shape: The shape of the input.

    Raises:
        Unsupported: The operation was made in a way for which there is no formula, or does not have
            any more what it had saved.
    """
    formula, _ = _KNOWN[type(node).__name__]
    try:
        return formula(node, slot, delta, shape)
    except Unsupported:
        raise
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise explained(error) from error
        raise Unsupported(f"{node.name()}: {str(error).splitlines()[0]}") from error


def _saved(node: Any, name: str) -> Tensor:
    found: Tensor = getattr(node, f"_saved_{name}").detach()
    return found


def _times(delta: Tensor, factor: float) -> Tensor:
    return delta if factor == 1 else delta * factor


# Products of matrices.


def _product(
    left: Callable[[], Tensor], right: Callable[[], Tensor], first: bool, delta: Tensor
) -> Factors:
    """`left @ right` with dimensions `(groups, m, k)` and `(groups, k, n)`.

    Args:
        left: Gives the left factor, where the right one is wanted.
        right: Gives the right factor, where the left one is wanted.
        first: Whether the gradient is by the left factor.
        delta: Shape `(count, groups, m, n)`.
    """
    if first:
        return Factors(right().mT, delta.mT)
    return Factors(left(), delta, transposed=True)


def _mm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    return _product(
        lambda: _saved(node, "self")[None],
        lambda: _saved(node, "mat2")[None],
        slot == 0,
        delta[:, None],
    )


def _addmm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 0:
        return _broadcast(_times(delta, node._saved_beta), shape)
    return _product(
        lambda: _saved(node, "mat1")[None],
        lambda: _saved(node, "mat2")[None],
        slot == 1,
        _times(delta, node._saved_alpha)[:, None],
    )


def _bmm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    return _product(lambda: _saved(node, "self"), lambda: _saved(node, "mat2"), slot == 0, delta)


def _baddbmm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 0:
        return _broadcast(_times(delta, node._saved_beta), shape)
    return _product(
        lambda: _saved(node, "batch1"),
        lambda: _saved(node, "batch2"),
        slot == 1,
        _times(delta, node._saved_alpha),
    )


def _mv(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 0:
        return Factors(_saved(node, "vec")[None, None], delta[:, None, None])
    return Factors(_saved(node, "self")[None], delta[:, None, :, None], transposed=True)


def _addmv(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 0:
        return _broadcast(_times(delta, node._saved_beta), shape)
    delta = _times(delta, node._saved_alpha)
    if slot == 1:
        return Factors(_saved(node, "vec")[None, None], delta[:, None, None])
    return Factors(_saved(node, "mat")[None], delta[:, None, :, None], transposed=True)


def _dot(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    other = _saved(node, "tensor" if slot == 0 else "self")
    return Factors(other[None, None], delta.view(-1, 1, 1, 1))


def _linear(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    rows = delta.reshape(len(delta), 1, -1, delta.shape[-1])
    if slot == 2:
        return Factors(None, rows)
    x = _saved(node, "input")
    return Factors(x.reshape(1, -1, x.shape[-1]), rows)


# Operations entry by entry, on tensors that are broadcast.


def _broadcast(delta: Tensor, shape: tuple[int, ...]) -> Factors:
    """Gradients `(k, ...)` of entries of a tensor that was broadcast: rows are its copies."""
    dims = delta.dim() - 1
    padded = (1,) * (dims - len(shape)) + shape
    copies = [i + 1 for i in range(dims) if padded[i] == 1]
    others = [i + 1 for i in range(dims) if padded[i] != 1]
    ordered = delta.permute(0, *copies, *others)
    return Factors(None, ordered.reshape(len(delta), 1, -1, math.prod(shape)))


def _entrywise(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    # Called by itself, a node returns gradients of the result's shape: it is the engine that sums
    # over what was broadcast.
    found: Tensor | None = node(delta)[slot]
    if found is None or found.shape != delta.shape:
        raise Unsupported(f"{node.name()} of these shapes")
    return _broadcast(found, shape)


def _expand(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    return _broadcast(delta, shape)


# Normalization.


def _layer_norm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 1:
        x, mean, scale = (_saved(node, name) for name in ("input", "result1", "result2"))
        delta = delta * ((x - mean) * scale)
    return _broadcast(delta, shape)


def _layer_norm_backward(
    node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]
) -> Factors | None:
    """Of the gradient of a layer norm by its input, which is linear in the gain."""
    if slot == 5:
        return None
    g, x, mean, scale = (_saved(node, name) for name in ("grad_out", "input", "mean", "rstd"))
    normalized, dims = (x - mean) * scale, tuple(range(-len(shape), 0))
    through = (delta * normalized).mean(dims, keepdim=True)
    centered = delta - delta.mean(dims, keepdim=True) - normalized * through
    return _broadcast(g * scale * centered, shape)


def _rms_norm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    return _broadcast(delta * (_saved(node, "input") * _saved(node, "result1")), shape)


def _group_norm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 1:
        x, mean, scale = (_saved(node, name) for name in ("input", "result1", "result2"))
        grouped = x.reshape(*mean.shape, -1)
        delta = delta * ((grouped - mean[..., None]) * scale[..., None]).view(x.shape)
    return _of_channels(delta)


def _batch_norm(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if slot == 1:
        x = _saved(node, "input")
        if node._saved_training:
            mean, scale = _saved(node, "result1"), _saved(node, "result2")
        else:
            mean = _saved(node, "running_mean")
            scale = (_saved(node, "running_var") + node._saved_eps).rsqrt()
        per_channel = (-1, *[1] * (x.dim() - 2))
        delta = delta * ((x - mean.view(per_channel)) * scale.view(per_channel))
    return _of_channels(delta)


def _of_channels(delta: Tensor) -> Factors:
    """Gradients `(k, batch, channels, ...)` by one number a channel."""
    rows = delta.movedim(2, -1)
    return Factors(None, rows.reshape(len(delta), 1, -1, rows.shape[-1]))


# Convolutions.


def _convolution(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    geometry = geometry_of(node)
    if geometry is None:
        raise Unsupported("a transposed convolution")
    x, (stride, padding, dilation, groups) = geometry
    if slot == 2:
        return _of_channels(delta)
    batch, count = x.shape[0], len(delta)
    x = unfolded(x, (stride, padding, dilation), groups, shape[2:])
    places = math.prod(delta.shape[3:])
    x = x.reshape(groups, batch * places, math.prod(shape[1:]))
    rows = delta.reshape(count, batch, groups, -1, places).permute(0, 2, 1, 4, 3)
    return Factors(x, rows.reshape(count, groups, batch * places, -1))


def unfolded(
    x: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
    kernel: Sequence[int],
) -> Tensor:
    """The patches that a convolution multiplies with its kernels, a view.

    Args:
        x: The input, `(batch, channels, ...)`.
        geometry: Stride, padding and dilation.
        groups: The number of groups.
        kernel: The size of the kernels.

    Returns:
        Shape `(groups, batch, places..., channels / groups, kernel...)`.
    """
    stride, padding, dilation = geometry
    dims = x.dim() - 2
    if any(padding):
        x = F.pad(x, [n for pad in reversed(padding) for n in (pad, pad)])
    for i, size in enumerate(kernel):
        x = x.unfold(2 + i, (size - 1) * dilation[i] + 1, stride[i])
        if dilation[i] > 1:
            x = x[..., :: dilation[i]]
    # (batch, channels, places..., kernel...)
    patches: Tensor = x.unflatten(1, (groups, -1)).movedim(2, 2 + dims).movedim(1, 0)
    return patches


# Tables.


def _table(delta: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Factors:
    """Rows of a table that were looked up: products with unit vectors."""
    width = math.prod(shape[1:])
    rows = delta.reshape(len(delta), 1, -1, width)
    units = F.one_hot(indices.reshape(-1) % shape[0], shape[0]).to(delta.dtype)
    return Factors(units[None], rows, transposed=True)


def _embedding(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if node._saved_scale_grad_by_freq:
        raise Unsupported("an embedding with scale_grad_by_freq")
    if node._saved_padding_idx not in (-1, 2**64 - 1):
        raise Unsupported("an embedding with padding_idx")
    return _table(delta, _saved(node, "indices"), shape)


def _index(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    indices: Sequence[Tensor | None] = node._saved_indices
    if len(indices) != 1 or indices[0] is None or indices[0].dtype == torch.bool:
        raise Unsupported("an index of several dimensions")
    return _table(delta, indices[0], shape)


def _index_select(node: Any, slot: int, delta: Tensor, shape: tuple[int, ...]) -> Factors:
    if node._saved_dim not in (0, 2**64 - len(shape)):
        raise Unsupported("index_select along another dimension than the first")
    return _table(delta, _saved(node, "index"), shape)


_ENTRYWISE = (_entrywise, range(3))
_KNOWN: dict[str, tuple[_Formula, Sequence[int]]] = {
    "MmBackward0": (_mm, range(2)),
    "AddmmBackward0": (_addmm, range(3)),
    "BmmBackward0": (_bmm, range(2)),
    "BaddbmmBackward0": (_baddbmm, range(3)),
    "MvBackward0": (_mv, range(2)),
    "AddmvBackward0": (_addmv, range(3)),
    "DotBackward0": (_dot, range(2)),
    "LinearBackward0": (_linear, (1, 2)),
    "ExpandBackward0": (_expand, range(1)),
    "NativeLayerNormBackward0": (_layer_norm, (1, 2)),
    "NativeLayerNormBackwardBackward0": (_layer_norm_backward, (4, 5)),
    "FusedRmsNormBackward0": (_rms_norm, (1,)),
    "NativeGroupNormBackward0": (_group_norm, (1, 2)),
    "NativeBatchNormBackward0": (_batch_norm, (1, 2)),
    "ConvolutionBackward0": (_convolution, (1, 2)),
    "_ConvolutionBackward": (_convolution, (1, 2)),
    "EmbeddingBackward0": (_embedding, range(1)),
    "IndexBackward0": (_index, range(1)),
    "IndexSelectBackward0": (_index_select, range(1)),
    **dict.fromkeys(
        (
            "AddBackward0",
            "AddcdivBackward0",
            "AddcmulBackward0",
            "Atan2Backward0",
            "DivBackward0",
            "LerpBackward1",
            "MaximumBackward0",
            "MinimumBackward0",
            "MulBackward0",
            "PowBackward1",
            "PreluKernelBackward0",
            "SubBackward0",
            "WhereBackward0",
        ),
        _ENTRYWISE,
    ),
}
