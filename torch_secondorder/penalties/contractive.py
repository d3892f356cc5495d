"""The penalty of the contractive autoencoder, in closed form if the encoder allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder._foundation.subclasses import like, plain
from torch_secondorder.penalties._chain import Chain, changes, largest, mean_squared_norm
from torch_secondorder.penalties._checks import (
    check_fits_exactly,
    check_outputs,
    check_samples,
    check_separate,
)
from torch_secondorder.penalties._layers import chain_of, slope_from_output, stack_of
from torch_secondorder.penalties._squares import squared_sum
from torch_secondorder.penalties.jacobian import differentiated, exact_rows, projected_rows

__all__ = ["contractive_penalty"]

# Limits of "auto", in bytes of the largest array. A chain takes a few large matrix products; a
# Jacobian by differentiation takes a backward pass for each of its rows.
_LARGEST_CHAIN = 2**28
_LARGEST_JACOBIAN = 2**26


def contractive_penalty(
    encoder: Callable[[Tensor], Tensor],
    x: Tensor,
    method: Literal["auto", "exact", "projection"] = "auto",
    *,
    noise: float | None = None,
    n_noise: int = 1,
    n_projections: int = 1,
    generator: torch.Generator | None = None,
    code: Tensor | None = None,
) -> Tensor:
    """Squared Frobenius norm of an encoder's Jacobian; the mean over the batch.

    This is the penalty of the contractive autoencoder (Rifai et al. 2011, "Contractive
    auto-encoders: explicit invariance during feature extraction"). With `noise` it is that of the
    higher-order contractive autoencoder instead, `E|J(x) - J(x + e)|^2` for `e` from
    `N(0, noise^2)`, which keeps the curvature small (Rifai et al. 2011, "Higher order contractive
    auto-encoder"). Their loss adds both, each with its own weight.

    The computation depends on the encoder:

    * For a `Linear` with elementwise activations of `torch.nn`, in `Sequential`s or alone, with or
      without a `Flatten` before it, there is a closed form; for sigmoid units it is
      `sum_i (h_i (1 - h_i))^2 sum_j W_ij^2`.
    * For several of them it is the product of their Jacobians, from the cheaper end.
    * For anything else, and for modules with hooks or replaced forwards, it uses differentiation:
      exact if the Jacobians of the batch take at most 64 MiB, else random projections, see
      `jacobian_penalty`. `"auto"` also does this if the product would take more than 256 MiB.

    You can differentiate it any number of times, in closed form also with transforms of
    `torch.func`.

    Args:
        encoder: Maps a batch to a batch, each sample independently.
        x: Shape `(n, ...)`, real and floating-point.
        method: `"auto"`; `"exact"` for no projections, whatever the size; or `"projection"` for
            projections in any case.
        noise: Standard deviation of the noise.
        n_noise: Noisy copies of each sample.
        n_projections: Random vectors for each sample.
        generator: Source of noise and random vectors.
        code: The output `encoder(x)`, if the loss has it already. For one layer of sigmoid, tanh or
            ReLU units this saves another call of the encoder, which is most of the cost.

    Returns:
        A 0-dim tensor with a graph, unless gradients are disabled.

    Raises:
        TypeError: `x` or the encoder's output is not a real floating-point tensor.
        ValueError: The encoder has BatchNorm that uses the statistics of the batch; its output, or
            `code`, is not one for each sample, or has no graph; `"exact"` does not fit into memory;
            or an argument is out of range.

    >>> encoder = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Sigmoid())
    >>> for p in encoder.parameters():
    ...     _ = torch.nn.init.zeros_(p)
    >>> _ = torch.nn.init.ones_(encoder[0].weight)
    >>> contractive_penalty(encoder, torch.zeros(3, 2)).item()  # (1/4)^2 (1 + 1)
    0.125
    """
    check_choice("method", method, ("auto", "exact", "projection"))
    check_integer("n_projections", n_projections)
    check_integer("n_noise", n_noise)
    check_number("noise", noise, above=0, optional=True)
    x, given = plain(x), x
    check_samples(x)
    check_separate(encoder)
    if code is not None:
        code = plain(code)
        check_outputs(code, len(x), "code")
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        points = x if noise is None else _with_noise(x, noise, n_noise, generator)
        value = None
        if method != "projection":
            value = _in_closed_form(encoder, points, len(x), code, force=method == "exact")
        if value is None:

            def called(points: Tensor) -> Tensor:
                return encoder(like(points, given))

            value = _by_differentiation(called, points, len(x), method, n_projections, generator)
    return value if differentiable else value.detach()


def _with_noise(x: Tensor, noise: float, n_noise: int, generator: torch.Generator | None) -> Tensor:
    """The batch, followed by noisy copies of it."""
    shape = n_noise * len(x), *x.shape[1:]
    drawn = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    copies = x.repeat(n_noise, *[1] * (x.dim() - 1))
    return torch.cat([x, copies + noise * drawn])


def _in_closed_form(
    encoder: Callable[[Tensor], Tensor], points: Tensor, n: int, code: Tensor | None, *, force: bool
) -> Tensor | None:
    """The closed form; None if the layers have none, or if it is too large and not forced."""
    modules = stack_of(encoder, points)
    if modules is None:
        return None
    weights = [m.weight for m in modules if isinstance(m, nn.Linear)]
    numbers = largest(weights)
    if force:
        check_fits_exactly((len(points), numbers), weights[0])
    elif len(weights) > 1 and len(points) * numbers * weights[0].element_size() > _LARGEST_CHAIN:
        return None
    slope = None if code is None else slope_from_output(modules, code)
    if code is None or slope is None:
        return mean_squared_norm(chain_of(modules, points), n)
    if code.shape != (n, len(weights[0])):
        raise ValueError(f"code must have shape {(n, len(weights[0]))}, got {tuple(code.shape)}")
    if weights[0].requires_grad and not code.requires_grad:
        raise ValueError(
            "code has no graph, and gradients through it would be missing: pass the output of "
            "encoder(x) without detach()"
        )
    if len(points) > n:
        slope = torch.cat([slope, *chain_of(modules, points[n:]).slopes])
    return mean_squared_norm(Chain(weights, [slope]), n)


def _by_differentiation(
    encoder: Callable[[Tensor], Tensor],
    points: Tensor,
    n: int,
    method: str,
    n_projections: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The penalty by differentiation with respect to the input."""
    point = differentiated(points)
    y = plain(with_second_derivatives(encoder)(point))
    check_outputs(y, len(points), "encoder(x)")
    size = y.numel() * point[0].numel() * y.element_size()
    if method == "exact" or (method == "auto" and size <= _LARGEST_JACOBIAN):
        rows, scale = exact_rows(y, point), 1.0
    else:
        copies = len(points) // n
        rows, scale = projected_rows(y, point, n_projections, generator, copies)
    change = changes(rows.transpose(0, 1), n)
    return squared_sum(change) * (scale / len(change))
