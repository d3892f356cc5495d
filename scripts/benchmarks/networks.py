"""Networks and data of the benchmarks, with fixed seeds."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Case:
    """A network with a batch and a loss.

    Attributes:
        name: Name in the tables.
        model: The network, on the device.
        loss: A module that maps outputs and targets to a scalar.
        inputs: One batch.
        targets: Its targets.
    """

    name: str
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters, which are all trainable."""
        return list(self.model.parameters())

    def value(self) -> Tensor:
        """The loss on the batch."""
        result: Tensor = self.loss(self.model(self.inputs), self.targets)
        return result


def chain(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A fully connected network with an activation between its layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _classifier(name: str, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Case:
    inputs, targets = torch.randn(shape), torch.randint(10, shape[:1])
    return Case(
        name, model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device)
    )


def mlp(device: torch.device, batch: int = 256) -> Case:
    """784-512-256-10 with ReLU."""
    torch.manual_seed(0)
    return _classifier(
        "MLP 784-512-256-10", chain([784, 512, 256, 10], nn.ReLU), (batch, 784), device
    )


def deep_mlp(
    device: torch.device, activation: Callable[[], nn.Module] = nn.ReLU, batch: int = 128
) -> Case:
    """Twenty layers of width 64: many small operations, the worst case for overheads."""
    torch.manual_seed(0)
    name = f"MLP 20 x 64, {activation().__class__.__name__}"
    return _classifier(name, chain([64] * 20 + [10], activation), (batch, 64), device)


def small_cnn() -> nn.Sequential:
    """Two convolutions and a linear layer, 20,490 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def cnn(device: torch.device, batch: int = 128) -> Case:
    """A small convolutional network for images of 28 x 28."""
    torch.manual_seed(0)
    return _classifier("CNN 16-32", small_cnn(), (batch, 1, 28, 28), device)


def autoencoder(device: torch.device, batch: int = 256) -> Case:
    """784-1000-500-250-30 and its mirror image, tanh, squared error."""
    torch.manual_seed(0)
    widths = [784, 1000, 500, 250, 30]
    model = chain(widths + widths[-2::-1], nn.Tanh).to(device)
    inputs = torch.rand(batch, 784).to(device)
    return Case("autoencoder 784-...-30", model, nn.MSELoss(), inputs, inputs)


def tanh_net(device: torch.device, batch: int = 1000) -> Case:
    """2-50-50-50-1 with tanh, the size of a physics-informed network."""
    torch.manual_seed(0)
    model = chain([2, 50, 50, 50, 1], nn.Tanh).to(device)
    inputs = torch.rand(batch, 2)
    targets = torch.sin(3.0 * inputs).prod(1, keepdim=True)
    return Case("tanh 2-50-50-50-1", model, nn.MSELoss(), inputs.to(device), targets.to(device))


def _read_idx(path: Path) -> Tensor:
    """Reads a gzipped file of the IDX format with unsigned bytes."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    shape = [int.from_bytes(data[4 * i + 4 : 4 * i + 8], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(data[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)


def images(count: int) -> tuple[Tensor, Tensor, str]:
    """Flat images of 784 pixels in [0, 1] with ten classes.

    Fashion-MNIST from `$FASHION_MNIST_DIR` or from Debian's package dataset-fashion-mnist; without
    either, noisy class templates of the same shape.

    Returns:
        Images of shape (count, 784), labels of shape (count,), and the name of the data.
    """
    for folder in (os.environ.get("FASHION_MNIST_DIR"), DEBIAN):
        pixels = Path(folder or ".", "train-images-idx3-ubyte.gz")
        labels = Path(folder or ".", "train-labels-idx1-ubyte.gz")
        if folder and pixels.exists() and labels.exists():
            x = _read_idx(pixels)[:count].reshape(-1, 784).float() / 255.0
            return x, _read_idx(labels)[:count].long(), "Fashion-MNIST"
    generator = torch.Generator().manual_seed(0)
    templates = torch.rand(10, 784, generator=generator)
    y = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 784, generator=generator)
    return (templates[y] + noise).clamp(0.0, 1.0), y, "synthetic (no Fashion-MNIST found)"
