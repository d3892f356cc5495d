"""Line searches on lines that end somewhere."""

from __future__ import annotations

import math

import pytest

from torch_secondorder.globalization import SearchStatus, Trial, resolve_line_search

SEARCHES = ["strong_wolfe", "hager_zhang", "armijo", None]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("t0", [0.1, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("longest", [1.0, 3.0, 7.0, math.inf])
def test_no_step_is_longer_than_the_longest(name: str | None, t0: float, longest: float) -> None:
    asked: list[float] = []

    def phi(t: float) -> Trial:
        asked.append(t)
        return Trial(t, (t - 20.0) ** 2, 2 * (t - 20.0))

    start = Trial(0.0, 400.0, -40.0, longest=longest)
    result = resolve_line_search(name)(phi, start, t0, precision=2e-16)
    assert max(asked) <= longest
    assert result.status.accepted
    ends = name in ("strong_wolfe", "hager_zhang") and longest <= 3.0
    if ends and name == "strong_wolfe":
        assert result.trial.t == longest
        assert result.status in (SearchStatus.LONGEST, SearchStatus.WOLFE)


@pytest.mark.parametrize("name", SEARCHES[:3])
def test_the_end_of_a_line_is_taken_where_the_loss_is_rounded(name: str) -> None:
    """The slope is all that is known there, and it still points beyond the end."""
    start = Trial(0.0, 1.0, -1e-18, longest=1.0)
    result = resolve_line_search(name)(
        lambda t: Trial(t, 1.0, -0.95e-18), start, 1.0, precision=2e-16
    )
    assert result.trial.t == 1.0 and result.status.accepted
    assert result.evaluations == 1
