"""A callback that adds the contractive penalty to a module's training loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor, nn

from torch_secondorder._foundation.checks import check_number
from torch_secondorder.integrations.lightning._host import Callback
from torch_secondorder.integrations.lightning._unnoticed import replaced
from torch_secondorder.penalties._encoder import Calls, EncoderPenalty, seeded

__all__ = ["JacobianPenaltyCallback"]


class JacobianPenaltyCallback(Callback):
    """Adds `weight * contractive_penalty(encoder, x)` to the loss that `training_step` returns.

    `x` is the input of the encoder in `training_step`. If `training_step` calls the encoder several
    times, the penalty is the mean over all samples. The loss is changed before the trainer sees it,
    so every evaluation of a step includes the penalty, and it is scaled with the loss when batches
    are accumulated. Validation and testing are not affected. `jacobian_penalty/<encoder>` is logged
    with every batch: the penalty at the start of the step, without the weight.

    It works with any optimizer. `torch_secondorder.Contractive` does the same for loops without a
    trainer, and for manual optimization.

    Args:
        encoder: Path of the encoder in the module, as for `get_submodule`: `"encoder"`,
            `"net.encoder"`. It maps a tensor to a tensor.
        weight: Weight of the penalty.
        method: `"auto"`, `"exact"` or `"projection"`, see
            `torch_secondorder.penalties.contractive_penalty`.
        noise: Standard deviation of the noise for the penalty of the higher-order contractive
            autoencoder; None for the plain one. Use two callbacks for both.
        n_noise: Noisy copies of each sample.
        n_projections: Random vectors for each sample, if projections are used.
        seed: Seed of noise and random vectors, which are the same in all evaluations of a step.

    Raises:
        ValueError: An argument is out of range; or from `Trainer.fit`: there is no such encoder, or
            the module uses manual optimization.
        RuntimeError: From `Trainer.fit`: `training_step` did not call the encoder.

    >>> callback = JacobianPenaltyCallback("encoder", weight=0.1)  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        encoder: str,
        weight: float,
        method: Literal["auto", "exact", "projection"] = "auto",
        *,
        noise: float | None = None,
        n_noise: int = 1,
        n_projections: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("weight", weight, low=0.0)
        self.encoder = encoder
        self.weight = weight
        self.seed = seed
        self._make = functools.partial(
            EncoderPenalty,
            method=method,
            noise=noise,
            n_noise=n_noise,
            n_projections=n_projections,
        )
        self._make(nn.Identity())  # checks the arguments
        self._first: Tensor | None = None
        self._replaced = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_start`; replaces `training_step` by one with the penalty.

        Raises:
            ValueError: There is no such encoder, or the module uses manual optimization.
        """
        if not pl_module.automatic_optimization:
            raise ValueError(
                "JacobianPenaltyCallback adds to the loss that training_step returns, and manual "
                "optimization uses none: wrap the optimizer in torch_secondorder.Contractive"
            )
        penalty = self._make(_submodule(pl_module, self.encoder))
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with penalty.watching(seeded(self.seed + trainer.global_step)) as calls:
                output = original(*args, **kwargs)
            return self._with_penalty(output, calls)

        self._replaced.enter_context(replaced(pl_module, "training_step", training_step))

    def _with_penalty(self, output: Any, calls: Calls) -> Any:
        """The output of `training_step`, with the penalty added to its loss."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:  # Lightning skips the batch
            return output
        value = calls.take()
        if value is None:
            raise RuntimeError(
                f"training_step did not call {self.encoder!r} with gradients enabled, so there is "
                "nothing to penalize; a compiled module does not show the calls inside"
            )
        if self._first is None:
            self._first = value.detach()
        total = loss + self.weight * value
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_start`."""
        self._first = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Callback.on_train_batch_end`; logs the penalty."""
        if self._first is not None and not trainer.barebones:
            name = f"jacobian_penalty/{self.encoder}"
            pl_module.log(name, self._first, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_fit_end`; restores the module."""
        self._replaced.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """See `Callback.on_exception`; restores the module."""
        self._replaced.close()


def _submodule(pl_module: Any, name: str) -> nn.Module:
    try:
        module: nn.Module = pl_module.get_submodule(name)
    except AttributeError:
        module = pl_module
    if module is pl_module:
        known = ", ".join(repr(path) for path, _ in pl_module.named_modules() if path)
        raise ValueError(
            f"{type(pl_module).__name__} has no module {name!r} to penalize; it has {known}"
        )
    return module
