"""Checks of arguments: each raises with the name, the allowed values and the value given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any, NoReturn


def check_integer(
    name: str, value: Any, low: int = 1, *, optional: bool = False, whole_floats: bool = False
) -> None:
    """Raises a ValueError unless a value is an integer of at least `low`.

    Args:
        name: The argument's name.
        value: Its value.
        low: The smallest one allowed.
        optional: Whether None is allowed.
        whole_floats: Whether `20.0` is, as in `torch.optim`.

    >>> check_integer("max_iter", 0)
    Traceback (most recent call last):
        ...
    ValueError: max_iter must be an integer of at least 1, got 0
    """
    if optional and value is None:
        return
    try:
        fine = not isinstance(value, bool) and index(value) >= low
    except TypeError:
        is_whole = isinstance(value, float) and value.is_integer()
        fine = whole_floats and is_whole and value >= low
    if not fine:
        _refuse(name, f"be an integer of at least {low}", value, optional)


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Raises a ValueError unless a value is a finite number within bounds.

    Args:
        name: The argument's name.
        value: Its value: a number, or a tensor with one.
        low: The smallest one allowed.
        above: It has to be larger than this one.
        high: The largest one allowed.
        below: It has to be smaller than this one.
        optional: Whether None is allowed.

    >>> check_number("decay", 1.0, low=0, below=1)
    Traceback (most recent call last):
        ...
    ValueError: decay must lie in [0, 1), got 1.0
    """
    if optional and value is None:
        return
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    fine = (
        math.isfinite(number)
        and (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
        and (below is None or number < below)
    )
    if fine:
        return
    least = "" if low is None and above is None else f"({above:g}" if low is None else f"[{low:g}"
    most = "" if high is None and below is None else f"{below:g})" if high is None else f"{high:g}]"
    if least and most:
        allowed = f"lie in {least}, {most}"
    elif most:
        allowed = f"be a finite number {'below' if high is None else 'of at most'} {most[:-1]}"
    elif least:
        allowed = f"be a finite number {'above' if low is None else 'of at least'} {least[1:]}"
    else:
        allowed = "be a finite number"
    _refuse(name, allowed, value, optional)


def check_choice(name: str, value: Any, choices: Any, others: str = "") -> None:
    """Raises unless a value is one of some strings.

    Args:
        name: The argument's name.
        value: Its value.
        choices: The strings, or a `Literal` type of them.
        others: Other values that the argument takes and that the caller has dealt with, such as
            `"None"`.

    Raises:
        ValueError: The value is not among the strings.
        TypeError: It is not even a string, where there are others.

    >>> check_choice("mode", "backward", ("forward", "reverse"))
    Traceback (most recent call last):
        ...
    ValueError: mode must be one of 'forward', 'reverse', got 'backward'
    """
    known: Iterable[str] = getattr(choices, "__args__", choices)
    is_string = isinstance(value, str)
    if is_string and value in known:
        return
    listed = ", ".join([*map(repr, known), *([f"or {others}"] if others else [])])
    kind = TypeError if others and not is_string else ValueError
    raise kind(f"{name} must be one of {listed}, got {value!r}")


def check_callable(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises a TypeError unless a value can be called; None passes where it is allowed.

    >>> check_callable("loss_fn", 3)
    Traceback (most recent call last):
        ...
    TypeError: loss_fn must be callable, got int
    """
    if not (callable(value) or (optional and value is None)):
        allowed = "callable or None" if optional else "callable"
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def check_instance(name: str, value: Any, kind: type, description: str = "") -> None:
    """Raises a TypeError unless a value is an instance of a class.

    Args:
        name: The argument's name.
        value: Its value.
        kind: The class.
        description: The class in words, with an article; its name by default.

    >>> check_instance("model", [], dict, "a dict of parameters")
    Traceback (most recent call last):
        ...
    TypeError: model must be a dict of parameters, got list
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be {description or f'a {kind.__name__}'}, got {type(value).__name__}"
        )


def _refuse(name: str, allowed: str, value: Any, optional: bool) -> NoReturn:
    raise ValueError(f"{name} must {allowed}{' or None' if optional else ''}, got {value!r}")


def check_betas(betas: Any) -> None:
    """Raises a ValueError unless `betas` are two numbers of at least zero and below one."""
    try:
        fine = len(betas) == 2 and all(0.0 <= float(beta) < 1.0 for beta in betas)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"betas must be two numbers from 0 up to below 1, got {betas!r}")
