"""Old import paths and names. They work for one release, with a warning that names the new ones."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TOP = "torch_secondorder"

#: Old modules with public names, and the public place of those names today.
MOVED_MODULES = {
    "torch_secondorder.capture": _TOP,
    "torch_secondorder.evaluation": _TOP,
    "torch_secondorder.graph": _TOP,
    "torch_secondorder.objective": _TOP,
    "torch_secondorder.optim.base": _TOP,
    "torch_secondorder.optim.info": _TOP,
    "torch_secondorder.curvature.output_space": "torch_secondorder.curvature",
    "torch_secondorder.dataset.objective": "torch_secondorder.dataset",
    "torch_secondorder.dataset.operator": "torch_secondorder.dataset",
    "torch_secondorder.diagnostics.definite": "torch_secondorder.diagnostics",
    "torch_secondorder.diagnostics.eigen": "torch_secondorder.diagnostics",
    "torch_secondorder.diagnostics.hutchpp": "torch_secondorder.diagnostics",
    "torch_secondorder.diagnostics.local": "torch_secondorder.diagnostics",
    "torch_secondorder.diagnostics.source": "torch_secondorder.diagnostics",
    "torch_secondorder.func.batches": "torch_secondorder.func",
    "torch_secondorder.func.checks": "torch_secondorder.func",
    "torch_secondorder.func.differences": "torch_secondorder.func",
    "torch_secondorder.func.modules": "torch_secondorder.func",
    "torch_secondorder.func.products": "torch_secondorder.func",
    "torch_secondorder.globalization.named": "torch_secondorder.globalization",
    "torch_secondorder.huggingface": "torch_secondorder.integrations.huggingface",
    "torch_secondorder.lightning": "torch_secondorder.integrations.lightning",
    "torch_secondorder.lightning.curvature": "torch_secondorder.integrations.lightning",
    "torch_secondorder.lightning.monitor": "torch_secondorder.integrations.lightning",
    "torch_secondorder.lightning.penalty": "torch_secondorder.integrations.lightning",
    "torch_secondorder.solvers.kronecker": "torch_secondorder.solvers",
    "torch_secondorder.solvers.named": "torch_secondorder.solvers",
}


class OldModules(MetaPathFinder, Loader):
    """Importer of modules by their old names, with a DeprecationWarning that names the new place.

    Args:
        moved: Where the names of each old module are now.

    >>> finder = OldModules({"old_name_of_math": "math"})
    >>> finder.find_spec("something_else") is None
    True
    >>> finder.find_spec("old_name_of_math").name
    'old_name_of_math'
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = moved

    def install(self) -> None:
        """Lets `import` find the old names; does nothing the second time."""
        if not any(isinstance(f, OldModules) and f._moved == self._moved for f in sys.meta_path):
            # First, because an old folder with nothing but bytecode in it would be found too.
            sys.meta_path.insert(0, self)
            for parent in {name.rpartition(".")[0] for name in self._moved}:
                package = sys.modules.get(parent)
                if package is not None and "__getattr__" not in vars(package):
                    vars(package)["__getattr__"] = partial(self._import_attribute, parent)

    def _import_attribute(self, package: str, name: str) -> ModuleType:
        """An old module as an attribute of its package, as if it were imported there."""
        old = f"{package}.{name}"
        if self._moved.get(old) not in sys.modules:  # integrations have to be imported, as before
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(old)
        warnings.warn(self._message(old), DeprecationWarning, stacklevel=2)
        return module

    def _message(self, old: str) -> str:
        place = self._moved[old]
        return f"{old} has moved and will be gone in the next release: import from {place}"

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
        place = self._moved[old]
        # Frames of the import system are not counted: this is the line with the import.
        warnings.warn(self._message(old), DeprecationWarning, stacklevel=2)
        found = importlib.import_module(place)
        vars(module).update(
            {name: getattr(found, name) for name in found.__all__},
            __doc__=found.__doc__,
            __all__=found.__all__,
            # For names that are deprecated there.
            __getattr__=lambda name: getattr(found, name),
        )


def renamed(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module some of whose names have changed.

    Args:
        module: Name of the module.
        new_names: New names by old ones.

    Returns:
        The function, which warns and gives what has the new name.

    >>> __getattr__ = renamed("math", {"square_root": "sqrt"})
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     __getattr__("square_root")(4.0)
    2.0
    """

    def find(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has been renamed and will be gone in the next release: use "
            f"{module}.{new_names[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[module], new_names[name])

    return find


def withdrawn(module: str, objects: Mapping[str, Any]) -> Callable[[str], Any]:
    """A `__getattr__` for a module some of whose names are no longer public.

    Args:
        module: Name of the module.
        objects: The objects by these names.

    Returns:
        The function, which warns and gives the object.

    >>> __getattr__ = withdrawn("math", {"digits": "0123456789"})
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     __getattr__("digits")
    '0123456789'
    """

    def find(name: str) -> Any:
        if name not in objects:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is internal and will be gone in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return objects[name]

    return find
