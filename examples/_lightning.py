"""Helpers of the Lightning examples: the installed package, a module, a quiet trainer."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from _data import Images, best_available, load_images

try:
    import lightning.pytorch as host
except ImportError:
    try:
        import pytorch_lightning as host
    except ImportError:
        sys.exit("error: this example needs Lightning: pip install lightning")

CHUNK = 1000  # images tested at a time


class Classifier(host.LightningModule):
    """An ordinary module, written without regard to the optimizer.

    Args:
        network: Maps images to logits.
        make: Makes the optimizer for its parameters.
    """

    def __init__(
        self, network: nn.Module, make: Callable[[Iterable[nn.Parameter]], Optimizer]
    ) -> None:
        super().__init__()
        self.network = network
        self.make = make
        self.evaluations = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        self.evaluations += 1
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """See `LightningModule.configure_optimizers`."""
        return self.make(self.parameters())


class Batches:
    """Batches of tensors, in a new order each epoch.

    Args:
        x: Samples.
        y: Their targets.
        size: Batch size; None for all samples at once, in their given order.
        seed: Seed of the order.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int | None, seed: int = 0) -> None:
        self.x, self.y, self.size = x, y, size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return 1 if self.size is None else -(-len(self.x) // self.size)

    def __iter__(self) -> Any:
        if self.size is None:
            yield [self.x, self.y]
            return
        order = torch.randperm(len(self.x), generator=self._generator)
        for indices in order.split(self.size):
            yield [self.x[indices], self.y[indices]]


def quiet() -> None:
    """Silences Lightning's messages about deliberate choices of these examples."""
    logging.getLogger(host.__name__).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers",
        ".*isinstance\\(treespec, LeafSpec\\)",
        ".*smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", message=message)


def trainer(epochs: int, callbacks: list[Any]) -> Any:
    """A trainer with a progress bar, and without files."""
    return host.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[host.callbacks.TQDMProgressBar(refresh_rate=5), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are classified correctly."""
    pairs = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    right = [(network(a).argmax(dim=1) == b).double().sum() for a, b in pairs]
    return (torch.stack(right).sum() / len(x)).item()


def images_for(arguments: argparse.Namespace) -> Images:
    """Sets up torch and Lightning, and loads the images for the command line.

    Ends the program if they cannot be loaded.

    Args:
        arguments: `threads`, `dataset`, `data_dir`, `seed`, and the number of training `images`.
    """
    quiet()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        dataset = arguments.dataset or best_available(arguments.data_dir)
        found = load_images(dataset, arguments.data_dir, seed=arguments.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    kept = slice(arguments.images)
    return Images(found.name, found.train_x[kept], found.train_y[kept], found.test_x, found.test_y)
