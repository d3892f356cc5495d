"""Looks at the curvature of the training loss now and then."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal

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

Batch = Literal["current", "first"]


class CurvatureMonitor(Callback):
    """Logs what the Hessian of the training loss is like, and leaves the training as it was.

    With any optimizer. Before every `every_n_steps`-th step it logs, to all loggers,

    * `curvature/top_eigenvalue`: the largest eigenvalue;
    * `curvature/trace`, and `curvature/trace_error`, its standard error;
    * `curvature/lowest`: the lowest curvature found, and `curvature/negative`: 1 if it is negative
      beyond rounding, else 0;

    and draws the density of the eigenvalues for loggers to TensorBoard, where matplotlib is
    installed. The loss is that of `training_step`, which is called a few times more: what it logs
    is dropped, metrics of torchmetrics, buffers, gradients and random states (of torch, NumPy and
    Python) are put back. What it does to anything else stays done. Under DistributedDataParallel
    it is the mean loss of all ranks.

    Args:
        every_n_steps: Steps of the optimizer from one look to the next; the first is before any.
        batch: `"current"` looks at the batch of the coming step; `"first"` holds the first batch of
            the training and looks at it each time, so that the figures can be compared.
        max_products: The most products for each of the two ends of the spectrum.
        trace_products: Products for the trace, at least 3.
        spectrum_products: Products for the density; 0 for none.

    Raises:
        ValueError: An argument is out of range; or from `Trainer.fit`: the module is under manual
            optimization, where `training_step` gives no loss.

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
        self._held: tuple[Any, int] | None = None
        self._last: int | None = None  # the step that was last looked at
        self._worked = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_start`.

        Raises:
            ValueError: The module is under manual optimization.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "CurvatureMonitor takes the loss from training_step, which gives none under manual "
                "optimization; torch_secondorder.diagnostics can be called from there"
            )
        self._last = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_start`; looks at the curvature where that is due."""
        if self.batch == "first" and self._held is None:
            self._held = cloned(batch), batch_idx
        step = trainer.global_step
        # Once a step, where the gradients of several batches are accumulated.
        if step % self.every_n_steps or step == self._last:
            return
        self._last = step
        looked_at = self._held or (batch, batch_idx)
        draws = self.spectrum_products > 0 and bool(_tensorboards(trainer)) and _can_draw()
        try:
            with unnoticed(pl_module):
                closure = loss_of(trainer, pl_module, *looked_at)
                figures, spectrum = self._look(closure, pl_module, draws)
        except RuntimeError as error:
            if not self._worked:
                raise
            # A loss that has become infinite, say: what the training does about it is its affair.
            warnings.warn(f"no curvature before step {step}: {error}", stacklevel=2)
            return
        self._worked = True
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in figures.items()})
        if spectrum is not None and trainer.is_global_zero:
            for logger in _tensorboards(trainer):
                logger.experiment.add_figure("curvature/spectrum", _drawn(spectrum), step)

    def _look(
        self, closure: Callable[[], Any], pl_module: Any, draws: bool
    ) -> tuple[dict[str, float], SpectralDensity | None]:
        """Each of these evaluates the closure once, and puts back what that changes."""
        problem = from_closure(closure, [p for p in pl_module.parameters() if p.requires_grad])
        top = eigenpairs(problem, 1, tolerance=1e-2, max_products=self.max_products, progress=False)
        total = trace(problem, self.trace_products, progress=False)
        # Two products at least: one for the search, one for its certificate.
        most = max(2, self.max_products)
        lowest = definiteness(problem, max_products=most, progress=False)
        spectrum = None
        if draws:
            spectrum = spectral_density(problem, 1, self.spectrum_products, progress=False)
        figures = {
            "curvature/top_eigenvalue": float(top.values[0]),
            "curvature/trace": total.value,
            "curvature/trace_error": total.standard_error,
            "curvature/lowest": lowest.curvature,
            "curvature/negative": float(lowest.semidefinite is False),
        }
        return figures, spectrum


def _tensorboards(trainer: Any) -> list[Any]:
    """The loggers that take figures as TensorBoard does, of whichever package."""
    return [
        logger
        for logger in trainer.loggers
        if any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)
    ]


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _drawn(spectrum: SpectralDensity) -> Any:
    """A figure of its own, that pyplot and its windows know nothing of."""
    figure = importlib.import_module("matplotlib.figure").Figure(layout="constrained")
    spectrum.plot(figure.add_subplot())
    return figure
