"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.support import device_backend

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
        id="cuda",
    ),
    pytest.param(device_backend.NAME, marks=pytest.mark.testdevice),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets `tests/optim/test_conformance.py` test an optimizer of another package."""
    parser.addoption("--optimizer", metavar="MODULE:NAME", help="a class or function to test")


def pytest_collection_finish() -> None:
    """Takes all that is loaded by now out of the garbage collector's sight.

    These are some million objects that stay until the end. Tests that collect garbage, or count
    what is alive, would look at each of them, again and again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has, and the test device; numerical tests run on each."""
    if request.param != device_backend.NAME:
        return request.param
    try:
        return device_backend.load()
    except device_backend.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _seeded_and_on_one_thread() -> Iterator[None]:
    """The tensors of tests are too small to share: threads would only wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
