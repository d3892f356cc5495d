"""Progress bars and plots, from packages that need not be installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bar", "optional"]


def optional(module: str, package: str, purpose: str) -> Any:
    """Imports a module that this package can do without.

    Args:
        module: Its name.
        package: What to install for it.
        purpose: What it is needed for, for the error.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install {package}") from error


@contextmanager
def bar(
    progress: bool | None,
    total: int | None,
    label: str,
    *,
    unit: str = "product",
    delay: float = 0.0,
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr.

    Args:
        progress: True for a bar, False for none, None for one where tqdm is installed and stderr is
            a terminal.
        total: How much is to come, at most; None if that is not known.
        label: What is done.
        unit: What is counted.
        delay: Seconds before it appears: what is done sooner needs none.

    Yields:
        What to call with the number just done.

    Raises:
        ImportError: `progress` is True, and tqdm is not installed.
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda done: None
        return
    try:
        tqdm = optional("tqdm", "tqdm", "progress=True")
    except ImportError:
        if progress:
            raise
        yield lambda done: None
        return
    with tqdm.tqdm(total=total, desc=label, unit=unit, delay=delay, leave=False) as shown:
        yield lambda done: shown.update(done)
