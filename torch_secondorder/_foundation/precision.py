"""The precision of matrix products."""

from __future__ import annotations

import torch


def rounds_float32_products() -> bool:
    """True if products of float32 matrices may be rounded to fewer digits (TF32, bfloat16)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by newer names, which the older ones do not know
        return True
