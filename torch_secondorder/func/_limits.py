"""Modes of derivatives, and ranges of directions."""

from __future__ import annotations

from typing import Literal

__all__ = ["Mode", "spans"]

Mode = Literal["auto", "forward", "reverse"]


def spans(total: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Ranges of at most `chunk_size` places that cover `total`."""
    step = total if chunk_size is None else chunk_size
    return [(start, min(start + step, total)) for start in range(0, total, max(step, 1))]
