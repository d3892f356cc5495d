"""Types of the public API."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.optim.optimizer import ParamsT as ParamsT

#: The standard closure: computes the loss, calls `backward()`, returns the loss.
Closure: TypeAlias = Callable[[], "Tensor | float"]
