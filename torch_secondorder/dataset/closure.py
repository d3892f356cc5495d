"""A closure over all of a data set, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any, Literal

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
from torch_secondorder.dataset._batches import as_pair, call, moved
from torch_secondorder.dataset._loader import (
    batches_in,
    check_loader,
    counted,
    samples_in,
)

__all__ = ["Amend", "DatasetClosure", "Use"]

#: Takes what computes the loss of a batch, and that batch's weight.
Use = Callable[[Callable[[], Tensor], float], None]

#: Computes the loss of a batch with something added to it. Takes what computes the loss itself, its
#: weight, the batch's share in the samples, and whether it is the last batch of a pass.
Amend = Callable[[Callable[[], Tensor], float, float, bool], Tensor]

_SOON = 2.0  # seconds; a pass that takes less shows no bar


class DatasetClosure:
    """The loss over a whole data set, as a closure for any optimizer.

    It goes over the loader, calls `backward()` for each batch and returns the loss: that of all
    samples as if they were one batch, whatever the batches' sizes. One batch is in memory at a
    time. `NewtonCG` takes its products by going over the loader again, batch by batch, so that they
    need no more memory either.

    All evaluations of a step see the same batches in the same order, also where the loader
    shuffles; one that gives others is refused. With a `DistributedDataParallel` model and a
    `DistributedSampler` the data set is that of all ranks.

    Args:
        model: The model; batches are moved to the device of its first parameter.
        loss_fn: Takes the model's output and the targets, returns a scalar.
        loader: Gives batches: a `DataLoader`, a list of batches, or another iterable that can be
            gone through many times.
        reduction: What `loss_fn` does over a batch. For `"mean"` losses are averaged with the
            batches' numbers of samples as weights, for `"sum"` they are added.
        forward: For batches that are not pairs `(inputs, targets)`: takes the model and a batch,
            returns the tuple of arguments for `loss_fn`, or the only one. By default inputs are
            a tensor, a tuple or list for several arguments of the model, or a dict for named ones.
        count: Takes a batch, returns its number of samples: where it is not the length of its first
            tensor, or where the mean is over something else, such as tokens that are not padding.
        keep_graphs: Of how many batches the graph is kept between the products of one point: of
            these a product costs about a third of the time, and memory for as many batches.
        progress: True for a progress bar over each pass, False for none, None for one where tqdm is
            installed, stderr is a terminal and the pass takes more than two seconds.

    Raises:
        TypeError: The model is no module, `loss_fn` cannot be called, or the loader is an iterator.
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
        self._amend: Amend | None = None

    def amended(self, amend: Amend) -> DatasetClosure:
        """The same closure with a term added to the loss, see `Amend`."""
        result = copy(self)
        result._amend = amend
        return result

    def __call__(self) -> Tensor:
        """Loss and gradient over the whole data set: the gradient in `p.grad`.

        Returns:
            The loss, 0-dim, detached.

        Raises:
            RuntimeError: The loader gave other samples than it held when they were counted.
            TypeError: A batch is no pair and there is no `forward`, or `loss_fn` returned no loss.
            ValueError: The loader gives no samples, or the loss is not a scalar.
        """
        return self.accumulate(self.over)

    def accumulate(self, over: Callable[[Use, str], None]) -> Tensor:
        """Loss and gradient over one pass, see `over`."""
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
            # Added up in float64 where there is one: a line search looks at the last digits.
            wide = loss if loss.device.type == "mps" else loss.double()
            total = wide if total is None else total + wide

        over(backward, "loss and gradient")
        assert total is not None  # a loader without samples is refused
        return total.to(dtype)

    def over(self, use: Use, label: str, look: Callable[[Any], None] = lambda batch: None) -> None:
        """Goes over the loader once.

        Args:
            use: Called for each batch with a function that computes its loss, and with its weight.
                The loss of the data set is the sum of losses times weights.
            label: What is done.
            look: Called first, with the batch.

        Raises:
            RuntimeError: The loader gave other samples than it held when they were counted.
        """
        total, shared = self._counted()
        seen = 0.0
        delay = 0.0 if self.progress else _SOON
        batches = batches_in(self.loader)
        with bar(self.progress, batches, label, unit="batch", delay=delay) as tell:
            for batch in self.loader:
                look(batch)
                n = counted(batch, self._count)
                seen += n
                last = _equal(seen, total)
                if not last and seen > total:
                    break
                if n:
                    share = n / shared
                    weight = share if self.reduction == "mean" else float(self._ranks)
                    compute = partial(self._loss, batch)
                    if self._amend is not None:
                        compute = partial(self._amend, compute, weight, share, last)
                    with self._alone(last):
                        use(compute, weight)
                tell(1)
        if not _equal(seen, total):
            raise RuntimeError(
                f"the loader gave {seen:g} samples or more in this pass, and {total:g} when they "
                "were counted: a mean needs their number before it begins. Make a new "
                "DatasetClosure where the data have changed; drop_last with a count of its own "
                "needs reduction='sum'"
            )

    def _loss(self, batch: Any) -> Tensor:
        parameter = next(self.model.parameters(), None)
        batch = moved(batch, None if parameter is None else parameter.device)
        if self._forward is None:
            inputs, targets = as_pair(batch, "forward=")
            return scalar(self.loss_fn(call(self.model, inputs), targets))
        arguments = self._forward(self.model, batch)
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        return scalar(self.loss_fn(*arguments))

    def _counted(self) -> tuple[float, float]:
        """The number of samples here, and its mean over the ranks."""
        if self._totals is None:
            total = samples_in(self.loader, self._count)
            shared = torch.tensor(total, dtype=torch.float64)
            if isinstance(self.model, DistributedDataParallel):
                parameter = next(self.model.parameters())
                shared = shared.to(parameter.device)
                dist.all_reduce(shared, group=self.model.process_group)
            self._totals = total, float(shared) / self._ranks
        return self._totals

    @property
    def _ranks(self) -> int:
        if isinstance(self.model, DistributedDataParallel):
            return dist.get_world_size(self.model.process_group)
        return 1

    def _alone(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over the ranks once a pass, with the last batch."""
        model = self.model
        # With a static graph PyTorch cannot put it off, and averages with each batch.
        if last or not isinstance(model, DistributedDataParallel) or model.static_graph:
            return nullcontext()
        context: AbstractContextManager[Any] = model.no_sync()
        return context


def _equal(seen: float, total: float) -> bool:
    """Whether all samples were seen; a sum of fractions depends on its order."""
    return seen == total or (not total.is_integer() and math.isclose(seen, total, rel_tol=1e-5))
