"""CUDA graphs on the CPU: operations are recorded, undone, and repeated on the same memory.

As in a CUDA graph, numbers of Python are those of the recording, nothing that the host does is
repeated, and reading a number is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class SimulatedGraph(TorchDispatchMode):
    """A recording in the place of `torch_secondorder._optim.diagonal.replay.CudaRecording`.

    Args:
        generators: Sources of random numbers, which replays advance and recording does not.
        host: Counts that live on the host also where parameters are on a device.
    """

    def __init__(self, generators: Any = (), host: Any = ()) -> None:
        super().__init__()
        self.generators = [torch.default_generator, *generators]
        self.host = {tensor.data_ptr() for tensor in host}
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        self._own: set[int] = set()  # memory that the recording has made
        self._kept: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def record(self, run: Any) -> Any:
        states = [generator.get_state() for generator in self.generators]
        with self:
            result = run()
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                found = tensors_of(func(*args, **kwargs))
                for output, new in zip(outputs, found, strict=True):
                    if new is not output and new.data_ptr() != output.data_ptr():
                        output.copy_(new)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.data_ptr() in self.host for t in inputs if t.numel()):
            return func(*args, **kwargs)
        assert func.name() not in READS, f"{func} reads a number while a graph is recorded"
        assert (
            torch.Tag.dynamic_output_shape not in func.tags or func.name() == "aten::index.Tensor"
        )
        written = self._written(func, args, kwargs)
        for tensor in written:
            if tensor.untyped_storage().data_ptr() not in self._own:
                self._before.append((tensor.detach(), tensor.detach().clone()))
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        given = {t.untyped_storage().data_ptr() for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in given]
        self._own.update(t.untyped_storage().data_ptr() for t in fresh)
        if (written or fresh) and not func.name().startswith("aten::empty"):
            detached = [t.detach() for t in outputs]
            self.calls.append((func, args, kwargs, detached))
        self._kept += fresh  # so that nobody else gets the memory
        return result

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        return found


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]
