"""SOAP, Shampoo and KFAC: time of a step, memory and training, compared with AdamW and peers."""

from __future__ import annotations

from . import kronecker_memory, kronecker_quality, kronecker_steps
from .registry import Options, command
from .report import Report

PARTS = {
    "steps": kronecker_steps.run,
    "memory": kronecker_memory.run,
    "quality": kronecker_quality.run,
}


@command(
    "kronecker", "SOAP, Shampoo and KFAC, compared with AdamW and other libraries", tuple(PARTS)
)
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
