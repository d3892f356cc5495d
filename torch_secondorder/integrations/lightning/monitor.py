"""Logs the reports of the optimizers, and looks at the trainer's settings before it begins."""

from __future__ import annotations

from typing import Any

from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder.integrations.lightning._checks import check_settings
from torch_secondorder.integrations.lightning._host import Callback, our_optimizers
from torch_secondorder.optim import LBFGS, SecondOrderOptimizer, StepInfo

__all__ = ["SecondOrderMonitor"]

#: What is logged: field of `StepInfo`, and its short name on the progress bar, empty for none.
_SEARCHED = {
    "grad_norm": "",
    "evaluations": "evals",
    "iterations": "",
    "step_length": "step_length",
    "nonfinite_trials": "",
}
_OF_LBFGS = {**_SEARCHED, "skipped_pairs": "skipped", "damped_pairs": ""}
_OF_NEWTON = {
    **_SEARCHED,
    "damping": "damping",
    "gain_ratio": "gain",
    "trust_radius": "",
    "solver_iterations": "cg",
    "products": "",
    "negative_curvature": "",
}
_OF_DIAGONAL = {"grad_norm": "", "products": "", "unclipped": ""}


class SecondOrderMonitor(Callback):
    """Logs `optimizer.info` as `"LBFGS/step_length"` and so on, and refuses settings that go wrong.

    `LBFGS` and `NewtonCG` are logged with every step; `AdaHessian` and `Sophia`, whose report has
    to be made first, where the trainer's `log_every_n_steps` says so. What is logged can be
    monitored by other callbacks, such as `EarlyStopping(monitor="LBFGS/grad_norm")`. Several
    optimizers of one class are `"LBFGS"`, `"LBFGS-1"` and so on. Other packages' optimizers are
    left alone.

    When fitting begins it looks at `accumulate_grad_batches`, `gradient_clip_val`, `precision`, the
    strategy and the signature of `training_step`. Where gradients of several batches are
    accumulated it tells `AdaHessian` and `Sophia` how many (`accumulation_steps`), fewer at the end
    of an epoch.

    Args:
        progress_bar: Whether the progress bar shows the most telling ones, under short names:
            `evals`, `step_length`, `skipped` (pairs), `damping`, `gain` (ratio), `cg` (iterations).

    Raises:
        ValueError: From `Trainer.fit`: a setting does not go with an optimizer. The message says
            what to do.

    >>> monitor = SecondOrderMonitor()  # Trainer(callbacks=[monitor])
    """

    def __init__(self, *, progress_bar: bool = True) -> None:
        super().__init__()
        self.progress_bar = progress_bar
        self._logged = 0  # the step that was last
        self._own_parts: dict[str, int] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_start`.

        Raises:
            ValueError: A setting does not go with an optimizer.
        """
        check_settings(trainer, pl_module, our_optimizers(trainer))
        self._logged = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_start`; says how many batches are accumulated."""
        if trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization:
            for name, optimizer in our_optimizers(trainer).items():
                if isinstance(optimizer, DiagonalOptimizer):
                    group = optimizer.param_groups[0]
                    self._own_parts.setdefault(name, group["accumulation_steps"])
                    group["accumulation_steps"] = batch_idx % trainer.accumulate_grad_batches + 1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_end`; logs what the step was like."""
        optimizers = our_optimizers(trainer)
        for name, parts in self._own_parts.items():  # as it was, for checkpoints
            optimizers[name].param_groups[0]["accumulation_steps"] = parts
        self._own_parts.clear()
        step = trainer.global_step
        if step == self._logged or trainer.barebones:
            return
        self._logged = step
        interval = trainer.log_every_n_steps
        for name, optimizer in optimizers.items():
            lazy = isinstance(optimizer, DiagonalOptimizer)
            if lazy and (interval == 0 or step % interval):
                continue
            if optimizer.info is not None:
                self._log(pl_module, name, optimizer, optimizer.info)

    def _log(
        self, pl_module: Any, name: str, optimizer: SecondOrderOptimizer, info: StepInfo
    ) -> None:
        fields = _fields(optimizer)
        values = {field: getattr(info, field, None) for field in fields}
        values = {field: float(value) for field, value in values.items() if value is not None}
        logged = {f"{name}/{field}": value for field, value in values.items()}
        pl_module.log_dict(logged, on_step=True, on_epoch=False)
        if self.progress_bar:
            shown = {
                short: values[field] for field, short in fields.items() if short and field in values
            }
            pl_module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)


def _fields(optimizer: SecondOrderOptimizer) -> dict[str, str]:
    if isinstance(optimizer, LBFGS):
        return _OF_LBFGS
    if isinstance(optimizer, DiagonalOptimizer):
        return _OF_DIAGONAL
    return _OF_NEWTON  # and somebody else's: all there is
