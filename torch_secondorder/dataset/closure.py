"""A closure over a whole data set, computed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_secondorder._closure.validation import differentiable, scalar
from torch_secondorder._foundation.checks import (
    check_callable,
    check_choice,
    check_instance,
    check_integer,
)
from torch_secondorder._foundation.progress_bar import bar
from torch_secondorder.dataset._loader import (
    as_pair,
    batch_size,
    batches_in,
    call_model,
    check_loader,
    samples_in,
    to_device,
)

__all__ = ["AmendLoss", "DatasetClosure", "UseBatch"]

#: Takes a function that computes the loss of a batch, and the batch's weight.
UseBatch: TypeAlias = Callable[[Callable[[], Tensor], float], None]

#: Computes the loss of a batch with an added term. Takes the function that computes the plain loss,
#: its weight, the batch's share of the samples, and whether it is the last batch of the pass.
AmendLoss: TypeAlias = Callable[[Callable[[], Tensor], float, float, bool], Tensor]

_BAR_DELAY = 2.0  # seconds; a shorter pass shows no bar


class DatasetClosure:
    """The loss over a whole data set, as a closure for any optimizer.

    It iterates over the loader, calls `backward()` for each batch and returns the loss of all
    samples as if they were one batch, whatever the batch sizes. One batch is in memory at a time.
    `NewtonCG` computes its products in further passes over the loader, batch by batch, so they need
    no more memory either.

    All evaluations of a step see the same batches in the same order, even if the loader shuffles. A
    loader that gives other batches within a step raises an error. With a `DistributedDataParallel`
    model and a `DistributedSampler`, the data set is that of all ranks.

    Args:
        model: The model; batches are moved to the device of its first parameter.
        loss_fn: Takes the model's output and the targets, returns a scalar.
        loader: Gives batches: a `DataLoader`, a list of batches, or another iterable that you can
            iterate over many times.
        reduction: The reduction of `loss_fn` over a batch. With `"mean"` the losses are averaged,
            weighted by the number of samples; with `"sum"` they are added.
        forward: For batches that are not pairs `(inputs, targets)`: takes the model and a batch,
            returns the tuple of arguments for `loss_fn`, or a single argument. By default inputs
            are a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        count: Takes a batch, returns its number of samples. Give it if that is not the length of
            the first tensor, or if the mean is over something else, such as tokens without padding.
        keep_graphs: Number of batches whose graph is kept between products at the same point. A
            product with a kept graph takes about a third of the time, and each graph needs the
            memory of one batch.
        progress: True for a progress bar over each pass, False for none. None shows one if tqdm is
            installed, stderr is a terminal and the pass takes more than two seconds.

    Raises:
        TypeError: The model is not a module, `loss_fn` is not callable, or the loader is an
            iterator.
        ValueError: Another argument is out of range.

    >>> from torch_secondorder import LBFGS
    >>> x = torch.linspace(-1, 1, 10).unsqueeze(1)
    >>> data = torch.utils.data.TensorDataset(x, 2 * x + 1)
    >>> model = nn.Linear(1, 1)
    >>> loader = torch.utils.data.DataLoader(data, batch_size=4)
    >>> closure = DatasetClosure(model, nn.functional.mse_loss, loader)
    >>> loss = LBFGS(model.parameters(), max_iter=20).step(closure)
    >>> round(model.weight.item(), 3), round(model.bias.item(), 3)
    (2.0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        loader: Iterable[Any],
        *,
        reduction: Literal["mean", "sum"] = "mean",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        count: Callable[[Any], float] | None = None,
        keep_graphs: int = 0,
        progress: bool | None = None,
    ) -> None:
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        check_callable("loss_fn", loss_fn)
        check_callable("forward", forward, optional=True)
        check_callable("count", count, optional=True)
        check_loader(loader)
        check_choice("reduction", reduction, ("mean", "sum"))
        check_integer("keep_graphs", keep_graphs, 0)
        self.model = model
        self.loss_fn = loss_fn
        self.loader = loader
        self.reduction = reduction
        self.keep_graphs = keep_graphs
        self.progress = progress
        self._forward = forward
        self._count = count
        self._totals: tuple[float, float] | None = None
        self._amend: AmendLoss | None = None

    def amended(self, amend: AmendLoss) -> DatasetClosure:
        """A copy of this closure with a term added to the loss, see `AmendLoss`."""
        result = copy(self)
        result._amend = amend
        return result

    def __call__(self) -> Tensor:
        """Computes the loss of the whole data set, and its gradient in `p.grad`.

        Returns:
            The loss, 0-dim, detached.

        Raises:
            RuntimeError: The number of samples has changed since they were counted.
            TypeError: A batch is not a pair and there is no `forward`, or `loss_fn` returned no
                loss.
            ValueError: The loader gives no samples, or the loss is not a scalar.
        """
        return self.accumulate(self.for_each_batch)

    def accumulate(self, for_each_batch: Callable[[UseBatch, str], None]) -> Tensor:
        """Loss and gradient from one pass.

        Args:
            for_each_batch: Makes the pass, see `DatasetClosure.for_each_batch`.
        """
        for module in (self.model, self.loss_fn):
            if isinstance(module, nn.Module):
                module.zero_grad()
        total: Tensor | None = None
        dtype = torch.float32

        def backward(compute: Callable[[], Tensor], weight: float) -> None:
            nonlocal total, dtype
            loss = compute() * weight
            differentiable(loss).backward()
            loss, dtype = loss.detach(), loss.dtype
            # Added up in float64 where available: a line search compares the last digits.
            wide = loss if loss.device.type == "mps" else loss.double()
            total = wide if total is None else total + wide

        for_each_batch(backward, "loss and gradient")
        assert total is not None  # a loader without samples raises before
        return total.to(dtype)

    def for_each_batch(
        self, use: UseBatch, label: str, inspect: Callable[[Any], None] = lambda batch: None
    ) -> None:
        """Makes one pass over the loader.

        Args:
            use: Called for each batch with a function that computes its loss, and with its weight.
                The loss of the data set is the sum of losses times weights.
            label: The label of the progress bar.
            inspect: Called first, with the batch.

        Raises:
            RuntimeError: The number of samples has changed since they were counted.
        """
        total, rank_mean = self._sample_counts()
        seen = 0.0
        delay = 0.0 if self.progress else _BAR_DELAY
        batches = batches_in(self.loader)
        with bar(self.progress, batches, label, unit="batch", delay=delay) as advance:
            for batch in self.loader:
                inspect(batch)
                n = batch_size(batch, self._count)
                seen += n
                last = _equal(seen, total)
                if not last and seen > total:
                    break
                if n:
                    share = n / rank_mean
                    weight = share if self.reduction == "mean" else float(self._ranks)
                    compute = partial(self.loss, batch)
                    if self._amend is not None:
                        compute = partial(self._amend, compute, weight, share, last)
                    with self._gradient_sync(last):
                        use(compute, weight)
                advance(1)
        if not _equal(seen, total):
            raise RuntimeError(
                f"the loader gave {seen:g} samples or more in this pass, and {total:g} when they "
                "were counted: a mean needs the number of samples in advance. If the data have "
                "changed, make a new DatasetClosure; drop_last together with count= needs "
                "reduction='sum'"
            )

    def loss(self, batch: Any) -> Tensor:
        """The loss of one batch, without a term added by `amended`."""
        parameter = next(self.model.parameters(), None)
        batch = to_device(batch, None if parameter is None else parameter.device)
        if self._forward is None:
            inputs, targets = as_pair(batch, "forward=")
            return scalar(self.loss_fn(call_model(self.model, inputs), targets))
        arguments = self._forward(self.model, batch)
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        return scalar(self.loss_fn(*arguments))

    def _sample_counts(self) -> tuple[float, float]:
        """The number of samples on this rank, and its mean over the ranks."""
        if self._totals is None:
            total = samples_in(self.loader, self._count)
            summed = torch.tensor(total, dtype=torch.float64)
            if isinstance(self.model, DistributedDataParallel):
                parameter = next(self.model.parameters())
                summed = summed.to(parameter.device)
                dist.all_reduce(summed, group=self.model.process_group)
            self._totals = total, float(summed) / self._ranks
        return self._totals

    @property
    def _ranks(self) -> int:
        if isinstance(self.model, DistributedDataParallel):
            return dist.get_world_size(self.model.process_group)
        return 1

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """A context in which gradients are averaged over the ranks only for the last batch."""
        model = self.model
        # With a static graph PyTorch cannot postpone the average, and takes it for each batch.
        if last or not isinstance(model, DistributedDataParallel) or model.static_graph:
            return nullcontext()
        context: AbstractContextManager[Any] = model.no_sync()
        return context


def _equal(seen: float, total: float) -> bool:
    """Compares numbers of samples; fractions are compared loosely, for they are rounded."""
    return seen == total or (not total.is_integer() and math.isclose(seen, total, rel_tol=1e-5))
