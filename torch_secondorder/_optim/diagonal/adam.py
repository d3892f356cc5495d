"""The direction of Adam, for vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import fused_adam
from torch_secondorder._optim.diagonal.blocks import Block, Number, narrowed


def adam_direction(
    block: Block,
    gradient: Tensor,
    second: Tensor,
    out: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    step: Number,
    weight: Number = 1.0,
) -> None:
    """Averages a gradient and its square, and divides one by the root of the other.

    That is, with the corrections for the zeros at the start,

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        out = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        block: Has the first moments, `exp_avg`, and the count `t`.
        gradient: `(n,)`; zeros if the weight is zero.
        second: The second moments, `(n,)`.
        out: Becomes minus the direction, `(n,)`.
        betas: The decay rates.
        eps: Added to the root.
        step: The count `t`, as `StepInputs.step`.
        weight: On a device zero if nothing is to change.
    """
    first, (beta1, beta2) = block.exp_avg, betas
    if fused_adam is not None and block.step.device == gradient.device:
        out.zero_()
        skips = 1.0 - weight.to(torch.float32) if isinstance(weight, Tensor) else None
        fused_adam(
            [out],
            [gradient],
            [first],
            [second],
            [],
            [block.step],
            lr=1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=skips,
        )
        return
    first.lerp_(gradient, narrowed((1 - beta1) * weight, gradient))
    squares = torch.mul(gradient, gradient, out=out)
    second.lerp_(squares, narrowed((1 - beta2) * weight, gradient))
    correction = (1 - beta2**step) ** 0.5
    torch.sqrt(second, out=out).add_(narrowed(eps * correction, out))
    torch.div(first, out, out=out).mul_(narrowed(-correction / (1 - beta1**step), out))
