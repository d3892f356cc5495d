"""Peak memory of training, in vectors of the parameters' length.

Storages of all tensors returned by operations are tracked until they are freed (a dispatch mode
sees backward passes too; the garbage collector is off). The network is large and the batch small,
so activations are negligible. Temporary memory inside kernels is not seen.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .harness import load_ours, progress
from .registry import Options
from .report import Report, Table

HISTORY = 20


class Alive(TorchDispatchMode):
    """A dispatch mode that tracks the storages of tensors.

    Args:
        least: Storages up to this number of bytes are ignored.

    Attributes:
        now: Number of bytes alive.
        peak: The largest such number.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._least = least
        self._held: dict[int, Any] = {}

    def note(self, tensor: Tensor) -> None:
        """Tracks a tensor from now on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or size <= self._least:
            return

        def gone(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and tracks its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def peak(make: Any, width: int, steps: int) -> float:
    """The peak in vectors, including parameters and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
    size = sum(p.numel() for p in model.parameters())
    x = torch.randn(4, width) * torch.logspace(0, -3, width)
    y = torch.randint(width, (4,))
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    gc.collect()
    gc.disable()
    try:
        with Alive() as alive:
            for p in model.parameters():
                alive.note(p.data)
            for _ in range(steps):
                optimizer.step(closure)
    finally:
        gc.enable()
    return alive.peak / 4 / size


def run(options: Options, report: Report) -> None:
    """Measures L-BFGS with several line searches, and Newton-CG with several curvatures."""
    lbfgs = load_ours("torch_secondorder", "LBFGS")
    newton = load_ours("torch_secondorder", "NewtonCG")
    if lbfgs is None or newton is None:
        return
    kept = partial(lbfgs, history_size=HISTORY, max_iter=10)
    # Numbers of vectors of the model and its graph: parameters and gradients; for products also
    # gradients with a graph, and the `J'w` of Gauss-Newton products.
    makers: dict[str, tuple[Any, int]] = {
        "LBFGS, strong Wolfe": (kept, 2),
        "LBFGS, lr = 3": (partial(kept, lr=3.0), 2),
        "LBFGS, Hager-Zhang": (partial(kept, line_search_fn="hager_zhang"), 2),
        "LBFGS, Armijo": (partial(kept, line_search_fn="armijo"), 2),
        "NewtonCG": (newton, 4),
        "NewtonCG, little damping": (partial(newton, damping=1e-6), 4),
        "NewtonCG, little damping, max_iter=3": (partial(newton, damping=1e-6, max_iter=3), 4),
        "NewtonCG, trust region": (partial(newton, globalization="trust_region"), 4),
        "NewtonCG, line search": (partial(newton, globalization="line_search"), 4),
        "NewtonCG, Hessian": (partial(newton, curvature="hessian", max_iter=3), 3),
        "NewtonCG, differences": (partial(newton, curvature_products="finite_difference"), 2),
    }
    width = 200 if options.quick else 1200
    title = f"Peak memory in vectors (m = {HISTORY} for L-BFGS), n = {4 * width**2 + 3 * width:,}"
    table = Table(title, ["optimizer", "all", "model and graph", "the rest"])
    for name in progress(list(makers), "distributed memory"):
        make, given = makers[name]
        found = peak(make, width, 4)
        rest = found - given
        beside = f" = 2m + {rest - 2 * HISTORY:.2f}" if "LBFGS" in name else ""
        table.add(name, f"{found:.2f}", str(given), f"{rest:.2f}{beside}")
        kept = {"all": found, "model_and_graph": given, "others": rest}
        report.record(f"distributed.memory.{name}", kept)
    report.show(table)
