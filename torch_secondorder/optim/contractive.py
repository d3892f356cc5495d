"""A wrapper that adds the contractive penalty to the loss of any optimizer."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._foundation.checks import check_number
from torch_secondorder._optim.info import Report, StepInfo
from torch_secondorder._optim.wrapper import WrapperOptimizer
from torch_secondorder.penalties._encoder import Calls, EncoderPenalty, Recorder, seeded

__all__ = ["Contractive", "ContractiveInfo"]


@dataclass(frozen=True, slots=True)
class ContractiveInfo(Report):
    """Report of one call of `Contractive.step()`.

    Attributes:
        loss: The closure's loss without the penalty, in the first evaluation; NaN without a
            closure.
        penalty: The penalty in the first evaluation, not multiplied by the weight.
        weight: The weight.
        inner: The report of the optimizer inside, if it has one; its losses include the penalty.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> optimizer = Contractive(torch.optim.SGD(layer.parameters(), lr=0.1), layer, weight=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = layer(torch.ones(3, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.weight, optimizer.info.penalty > 0, optimizer.info.inner
    (0.5, True, None)
    """

    loss: float
    penalty: float
    weight: float
    inner: StepInfo | None


class Contractive(WrapperOptimizer):
    """Makes the training of an autoencoder contractive, by wrapping its optimizer.

    The optimizer inside minimizes `loss + weight * contractive_penalty(encoder, x)` (see
    `torch_secondorder.penalties.contractive_penalty`) instead of the closure's loss. A forward hook
    sees `x`, the input of the encoder. The penalty is part of every evaluation: line searches see
    its value, steps its gradient, products its curvature. It is added to the loss when you call
    `backward()`, so one pass serves both, and gradient clipping in the closure applies to the sum.
    If a closure calls `backward()` several times, each call adds the mean over the inputs since the
    last one: for `n` micro-batches whose losses are divided by `n`, give `weight / n`.

    Without a closure (`loss.backward()`, then `optimizer.step()`), `step()` adds the gradient of
    the penalty, which takes one more pass through the encoder. The mean is over all inputs whose
    codes `backward()` has reached since the last step or `zero_grad()`.

    Groups and state are those of the optimizer inside, so a scheduler may be given either. All
    attributes that this class lacks are looked up there as well.

    Args:
        optimizer: Any optimizer, of this package or another.
        encoder: The module inside the model that maps an input to its code, a tensor to a tensor.
        weight: The weight of the penalty.
        method: `"auto"`, `"exact"` or `"projection"`, see `contractive_penalty`.
        noise: The standard deviation of the noise for the penalty of the higher-order contractive
            autoencoder; None for the plain one. Wrap twice for both.
        n_noise: The number of noisy copies of each sample.
        n_projections: The number of random vectors for each sample, for projections.
        seed: The seed of noise and random vectors. All evaluations of a step see the same numbers,
            and resumed training sees the numbers of an uninterrupted run.

    Attributes:
        optimizer: The optimizer inside.
        weight: The weight of the penalty. You may change it between steps; checkpoints carry it.

    Raises:
        TypeError: The optimizer is no `torch.optim.Optimizer`, or the encoder no module.
        ValueError: An argument is out of range, or the optimizer has no parameter of the encoder.

    >>> import torch
    >>> encoder = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    >>> model = nn.Sequential(encoder, nn.Linear(3, 4))
    >>> optimizer = Contractive(torch.optim.Adam(model.parameters()), encoder, weight=0.1)
    >>> x = torch.rand(10, 4)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), x)
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> info = optimizer.info
    >>> abs(loss.item() - (info.loss + 0.1 * info.penalty)) < 1e-6
    True
    """

    _entry = "contractive"
    _saved: ClassVar[dict[str, str]] = {"weight": "weight", **WrapperOptimizer._saved}
    _carried = (*WrapperOptimizer._carried, "penalty", "weight")

    def __init__(
        self,
        optimizer: Optimizer,
        encoder: nn.Module,
        weight: float,
        method: Literal["auto", "exact", "projection"] = "auto",
        *,
        noise: float | None = None,
        n_noise: int = 1,
        n_projections: int = 1,
        seed: int = 0,
    ) -> None:
        check_number("weight", weight, low=0.0)
        self.weight = weight
        self.penalty = EncoderPenalty(
            encoder, method, noise=noise, n_noise=n_noise, n_projections=n_projections
        )
        super().__init__(optimizer, _EncoderTerm(self.penalty), seed)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in encoder.parameters()):
            raise ValueError(
                "none of the encoder's parameters is among the optimizer's: give the encoder that "
                "is part of the model that the optimizer trains, not a copy"
            )

    def _set_up(self) -> None:
        super()._set_up()
        self._recorder = Recorder(self.penalty.encoder)
        handle = self.penalty.encoder.register_forward_hook(self._recorder, with_kwargs=True)
        weakref.finalize(self, handle.remove)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients, and the inputs of the encoder that belong to them.

        Args:
            set_to_none: See `torch.optim.Optimizer.zero_grad`.
        """
        self._recorder.inputs.clear()
        super().zero_grad(set_to_none)

    @property
    def info(self) -> ContractiveInfo | None:
        """The report of the last step, None before the first."""
        if self._penalized.first is None:
            return None
        loss, penalty = (value.item() for value in self._penalized.first)
        weight, inner = float(self.weight), getattr(self._inside, "info", None)
        return ContractiveInfo(loss, penalty, weight, inner)

    # See `WrapperOptimizer`.

    def _factor(self) -> float:
        check_number("weight", self.weight, low=0.0)
        return self.weight

    def _begin_step(self) -> None:
        self._recorder.active = False

    def _end_step(self) -> None:
        self._recorder.active = True
        self._recorder.inputs.clear()

    def _has_present_term(self) -> bool:
        return bool(self._recorder.inputs)

    def _present_term(self) -> Tensor:
        inputs = self._recorder.inputs
        if any(x.requires_grad for x in inputs):
            raise RuntimeError(
                "the encoder's inputs depend on parameters, and their graph is gone: without a "
                f"closure only data can be seen. Pass a closure:\n{STANDARD_CLOSURE}"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "with several processes the gradient of the penalty has to be there before "
                f"gradients are averaged. Pass a closure:\n{STANDARD_CLOSURE}"
            )
        calls, generator = Calls(), seeded(self._seed + self._steps)
        for x in inputs:
            calls.add(len(x), self.penalty.at(x, generator=generator(x.device)))
        penalty = calls.take()
        if penalty is None:
            raise _not_called()
        return penalty

    def __repr__(self) -> str:
        return f"Contractive({self._inside!r}, weight={self.weight})"


class _EncoderTerm:
    """The penalty of the calls of an encoder, see `torch_secondorder._optim.wrapper.Term`."""

    def __init__(self, penalty: EncoderPenalty) -> None:
        self._penalty = penalty

    def watching(self, seed: int, tree: Any = None) -> AbstractContextManager[Calls]:
        return self._penalty.watching(seeded(seed))

    def missing(self) -> RuntimeError:
        return _not_called()


def _not_called() -> RuntimeError:
    return RuntimeError(
        "the encoder was not called with gradients enabled, so there is nothing to penalize: call "
        "the model that it is part of, not a copy, nor a compiled version of it, which does not "
        "show the calls inside"
    )
