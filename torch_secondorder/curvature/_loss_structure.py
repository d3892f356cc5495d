"""The curvature of a loss by outputs where it is known by its products alone.

A loss that is a sum over samples has a curvature without entries between samples. Most are sums
over all entries, and it is diagonal: one product with a vector of ones shows it, and one with
random numbers whether that is all of it. Else each sample has a block, which takes as many products
as a sample has entries, over the graph between outputs and loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import several
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder.curvature._output_space import Tensors
from torch_secondorder.curvature._residual_roots import join_entries, samples_in, split_entries

__all__ = ["InseparableLoss", "Unsettled", "diagonal_of", "structure_of"]

#: `B t`, from tensors like the outputs and whether they are batched; None for zeros.
Product: TypeAlias = Callable[[Tensors, bool], Tensors]

_INSEPARABLE = """\
the loss is not a sum over samples, the entries of the first dimension of its outputs: its second \
derivative couples different samples, and there are no residuals. Minimize a sum in its place, \
such as the square of a norm for the norm: mse_loss(z, y) for mse_loss(z, y).sqrt(). If what you \
marked is combined over samples before it is squared, mark the residuals r that come out, with \
torch_secondorder.mark_outputs(r). NewtonCG, BFGS and LBFGS need no sum."""

# Elements of the unit vectors that are multiplied at a time.
_ELEMENTS = 2**22


class InseparableLoss(RuntimeError):
    """The loss is not a sum over samples, so there is no vector of residuals.

    Samples are the entries of the first dimension of the outputs. Minimize a sum over them, for
    instance the square of a root, or use an optimizer that needs no residuals, such as `NewtonCG`.
    """


@dataclass(frozen=True, slots=True)
class Unsettled:
    """The outputs by which a curvature is diagonal, and the others.

    Attributes:
        diagonals: By outputs, the diagonal.
        others: The outputs by which the curvature is more than that.
        finite: Whether all products are finite. If not, all outputs count as diagonal.
    """

    diagonals: dict[int, Tensor]
    others: list[int]
    finite: bool = True


def diagonal_of(
    product: Product, values: Sequence[Tensor], places: Sequence[int], precision: float
) -> Unsettled:
    """Finds the outputs by which a curvature is diagonal, with two products.

    Args:
        product: Multiplies with the curvature.
        values: All outputs.
        places: Those that it is by.
        precision: The machine epsilon that it is computed with.
    """
    if not places:
        return Unsettled({}, [])
    ones = _multiplied(product, values, {i: _ones(values[i]) for i in places})
    probes = {i: _probe(values[i], i) for i in places}
    found = _multiplied(product, values, probes)
    flags = []
    for i in places:
        expected = _real(ones[i]) * _real(probes[i])
        size = torch.maximum(_largest(expected), _largest(_real(found[i])))
        error = _largest(_real(found[i]) - expected)
        flags += [size.isfinite(), error <= _tolerance(precision) * size]
    read = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    if not all(read[::2]):
        return Unsettled({i: ones[i] for i in places}, [], finite=False)
    others = [i for i, diagonal in zip(places, read[1::2], strict=True) if not diagonal]
    return Unsettled({i: ones[i] for i in places if i not in others}, others)


def structure_of(
    product: Product, values: Sequence[Tensor], unsettled: Unsettled, precision: float
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Finds the blocks of samples where a curvature is not diagonal.

    Args:
        product: Multiplies with the curvature.
        values: All outputs.
        unsettled: From `diagonal_of`.
        precision: See `diagonal_of`.

    Yields:
        Outputs that have the same samples, and blocks `(samples, entries, entries)`, whose entries
        are those of the outputs one after another.

    Raises:
        InseparableLoss: There are entries between samples.
        TooLarge: The blocks do not fit in memory.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i in unsettled.others:
        z = values[i]
        groups.setdefault((samples_in(z.shape), z.dtype, z.device), []).append(i)
    for places in groups.values():
        _check_separate(product, values, places, precision)
        yield tuple(places), _blocks(product, values, places, precision)


def _check_separate(
    product: Product, values: Sequence[Tensor], places: list[int], precision: float
) -> None:
    """Raises where half of the samples changes the gradient by the others, or by other outputs."""
    samples = samples_in(values[places[0]].shape)
    half = _half(samples)
    given, beside = {}, {}
    for i in places:
        z = values[i]
        kept = half.to(z.device).view(samples, *[1] * (z.dim() - 1)) if z.dim() else half[0]
        given[i] = _probe(z, i) * kept
        beside[i] = ~kept
    found = _multiplied(product, values, given)
    size = torch.stack([_largest(f) for f in found.values()]).amax()
    leaks = [_largest(f * beside[i] if i in beside else f) for i, f in found.items()]
    if bool(torch.stack(leaks).amax() > _tolerance(precision) * size):
        raise InseparableLoss(_INSEPARABLE)


def _blocks(
    product: Product, values: Sequence[Tensor], places: list[int], precision: float
) -> Tensor:
    """The blocks of all samples, by a product for each entry of a sample."""
    shapes = [values[i].shape for i in places]
    entries = sum(math.prod(shape[1:]) for shape in shapes)
    like = values[places[0]]
    samples = samples_in(like.shape)
    check_fits(
        "the curvature of the loss by the outputs of each sample",
        (samples, entries, entries),
        like.dtype,
        like.device,
        "write the loss as a sum over entries, or mark the residuals with mark_outputs",
    )

    def multiply(parts: Tensors, batched: bool) -> Tensors:
        tangents: list[Tensor | None] = [None] * len(values)
        for i, part in zip(places, parts, strict=True):
            tangents[i] = part
        found = product(tangents, batched)
        like = [p for p in parts if p is not None]
        return [
            torch.zeros_like(p) if found[i] is None else found[i]
            for i, p in zip(places, like, strict=True)
        ]

    blocks = like.new_empty(samples, entries, entries)
    count = max(1, _ELEMENTS // max(samples * entries, 1))
    for start in range(0, entries, count):
        units = torch.eye(entries, dtype=like.dtype, device=like.device)[start : start + count]
        spread = split_entries(units.unsqueeze(1).expand(-1, samples, -1), shapes)
        columns = [c for c in several(multiply, spread) if c is not None]
        blocks[:, :, start : start + count] = join_entries(columns, shapes).movedim(0, -1)
    blocks = (blocks + blocks.mT).div_(2)
    probes = [_probe(values[i], i + 1) for i in places]
    expected = torch.einsum("nij,nj->ni", blocks, join_entries(probes, shapes))
    error = join_entries([m for m in multiply(probes, False) if m is not None], shapes) - expected
    if bool(_largest(error) > _tolerance(precision) * _largest(expected)):
        raise InseparableLoss(_INSEPARABLE)
    return blocks


def _multiplied(
    product: Product, values: Sequence[Tensor], tangents: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Products as a dictionary like the tangents, of outputs with products."""
    found = product([tangents.get(i) for i in range(len(values))], False)
    result = {i: torch.zeros_like(t) for i, t in tangents.items()}
    return result | {i: p for i, p in enumerate(found) if p is not None}


def _tolerance(precision: float) -> float:
    """Errors relative to the largest entry that are taken for rounding."""
    return float(precision ** (2 / 3))


def _largest(tensor: Tensor) -> Tensor:
    """The size of the largest entry; zero if there is none."""
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _ones(like: Tensor) -> Tensor:
    ones = torch.ones_like(_real(like))
    return torch.view_as_complex(ones) if like.is_complex() else ones


def _probe(like: Tensor, seed: int) -> Tensor:
    """Random numbers, the same each time, which leave torch's own generator alone.

    They are of either sign, and between a half and one and a half: signs alone may cancel.
    """
    real = _real(like)
    generator = torch.Generator(like.device).manual_seed(seed)
    dtype = torch.promote_types(real.dtype, torch.float32)
    numbers = torch.rand(real.shape, generator=generator, dtype=dtype, device=like.device)
    numbers = numbers.mul_(2).sub_(1)
    numbers = numbers.add_(torch.copysign(torch.full_like(numbers, 0.5), numbers)).to(real.dtype)
    return torch.view_as_complex(numbers) if like.is_complex() else numbers


def _half(samples: int) -> Tensor:
    """A random half of the samples; all of one."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    return order < (samples + 1) // 2
