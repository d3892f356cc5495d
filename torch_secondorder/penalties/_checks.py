"""Checks of the arguments of a penalty.

All checks except that of the outputs come before the function is called, so that a rejected module
is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._foundation.private_torch import BatchNorm


def check_samples(x: Tensor) -> None:
    """Raises a TypeError or ValueError unless `x` is a batch with derivatives."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x has dtype {x.dtype}, and derivatives need a real floating-point dtype: convert it, "
            "for instance with x.float()"
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"x must be a non-empty batch, with the batch dimension first, got shape "
            f"{tuple(x.shape)}"
        )


def check_separate(f: Callable[..., Any]) -> None:
    """Raises a ValueError if a module has norm layers that mix the samples of a batch."""
    module = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    if not isinstance(module, nn.Module):
        return
    for name, inner in module.named_modules():
        # Without running statistics, it uses those of the batch in evaluation mode as well.
        if isinstance(inner, BatchNorm) and (inner.training or inner.running_mean is None):
            what = f"{type(inner).__name__} {name!r}" if name else type(inner).__name__
            raise ValueError(
                f"{what} normalizes with the statistics of the batch, so an output depends on all "
                "samples and per-sample Jacobians are undefined: call eval() on it, or use a norm "
                "within samples, such as LayerNorm or GroupNorm"
            )


def check_outputs(y: Any, n: int, name: str = "f(x)") -> None:
    """Raises a TypeError or ValueError unless `y` has one output for each of `n` samples."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(y).__name__}")
    if not y.is_floating_point():
        raise TypeError(f"{name} must be real and floating-point, got {y.dtype}")
    if y.dim() == 0 or y.shape[0] != n:
        raise ValueError(
            f"{name} must have one output for each of the {n} samples of x, with the batch "
            f"dimension first, got shape {tuple(y.shape)}"
        )
    if y.numel() == 0:
        raise ValueError(f"{name} is empty: it has shape {tuple(y.shape)}")


def check_fits_exactly(shape: Sequence[int], like: Tensor) -> None:
    """Raises a ValueError if exact Jacobians and their gradient would exceed all memory."""
    check_fits(
        "exact Jacobians of this batch",
        shape,
        like.dtype,
        like.device,
        "use method='projection', or smaller batches",
        with_gradient=True,
    )
