"""SOAP: Adam in the eigenbases of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_betas, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.adam import adam_direction
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.kronecker.division import divided
from torch_secondorder._optim.kronecker.eigenbases import (
    eigenvectors,
    multiply,
    orthonormal,
    orthonormal_or_exact,
    powered,
    reorder,
)
from torch_secondorder._optim.kronecker.settings import check_blocks, factor_beta
from torch_secondorder._optim.kronecker.stacks import Side
from torch_secondorder._optim.state import BlockMatrices, Moment, declare

__all__ = ["SOAP", "SOAPInfo"]

#: The number of first steps that are Adam's, while the factors gather gradients.
_GATHERING = 10


@dataclass(frozen=True, slots=True)
class SOAPInfo(DiagonalInfo):
    """Report of one step of `SOAP`.

    Attributes:
        off_diagonal: In steps that refresh the bases, the share of the factors (of their squared
            norm) that was not diagonal any more in the bases so far. If it is close to one, a
            shorter `update_period` may help.

    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> optimizer = SOAP([x])
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name, optimizer.info.evaluations
    ('MOVED', 0)
    """

    off_diagonal: float | None = None


class SOAP(DiagonalOptimizer):
    """Adam in the eigenbases of Shampoo's factors, for networks on mini-batches.

    The gradient of each matrix is brought into the eigenbases of its Kronecker factors, where Adam
    makes the step (Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam"):

        L = b L + (1 - b) G G',  R = b R + (1 - b) G' G,  G_ = Q_L' G Q_R
        M = b1 M + (1 - b1) G_,  V = b2 V + (1 - b2) G_^2
        theta -= lr * weight_decay * theta
        theta -= lr * Q_L (M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)) Q_R'

    Every `update_period` steps, one step of the power method and a QR decomposition bring the bases
    `Q_L` and `Q_R` closer to the eigenvectors of `L` and `R`. Rows and columns of `V` are sorted by
    eigenvalue along with those of the bases, and `M` moves to the new bases. The first ten steps
    (or `update_period`, if that is less) are Adam's, while `L` and `R` gather gradients. Then come
    their exact eigenvectors, and `M` and `V` begin anew. Eigenvectors are computed exactly again if
    more than half of a factor's squared norm has left the diagonal, unless `capturable`.

    A weight with more dimensions, such as a convolution's, is a matrix of `shape[0]` rows. Matrices
    are cut into blocks, whose factors are cheaper; blocks of equal shape in all layers share calls.
    For a block `(m, n)` a step takes `6 m n (m + n)` operations. Parameters with one dimension are
    updated as by AdamW.

    Args:
        params: Parameters or groups.
        lr: Learning rate. Start with a rate that suits AdamW, or twice as much.
        betas: Decay rates of the averages of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, multiplied by `lr` as in `torch.optim.AdamW`.
        shampoo_beta: Decay rate of the factors; None for the second of `betas`.
        update_period: Steps from one refresh of the bases to the next.
        block_size: The longest side of a block; longer sides are cut into parts, of equal length if
            that is possible. None for whole matrices, as in the authors' code; steps cost more
            then.
        max_precond_dim: Longer sides of matrices, such as those of embeddings, have no factor and
            are not cut; None for no bound.
        merge_dims: Whether all dimensions after the first are joined. If not, the last two are rows
            and columns, and those before number the matrices, as for stacked experts.
        factor_dtype: The dtype of the factors, for instance `torch.bfloat16`; None for that of the
            parameters, at least float32.
        accumulation_steps: See `AdaHessian`.
        maximize: Whether to maximize the loss.
        capturable: See `AdaHessian`.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: An argument is out of range.

    If a gradient or the loss is not finite, nothing changes, and `info.status` reports it.

    >>> weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0], [1.0, 3.0]]))
    >>> inputs = torch.tensor([[10.0, 9.0], [9.0, 10.0]])
    >>> optimizer = SOAP([weight], lr=0.05)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (inputs @ weight).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(150):  # from 2355; AdamW comes to 6.5
    ...     loss = optimizer.step(closure)
    >>> bool(loss < 1)
    True
    """

    info: SOAPInfo | None
    _info_type = SOAPInfo
    _recognized_by = "shampoo_beta"
    _told_apart_by = "grafting"  # Shampoo has all hyperparameters of SOAP
    _decouples_weight_decay = True  # it is no part of the loss
    _estimates = False
    _divides = True
    _state_fields = declare(
        exp_avg_sq=Moment(), factor=BlockMatrices(), basis=BlockMatrices(wide=True)
    )
    #: The sums of which `SOAPInfo.off_diagonal` is the ratio, and the step that they are of.
    _left_diagonal: tuple[int, list[tuple[Tensor, Tensor]]] = (0, [])

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
        block_size: int | None = 256,
        max_precond_dim: int | None = 10000,
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
            "block_size": block_size,
            "max_precond_dim": max_precond_dim,
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
        check_blocks(group)

    def _has_decisions(self, step: int, group: dict[str, Any]) -> bool:
        period = int(group["update_period"])
        return step <= min(period, _GATHERING) or step % period == 0

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group, stacks, step = block.group, block.stacks, inputs.host_step
        period = int(group["update_period"])
        gathering = min(period, _GATHERING)
        has_bases = _has_bases(block, inputs, gathering)
        if group["weight_decay"]:
            block.decay(1 - inputs.lr * group["weight_decay"])
        gradient = inputs.ordered_gradient
        with torch.autocast(block.device.type, enabled=False):
            for stack in stacks:
                for side in stack.sides:
                    side.average_gram("factor", stack.gradient, factor_beta(group), inputs.weight)
                if has_bases:
                    multiply(stack, stack.gradient, stack.direction, forth=True)
            adam_direction(
                block,
                gradient,
                block.moments["exp_avg_sq"],
                stacks.direction,
                betas=group["betas"],
                eps=group["eps"],
                step=inputs.step,
                weight=inputs.weight,
            )
            if has_bases:
                for stack in stacks:
                    multiply(stack, stack.direction, stack.gradient, forth=False)
            block.move_blocks(inputs.lr if group["maximize"] else -inputs.lr)
            if not has_bases and step >= gathering:
                self._start(block)
            elif has_bases and step % period == 0:
                self._refresh(block, on_device=inputs.on_device)

    def _start(self, block: Block) -> None:
        """Gives all matrices their first bases; moments begin anew.

        Those of the original coordinates do not carry over: in the basis that a few gradients made,
        their average is large where their squares, seen as independent, are small.
        """
        sides = _sides(block)
        bases, factors = [side["basis"] for side in sides], [side["factor"] for side in sides]
        stacks = list(zip(bases, factors, strict=True))
        divided(bases, eigenvectors, stacks, self._ranks)
        matrices = slice(0, block.stacks.vectors.start)
        block.exp_avg[matrices] = 0.0
        block.moments["exp_avg_sq"][matrices] = 0.0

    def _refresh(self, block: Block, *, on_device: bool) -> None:
        """Brings the bases closer to the eigenvectors, and the moments into the new bases.

        Args:
            block: The parameters.
            on_device: Whether no decision may wait for the device.
        """
        mean, squares = block.exp_avg, block.moments["exp_avg_sq"]
        if on_device or (squares.numel() and not bool(squares.amax() < torch.inf)):
            block.stacks.forget_infinite(mean, squares)
        products: list[tuple[Tensor, ...]] = []
        for stack in block.stacks:
            multiply(stack, stack.of(mean), stack.gradient, forth=False)
            orders = []
            for side in stack.sides:
                product, order, left, whole = powered(side, on_device=on_device)
                products.append((product, side["factor"], left, whole))
                orders.append(order)
            reorder(stack, stack.of(squares), orders)
        function = orthonormal if on_device else orthonormal_or_exact
        divided([side["basis"] for side in _sides(block)], function, products, self._ranks)
        for stack in block.stacks:
            multiply(stack, stack.of(mean), stack.gradient, forth=True)
        sums = [(left.sum(), whole.sum()) for _, _, left, whole in products]
        now, before = self._schedule.steps, self._left_diagonal
        self._left_diagonal = now, [*(before[1] if before[0] == now else []), *sums]

    def _shares(self) -> dict[str, tuple[Tensor, Tensor]]:
        step, sums = self._left_diagonal
        zero = torch.zeros(())
        if not sums or step != self._schedule.steps - 1:
            return {"off_diagonal": (zero, zero)}
        left, whole = zip(*sums, strict=True)
        return {"off_diagonal": (torch.stack(left).sum(), torch.stack(whole).sum())}


def _has_bases(block: Block, inputs: StepInputs, gathering: int) -> bool:
    """True if the matrices have had their first bases, which are zeros before.

    In the first steps `update_period` may have changed, and the number of steps that gather with
    it. On a device, where nothing may wait, it has to stay what it is for these steps.
    """
    sides = _sides(block)
    if inputs.on_device or inputs.host_step > _GATHERING or not sides:
        return inputs.host_step > gathering
    return bool(sides[0]["basis"].any())


def _sides(block: Block) -> list[Side]:
    return [side for stack in block.stacks for side in stack.sides]
