"""Functions of many matrices, divided over the ranks that share a batch.

Under DistributedDataParallel all ranks have the same factors, and would all compute the same bases
and roots. From a size on it is faster if each computes a part of them and sends it to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._closure.data_parallel import Ranks

#: The least sum of the cubes of the matrices' sizes that is divided. Fewer operations take less
#: time than a message: a refresh of SOAP's sixteen bases of size 32 takes 1.0 ms of a core, divided
#: over two processes with gloo 1.4 ms; of size 64 it takes 2.9 and 1.7 ms, of size 128 9.0 and 6.6.
LEAST = 4e6


def divided(
    targets: Sequence[Tensor],
    function: Callable[..., Tensor],
    stacks: Sequence[tuple[Tensor, ...]],
    ranks: Ranks,
) -> None:
    """Puts a function of each of some stacks of matrices into a target.

    All ranks come here in the same steps with the same shapes: whether they do may depend on counts
    of steps, and not on numbers in the state.

    Args:
        targets: For each stack a tensor `(k, m, m)`. They may be tensors of the stacks.
        function: Takes the tensors of a stack, goes over them entry by entry, and gives a tensor of
            the shape of the target.
        stacks: The tensors, `(k, ...)` each.
        ranks: The ranks.

    >>> roots = torch.zeros(3, 1, 1)
    >>> divided([roots], torch.sqrt, [(torch.full((3, 1, 1), 4.0),)], Ranks())
    >>> roots.flatten()
    tensor([2., 2., 2.])
    """
    costs = [float(target.shape[-1]) ** 3 for target in targets]
    counts = [len(target) for target in targets]
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    kinds = {(target.dtype, target.device) for target in targets}
    if not ranks.met or total <= LEAST or ranks.count == 1 or len(kinds) > 1:
        for target, stack in zip(targets, stacks, strict=True):
            target.copy_(function(*stack))
        return
    shares = _shares(costs, counts, total, ranks.count)
    own = [
        function(*(tensor[start:end] for tensor in stacks[place]))
        for place, start, end in shares[ranks.own]
    ]
    slots = [[targets[place][start:end] for place, start, end in share] for share in shares]
    message = targets[0].new_zeros(max(sum(slot.numel() for slot in row) for row in slots))
    _fill(message, own, slots[ranks.own])
    received = [torch.empty_like(message) for _ in slots]
    dist.all_gather(received, message, group=ranks.group)
    for row, part in zip(slots, received, strict=True):
        sizes = [slot.numel() for slot in row]
        for slot, piece in zip(row, part[: sum(sizes)].split(sizes), strict=True):
            slot.copy_(piece.view_as(slot))


def _fill(message: Tensor, pieces: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
    start = 0
    for piece, slot in zip(pieces, slots, strict=True):
        message[start : start + slot.numel()].view_as(slot).copy_(piece)
        start += slot.numel()


def _shares(
    costs: Sequence[float], counts: Sequence[int], total: float, ranks: int
) -> list[list[tuple[int, int, int]]]:
    """Runs of entries for each rank, of about equal cost: the stack, its first and its last entry.

    Args:
        costs: The cost of an entry of each stack.
        counts: The number of its entries.
        total: The cost of all.
        ranks: The number of ranks.

    >>> _shares([8.0, 1.0], [3, 4], 28.0, 2)
    [[(0, 0, 2)], [(0, 2, 3), (1, 0, 4)]]
    """
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    done = 0.0
    for place, (cost, count) in enumerate(zip(costs, counts, strict=True)):
        for entry in range(count):
            # The rank in whose share the middle of the entry falls.
            rank = min(int((done + cost / 2) * ranks / total), ranks - 1)
            done += cost
            runs = shares[rank]
            if entry and runs and runs[-1][0] == place:
                runs[-1] = (place, runs[-1][1], entry + 1)
            else:
                runs.append((place, entry, entry + 1))
    return shares
