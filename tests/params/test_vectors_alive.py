"""How many vectors of the parameters' length are alive at the peak of a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torch_secondorder import LBFGS, NewtonCG
from torch_secondorder._objective.base import Objective

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
#: Activations, and a piece of a vector that a search of L-BFGS looks at.
LITTLE = 0.25


@pytest.mark.parametrize(
    ("make", "most"),
    [
        # Two for parameters and gradients; for NewtonCG two more in the graph.
        (partial(LBFGS, history_size=20, max_iter=10), 2 + 2 * 20 + 6),
        (partial(LBFGS, history_size=20, max_iter=10, lr=3.0), 2 + 2 * 20 + 6),
        (partial(NewtonCG, preconditioner=None, damping=1e-6, max_cg_iter=60, max_iter=3), 4 + 12),
        (partial(NewtonCG, preconditioner=None, globalization="trust_region", max_iter=3), 4 + 12),
    ],
)
def test_at_the_peak_no_more_vectors_are_alive(
    make: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    # Graphs of trials are kept where there is room.
    monkeypatch.setattr(Objective, "has_room_for_a_graph", lambda self: False)
    from benchmarks.distributed_memory import peak

    assert most - 8 < peak(make, 300, 3) <= most + LITTLE
