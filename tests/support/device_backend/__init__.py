"""A device on host memory, built and registered with PyTorch, for tests of what holds on a device.

`load()` makes `torch.device("testdevice")` usable: tensors, modules, backward passes, generators,
autocast, `torch.testdevice` and `torch.accelerator`. As on a GPU, its tensors do not mix with those
of the host, its random numbers come from generators of its own, and backward passes run on another
thread. Every operator runs its CPU kernel, so results equal those on the CPU bit for bit.

The extension is one C++ file, compiled once for a version of torch into PyTorch's cache of
extensions.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch

NAME = "testdevice"
_SOURCE = Path(__file__).with_name("backend.cpp")
_SECONDS = 600.0


class Unavailable(Exception):
    """Says why this machine has no test device."""


def load() -> torch.device:
    """Builds the extension where needed, and registers it with PyTorch.

    Call it before the first backward pass of the process, in which autograd counts the devices.

    Raises:
        Unavailable: There is no compiler, or it failed, or there is a device already.
    """
    found = _loaded()
    if isinstance(found, Unavailable):
        raise found
    return found


@functools.cache
def _loaded() -> torch.device | Unavailable:
    """The device, or why there is none; found out once."""
    if torch.accelerator.is_available():
        return Unavailable("this process has an accelerator, and PyTorch takes one kind")
    try:
        torch.ops.load_library(_library())
    except Unavailable as error:
        return error
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def _library() -> Path:
    """The compiled extension."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    made_from = f"{torch.__version__} {torch.__file__}".encode() + _SOURCE.read_bytes()
    folder = Path(root) / NAME / hashlib.sha256(made_from).hexdigest()[:16]
    library = folder / f"{NAME}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise Unavailable("no C++ compiler: neither $CXX nor c++ nor g++ is found")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        if not library.exists():
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    from torch.utils import cpp_extension

    part = library.with_suffix(".part")
    command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", str(_SOURCE)]
    command += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    command += ["-ltorch_cpu", "-lc10", "-o", str(part)]
    _run(command, f"{compiler} did not build the test device")
    # What fails to register ends the process, so another one tries it first.
    load = "import sys, torch; torch.ops.load_library(sys.argv[1])"
    _run([sys.executable, "-c", load, str(part)], "PyTorch did not take the test device")
    part.replace(library)


def _run(command: list[str], failure: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{failure}: {error}") from error
    if done.returncode != 0:
        raise Unavailable(f"{failure}: {done.stderr[:2000]}")


def _module() -> types.ModuleType:
    """`torch.testdevice`, with the functions that PyTorch asks of a device."""
    module = types.ModuleType(f"torch.{NAME}", "A device on host memory, for tests.")

    def generator() -> torch.Generator:
        return torch.ops.testdevice.default_generator()

    def get_rng_state(device: object = None) -> torch.Tensor:
        return generator().get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        generator().set_state(state)

    def manual_seed(seed: int) -> None:
        generator().manual_seed(seed)

    @contextlib.contextmanager
    def device(index: object) -> Iterator[None]:
        yield

    def nothing(*args: object) -> None:
        pass

    # The only stream: operations are done when they return. `torch.distributed.checkpoint` copies
    # on the stream of whatever accelerator there is.
    only = types.SimpleNamespace(device_type=NAME, synchronize=nothing, wait_stream=nothing)

    found = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "device": device,
        "current_stream": lambda device=None: only,
        "stream": device,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    module.__dict__.update(found)
    return module
