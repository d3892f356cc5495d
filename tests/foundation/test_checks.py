"""Each check of an argument says the name, the allowed values and the value given."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import torch_secondorder
from torch_secondorder._foundation.checks import (
    check_callable,
    check_choice,
    check_instance,
    check_integer,
    check_number,
)

ROOT = Path(torch_secondorder.__file__).parent
Mode = Literal["forward", "reverse"]


class Whole:
    """An integer of another library."""

    def __index__(self) -> int:
        return 3

    def __ge__(self, other: int) -> bool:
        return other <= 3

    def __repr__(self) -> str:
        return "Whole()"


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (1, {}),
        (0, {"low": 0}),
        (Whole(), {}),
        (torch.tensor(2), {}),
        (None, {"optional": True}),
        (20.0, {"whole_floats": True}),
    ],
)
def test_integers_that_pass(value: Any, options: dict[str, Any]) -> None:
    check_integer("n", value, **options)


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [
        (0, {}, "be an integer of at least 1"),
        (-1, {"low": 0}, "be an integer of at least 0"),
        (Whole(), {"low": 4}, "be an integer of at least 4"),
        (True, {}, "be an integer of at least 1"),
        (1.0, {}, "be an integer of at least 1"),
        (1.5, {"whole_floats": True}, "be an integer of at least 1"),
        (0.0, {"whole_floats": True}, "be an integer of at least 1"),
        (math.inf, {"whole_floats": True}, "be an integer of at least 1"),
        (math.nan, {"whole_floats": True}, "be an integer of at least 1"),
        ("1", {}, "be an integer of at least 1"),
        (None, {}, "be an integer of at least 1"),
        (0, {"optional": True}, "be an integer of at least 1 or None"),
    ],
)
def test_integers_that_are_refused(value: Any, options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"n must {allowed}, got {value!r}") + "$"):
        check_integer("n", value, **options)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (0, {"low": 0}),
        (1e300, {"low": 0}),
        (torch.tensor(0.5), {"above": 0, "below": 1}),
        (-3.0, {"high": -3}),
        (None, {"above": 0, "optional": True}),
        (2.0, {"above": 1, "below": math.inf}),
    ],
)
def test_numbers_that_pass(value: Any, options: dict[str, Any]) -> None:
    check_number("x", value, **options)


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [
        (math.nan, {}, "be a finite number"),
        (-1e-9, {"low": 0}, "be a finite number of at least 0"),
        (math.inf, {"low": 0}, "be a finite number of at least 0"),
        (0, {"above": 0}, "be a finite number above 0"),
        (2, {"high": 1.5}, "be a finite number of at most 1.5"),
        (1, {"below": 1}, "be a finite number below 1"),
        (1, {"low": 0, "below": 1}, "lie in [0, 1)"),
        (0, {"above": 0, "high": 1}, "lie in (0, 1]"),
        (1.0, {"above": 1, "below": math.inf}, "lie in (1, inf)"),
        ("0.5", {"low": 0}, "be a finite number of at least 0"),
        (None, {"low": 0}, "be a finite number of at least 0"),
        (torch.ones(2), {"low": 0}, "be a finite number of at least 0"),
        (0, {"above": 0, "optional": True}, "be a finite number above 0 or None"),
        (2, {"low": 0, "high": 1, "optional": True}, "lie in [0, 1] or None"),
    ],
)
def test_numbers_that_are_refused(value: Any, options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x must {allowed}, got {value!r}") + "$"):
        check_number("x", value, **options)


@pytest.mark.parametrize("choices", [Mode, ("forward", "reverse"), {"forward": 1, "reverse": 2}])
def test_choices(choices: Any) -> None:
    check_choice("mode", "reverse", choices)
    for value in ("backward", None, ["forward"]):
        message = f"mode must be one of 'forward', 'reverse', got {value!r}"
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            check_choice("mode", value, choices)


def test_choices_beside_other_values() -> None:
    others = "an instance such as SGD(), or None"
    check_choice("solver", "cg", ("cg", "lu"), others)
    message = "solver must be one of 'cg', 'lu', or an instance such as SGD(), or None, got "
    with pytest.raises(ValueError, match=re.escape(message + "'qr'") + "$"):
        check_choice("solver", "qr", ("cg", "lu"), others)
    with pytest.raises(TypeError, match=re.escape(message + "3") + "$"):
        check_choice("solver", 3, ("cg", "lu"), others)


def test_callables() -> None:
    check_callable("f", len)
    check_callable("f", None, optional=True)
    with pytest.raises(TypeError, match=r"^f must be callable, got int$"):
        check_callable("f", 3)
    with pytest.raises(TypeError, match=r"^f must be callable or None, got str$"):
        check_callable("f", "len", optional=True)


def test_instances() -> None:
    check_instance("model", {}, dict)
    with pytest.raises(TypeError, match=r"^model must be a dict, got list$"):
        check_instance("model", [], dict)
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got list$"):
        check_instance("model", [], torch.nn.Module, "a torch.nn.Module")


def checked_by_hand(source: str) -> list[int]:
    """Lines that raise a message of these checks without calling them."""
    wordings = r"must be (an integer|a finite number|one of|callable, got)|must lie in"
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and re.search(wordings, ast.unparse(node))
    ]


def test_the_package_checks_its_arguments_here() -> None:
    assert checked_by_hand("if n < 1:\n    raise ValueError(f'n must be an integer, got {n}')")
    by_hand = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in ROOT.rglob("*.py")
        for line in checked_by_hand(path.read_text(encoding="utf-8"))
    }
    # With advice for closures; two numbers that belong together; a word or an integer.
    allowed = ("_foundation/checks", "_closure/validation", "globalization/", "optim/adahessian")
    assert {place for place in by_hand if not place.startswith(allowed)} == set()
