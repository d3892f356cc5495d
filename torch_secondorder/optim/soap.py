"""SOAP: Adam in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_betas, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block, narrowed
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.kronecker.eigenbases import into, out_of
from torch_secondorder._optim.state import BlockMatrices, Moment, declare

__all__ = ["SOAP", "SOAPInfo"]


@dataclass(frozen=True, slots=True)
class SOAPInfo(DiagonalInfo):
    """Report of one step of `SOAP`."""


class SOAP(DiagonalOptimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner."""

    info: SOAPInfo | None
    _info_type = SOAPInfo
    _recognized_by = "max_precond_dim"
    _decouples_weight_decay = True
    _estimates = False
    _state_fields = declare(exp_avg_sq=Moment(), factor=BlockMatrices(), basis=BlockMatrices())

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        shampoo_beta: float | None = None,
        update_period: int = 10,
        max_precond_dim: int | None = 10000,
        block_size: int | None = 256,
        merge_dims: bool = True,
        factor_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        maximize: bool = False,
        capturable: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "shampoo_beta": shampoo_beta,
            "update_period": update_period,
            "max_precond_dim": max_precond_dim,
            "block_size": block_size,
            "merge_dims": merge_dims,
            "factor_dtype": factor_dtype,
            "accumulation_steps": accumulation_steps,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"], above=0.0)

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group, lr = block.group, inputs.lr
        beta1, beta2 = group["betas"]
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        stacks = block.stacks
        if group["weight_decay"]:
            block.decay(1 - lr * group["weight_decay"])
        gradient = inputs.ordered_gradient
        exp_avg, second = block.exp_avg, block.moments["exp_avg_sq"]
        for stack in stacks:
            for side in stack.sides:
                side.average_gram("factor", stack.gradient, shampoo_beta, inputs.weight)
        if inputs.host_step == 1:
            for stack in stacks:
                for side in stack.sides:
                    side["basis"].copy_(torch.linalg.eigh(side["factor"])[1].flip(-1))
        for stack in stacks:
            stack.gradient.copy_(into(stack, stack.gradient, "basis"))
        exp_avg.lerp_(gradient, narrowed(1 - beta1, gradient))
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = 1 - beta2**inputs.step
        denominator = (second / correction).sqrt_().add_(group["eps"])
        torch.div(exp_avg / (1 - beta1**inputs.step), denominator, out=stacks.direction)
        for stack in stacks:
            stack.direction.copy_(out_of(stack, stack.direction, "basis"))
        block.move_blocks(-lr if group["maximize"] else lr)
        if inputs.host_step % group["update_period"] == 0:
            for stack in stacks:
                mean = out_of(stack, stack.of(exp_avg), "basis")
                squares = stack.of(second)
                for side in stack.sides:
                    q = side["basis"]
                    powered = torch.bmm(side["factor"], q)
                    order = (q * powered).sum(1).argsort(-1, descending=True)
                    rows = order.unsqueeze(-1) if side.dim == 0 else order.unsqueeze(-2)
                    squares.copy_(squares.take_along_dim(rows, 1 + side.dim))
                    powered = powered.take_along_dim(order.unsqueeze(-2), -1)
                    side["basis"].copy_(torch.linalg.qr(powered)[0])
                stack.of(exp_avg).copy_(into(stack, mean, "basis"))
