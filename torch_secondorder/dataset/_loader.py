"""A loader that is gone through again and again: how much it holds, and what it draws from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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

from torch_secondorder.dataset._batches import length

__all__ = ["batches_in", "check_loader", "counted", "generators", "samples_in"]

# Samplers that give as many indices as their length says.
_SIZED = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def check_loader(loader: Any) -> None:
    """Raises a TypeError unless this can be gone through any number of times."""
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"the loader must be an iterable of batches, such as a DataLoader, got "
            f"{type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"the loader is gone through at every evaluation, and an iterator "
            f"({type(loader).__name__}) only once: pass a DataLoader, or a list of batches"
        )


def generators(loader: Any) -> list[torch.Generator]:
    """The random generators of a loader's own that decide on its order."""
    batches = getattr(loader, "batch_sampler", None)
    places = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = (getattr(place, "generator", None) for place in places)
    return list({id(g): g for g in own if isinstance(g, torch.Generator)}.values())


def batches_in(loader: Any) -> int | None:
    """How many batches a pass gives, if the loader says."""
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an iterable data set has a length that raises
        return None


def samples_in(loader: Any, count: Callable[[Any], float] | None) -> float:
    """How many samples a pass gives: from the sampler if that is certain, else counted in one.

    Args:
        loader: The loader.
        count: Samples in a batch; the length of its first tensor if None.

    Raises:
        TypeError: A batch has no tensor to take its length from.
        ValueError: There is none.
    """
    known = _length_of_sampler(loader) if count is None else None
    if known is None:
        with _untouched(loader):
            total = float(sum(counted(batch, count) for batch in loader))
    else:
        total = float(known)
    if not total > 0:
        raise ValueError("there is nothing to compute a loss on: the loader gives no samples")
    return total


def counted(batch: Any, count: Callable[[Any], float] | None) -> float:
    """Samples in a batch."""
    if count is not None:
        return float(count(batch))
    found = length(batch)
    if found is None:
        raise TypeError(
            f"a batch of type {type(batch).__name__} has no tensor whose length could be the "
            "number of its samples: pass count=, a function of the batch"
        )
    return found


def _length_of_sampler(loader: Any) -> int | None:
    """How many samples a plain `DataLoader` gives; None for any other."""
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
def _untouched(loader: Any) -> Iterator[None]:
    """What is drawn inside is drawn again after it."""
    states = [(g, g.get_state()) for g in generators(loader)]
    with torch.random.fork_rng(devices=[]):
        yield
    for generator, state in states:
        generator.set_state(state)
