"""Roots `Q` of the curvature `B = Q Q'` of a loss by some outputs, sample by sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Size, Tensor

__all__ = ["BlockRoot", "DiagonalRoot", "Root", "SoftmaxRoot"]


class Root(ABC):
    """A matrix with rows for the entries of one or more outputs and columns for residuals.

    Entries and residuals belong to the same sample, or the matrix is zero there. It is in float32
    or wider, whatever the outputs are in.

    Attributes:
        samples: The number of samples.
        channels: The number of residuals of a sample.
    """

    samples: int
    channels: int

    @abstractmethod
    def spread(self, u: Tensor) -> tuple[Tensor, ...]:
        """`Q u`, a tensor for each output: from `(..., samples, channels)` to `(..., *shape)`."""

    @abstractmethod
    def collect(self, tangents: Sequence[Tensor]) -> Tensor:
        """`Q't`: from a tensor `(..., *shape)` for each output to `(..., samples, channels)`."""


def samples_in(shape: Size) -> int:
    """The number of samples of an output: its first dimension, one where it has none."""
    return shape[0] if shape else 1


def _flat(tangent: Tensor, shape: Size) -> Tensor:
    """A tensor `(..., *shape)` as `(..., samples, entries)`."""
    batch = tangent.shape[: tangent.dim() - len(shape)]
    return tangent.reshape(*batch, samples_in(shape), math.prod(shape[1:]))


class DiagonalRoot(Root):
    """A residual for each entry of an output, or for the difference of two.

    Args:
        scale: The diagonal of `Q`, shaped like the output.
        signs: A sign for each output.

    >>> DiagonalRoot(torch.tensor([2.0, 3.0]), (1, -1)).spread(torch.ones(2, 1))
    (tensor([2., 3.]), tensor([-2., -3.]))
    """

    def __init__(self, scale: Tensor, signs: Sequence[int] = (1,)) -> None:
        self.scale, self._signs = scale, signs
        self.samples, self.channels = samples_in(scale.shape), math.prod(scale.shape[1:])

    def spread(self, u: Tensor) -> tuple[Tensor, ...]:
        """See `Root.spread`."""
        scaled = u.reshape(u.shape[:-2] + self.scale.shape) * self.scale
        return tuple(scaled if sign > 0 else -scaled for sign in self._signs)

    def collect(self, tangents: Sequence[Tensor]) -> Tensor:
        """See `Root.collect`."""
        total = tangents[0] * self.scale * self._signs[0]
        for tangent, sign in zip(tangents[1:], self._signs[1:], strict=True):
            total = total + tangent * self.scale * sign
        return _flat(total, self.scale.shape)


class SoftmaxRoot(Root):
    """A root of `w (diag(p) - p p')` with a column less than there are classes.

    With `s = sqrt(p)` the matrix is `w diag(s) (I - s s') diag(s)`, and `I - s s'` projects on what
    is orthogonal to `s`. A reflection that maps `s` to a unit vector, that of the most probable
    class `k`, has an orthonormal basis of that space in its other columns. Column `j` of the root
    is then `sqrt(w) s_j (e_j - t)`, with `t_k = s_k`, and `t_i = p_i / (1 + s_k)` for all other
    classes. These are below a half, and nothing cancels.

    Args:
        logits: The output: `(C,)` for one sample, else `(samples, C, ...)`.
        weight: `w`, not negative, of that shape but with one entry for the classes.

    >>> (Q,) = SoftmaxRoot(torch.zeros(1, 2), torch.ones(1, 1)).spread(torch.ones(1, 1))
    >>> Q.T @ Q
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    def __init__(self, logits: Tensor, weight: Tensor) -> None:
        self._shape = logits.shape
        self.samples = logits.shape[0] if logits.dim() > 1 else 1
        self._classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
        self._positions = math.prod(logits.shape[2:])
        self.channels = max(self._classes - 1, 0) * self._positions
        self._w = weight.reshape(self.samples, 1, self._positions).sqrt()
        logits = logits.reshape(self.samples, self._classes, self._positions)
        # The most probable class and the last one change places.
        order = torch.arange(self._classes, device=logits.device)[:, None].expand(logits.shape)
        if logits.numel():
            most = logits.argmax(1, keepdim=True)
            order = order.masked_fill(order == most, self._classes - 1)
            order[:, -1:] = most
        self._order = order
        s = torch.log_softmax(self._swapped(logits), 1).div_(2).exp_()
        # Below, a probability is not a normal number, and what is divided by its root may overflow.
        self._s = s.masked_fill_(s < math.sqrt(torch.finfo(s.dtype).tiny), 0.0)
        self._t = self._s.square()
        self._t[:, :-1] /= 1 + self._s[:, -1:]
        self._t[:, -1:] = self._s[:, -1:]

    def _swapped(self, tangent: Tensor) -> Tensor:
        """Two classes of `(..., samples, classes, positions)` change places, or change back."""
        return tangent.gather(-2, self._order.expand(tangent.shape))

    def _by_classes(self, tangent: Tensor) -> Tensor:
        """A tensor `(..., *shape)` as `(..., samples, classes, positions)`, classes swapped."""
        batch = tangent.shape[: tangent.dim() - len(self._shape)]
        shape = (*batch, self.samples, self._classes, self._positions)
        return self._swapped(tangent.reshape(shape).to(self._s.dtype))

    def spread(self, u: Tensor) -> tuple[Tensor, ...]:
        """See `Root.spread`."""
        shape = (*u.shape[:-1], max(self._classes - 1, 0), self._positions)
        scaled = u.reshape(shape) * self._s[:, :-1]
        result = -self._t * scaled.sum(-2, keepdim=True)
        result[..., :-1, :] += scaled
        return (self._swapped(result.mul_(self._w)).reshape(*u.shape[:-2], *self._shape),)

    def collect(self, tangents: Sequence[Tensor]) -> Tensor:
        """See `Root.collect`."""
        tangent = self._by_classes(tangents[0])
        mean = (self._t * tangent).sum(-2, keepdim=True)
        found = self._w * self._s[:, :-1] * (tangent[..., :-1, :] - mean)
        return found.reshape(*found.shape[:-2], self.channels)

    def solve(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals for a gradient by the logits, and what they leave of it.

        Args:
            gradient: `g`, shaped like the logits; its sum over classes is zero.

        Returns:
            `r`, shape `(samples, channels)`, and `g - Q r`: zeros but where a weight is zero, or
            where the probability of a label is none that a floating-point number can express.
        """
        g, s, last = self._by_classes(gradient), self._s, self._s[:, -1:]
        ratio = torch.where((s > 0) & (self._w > 0), g / s / self._w, 0.0)
        values = ratio[:, :-1] - s[:, :-1] * (ratio[:, -1:] / (1 + last))
        values = values.reshape(self.samples, self.channels)
        lost = ((s == 0) | (self._w == 0)) & (g != 0)
        lost = self._swapped(lost.any(-2, keepdim=True).expand(g.shape)).reshape(self._shape)
        return values, torch.where(lost, gradient - self.spread(values)[0], 0.0)


class BlockRoot(Root):
    """A dense block for each sample, over the entries of one or more outputs.

    Args:
        blocks: Shape `(samples, entries, channels)`; entries are those of the outputs one after
            another.
        shapes: The shapes of the outputs.

    >>> BlockRoot(torch.ones(1, 2, 3), [Size([1]), Size([1])]).spread(torch.ones(1, 3))
    (tensor([3.]), tensor([3.]))
    """

    def __init__(self, blocks: Tensor, shapes: Sequence[Size]) -> None:
        self.blocks, self._shapes = blocks, shapes
        self.samples, _, self.channels = blocks.shape

    def spread(self, u: Tensor) -> tuple[Tensor, ...]:
        """See `Root.spread`."""
        flat = torch.einsum("nkc,...nc->...nk", self.blocks, u)
        return split_entries(flat, self._shapes)

    def collect(self, tangents: Sequence[Tensor]) -> Tensor:
        """See `Root.collect`."""
        flat = join_entries(tangents, self._shapes).to(self.blocks.dtype)
        return torch.einsum("nkc,...nk->...nc", self.blocks, flat)


def join_entries(tensors: Sequence[Tensor], shapes: Sequence[Size]) -> Tensor:
    """Tensors `(..., *shape)` of the same samples as one `(..., samples, entries)`."""
    return torch.cat([_flat(t, s) for t, s in zip(tensors, shapes, strict=True)], -1)


def split_entries(flat: Tensor, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
    """The reverse of `join_entries`."""
    parts = flat.split([math.prod(shape[1:]) for shape in shapes], -1)
    return tuple(
        part.reshape(flat.shape[:-2] + shape) for part, shape in zip(parts, shapes, strict=True)
    )
