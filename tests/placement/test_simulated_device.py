"""The simulated device itself: numbers of the host, rules of a device."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.host_reads import HostReads
from tests.support.placement import CUDA, draw
from tests.support.simulated_device import SimulatedDevice, _Numbers
from torch_secondorder._autograd.backward_hook import BackwardListeners, Patch, _method

# Forward mode under a dispatch mode compiles its formulas for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda there, here: there + here,
    "add to the host": lambda there, here: here + there,
    "in place": lambda there, here: there.add_(here),
    "into a number of the host": lambda there, here: here.sum().add_(there.sum()),
    "mv": lambda there, here: torch.outer(there, there) @ here,
    "dot": lambda there, here: there @ here,
    "cat": lambda there, here: torch.cat([there, here]),
    "stack of numbers": lambda there, here: torch.stack([there[0], here[0]]),
    "where": lambda there, here: torch.where(there > 0, here, there),
    "lists": lambda there, here: torch._foreach_add([there], [here]),
    "out": lambda there, here: torch.sub(there, there, out=here),
    "gather": lambda there, here: there.gather(0, torch.zeros(1, dtype=torch.long)),
    "numpy": lambda there, here: there.numpy(),
    "generator": lambda there, here: torch.rand(2, device=CUDA, generator=torch.Generator()),
    "generator in place": lambda there, here: there.normal_(generator=torch.Generator()),
    "generator of the device": lambda there, here: torch.rand(2, generator=torch.Generator(CUDA)),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_places_do_not_mix(name: str) -> None:
    with (
        SimulatedDevice(),
        pytest.raises((RuntimeError, TypeError), match=r"device|generator|numpy"),
    ):
        MIXED[name](draw(3, device=CUDA), draw(3))


ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda x: x * torch.tensor(2.0),
    "number first": lambda x: torch.tensor(2.0) - x,
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0, dtype=x.dtype)),
    "lists": lambda x: torch._foreach_mul([x, x], torch.tensor(2.0)),
    "indices": lambda x: x[torch.tensor([0, 2])],
    "written": lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(3.0).double()),
    "views": lambda x: x.view(3, 1).expand(3, 2).t()[1],
    "in place of views": lambda x: x.clone().view(3, 1)[1:].mul_(3.0),
    "reshaped": lambda x: x.expand(2, 3).reshape(6),
    "mask": lambda x: x[x > 0],
    "resized": lambda x: x.clone().resize_(5)[:3],
    "complex": lambda x: torch.view_as_real(torch.complex(x, -x).conj() * 2),
    "decompositions": lambda x: torch.linalg.qr(torch.outer(x, x) + torch.eye(3, device=x.device)),
    "random": lambda x: torch.rand(3, device=x.device, generator=torch.Generator(x.device)),
    "vmap": lambda x: torch.func.vmap(lambda a: a * x)(torch.outer(x, x)),
    "jacobian": lambda x: torch.func.jacrev(lambda a: a.sin() * a)(x),
    "forward mode": lambda x: torch.func.jvp(lambda a: a.sin() * a, (x,), (x,))[1],
    "hessian": lambda x: torch.func.hessian(lambda a: (a.sin() * a).sum())(x),
    "inference": lambda x: _inferred(x),
    "likes": lambda x: [torch.zeros_like(x), x.new_ones(2), x.new_tensor([1.0, 2.0])],
    "from the host": lambda x: torch.as_tensor([1.0, 2.0], device=x.device) + 1,
    "copies": lambda x: copy.deepcopy([x, nn.Parameter(x)]),
    "dropout": lambda x: F.dropout(x, 0.5).shape[0],
}


def _inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return (x.clone().reshape(3, 1) @ x.clone().reshape(1, 3)).flatten()


@pytest.mark.parametrize("name", ALLOWED)
def test_numbers_are_those_of_the_host(name: str) -> None:
    expected = ALLOWED[name](draw(3))
    with SimulatedDevice():
        found = ALLOWED[name](draw(3, device=CUDA))
        for tensor in _all(found):
            assert tensor.device == CUDA and tensor.is_cuda and not tensor.is_cpu
        found = [tensor.cpu() for tensor in _all(found)]
    for one, other in zip(found, _all(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def _all(found: Any) -> list[Tensor]:
    found = found if isinstance(found, (list, tuple)) else [found]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


READING: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "item": (lambda x: x[0].item(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "bool": (lambda x: bool(x[0] > 0), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "to": (lambda x: x.to("cpu", torch.float32), 1),
    "copy": (lambda x: torch.empty(3, dtype=x.dtype).copy_(x), 1),
    "copies of lists": (lambda x: torch._foreach_copy_([torch.empty(3)] * 2, [x, x]), 2),
    "nonzero": (lambda x: x.nonzero(), 1),
    "mask": (lambda x: x[x > 0], 1),
    "masked write": (lambda x: x.clone().__setitem__(x > 0, x[:1]), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "allclose": (lambda x: torch.allclose(x, x), 1),
    "unique": (lambda x: x.unique(), 1),
    "repeats": (lambda x: x.repeat_interleave(torch.ones(3, dtype=int, device=x.device)), 1),
    "repeats of known size": (
        lambda x: x.repeat_interleave(torch.ones(3, dtype=int, device=x.device), output_size=3),
        0,
    ),
    "eigh": (lambda x: torch.linalg.eigh(torch.outer(x, x)), 1),
    "cholesky": (lambda x: torch.linalg.cholesky(torch.outer(x, x) + 9 * torch.eye(3).to(x)), 1),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(torch.outer(x, x)), 0),
    "arithmetic": (lambda x: (x * 2).sum().sqrt().where(x[0] > 0, x[1]), 0),
    "masked fill": (lambda x: x.masked_fill(x > 0, 0.0), 0),
    "clipping": (lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0), 0),
}


@pytest.mark.parametrize("name", READING)
def test_waits_are_counted(name: str) -> None:
    function, expected = READING[name]
    with SimulatedDevice() as device:
        x = draw(3, device=CUDA)
        device.take()
        function(x)
        assert len(device.take()) == expected
        assert not device.reads


def test_uploads_are_counted() -> None:
    with SimulatedDevice() as device:
        x = torch.tensor([1.0, 2.0], device="cuda")
        x.copy_(torch.ones(2))
        x[torch.tensor([0])] = 0.0
        torch.ones(2).to(x)
        assert len(device.uploads) >= 4 and not device.reads


def test_gradients_are_on_the_device() -> None:
    with SimulatedDevice() as device:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        net.to("cuda")
        loss = F.cross_entropy(
            net(draw(6, 3, device=CUDA, dtype=torch.float32)), torch.zeros(6, dtype=int).cuda()
        )
        (product,) = torch.autograd.grad(loss, net[0].weight, create_graph=True)
        product.sum().backward()
        for p in net.parameters():
            assert type(p) is nn.Parameter and p.device == CUDA and p.grad.device == CUDA
        assert device.reads == []


def test_listeners_of_backward_passes_are_on_the_device() -> None:
    """Also while the package has put a method of its own in the place of `Tensor.backward`."""

    def listen(listeners: Any, own: Any, *args: Any, **kwargs: Any) -> None:
        found.append(torch.empty(2, device=CUDA))
        own(*args, **kwargs)

    found: list[Tensor] = []
    someone, listeners = {1}, BackwardListeners(listen)
    listeners.add(someone)
    Patch.begin(_method)
    try:
        with SimulatedDevice():
            x = draw(2, device=CUDA).requires_grad_()
            x.square().sum().backward()
            assert x.grad.device == found[0].device == CUDA
    finally:
        Patch.end(_method)
        listeners.discard(someone)


def test_an_event_says_where() -> None:
    with SimulatedDevice() as device:
        draw(1, device=CUDA).item()
    (event,) = device.reads
    assert event.name == "aten::_local_scalar_dense"
    assert event.frames == ("tests.placement.test_simulated_device:test_an_event_says_where",)
    assert event.within("tests.placement") and not event.within("optim")
    assert str(event).startswith("aten::_local_scalar_dense in tests.placement")


def test_all_is_as_before_afterwards() -> None:
    before = torch.Generator, torch.cuda.get_rng_state, torch.autograd._engine_run_backward
    with SimulatedDevice():
        kept = draw(3, device=CUDA)
    assert before == (
        torch.Generator,
        torch.cuda.get_rng_state,
        torch.autograd._engine_run_backward,
    )
    assert "device" not in vars(torch.Tensor) and kept.device.type == "meta"
    with SimulatedDevice():  # tensors may be kept from one simulation to the next
        assert torch.equal(kept.cpu(), draw(3))


def test_memory_of_the_host_is_let_go() -> None:
    with SimulatedDevice():
        for _ in range(2000):
            torch.ones(3, device="cuda")
        gc.collect()
        assert len(_Numbers._twins) < 1500


def test_random_numbers_of_the_device_are_its_own() -> None:
    with SimulatedDevice():
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        state = torch.cuda.get_rng_state(CUDA)
        first = torch.rand(2, device="cuda")
        assert torch.equal(torch.rand(2), expected)
        torch.cuda.set_rng_state(state, CUDA)
        assert torch.equal(torch.rand(2, device="cuda"), first)


@pytest.mark.parametrize("checks", [False, True])
def test_host_reads_on_the_cpu(checks: bool) -> None:
    x = draw(3)
    with HostReads(checks=checks) as counted:
        x[0].item()
        x.nonzero()
        torch.equal(x, x)
        _ = x[x > 0]
        x.clone()[x > 0] = x[:1]
        x.unique()
        torch.linalg.eigh(torch.outer(x, x))
    assert counted.count == 6 + checks
