"""AdaHessian: Adam with the curvature in place of the squared gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_betas, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block, narrowed
from torch_secondorder._optim.diagonal.fsdp import check_averaging
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._params.space import is_distributed
from torch_secondorder.curvature.diagonal import DiagonalEstimator, resolve_estimator

__all__ = ["AdaHessian", "AdaHessianInfo"]


@dataclass(frozen=True, slots=True)
class AdaHessianInfo(DiagonalInfo):
    """Report of one step of `AdaHessian`.

    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> optimizer = AdaHessian([x])
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name, optimizer.info.products
    ('MOVED', 1)
    """


class AdaHessian(DiagonalOptimizer):
    """Adam with an estimate of the Hessian's diagonal in place of squared gradients.

    Each step moves along the average gradient, divided by the root mean square of estimates of the
    Hessian's diagonal, `|z * Hz|` with random signs `z`, averaged over blocks of coordinates (Yao
    et al. 2021, "ADAHESSIAN: an adaptive second order optimizer for machine learning"):

        D = blockmean |z * Hz|,  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) D^2
        theta -= lr * (m / (1 - b1^t) / ((v / (1 - b2^s))^(k / 2) + eps) + weight_decay * theta)

    where `t` counts gradients and `s` estimates. The product `Hz` is computed while `backward()`
    runs in the closure. A step costs about as much as a gradient and a product; with
    `update_period` above one, most steps cost as much as Adam's.

    Args:
        params: Parameters or groups.
        lr: Learning rate. The default is the authors', about a hundred times Adam's.
        betas: Decay rates of the averages of gradients and of squared curvature.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, multiplied by `lr` as in `torch.optim.AdamW`.
        hessian_power: The power `k`: one for Newton-like steps, less for steps closer to the
            gradient.
        update_period: Steps from one estimate of the curvature to the next. The first steps, ten at
            most, all estimate: a single noisy estimate would send them astray.
        average_block: `"spatial"` averages `|z * Hz|` over all dimensions of a parameter after the
            second, that is, over the kernels of a convolution. An integer averages in addition over
            that many neighboring entries of parameters with one or two dimensions. None averages
            nothing.
        estimator: `"hutchinson"` for `|z * Hz|`, the authors' choice; `"gnb"` for the same of the
            Gauss-Newton matrix, from labels drawn from the model as in `Sophia`; or a
            `torch_secondorder.curvature.DiagonalEstimator`. A step is divided by the norm of a row
            of the matrix (the root mean square of `|z * Hz|`), not by the diagonal entry: that
            would make steps too long where coordinates move together. The first estimate of
            `"gnb"` draws ten labels for each sample.
        n_samples: Random vectors for each estimate, for an estimator given by name.
        seed: The seed of the random signs. The optimizer has its own generator, which checkpoints
            carry.
        accumulation_steps: The number of equal micro-batches, if closures do not zero the gradients
            and only the last micro-batch runs in `step`.
        maximize: Whether to maximize the loss.
        capturable: Whether a step reads no numbers on the host, so that a CUDA graph can capture it
            and nothing waits for the device. None stands for True on a device, False on the CPU.
        watch: Whether the optimizer sees backward passes by itself, so that `step()` needs no
            closure: if an estimate is due, `loss.backward()` computes the product outside of a
            closure too, as long as the optimizer is alive.

    Attributes:
        estimator: The estimator in use.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: An argument is out of range.

    If a gradient or the loss is not finite, nothing changes. If a product is not finite, the last
    estimate stays in use. `info.status` reports both.

    >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> optimizer = AdaHessian([x], lr=1.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 500 * x[0] ** 2 + x[1] ** 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)  # a Newton step, whatever the scales
    tensor(501.)
    >>> bool(x.detach().abs().max() < 1e-4)
    True
    """

    info: AdaHessianInfo | None
    _info_type = AdaHessianInfo
    _recognized_by = "hessian_power"
    _magnitudes = True
    _warm_up = 10
    _first_labels = 10  # one label leaves the estimate close to zero in some coordinates, by chance
    _decouples_weight_decay = True  # it is no part of the loss

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        update_period: int = 1,
        average_block: Literal["spatial"] | int | None = "spatial",
        estimator: Literal["hutchinson", "gnb"] | DiagonalEstimator = "hutchinson",
        n_samples: int = 1,
        seed: int = 0,
        accumulation_steps: int = 1,
        maximize: bool = False,
        capturable: bool | None = None,
        watch: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "update_period": update_period,
            "average_block": average_block,
            "seed": seed,
            "accumulation_steps": accumulation_steps,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, resolve_estimator(estimator, n_samples), watch=watch)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_number("hessian_power", group["hessian_power"], low=0.0)
        check_number("eps", group["eps"], above=0.0)  # flat directions would divide by zero
        block = group["average_block"]
        if not (block is None or block == "spatial" or (type(block) is int and block >= 1)):
            raise ValueError(
                f"average_block must be 'spatial', an integer of at least 1 or None, got {block!r}"
            )
        if any(is_distributed(p) for p in group["params"][:1]):
            check_averaging(group["params"], block)

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group, lr = block.group, inputs.lr
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            block.decay(1 - lr * group["weight_decay"])
        inputs.average_gradient(beta1)
        power = float(group["hessian_power"])
        # m / c1 / ((v / c2)^(k / 2) + eps), with the corrections c1, c2 moved to rate and eps.
        correction1 = 1 - beta1**inputs.step
        correction2 = (1 - beta2**inputs.curvature_step) ** (power / 2)
        rate = (-lr if group["maximize"] else lr) * correction2 / correction1
        eps = group["eps"] * correction2
        roots = inputs.estimate
        if roots is None:
            size, dtype, device = block.exp_hessian.numel(), block.dtype, block.device
            roots = self._buffer_pool.empty("roots", size, dtype, device)
            torch.sqrt(block.exp_hessian, out=roots)
        else:
            if group["average_block"] not in (None, "spatial") or block.has_kernels:
                for piece, is_complex in zip(block.pieces(roots), block.complex, strict=True):
                    average_blocks_(piece, group["average_block"], is_complex=is_complex)
            fuses = power == 1.0 and not inputs.on_device
            if fuses and block.fused_divide(float(rate), beta2, float(eps), roots):
                return
            weight = narrowed((1 - beta2) * inputs.estimate_weight, roots)
            block.exp_hessian.lerp_(roots.mul_(roots), weight)
            torch.sqrt(block.exp_hessian, out=roots)  # new memory costs as much as the arithmetic
        if power != 1.0:
            roots.pow_(power)
        block.divide(rate, roots.add_(narrowed(eps, roots)))


def average_blocks_(
    diagonal: Tensor, block: Literal["spatial"] | int | None, *, is_complex: bool = False
) -> None:
    """Replaces entries by the mean magnitude of their block, in place.

    Args:
        diagonal: Shaped like a parameter.
        block: See `AdaHessian`.
        is_complex: Whether the parameter is complex: real and imaginary parts, which stand in the
            last dimension, are averaged separately.
    """
    own_dims = diagonal.dim() - is_complex
    if block is None or own_dims == 0:
        return
    if own_dims > 2:
        dims = tuple(range(2, own_dims))
        diagonal.copy_(diagonal.abs().mean(dims, keepdim=True).expand_as(diagonal))
    elif block != "spatial":
        # Columns are parts of a number, rows its neighbors.
        entries = diagonal.abs().reshape(-1, 2 if is_complex else 1)
        whole = len(entries) - len(entries) % block
        for part in (entries[:whole].unflatten(0, (-1, block)), entries[whole:].unsqueeze(0)):
            if part.numel():
                part.copy_(part.mean(1, keepdim=True).expand_as(part))
        diagonal.copy_(entries.view_as(diagonal))
