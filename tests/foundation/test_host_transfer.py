"""Numbers read on the host: right values, in one transfer."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_secondorder._foundation.host_transfer import (
    _ROOM,
    _Landing,
    joined,
    read_numbers,
    read_vector,
)

VALUES = [0.1, -math.inf, math.nan, 0.0, 2.0**-149]


class ToHost(TorchDispatchMode):
    """Counts copies to the host, each of which waits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        from_device = any(t.is_cuda for t in tensors)
        to_host = not isinstance(result, torch.Tensor) or result.device.type == "cpu"
        self.count += from_device and to_host
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_numbers_come_as_they_are(device, dtype):
    numbers = torch.tensor([3.0, -0.5, 7.0], device=device).to(dtype).unbind()
    expected = [number.item() for number in numbers]
    assert read_numbers(*numbers) == expected
    assert joined(numbers).dtype == dtype
    assert read_vector(torch.stack(numbers)) == expected


def test_mixed_dtypes_lose_nothing(device):
    numbers = [torch.tensor(v, device=device, dtype=torch.float32) for v in VALUES]
    numbers += [torch.tensor(2**24 + 1, device=device), torch.tensor(0.1, dtype=torch.float64)]
    numbers += [torch.tensor(True, device=device)]
    expected = [number.item() for number in numbers]
    for found in (read_numbers(*numbers), joined(numbers).tolist()):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one == other or (math.isnan(one) and math.isnan(other))


def test_one_transfer_for_all(device):
    numbers = torch.rand(5, device=device).unbind()
    read_numbers(*numbers)
    with ToHost() as found:
        read_numbers(*numbers)
    assert found.count == (device.type == "cuda")


def test_results_outlive_the_memory_of_the_transfer(device):
    first = read_numbers(*torch.tensor([1.0, 2.0], device=device).unbind())
    second = read_numbers(*torch.tensor([3.0, 4.0], device=device).unbind())
    assert (first, second) == ([1.0, 2.0], [3.0, 4.0])


def test_more_numbers_than_the_memory_of_the_transfer_has_room_for(device):
    many = torch.arange(float(_ROOM), device=device)
    assert read_vector(many) == list(range(_ROOM))


def test_memory_of_the_transfer():
    landing = _Landing()
    view = landing.view(torch.float64, 3, pinned=False)
    assert view.shape == (3,) and view.dtype == torch.float64
    assert landing.view(torch.float64, 3) is view
    other = landing.view(torch.float32, 5, pinned=False)
    assert other.data_ptr() == view.data_ptr()
    assert landing.view(torch.float64, _ROOM // 8, pinned=False) is not None
    assert landing.view(torch.float64, _ROOM // 8 + 1, pinned=False) is None


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_memory_of_the_transfer_that_a_context_made_first(context):
    landing = _Landing()
    with context():
        view = landing.view(torch.float32, 2, pinned=False)
    assert view.is_cpu and not view.is_inference()
    assert view.copy_(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_numbers_with_a_graph(device):
    vector = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    for _ in range(2):
        assert read_vector(vector) == read_vector(2 * vector / 2) == [1.0, 2.0]


def test_each_thread_has_memory_of_its_own():
    landing, views = _Landing(), []

    def work():
        views.append(landing.view(torch.float32, 2, pinned=False))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert views[0].data_ptr() != views[1].data_ptr()


def test_fake_tensors_leave_no_trace():
    # A fake number has no value; page-locked memory that was fake would be used by later reads.
    with FakeTensorMode():
        numbers = [torch.empty((), device="cuda") for _ in range(2)]
        with pytest.raises(DataDependentOutputException):
            read_numbers(*numbers)
        assert joined(numbers).device.type == "cuda"
    assert read_numbers(torch.tensor(1.0), torch.tensor(2.0)) == [1.0, 2.0]
