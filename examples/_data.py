"""Real images for the examples: bundled digits, or Fashion-MNIST files found on this machine."""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_VARIABLE = "FASHION_MNIST_DIR"
FASHION_MNIST_SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """Flattened grey images in [-1, 1] and their classes.

    Attributes:
        name: Name of the data set.
        train_x: Training images, shape ``(n, pixels)``, float32.
        train_y: Training classes, shape ``(n,)``, int64.
        test_x: Test images, shape ``(m, pixels)``, float32.
        test_y: Test classes, shape ``(m,)``, int64.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.train_x.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1

    def to(self, device: torch.device) -> Images:
        """Copies the images to a device."""
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Images(self.name, *(t.to(device) for t in tensors))


def load_images(dataset: str, data_dir: Path | None = None, *, seed: int = 0) -> Images:
    """Loads a data set by name.

    Args:
        dataset: One of `DATASETS`.
        data_dir: Directory of the Fashion-MNIST files; the digits come with scikit-learn.
        seed: Seed of the split of the digits into training and test images.

    Raises:
        ValueError: If no data set has that name.
        FileNotFoundError: If the Fashion-MNIST files are not found.
    """
    if dataset == "digits":
        return load_digits(seed)
    if dataset == "fashion-mnist":
        return load_fashion_mnist(data_dir)
    raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")


def load_digits(seed: int = 0) -> Images:
    """Loads scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth as test images."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    x, y = datasets.load_digits(return_X_y=True)
    parts = train_test_split(x / 8.0 - 1.0, y, test_size=0.2, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Images("digits", train_x.float(), train_y.long(), test_x.float(), test_y.long())


def load_fashion_mnist(data_dir: Path | None = None) -> Images:
    """Loads the 60,000 training and 10,000 test images of Fashion-MNIST.

    Args:
        data_dir: The directory of the four ``idx-ubyte`` files, gzipped or not. Without it,
            `find_fashion_mnist` looks for them.

    Raises:
        FileNotFoundError: If the files are not found.
    """
    directory = find_fashion_mnist(data_dir)
    train_x, test_x = (
        read_idx(_idx_file(directory, f"{part}-images-idx3-ubyte")).flatten(1) / 127.5 - 1.0
        for part in ("train", "t10k")
    )
    train_y, test_y = (
        read_idx(_idx_file(directory, f"{part}-labels-idx1-ubyte")).long()
        for part in ("train", "t10k")
    )
    return Images("fashion-mnist", train_x, train_y, test_x, test_y)


def find_fashion_mnist(data_dir: Path | None = None) -> Path:
    """Returns the directory that holds Fashion-MNIST.

    It is `data_dir` if given, else ``$FASHION_MNIST_DIR`` if set, else the directory of Debian's
    package ``dataset-fashion-mnist``.

    Raises:
        FileNotFoundError: If the files are not there; the message names all three ways.
    """
    variable = os.environ.get(FASHION_MNIST_VARIABLE)
    if data_dir is not None:
        directory = data_dir
    elif variable:
        directory = Path(variable)
    else:
        directory = FASHION_MNIST_SYSTEM_DIR
    try:
        _idx_file(directory, "train-images-idx3-ubyte")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no Fashion-MNIST in {directory} ({error}).\nThere are three ways to provide it:\n"
            "  --data-dir DIR            a directory with its four idx-ubyte(.gz) files\n"
            f"  {FASHION_MNIST_VARIABLE}=DIR     the same, as an environment variable\n"
            "  apt install dataset-fashion-mnist\n"
            f"                            Debian's package; puts them in {FASHION_MNIST_SYSTEM_DIR}"
        ) from error
    return directory


def best_available(data_dir: Path | None = None) -> str:
    """Returns "fashion-mnist" if a directory is given or the files are found, else "digits"."""
    if data_dir is None:
        try:
            find_fashion_mnist()
        except FileNotFoundError:
            return "digits"
    return "fashion-mnist"


def read_idx(path: Path) -> Tensor:
    """Reads a file of unsigned bytes in the IDX format of the MNIST family.

    The header is two zero bytes, the element type (8: unsigned byte), the number of dimensions,
    and each dimension as a big-endian 32-bit integer; the elements follow, row by row.

    Args:
        path: The file; gzipped if its name ends in ``.gz``.

    Returns:
        A uint8 tensor of the shape that the header states.

    Raises:
        ValueError: If the file is not in this format, or its length contradicts its header.
    """
    raw = path.read_bytes()
    data = bytearray(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes (starts {bytes(data[:4])!r})"
        )
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(data) - start} elements; its header says {shape}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=start).reshape(shape)


def _idx_file(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {name} nor {name}.gz is there")
