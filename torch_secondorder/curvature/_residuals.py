"""The loss as half a sum of squared residuals: roots of its curvature by the outputs.

By an output `z` the loss behaves as `|r|^2 / 2` where the residuals `r` have the Jacobian
`Q' dz/dtheta`, for a root `Q` of the curvature `B = Q Q'`, and `Q r` is the gradient by `z`. So
`J'J` is the Gauss-Newton matrix and `J'r` the gradient.

`B` is in closed form for standard losses. For a loss between prediction and target that grows
linearly, `huber_loss` and its like, `B` is zero where a point is far off. The weights
`psi(e) / e` of iteratively reweighted least squares (Huber 1981, "Robust statistics", section 7.8),
with `psi` the derivative of the loss by the error `e`, take its place: the gradient is the same,
and half the weighted sum of squares lies above the loss everywhere.

For outputs marked by hand `B` is found by differentiating the loss twice, see `structure_of`. It
may have entries that are not positive. A residual that was marked, with a robust loss on top, gets
weights `psi(z) / z` there (as in Ceres; Triggs and others 2000, "Bundle adjustment", section 3.3,
keep the second derivative and lose it to rounding just there). Where a loss is not of that kind,
such entries have no residual: their gradient is part of `rest_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, MissingSecondDerivative, Output, added
from torch_secondorder.curvature._likelihoods import Categorical, Independent, elementwise
from torch_secondorder.curvature._loss_structure import Unsettled, diagonal_of, structure_of
from torch_secondorder.curvature._output_space import (
    LossCurvature,
    OutputSpace,
    Tensors,
    UnknownOutputs,
)
from torch_secondorder.curvature._residual_roots import (
    BlockRoot,
    DiagonalRoot,
    Root,
    SoftmaxRoot,
    join_entries,
    split_entries,
)

__all__ = ["ResidualBlock", "Residuals"]

_NO_RESIDUALS = """\
the loss shows no residuals, and Levenberg-Marquardt needs them. Either compute it with a loss of \
torch.nn or torch.nn.functional, as in
    loss = torch.nn.functional.mse_loss(model(x), y)
or mark what it is a sum of squares of,
    r = torch_secondorder.mark_outputs(residual(model, x))
    loss = r.square().mean()
