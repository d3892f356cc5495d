"""The benchmarks run and write their results; the values are not checked."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.oracles import compiles_gradients
from tests.support.processes import ROOT, run_script


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "scripts" / "bench.py", *arguments, timeout=240.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "result", "shown"),
    [
        (["lbfgs", "--part", "direction"], "lbfgs.direction", "ours"),
        (["lbfgs", "--part", "overhead"], "lbfgs.overhead", "tensor calls"),
        (["capture"], "capture.", "ours"),
        (["captured", "--part", "steps"], "captured.adahessian.", "AdaHessian/10, captured"),
        (["captured", "--part", "direction"], "captured.lbfgs direction.10000", "20 pairs"),
        (["compile"], "compile.Gauss-Newton product", "first call"),
        (["products"], "products.gauss_newton.", "ours"),
        (["newton", "--part", "cg"], "newton.cg.", "overhead"),
        (["newton", "--part", "softmax"], "newton.softmax.ratios", "NewtonCG / LBFGS (ours)"),
        (["newton", "--part", "problems"], "newton.problems.wood.", "NewtonCG / LBFGS (ours)"),
        (["newton", "--part", "autoencoder"], "newton.autoencoder.NewtonCG", "NewtonCG"),
        (["newton", "--part", "pinn"], "newton.pinn.NewtonCG", "NewtonCG"),
        (["newton", "--part", "exact"], "newton.exact.wood", "scipy trust-exact"),
        (["diagonal", "--part", "steps"], "diagonal.steps.", "AdaHessian/10"),
        (["diagonal", "--part", "memory"], "diagonal.memory.", "Sophia-G"),
        (["diagonal", "--part", "estimates"], "diagonal.estimates.", "Hutchinson, signs"),
        (["diagonal", "--part", "scaling"], "diagonal.scaling.", "AdaHessian, 10 probes"),
        (["kronecker", "--only", "ours"], "kronecker.memory.", "no weight decay"),
        (["distributed", "--part", "communication"], "distributed.communication.", "Sophia, gnb"),
        (["distributed", "--part", "memory"], "distributed.memory.", "2m + "),
        (["jacobian"], "jacobian.one", "central differences"),
        (["iteration_costs"], "iteration_costs.LBFGS.300", "NonlinearCG"),
        (["quasi_newton", "--part", "poisson"], "quasi_newton.poisson.", "BFGS, ssbroyden"),
        (["quasi_newton", "--part", "convection"], "quasi_newton.convection.", "BFGS, bfgs"),
        (["quasi_newton", "--part", "limited"], "quasi_newton.limited.", "LBFGS, ssbfgs"),
        (["quasi_newton", "--part", "seconds"], "quasi_newton.seconds.", "BFGS, ssbroyden (ours)"),
        (["quasi_newton", "--part", "bounds"], "bounds.obstacle", "LBFGS (ours)"),
        (["quasi_newton", "--part", "nonlinear_cg"], "quasi_newton.nonlinear_cg.over", "shanno"),
        (["quasi_newton", "--part", "problems"], "quasi_newton.problems", "BFGS, ssbroyden"),
        (["quasi_newton", "--part", "iteration"], "quasi_newton.iteration.", "bfgs / bound"),
        (["residuals", "--part", "jacobian"], "residuals.jacobian.CNN", "vmap(jacrev)"),
        (["residuals", "--part", "kernel"], "residuals.kernel", "cross-entropy"),
        (["residuals", "--part", "problems"], "residuals.problems", "rosenbrock"),
        (["residuals", "--part", "nist"], "residuals.nist", "MGH17, start 2"),
        (["residuals", "--part", "pinn"], "residuals.pinn.ours", "s to 0.001"),
        (["residuals", "--part", "poisson", "--only", "NewtonCG"], "residuals.poisson.", "1e-07"),
        (
            ["residuals", "--part", "burgers", "--only", "Levenberg"],
            "residuals.burgers.",
            "LevenbergMarquardt (ours)",
        ),
        (["residuals", "--part", "convection", "--only", "Adam"], "residuals.convection.", "0.01"),
        (["residuals", "--part", "iteration"], "residuals.iteration.curve", "One iteration"),
        (["linear"], "linear.consistent.", "matrix-free"),
        (["lightning"], "lightning.MLP", "Lightning's own"),
        (["constraints", "--part", "problems", "--only", "LBFGS"], "constraints.problems.", "hs71"),
        (["constraints", "--part", "overhead", "--only", "Adam"], "constraints.overhead.", "unit"),
        (["constraints", "--part", "pca", "--only", "ours"], "constraints.pca.", "k = 3"),
        (["constraints", "--part", "minibatch"], "constraints.minibatch.", "norms"),
        (["constraints", "--part", "large"], "constraints.large.1000", "of the Jacobian"),
        (["minimize", "--part", "exact"], "minimize.exact", "newton-cg"),
        (["minimize", "--part", "2-point"], "minimize.2-point", "ssbroyden"),
        (["minimize", "--part", "call"], "minimize.call", "rosenbrock"),
        (["penalties"], "penalties.64-30", "contractive (code)"),
        (["diagnostics"], "diagnostics.eigenvalues.", "Hutch++"),
    ],
)
def test_a_sub_command_prints_a_table_and_writes_json(
    arguments: list[str], result: str, shown: str, tmp_path: Path
) -> None:
    if arguments == ["compile"] and not compiles_gradients():
        pytest.skip("it compiles a network with derivatives by its input")
    file = tmp_path / "figures.json"
    done = bench(*arguments, "--quick", "--repeat", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert any(key.startswith(result) for key in document["results"])
    assert document["environment"]["torch"]
    assert shown in done.stdout


@pytest.mark.slow
def test_only_contenders_with_a_text_in_their_names_run() -> None:
    done = bench("quasi_newton", "--part", "poisson", "--quick", "--only", "Torch")
    assert done.returncode == 0, done.stderr
    assert "torch.optim.LBFGS" in done.stdout
    assert "ssbroyden" not in done.stdout


def test_a_text_that_is_in_no_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    registry = importlib.import_module("benchmarks.registry")
    options = registry.Options(torch.device("cpu"), 1, only="BFGS")
    assert options.chosen({"LBFGS": 1, "Adam": 2}) == {"LBFGS": 1}
    with pytest.raises(ValueError, match="--only BFGS is in no name of SGD, Adam"):
        options.chosen({"SGD": 1, "Adam": 2})


def test_the_convection_problem_has_the_solution_that_it_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    pinn_module = importlib.import_module("benchmarks.quasi_newton_pinn")
    pinn = pinn_module.convection(torch.device("cpu"))

    class Wave(torch.nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return (points[:, :1] - 30.0 * points[:, 1:]).sin()

    assert pinn.size == 5301
    assert pinn.loss(Wave()) < 1e-20
    assert pinn.error(Wave()) < 1e-12
    samples = pinn_module.by_evaluations(pinn, partial(torch.optim.SGD, lr=1e-4), (5, 12))
    assert [sample.evaluations for sample in samples] == [5, 12]
    assert samples[1].loss < samples[0].loss < pinn.loss(pinn.model).item()

    def descend(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        while True:
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(function(x), x)
            x = x - 1e-4 * gradient

    # The losses here are those of evaluations, which come one step later.
    others = pinn_module.by_function(pinn, descend, (6, 13))
    assert [sample.evaluations for sample in others] == [6, 13]
    for ours, theirs in zip(samples, others, strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-9)
        assert theirs.error == pytest.approx(ours.error, rel=1e-9)


def test_residual_problems_are_the_roots_of_the_test_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("benchmarks.residual_problems")
    functions = {p.name: p.function for p in module.load_problems(torch.device("cpu"))}
    problems = module.classical(torch.device("cpu"))
    assert len(problems) == len(module.FUNCTIONS)
    for problem in problems:
        for x in (problem.start, problem.start + 0.1 * torch.arange(len(problem.start))):
            square = problem.residuals(x).square().sum()
            torch.testing.assert_close(square, functions[problem.name](x), rtol=1e-10, atol=0.0)


def test_digits_of_residual_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("benchmarks.residual_problems")
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    certified = torch.tensor([2.0, 1.0], dtype=torch.float64)
    free = module.ResidualProblem("zero", lambda x: x, start, (0.0,))
    assert free.digits(start) == 0.0
    assert free.digits(1e-3 * start) == pytest.approx(6.0)
    assert free.digits(0.0 * start) == 11.0
    known = module.ResidualProblem("certified", lambda x: x, start, (5.0,), certified)
    assert known.digits(certified * (1.0 + 1e-4)) == pytest.approx(4.0)
    assert known.digits(certified * float("nan")) == 0.0
    assert known.reached(5.0) and not known.reached(5.1) and not known.reached(4.0)


def test_the_ways_to_a_jacobian_are_compared_with_one_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("benchmarks.residual_jacobian")
    exact = torch.ones(2, 3)
    module._agree("equal", exact + 1e-12, exact)
    with pytest.raises(AssertionError, match="other: the Jacobian differs by"):
        module._agree("other", 1.001 * exact, exact)


def test_memory_and_overhead_of_kronecker_factored_optimizers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    steps = importlib.import_module("benchmarks.kronecker_steps")
    memory = importlib.import_module("benchmarks.kronecker_memory")
    harness = importlib.import_module("benchmarks.harness")
    contenders = importlib.import_module("benchmarks.kronecker_contenders")
    model = torch.nn.Linear(5, 3, bias=False)
    batches = [(torch.ones(2, 5), torch.zeros(2, 3))]
    problem = contenders.Problem("linear", model, torch.nn.functional.mse_loss, batches)
    size, step = 4 * 15, 4
    assert memory.kept(problem, torch.optim.AdamW) == 2 * size + step
    assert memory.kept(problem, torch.optim.SGD) == 0
    timings = {
        "AdamW": harness.Timing((1.0, 2.0, 4.0)),
        "other": harness.Timing((1.5, 3.0, 4.5)),
    }
    assert steps.overhead(timings, "other") == 0.25  # the median of 0.5, 1, 0.5 over 2
    assert steps.overhead(timings, "AdamW") == 0


def test_an_unknown_sub_command_is_rejected_with_the_known_ones() -> None:
    done = bench("newtn")
    assert done.returncode == 2
    assert "lbfgs" in done.stderr
