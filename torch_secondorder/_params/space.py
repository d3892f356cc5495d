"""The space that flat vectors live in: whole in this process, or cut up over several.

Under `torch.distributed.fsdp.fully_shard` a process holds a part of each parameter, and flat
vectors here are of these parts. Operations that work entry by entry do not notice. Global
reductions (an inner product, a norm) combine the results that each process computes from its part,
and go through `Space`; with whole vectors they cost nothing extra.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._foundation.host_transfer import read_numbers, read_vector

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Space:
    """Vectors that this process holds whole.

    >>> v = torch.tensor([3.0, -4.0])
    >>> WHOLE.to_host(sums=[v @ v], largest=[v])
    [25.0, 4.0]
    """

    #: How many processes share the parameters, each with a part of the batch.
    processes = 1

    def totals(self, *parts: Tensor) -> Sequence[Tensor]:
        """Numbers of whole vectors, from the sums that each process has made over its part.

        All travel as one message, and stay on the device.

        Args:
            parts: Tensors of one shape and dtype.
        """
        return parts

    def total(self, part: Tensor) -> Tensor:
        """See `totals`."""
        return part

    def to_host(
        self,
        sums: Sequence[Tensor] = (),
        largest: Sequence[Tensor] = (),
        norms: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (),
    ) -> list[float]:
        """Numbers that belong to whole vectors, in the order of the arguments, with one wait.

        Args:
            sums: Sums over this process's part, such as inner products.
            largest: Vectors whose largest absolute entry is asked for.
            norms: Euclidean norms of this process's part.
            whole: Numbers that belong to the whole already.
        """
        numbers = (*sums, *map(max_norm, largest), *norms, *whole)
        return read_numbers(*numbers)

    def true_norm(self, v: Tensor, largest: float, norm: float) -> float:
        """The Euclidean norm of a whole vector, where its squares leave the range of its dtype too.

        Only then it is computed again, which takes a synchronization.

        Args:
            v: What this process has of it.
            largest: Its largest absolute entry, that of the whole.
            norm: Its norm as `torch.linalg.vector_norm` has it.
        """
        numbers = torch.finfo(v.dtype)
        least = numbers.tiny**0.5 / numbers.eps  # smaller squares lose digits
        if not 0.0 < largest < math.inf or least <= largest <= 1.0 / least:
            return norm
        unit = math.ldexp(1.0, math.frexp(largest)[1] - 1)
        unit = min(max(unit, numbers.tiny), 1.0 / numbers.tiny)
        (scaled,) = self.to_host(norms=[torch.linalg.vector_norm(v / unit)])
        return scaled * unit

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes that share the parameters, of a loss for instance."""
        return tensor


#: The space of all vectors that are not sharded.
WHOLE = Space()


class ShardedSpace(Space):
    """Vectors that are cut up over the processes of a device mesh.

    All processes get the same numbers, bit for bit, and so take the same branches.

    Args:
        mesh: The mesh.
        dims: Those of its dimensions that cut; over the others vectors are replicated.
    """

    def __init__(self, mesh: DeviceMesh, dims: Sequence[int]) -> None:
        self.processes = mesh.size()
        self._mesh = mesh
        self._cutting = tuple(dims)

    def totals(self, *parts: Tensor) -> Sequence[Tensor]:
        """See `Space.totals`."""
        message = torch.stack(parts)
        for dim in self._cutting:
            dist.all_reduce(message, group=self._mesh.get_group(dim))
        return message.unbind()

    def total(self, part: Tensor) -> Tensor:
        """See `Space.total`."""
        return self.totals(part)[0]

    def to_host(
        self,
        sums: Sequence[Tensor] = (),
        largest: Sequence[Tensor] = (),
        norms: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (),
    ) -> list[float]:
        """See `Space.to_host`."""
        if not (sums or largest or norms):
            return super().to_host(whole=whole)
        gathered = self.gathered(sums, list(map(max_norm, largest)), norms, whole)
        return read_vector(gathered)

    def gathered(
        self,
        sums: Sequence[Tensor] = (),
        largest: Sequence[Tensor] = (),
        norms: Sequence[Tensor] = (),
        whole: Sequence[Tensor] = (),
    ) -> Tensor:
        """The numbers that `to_host` reads, from maxima in place of vectors, as one tensor.

        They take one message, however many they are.
        """
        kinds = (sums, largest, norms, whole)
        counts = [len(kind) for kind in kinds]
        numbers = torch.stack([number.double() for kind in kinds for number in kind])
        for dim in self._cutting:
            # Gathered, not reduced: sums, maxima and norms go together.
            rows = [torch.empty_like(numbers) for _ in range(self._mesh.size(dim))]
            dist.all_gather(rows, numbers, group=self._mesh.get_group(dim))
            of_sums, of_largest, of_norms, of_whole = torch.stack(rows).split(counts, dim=1)
            numbers = torch.cat(
                (
                    of_sums.sum(0),
                    of_largest.amax(0),
                    torch.linalg.vector_norm(of_norms, dim=0),
                    of_whole[0],
                )
            )
        return numbers

    def mean(self, tensor: Tensor) -> Tensor:
        """See `Space.mean`: over all processes of the mesh, each with a part of the batch."""
        tensor = tensor.clone()
        for dim in range(self._mesh.ndim):
            dist.all_reduce(tensor, group=self._mesh.get_group(dim))
        return tensor.div_(self.processes)


