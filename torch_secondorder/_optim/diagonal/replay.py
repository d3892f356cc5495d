"""Steps that are recorded as CUDA graphs, and what the host does when one is replayed.

A graph repeats the operations of a step on the memory that they had. What the host does besides
(counting, the choice of the kind of step, the report, `p.grad`) is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from torch_secondorder._closure.data_parallel import several_processes
from torch_secondorder._foundation.private_torch import OPTIMIZER_HOOKS, DispatchMode
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.settings import settings_of

_Result = TypeVar("_Result")


class Recording(Protocol):
    """Operations on a device that can be repeated."""

    def record(self, run: Callable[[], _Result]) -> _Result:
        """Records the operations of a function; they are not carried out."""

    def replay(self) -> None:
        """Carries them out."""


class CudaRecording:
    """A CUDA graph.

    Args:
        stream: The stream to record on.
        generators: Sources of random numbers besides torch's own.
    """

    def __init__(self, stream: torch.cuda.Stream, generators: Sequence[torch.Generator]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = stream
        for generator in generators:
            self._graph.register_generator_state(generator)

    def record(self, run: Callable[[], _Result]) -> _Result:
        """See `Recording`."""
        # Other threads, such as those that pin the memory of batches, go on meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """See `Recording`."""
        self._graph.replay()


class HostWaits(DispatchMode):  # type: ignore[misc]
    """Notes operations that no CUDA graph can record, because they wait for the device.

    These read values of tensors, make tensors whose shapes depend on values, or copy between host
    and device.

    Attributes:
        found: The names of the operations met, in their order.
    """

    # A closure may have such operations; what they do inside is not looked at.
    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: compiled functions shall run compiled. Some may not run in any other way."""
        return True

    def __init__(self, ignored: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.found: list[str] = []
        self._ignored = {id(tensor) for tensor in ignored}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._waits(func, args, result):
            self.found.append(func.name())
        return result

    def _waits(self, func: Any, args: Sequence[Any], result: Any) -> bool:
        if args and id(args[0]) in self._ignored:
            return False
        if func.name() in _READS:
            return True
        if func.name() in _INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            # Kernels fill with a number of the host without counting entries.
            fills = len(masks) == 1 and len(args) > 2 and args[2].is_cpu and args[2].numel() == 1
            return bool(masks) and not fills
        if torch.Tag.dynamic_output_shape in getattr(func, "tags", ()):
            return True
        if func.name() in _COPIES and isinstance(result, Tensor):
            sources = [a for a in args[:2] if isinstance(a, Tensor)]
            return any(source.is_cpu != result.is_cpu for source in sources)
        return False


# Numbers, and decompositions that check on the host whether they have succeeded.
_READS = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "equal", "is_nonzero", "_linalg_check_errors"),
        *("_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_eigvals"),
    )
)
_INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")
_COPIES = ("aten::_to_copy", "aten::copy_")


def kind_of_step(optimizer: DiagonalOptimizer) -> str | None:
    """The kind of the coming step, "plain" or "estimate"; None for one that has to run anew.

    Steps of one kind consist of the same operations. First steps run anew, and those that estimate
    out of turn or factorize matrices.
    """
    params, schedule, layout = optimizer._trainable, optimizer._schedule, optimizer._layout
    if not params or not layout.blocks or optimizer._observation is not None:
        return None
    due = schedule.is_due(params, optimizer.param_groups[0])
    if not schedule.is_settled(params) or layout.lacks_curvature:
        return None
    for block in layout.blocks:
        step = int(block.host_step.item()) + 1 if "host_step" in block.counts else 0
        if optimizer._has_decisions(step, block.group):
            return None
    return "estimate" if due else "plain"


def why_not_recorded(optimizer: DiagonalOptimizer, devices: Collection[torch.device]) -> str:
    """The reason why no step of this optimizer can be recorded; empty if there is none.

    Args:
        optimizer: The optimizer.
        devices: Those of its parameters.
    """
    if len(devices) > 1:
        return "parameters are on several devices"
    if not optimizer._on_device:
        return "capturable=False lets the host decide in each step"
    if several_processes():
        return "a graph would have to hold the messages between the processes"
    if any(getattr(optimizer, name, None) for name in OPTIMIZER_HOOKS[:2]):
        return "hooks of steps are not called when a graph is replayed"
    return ""


