"""Old import paths, which work for one release and say what is there instead."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MovedModules"]


class MovedModules(MetaPathFinder, Loader):
    """Finds modules by the names that they had, with a DeprecationWarning that names the new one.

    Args:
        moved: New names by old ones. What an old module had is looked for in all of its new ones.

    >>> finder = MovedModules({"old_name_of_math": ["math", "cmath"]})
    >>> finder.find_spec("something_else") is None
    True
    >>> finder.find_spec("old_name_of_math").name
    'old_name_of_math'
    """

    def __init__(self, moved: Mapping[str, Sequence[str]]) -> None:
        self._moved = moved

    def install(self) -> None:
        """Lets `import` find the old names; does nothing the second time."""
        if not any(isinstance(f, MovedModules) and f._moved == self._moved for f in sys.meta_path):
            # First, because an old folder with nothing but bytecode in it would be found too.
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if fullname not in self._moved:
            return None
        prefix = fullname + "."
        is_package = any(name.startswith(prefix) for name in self._moved)
        return ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader.exec_module`."""
        old = module.__name__
        places = self._moved[old]
        # Frames of the import system are not counted: this is the line with the import.
        warnings.warn(
            f"{old} has moved and will be gone in the next release: "
            f"import from {' or '.join(places)}",
            DeprecationWarning,
            stacklevel=2,
        )
        modules = [importlib.import_module(place) for place in places]

        def find(name: str) -> Any:
            for found in modules:
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {old!r} had no attribute {name!r}")

        vars(module)["__getattr__"] = find
        vars(module)["__doc__"] = modules[0].__doc__
        vars(module)["__all__"] = [n for m in modules for n in getattr(m, "__all__", ())]
