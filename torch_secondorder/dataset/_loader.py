"""Batches and loaders: model inputs, sample counts, devices and random generators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._foundation.subclasses import plain

# Samplers whose length is the number of indices they give.
_SIZED = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def as_pair(batch: Any, hint: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Args:
        batch: A tuple or list of two.
        hint: The argument or function to suggest for other batches, for the error.

    Raises:
        TypeError: The batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}; use {hint} for "
            "anything else"
        )
    return batch[0], batch[1]


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output; a tuple or list holds positional arguments, a mapping keyword ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    # A DataLoader turns the tuples of a dataset into lists.
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def batch_size(batch: Any, count: Callable[[Any], float] | None = None) -> float:
    """Number of samples in a batch.

    Args:
        batch: The batch.
        count: Counts them; by default the length of the first tensor is taken.

    Raises:
        TypeError: No tensor in the batch has a length.
    """
    if count is not None:
        return float(count(batch))
    found = length(batch)
    if found is None:
        raise TypeError(
            f"a batch of type {type(batch).__name__} has no tensor whose length could be the "
            "number of its samples: pass count=, a function of the batch"
        )
    return found


def length(batch: Any) -> int | None:
    """The length of a batch's first tensor that has one; None if no tensor has."""
    return next((len(leaf) for leaf in _tensors(batch) if leaf.dim()), None)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """The batch with all tensors on a device; None leaves them where they are."""
    if device is None:
        return batch
    # A non-blocking copy to the host could be read before it has arrived.
    non_blocking = device.type != "cpu"

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            same = plain(leaf).device == device
            return leaf if same else leaf.to(device, non_blocking=non_blocking)
        # Batch classes of other libraries, such as those of tokenizers.
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return pytree.tree_map(move, batch)


def fingerprint(batch: Any) -> tuple[list[torch.Size], list[Tensor]]:
    """Shapes of a batch's tensors, and one number for each, to tell batches apart.

    The numbers are 0-dim tensors on the batch's device: reading them would wait for it.
    """
    tensors = [t for t in _tensors(batch) if t.layout is torch.strided and not t.is_quantized]
    return [t.shape for t in tensors], [_checksum(t) for t in tensors if t.numel()]


def _checksum(tensor: Tensor) -> Tensor:
    """A weighted sum of the first and the last sample."""
    tensor = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
    ends = torch.stack([tensor[0], tensor[-1]]) if tensor.dim() else tensor
    values = ends.detach().reshape(-1)
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    # The weights depend on the position: one-hot vectors all have the same plain sum.
    weights = _weights(len(values), dtype, values.device)
    return torch.dot(weights, values.to(dtype).nan_to_num())


@lru_cache(maxsize=16)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=dtype, device=device).sqrt_()


def _tensors(batch: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield plain(leaf)
        elif isinstance(leaf, Mapping):  # a mapping class that pytrees do not know
            yield from _tensors(dict(leaf))


def check_loader(loader: Any) -> None:
    """Raises a TypeError unless you can iterate over the loader any number of times."""
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"the loader must be an iterable of batches, such as a DataLoader, got "
            f"{type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"each evaluation iterates over the loader, and an iterator ({type(loader).__name__}) "
            "can be used only once: pass a DataLoader, or a list of batches"
        )


def generators_of(loader: Any) -> list[torch.Generator]:
    """The loader's own random generators that decide on its order."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in own if isinstance(g, torch.Generator)}.values())


def batches_in(loader: Any) -> int | None:
    """Number of batches in one pass; None where the loader has no length."""
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an iterable data set has a length that raises
        return None


def samples_in(loader: Any, count: Callable[[Any], float] | None) -> float:
    """Number of samples in one pass, from the sampler where that is certain, else by counting.

    Args:
        loader: The loader.
        count: See `batch_size`.

    Raises:
        TypeError: See `batch_size`.
        ValueError: The loader gives no samples.
    """
    known = _length_of_sampler(loader) if count is None else None
    if known is None:
        with _random_state_kept(loader):
            total = float(sum(batch_size(batch, count) for batch in loader))
    else:
        total = float(known)
    if not total > 0:
        raise ValueError("there is nothing to compute a loss on: the loader gives no samples")
    return total


def _length_of_sampler(loader: Any) -> int | None:
    """Number of samples that a plain `DataLoader` gives; None for other loaders."""
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.collate_fn is not default_collate
        or type(loader.batch_sampler) is not BatchSampler
        or not isinstance(loader.sampler, _SIZED)
    ):
        return None
    total, size = len(loader.sampler), loader.batch_sampler.batch_size
    return total - total % size if loader.drop_last else total


@contextmanager
def _random_state_kept(loader: Any) -> Iterator[None]:
    """Restores the states of all random generators that the loader draws from."""
    states = [(g, g.get_state()) for g in generators_of(loader)]
    with torch.random.fork_rng(devices=[]):
        yield
    for generator, state in states:
        generator.set_state(state)