def space_of(params: Sequence[Tensor]) -> Space:
    """The space of flat vectors of these parameters.

    Raises:
        ValueError: Some parameters are sharded and others not, or in another way.
    """
    distributed = [is_distributed(p) for p in params]
    if not any(distributed):
        return WHOLE
    if not all(distributed):
        index = distributed.index(False)
        raise ValueError(
            f"parameter {index} of shape {tuple(params[index].shape)} is a plain tensor, while "
            f"parameter {distributed.index(True)} is sharded: shard the module that holds it as "
            "well (fully_shard of the root module takes all that is left), or give it to an "
            "optimizer of its own"
        )
    first = _Placed.of(params[0])
    for index, p in enumerate(params):
        placed = _Placed.of(p)
        if p.is_complex():
            raise ValueError(
                f"parameter {index} of shape {tuple(p.shape)} is complex and sharded: hold it as "
                "a real one, by torch.view_as_real"
            )
        for placement in placed.placements:
            kind = type(placement).__name__
            if kind not in ("Shard", "Replicate"):
                raise ValueError(
                    f"parameter {index} of shape {tuple(p.shape)} is placed as {kind}; only "
                    "Shard and Replicate, what fully_shard makes by itself, can be optimized"
                )
        if placed.mesh != first.mesh or placed.cutting != first.cutting:
            raise ValueError(
                f"parameter {index} is placed as {placed.placements} on {placed.mesh}, parameter 0 "
                f"as {first.placements} on {first.mesh}: they have to be cut up over the same "
                "dimensions of one mesh; give them to optimizers of their own"
            )
    return ShardedSpace(first.mesh, first.cutting)


class _Placed(NamedTuple):
    """The placement of a distributed tensor."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Any) -> _Placed:
        return cls(tensor.device_mesh, tensor.placements)

    @property
    def cutting(self) -> tuple[int, ...]:
        """The dimensions of the mesh that it is cut up over."""
        return tuple(i for i, placement in enumerate(self.placements) if placement.is_shard())


def is_distributed(tensor: Tensor) -> bool:
    """True for a DTensor."""
    # Its module takes half a second to import; where there is a DTensor it has been.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, detached: an alias of a DTensor's part.

    Of an asynchronous tensor it waits until it is there.
    """
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part


def sharded_like(part: Tensor, parameter: Tensor) -> DTensor:
    """A DTensor placed like a parameter, from what this process holds of it.

    Args:
        part: Shape `(*batch, *local shape of the parameter)`.
        parameter: A DTensor.
    """
    from torch.distributed.tensor import DTensor, Shard

    placed = _Placed.of(parameter)
    batch = part.shape[: part.dim() - parameter.dim()]
    placements = [Shard(p.dim + len(batch)) if p.is_shard() else p for p in placed.placements]
    # Uneven parts do not tell the shape of the whole.
    shape = torch.Size((*batch, *parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), placed.mesh, placements, run_check=False, shape=shape, stride=stride
    )


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor that this process holds of a parameter of its shape."""
    from torch.distributed.tensor import distribute_tensor

    placed = _Placed.of(parameter)
    # Every process has it: nothing is sent.
    return local(distribute_tensor(whole, placed.mesh, placed.placements, src_data_rank=None))


def max_norm(v: Tensor) -> Tensor:
    """The largest absolute entry, 0-dim; NaN where there is one, zero where there is no entry."""
    if not v.numel():  # a process may have no part in a small vector
        return v.new_zeros(())
    norm: Tensor = torch.linalg.vector_norm(v, math.inf)
    return norm


def to_host(*scalars: Tensor) -> list[float]:
    """0-dim tensors as Python numbers, with one synchronization for all of them."""
    return WHOLE.to_host(whole=scalars)


def to_cpu(*tensors: Tensor) -> list[Tensor]:
    """Tensors as float64 on the CPU, with one synchronization for all of them."""
    if tensors[0].is_cpu:
        return [tensor.double() for tensor in tensors]
    dtype = torch.float64 if tensors[0].device.type != "mps" else torch.float32
    whole = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).cpu().double()
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.reshape(like.shape) for part, like in zip(parts, tensors, strict=True)]
