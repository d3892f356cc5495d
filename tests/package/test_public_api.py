"""Public names: all of them documented, and nothing else on show.

A class keeps the `__module__` of the file that defines it, an underscored one for a few: sources,
type hints and doctests are found by it, and pickles do not depend on where it is exported.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import pytest

import torch_secondorder

TOP = "torch_secondorder"
PACKAGES = [
    *("constraints", "curvature", "dataset", "diagnostics", "func", "globalization", "linear"),
    *("minimization", "optim", "penalties", "solvers"),
]
PUBLIC_PACKAGES = [f"{TOP}.{name}" for name in PACKAGES]
INTEGRATIONS = [f"{TOP}.integrations.huggingface", f"{TOP}.integrations.lightning"]
MODULES = [TOP, *PUBLIC_PACKAGES, *INTEGRATIONS]

#: Public names that machinery defines. All others are in a file of the package that exports them.
FROM_MACHINERY = {
    *(
        "ClosureObjective",
        "Evaluation",
        "MissingSecondDerivative",
        "FunctionalObjective",
        "SecondOrderOptimizer",
        "StepInfo",
        "StepStatus",
    ),
    "mark_outputs",
}
#: Functions that have the name, signature and documentation of torch's.
FROM_TORCH = {"jvp", "vjp"}


def imported(name: str) -> ModuleType:
    for package, needed in {"huggingface": "transformers", "lightning": "lightning"}.items():
        if name.endswith(package):
            pytest.importorskip(needed)
    return importlib.import_module(name)


def members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public names of a module with what they stand for; no modules."""
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.ismodule(value):
            yield name, value


def test_the_top_shows_its_public_names_alone() -> None:
    assert dir(torch_secondorder) == sorted([*torch_secondorder.__all__, "__version__"])
    packages = [
        n for n in dir(torch_secondorder) if inspect.ismodule(getattr(torch_secondorder, n))
    ]
    assert packages == PACKAGES


@pytest.mark.parametrize("name", PUBLIC_PACKAGES)
def test_a_package_shows_its_public_names_alone(name: str) -> None:
    package = imported(name)
    assert dir(package) == sorted(package.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_those_of_this_package(name: str) -> None:
    for member, value in members(imported(name)):
        assert not member.startswith("_")
        if inspect.isclass(value) or inspect.isfunction(value):
            home = value.__module__
            assert home.startswith("torch.func" if member in FROM_TORCH else TOP), member
            if member not in FROM_MACHINERY:
                assert not home.startswith(f"{TOP}._"), f"{member} is defined in {home}"


@pytest.mark.parametrize("name", [f"{TOP}.optim", f"{TOP}.dataset", f"{TOP}.minimization"])
def test_what_the_top_exports_is_what_the_package_has(name: str) -> None:
    for member, value in members(imported(name)):
        assert getattr(torch_secondorder, member, value) is value


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = imported(name)
    assert module.__doc__
    missing = [member for member, value in members(module) if undocumented(value)]
    assert missing == []


def undocumented(value: Any) -> bool:
    """Whether it is a class or function without a docstring of its own."""
    return (inspect.isclass(value) or inspect.isroutine(value)) and not vars(value).get(
        "__doc__", value.__doc__
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_is_documented(name: str) -> None:
    missing = []
    for member, value in members(imported(name)):
        if member in FROM_TORCH or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if inspect.isclass(value) and (
            # An error is caught by users, and raised by the package alone.
            issubclass(value, (Enum, Exception)) or getattr(value, "_is_protocol", 0)
        ):
            continue
        documented = documented_in(value)
        missing += [
            f"{member}({parameter})"
            for parameter in inspect.signature(value).parameters
            if parameter not in documented
        ]
    assert missing == []


def documented_in(value: Any) -> set[str]:
    """Names under Args and Attributes; for a class also those of the classes it inherits from."""
    found = set()
    for holder in value.__mro__ if inspect.isclass(value) else [value]:
        text = inspect.cleandoc(holder.__doc__ or "") + "\n"
        for section in re.finditer(r"^(?:Args|Attributes):\n((?: +.*\n|\n)*)", text, re.MULTILINE):
            for names in re.findall(r"^ {4}(?! )([\w*, ]+)(?: \(.*\))?:", section[1], re.MULTILINE):
                found |= {name.strip(" *") for name in names.split(",")}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_public_method_is_documented(name: str) -> None:
    missing = []
    for member, value in members(imported(name)):
        if inspect.isclass(value) and not issubclass(value, Enum):
            for attribute, method in vars(value).items():
                function = method.fget if isinstance(method, property) else method
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    missing += [f"{member}.{attribute}"] if not function.__doc__ else []
    assert missing == []


def test_a_functional_objective_takes_nothing_internal() -> None:
    signature = inspect.signature(torch_secondorder.FunctionalObjective)
    assert list(signature.parameters) == ["function", "params", "compile", "mode"]


# The checks find what they are for.


def test_the_check_of_parameters_finds_one_without_a_line() -> None:
    def function(x: int, y: int, *more: int) -> None:
        """Does nothing.

        Args:
            x: A number
                of things: many.
            *more: Others.
        """

    assert documented_in(function) == {"x", "more"}


def test_the_check_of_docstrings_does_not_count_inherited_ones() -> None:
    class Base:
        """Documented."""

    class Bare(Base):
        pass

    assert undocumented(Bare) and not undocumented(Base)
