"""Boxes: positions that stay inside to the last bit, and bounds in the precision of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_secondorder._params.box import Box, cut_bounds, inward
from torch_secondorder._params.vector import ParameterVector

INF = math.inf
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def make_box(dtype: torch.dtype = torch.float64, scale: list[float] | None = None) -> Box:
    vector = ParameterVector([torch.zeros(2, dtype=dtype), torch.zeros(1, dtype=dtype)], scale)
    low = torch.tensor([-1.0, 0.1, -INF], dtype=dtype)
    return Box(vector, low, torch.tensor([1.0, INF, 0.3], dtype=dtype))


numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, deadline=None)
@given(start=st.lists(numbers, min_size=3, max_size=3), t=st.floats(0.0, 2.0), scaled=st.booleans())
def test_moves_stay_inside_to_the_last_bit(start: list[float], t: float, scaled: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        box = make_box(dtype, [0.3, 0.7] if scaled else None)
        position = box.project(torch.tensor(start, dtype=dtype))
        low, high = box.room(position)
        there = box.moved(position, torch.where(low.isfinite(), low, high), t)
        assert ((there >= box.low) & (there <= box.high)).all()
        # A whole step to a bound ends on it.
        there = box.moved(position, torch.where(low.isfinite(), low, high), 1.0)
        at = torch.where(low.isfinite(), box.low, box.high)
        assert torch.equal(there, torch.where(at.isfinite(), at, there))
        assert box.active(there) == 3


def test_room_is_counted_in_the_work_space() -> None:
    box = make_box(scale=[0.5, 0.0])
    position = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    low, high = box.room(position)
    assert low.tolist() == [-2.0, 0.0, -INF]
    assert high.tolist() == [2.0, INF, INF]  # a scale of zero: nothing moves, and no step is long


def test_projected_gradient() -> None:
    box = make_box()
    position = torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)
    grad = torch.tensor([-5.0, 5.0, -5.0], dtype=torch.float64)
    assert box.projected(position, grad).tolist() == [0.0, 0.0, 0.3]
    assert box.projected(position, -grad).tolist() == [-2.0, 5.0, -5.0]
    for bad in (INF, -INF, math.nan):
        assert not box.projected(position, torch.full_like(grad, bad)).isfinite().any()


@pytest.mark.parametrize("dtype", NARROW)
def test_tensors_of_bounds_are_rounded_into_the_box(dtype: torch.dtype) -> None:
    bound = torch.tensor([0.1, -0.1, 1 / 3, 0.5, 0.0, -INF, 1e-9, -7.7], dtype=torch.float64)
    up, down = inward(bound, dtype, up=True), inward(bound, dtype, up=False)
    assert up.dtype == down.dtype == dtype
    assert (up.double() >= bound).all() and (down.double() <= bound).all()
    # To the next number, and not at all where there is one.
    assert torch.equal(up, down) == bool((up.double() == bound).all())
    exact = torch.tensor([0.5, 0.0, -INF], dtype=torch.float64)
    assert torch.equal(inward(exact, dtype, up=True).double(), exact)
    below = torch.nextafter(up, torch.full_like(up, -INF)).double()
    assert (below[bound.isfinite()] < bound[bound.isfinite()]).all()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_numbers_are_rounded_as_comparisons_with_them_are(dtype: torch.dtype) -> None:
    p = torch.zeros(2, dtype=dtype)
    for low, high in ((0.1, 0.3), (torch.tensor(0.1), torch.tensor(0.3).double()), (-0.7, None)):
        lower, upper = cut_bounds(low, high, p)
        assert lower.dtype == upper.dtype == dtype and lower.shape == upper.shape == p.shape
        assert (lower >= low).all() and (high is None or (upper <= high).all())


@pytest.mark.parametrize("dtype", NARROW)
def test_bounds_with_no_number_between_them_hold_the_nearest(dtype: torch.dtype) -> None:
    p = torch.zeros(1, dtype=dtype)
    low = torch.tensor([0.1 + 1e-12], dtype=torch.float64)
    lower, upper = cut_bounds(low, low + 1e-12, p)
    assert torch.equal(lower, upper) and torch.equal(lower, low.to(dtype))


def test_bounds_broadcast_to_the_parameter() -> None:
    lower, upper = cut_bounds(
        torch.tensor([0.0, 1.0]), torch.tensor([[2.0], [3.0]]), torch.zeros(2, 2)
    )
    assert lower.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert upper.tolist() == [[2.0, 2.0], [3.0, 3.0]]
