"""Constants on a device, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch_secondorder._foundation.private_torch import number_of_dispatch_modes

_Make = TypeVar("_Make", bound=Callable[..., Any])


def cached_tensors(make: _Make) -> _Make:
    """Keeps what a function makes, by its arguments, so that a device need not make it again.

    Under a dispatch mode the tensors are made anew and not kept: those of a `FakeTensorMode`, in
    which you may measure the memory of a step before the first real one, have no numbers.

    >>> import torch
    >>> @cached_tensors
    ... def one(device):
    ...     return torch.ones((), device=device)
    >>> one("cpu") is one("cpu")
    True
    """
    kept = functools.cache(make)

    @functools.wraps(make)
    def found(*arguments: Any) -> Any:
        return make(*arguments) if number_of_dispatch_modes() else kept(*arguments)

    return cast(_Make, found)
