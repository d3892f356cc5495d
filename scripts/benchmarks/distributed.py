"""Communication between ranks in an iteration, and peak memory of optimizers in vectors."""

from __future__ import annotations

from . import distributed_communication, distributed_memory
from .registry import Options, command
from .report import Report

PARTS = {
    "communication": distributed_communication.run,
    "memory": distributed_memory.run,
}


@command("distributed", "bytes between two ranks, and vectors held at the peak", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
