"""Runs the code of a notebook from top to bottom, and stores what it prints and draws.

    python scripts/site/run_notebook.py docs/quickstart.ipynb
    python scripts/site/run_notebook.py docs/quickstart.ipynb --check   # compares, writes nothing

The cells run in this process, with warnings as errors, as the tests run them. A comparison leaves
out the digits of numbers, which differ from machine to machine.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Runs code cells in one namespace, and returns the outputs of each."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [_outputs("".join(cell["source"]), names, i) for i, cell in enumerate(cells, 1)]


def _outputs(source: str, names: dict[str, Any], number: int) -> list[Cell]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    place = f"cell {number}"
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, place, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    outputs: list[Cell] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed)})
    pictures = _pictures()
    if value is not None and not pictures:
        data = {"text/plain": _lines(io.StringIO(repr(value)))}
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "data": data,
                "metadata": {},
            }
        )
    for picture in pictures:
        data = {"image/png": base64.b64encode(picture).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def _lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines(keepends=True)


def _pictures() -> list[bytes]:
    """The open figures as PNG files; closes them."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    plt = sys.modules["matplotlib.pyplot"]
    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, dpi=90, facecolor="white", metadata={"Software": None})
        found.append(file.getvalue())
    plt.close("all")
    return found


def without_digits(outputs: Sequence[Sequence[Cell]]) -> list[list[str]]:
    """Outputs as texts to compare: without digits, and without the contents of pictures."""
    return [[_shape(output) for output in of_cell] for of_cell in outputs]


def _shape(output: Cell) -> str:
    if output["output_type"] == "display_data":
        return "picture"
    lines = output["text"] if "text" in output else output["data"]["text/plain"]
    text = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", "".join(lines))
    return re.sub(r"\s+", " ", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a notebook, and stores or compares its outputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(arguments)
    import matplotlib as mpl

    mpl.use("Agg")
    notebook = json.loads(options.notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = run(cells)
    if options.check:
        stored = [cell["outputs"] for cell in cells]
        if without_digits(outputs) != without_digits(stored):
            sys.exit(
                f"error: {options.notebook} has other outputs: run {sys.argv[0]} without --check"
            )
        return
    for number, (cell, found) in enumerate(zip(cells, outputs, strict=True), 1):
        cell.update(outputs=found, execution_count=number)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    options.notebook.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
