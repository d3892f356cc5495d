"""A callback that logs the curvature of the training loss at intervals."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder.diagnostics import (
    SpectralDensity,
    definiteness,
    eigenpairs,
    from_closure,
    spectral_density,
    trace,
)
from torch_secondorder.integrations.lightning._host import Callback
from torch_secondorder.integrations.lightning._unnoticed import cloned, loss_of, unnoticed

__all__ = ["CurvatureMonitor"]

Batch: TypeAlias = Literal["current", "first"]


class CurvatureMonitor(Callback):
    """Logs properties of the Hessian of the training loss, without changing the training.

    It works with any optimizer. Before every `every_n_steps`-th step it logs, to all loggers,

    * `curvature/top_eigenvalue`: the largest eigenvalue;
    * `curvature/trace`, and `curvature/trace_error`, its standard error;
    * `curvature/lowest`: the lowest curvature found, and `curvature/negative`: 1 if it is negative
      beyond rounding, else 0;

    and plots the density of the eigenvalues for TensorBoard loggers, if matplotlib is installed.
    The loss comes from a few additional calls of `training_step`: their logs are dropped, and
    metrics of torchmetrics, buffers, gradients and random states (of torch, NumPy and Python) are
    restored. Other side effects are not undone. Under DistributedDataParallel it is the mean loss
    of all ranks.

    Args:
        every_n_steps: Number of optimizer steps between two logs; the first is before any step.
        batch: `"current"` uses the batch of the coming step. `"first"` keeps the first batch of the
            training and uses it each time, so that you can compare the values.
        max_products: The largest number of products for each of the two ends of the spectrum.
        trace_products: Number of products for the trace, at least 3.
        spectrum_products: Number of products for the density; 0 for none.

    Raises:
        ValueError: An argument is out of range; or from `Trainer.fit`: the module uses manual
            optimization, in which `training_step` returns no loss.

    >>> monitor = CurvatureMonitor(every_n_steps=500)  # Trainer(callbacks=[monitor])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        batch: Batch = "current",
        *,
        max_products: int = 60,
        trace_products: int = 30,
        spectrum_products: int = 80,
    ) -> None:
        super().__init__()
        check_integer("every_n_steps", every_n_steps)
        check_choice("batch", batch, Batch)
        check_integer("max_products", max_products)
        check_integer("trace_products", trace_products, 3)
        if spectrum_products != 0:
            check_integer("spectrum_products", spectrum_products)
        self.every_n_steps = every_n_steps
        self.batch = batch
        self.max_products = max_products
        self.trace_products = trace_products
        self.spectrum_products = spectrum_products
        self._first_batch: tuple[Any, int] | None = None
        self._last_step: int | None = None  # the step of the last log
        self._succeeded = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_start`.

        Raises:
            ValueError: The module uses manual optimization.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "CurvatureMonitor takes the loss from training_step, which returns none with "
                "manual optimization; call torch_secondorder.diagnostics from training_step instead"
            )
        self._last_step = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_start`; logs the curvature when it is due."""
        if self.batch == "first" and self._first_batch is None:
            self._first_batch = cloned(batch), batch_idx
        step = trainer.global_step
        # Several batches may belong to one step, if gradients are accumulated.
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        used = self._first_batch or (batch, batch_idx)
        plots = self.spectrum_products > 0 and bool(_tensorboards(trainer)) and _can_plot()
        try:
            with unnoticed(pl_module):
                closure = loss_of(trainer, pl_module, *used)
                values, spectrum = self._measure(closure, pl_module, plots)
        except RuntimeError as error:
            if not self._succeeded:
                raise
            # The loss may have become infinite; handling that is up to the training.
            warnings.warn(f"no curvature before step {step}: {error}", stacklevel=2)
            return
        self._succeeded = True
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        if spectrum is not None and trainer.is_global_zero:
            for logger in _tensorboards(trainer):
                logger.experiment.add_figure("curvature/spectrum", _plotted(spectrum), step)

    def _measure(
        self, closure: Callable[[], Any], pl_module: Any, plots: bool
    ) -> tuple[dict[str, float], SpectralDensity | None]:
        """The values to log and the spectrum to plot, each from one evaluation of the closure."""
        problem = from_closure(closure, [p for p in pl_module.parameters() if p.requires_grad])
        top = eigenpairs(problem, 1, tolerance=1e-2, max_products=self.max_products, progress=False)
        total = trace(problem, self.trace_products, progress=False)
        # At least two products: one for the search, one for its certificate.
        lowest = definiteness(problem, max_products=max(2, self.max_products), progress=False)
        spectrum = None
        if plots:
            spectrum = spectral_density(problem, 1, self.spectrum_products, progress=False)
        values = {
            "curvature/top_eigenvalue": float(top.values[0]),
            "curvature/trace": total.value,
            "curvature/trace_error": total.standard_error,
            "curvature/lowest": lowest.curvature,
            "curvature/negative": float(lowest.semidefinite is False),
        }
        return values, spectrum


def _tensorboards(trainer: Any) -> list[Any]:
    """The trainer's TensorBoard loggers, from either package."""
    return [
        logger
        for logger in trainer.loggers
        if any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)
    ]


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _plotted(spectrum: SpectralDensity) -> Any:
    """A separate figure, independent of pyplot and its windows."""
    figure = importlib.import_module("matplotlib.figure").Figure(layout="constrained")
    spectrum.plot(figure.add_subplot())
    return figure
