"""Constraints: simple sets of tensors, and certificates of optimality under constraints."""

__all__: list[str] = []


def __dir__() -> list[str]:
    return __all__
