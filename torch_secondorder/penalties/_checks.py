"""What the arguments of a penalty have to be, and the errors.

All but the look at the outputs comes before the function is called, so that a module that is
refused has not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._foundation.private_torch import BatchNorm

__all__ = [
    "check_fits_exactly",
    "check_outputs",
    "check_samples",
    "check_separate",
]


def check_samples(x: Tensor) -> None:
    """Raises TypeError or ValueError where `x` is no batch that can be differentiated by."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x has dtype {x.dtype}, and there are derivatives by real floating-point numbers "
            "only: convert it, for instance with x.float()"
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"x is a batch of samples with the batch in front, got shape {tuple(x.shape)}"
        )


def check_separate(f: Callable[..., Any]) -> None:
    """Raises ValueError where a module has norm layers that mix the samples of a batch."""
    module = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    if not isinstance(module, nn.Module):
        return
    for name, inner in module.named_modules():
        # Without running statistics it takes those of the batch in evaluation as well.
        if isinstance(inner, BatchNorm) and (inner.training or inner.running_mean is None):
            what = f"{type(inner).__name__} {name!r}" if name else type(inner).__name__
            raise ValueError(
                f"{what} normalizes with the statistics of the batch, so an output depends on all "
                "samples and per-sample Jacobians are undefined: call eval() on it, or use a norm "
                "within samples, such as LayerNorm or GroupNorm"
            )


def check_outputs(y: Any, n: int, name: str = "f(x)") -> None:
    """Raises TypeError or ValueError where `y` is not one output for each of `n` samples."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} is to be a tensor, got {type(y).__name__}")
    if not y.is_floating_point():
        raise TypeError(f"{name} is to be real and floating-point, got {y.dtype}")
    if y.dim() == 0 or y.shape[0] != n:
        raise ValueError(
            f"{name} is to have one output for each of the {n} samples of x, with the batch in "
            f"front; it has shape {tuple(y.shape)}"
        )
    if y.numel() == 0:
        raise ValueError(f"{name} is empty: it has shape {tuple(y.shape)}")


def check_fits_exactly(shape: Sequence[int], like: Tensor) -> None:
    """Raises a ValueError where exact Jacobians and their gradient would exceed all memory."""
    check_fits(
        "exact Jacobians of this batch",
        shape,
        like.dtype,
        like.device,
        "use method='projection', or smaller batches",
        with_gradient=True,
    )
