"""The ranks that share a batch, and means over them.

They are found from the DistributedDataParallel modules that a closure calls. If it calls none,
nothing is sent, and everything here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from torch_secondorder._foundation.private_torch import DDP_FIRST_PASS_SEEN

# The attributes that a DistributedDataParallel module reads in its forward, with the values that
# make it leave gradients alone. The second is for its first backward pass under a static graph.
_QUIET = {
    "require_backward_grad_sync": False,
    DDP_FIRST_PASS_SEEN: True,
}
# An attribute that a forward like that would change, and must not.
_KEPT = ("require_forward_param_sync",)


class Ranks:
    """The ranks of the DistributedDataParallel modules that were noted.

    A rank's loss is the mean over its own samples, and the loss of all is the mean of the ranks'
    losses, as DistributedDataParallel has it: where batches are uneven, a sample of a small one
    counts for more. Gradients and products are means likewise.

    Attributes:
        met: Whether a module was ever noted. If not, there is one rank, and nothing to average.

    >>> Ranks().average(torch.ones(2)), Ranks().gather([3, 5])
    (tensor([1., 1.]), [[3, 5]])
    """

    def __init__(self) -> None:
        # In the order in which they were met, which is the same on all ranks.
        self._modules: WeakKeyDictionary[DistributedDataParallel, None] = WeakKeyDictionary()
        self.met = False
        # The modules that leave gradients alone now, with the attributes that they had before.
        self._quiet: dict[DistributedDataParallel, dict[str, Any]] | None = None

    def note(self, module: DistributedDataParallel) -> None:
        """Takes in a module, before its forward.

        Raises:
            RuntimeError: It is of other ranks than those noted before.
        """
        if module not in self._modules:
            known = self.group
            if known is not None and (others := _members(known)) is not None:
                own = _members(module.process_group)
                if own != others:
                    raise RuntimeError(
                        "the closure calls DistributedDataParallel modules over different process "
                        f"groups, of ranks {others} and {own}: loss, gradient and curvature are "
                        "averaged over one. Give all of them the same process_group, or let an "
                        "optimizer of its own train each"
                    )
            elif known is not None:  # the group is gone, and its modules with it
                self._modules.clear()
            self._modules[module] = None
            self.met = True
        if self._quiet is not None:
            self._silence(module)

    @property
    def group(self) -> Any:
        """The process group; None without one."""
        if not self.met:
            return None
        return next((module.process_group for module in self._modules), None)

    @property
    def count(self) -> int:
        """The number of ranks."""
        group = self.group if self.met else None
        return 1 if group is None else dist.get_world_size(group)

    @property
    def several(self) -> bool:
        """True if there may be others: modules need a process group."""
        return self.met or (dist.is_available() and dist.is_initialized())

    @property
    def own(self) -> int:
        """The index of this rank."""
        group = self.group
        return 0 if group is None else dist.get_rank(group)

    @property
    def delays_averaging(self) -> bool:
        """True if a module with a static graph has yet to see its first backward pass."""
        return self.met and any(
            module.static_graph and not getattr(module, DDP_FIRST_PASS_SEEN, True)
            for module in self._modules
        )

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, a copy; the tensor itself where there is one rank."""
        return self.average_(tensor.clone()) if self.met and self.count > 1 else tensor

    def average_(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, in the place of a contiguous tensor."""
        return self._sum(tensor, self.count) if self.met else tensor

    def average_gradients(
        self, gradients: Sequence[Tensor | None], params: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """The means of gradients over the ranks; one message for each dtype and device.

        Args:
            gradients: This rank's, one for each parameter.
            params: The parameters.

        Returns:
            The means, None where no rank has a gradient; and the same as one vector that they are
            views of, if they are of one kind and complete.
        """
        if self.count == 1:
            return gradients, None
        result: list[Tensor | None] = [None] * len(params)
        kinds: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            kinds.setdefault((p.dtype, p.device), []).append(i)
        for (dtype, device), places in kinds.items():
            pieces = [_dense(gradients[i], params[i]).detach() for i in places]
            used = torch.tensor(
                [gradients[i] is not None for i in places], dtype=torch.float32, device=device
            )
            # Ranks may differ in the parameters that they used, but not in what they send.
            message = torch.cat([piece.reshape(-1) for piece in pieces] + [used.to(dtype)])
            message = self.average_(message)
            anywhere = message[len(message) - len(places) :]
            chunks = message.split([piece.numel() for piece in pieces] + [len(places)])
            for i, chunk, share in zip(places, chunks, anywhere, strict=False):
                if gradients[i] is not None or bool(share):
                    result[i] = chunk.view_as(params[i])
        complete = (
            len(kinds) == 1 and not message.is_complex() and all(g is not None for g in result)
        )
        return result, message[: len(message) - len(params)] if complete else None

    def join_roots_(self, roots: Tensor) -> Tensor:
        """A random root of the mean of the ranks' matrices, in the place of those of each.

        Where `q_r` has mean zero and `E[q_r q_r'] = B_r`, and all are independent, the sum over
        `sqrt(R)` of them has the second moment `(B_1 + ... + B_R) / R`.

        Args:
            roots: This rank's, contiguous.
        """
        return self._sum(roots, math.sqrt(self.count))

    def any(self, flag: bool, device: torch.device | None = None) -> bool:
        """True if a flag is set on any of the ranks; all have to ask, and all get the same answer.

        Args:
            flag: This rank's.
            device: Where the message is made.
        """
        if self.count == 1:
            return flag
        votes = torch.tensor([float(flag)], device=device)
        dist.all_reduce(votes, group=self.group)
        return bool(votes.item())

    def gather(self, numbers: Sequence[int], device: torch.device | None = None) -> list[list[int]]:
        """The integers that each rank has, in the order of the ranks.

        Args:
            numbers: This rank's; others may have more or fewer.
            device: Where messages are made.
        """
        if self.count == 1:
            return [list(numbers)]
        lengths = [row[0] for row in self._gather([len(numbers)], device)]
        padded = [*numbers, *[0] * (max(lengths) - len(numbers))]
        rows = self._gather(padded, device) if padded else [[] for _ in lengths]
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _gather(self, numbers: list[int], device: torch.device | None) -> list[list[int]]:
        message = torch.tensor(numbers, dtype=torch.int64, device=device)
        rows = [torch.empty_like(message) for _ in range(self.count)]
        dist.all_gather(rows, message, group=self.group)
        return [row.tolist() for row in rows]

    def _sum(self, tensor: Tensor, divisor: float) -> Tensor:
        group = self.group
        if group is None or dist.get_world_size(group) == 1:
            return tensor
        dist.all_reduce(tensor, group=group)
        return tensor.div_(divisor)

    def quiet(self) -> AbstractContextManager[None]:
        """A context inside which the modules average no gradients, and expect none.

        It is for evaluations whose gradients we make and average ourselves: a module that has
        prepared for a backward pass, and sees none or only a part of it, may refuse the next one.
        """
        return self._quieted() if self.several else nullcontext()

    @contextmanager
    def _quieted(self) -> Iterator[None]:
        self._quiet, before = {}, self._quiet
        try:
            for module in list(self._modules):
                self._silence(module)
            yield
        finally:
            for module, held in self._quiet.items():
                vars(module).update(held)
            self._quiet = before

    def _silence(self, module: DistributedDataParallel) -> None:
        assert self._quiet is not None
        if module not in self._quiet:
            state = vars(module)
            # Attributes that are set already stay so: no_sync() sets them, for instance.
            changed = {n: v for n, v in _QUIET.items() if n in state and state[n] is not v}
            self._quiet[module] = {n: state[n] for n in (*changed, *_KEPT) if n in state}
            state.update(changed)


class ModuleNotice:
    """Shows an object the DistributedDataParallel modules that are called, until it has a step.

    It is for loops without a closure, in which nothing else tells the ranks. Until then each call
    of a module takes a microsecond more.

    Args:
        noticed: Is called with each module before its forward. A method, whose object is not kept
            alive.
    """

    def __init__(self, noticed: Callable[[DistributedDataParallel], None]) -> None:
        method = WeakMethod(noticed)

        def hook(module: torch.nn.Module, _: Any) -> None:
            notice = method()
            if notice is None:
                self.end()
            elif isinstance(module, DistributedDataParallel):
                notice(module)

        self._handle = register_module_forward_pre_hook(hook)

    def end(self) -> None:
        """Looks no further."""
        self._handle.remove()


def several_processes() -> bool:
    """True if there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _dense(gradient: Tensor | None, p: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(p, requires_grad=False)
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _members(group: Any) -> list[int] | None:
    """The global ranks of a group; None for one that was destroyed."""
    try:
        return dist.get_process_group_ranks(group)
    except (KeyError, RuntimeError, ValueError):
        return None
