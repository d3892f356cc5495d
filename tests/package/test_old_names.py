"""Public names that have changed work for one release."""

from __future__ import annotations

import pytest

from torch_secondorder import solvers


def test_minres_has_its_old_name_for_one_release() -> None:
    with pytest.warns(DeprecationWarning, match="MINRES") as caught:
        old = solvers.Minres
    assert old is solvers.MINRES
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no_such_name"):
        solvers.no_such_name  # noqa: B018
