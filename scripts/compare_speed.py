"""Compares how fast two checkouts are.

Each round starts a process of the old and one of the new checkout. They warm a case up, then take
turns at it, sample by sample, so that a slow moment of the machine hits both. For each sample
everything is made anew: both checkouts do the same work. What is measured is CPU time, which leaves
out what other processes get; they still share caches and cores, so little else should run. Garbage
is collected between samples, not in them. A time is per call: of a step, a product, a derivative.

The table has the medians of all samples, the ratio of these, and in brackets the ratio of the
fastest samples and the median ratio of two samples next to each other. A case whose ratio of
medians is above 1.03 is called slower, with a question mark where one of the other two does not say
so. Exit code 1 if something is slower without a question mark.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _checkouts import PACKAGE, Problem, check_source, checkout, environment, mlp, supervised
from torch import Tensor, nn
from torch.nn import functional as F

#: Above it a ratio says slower.
BAR = 1.03
_IMPORT = "import, after torch"

Pairs = list[tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Attributes:
        name: The name in the table.
        prepare: Makes everything anew, not timed, and returns what is called.
        calls: How many calls make a sample.
        samples: How many samples each process of a pair takes.
        warm: How many calls come first in each sample, not timed.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    calls: int
    samples: int = 5
    warm: int = 3

    def sample(self) -> float:
        """Seconds of CPU time per call."""
        call = self.prepare()
        for _ in range(self.warm):
            call()
        gc.collect()
        gc.disable()
        start = time.process_time()
        for _ in range(self.calls):
            call()
        seconds = time.process_time() - start
        gc.enable()
        return seconds / self.calls


def chained(n: int) -> Problem:
    """A chained Rosenbrock function; evaluations cost little."""
    x = torch.full((n,), -1.0)
    x[::2] = 0.5
    x.requires_grad_()

    def loss() -> Tensor:
        first, second = x[:-1], x[1:]
        return 100 * (second - first**2).square().sum() / n + (1 - first).square().sum() / n

    return Problem([x], loss)


def network(widths: Sequence[int] = (64, 128, 64, 10), batch: int = 128) -> Problem:
    """A classifier of random data."""
    model = mlp(widths)
    inputs, targets = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return supervised(model, inputs, targets, F.cross_entropy)


def pure(problem: Problem) -> tuple[Callable[[Any], Tensor], dict[str, Tensor]]:
    """The loss as a function of its parameters, and these."""
    model, inputs, targets = problem.network, problem.inputs, problem.targets
    assert targets is not None

    def loss(params: Any) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (inputs,)), targets)

    return loss, {name: p.detach() for name, p in model.named_parameters()}


def stepping(
    problem: Callable[[], Problem], make: Callable[[list[Tensor]], Any]
) -> Callable[[], object]:
    """A step of an optimizer with the standard closure."""
    given = problem()
    optimizer = make(given.params)
    return partial(optimizer.step, given.closure(optimizer))


def looping(
    problem: Callable[[], Problem], make: Callable[[list[Tensor]], Any]
) -> Callable[[], object]:
    """A step of an optimizer in a loop without a closure."""
    given = problem()
    optimizer = make(given.params)

    def step() -> None:
        optimizer.zero_grad()
        given.loss().backward()
        optimizer.step()

    return step


def optimizer_cases() -> list[Case]:
    """Steps of optimizers."""
    import torch_secondorder as so

    def lbfgs(params: list[Tensor]) -> Any:
        return so.LBFGS(params, max_iter=1, history_size=10)

    def newton(params: list[Tensor]) -> Any:
        return so.NewtonCG(params, curvature="ggn", preconditioner=None, max_cg_iter=5)

    def kfac(params: list[Tensor]) -> Any:
        return so.NewtonCG(params, preconditioner="kfac", max_cg_iter=5)

    small = partial(network, (4, 8, 3), 32)
    ada, sophia = partial(so.AdaHessian, lr=0.01), partial(so.Sophia, lr=1e-4)
    gnb = partial(sophia, estimator="gnb")
    every_ten = partial(ada, update_period=10)
    return [
        Case("LBFGS iteration, n = 1,000", partial(stepping, partial(chained, 1000), lbfgs), 100),
        Case(
            "LBFGS iteration, n = 500,000",
            partial(stepping, partial(chained, 500_000), lbfgs),
            10,
            samples=3,
            warm=12,
        ),
        Case("NewtonCG step, MLP", partial(stepping, network, newton), 10),
        Case("NewtonCG step, tiny MLP", partial(stepping, small, newton), 15),
        Case("NewtonCG step with K-FAC, MLP", partial(stepping, network, kfac), 10),
        Case("AdaHessian step, every step, MLP", partial(stepping, network, ada), 40, warm=10),
        Case("AdaHessian step, tiny MLP", partial(stepping, small, ada), 60, warm=10),
        Case("AdaHessian step, every ten, MLP", partial(stepping, network, every_ten), 60, warm=10),
        Case("AdaHessian loop, every ten, MLP", partial(looping, network, every_ten), 60, warm=10),
        Case("Sophia-H step, MLP", partial(stepping, network, sophia), 60, warm=10),
        Case("Sophia-G step, MLP", partial(stepping, network, gnb), 60, warm=10),
    ]


def _operator(kind: str, problem: Problem) -> tuple[Any, Tensor]:
    """A linear operator at the start of a problem, and a vector."""
    import torch_secondorder as so

    evaluation = so.FunctionalObjective(*pure(problem)).evaluate(curvature=True)
    operator = getattr(so.curvature, kind)(evaluation)
    return operator, torch.randn(len(evaluation.grad))


def function_cases() -> list[Case]:
    """Products, derivatives, penalties and diagnostics."""
    import torch_secondorder as so

    def product(kind: str) -> Callable[[], object]:
        operator, v = _operator(kind, network())
        return partial(operator.matvec, v)

    def hvp() -> Callable[[], object]:
        loss, params = pure(network())
        v = {name: torch.randn_like(p) for name, p in params.items()}
        return partial(so.func.hvp, loss, params, v)

    def one_input() -> Callable[[], object]:
        problem = network()
        assert problem.inputs is not None
        return partial(so.func.jacobian, problem.network, problem.inputs[0])

    def batch() -> Callable[[], object]:
        problem = network()
        assert problem.inputs is not None
        return partial(so.func.batch_jacobian, problem.network, problem.inputs)

    def penalty() -> Callable[[], object]:
        torch.manual_seed(0)
        encoder, x = nn.Sequential(nn.Linear(64, 32), nn.Sigmoid()), torch.rand(128, 64)

        def call() -> None:
            so.penalties.contractive_penalty(encoder, x).backward()

        return call

    def eigenpairs() -> Callable[[], object]:
        operator, _ = _operator("Hessian", network((16, 24, 10)))
        options: dict[str, Any] = {"max_products": 40, "progress": False}
        return partial(so.diagnostics.eigenpairs, operator, 3, **options)

    return [
        Case("Hessian product, MLP", partial(product, "Hessian"), 40),
        Case("GaussNewton product, MLP", partial(product, "GaussNewton"), 40),
        Case("func.hvp, MLP", hvp, 20),
        Case("func.jacobian, one input", one_input, 30),
        Case("func.batch_jacobian, 128 inputs", batch, 15),
        Case("contractive_penalty and gradient", penalty, 60),
        Case("diagnostics.eigenpairs", eigenpairs, 2, warm=1),
    ]


def serve(root: Path) -> None:
    """Measures what it is asked for, until nothing more is asked.

    Says first how long the import took and which cases there are; then, for each line of the
    standard input, which is a case's number, how long one sample took.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    __import__(PACKAGE)
    importing = time.process_time() - start
    check_source(root)
    gc.collect()
    gc.freeze()  # torch's own objects, which take longest to look through
    cases = [*optimizer_cases(), *function_cases()]
    print(json.dumps([importing, [(case.name, case.samples) for case in cases]]), flush=True)
    for line in sys.stdin:
        print(json.dumps(cases[int(line)].sample()), flush=True)


