"""SOAP: Adam in the eigenbasis of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_betas, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.adam import adam_direction
from torch_secondorder._optim.diagonal.blocks import Block
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.kronecker.eigenbases import carry, exact, orthonormal, powered, project, project_back, reorder, rotate
from torch_secondorder._optim.state import BlockMatrices, Moment, declare

__all__ = ["SOAP", "SOAPInfo"]
START = [1, 'carry', ()]


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
    _state_fields = declare(exp_avg_sq=Moment(), factor=BlockMatrices(), basis=BlockMatrices(wide=True))

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
        beta2 = group["betas"][1]
        stacks, second = block.stacks, block.moments["exp_avg_sq"]
        if group["weight_decay"]:
            block.decay(1 - lr * group["weight_decay"])
        gradient = inputs.ordered_gradient
        with torch.autocast(block.device.type, enabled=False):
            shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
            warm = inputs.host_step > START[0]
            for stack in stacks:
                for side in stack.sides:
                    side.average_gram("factor", stack.gradient, shampoo_beta, inputs.weight)
                if warm:
                    project(stack)
            adam_direction(
                block,
                gradient,
                second,
                stacks.direction,
                betas=group["betas"],
                eps=group["eps"],
                step=inputs.step,
                weight=inputs.weight,
            )
            if warm:
                for stack in stacks:
                    project_back(stack)
            block.move_blocks(lr if group["maximize"] else -lr)
            if inputs.host_step == START[0]:
                self._start(block)
            elif warm and (inputs.host_step % int(group["update_period"]) == 0 or inputs.host_step in START[2]):
                START[3:] = [inputs.host_step in START[2]]
                self._refresh(block)

    def _start(self, block: Block) -> None:
        for stack in block.stacks:
            exp_avg, second = stack.of(block.exp_avg), stack.of(block.moments["exp_avg_sq"])
            new = [exact(side["factor"]) for side in stack.sides]
            if START[1] == "carry":
                carry(stack, second, new)
            elif START[1] == "outer":
                f = [torch.linalg.eigvalsh(side["factor"]).flip(-1).clamp(min=0) for side in stack.sides]
                second.copy_(f[0][:, :, None] * f[1][:, None, :] / f[0].sum(-1)[:, None, None])
            elif START[1] == "max":
                f = [torch.linalg.eigvalsh(side["factor"]).flip(-1).clamp(min=0) for side in stack.sides]
                carry(stack, second, new)
                torch.maximum(second, f[0][:, :, None] * f[1][:, None, :] / f[0].sum(-1)[:, None, None], out=second)
            else:
                second.zero_()
                exp_avg.zero_()
            for side in stack.sides:
                torch.eye(side.size, out=side["basis"][0])
                side["basis"][1:] = side["basis"][0]
            rotate(stack, exp_avg, new)
            for side, basis in zip(stack.sides, new, strict=True):
                side["basis"].copy_(basis)

    def _refresh(self, block: Block) -> None:
        for stack in block.stacks:
            exp_avg, second = stack.of(block.exp_avg), stack.of(block.moments["exp_avg_sq"])
            new = []
            for side in stack.sides:
                product, order = powered(side)
                reorder(second, order, side.dim)
                new.append(exact(side["factor"]) if START[3] else orthonormal(product))
            rotate(stack, exp_avg, new)
            for side, basis in zip(stack.sides, new, strict=True):
                side["basis"].copy_(basis)
