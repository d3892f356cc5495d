"""Optimizers with Kronecker factors on a device: nothing waits for it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import standard
from tests.support.host_reads import HostReads
from torch_secondorder import KFAC, SOAP, Shampoo
from torch_secondorder._optim.diagonal import blocks

KINDS: dict[str, Any] = {
    "SOAP": (SOAP, {}),
    "Shampoo": (Shampoo, {}),
    "Shampoo without grafting": (Shampoo, {"grafting": None, "exponent": None}),
    "Shampoo by Newton's iteration": (Shampoo, {"root_method": "newton"}),
    "KFAC": (KFAC, {}),
}
ON_STACKS = [name for name in KINDS if name != "KFAC"]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5))
    return net.to(dtype)


def losses(net: nn.Module, count: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """A loss for each step."""
    torch.manual_seed(1)
    data = [(torch.randn(8, 1, 3, 3).to(dtype), torch.randn(8, 5).to(dtype)) for _ in range(count)]
    return [lambda x=x, y=y: F.mse_loss(net(x), y) for x, y in data]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_wait_for_the_device_once(name: str, with_closure: bool, dtype: torch.dtype) -> None:
    """The first step looks at the counts; later ones at nothing, refreshes on a CPU included."""
    kind, options = KINDS[name]
    net = network(dtype)
    optimizer = kind(
        net.parameters(), weight_decay=0.1, update_period=4, capturable=True, **options
    )
    reads = []
    for loss in losses(net, 12, dtype):
        closure = standard(optimizer, loss)
        if not with_closure:
            closure()
        with HostReads(optimizer) as counted:
            optimizer.step(closure if with_closure else None)
        reads.append(counted.count)
    assert reads[2:] == [0] * 10 and sum(reads[:2]) <= 16
    assert optimizer.info.status.name == "MOVED"


@pytest.mark.parametrize("name", ON_STACKS)
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_possible_where_no_number_can_be_read(
    name: str, maximize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device: numbers are never there, and other tensors of the host do not mix in."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    # The first step looks whether the parameters have the same counts.
    monkeypatch.setattr(
        blocks, "float", lambda x: 0.0 if isinstance(x, Tensor) else float(x), raising=False
    )
    kind, options = KINDS[name]
    shapes = [(3, 1, 2, 2), (3,), (40, 12), (5,), (12, 40)]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = kind(
        params,
        weight_decay=0.1,
        update_period=100,
        block_size=20,
        max_precond_dim=30,
        maximize=maximize,
        **options,
    )
    for _ in range(20):  # the start of SOAP and the first roots of Shampoo included
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    for p in params:
        for entry, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and entry != "host_step":
                assert value.device.type == "meta" or value.dim() == 0, entry


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_where_the_host_looks(name: str) -> None:
    kind, options = KINDS[name]
    results = []
    for capturable in (False, True):
        net = network(torch.float64)
        optimizer = kind(
            net.parameters(), weight_decay=0.1, update_period=4, capturable=capturable, **options
        )
        for loss in losses(net, 30, torch.float64):
            optimizer.step(standard(optimizer, loss))
        results.append([p.detach().clone() for p in net.parameters()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_bad_steps_on_the_device_leave_the_parameters(name: str) -> None:
    """Also the first one, and one in which factors are decomposed."""
    kind, options = KINDS[name]
    net = network(torch.float64)
    optimizer = kind(net.parameters(), lr=0.01, update_period=4, capturable=True, **options)
    moved = []
    for step, loss in enumerate(losses(net, 20, torch.float64)):
        before = [p.detach().clone() for p in net.parameters()]
        scale = float("nan") if step in (0, 7, 8) else 1.0
        optimizer.step(standard(optimizer, lambda loss=loss, scale=scale: scale * loss()))
        moved.append(not all(map(torch.equal, before, net.parameters())))
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        for state in optimizer.state.values():
            numbers = [v for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()]
            assert all(bool(tensor.isfinite().all()) for tensor in numbers)
    assert moved == [step not in (0, 7, 8) for step in range(20)]