Optimizers that need none: NewtonCG(curvature="hessian"), Newton, BFGS, LBFGS."""

# A marked residual gets the weights of a robust loss where its curvature is less than this share.
_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """The residuals that one output gives, or two that a loss compares: some for each sample.

    A row of the Jacobian is a residual; its index is `sample * channels + channel`.

    Attributes:
        outputs: The places of the outputs among those of the `OutputSpace`.
        values: `r`, shape `(samples, channels)`, in float32 or wider.
        root: `Q`.
        dtypes: Of the outputs.
    """

    outputs: tuple[int, ...]
    values: Tensor
    root: Root
    dtypes: tuple[torch.dtype, ...]

    @property
    def samples(self) -> int:
        """The number of samples: the first dimension of an output, one where it has none.

        It is one as well for `cross_entropy` of a single sample, whose output has classes alone.
        """
        return self.root.samples

    @property
    def channels(self) -> int:
        """The number of residuals of a sample."""
        return self.root.channels

    @property
    def scale(self) -> Tensor | None:
        """The diagonal of `Q`, shaped like the output; None if `Q` is not diagonal."""
        single = isinstance(self.root, DiagonalRoot) and len(self.outputs) == 1
        return self.root.scale if single and isinstance(self.root, DiagonalRoot) else None

    def spread(self, u: Tensor) -> tuple[Tensor, ...]:
        """`Q u`: the cotangents whose pullback is `J'u`.

        Args:
            u: Shape `(..., samples, channels)`, on any device.

        Returns:
            A tensor `(..., *shape)` for each of `outputs`, in their dtypes.
        """
        parts = self.root.spread(u.to(self.values.device))
        return tuple(part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True))

    def collect(self, tangents: Tensors) -> Tensor:
        """`Q't`: the changes of the residuals, `J v`, from those of the outputs.

        Args:
            tangents: A tensor `(..., *shape)` for each of `outputs`; None for zeros, not for all.

        Returns:
            Shape `(..., samples, channels)`.
        """
        given = next(t for t in tangents if t is not None)
        return self.root.collect([torch.zeros_like(given) if t is None else t for t in tangents])

    def roots(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, ...]:
        """The columns of `Q` for some channels, each for all samples at once.

        The pullback of one of them, taken sample by sample, is that channel's rows of the Jacobian.

        Args:
            start: The first channel.
            stop: The one after the last.

        Returns:
            A tensor `(stop - start, *shape)` for each of `outputs`.
        """
        values = self.values
        chosen = torch.eye(self.channels, dtype=values.dtype, device=values.device)[start:stop]
        return self.spread(chosen.unsqueeze(1).expand(-1, self.samples, -1))


#: A block's outputs, root and residuals, and for each output what of its gradient has no residual.
_Found: TypeAlias = tuple[tuple[int, ...], Root, Tensor, Sequence[Tensor | None]]


class Residuals:
    """The residuals of an evaluated loss, and what of the loss is in none of them.

    Args:
        graph: The graph of the evaluation.

    Attributes:
        space: The outputs.
        curvature: The curvature of the loss by them.
        blocks: The residuals, in the order of the outputs.
        finite: Whether curvature and gradient by the outputs are finite. If not, the residuals are
            not to be used.
        bypassed: Whether a part of the loss bypasses the outputs.

    Raises:
        UnknownOutputs: The loss shows no residuals.
        InseparableLoss: The loss is not a sum over samples.
        TooLarge: A sample has too many outputs that the loss couples.
    """

    def __init__(self, graph: Graph) -> None:
        try:
            self.space = OutputSpace(graph)
        except UnknownOutputs:
            raise UnknownOutputs(_NO_RESIDUALS) from None
        self.curvature = LossCurvature(self.space)
        self.bypassed = self.curvature.bypassed
        self._values = [_wide(z) for z in self.space.values]
        self._precision = _precision(self.space.values)
        with torch.no_grad():
            gradients = self.curvature.gradients()
            self._gradients = [g.to(z.dtype) for g, z in zip(gradients, self._values, strict=True)]
            self._build()

    def _build(self) -> None:
        """Makes the blocks."""
        self._checks = [g.isfinite().all() for g in self._gradients]
        rest: list[Tensor | None] = [None] * len(self._values)
        blocks = []
        known, unknown = self._known()
        unsettled = diagonal_of(self._product, self._values, unknown, self._precision)
        for outputs, root, values, left in [*known, *self._unknown(unsettled)]:
            dtypes = tuple(self.space.values[i].dtype for i in outputs)
            blocks.append(ResidualBlock(outputs, values, root, dtypes))
            for i, part in zip(outputs, left, strict=True):
                rest[i] = part
        self.blocks = sorted(blocks, key=lambda block: block.outputs)
        self.finite, self._rest = _read(self._checks, rest)

    # Standard losses.

    def _known(self) -> tuple[list[_Found], list[int]]:
        """Blocks of standard losses, and the outputs that are in none of these."""
        found: list[_Found] = []
        unknown: list[int] = []
        outputs, coefficients = self.space.outputs, self.curvature.coefficients
        done: set[int] = set()
        for i, likelihood in enumerate(self.curvature.likelihoods):
            if i in done:
                continue
            if isinstance(likelihood, Categorical):
                self._checks.append(likelihood.weight.isfinite().all())
                root = SoftmaxRoot(self._values[i], likelihood.weight.clamp(min=0))
                values, left = root.solve(self._gradients[i])
                found.append(((i,), root, values, [left]))
            elif isinstance(likelihood, Independent):
                found.append(self._diagonal((i,), likelihood.information))
            else:
                compared = _compared(outputs, i)
                c = None if any(coefficients[k] is None for k in compared) else coefficients[i]
                weights = _error_weights(outputs[i], c, self._values[i])
                if weights is None:
                    unknown.append(i)
                else:
                    found.append(self._diagonal(compared, weights))
                    done.update(compared)
        return found, unknown

    def _diagonal(self, outputs: tuple[int, ...], information: Tensor) -> _Found:
        """A block with a residual for each entry of an output, or of the difference of two."""
        self._checks.append(information.isfinite().all())
        scale = information.clamp(min=0).sqrt()
        values = self._gradients[outputs[0]] / scale
        has = (scale > 0) & values.isfinite()
        root = DiagonalRoot(torch.where(has, scale, 0.0), (1, -1)[: len(outputs)])
        left: list[Tensor | None] = [torch.where(has, 0.0, self._gradients[i]) for i in outputs]
        values = torch.where(has, values, 0.0).reshape(root.samples, root.channels)
        return outputs, root, values, left

    # All other losses.

    def _product(self, tangents: Tensors, batched: bool) -> Tensors:
        """`B t`, in wide dtypes."""
        given = [
            None if t is None else t.to(z.dtype)
            for t, z in zip(tangents, self.space.values, strict=True)
        ]
        products = self.curvature.product(given, batched)
        return [None if p is None else _wide(p) for p in products]

    def _unknown(self, unsettled: Unsettled) -> list[_Found]:
        """Blocks of losses whose curvature was found by differentiating."""
        if not unsettled.finite:
            self._checks.append(self._gradients[0].new_zeros(()).bool())
        found: list[_Found] = []
        for i, diagonal in unsettled.diagonals.items():
            weights = diagonal
            if self.space.outputs[i].loss is None:
                weights = _robust(diagonal, self._gradients[i], self._values[i])
            found.append(self._diagonal((i,), weights))
        for outputs, blocks in structure_of(
            self._product, self._values, unsettled, self._precision
        ):
            if all(self.space.outputs[i].loss is None for i in outputs):
                z = [self._values[i] for i in outputs]
                blocks = _robust_blocks(blocks, [self._gradients[i] for i in outputs], z)
            found.append((outputs, *_of_blocks(blocks, [self._gradients[i] for i in outputs])))
        return found

    # What is in no residual.

    @cached_property
    def _remainder(self) -> Tensors:
        """The gradient of what bypasses the outputs, with its graph."""
        return self.space.remainder()

    def rest_gradient(self) -> Tensors | None:
        """The gradient of the loss without `J'r`, in parts shaped like the parameters.

        It has the loss terms that bypass the outputs, and entries of outputs by which the loss is
        not convex. Regularization of the optimizer is not in it, nor other ranks.

        Returns:
            None for zero, as a whole or for a parameter.
        """
        parts: Tensors | None = None
        if any(part is not None for part in self._rest):
            given = [
                None if part is None else part.to(z.dtype)
                for part, z in zip(self._rest, self.space.values, strict=True)
            ]
            parts = self.space.pull(given)
        if self.bypassed:
            beside = [None if p is None else p.detach() for p in self._remainder]
            parts = beside if parts is None else list(map(added, parts, beside))
        return parts

    def rest_diagonal(self) -> Tensors | None:
        """The curvature of what bypasses the outputs, if that is diagonal, as an L2 penalty's is.

        It takes two products with the Hessian of these terms. All other curvature of theirs is left
        out of `J'J`, and damping has to make up for it: mark the outputs of such a term if it is
        more than a penalty on the parameters.

        Returns:
            Parts shaped like the parameters, not negative, None for zeros; or None if there are no
            such terms, or if they have another curvature.
        """
        if not self.bypassed:
            return None
        params = [p.detach() for p in self.space.params]

        def product(tangents: Tensors, batched: bool) -> Tensors:
            given = [t for t in tangents if t is not None]  # all of them
            products = self.space.remainder_product(self._remainder, given, batched)
            return [p.to_dense() if p is not None and p.is_sparse else p for p in products]

        with suppress(MissingSecondDerivative):
            precision = _precision(params)
            found = diagonal_of(product, params, range(len(params)), precision)
            if found.finite and not found.others:
                return [_positive(found.diagonals.get(i)) for i in range(len(params))]
        return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _precision(tensors: Sequence[Tensor]) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _positive(diagonal: Tensor | None) -> Tensor | None:
    if diagonal is None:
        return None
    if diagonal.is_complex():
        return torch.view_as_complex(torch.view_as_real(diagonal).clamp(min=0))
    return diagonal.clamp(min=0)


def _read(checks: list[Tensor], rest: list[Tensor | None]) -> tuple[bool, list[Tensor | None]]:
    """Says whether all checks are passed, and drops what is all zeros; in one transfer."""
    places = [i for i, part in enumerate(rest) if part is not None]
    flags = [*checks, *(rest[i].any() for i in places)]  # type: ignore[union-attr]
    if not flags:
        return True, rest
    read = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    kept = {i for i, some in zip(places, read[len(checks) :], strict=True) if some}
    return all(read[: len(checks)]), [part if i in kept else None for i, part in enumerate(rest)]


# Losses of an error, `e = input - target`.


def _floored(e: Tensor) -> Tensor:
    """The sizes of errors, none smaller than the rounding of the largest one's square."""
    size = e.abs()
    if not e.numel():
        return size
    # All may be zero.
    least = size.amax() * torch.finfo(e.dtype).eps ** 0.5 + torch.finfo(e.dtype).tiny
    return torch.maximum(size, least)


