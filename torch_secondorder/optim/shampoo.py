"""Shampoo: gradients between inverse roots of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import (
    check_betas,
    check_choice,
    check_number,
)
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.adam import adam_direction
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block, Number, narrowed
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.kronecker.division import divided
from torch_secondorder._optim.kronecker.inverse_roots import (
    RootMethodName,
    exact_fraction,
    inverse_roots,
)
from torch_secondorder._optim.kronecker.settings import check_blocks, factor_beta
from torch_secondorder._optim.kronecker.stacks import Stack
from torch_secondorder._optim.state import BlockMatrices, Moment, declare

__all__ = ["GraftingName", "RootMethodName", "Shampoo", "ShampooInfo"]

#: The methods that lend the length of their steps.
GraftingName: TypeAlias = Literal["adam", "sgd"]


@dataclass(frozen=True, slots=True)
class ShampooInfo(DiagonalInfo):
    """Report of one step of `Shampoo`.

    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> optimizer = Shampoo([x])
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name, optimizer.info.evaluations
    ('MOVED', 0)
    """


class Shampoo(DiagonalOptimizer):
    """Gradients of matrices, whitened from both sides, for networks on mini-batches.

    For each block of a matrix, Shampoo averages `G G'` and `G' G` of its gradients `G`, and takes
    the average gradient between inverse roots of the two (Gupta et al. 2018, "Shampoo:
    preconditioned stochastic tensor optimization"):

        M = b1 M + (1 - b1) G,  L = b2 L + (1 - b2) G G',  R = b2 R + (1 - b2) G' G
        D = L^(-e) M R^(-e),  W -= lr * (|A| / |D| * D + weight_decay * W)

    where `A` is the step of Adam for the block, and the length of the step is Adam's (*grafting*).
    So learning rates, schedules and weight decay of AdamW carry over. The roots are computed again
    every `update_period` steps. Parameters with less than two dimensions are updated as by AdamW.

    Args:
        params: Parameters or groups.
        lr: Learning rate. Start with one that suits AdamW, or twice as much.
        betas: Decay rates of the averages of gradients, and of their squares and factors.
        eps: Added to the denominator of Adam's step.
        weight_decay: Decoupled weight decay, multiplied by `lr` as in `torch.optim.AdamW`.
        exponent: The exponent `e` of the inverse roots; None for the original one, 1/4 for blocks
            with two factors and 1/2 for those with one. With 1/2, two factors approximate Adam's
            preconditioner with a full matrix (Morwani et al. 2024, "A new perspective on Shampoo's
            preconditioner"). The roots are multiplied by a power of the factor's trace, so that
            steps do not depend on the scale of the loss.
        grafting: `"adam"` for the length of Adam's step in each block, as in the distributed
            Shampoo of Shi et al. (2023); `"sgd"` for the length of the average gradient; None for
            the length of `D`.
        matrix_eps: Added to the eigenvalues of factors, relative to the largest one.
        shampoo_beta: Decay rate of the factors; None for the second of `betas`.
        update_period: Steps from one computation of the roots to the next. At the beginning they
            are computed in the steps 1, 2, 4, 8 and so on.
        root_method: `"eigh"` for eigendecompositions; `"newton"` for iterations of matrix products,
            which never wait for a device. On a CPU, `"eigh"` is faster.
        block_size: See `SOAP`, as the next three.
        max_precond_dim: The longest side of a matrix that has a factor.
        merge_dims: Whether all dimensions after the first are joined.
        factor_dtype: The dtype of the factors.
        accumulation_steps: See `AdaHessian`.
        maximize: Whether to maximize the loss.
        capturable: See `AdaHessian`. Steps that compute roots by `"eigh"` wait for the device.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: An argument is out of range.

    If a gradient or the loss is not finite, nothing changes, and `info.status` reports it.

    >>> weight = torch.nn.Parameter(torch.ones(3, 2))
    >>> scales = torch.tensor([[10.0], [1.0], [0.1]])
    >>> optimizer = Shampoo([weight], lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (scales * weight).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(100):
    ...     loss = optimizer.step(closure)
    >>> bool(loss < 0.01)
    True
    """

    info: ShampooInfo | None
    _info_type = ShampooInfo
    _recognized_by = "grafting"
    _decouples_weight_decay = True  # it is no part of the loss
    _estimates = False
    _divides = True
    _state_fields = declare(
        exp_avg_sq=Moment(), factor=BlockMatrices(), root=BlockMatrices(wide=True)
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        exponent: float | None = 0.5,
        grafting: GraftingName | None = "adam",
        matrix_eps: float = 1e-6,
        shampoo_beta: float | None = None,
        update_period: int = 10,
        root_method: RootMethodName = "eigh",
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
            "exponent": exponent,
            "grafting": grafting,
            "matrix_eps": matrix_eps,
            "shampoo_beta": shampoo_beta,
            "update_period": update_period,
            "root_method": root_method,
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
        check_blocks(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"], above=0.0)
        check_number("matrix_eps", group["matrix_eps"], low=0.0)
        if group["grafting"] is not None:
            check_choice("grafting", group["grafting"], GraftingName, "None")
        check_choice("root_method", group["root_method"], RootMethodName)
        exponent = group["exponent"]
        check_number("exponent", exponent, above=0.0, optional=True)
        if exponent and group["root_method"] == "newton" and exact_fraction(exponent) is None:
            raise ValueError(
                "root_method='newton' needs an exponent that is a fraction of small integers, "
                f"such as 1/4, got {exponent}: use root_method='eigh'"
            )

    def _has_decisions(self, step: int, group: dict[str, Any]) -> bool:
        return _is_due(step, int(group["update_period"]))

    def _update(self, block: Block, inputs: StepInputs) -> None:
        group = block.group
        if group["weight_decay"]:
            block.decay(1 - inputs.lr * group["weight_decay"])
        stacks, gradient, betas = block.stacks, inputs.ordered_gradient, group["betas"]
        with torch.autocast(block.device.type, enabled=False):
            for stack in stacks:
                for side in stack.sides:
                    side.average_gram("factor", stack.gradient, factor_beta(group), inputs.weight)
            if _is_due(inputs.host_step, int(group["update_period"])):
                self._refresh(block, inputs)
            adam_direction(
                block,
                gradient,
                block.moments["exp_avg_sq"],
                stacks.direction,
                betas=betas,
                eps=group["eps"],
                step=inputs.step,
                weight=inputs.weight,
            )
            correction = 1 - betas[0] ** inputs.step
            for stack in stacks:
                _whiten(stack, stack.of(block.exp_avg), group["grafting"], -1 / correction)
        block.move_blocks(inputs.lr if group["maximize"] else -inputs.lr)

    def _refresh(self, block: Block, inputs: StepInputs) -> None:
        """Computes the inverse roots of the factors, divided over the ranks of DDP."""
        group = block.group
        correction = 1 - factor_beta(group) ** inputs.step
        for count in (1, 2):
            sides = [s for stack in block.stacks if len(stack.sides) == count for s in stack.sides]
            root_of = partial(_root_of, sides=count, group=group)
            roots = [side["root"] for side in sides]
            factors = [(side["root"], side["factor"]) for side in sides]
            divided(roots, root_of, factors, self._ranks)
            for root in roots:
                root.mul_(narrowed(correction ** (0.5 / count), root))
        squares = block.moments["exp_avg_sq"]
        matrices = [side["factor"] for stack in block.stacks for side in stack.sides]
        # A factor that is not finite has a diagonal entry that is not.
        largest = [squares, *(matrix.diagonal(dim1=-2, dim2=-1) for matrix in matrices)]
        finite = (bool(t.amax() < torch.inf) for t in largest if t.numel())
        if inputs.on_device or not all(finite):
            # Roots of zeros, until the next ones, which are of later gradients alone.
            block.stacks.forget_infinite(block.exp_avg, squares, ("factor", "root"))


def _is_due(step: int, period: int) -> bool:
    """True if a step computes the roots: a multiple of the period, and before it powers of two."""
    return step % period == 0 if step >= period else step & (step - 1) == 0


def _root_of(root: Tensor, factor: Tensor, *, sides: int, group: dict[str, Any]) -> Tensor:
    """The inverse roots of factors, of degree `-1 / (2 * sides)` whatever the exponent.

    So steps do not depend on the scale of the loss, with grafting or without.

    Args:
        root: The last roots, which have the dtype that is asked for.
        factor: The factors.
        sides: The number of sides that have factors.
        group: The hyperparameters.
    """
    usual = 1 / (2 * sides)
    power = usual if group["exponent"] is None else float(group["exponent"])
    roots = inverse_roots(factor, power, float(group["matrix_eps"]), group["root_method"])
    if power != usual:
        traces = factor.to(roots.dtype).diagonal(dim1=-2, dim2=-1).sum(-1)
        traces = torch.where((traces > 0) & traces.isfinite(), traces, 1.0)
        roots.mul_(traces.pow_(power - usual)[:, None, None])
    return roots.to(root.dtype)


def _whiten(stack: Stack, mean: Tensor, grafting: GraftingName | None, scale: Number) -> None:
    """Puts minus the direction of Shampoo in the place of that of Adam.

    Args:
        stack: The blocks; their directions are minus those of Adam.
        mean: The average gradients of the blocks, without correction of their bias.
        grafting: See `Shampoo`.
        scale: The correction, with the sign.
    """
    if not stack.sides:
        return
    whitened = mean
    for side in stack.sides:
        factors = (side["root"], whitened) if side.dim == 0 else (whitened, side["root"])
        whitened = torch.bmm(*factors)
    own, ratio = _lengths(whitened), narrowed(scale, mean)
    # Blocks stay where squares leave the range of the precision.
    usable = own.isfinite()
    if grafting is not None:
        ratio = _lengths(stack.direction).neg_() if grafting == "adam" else _lengths(mean) * ratio
        ratio = ratio / own
        usable &= ratio.isfinite()
    if isinstance(ratio, Tensor) and ratio.dim():
        ratio = ratio[:, None, None]
    torch.mul(whitened, ratio, out=stack.direction)
    if isinstance(scale, Tensor) or not bool(usable.all()):  # there, nothing waits for the device
        stack.direction.masked_fill_(~usable[:, None, None], 0.0)


def _lengths(blocks: Tensor) -> Tensor:
    """The Frobenius norm of each block."""
    lengths: Tensor = torch.linalg.vector_norm(blocks.flatten(1), dim=1)
    return lengths
