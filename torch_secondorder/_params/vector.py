"""The one place that knows how parameters map to a flat work vector.

Everything above this module computes with plain real vectors of length `n`. What makes parameters
awkward (several dtypes and devices, complex numbers, sparse or missing gradients, low precision,
learning rates that differ between groups, parts of parameters on several processes) ends here.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# A third of the time of views and `torch.cat` from Python, which counts for small networks.
from torch.nn.parameter import is_lazy

from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.private_torch import flatten_tensors, unflatten_tensors
from torch_secondorder._foundation.subclasses import PLAIN_TYPES, all_plain
from torch_secondorder._params.space import (
    WHOLE,
    local,
    part_of,
    sharded_like,
    space_of,
)

#: A vector of at most this many entries is kept rather than computed twice.
SHORT = 2**16


@dataclass(frozen=True, slots=True)
class _Segment:
    """The place of one parameter in the flat vector; a complex number takes two real slots."""

    shape: torch.Size  # of the real view: (..., 2) for a complex parameter
    count: int  # real numbers in it
    dtype: torch.dtype  # of the parameter
    real_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> _Segment:
        """Of a parameter, or of the part of it that this process holds."""
        real = _real(parameter.detach())
        return cls(real.shape, real.numel(), parameter.dtype, real.dtype, parameter.device)

    def typed(self, piece: Tensor) -> Tensor:
        """A piece `(..., count)` of a work vector in the parameter's shape, dtype and device."""
        piece = piece.reshape(piece.shape[:-1] + self.shape).to(self.device, self.real_dtype)
        # Not `view_as_complex`: a piece may begin at an odd place of the flat vector.
        return torch.complex(piece[..., 0], piece[..., 1]) if self.dtype.is_complex else piece