def _huber(e: Tensor, arguments: dict[str, Any]) -> Tensor:
    share: Tensor = arguments["delta"] / e.abs()
    return share.clamp(max=1.0)


def _smooth_l1(e: Tensor, arguments: dict[str, Any]) -> Tensor:
    beta = arguments["beta"]
    return 1 / (e.abs().clamp(min=beta) if beta else _floored(e))


def _l1(e: Tensor, arguments: dict[str, Any]) -> Tensor:
    return 1 / _floored(e)


def _square(e: Tensor, arguments: dict[str, Any]) -> Tensor:
    return torch.full_like(e, 2.0)


# psi(e) / e for the losses of an error.
_ERROR_LOSSES: dict[Any, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    F.mse_loss: _square,
    F.huber_loss: _huber,
    F.smooth_l1_loss: _smooth_l1,
    F.l1_loss: _l1,
}


def _compared(outputs: Sequence[Output], place: int) -> tuple[int, ...]:
    """The places of the arguments of one loss, that at `place` first."""
    value = outputs[place].value
    others = (i for i, o in enumerate(outputs) if i != place and o.value is value)
    return (place, *(others if value is not None else ()))


def _error_weights(output: Output, coefficient: Tensor | None, z: Tensor) -> Tensor | None:
    """The weights of the squared errors of a standard loss; None where these are not known."""
    arguments = output.arguments
    psi = _ERROR_LOSSES.get(output.loss)
    older = arguments.get("size_average") is not None or arguments.get("reduce") is not None
    if psi is None or coefficient is None or older or arguments.get("weight") is not None:
        return None
    pair = [arguments["input"].detach(), arguments["target"].detach()]
    if pair[0].shape != pair[1].shape:
        return None
    e = pair[0].to(z.dtype) - pair[1].to(z.dtype)
    return psi(e, arguments) * elementwise(z, arguments, coefficient.to(z.dtype))


