"""Import paths and names of the last release: they work, with a warning that names the new ones."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_secondorder
from torch_secondorder._foundation.deprecation import MOVED_MODULES

ROOT = Path(__file__).resolve().parents[2]
TOP = "torch_secondorder"

#: Public names of the last release that were importable from modules that are gone: the module,
#: its names, and the place to import them from today.
MOVED = [
    ("capture", "mark_outputs", TOP),
    ("curvature.output_space", "UnknownOutputs", f"{TOP}.curvature"),
    ("dataset.objective", "DatasetClosure", f"{TOP}.dataset"),
    ("dataset.operator", "DatasetClosure", f"{TOP}.dataset"),
    ("diagnostics.definite", "Definiteness definiteness", f"{TOP}.diagnostics"),
    ("diagnostics.eigen", "Eigenpairs eigenpairs", f"{TOP}.diagnostics"),
    ("diagnostics.hutchpp", "TraceEstimate trace", f"{TOP}.diagnostics"),
    ("diagnostics.local", "SecondOrderModel second_order_model", f"{TOP}.diagnostics"),
    ("diagnostics.source", "from_closure from_model", f"{TOP}.diagnostics"),
    ("evaluation", "Evaluation", TOP),
    ("func.batches", "batch_jacobian", f"{TOP}.func"),
    ("func.checks", "DerivativeReport Discrepancy check_derivatives", f"{TOP}.func"),
    ("func.differences", "Discrepancy", f"{TOP}.func"),
    ("func.modules", "module_jacobian", f"{TOP}.func"),
    ("func.products", "ggnvp hessian_diagonal hvp vhp", f"{TOP}.func"),
    ("globalization.named", "Globalization resolve_line_search", f"{TOP}.globalization"),
    ("huggingface", "SecondOrderCallback", f"{TOP}.integrations.huggingface"),
    ("graph", "MissingSecondDerivative", TOP),
    (
        "lightning",
        "CurvatureMonitor JacobianPenaltyCallback SecondOrderMonitor",
        f"{TOP}.integrations.lightning",
    ),
    ("lightning.curvature", "CurvatureMonitor", f"{TOP}.integrations.lightning"),
    ("lightning.monitor", "SecondOrderMonitor", f"{TOP}.integrations.lightning"),
    ("lightning.penalty", "JacobianPenaltyCallback", f"{TOP}.integrations.lightning"),
    ("objective", "FunctionalObjective", TOP),
    ("optim.base", "SecondOrderOptimizer", TOP),
    ("optim.info", "StepInfo StepStatus", TOP),
    ("solvers.kronecker", "KFAC", f"{TOP}.solvers"),
    ("solvers.named", "resolve_preconditioner resolve_solver", f"{TOP}.solvers"),
]

#: Those that are importable from the modules that they were in: nothing has changed.
KEPT = [
    ("curvature.base", "Damped Diagonal FromOutputs LinearOperator"),
    ("curvature.diagonal", "DiagonalEstimator GaussNewtonBartlett Hutchinson exact_diagonal"),
    ("curvature.finite_difference", "FiniteDifference"),
    ("curvature.fisher", "Fisher"),
    ("curvature.gauss_newton", "GaussNewton"),
    ("curvature.hessian", "Hessian"),
    ("curvature.inverse_bfgs", "InverseBFGS"),
    ("curvature.kronecker", "KroneckerFactors"),
    ("dataset.closure", "DatasetClosure"),
    ("diagnostics.information", "ObservedInformation observed_information"),
    ("diagnostics.problem", "Problem"),
    ("diagnostics.spectrum", "SpectralDensity spectral_density"),
    ("func.jacobians", "jacobian"),
    ("func.transforms", "jvp vjp"),
    ("globalization.backtracking", "Armijo FixedStep"),
    ("globalization.damping", "MarquardtDamping"),
    ("globalization.hager_zhang", "HagerZhang"),
    ("globalization.line_search", "LineSearch Phi SearchResult SearchStatus Trial"),
    ("globalization.strong_wolfe", "StrongWolfe"),
    ("globalization.trust_region", "TrustRegion"),
    ("optim.adahessian", "AdaHessian"),
    ("optim.contractive", "Contractive ContractiveInfo"),
    ("optim.lbfgs", "LBFGS"),
    ("optim.newton_cg", "NewtonCG"),
    ("optim.sophia", "Sophia"),
    ("penalties.contractive", "contractive_penalty"),
    ("penalties.jacobian", "jacobian_penalty"),
    ("solvers.base", "Iterate LinearSolver Preconditioner SolveResult SolveStatus"),
    ("solvers.cg", "CG"),
    ("solvers.lanczos", "Tridiagonal lanczos"),
    ("solvers.preconditioners", "Martens Nystrom NystromApproximation"),
]

#: Old names that are now others in the same module.
RENAMED = [
    ("globalization", "LevenbergMarquardt", "MarquardtDamping"),
    ("globalization.damping", "LevenbergMarquardt", "MarquardtDamping"),
    ("solvers", "Minres", "MINRES"),
    ("solvers.minres", "Minres", "MINRES"),
]


#: Names that are no longer public, and the modules that they are importable from.
WITHDRAWN = [
    ("dataset", "BatchSum"),
    ("dataset", "DatasetObjective"),
    ("dataset", "curvature_at"),
    ("dataset.objective", "DatasetObjective"),
    ("dataset.operator", "BatchSum"),
    ("dataset.operator", "curvature_at"),
]


def skip_without(place: str) -> None:
    if place.endswith("huggingface"):
        pytest.importorskip("transformers")
    if place.endswith("lightning"):
        pytest.importorskip("lightning")


@pytest.mark.parametrize(("module", "names", "place"), MOVED, ids=[m for m, _, _ in MOVED])
def test_an_old_module_works_and_says_where_its_names_are(
    module: str, names: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(place)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{TOP}.{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    message = f"{TOP}.{module} has moved and will be gone in the next release: import from {place}"
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(message)}$"):
        old = importlib.import_module(f"{TOP}.{module}")
    new = importlib.import_module(place)
    for name in names.split():
        assert getattr(old, name) is getattr(new, name)
        assert name in new.__all__


@pytest.mark.parametrize(("module", "names"), KEPT, ids=[module for module, _ in KEPT])
def test_a_module_that_has_stayed_has_its_names(module: str, names: str) -> None:
    found = importlib.import_module(f"{TOP}.{module}")
    package = importlib.import_module(f"{TOP}.{module}".rpartition(".")[0])
    for name in names.split():
        assert getattr(found, name) is getattr(package, name)


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_works_and_names_the_new_one(module: str, old: str, new: str) -> None:
    found = importlib.import_module(f"{TOP}.{module}")
    with pytest.warns(DeprecationWarning, match=re.escape(f"use {TOP}.{module}.{new}")) as caught:
        assert getattr(found, old) is getattr(found, new)
    assert caught[0].filename == __file__
    assert old not in found.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = found.Nonsense


@pytest.mark.filterwarnings("ignore:.* has moved:DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), WITHDRAWN)
def test_a_name_that_is_no_longer_public_works_with_a_warning(module: str, name: str) -> None:
    found = importlib.import_module(f"{TOP}.{module}")
    message = f"^{TOP}.dataset.{name} is internal and will be gone in the next release$"
    with pytest.warns(DeprecationWarning, match=message):
        assert getattr(found, name).__name__ == name
    assert name not in found.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = found.Nonsense


def test_the_warning_points_at_the_line_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"{TOP}.capture", raising=False)
    with pytest.warns(DeprecationWarning, match="torch_secondorder.capture has moved") as caught:
        from torch_secondorder.capture import mark_outputs
    assert caught[0].filename == __file__
    assert mark_outputs is torch_secondorder.mark_outputs


@pytest.mark.parametrize("old", ["objective", "optim.base", "func.products", "diagnostics.eigen"])
def test_an_old_module_is_an_attribute_of_its_package(old: str) -> None:
    script = f"import torch_secondorder\nprint(torch_secondorder.{old}.__name__)"
    command = [sys.executable, "-W", "default", "-c", script]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout == f"{TOP}.{old}\n"
    assert f"<string>:2: DeprecationWarning: {TOP}.{old} has moved" in ran.stderr
    assert ran.stderr.count("DeprecationWarning") == 1


@pytest.mark.parametrize("name", ["lightning", "huggingface", "Nonsense"])
def test_integrations_are_no_attributes_before_they_are_imported(name: str) -> None:
    script = f"import torch_secondorder\ntorch_secondorder.{name}"
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"module 'torch_secondorder' has no attribute '{name}'" in ran.stderr


def test_new_paths_do_not_warn() -> None:
    script = "import torch_secondorder, torch_secondorder.dataset, torch_secondorder.optim"
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True)


def test_every_moved_module_is_tested() -> None:
    assert {f"{TOP}.{module}" for module, _, _ in MOVED} == set(MOVED_MODULES)