def _real(tensor: Tensor) -> Tensor:
    """The tensor as a dense real one, a complex number as a pair."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


_data: Callable[[Tensor], Tensor] = attrgetter("data")


def _all_dense(tensors: Iterable[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes twice the time
        if tensor is None or tensor.layout is not torch.strided:
            return False
    return True


class ParameterVector:
    """Maps parameters to one flat work vector of `n` real numbers, and back.

    The work vector is float32 or wider: the widest real dtype among the parameters and float32, on
    the device that holds most of them. Of sharded parameters (DTensors, as `fully_shard` makes
    them) it has the part that this process holds.

    Args:
        params: The parameters: floating-point or complex leaves, none of them empty.
        scale: One factor per parameter, or None for one everywhere. The work space is then
            `theta = scale * z`: gradients come out multiplied by it and steps go in multiplied by
            it, so a group's relative learning rate is a metric that any optimizer respects
            (`theta` moves along `scale**2 * gradient` under steepest descent in `z`).

    Attributes:
        params: The parameters, in order.
        scale: The scale as a vector `(n,)`; None for one everywhere.
        space: The space of the work vectors; global reductions go through it.
        size: `n`, the number of real degrees of freedom, of those in this process.
        whole_size: That of all processes together.
        dtype: Of the work vector.
        device: Of the work vector.
        devices: Of the parameters.
        needs_master: Whether some parameter is held in less precision than the work vector.
        is_short: Whether work vectors are so short that they are better kept than computed twice.
        is_large: Whether work vectors are so large that a `BufferPool` pays.
        precision: The machine epsilon that a loss of these parameters is computed with.

    Raises:
        TypeError: A parameter is not a tensor, or neither floating-point nor complex.
        ValueError: A parameter is empty or not yet initialized, there are none, or some are
            sharded and others not.

    >>> w, b = torch.ones(2, 2), torch.zeros(1, dtype=torch.complex64)
    >>> vector = ParameterVector([w, b])
    >>> vector.read()
    tensor([1., 1., 1., 1., 0., 0.])
    >>> vector.gather([None, torch.tensor([1 + 2j])])
    tensor([0., 0., 0., 0., 1., 2.])
    """

    def __init__(self, params: Iterable[Tensor], scale: Sequence[float] | None = None) -> None:
        self.params: list[Tensor] = list(params)
        check_parameters(self.params)
        self.space = space_of(self.params)
        self.sharded = self.space is not WHOLE
        held_parts = self._held()
        self._segments = [_Segment.of(p) for p in held_parts]
        self._kinds = [(p.dtype, p.device, p.shape) for p in held_parts]
        self._plain = held_parts is self.params
        self._counts = [s.count for s in self._segments]
        self.size = sum(self._counts)
        self.whole_size = sum(p.numel() * (1 + p.is_complex()) for p in self.params)
        self._likes = self._held()  # what pieces are shaped like
        if self.sharded:
            self._likes = [torch.empty_like(p, device="meta") for p in self._held()]
        self.dtype = functools.reduce(
            torch.promote_types, (s.real_dtype for s in self._segments), torch.float32
        )
        held: Counter[torch.device] = Counter()
        for segment in self._segments:
            held[segment.device] += segment.count
        self.device = held.most_common(1)[0][0]
        # With one real dtype on one device a piece of the work vector needs no conversion.
        self.devices = list(held)
        self._uniform = all(
            s.dtype == self.dtype and s.device == self.device for s in self._segments
        )
        self.is_short = self.size <= SHORT
        self.is_large = BufferPool.pays(self.size, self.dtype, self.device)
        self.precision = max(torch.finfo(s.real_dtype).eps for s in self._segments)
        # One tensor, as in much of numerical optimization, need not be cut up or put together.
        self._single = self._uniform and len(self.params) == 1
        self.needs_master = any(s.real_dtype != self.dtype for s in self._segments)
        self._factors = None if scale is None else tuple(scale)
        self.scale = None if scale is None else self.expand(scale)

    def _held(self, tensors: Sequence[Any] | None = None) -> Sequence[Any]:
        """The parts that this process holds of the parameters, or of tensors like them."""
        tensors = self.params if tensors is None else tensors
        if not self.sharded:
            return all_plain(tensors)
        return [None if tensor is None else local(tensor) for tensor in tensors]

    def matches(self, params: Sequence[Tensor], scale: Sequence[float] | None) -> bool:
        """True if this vector still describes these parameters under this scale."""
        if len(params) != len(self.params):
            return False
        if (None if scale is None else tuple(scale)) != self._factors:
            return False
        held = params if self._plain else self._held(params)
        for p, known, part, kind in zip(params, self.params, held, self._kinds, strict=True):
            # The data of a parameter may be replaced from outside.
            if p is not known or (part.dtype, part.device, part.shape) != kind:
                return False
        return True

    # Between tensors shaped like the parameters and flat vectors.

    def gather(
        self,
        tensors: Sequence[Tensor | None],
        batch: Sequence[int] = (),
        buffer_pool: BufferPool | None = None,
    ) -> Tensor:
        """Flattens tensors shaped like the parameters; None counts as zeros. Always a copy.

        Args:
            tensors: One per parameter: dense, sparse or None, each of shape `(*batch, ...)`.
            batch: The leading dimensions.
            buffer_pool: Where to take memory from.

        Returns:
            Shape `(*batch, n)`, without the scale applied.
        """
        if self.sharded or not PLAIN_TYPES.issuperset(map(type, tensors)):
            tensors = self._held(tensors)
        first = tensors[0]
        if self._single and not batch and first is not None and first.layout is torch.strided:
            return first.detach().flatten().clone()
        if self._uniform and not batch and _all_dense(tensors):
            if buffer_pool is not None and self.is_large:
                out = buffer_pool.empty("gathered", self.size, self.dtype, self.device)
                pieces = [t.detach().reshape(-1) for t in tensors if t is not None]
                return torch.cat(pieces, out=out)
            joined: Tensor = flatten_tensors(tensors)
            return joined.detach()
        if self._uniform:
            shape = (*batch, -1)
            pieces = [
                torch.zeros(s.count, dtype=self.dtype, device=self.device).expand(*batch, s.count)
                if t is None
                else (t if t.layout is torch.strided else t.to_dense()).reshape(shape)
                for t, s in zip(tensors, self._segments, strict=True)
            ]
            return torch.cat(pieces, dim=-1).detach()
        flat = torch.zeros(*batch, self.size, dtype=self.dtype, device=self.device)
        for tensor, piece in zip(tensors, flat.split(self._counts, dim=-1), strict=True):
            if tensor is not None:
                piece.copy_(_real(tensor.detach()).reshape(piece.shape))
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cuts `(..., n)` into pieces shaped `(..., *parameter.shape)` in the parameters' dtypes.

        The pieces are views wherever dtype and device allow.
        """
        if self._uniform and flat.dim() == 1:
            return self._views(flat)
        pieces = flat.split_with_sizes(self._counts, dim=-1)
        return [s.typed(p) for s, p in zip(self._segments, pieces, strict=True)]

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Cuts `(n,)` into views shaped like the parameters, in the work precision.

        A complex parameter's piece is real, `(..., 2)`. On the device of the parameter.
        """
        if self._uniform:
            return self._views(flat)
        return [
            piece.view(s.shape).to(s.device)
            for s, piece in zip(self._segments, flat.split(self._counts), strict=True)
        ]

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of `(n,)` where they need no conversion."""
        if self._single:
            shape = self._segments[0].shape
            return [flat if len(shape) == 1 else flat.view(shape)]
        return list(unflatten_tensors(flat, self._likes))

    def expand(self, values: Sequence[float]) -> Tensor:
        """A flat vector that holds `values[i]` on every slot of parameter `i`."""
        per_parameter = torch.tensor(values, dtype=self.dtype, device=self.device)
        sizes = torch.tensor(self._counts, device=self.device)
        return per_parameter.repeat_interleave(sizes, output_size=self.size)

    # The scaled work space.

    def scaled(self, flat: Tensor) -> Tensor:
        """Multiplies `(..., n)` by the scale: from steps to moves, from gradients to slopes."""
        return flat if self.scale is None else flat * self.scale

    # Reading and moving the parameters themselves.

    def read(self, master: Tensor | None = None) -> Tensor:
        """The parameters as one flat vector, a copy.

        Args:
            master: An earlier position in work precision. Where a parameter is held in a narrower
                dtype and still equals this one rounded, the unrounded value is returned, so that
                steps below the parameter's own precision add up.
        """
        flat = self.gather(self.params)
        if master is None or self._uniform:
            return flat
        rounded = self.gather(self.split(master))
        return torch.where(rounded == flat, master, flat)

    def slots(self) -> list[tuple[int, int, float]]:
        """The begin and end of each parameter in the flat vector, and its scale."""
        ends = list(itertools.accumulate(self._counts))
        factors = self._factors or (1.0,) * len(ends)
        return [
            (end - count, end, factor)
            for end, count, factor in zip(ends, self._counts, factors, strict=True)
        ]

    def holds(self, flat: Tensor) -> bool:
        """True if the parameters have these values, `(n,)`, as far as their precision goes."""
        if self.device.type == "cpu":  # one by one, without a copy
            held = self.params if self._plain else self._held()
            return all(map(torch.equal, held, self.split(flat)))
        # A device would be waited for as many times.
        return torch.equal(self.read(flat), flat)

    def write(self, flat: Tensor) -> None:
        """Sets the parameters, so that a graph that has saved them refuses to be used again."""
        self.move(flat)
        increment_version(self.params)

    def move(self, flat: Tensor) -> None:
        """Sets the parameters without a trace in their version counters.

        A retained graph stays usable once they are moved back; it is the caller's duty to do so
        before it is used.
        """
        # `.data` is an alias with a version counter of its own; `.detach()` would share it.
        held = self.params if self._plain else self._held()
        if self._single:
            held[0].data.copy_(self._views(flat)[0])
        else:
            torch._foreach_copy_(list(map(_data, held)), self.split(flat))

    # Sharded tensors.

    def drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """A random vector `(n,)` whose entries do not depend on how the parameters are sharded.

        Each process draws whole parameters, one after the other, and keeps its part.

        Args:
            draw: Gives a flat vector of so many entries, the same in all processes.
        """
        if not self.sharded:
            return draw(self.size)
        return torch.cat([part_of(draw(p.numel()).view(p.shape), p).flatten() for p in self.params])

    def distribute(self, flat: Tensor, rows: int | None = None) -> list[Tensor]:
        """Cuts `(n,)` or `(k, n)` into copies of the parameters' shapes, DTensors as these are.

        Args:
            flat: In the work precision, which the result has as well.
            rows: How many rows the result is to have; zeros below those that there are.
        """
        batch = flat.shape[:-1]
        result: list[Tensor] = []
        pieces = flat.split_with_sizes(self._counts, dim=-1)
        for p, segment, piece in zip(self.params, self._segments, pieces, strict=True):
            whole = piece.new_zeros((*(batch if rows is None else (rows,)), *segment.shape))
            part = whole if rows is None else whole[: len(flat)]
            part.copy_(piece.reshape(*batch, *segment.shape))
            whole = whole.to(segment.device)
            result.append(sharded_like(whole, p) if self.sharded else whole)
        return result

    def collect(self, tensors: Sequence[Tensor]) -> Tensor:
        """Joins what `distribute` cut up, or plain tensors of whole parameters: `(..., n)`.

        Raises:
            ValueError: Their shapes or placements do not fit.
        """
        rows = []
        for index, (p, tensor, s) in enumerate(
            zip(self.params, tensors, self._segments, strict=True)
        ):
            part, dims = local(tensor), len(s.shape)
            shape = p.shape if self.sharded else s.shape
            if (tensor.shape[tensor.dim() - dims :], part.shape[part.dim() - dims :]) != (
                shape,
                s.shape,
            ):
                raise ValueError(
                    f"the state of parameter {index}, shape {tuple(tensor.shape)} with "
                    f"{tuple(part.shape)} in this process, does not fit the parameter, shape "
                    f"{tuple(p.shape)} with {tuple(s.shape)} here: load it into this optimizer's "
                    "state_dict() by torch.distributed.checkpoint, which cuts it up anew"
                )
            rows.append(part.detach().reshape(*part.shape[: part.dim() - dims], s.count))
        return torch.cat([row.to(self.device, self.dtype) for row in rows], dim=-1)


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raises on anything that cannot be optimized as real or complex numbers."""
    if not params:
        raise ValueError("there is no parameter to optimize: the list is empty")
    for index, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {index} is a {type(p).__name__}, not a tensor")
        if is_lazy(p):
            raise ValueError(
                f"parameter {index} is not initialized yet; run one forward pass of the lazy "
                "module before making the optimizer"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"parameter {index} of shape {tuple(p.shape)} has dtype {p.dtype}; only "
                "floating-point and complex parameters can be optimized: convert it, or leave it "
                "out of the optimizer"
            )
        if p.numel() == 0:
            raise ValueError(
                f"parameter {index} of shape {tuple(p.shape)} is empty; leave it out of the "
                "optimizer"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"parameter {index} of shape {tuple(p.shape)} was expanded: several entries share "
                "one number; clone it before making it a parameter"
            )
