"""Runs on the CPU and on a simulated device, with results that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.simulated_device import SimulatedDevice

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DOUBLE = torch.float64


def draw(*shape: int, device: torch.device = CPU, seed: int = 0, dtype: Any = DOUBLE) -> Tensor:
    """Normal numbers, the same on all devices."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(device)


class Problem:
    """A small classifier with its data.

    Attributes:
        net: The network.
        encoder: The part of it that has no head.
        params: Its parameters.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = DOUBLE) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        net = nn.Sequential(self.encoder, nn.Linear(5, 3))
        x, y = draw(12, 4), torch.arange(12) % 3
        self.net = net.to(device, dtype)
        self.x, self.y = x.to(device, dtype), y.to(device)
        self.params = list(self.net.parameters())

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    def closure(self, optimizer: Any = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.net.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


class TwoDevices(Problem):
    """The same with the last layer on the CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__(device, dtype)
        self.net[1].to("cpu")
        self.y = self.y.to("cpu")
        self.params = list(self.net.parameters())

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net[1](self.encoder(self.x).to("cpu")), self.y)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value), dtype=DOUBLE)]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def on_cpu_and_device(case: Callable[[torch.device], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors in the results of a function of the device, on both.

    Those of the device are brought to the host; each must have lived where it is documented to.
    """
    torch.manual_seed(0)
    first = tensors_of(case(CPU))
    torch.manual_seed(0)
    with SimulatedDevice():
        second = [tensor.cpu() for tensor in tensors_of(case(CUDA))]
    return first, second


def assert_same(case: Callable[[torch.device], Any], rtol: float = 1e-7) -> None:
    """The results do not depend on the device."""
    first, second = on_cpu_and_device(case)
    assert first and len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=rtol, equal_nan=True)
