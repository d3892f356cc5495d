"""Runs the examples, and makes docs/gallery.md of their pictures and tables.

    python scripts/site/gallery.py                          # all of them, then the page
    python scripts/site/gallery.py pinn_poisson least_squares
    python scripts/site/gallery.py --page                   # the page alone, from earlier runs

Each example runs with the command that the page shows, in an empty folder. Its picture goes to
docs/images/gallery/, its output and its time to gallery.json beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "docs" / "images" / "gallery"
RUNS = Path(__file__).with_name("gallery.json")
PAGE = ROOT / "docs" / "gallery.md"
LARGEST_PICTURE = 80_000  # bytes


@dataclass(frozen=True)
class Entry:
    """An example of the gallery.

    Attributes:
        name: The script, without its ending.
        title: The heading.
        text: One or two sentences.
        arguments: Those of the command.
        described: The picture in words; empty if the example draws none.
        needs: An extra of the package that it needs besides `examples`.
    """

    name: str
    title: str
    text: str
    arguments: str = ""
    described: str = ""
    needs: str = ""

    @property
    def command(self) -> str:
        """The command that runs it."""
        return f"python examples/{self.name}.py {self.arguments}".rstrip()


SECTIONS: dict[str, list[Entry]] = {
    "Optimizers side by side": [
        Entry(
            "compare_optimizers",
            "All optimizers on one network",
            "A small classifier of handwritten digits. Every optimizer gets the same closure, the "
            "same start and the same number of seconds.",
            "--seconds 4",
            described="Training loss against seconds and against evaluations of the closure",
        ),
        Entry(
            "minimize_rosenbrock",
            "The paths of all methods on Rosenbrock's function",
            "`minimize` with every method, from exact gradients and from finite differences. The "
            "paths show how each one gets through the curved valley.",
            described="Paths of the methods over the contours of Rosenbrock's function",
        ),
    ],
    "Curves and least squares": [
        Entry(
            "curve_fitting",
            "NIST's reference problems, beside SciPy",
            "`curve_fit` on all 27 nonlinear regressions with certified results, from both "
            "starting points. The table counts correct digits.",
            described="Fitted curves with bands of two standard errors",
        ),
        Entry(
            "least_squares",
            "A polynomial by linear least squares, in five ways",
            "The pseudoinverse, a gradient iteration, LSQR, LSMR, and a bound on the norm of the "
            "coefficients, whose multiplier is the penalty of ridge regression.",
            described="Convergence of the iterations, norm against multiplier, and the fits",
        ),
        Entry(
            "jacobian_speed",
            "Ways to a Jacobian, timed",
            "The Jacobian of a 500-100-10 network by finite differences, by automatic "
            "differentiation and by a formula, all checked against each other.",
        ),
    ],
    "Differential equations": [
        Entry(
            "pinn_poisson",
            "Poisson's equation to high precision",
            "A network that has to satisfy the equation on the unit square. The loss is so badly "
            "conditioned that Adam nearly stops far from the solution.",
            "--optimizers levenberg-marquardt,lbfgs,adam --seconds 15",
            described="The network's solution, the true one, their difference, and error by time",
        ),
        Entry(
            "pinn_burgers",
            "Burgers' equation with a shock",
            "A nonlinear equation whose solution steepens, compared with a solution by the method "
            "of lines.",
            "--optimizers levenberg-marquardt,lbfgs,adam --seconds 15",
            described="The network's solution, the true one, their difference, and error by time",
        ),
        Entry(
            "pinn_convection",
            "Convection with a fast wave",
            "The standard failure of physics-informed networks: most optimizers end in a valley "
            "with an error of 80 to 100 percent. `--target` ends the run at one percent.",
            "--target 1e-2 --seconds 200",
            described="The network's solution, the true one, their difference, and error by time",
        ),
        Entry(
            "poisson_100d",
            "Poisson's equation in many dimensions",
            "Points drawn anew in each step, far fewer residuals than parameters: "
            "`LevenbergMarquardt` with the momentum of SPRING. The default has 100 dimensions and "
            "takes six minutes.",
            "--dimension 20 --widths 32,32 --seconds 15",
            described="Error against seconds, and the network's values against the true ones",
        ),
    ],
    "Networks on mini-batches": [
        Entry(
            "train_classifier",
            "A convolutional network, with tuned rates and several seeds",
            "Each optimizer first chooses its learning rate on held-out images; the comparison "
            "then takes the same time for all.",
            "--dataset digits --seconds 2 --seeds 3 --optimizers soap,shampoo,kfac,adasecant,adamw",
            described="Training loss and test accuracy against seconds and against steps",
        ),
        Entry(
            "train_char_lm",
            "A small transformer on the characters of a text",
            "AdamW, SOAP, Shampoo and Sophia for the same time, then for the same number of steps. "
            "`--reach` finds the number of steps that each one needs for AdamW's loss.",
            "--seconds 4 --seeds 2 --width 32",
            described="Validation loss against seconds and against steps, mean and range",
        ),
        Entry(
            "deep_autoencoder",
            "A deep autoencoder of sigmoid units",
            "The classical problem of Hessian-free optimization, here on handwritten digits.",
            "--dataset digits --seconds 10",
            described="Reconstruction error against seconds, and reconstructed images",
        ),
        Entry(
            "contractive_autoencoder",
            "A contractive autoencoder beside plain and denoising ones",
            "The penalty on the encoder's Jacobian makes the code insensitive to all directions "
            "but those in which the data vary.",
            "--dataset digits --units 100",
            described="Singular values of the Jacobian, contraction of balls, and features",
        ),
    ],
    "Constraints": [
        Entry(
            "constrained_fit",
            "A fit with equalities and inequalities",
            "A velocity profile from noisy measurements, with what is known about it as "
            "constraints, their multipliers, and a certificate of the result.",
            described="Fits with and without constraints, their slopes, and what feasibility costs",
        ),
        Entry(
            "fair_classifier",
            "The price of fairness",
            "A bound on the gap between two groups' rates of positive answers. The multiplier "
            "says what a tighter bound costs; a check confirms it.",
            described="Accuracy and rates of both groups by gap, and the price of the bound",
        ),
        Entry(
            "spectral_norm_bound",
            "A network with bounded spectral norms",
            "Layers that cannot stretch differences by more than a bound give certified answers. "
            "Compared with weight decay and with a parametrization.",
            "--images 600 --units 16",
            described="Certified accuracy, accuracy under noise, and singular values of the layers",
        ),
    ],
    "Trainers": [
        Entry(
            "lightning_mnist",
            "Any optimizer by name in Lightning",
            "An ordinary module and a `SecondOrderMonitor`, which shows numbers about the steps.",
            "--dataset digits --optimizer newton-cg,lbfgs,adam",
            needs="lightning",
        ),
        Entry(
            "lightning_lbfgs",
            "Full-batch L-BFGS in Lightning",
            "The network for which L-BFGS was once reported not to converge in Lightning, trained "
            "by `LBFGS` and by `torch.optim.LBFGS` until the gradient is small.",
            "--dataset digits",
            needs="lightning",
        ),
        Entry(
            "huggingface_trainer",
            "A small GPT-2 in the Hugging Face Trainer",
            "AdamW, Sophia and AdaHessian with accumulation, clipping, warm-up and a cosine "
            "schedule. Nothing is downloaded.",
            "--steps 100",
            needs="huggingface",
        ),
    ],
}

ENTRIES = {entry.name: entry for section in SECTIONS.values() for entry in section}


def run(entry: Entry) -> dict[str, Any]:
    """Runs an example, keeps its picture, and returns its command, output and seconds.

    Raises:
        RuntimeError: The example failed, or drew no picture or a large one.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLES / f"{entry.name}.py"), *entry.arguments.split()]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        start = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"{entry.command} failed:\n{done.stdout}{done.stderr}")
        drawn = sorted(Path(folder).glob("*.png"))
        if len(drawn) != bool(entry.described):
            raise RuntimeError(f"{entry.command} drew {len(drawn)} pictures")
        for picture in drawn:
            shrink(picture, PICTURES / f"{entry.name}.png")
    return {
        "command": entry.command,
        "seconds": round(seconds, 1),
        "output": shown(done.stdout),
    }


