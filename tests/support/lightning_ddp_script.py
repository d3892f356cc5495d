"""Run by a test: trains on two processes, half of each batch on each, and saves the weights."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as host
import torch
from torch import Tensor

from tests.support.lightning_problems import (
    ALL_OPTIMIZERS,
    OPTIMIZERS,
    Batches,
    module,
    trainer,
    weights,
)
from torch_secondorder.integrations.lightning import CurvatureMonitor, SecondOrderMonitor


class Halves(Batches):
    """Half of each batch, which half depends on the process."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        for x, y in super().__iter__():
            half = slice(len(x) // 2 * rank, len(x) // 2 * (rank + 1))
            yield [x[half], y[half]]


def fit(name: str, folder: Path, **arguments: Any) -> Any:
    model = module(host, ALL_OPTIMIZERS[name]).double()
    monitors = [SecondOrderMonitor(), CurvatureMonitor(2, max_products=57, trace_products=57)]
    fitted = trainer(
        host,
        folder,
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
        callbacks=monitors,
        **arguments,
    )
    fitted.fit(model, Halves(dtype=torch.float64))
    figures = {k: float(v) for k, v in fitted.callback_metrics.items() if k != "loss"}
    return weights(model.net), figures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    found = {name: fit(name, folder) for name in (*OPTIMIZERS, "SOAP")}
    for name in ("AdaHessian", "Sophia"):
        found[f"{name}, accumulated"] = fit(name, folder, accumulate_grad_batches=2)
    torch.save(found, folder / f"{os.environ.get('LOCAL_RANK', '0')}.pt")
    # Else its threads may still run while the interpreter ends, which aborts the process at times.
    torch.distributed.destroy_process_group()
