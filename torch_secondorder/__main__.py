"""Prints what is installed, for a first look and for bug reports: `python -m torch_secondorder`.

`--json` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import torch_secondorder

WIDTH = 80

#: Packages that parts of this one, its examples or its trainers use, with what uses them.
OPTIONAL_PACKAGES = {
    "lightning": "integrations.lightning",
    "pytorch-lightning": "integrations.lightning",
    "transformers": "integrations.huggingface",
    "accelerate": "integrations.huggingface",
    "numpy": "examples",
    "scipy": "examples",
    "scikit-learn": "examples",
    "matplotlib": "examples",
    "tqdm": "examples",
}


def describe() -> dict[str, Any]:
    """Collects versions, devices, optional packages and optimizers.

    The packages are looked up, not imported: that would take seconds.

    >>> sorted(describe())
    ['devices', 'optimizers', 'packages', 'platform', 'python', 'torch', 'version', 'wrappers']
    >>> describe()["optimizers"]["LBFGS"]
    'Limited-memory BFGS, a drop-in for torch.optim.LBFGS.'
    """
    optimizers, wrappers = _optimizers()
    return {
        "version": torch_secondorder.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": str(torch.__version__), **_build()},
        "devices": _devices(),
        "packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "optimizers": optimizers,
        "wrappers": wrappers,
    }


def report(found: Mapping[str, Any]) -> str:
    """Writes a description as text of at most 80 columns."""
    built = {name: value for name, value in found["torch"].items() if name != "version" and value}
    torch_line = f"torch {found['torch']['version']}"
    if built:
        torch_line += f" ({', '.join(f'{name} {value}' for name, value in built.items())})"
    devices = {d["device"]: ", ".join(map(str, d["properties"])) for d in found["devices"]}
    packages = {
        name: f"{version or 'not found':<12} {OPTIONAL_PACKAGES[name]}"
        for name, version in found["packages"].items()
    }
    return "\n".join(
        [
            f"torch_secondorder {found['version']}",
            torch_line,
            *textwrap.wrap(f"Python {found['python']} on {found['platform']}", WIDTH),
            *_table("Devices", devices),
            *_table("Optional packages", packages),
            *_table("Optimizers", found["optimizers"]),
            *_table("Wrappers of an optimizer", found["wrappers"]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_secondorder",
        description="Prints versions, devices, optional packages and the optimizers.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    found = describe()
    sys.stdout.write((json.dumps(found, indent=2) if as_json else report(found)) + "\n")


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    """Names and texts in two columns, the texts wrapped."""
    column = max(map(len, rows)) + 4
    lines = ["", title]
    for name, text in rows.items():
        lines += textwrap.wrap(
            f"  {name:<{column - 2}}{text}",
            WIDTH,
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
    return lines


def _optimizers() -> tuple[dict[str, str], dict[str, str]]:
    """The optimizers, and the wrappers of optimizers, each with its summary."""
    optimizers: dict[str, str] = {}
    wrappers: dict[str, str] = {}
    for name in sorted(torch_secondorder.optim.__all__, key=str.lower):
        found = getattr(torch_secondorder.optim, name)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            continue
        if found is torch_secondorder.SecondOrderOptimizer:
            continue
        is_optimizer = issubclass(found, torch_secondorder.SecondOrderOptimizer)
        summary = (inspect.getdoc(found) or "").partition("\n")[0]
        (optimizers if is_optimizer else wrappers)[name] = summary.replace("`", "")
    return optimizers, wrappers


def _build() -> dict[str, str | None]:
    return {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}


def _devices() -> list[dict[str, Any]]:
    """The CPU, and every accelerator that torch can use, with what describes it."""
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = [f"{threads} thread{'s' if threads != 1 else ''}", f"capability {capability}"]
    devices: list[dict[str, Any]] = [{"device": "cpu", "properties": cpu}]
    if not torch.accelerator.is_available():
        return devices
    kind = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        properties = []
        if kind is not None and kind.type == "cuda":
            card = torch.cuda.get_device_properties(index)
            memory = f"{card.total_memory / 2**30:.0f} GiB"
            properties = [card.name, memory, f"capability {card.major}.{card.minor}"]
        devices.append({"device": f"{kind}:{index}", "properties": properties})
    return devices


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