def shown(printed: str) -> list[str]:
    r"""The lines of an output that the page shows: no progress bars, nothing about the picture.

    >>> shown("Epoch 0: 100%|####| 2/2 [00:01<00:00]\n\na table\nplot: some.png\n")
    ['a table']
    """
    unwanted = re.compile(r"(Training|Epoch \d+|Validation): .*\||.*\.png$|^$")
    lines = [line.rstrip() for line in printed.splitlines()]
    return [line for line in lines if not unwanted.match(line)]


def shrink(source: Path, target: Path) -> None:
    """Copies a picture with few colours, and smaller where it would be too large a file."""
    from PIL import Image

    coverage = Image.Quantize.MAXCOVERAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as opened:
        picture = Image.new("RGB", opened.size, "white")
        picture.paste(opened, mask=opened.getchannel("A") if opened.mode == "RGBA" else None)
    for width in (1200, 1000, 900, 800, 700):
        size = width, round(picture.height * width / picture.width)
        small = picture if width > picture.width else picture.resize(size, Image.Resampling.LANCZOS)
        for colours in (256, 128):
            # By coverage: the colours of thin lines count as much as those of areas.
            found = small.quantize(colours, coverage, kmeans=3, dither=Image.Dither.NONE)
            found.save(target, optimize=True)
            if target.stat().st_size <= LARGEST_PICTURE:
                return
    raise RuntimeError(f"{target.name} has {target.stat().st_size:,} bytes: draw less")


