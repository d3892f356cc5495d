"""Counts the calls between functions of the package in one warm step.

A call is one entry into code of the package: of a function, a lambda, a comprehension, or a
generator (each time that it goes on). Python 3.12 and later run comprehensions within their
function, so figures of different Python versions do not compare; the column "functions" leaves out
comprehensions, generator expressions and lambdas, and generators that go on.

The caller is the nearest frame below that is in the package: calls by way of torch (`backward`,
hooks, function modes, `torch.optim`'s own wrapper) count as calls of who called torch. A jump is a
call whose caller is in another file. Files are those in which at least one call arrives. The first
call of a step, which has no caller in the package, is a call and no jump. A generator that is
dropped before its end is not entered again.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _checkouts import check_source, checkout, mlp, package_root, run_child, supervised
from torch import Tensor

#: What each figure may be at most, as (calls, jumps).
BARS = {"LBFGS": (130, 40), "NewtonCG": (350, 90), "AdaHessian": (110, 35)}
_WARM = 4


@dataclass(frozen=True)
class Call:
    """One entry into code of the package.

    Attributes:
        file: Where the function is, relative to the package.
        name: The function.
        line: The line where it is defined.
        caller_file: The file of the nearest caller in the package, or None.
        caller: The name of that caller, or None.
        via: Whether code outside of the package lies between.
        resumed: Whether it is a generator that goes on.
        depth: How many frames of the package are below.
    """

    file: str
    name: str
    line: int
    caller_file: str | None
    caller: str | None
    via: bool
    resumed: bool
    depth: int

    @property
    def jump(self) -> bool:
        """True if the caller is in another file."""
        return self.caller_file is not None and self.caller_file != self.file

    @property
    def function(self) -> bool:
        """True if a function with a name begins."""
        return not self.resumed and not self.name.rpartition(".")[2].startswith("<")


def _name(code: types.CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")


def record(run: Callable[[], object]) -> list[Call]:
    """The calls of the package's functions while something runs."""
    root = str(package_root()) + "/"
    calls: list[Call] = []
    # The frames are kept: closing a generator that is dropped would look like another call.
    started: dict[int, types.FrameType] = {}

    def profile(frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(root):
            return
        depth, via, caller = 0, False, None
        below = frame.f_back
        while below is not None:
            if below.f_code.co_filename.startswith(root):
                caller = caller or below.f_code
                depth += 1
            elif caller is None:
                via = True
            below = below.f_back
        generator = code.co_flags & inspect.CO_GENERATOR != 0
        resumed = generator and id(frame) in started
        if generator:
            started[id(frame)] = frame
        calls.append(
            Call(
                code.co_filename[len(root) :],
                _name(code),
                code.co_firstlineno,
                None if caller is None else caller.co_filename[len(root) :],
                None if caller is None else _name(caller),
                via and caller is not None,
                resumed,
                depth,
            )
        )

    gc.collect()
    gc.disable()  # finalizers would be called anywhere
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def optimizers() -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """The optimizers of the table, each with a step that is one iteration."""
    import torch_secondorder as so

    return {
        "LBFGS": lambda params: so.LBFGS(params, max_iter=1),
        "NewtonCG": lambda params: so.NewtonCG(
            params, curvature="ggn", preconditioner=None, max_cg_iter=2
        ),
        "AdaHessian": lambda params: so.AdaHessian(params),
    }


def warm_step(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> list[Call]:
    """The calls of one step of a small classifier, after some steps that are not counted."""
    model = mlp([4, 8, 3])
    problem = supervised(
        model, torch.randn(64, 4), torch.randint(3, (64,)), torch.nn.functional.cross_entropy
    )
    optimizer = make(problem.params)
    closure = problem.closure(optimizer)
    for _ in range(_WARM - 1):
        optimizer.step(closure)
    return record(lambda: optimizer.step(closure))


def _table(found: dict[str, list[Call]]) -> None:
    print(f"{'one warm step':<14}{'calls':>7}{'bar':>6}{'files':>8}{'jumps':>8}{'bar':>6}", end="")
    print(f"{'functions':>12}")
    for name, calls in found.items():
        most_calls, most_jumps = BARS[name]
        jumps, files = sum(c.jump for c in calls), len({c.file for c in calls})
        print(
            f"{name:<14}{len(calls):>7}{most_calls:>6}{files:>8}{jumps:>8}{most_jumps:>6}"
            f"{sum(c.function for c in calls):>12}"
        )


def _most_called(calls: list[Call], count: int) -> None:
    functions = Counter((c.file, c.name) for c in calls)
    jumps = Counter((c.file, c.name) for c in calls if c.jump)
    print("  calls  jumps in  function")
    for (file, name), number in functions.most_common(count):
        print(f"  {number:>5}{jumps[file, name]:>10}  {file}: {name}")
    files = Counter(c.file for c in calls)
    into = Counter(c.file for c in calls if c.jump)
    out = Counter(c.caller_file for c in calls if c.jump)
    print("  calls  jumps in  out  file")
    for file, number in files.most_common():
        print(f"  {number:>5}{into[file]:>10}{out[file]:>5}  {file}")


def _tree(calls: list[Call]) -> None:
    for call in calls:
        marks = ("-> " if call.jump else "   ") + ("(by way of torch) " if call.via else "")
        again = " (goes on)" if call.resumed else ""
        print(f"{'. ' * call.depth}{marks}{call.name}  {call.file}:{call.line}{again}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "--checkout",
        type=checkout,
        default=here,
        metavar="PATH",
        help="the checkout that is measured (default: the one of this script)",
    )
    parser.add_argument("--only", choices=BARS, help="one optimizer (default: all three)")
    parser.add_argument(
        "--calls",
        type=int,
        nargs="?",
        const=40,
        metavar="N",
        help="also list the N most called functions (default: 40), and all files",
    )
    parser.add_argument(
        "--tree", action="store_true", help="also print the tree of calls; jumps have an arrow"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where a figure is above its bar"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a checkout in a process of its own."""
    given = parse(arguments)
    if not given.child:
        passed = ["--child", "--checkout", str(given.checkout)]
        passed += ["--only", given.only] if given.only else []
        passed += ["--calls", str(given.calls)] if given.calls else []
        passed += ["--tree"] if given.tree else []
        output = run_child(__file__, given.checkout, passed)
        print(output, end="")
        above = [line for line in output.splitlines() if line.startswith("above the bar")]
        return 1 if given.strict and above else 0
    check_source(given.checkout)
    torch.set_num_threads(1)
    found = {
        name: warm_step(make) for name, make in optimizers().items() if given.only in (None, name)
    }
    _table(found)
    for name, calls in found.items():
        if given.calls:
            print(f"\n{name}")
            _most_called(calls, given.calls)
        if given.tree:
            print(f"\n{name}")
            _tree(calls)
    above = [
        name
        for name, calls in found.items()
        if len(calls) > BARS[name][0] or sum(c.jump for c in calls) > BARS[name][1]
    ]
    if above:
        print(f"above the bar: {', '.join(above)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
