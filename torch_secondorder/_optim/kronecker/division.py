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
#: time than a message: decompositions of eight matrices of size 64 take 0.8 ms on a core, divided
#: over two processes 0.9 ms; of size 128 they take 9.9 and 2.8 ms.
LEAST = 4e6


def divided(
    ranks: Ranks, function: Callable[..., Tensor], stacks: Sequence[tuple[Tensor, ...]]
) -> list[Tensor]:
    """A function of each of some stacks of matrices, in the same order.

    Args:
        ranks: The ranks. All of them come here with stacks of the same sizes.
        function: Takes the tensors of a stack, `(k, ...)` each, entry by entry, and gives a tensor
            that is shaped like the first one, and of its dtype.
        stacks: The tensors, the first of each `(k, m, m)`.

    >>> (root,) = divided(Ranks(), torch.sqrt, [(torch.full((3, 1, 1), 4.0),)])
    >>> root.flatten()
    tensor([2., 2., 2.])
    """
    costs = [float(stack[0].shape[-1]) ** 3 for stack in stacks]
    counts = [len(stack[0]) for stack in stacks]
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    if not ranks.met or total < LEAST or ranks.count == 1 or _kinds(stacks) != 1:
        return [function(*stack) for stack in stacks]
    shares = _shares(costs, counts, total, ranks.count)
    own = [
        function(*(tensor[start:end] for tensor in stacks[place])).reshape(-1)
        for place, start, end in shares[ranks.own]
    ]
    results = [
        torch.empty_like(stack[0], memory_format=torch.contiguous_format) for stack in stacks
    ]
    targets = [[results[place][start:end] for place, start, end in share] for share in shares]
    longest = max(sum(target.numel() for target in row) for row in targets)
    message = results[0].new_zeros(longest)
    torch.cat([message[:0], *own], out=message[: sum(len(piece) for piece in own)])
    received = [torch.empty_like(message) for _ in targets]
    dist.all_gather(received, message, group=ranks.group)
    for row, part in zip(targets, received, strict=True):
        sizes = [target.numel() for target in row]
        for target, piece in zip(row, part[: sum(sizes)].split(sizes), strict=True):
            target.copy_(piece.view_as(target))
    return results


def _kinds(stacks: Sequence[tuple[Tensor, ...]]) -> int:
    return len({(stack[0].dtype, stack[0].device) for stack in stacks})


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
        start = 0
        while start < count:
            # The rank in whose share the middle of the entry falls.
            rank = min(int((done + cost / 2) * ranks / total), ranks - 1)
            end = start + 1
            done += cost
            while end < count and min(int((done + cost / 2) * ranks / total), ranks - 1) == rank:
                done += cost
                end += 1
            shares[rank].append((place, start, end))
            start = end
    return shares
