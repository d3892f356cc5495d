"""Memory that an optimizer keeps from step to step."""

from __future__ import annotations

import contextlib
import copy
import gc

import torch
from torch import Tensor

from .harness import progress
from .kronecker_contenders import Make, Problem, contenders, problems, take_steps
from .registry import Options
from .report import Report, Table


def storages() -> dict[int, int]:
    """Bytes of each storage that a tensor of this process uses, by address."""
    found = {}
    for tensor in gc.get_objects():
        # The type: `isinstance` asks some objects for attributes that they warn about. Subclasses
        # need not have a storage.
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            with contextlib.suppress(NotImplementedError):  # wrappers of torch.func have none
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def kept(problem: Problem, make: Make) -> int:
    """Bytes that an optimizer keeps after one period of steps, without parameters and gradients."""
    model = copy.deepcopy(problem.model)
    gc.collect()
    before = storages()
    optimizer = make(model.parameters(), lr=1e-3)
    take_steps(problem, model, optimizer)
    optimizer.zero_grad()
    gc.collect()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for at, size in storages().items() if at not in before and at not in own)


def run(options: Options, report: Report) -> None:
    """Measures each network, in multiples of the memory of its parameters."""
    makers = contenders(options)
    cases = list(problems(options))
    table = Table(
        "Memory kept between steps, in multiples of the parameters",
        ["optimizer", *(problem.name for problem in cases)],
    )
    for name in progress(list(makers), "kronecker memory"):
        cells = []
        for problem in cases:
            size = sum(p.numel() * p.element_size() for p in problem.model.parameters())
            bytes_kept = kept(problem, makers[name])
            cells.append(f"{bytes_kept / size:.2f}")
            report.record(f"kronecker.memory.{problem.name}.{name}", bytes_kept / size)
        table.add(name, *cells)
    report.show(table)
