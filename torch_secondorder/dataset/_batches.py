"""What is in a batch: inputs and targets, how many samples, on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._foundation.subclasses import plain

__all__ = ["as_pair", "call", "fingerprint", "length", "moved"]


def as_pair(batch: Any, hint: str) -> tuple[Any, Any]:
    """Inputs and targets.

    Args:
        batch: A tuple or list of two.
        hint: What to use for anything else, for the error.

    Raises:
        TypeError: It is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}; use {hint} for "
            "anything else"
        )
    return batch[0], batch[1]


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output: a tuple or list is several arguments, a mapping named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    # A DataLoader makes lists of the tuples in a dataset.
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def length(batch: Any) -> int | None:
    """Samples in a batch: the length of its first tensor; None where there is none."""
    return next((len(leaf) for leaf in _tensors(batch) if leaf.dim()), None)


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with all tensors on a device; None to leave them where they are."""
    if device is None:
        return batch
    # Copies to the host are not waited for by who reads them.
    background = device.type != "cpu"

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            there = plain(leaf).device == device
            return leaf if there else leaf.to(device, non_blocking=background)
        # Batches of a class of their own, such as those of tokenizers.
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return pytree.tree_map(move, batch)


def fingerprint(batch: Any) -> tuple[list[torch.Size], list[Tensor]]:
    """Something that tells a batch from others: its tensors' shapes, and a number for each.

    The numbers are 0-dim tensors where the batch is: reading them would wait for a device.
    """
    tensors = [t for t in _tensors(batch) if t.layout is torch.strided and not t.is_quantized]
    return [t.shape for t in tensors], [_number(t) for t in tensors if t.numel()]


def _number(tensor: Tensor) -> Tensor:
    """Of the first and the last sample."""
    tensor = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
    ends = torch.stack([tensor[0], tensor[-1]]) if tensor.dim() else tensor
    values = ends.detach().reshape(-1)
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    # Weighted by their places: one-hot vectors all have the same sum.
    places = _places(len(values), dtype, values.device)
    return torch.dot(places, values.to(dtype).nan_to_num())


@lru_cache(maxsize=16)
def _places(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=dtype, device=device).sqrt_()


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield plain(leaf)
        elif isinstance(leaf, Mapping):  # one that pytrees do not know
            yield from _tensors(dict(leaf))
