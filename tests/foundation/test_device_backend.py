"""The test device behaves as a device."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support import device_backend

pytestmark = pytest.mark.testdevice


@pytest.fixture
def there() -> torch.device:
    try:
        return device_backend.load()
    except device_backend.Unavailable as error:
        pytest.skip(str(error))


def random_matrix(device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, generator=generator).to(device)


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": torch.add,
    "mul_": lambda here, there: there.mul_(here),
    "mm": torch.mm,
    "cat": lambda here, there: torch.cat([there, here]),
    "stack of scalars": lambda here, there: torch.stack([there[0, 0], here[0, 0]]),
    "where": lambda here, there: torch.where(here > 0, there, there),
    "addcmul": lambda here, there: torch.addcmul(there, there, here),
    "dot": lambda here, there: there[0].dot(here[0]),
    "norm of out": lambda here, there: torch.sum(there, 0, out=here[0]),
    "solve": torch.linalg.solve,
    "convolution": lambda here, there: torch.conv1d(there[None], here[None]),
    "foreach": lambda here, there: torch._foreach_add([there], [here]),
    "index of the host by the device": lambda here, there: here[there.argmax(0)],
    "values of the host": lambda here, there: there.masked_scatter(there > 0, here),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_host_and_device_do_not_mix(name: str, there: torch.device) -> None:
    host, device = random_matrix(), random_matrix(there)
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name](host, device)
    # Nothing but the placement was wrong.
    MIXED[name](random_matrix(), random_matrix())


def test_what_mixes_on_cuda_mixes(there: torch.device) -> None:
    host, device = random_matrix(), random_matrix(there)
    assert (device + torch.tensor(1.0)).device == there
    assert torch.equal(device[torch.tensor([1, 0])].cpu(), host[[1, 0]])
    device[torch.tensor([0])] = 1.0
    assert torch.equal(device[0].cpu(), torch.ones(4))
    assert torch.equal(device.copy_(host).cpu(), host)


def test_views_share_memory_and_tensors_change_size(there: torch.device) -> None:
    x = torch.zeros(2, 3, device=there)
    x.view(6)[1:3].fill_(1.0)
    x.T[2].add_(5.0)
    torch.as_strided(x, (2,), (3,)).sub_(1.0)
    assert x.tolist() == [[-1.0, 1.0, 6.0], [-1.0, 0.0, 5.0]]
    y = torch.empty(0, device=there)
    torch.add(x, 1.0, out=y)
    assert y.device == there
    assert torch.equal(y, x + 1.0)
    x.resize_(4, 4)
    assert x.shape == (4, 4)
    assert x.view(-1)[:6].tolist() == [-1.0, 1.0, 6.0, -1.0, 0.0, 5.0]
    x.set_(y)
    y.zero_()
    assert torch.equal(x, torch.zeros(2, 3, device=there))
    z = torch.randn(3, dtype=torch.complex64, device=there)
    assert torch.equal(z.conj().imag.cpu(), -z.imag.cpu())
    zeros = torch._efficientzerotensor((2,), device=there)
    assert (zeros + 1.0).tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="convert testdevice"):
        x.numpy()


def test_random_numbers_come_from_the_device(there: torch.device) -> None:
    torch.manual_seed(1)
    first, of_host = torch.randn(5, device=there), torch.randn(5)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(5), of_host)  # the device has taken none of the host's
    assert torch.equal(torch.randn(5, device=there), first)
    module = torch.get_device_module(there)
    state = module.get_rng_state(there)
    with torch.random.fork_rng(devices=[there], device_type=there.type):
        torch.rand(3, device=there)
    assert torch.equal(module.get_rng_state(there), state)
    generator = torch.Generator(there).manual_seed(2)
    copied = generator.get_state()
    drawn = torch.rand(3, device=there, generator=generator)
    generator.set_state(copied)
    assert torch.equal(torch.rand(3, device=there, generator=generator), drawn)
    assert torch.equal(module.get_rng_state(there), state)
    with pytest.raises(RuntimeError, match="'testdevice' device type for generator"):
        torch.rand(3, device=there, generator=torch.Generator())


def test_autocast_is_that_of_the_device(there: torch.device) -> None:
    x = random_matrix(there)
    with torch.autocast(there.type, dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        assert nn.functional.linear(x, x).dtype is torch.bfloat16
        assert (x @ x).exp().dtype is torch.float32
        assert (x.cpu() @ x.cpu()).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.float32


def test_backward_runs_on_a_thread_of_the_device(there: torch.device) -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))
    moved, threads = copy.deepcopy(model).to(there), set()
    x = random_matrix()[:, None]

    def gradients(net: nn.Module, inputs: Tensor) -> list[Tensor]:
        loss = net(inputs).square().sum()
        first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        assert isinstance(penalty, Tensor)
        penalty.register_hook(lambda _: threads.add(threading.get_ident()))
        return list(torch.autograd.grad(penalty, list(net.parameters())))

    expected = gradients(model, x)
    assert threads == {threading.get_ident()}
    threads.clear()
    found = gradients(moved, x.to(there))
    assert threads.isdisjoint({threading.get_ident()})
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    file = io.BytesIO()
    torch.save(moved.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["0.weight"].device == there
    assert torch.equal(loaded["0.weight"], moved[0].weight)


def test_sparse_tensors_live_there(there: torch.device) -> None:
    host = torch.eye(3).to_sparse()
    device = host.to(there)
    assert device.is_sparse
    assert device.device == there
    assert torch.equal(device.cpu().to_dense(), torch.eye(3))
    torch.manual_seed(0)
    layer = nn.Embedding(10, 3, sparse=True)
    moved = copy.deepcopy(layer).to(there)
    words = torch.tensor([1, 4, 4, 2])
    layer(words).square().sum().backward()
    moved(words.to(there)).square().sum().backward()
    assert layer.weight.grad is not None
    assert moved.weight.grad is not None
    assert moved.weight.grad.is_sparse
    assert torch.equal(moved.weight.grad.to_dense().cpu(), layer.weight.grad.to_dense())
    assert moved.weight.grad.coalesce().indices().tolist() == [[1, 2, 4]]


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_without_a_compiler_there_is_none(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(device_backend.Unavailable, match=r"no C\+\+ compiler"):
        device_backend._library()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_compiler_is_the_reason(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(empty_cache, "echo no such header >&2; exit 1"))
    with pytest.raises(device_backend.Unavailable, match=r"did not build .*: no such header"):
        device_backend._library()


def test_two_processes_build_it_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        f"echo built >> {empty_cache}/log; sleep 0.2; while [ $# -gt 1 ]; do shift; done; touch $1"
    )
    monkeypatch.setenv("CXX", compiler(empty_cache, script))
    # The library is an empty file.
    run = device_backend._run
    monkeypatch.setattr(
        device_backend,
        "_run",
        lambda command, failure: None if command[1] == "-c" else run(command, failure),
    )
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(device_backend._library) for _ in range(3)]
    assert len({future.result() for future in made}) == 1
    assert (empty_cache / "log").read_text() == "built\n"
