"""New processes without imports: copies of a server that has imported torch, once for all tests.

To import torch and this package takes longer than most of what tests do in processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
#: There is no `fork` on Windows.
METHOD = "spawn" if sys.platform == "win32" else "forkserver"
# An optimizer imports `torch._dynamo` when it is made.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint", "torch_secondorder"),
    *("pytest", "hypothesis", "scipy.optimize", "sklearn.datasets"),
)


def start_server() -> str:
    """Starts the server unless it runs, and returns the start method of its copies."""
    if METHOD == "forkserver":
        multiprocessing.get_context(METHOD).set_forkserver_preload(list(PRELOADED))
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # not what is installed
            forkserver.ensure_running()
    return METHOD


def _become(command: list[str], cwd: str, variables: Mapping[str, str], folder: str) -> None:
    """Runs a script in this process; its output goes to files."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    sys.argv = command
    # An environment may lie in the project's folder.
    others = [
        path for path in sys.path if not path.startswith(str(ROOT)) or path.startswith(sys.prefix)
    ]
    sys.path[:] = [os.path.dirname(command[0]), str(ROOT), *others]
    runpy.run_path(command[0], run_name="__main__")


def run_script(
    script: Path,
    *arguments: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Runs `python SCRIPT ARGUMENTS` in a process of its own.

    Args:
        script: The file.
        *arguments: Its command line.
        cwd: The folder that it runs in.
        environment: Variables beyond those of this process.
        timeout: Seconds, after which the process is killed.

    Returns:
        The exit status, and what was written.
    """
    command = [str(script), *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    context = multiprocessing.get_context(start_server())
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_become, args=(command, str(cwd), variables, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        output = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, process.exitcode, *output)
