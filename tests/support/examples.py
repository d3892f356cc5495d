"""Examples, run as a user does."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.processes import ROOT, run_script

EXAMPLES = ROOT / "examples"


def run_example(
    *arguments: str | Path,
    cwd: Path,
    environment: dict[str, str] | None = None,
    script: str = "compare_optimizers.py",
) -> subprocess.CompletedProcess[str]:
    return run_script(EXAMPLES / script, *arguments, cwd=cwd, environment=environment)
