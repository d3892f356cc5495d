"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
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


_WHOLE = ("test_conformance.py", "test_device_backend.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets `tests/optim/test_conformance.py` test an optimizer of another package."""
    parser.addoption("--optimizer", metavar="MODULE:NAME", help="a class or function to test")
    parser.addoption(
        "--all-devices",
        action="store_true",
        help="run all cases on the test device, not only the first of each test",
    )


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves most cases of the test device out: placement rarely depends on their numbers.

    The first of each test stays if it is not slow, and all cases of the files that are about
    devices and all optimizers.
    """
    if config.getoption("--all-devices"):
        return
    kept, left, seen = [], [], set()
    for item in items:
        test = item.nodeid.split("[")[0]
        on_device = item.get_closest_marker("testdevice") is not None
        again = test in seen or item.get_closest_marker("slow") is not None
        few = on_device and item.path.name not in _WHOLE
        (left if few and again else kept).append(item)
        if on_device:
            seen.add(test)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_sessionstart(session: pytest.Session) -> None:
    """Loads the test device.

    It has to be there before the first backward pass, which some test files run when they are
    imported: autograd counts devices once.
    """
    if not session.config.option.collectonly:
        with contextlib.suppress(device_backend.Unavailable):  # the fixture tells why
            device_backend.load()


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
