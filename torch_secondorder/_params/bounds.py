"""The option `bounds` of parameter groups: its checks, and the box that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._params.box import Box, cut_bounds
from torch_secondorder._params.vector import ParameterVector

#: A lower or an upper bound of a group: a number, a tensor that broadcasts to each parameter, a
#: list with one of these for each parameter, or None for no bound.
Bound: TypeAlias = float | Tensor | Sequence[float | Tensor | None] | None
#: The option: lower and upper bounds, or None for no bounds.
Bounds: TypeAlias = tuple[Bound, Bound] | None

_FORM = (
    "bounds must be a pair (low, high), each a number, a tensor that broadcasts to every parameter "
    "of the group, a list with one of these for each parameter, or None"
)


def no_bounds(name: str) -> ValueError:
    """The error of an optimizer that takes no bounds."""
    return ValueError(f"{name} takes no bounds: use LBFGS, or leave the bounds out")


def check_bounds(group: dict[str, Any]) -> None:
    """Raises unless the bounds of a group are fit for its parameters.

    Args:
        group: A parameter group.

    Raises:
        TypeError: The option is not a pair, or a bound is neither a number, nor a tensor, nor None.
        ValueError: Bounds cross, are NaN, leave no finite number, or do not fit the parameters in
            shape or number; or parameters are complex.
    """
    for index, (p, low, high) in enumerate(_of_parameters(group)):
        place = f"parameter {index} of shape {tuple(p.shape)}"
        _check_pair(p, low, high, place, "give it to a group without bounds")


def fitted_pair(p: Tensor, low: Any, high: Any, name: str) -> tuple[Tensor, Tensor]:
    """The bounds of a tensor in its own precision and shape, rounded into the box.

    Args:
        p: The tensor.
        low: The lower bound: a number, a tensor, or None.
        high: The upper bound.
        name: The tensor's name in errors.

    Raises:
        TypeError: See `check_bounds`.
        ValueError: See `check_bounds`.
    """
    _check_pair(p, low, high, name, "leave it without bounds")
    return cut_bounds(low, high, p)


def _check_pair(p: Tensor, low: Any, high: Any, place: str, instead: str) -> None:
    """Raises unless two bounds are fit for a parameter."""
    if p.is_complex():
        raise ValueError(
            f"{place} is complex, and complex numbers have no order: hold it as a real one, by "
            f"torch.view_as_real, or {instead}"
        )
    if not p.numel():
        return
    lowest, highest = (_checked(bound, p, place) for bound in (low, high))
    lowest = torch.tensor(-inf) if lowest is None else lowest
    highest = torch.tensor(inf) if highest is None else highest
    dtype = torch.promote_types(lowest.dtype, highest.dtype)
    lowest, highest = lowest.cpu().to(dtype), highest.cpu().to(dtype)
    crossed = (lowest > highest) | (lowest == inf) | (highest == -inf)
    if bool(crossed.any()):
        lows, highs = torch.broadcast_tensors(lowest, highest)
        where = crossed.nonzero()[0].tolist()
        values = lows[tuple(where)].item(), highs[tuple(where)].item()
        at = f"at {where} " if where else ""
        raise ValueError(
            f"the bounds of {place} leave no number: {at}they are {values[0]:g} and "
            f"{values[1]:g}; the lower one comes first"
        )


def _checked(bound: Any, p: Tensor, place: str) -> Tensor | None:
    """A bound as a tensor that broadcasts to a parameter; None for none."""
    if bound is None:
        return None
    if isinstance(bound, Tensor):
        if bound.is_complex() or bound.dtype == torch.bool:
            raise TypeError(f"{_FORM}; got a tensor of {bound.dtype}")
        found = bound.detach()
        if not found.is_floating_point():
            found = found.double()
        if torch.Size(_broadcast(found.shape, p.shape)) != p.shape:
            raise ValueError(
                f"a bound of shape {tuple(bound.shape)} does not broadcast to {place}; use a list "
                "where the parameters of a group differ in shape"
            )
    elif isinstance(bound, (int, float)) and not isinstance(bound, bool):
        found = torch.tensor(float(bound), dtype=torch.float64)
    else:
        raise TypeError(f"{_FORM}; got {bound!r} as one of them")
    if bool(found.isnan().any()):
        raise ValueError(f"a bound of {place} is NaN; None stands for no bound")
    return found


def _broadcast(shape: torch.Size, wanted: torch.Size) -> Sequence[int]:
    """The shape that two shapes broadcast to; an empty one where they do not."""
    try:
        return tuple(torch.broadcast_shapes(shape, wanted))
    except RuntimeError:
        return (-1,)


def _of_parameters(group: dict[str, Any]) -> Iterator[tuple[Tensor, Any, Any]]:
    """The parameters of a group, each with its lower and upper bound as they were given."""
    bounds, params = group["bounds"], group["params"]
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"{_FORM}; got {bounds!r}")
    columns = []
    for bound in bounds:
        if isinstance(bound, (tuple, list)):
            if len(bound) != len(params):
                raise ValueError(
                    "a list of bounds must have one for each parameter of the group: got "
                    f"{len(bound)} for {len(params)} parameters; bounds of the entries of a "
                    "parameter are a tensor"
                )
            columns.append(list(bound))
        else:
            columns.append([bound] * len(params))
    return zip(params, *columns, strict=True)


class _Seen(NamedTuple):
    """The box of a vector, and what it was made of."""

    vector: ParameterVector
    given: list[tuple[Any, int]]
    box: Box | None


class BoxMaker:
    """Makes the box of a vector from the groups; a step with the same bounds costs no wait."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def __call__(self, groups: Sequence[dict[str, Any]], vector: ParameterVector) -> Box | None:
        """The box; None where no entry has a bound.

        Raises:
            TypeError: See `check_bounds`.
            ValueError: See `check_bounds`.
        """
        bounded = [group for group in groups if group.get("bounds") is not None]
        given = [leaf for group in bounded for leaf in _leaves(group["bounds"])]
        given += [(p, 0) for group in bounded for p in group["params"]]
        seen = self._seen
        if seen is None or seen.vector is not vector or not _same(seen.given, given):
            for group in bounded:
                check_bounds(group)
            seen = self._seen = _Seen(vector, given, _make(bounded, vector))
        return seen.box


