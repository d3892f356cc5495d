"""Sophia: clipped steps, divided by a diagonal that is estimated every few steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_betas, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block, Number, narrowed
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.state import Count, Group, declare
from torch_secondorder._params.space import is_distributed
from torch_secondorder.curvature.diagonal import (
    DiagonalEstimator,
    Hutchinson,
    resolve_estimator,
)

__all__ = ["Sophia", "SophiaInfo"]

#: The authors' choice for their two estimators.
_GAMMA_HUTCHINSON, _GAMMA_GNB = 0.01, 0.05
#: About the number of entries of a block that `gamma` is tuned by.
_SAMPLE = 8192


@dataclass(frozen=True, slots=True)
class SophiaInfo(DiagonalInfo):
    """Report of one step of `Sophia`.

    Attributes:
        unclipped: The share of entries whose update was not clipped; None for a step without one.

    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> optimizer = Sophia([x])
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name, optimizer.info.unclipped
    ('MOVED', 0.0)
    """

    unclipped: float | None = None


class TunedGamma(Count):
    """The factor of the curvature where it is tuned, a number for each parameter; else nothing."""

    def names(self, p: Tensor, group: Group = None) -> Iterable[str]:
        """See `ParameterField.names`."""
        return (self.name,) if group and group.get("target_unclipped") is not None else ()

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        if self.names(p, group):
            super().prepare(state, p, on_device=on_device, group=group)


class Sophia(DiagonalOptimizer):
    """Second-order clipped stochastic optimization, for language models on mini-batches.

    Each coordinate moves by the average gradient over its curvature, but never further than `lr`
    (Liu et al. 2023, "Sophia: a scalable stochastic second-order optimizer for language model
    pre-training"):

        m = b1 m + (1 - b1) g,  every `update_period` steps h = b2 h + (1 - b2) h_hat
        theta -= lr * weight_decay * theta
        theta -= lr * clip(m / max(gamma h, eps), -1, 1)

    If curvature is small or negative, this is a sign update. The authors advise choosing `gamma` so
    that 10 to 50 percent of the coordinates are not clipped; `optimizer.info.unclipped` is that
    share. With `target_unclipped`, `gamma` follows by itself: each estimate sets it so that this
    share of the coordinates with positive curvature is not clipped.

    Args:
        params: Parameters or groups.
        lr: Learning rate, the largest move of a coordinate. Start with a rate that suits AdamW, or
            half of it.
        betas: Decay rates of the averages of gradients and of curvature.
        gamma: The factor of the curvature; larger values clip fewer coordinates. None for the
            authors' choice: 0.01 for `"hutchinson"`, 0.05 for `"gnb"` and other estimators. Not
            used with `target_unclipped`.
        eps: The smallest divisor of a gradient.
        weight_decay: Decoupled weight decay, multiplied by `lr` as in `torch.optim.AdamW`.
        estimator: `"hutchinson"` for `z * Hz` with random signs; `"gnb"` for the diagonal of the
            Gauss-Newton matrix from labels drawn from the model, which needs no second derivatives
            but the model's outputs (shown by standard losses, or marked by `mark_outputs`); or a
            `torch_secondorder.curvature.DiagonalEstimator`.
        update_period: Steps from one estimate to the next.
        target_unclipped: The share of coordinates not to be clipped, between 0 and 1, which
            `gamma` is tuned to at each estimate; None for a fixed `gamma`. It takes `exp_avg`
            without the bias of the first steps, and about 8,000 entries of each group, evenly
            spaced. The authors' shares suit batches of very many tokens. With small batches a
            clipped coordinate mostly follows noise: start with 0.9 and `betas=(0.9, 0.9)`.
            Parameters must be whole (no `fully_shard`).
        seed: The seed of the random numbers, see `AdaHessian`.
        accumulation_steps: See `AdaHessian`.
        maximize: Whether to maximize the loss.
        capturable: See `AdaHessian`.
        watch: See `AdaHessian`.

    Attributes:
        estimator: The estimator in use.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: An argument is out of range, or the estimator is unknown.

    If a gradient or the loss is not finite, nothing changes. If an estimate is not finite, the last
    one stays in use. `info.status` reports both.

    >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> optimizer = Sophia([x], lr=0.01)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 500 * x[0] ** 2 + x[1] ** 2
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(200):
    ...     loss = optimizer.step(closure)
    >>> bool(loss < 1)
    True
    """

    info: SophiaInfo | None
    _info_type = SophiaInfo
    _recognized_by = "gamma"
    _state_fields = declare(gamma=TunedGamma())
    _decouples_weight_decay = True  # it is no part of the loss

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | None = None,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        estimator: Literal["hutchinson", "gnb"] | DiagonalEstimator = "hutchinson",
        update_period: int = 10,
        target_unclipped: float | None = None,
        seed: int = 0,
        accumulation_steps: int = 1,
        maximize: bool = False,
        capturable: bool | None = None,
        watch: bool = True,
    ) -> None:
        used = resolve_estimator(estimator)
        usual = _GAMMA_HUTCHINSON if isinstance(used, Hutchinson) else _GAMMA_GNB
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": usual if gamma is None else gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_period": update_period,
            "target_unclipped": target_unclipped,
            "seed": seed,
            "accumulation_steps": accumulation_steps,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, used, watch=watch)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_number("gamma", group["gamma"], low=0.0)
        check_number("eps", group["eps"], above=0.0)
        if group["target_unclipped"] is not None:
            check_number("target_unclipped", group["target_unclipped"], above=0.0, below=1.0)
            if any(is_distributed(p) for p in group["params"][:1]):
                raise ValueError(
                    "target_unclipped ranks the entries of whole parameters, which fully_shard "
                    "cuts apart: use a fixed gamma, or DistributedDataParallel"
                )

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group, lr, estimate = block.group, inputs.lr, inputs.estimate
        beta1, beta2 = group["betas"]
        inputs.average_gradient(beta1)
        if estimate is not None:
            if group["maximize"] and self.estimator.signed:
                estimate = -estimate
            weight = narrowed((1 - beta2) * inputs.estimate_weight, estimate)
            block.exp_hessian.lerp_(estimate, weight)
        if group["weight_decay"]:
            block.decay(1 - lr * group["weight_decay"])
        factor = group["gamma"]
        if group["target_unclipped"] is not None:
            correction = 1 - beta1**inputs.step
            if estimate is not None:
                _tune_gamma(block, correction, inputs.estimate_weight)
            factor = correction * _tuned_gamma(block)
        direction = _ratio(block, factor).clamp_(-1.0, 1.0)
        block.move(-lr if group["maximize"] else lr, direction)

    def _shares(self) -> dict[str, tuple[Tensor, Tensor]]:
        blocks = self._layout.blocks
        if not blocks:
            return {}
        device = blocks[0].device
        unclipped = [(_ratio(b, _factor(b)).abs() < 1).sum().to(device) for b in blocks]
        entries = sum(block.exp_avg.numel() for block in blocks)
        return {"unclipped": (torch.stack(unclipped).sum(), torch.tensor(entries, device=device))}


def _ratio(block: Block, factor: Number) -> Tensor:
    """The average gradient over the curvature times a factor, a new tensor."""
    curvature = torch.mul(block.exp_hessian, narrowed(factor, block.exp_hessian))
    curvature.clamp_(min=block.group["eps"])
    return torch.div(block.exp_avg, curvature, out=curvature)


def _factor(block: Block) -> Number:
    """The factor of the curvature in the last step."""
    if block.group["target_unclipped"] is None:
        gamma: float = block.group["gamma"]
        return gamma
    correction: float = 1 - block.group["betas"][0] ** max(1.0, block.step.item())
    return correction * _tuned_gamma(block)


def _tuned_gamma(block: Block) -> Tensor:
    """The factor that the last estimate set, 0-dim."""
    states = [state for state, _ in block.members(block.exp_avg)]
    for state in states:  # the option may have been set after the first step
        if "gamma" not in state:
            state["gamma"] = torch.zeros_like(block.step)
    gamma: Tensor = states[0]["gamma"]
    return gamma


def _tune_gamma(block: Block, correction: Number, weight: Number) -> None:
    """Sets the factor so that the wanted share of entries is not clipped.

    Entries without positive curvature are clipped with any factor, so they do not count. Where
    nothing can be learned, the factor stays.

    Args:
        block: The block, after its moments have taken in gradient and estimate.
        correction: The sum of the weights in `exp_avg`.
        weight: One, or on a device zero if the estimate does not count.
    """
    old = _tuned_gamma(block)
    if not block.exp_avg.numel():
        return
    # An odd stride, so that it does not fall into step with the columns of matrices.
    stride = (block.exp_avg.numel() // _SAMPLE) | 1
    gradient, curvature = block.exp_avg[::stride].abs(), block.exp_hessian[::stride]
    ratios = torch.where(curvature > 0, gradient / curvature, torch.inf).sort().values
    ranked = (ratios < torch.inf).sum()
    place = (ranked * block.group["target_unclipped"]).ceil().long().sub(1).clamp_(min=0)
    found = (ratios.gather(0, place.reshape(1)).squeeze(0) / correction).to(old)
    known = (found > 0) & (found < torch.inf)
    if isinstance(weight, Tensor):
        known &= weight > 0
    gamma = torch.where(known, found, old)
    for state, _ in block.members(block.exp_avg):
        state["gamma"].copy_(gamma)