class Server:
    """A process that measures one checkout.

    Args:
        root: The checkout.
        cache: A folder for compiled files.
    """

    def __init__(self, root: Path, cache: str) -> None:
        self._root = root
        # Compiled files are kept apart from the checkouts, so that both begin alike.
        variables = {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(root), str(root)],
            env={**environment(root), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.importing, self.cases = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"compare_speed: failed in {self._root}")
        return json.loads(line)

    def sample(self, number: int) -> float:
        """One sample of a case."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        seconds: float = self._answer()
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def one_round(roots: Sequence[Path], cache: str, only: str | None) -> dict[str, Pairs]:
    """Samples of all cases by turns, as pairs in the order of the roots."""
    found: dict[str, Pairs] = {}
    with ExitStack() as stack:
        servers = []
        for root in roots:
            servers.append(Server(root, cache))
            stack.callback(servers[-1].close)
        if _wanted(_IMPORT, only):
            found[_IMPORT] = [tuple(server.importing for server in servers)]
        for number, (name, samples) in enumerate(servers[0].cases):
            if not _wanted(name, only):
                continue
            pairs = found[name] = []
            for turn in range(samples + 1):
                order = (0, 1) if turn % 2 else (1, 0)
                seconds = {place: servers[place].sample(number) for place in order}
                if turn:  # the first one warms up
                    pairs.append((seconds[0], seconds[1]))
    return found


def _wanted(name: str, only: str | None) -> bool:
    return only is None or only.lower() in name.lower()


def _shown(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms"


def table(rounds: Sequence[dict[str, Pairs]]) -> int:
    """Prints the table; the exit code."""
    names = list(rounds[0])
    width = max(map(len, names), default=0)
    print(f"{'CPU time':<{width}}  {'old':>10}  {'new':>10}  ratio [of minima, within pairs]")
    slower = 0
    for name in names:
        pairs = [pair for found in rounds for pair in found[name]]
        old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        medians = statistics.median(old), statistics.median(new)
        ratio, of_minima = medians[1] / medians[0], min(new) / min(old)
        within = statistics.median(b / a for a, b in pairs)
        flag = ""
        if ratio > BAR:
            sure = min(of_minima, within) > BAR
            flag = "slower" if sure else "slower?"
            slower += sure
        row = f"{name:<{width}}  {_shown(medians[0]):>10}  {_shown(medians[1]):>10}"
        print(f"{row}  {ratio:.3f} [{of_minima:.3f} {within:.3f}]  {flag}".rstrip())
    return 1 if slower else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=checkout, metavar="OLD", help="the root of a checkout")
    parser.add_argument("new", type=checkout, metavar="NEW", help="the root of another one")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="pairs of processes (default: 5)"
    )
    parser.add_argument("--only", metavar="NAME", help="only cases with this text in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {given.rounds}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs pairs of processes."""
    given = parse(arguments)
    if given.child:
        serve(given.old)
        return 0
    roots = (given.old, given.new)
    with tempfile.TemporaryDirectory() as cache:
        for root in roots:
            Server(root, cache).close()  # writes the compiled files
        rounds = [
            one_round(roots if turn % 2 else roots[::-1], cache, given.only)
            for turn in range(given.rounds)
        ]
    for turn in range(0, given.rounds, 2):
        rounds[turn] = {
            name: [(old, new) for new, old in pairs] for name, pairs in rounds[turn].items()
        }
    if not rounds[0]:
        raise SystemExit(f"compare_speed: no case has {given.only!r} in its name")
    if given.json:
        given.json.write_text(json.dumps(rounds))
    return table(rounds)


if __name__ == "__main__":
    sys.exit(main())