def page(runs: dict[str, Any]) -> str:
    """The page of all examples that have been run."""
    lines = [
        "# Gallery",
        "",
        "Every script in `examples/` with its command, its picture or table, and the time of that",
        "run on a small, shared machine without a GPU. Run them from the root of the repository,",
        "after `scripts/demo.sh` has set up `.venv`; `--help` lists the options. Several are",
        "shorter here than by default, and comparisons over a few seconds vary from run to run:",
        "[Benchmarks](benchmarks.md) has those that are measured with care.",
        "",
        "<!-- Generated by: python scripts/site/gallery.py -->",
    ]
    for title, entries in SECTIONS.items():
        lines += ["", f"## {title}"]
        for entry in entries:
            if entry.name in runs:
                lines += ["", *_entry(entry, runs[entry.name])]
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """A rounded time in words.

    >>> duration(7.3), duration(44), duration(130)
    ('7 seconds', '45 seconds', '2 minutes')
    """
    if seconds >= 90:
        return f"{seconds / 60:.0f} minutes"
    step = 1 if seconds < 10 else 5
    return f"{max(step, step * round(seconds / step))} seconds"


def _entry(entry: Entry, found: dict[str, Any]) -> list[str]:
    needs = f" It needs the extra `{entry.needs}`." if entry.needs else ""
    lines = [f"### {entry.title}", "", f"{entry.text}{needs}", ""]
    lines += ["```bash", f"{found['command']}  # about {duration(found['seconds'])}", "```", ""]
    if entry.described:
        lines += [f"![{entry.described}](images/gallery/{entry.name}.png)", ""]
    return [*lines, "```console", *found["output"], "```"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the examples that are asked for, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(ENTRIES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ENTRIES)}")
    runs = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else {}
    for name in [] if options.page else options.names or list(ENTRIES):
        print(ENTRIES[name].command, flush=True)
        runs[name] = run(ENTRIES[name])
        print(f"  {runs[name]['seconds']} s", flush=True)
        ordered = {known: runs[known] for known in ENTRIES if known in runs}
        RUNS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