def _robust(curvature: Tensor, gradient: Tensor, z: Tensor) -> Tensor:
    """The curvature by marked residuals, with weights where it vanishes far from zero.

    A loss `rho(z^2)` with a concave `rho` has `psi(z) / z = 2 rho'` at least as large as its
    second derivative. Where this holds for all entries of an output, the loss is taken for one.
    """
    force, along = gradient.abs(), curvature * z.abs()
    if not bool((along < _SHARE * force).any()):  # the usual case
        return curvature
    weights = force / _floored(z)
    upright = (gradient * z >= 0) & ((z != 0) | (gradient == 0))
    above = (force * (1 + torch.finfo(z.dtype).eps ** 0.5) >= along).logical_or_(z == 0)
    chosen = (upright & above).all() & (curvature < _SHARE * weights)
    return torch.where(chosen, weights, curvature)


def _robust_blocks(blocks: Tensor, gradients: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The same for losses of the lengths of the samples' vectors, see `_robust`."""
    shapes = [z.shape for z in values]
    g, z = join_entries(gradients, shapes), join_entries(values, shapes)
    length = torch.linalg.vector_norm(z, dim=-1)
    weights = torch.linalg.vector_norm(g, dim=-1) / _floored(length)
    margin = torch.finfo(z.dtype).eps ** 0.5
    along = (g - weights.unsqueeze(-1) * z).abs() <= margin * g.abs().amax(-1, keepdim=True)
    largest = torch.linalg.eigvalsh(blocks)[..., -1]
    curvature = torch.einsum("ni,nij,nj->n", z, blocks, z)
    robust = along.all() & (largest <= (1 + margin) * weights).all()
    chosen = robust & (curvature < _SHARE * weights * length.square())
    scalar = weights[:, None, None] * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.where(chosen[:, None, None], scalar, blocks)


# Dense blocks.


def _of_blocks(
    blocks: Tensor, gradients: Sequence[Tensor]
) -> tuple[BlockRoot, Tensor, Sequence[Tensor | None]]:
    """The root of the positive part of dense blocks, its residuals, and what these leave."""
    shapes = [g.shape for g in gradients]
    g = join_entries(gradients, shapes)
    values, vectors = torch.linalg.eigh(blocks)
    limits = torch.finfo(blocks.dtype)
    noise = 10 * blocks.shape[-1] * limits.eps
    has = values > noise * values.abs().amax(-1, keepdim=True).clamp(min=limits.tiny)
    used = has.any(0).tolist()  # in ascending order
    first = used.index(True) if any(used) else len(used)
    has, values, vectors = has[:, first:], values[:, first:], vectors[:, :, first:]
    scale = torch.where(has, values, 0.0).sqrt()
    along = torch.einsum("nkc,nk->nc", vectors, g)
    r = torch.where(has, along / scale, 0.0)
    root = BlockRoot(vectors * scale.unsqueeze(1), shapes)
    left = g - torch.einsum("nkc,nc->nk", vectors, torch.where(has, along, 0.0))
    left = torch.where(left.abs() > noise * g.abs().amax(1, keepdim=True), left, 0.0)
    return root, r, split_entries(left, shapes)