def _leaves(bounds: Any) -> Iterator[tuple[Any, int]]:
    """Numbers and tensors in an option, with the versions of the tensors."""
    if isinstance(bounds, (tuple, list)):
        yield (len(bounds), 0)
        for bound in bounds:
            yield from _leaves(bound)
    else:
        yield bounds, bounds._version if isinstance(bounds, Tensor) else 0


def _same(seen: list[tuple[Any, int]], given: list[tuple[Any, int]]) -> bool:
    if len(seen) != len(given):
        return False
    return all(
        version == other
        and (a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b))
        for (a, version), (b, other) in zip(seen, given, strict=True)
    )


def _make(bounded: Sequence[dict[str, Any]], vector: ParameterVector) -> Box | None:
    pairs = {
        id(p): cut_bounds(low, high, p)
        for group in bounded
        for p, low, high in _of_parameters(group)
        if p.numel()
    }
    lows, highs = [], []
    for p in vector.params:
        low, high = pairs.get(id(p)) or (_filled(p, -inf), _filled(p, inf))
        lows.append(low)
        highs.append(high)
    low, high = vector.gather(lows), vector.gather(highs)
    if bool(low.isneginf().all() & high.isposinf().all()):
        return None
    return Box(vector, low, high)


def _filled(p: Tensor, value: float) -> Tensor:
    """A tensor like a parameter, with both parts of a complex one at a value."""
    if p.is_complex():
        return torch.view_as_complex(torch.full_like(torch.view_as_real(p.detach()), value))
    return torch.full_like(p.detach(), value)
