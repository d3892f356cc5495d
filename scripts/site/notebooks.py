"""Notebooks of `docs/` as pages: their texts, code, and the outputs that are stored with them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by file name."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            for data in map(_data, cell["outputs"]):
                parts += _shown(data, path.stem, pictures)
    parts.append(f"[This page as a notebook]({path.name}){{ download }}")
    return "\n\n".join(parts) + "\n", pictures


def _data(output: dict[str, Any]) -> dict[str, Any]:
    """An output by type; errors have none, for a notebook with errors is not committed."""
    if output["output_type"] == "stream":
        return {"text/plain": output["text"]}
    return output.get("data", {})  # type: ignore[no-any-return]


def _shown(data: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """The Markdown of an output, in the richest of the forms that it has."""
    for kind in ("image/svg+xml", "image/png"):
        if kind in data:
            name = f"{stem}_{len(pictures) + 1}.{kind[6:9]}"
            content = "".join(data[kind])
            pictures[name] = (
                content.encode() if kind == "image/svg+xml" else base64.b64decode(content)
            )
            yield f"![What the code above draws]({name})"
            return
    text = _COLOURS.sub("", "".join(data.get("text/plain", ""))).rstrip()
    if text:
        yield f"```text\n{text}\n```"
