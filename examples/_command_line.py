"""What the examples' command lines have in common; mistakes are told before any work is done."""

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
        parser: Where to.
        contenders: Names of the optimizers that may take part.
        chosen: Those that do by default.
        out: Default name of the plot's file.
        dtype: What the device must be able to hold.
    """
    add = parser.add_argument
    add(
        "--optimizers",
        type=names_among(contenders),
        default=list(chosen),
        metavar="A,B,...",
        help=f"of {', '.join(contenders)}; default: {','.join(chosen)}",
    )
    add("--seed", type=int, default=0, help="of all random numbers; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    add("--device", type=usable_device(dtype), default="cpu", help="default: cpu")
    add("--out", type=output_file, default=out, help=f"the plot's file; default: {out}")


def positive(number: type[int] | type[float]) -> Callable[[str], float]:
    """Makes a parser of finite numbers greater than zero."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = number.__name__  # argparse shows it where `text` is no number at all
    return parse


def names_among(contenders: Collection[str], kind: str = "optimizer") -> Callable[[str], list[str]]:
    """Makes a parser of comma-separated names of optimizers, or of another kind of thing."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in contenders:
                raise argparse.ArgumentTypeError(
                    f"unknown {kind} {name!r}; known: {', '.join(contenders)}"
                )
        return list(dict.fromkeys(names))

    return parse


def usable_device(dtype: torch.dtype = torch.float32) -> Callable[[str], torch.device]:
    """Makes a parser of the name of a device that this machine has and that can hold `dtype`."""

    def parse(text: str) -> torch.device:
        try:
            return torch.empty(0, device=text, dtype=dtype).device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from error

    return parse


def output_file(text: str) -> Path:
    """Parses the name of an image file to write in a directory that exists."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path.parent}")
    return path
