"""Training steps recorded as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._closure.validation import check_is_closure
from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.replay import (
    CudaRecording,
    HostWaits,
    Rates,
    RecordedStep,
    Recording,
    kind_of_step,
    why_not_recorded,
)

__all__ = ["CapturedStep"]


class CapturedStep:
    """Steps of an optimizer that a GPU repeats from CUDA graphs, for small networks.

    A small network takes a GPU less time than Python needs to launch its kernels. A CUDA graph
    launches all kernels of a step (forward pass, backward pass, products with the curvature,
    update) at once. `torch.cuda.graph` alone does not suffice for optimizers whose steps differ:
    `AdaHessian` and `Sophia` estimate the curvature in some steps only, and their random numbers
    and counts have to go on. This class records one graph for each kind of step, replays the one
    that is due, and does the rest on the host, so that training goes on as without it:

        step = CapturedStep(optimizer, closure)
        for x, y in loader:
            loss = step(x, y)  # in place of optimizer.step(closure)

    The closure is the standard one, with the batch as its arguments. A step runs as usual, without
    a graph, if

    * parameters are not on a CUDA device, or on several, or training is distributed;
    * it is among the first: `warm_up` steps, and those that all estimate the curvature;
    * the batch has another shape than those before, as the last one of an epoch;
    * the host decides in it: steps of `SOAP` and `Shampoo` that factorize matrices, and of `KFAC`
      that estimate the curvature;
    * it has an operation that waits for the device. `reason` names it.

    A graph repeats what the closure did when it was recorded: it reads the same tensors, and
    numbers of Python keep the values that they had. Pass what changes from step to step as an
    argument, and make a new `CapturedStep` after changing the model, its mode included. Learning
    rates may change at any time. Other hyperparameters and a loaded state are noticed, and new
    graphs recorded. Each graph keeps the memory of its activations, and of gradients: the next step
    overwrites those that you have kept.

    This class is experimental: recording and replay have been tested in a simulation of CUDA graphs
    on a CPU, and have not run on a GPU yet.

    Args:
        optimizer: An `AdaHessian`, `Sophia`, `SOAP`, `Shampoo` or `KFAC`, with `capturable=True`
            or on a GPU the default.
        closure: Takes the batch; sets the gradients to None, as `zero_grad()` does, computes the
            loss, calls `backward()` and returns the loss.
        warm_up: The number of steps that run as usual before any is recorded.

    Attributes:
        optimizer: The optimizer.
        reason: The reason why no step is recorded; empty if there is none.

    Raises:
        TypeError: The optimizer is another one, or the closure is not callable.
        ValueError: `warm_up` is not a positive integer.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> x = torch.ones(2, device=device, requires_grad=True)
    >>> optimizer = torch.optim.SGD([x])
    >>> CapturedStep(optimizer, print)
    Traceback (most recent call last):
        ...
    TypeError: CapturedStep takes AdaHessian, Sophia, SOAP, Shampoo and KFAC, got SGD: ...
    """

    def __init__(
        self, optimizer: Optimizer, closure: Callable[..., Tensor], *, warm_up: int = 3
    ) -> None:
        if not isinstance(optimizer, DiagonalOptimizer):
            raise TypeError(
                "CapturedStep takes AdaHessian, Sophia, SOAP, Shampoo and KFAC, got "
                f"{type(optimizer).__name__}: others decide on the host within a step, and "
                "wrappers change the loss; call optimizer.step(closure)"
            )
        check_is_closure(closure)
        check_integer("warm_up", warm_up)
        self.optimizer: DiagonalOptimizer = optimizer
        self.reason = ""
        self._closure = closure
        self._warm_up = warm_up
        self._steps = 0  # that ran as usual, with batches like the last one
        self._like: Hashable = None  # what the last batch was like
        self._inputs: list[Any] = []  # of the graphs, as a list of leaves
        self._recorded: dict[str, RecordedStep] = {}
        self._examined: set[str] = set()  # kinds of which a step has been seen to wait for nothing
        self._rates: Rates | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def captured(self) -> tuple[str, ...]:
        """The kinds of steps that there is a graph of: "plain", "estimate"."""
        return tuple(sorted(self._recorded))

    def __call__(self, *inputs: Any) -> Tensor:
        """Performs one step.

        Args:
            inputs: The batch, in any trees of tensors and other objects. Tensors are moved to the
                device of the parameters, if all are on the same.

        Returns:
            The closure's loss, detached.

        Raises:
            RuntimeError: A step could not be recorded, or what `optimizer.step` raises.
        """
        devices = {p.device for group in self.optimizer.param_groups for p in group["params"]}
        leaves, structure = pytree.tree_flatten(inputs)
        if len(devices) == 1:
            (device,) = devices
            leaves = [
                leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]
            inputs = pytree.tree_unflatten(leaves, structure)
        if self.reason or not any(map(can_record, devices)):
            return self._run(inputs)
        if reason := why_not_recorded(self.optimizer, devices):
            self._give_up(reason)
            return self._run(inputs)
        return self._recorded_step(leaves, structure, device)

    def _recorded_step(self, leaves: list[Any], structure: Any, device: torch.device) -> Tensor:
        """A step from a graph, if there is one or it is time to record it."""
        like = _likeness(leaves, structure, device)
        if like is None or like != self._like:
            if not self._recorded:
                self._like, self._steps = like, 0
            return self._run_on_stream(pytree.tree_unflatten(leaves, structure), device, None)
        kind = kind_of_step(self.optimizer)
        recorded = None if kind is None else self._recorded.get(kind)
        if recorded is not None and not recorded.fits(self.optimizer):
            self._forget()
            recorded = None
        if recorded is not None:
            self._load(leaves)
            recorded.replay(self.optimizer)
            return recorded.loss
        if kind is None or kind not in self._examined or self._steps < self._warm_up:
            self._steps += 1
            return self._run_on_stream(pytree.tree_unflatten(leaves, structure), device, kind)
        self._load(leaves)
        return self._record(kind, pytree.tree_unflatten(self._inputs, structure), device).loss

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._forget()
        warnings.warn(
            f"steps of {type(self.optimizer).__name__} run without CUDA graphs: {reason}",
            stacklevel=3,
        )

    def _forget(self) -> None:
        """Drops all graphs; the coming steps run as usual."""
        self._recorded, self._inputs, self._rates = {}, [], None
        self._examined, self._steps = set(), 0

    def _run(self, inputs: Any) -> Tensor:
        return self.optimizer.step(partial(self._closure, *inputs))

    def _run_on_stream(self, inputs: Any, device: torch.device, kind: str | None) -> Tensor:
        """A step without a graph, on the stream that graphs are recorded on.

        PyTorch keeps with some objects the stream that they were made on, and a graph must not meet
        another one.

        Args:
            inputs: The batch.
            device: The device.
            kind: The kind of step to look for operations that wait; None for not looking.
        """
        with self._on_stream(device):
            # The first step after a change may put the state into other memory, which waits.
            if kind is None or kind in self._examined or self._steps < 2:
                return self._run(inputs)
            self.optimizer._check_groups()  # reads rates that are tensors, once after a change
            with HostWaits(host_counts(self.optimizer)) as waits:
                loss = self._run(inputs)
        if waits.found:
            self._give_up(
                f"{waits.found[0]} in the closure or the step waits for the device; leave out "
                "item(), prints of tensors, masks as indices, tensors made from numbers, and "
                "zero_grad(set_to_none=False)"
            )
        self._examined.add(kind)
        return loss

    @contextmanager
    def _on_stream(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _load(self, leaves: list[Any]) -> None:
        """Puts a batch where the graphs read it."""
        if not self._inputs:
            self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return
        for held, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(leaf, non_blocking=True)

    def _record(self, kind: str, inputs: Any, device: torch.device) -> RecordedStep:
        if self._rates is None:
            self._rates = Rates(self.optimizer, device)
        generator = self.optimizer._generator
        generators = [] if generator is None else [generator]
        recording = new_recording(self.optimizer, self._stream, generators)
        try:
            found = RecordedStep(self.optimizer, self._rates, recording, partial(self._run, inputs))
        except RuntimeError as error:
            raise RuntimeError(
                f"this step of {type(self.optimizer).__name__} cannot be recorded as a CUDA graph; "
                f"call optimizer.step(closure) instead of a CapturedStep: {error}"
            ) from error
        self._recorded[kind] = found
        return found


def can_record(device: torch.device) -> bool:
    """True for a device whose operations can be recorded."""
    return device.type == "cuda"


def new_recording(
    optimizer: DiagonalOptimizer, stream: Any, generators: list[torch.Generator]
) -> Recording:
    """A recording that is empty."""
    return CudaRecording(stream, generators)


def host_counts(optimizer: DiagonalOptimizer) -> list[Tensor]:
    """The counts of steps that are on the host also for parameters on a device."""
    counts = (state.get("host_step") for state in optimizer.state.values())
    return [count for count in counts if isinstance(count, Tensor)]


def _likeness(leaves: list[Any], structure: Any, device: torch.device) -> Hashable:
    """A value that batches of one graph have in common; None for batches that no graph serves."""
    kind = device.type
    marks: list[Hashable] = [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            marks.append((type(leaf), leaf))
        elif leaf.layout is torch.strided and not leaf.requires_grad:
            marks.append((leaf.shape, leaf.dtype))
        else:
            return None
    try:
        hash(tuple(marks))
    except TypeError:
        return None
    return (structure, *marks)