class RecordedStep:
    """One kind of step as a recording.

    Args:
        optimizer: The optimizer, after a step of this kind that ran as usual.
        rates: See `Rates`.
        recording: Empty.
        run: Makes the step and returns its loss.
    """

    def __init__(
        self,
        optimizer: DiagonalOptimizer,
        rates: Rates,
        recording: Recording,
        run: Callable[[], Tensor],
    ) -> None:
        self._recording = recording
        self._rates = rates
        optimizer._prepare_capture()
        before = _HostState(optimizer)
        try:
            with rates:
                self._loss = recording.record(run)
        except BaseException:
            before.restore()
            raise
        self._settings = rates.other_settings()
        self._params = optimizer._trainable
        self._gradients = [p.grad for p in self._params]
        self._blocks = optimizer._layout.blocks
        assert optimizer._made is not None
        self._made = optimizer._made
        self._set = {name: getattr(optimizer, name) for name in optimizer._set_by_steps}
        recording.replay()

    @property
    def loss(self) -> Tensor:
        """The loss of the last step, a new tensor."""
        return self._loss.clone()

    def fits(self, optimizer: DiagonalOptimizer) -> bool:
        """True if parameters, state and hyperparameters are still those that were recorded."""
        params = optimizer._trainable
        return (
            optimizer._layout.blocks is self._blocks
            and len(params) == len(self._params)
            and all(map(_is, params, self._params))
            and self._rates.other_settings() == self._settings
            and all(block.is_intact(optimizer.state) for block in self._blocks)
        )

    def replay(self, optimizer: DiagonalOptimizer) -> None:
        """Makes the step again, with the inputs and learning rates that are there now."""
        self._rates.update()
        self._recording.replay()
        params, schedule, check = self._params, optimizer._schedule, self._made[0]
        for p, gradient in zip(params, self._gradients, strict=True):
            p.grad = gradient
        for name, value in self._set.items():
            setattr(optimizer, name, value)
        for block in self._blocks:
            if "host_step" in block.counts:
                block.host_step.add_(1.0)
        due = schedule.count(params, optimizer.param_groups[0], check, optimizer._layout)
        optimizer._conclude(params, self._made)
        optimizer._listen_if(due, params, optimizer._last_trace)


def _is(one: object, other: object) -> bool:
    return one is other


class _HostState:
    """The part of an optimizer's state that a step changes while it is recorded.

    The rest is on the device, where a recording carries nothing out.

    Args:
        optimizer: The optimizer, before the step.
    """

    def __init__(self, optimizer: DiagonalOptimizer) -> None:
        self._optimizer = optimizer
        self._schedule = dict(vars(optimizer._schedule))
        names = ("_last_trace", "_made", "_info", *optimizer._set_by_steps)
        self._attributes = {name: getattr(optimizer, name) for name in names}
        self._gradients = [(p, p.grad) for p in optimizer._trainable]
        blocks = [block for block in optimizer._layout.blocks if "host_step" in block.counts]
        self._counts = [(block, block.host_step.clone()) for block in blocks]

    def restore(self) -> None:
        """Takes back what a step has changed that was not made."""
        vars(self._optimizer._schedule).update(self._schedule)
        for name, value in self._attributes.items():
            setattr(self._optimizer, name, value)
        for p, gradient in self._gradients:
            p.grad = gradient
        for block, count in self._counts:
            block.host_step.copy_(count)
        self._optimizer._listen()


class Rates:
    """The learning rates of all groups as tensors on the device, while a step is recorded.

    A recording keeps numbers as they were. Rates change, by schedulers for instance, so it reads
    them from tensors, which are set before each replay. Groups keep the numbers that they have.

    Args:
        optimizer: The optimizer.
        device: The device.
    """

    def __init__(self, optimizer: DiagonalOptimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._held: list[Any] = []
        self._tensors: list[Tensor] = []
        self._numbers: list[float] = []

    def other_settings(self) -> list[object]:
        """All hyperparameters but the rates; equal lists mean that none has changed."""
        optimizer = self._optimizer
        names = [name for name in optimizer.defaults if name != "lr"]
        rates = [self._tensor_of(group) for group in optimizer.param_groups]
        return [*settings_of(optimizer.param_groups, names), *map(id, rates)]

    def _tensor_of(self, group: dict[str, Any]) -> Tensor | None:
        """The rate of a group, if that is a tensor on a device already."""
        rate = group["lr"]
        return rate if isinstance(rate, Tensor) and rate.device == self._device else None

    def update(self) -> None:
        """Sets the tensors to the rates of the groups.

        Raises:
            ValueError: A rate is out of range; nothing has changed.
        """
        numbers = [
            0.0 if self._tensor_of(group) is not None else float(group["lr"])
            for group in self._optimizer.param_groups
        ]
        for group, number, old in zip(
            self._optimizer.param_groups, numbers, self._numbers, strict=True
        ):
            if number != old:
                self._optimizer._check_group(group)
        for i, (tensor, number) in enumerate(zip(self._tensors, numbers, strict=True)):
            if number != self._numbers[i]:
                tensor.fill_(number)
        self._numbers = numbers

    def __enter__(self) -> None:
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if not self._tensors:
            dtype = torch.float32 if self._device.type == "mps" else torch.float64
            self._numbers = [float("nan")] * len(groups)
            self._tensors = [torch.zeros((), dtype=dtype, device=self._device) for _ in groups]
        self.update()
        self._held = [group["lr"] for group in groups]
        for group, tensor in zip(groups, self._tensors, strict=True):
            if self._tensor_of(group) is None:
                group["lr"] = tensor
        # The numbers were checked in the step before; the check of a tensor waits for it.
        optimizer._checked = settings_of(groups, optimizer.defaults)

    def __exit__(self, *_: object) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._held, strict=True):
            group["lr"] = rate
        self._optimizer._checked = None
