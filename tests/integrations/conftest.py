"""Fixtures for tests of trainers."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def host(request: pytest.FixtureRequest) -> Any:
    """Each of the two packages that have a Lightning trainer."""
    return pytest.importorskip(request.param)
