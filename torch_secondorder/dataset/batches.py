"""What is in a batch: inputs and targets, how many samples, on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
            return leaf.to(device, non_blocking=background)
        # Batches of a class of their own, such as those of tokenizers.
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return pytree.tree_map(move, batch)


def fingerprint(batch: Any) -> list[tuple[tuple[int, ...], float, float]]:
    """Something that tells a batch from others: its tensors' shapes, first and last samples."""
    return [
        (tuple(t.shape), _number(t[0] if t.dim() else t), _number(t[-1] if t.dim() else t))
        for t in _tensors(batch)
        if t.layout is torch.strided and t.numel() and not t.is_quantized
    ]


def _number(sample: Tensor) -> float:
    sample = sample.detach()
    values = (torch.view_as_real(sample) if sample.is_complex() else sample).reshape(-1).double()
    # Weighted by their places: one-hot vectors all have the same sum.
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    return float(places.sqrt_() @ values.nan_to_num())


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # one that pytrees do not know
            yield from _tensors(dict(leaf))
