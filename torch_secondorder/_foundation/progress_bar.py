"""Progress bars, and imports of optional packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def optional(module: str, package: str, purpose: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: Name of the module.
        package: Name of the package to install.
        purpose: The feature that needs it, for the error.

    Raises:
        ImportError: The package is not installed.
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
        progress: True for a bar, False for none; None for a bar if tqdm is installed and stderr is
            a terminal.
        total: The largest number of units to come; None if unknown.
        label: Text beside the bar.
        unit: Name of the units.
        delay: Seconds before the bar appears.

    Yields:
        A function that advances the bar by a number of units.

    Raises:
        ImportError: `progress` is True, and tqdm is not installed.
    """
    tqdm = None
    if progress or (progress is None and sys.stderr.isatty()):
        try:
            tqdm = optional("tqdm", "tqdm", "progress=True")
        except ImportError:
            if progress:
                raise
    if tqdm is None:
        yield lambda done: None
        return
    with tqdm.tqdm(total=total, desc=label, unit=unit, delay=delay, leave=False) as shown:
        yield lambda done: shown.update(done)
