"""Bytes that a rank passes to collectives, with two gloo ranks on this machine."""

from __future__ import annotations

import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .harness import load_ours
from .registry import Options
from .report import Report, Table

RANKS, HISTORY = 2, 20
#: Optimizers by name in the package, with arguments.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    f"LBFGS, m = {HISTORY}": ("LBFGS", {"history_size": HISTORY, "max_iter": 1, "max_eval": 20}),
    "NewtonCG": ("NewtonCG", {}),
    "AdaHessian": ("AdaHessian", {}),
    "AdaHessian, every 10 steps": ("AdaHessian", {"update_period": 10}),
    "Sophia, gnb": ("Sophia", {"estimator": "gnb"}),
}


class Counter:
    """Counts what this process passes to `torch.distributed`, and to the buckets of a module."""

    def __init__(self) -> None:
        self.sent = self.messages = self.buckets = 0
        for name in ("all_reduce", "broadcast", "all_gather", "reduce", "reduce_scatter_tensor"):
            setattr(dist, name, partial(self._counted, getattr(dist, name)))

    def _counted(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self.sent += sum(t.numel() * t.element_size() for t in tensors)
        self.messages += 1
        return call(*args, **kwargs)

    def hook(self, group: Any, bucket: Any) -> Any:
        """Averages a bucket of gradients, as DDP does by default."""
        buffer = bucket.buffer()
        self.buckets += buffer.numel() * buffer.element_size()
        work = group.allreduce([buffer.div_(RANKS)])
        return work.get_future().then(lambda future: future.value()[0])


def _rank(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    counter, found = Counter(), {}
    for name, (kind, arguments) in CONTENDERS.items():
        optimizer_class = load_ours("torch_secondorder", kind)
        if optimizer_class is None:
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
        parallel = DistributedDataParallel(model)
        # A lambda, because DDP checks annotations of functions, and here these are strings.
        parallel.register_comm_hook(
            dist.group.WORLD, lambda group, bucket: counter.hook(group, bucket)
        )
        optimizer = optimizer_class(parallel.parameters(), **arguments)
        x, y = torch.randn(256, 64).chunk(RANKS)[rank], torch.randint(10, (256,)).chunk(RANKS)[rank]

        def closure(
            optimizer: Any = optimizer, model: Any = parallel, x: Any = x, y: Any = y
        ) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # the optimizer finds the modules in this step
        counter.sent = counter.messages = counter.buckets = evaluations = 0
        for _ in range(steps):
            optimizer.step(closure)
            evaluations += optimizer.info.evaluations
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": counter.sent / steps,
            "messages": counter.messages / steps,
            "gradient_bytes": counter.buckets / steps,
            "evaluations": evaluations / steps,
        }
        del optimizer, parallel, closure
    torch.save(found, f"{folder}/rank{rank}")
    gc.collect()
    dist.destroy_process_group()


def run(options: Options, report: Report) -> None:
    """Counts over several steps of one iteration each."""
    if not dist.is_available():
        return
    steps = 10 if options.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, steps), nprocs=RANKS)
        ranks = [torch.load(Path(folder) / f"rank{rank}") for rank in range(RANKS)]
    title = f"Data passed to collectives in an iteration (mean of {steps}, two gloo ranks)"
    columns = ["optimizer", "evaluations", "DDP's buckets", "ours", "our messages"]
    table = Table(title, columns)
    for name, values in ranks[0].items():
        table.add(
            name,
            f"{values['evaluations']:.2f}",
            f"{values['gradient_bytes']:,.0f} B",
            f"{values['bytes']:,.0f} B",
            f"{values['messages']:.1f}",
        )
        report.record(f"distributed.communication.{name}", [found[name] for found in ranks])
    report.show(table)
    print(f"one vector: {4 * next(iter(ranks[0].values()))['parameters']:,} B")
