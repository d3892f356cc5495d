"""Command-line options shared by the examples; mistakes are reported before any work is done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch


def add_common_arguments(
    parser: argparse.ArgumentParser,
    *,
    contenders: Collection[str],
    chosen: Collection[str],
    out: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Adds the options that all examples have.

    Args:
        parser: The parser to add them to.
        contenders: Names of the available optimizers.
        chosen: Names of the default ones.
        out: Default file name of the plot.
        dtype: A dtype that the device must support.
    """
    add = parser.add_argument
    add(
        "--optimizers",
        type=names_among(contenders),
        default=list(chosen),
        metavar="A,B,...",
        help=f"any of {', '.join(contenders)}, or all; default: {','.join(chosen)}",
    )
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    add("--device", type=usable_device(dtype), default="cpu", help="default: cpu")
    add("--out", type=output_file, default=out, help=f"file of the plot; default: {out}")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option of examples whose results are also written for programs."""
    parser.add_argument(
        "--json", type=json_file, metavar="FILE", help="also write the results of the table here"
    )


def json_file(text: str) -> Path:
    """Parses the name of a JSON file in an existing directory."""
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{text} does not end in .json")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent}")
    return path


def positive(number: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of finite positive numbers."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = number.__name__  # argparse shows it if `text` is not a number
    return parse


def names_among(contenders: Collection[str], kind: str = "optimizer") -> Callable[[str], list[str]]:
    """A parser of comma-separated names of optimizers, or of another kind of thing; or `all`."""

    def parse(text: str) -> list[str]:
        if text.strip() == "all":
            return list(contenders)
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in contenders:
                raise argparse.ArgumentTypeError(
                    f"unknown {kind} {name!r}; known: {', '.join(contenders)}"
                )
        return list(dict.fromkeys(names))

    return parse


def usable_device(dtype: torch.dtype = torch.float32) -> Callable[[str], torch.device]:
    """A parser of device names; the device must exist on this machine and support `dtype`."""

    def parse(text: str) -> torch.device:
        try:
            return torch.empty(0, device=text, dtype=dtype).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from error

    return parse


def output_file(text: str) -> Path:
    """Parses the name of an image file in an existing directory."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent}")
    return path
