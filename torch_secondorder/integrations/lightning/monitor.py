"""A callback that logs optimizer reports, and checks the trainer's settings before training."""

from __future__ import annotations

from typing import Any

from torch_secondorder._foundation.report import Report
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.integrations.lightning._checks import check_settings
from torch_secondorder.integrations.lightning._host import (
    Callback,
    innermost,
    our_optimizers,
    our_wrappers,
)

__all__ = ["SecondOrderMonitor"]

#: Fields of reports that the progress bar shows, with their names there.
_SHORT_NAMES = {
    "evaluations": "evals",
    "step_length": "step_length",
    "skipped_pairs": "skipped",
    "damping": "damping",
    "gain_ratio": "gain",
    "solver_iterations": "cg",
}


class SecondOrderMonitor(Callback):
    """Logs the numbers in `optimizer.info`, as `"LBFGS/step_length"` and so on.

    `AdaHessian` and `Sophia`, whose reports are made on demand, are logged when the trainer's
    `log_every_n_steps` says so, all others with every step. Other callbacks can monitor the logged
    values, for instance `EarlyStopping(monitor="LBFGS/grad_norm")`. Several optimizers of one class
    are called `"LBFGS"`, `"LBFGS-1"` and so on. Optimizers of other packages are ignored, unless
    they derive from `SecondOrderOptimizer`. Wrappers have their own report, as in
    `"Constrained/violation"`, whatever they wrap.

    When fitting begins it checks `accumulate_grad_batches`, `gradient_clip_val`, `precision`, the
    strategy and the signature of `training_step`. If gradients of several batches are accumulated,
    it tells `AdaHessian` and `Sophia` the number (`accumulation_steps`), which is smaller at the
    end of an epoch.

    Args:
        progress_bar: Also shows the most important values on the progress bar, under short names:
            `evals`, `step_length`, `skipped` (pairs), `damping`, `gain` (ratio), `cg` (iterations).

    Raises:
        ValueError: From `Trainer.fit`: a setting is incompatible with an optimizer. The message
            suggests a fix.

    >>> monitor = SecondOrderMonitor()  # Trainer(callbacks=[monitor])
    """

    def __init__(self, *, progress_bar: bool = True) -> None:
        super().__init__()
        self.progress_bar = progress_bar
        self._last_logged = 0  # a step
        self._own_accumulation: dict[str, int] = {}  # the optimizers' own `accumulation_steps`

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_start`.

        Raises:
            ValueError: A setting is incompatible with an optimizer.
        """
        check_settings(trainer, pl_module, our_optimizers(trainer))
        self._last_logged = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_start`; sets the number of batches accumulated so far."""
        if trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization:
            for name, optimizer in our_optimizers(trainer).items():
                if isinstance(optimizer, DiagonalOptimizer):
                    group = optimizer.param_groups[0]
                    self._own_accumulation.setdefault(name, group["accumulation_steps"])
                    group["accumulation_steps"] = batch_idx % trainer.accumulate_grad_batches + 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_end`; logs the reports of the step."""
        optimizers = our_optimizers(trainer)
        for name, own in self._own_accumulation.items():  # restored for checkpoints
            optimizers[name].param_groups[0]["accumulation_steps"] = own
        self._own_accumulation.clear()
        step = trainer.global_step
        if step == self._last_logged or trainer.barebones:
            return
        self._last_logged = step
        interval = trainer.log_every_n_steps
        for name, optimizer in optimizers.items():
            lazy = isinstance(optimizer, DiagonalOptimizer)
            if lazy and (interval == 0 or step % interval):
                continue
            if optimizer.info is not None:
                self._log(pl_module, name, optimizer.info, shown=self.progress_bar and not lazy)
        for name, wrapper in our_wrappers(trainer).items():
            lazy = not isinstance(innermost(wrapper), FlatOptimizer)
            if lazy and (interval == 0 or step % interval):
                continue
            info: Any = wrapper.info
            if info is not None:
                self._log(pl_module, name, info, shown=False)

    @staticmethod
    def _log(pl_module: Any, name: str, info: Report, *, shown: bool) -> None:
        numbers = {
            field: float(value)
            for field, value in info.as_dict().items()
            if isinstance(value, (int, float))
        }
        logged = {f"{name}/{field}": value for field, value in numbers.items()}
        pl_module.log_dict(logged, on_step=True, on_epoch=False)
        if shown:
            short = {_SHORT_NAMES[f]: value for f, value in numbers.items() if f in _SHORT_NAMES}
            pl_module.log_dict(short, on_step=True, on_epoch=False, prog_bar=True, logger=False)
