"""Data sets over the ranks of a process group: two real ones, against one process with all data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import LBFGS, AdaHessian, DatasetClosure, NewtonCG, Sophia, StepStatus
from torch_secondorder._objective.base import Regularization
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._residuals import BatchResiduals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


def data() -> TensorDataset:
    torch.manual_seed(4)
    return TensorDataset(torch.randn(22, 4, dtype=torch.float64), torch.randint(3, (22,)))


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def closure_of(
    rank: int, ranks: int, *, uneven: bool = False, reduction: str = "mean", **options: Any
) -> DatasetClosure:
    """Over this rank's part; with one rank over all of it, with other batches."""
    model, samples = network(), data()
    if ranks == 1:
        loader = DataLoader(samples, batch_size=9)
    else:
        model = DistributedDataParallel(model, **options)
        if uneven:  # as many batches for each rank, but not as many samples
            part = Subset(samples, range(10) if rank == 0 else range(10, 22))
            loader = DataLoader(part, batch_size=4)
        else:
            loader = DataLoader(samples, batch_size=4, sampler=DistributedSampler(samples))

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction)

    return DatasetClosure(model, loss_fn, loader, reduction=reduction)


def train(closure: DatasetClosure, optimizer: Any, steps: int = 4) -> list[Any]:
    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return [losses, [p.detach().clone() for p in closure.model.parameters()]]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda p: LBFGS(p, max_iter=3),
    "GGN": lambda p: NewtonCG(p, max_cg_iter=8, weight_decay=1e-2),
    "Hessian": lambda p: NewtonCG(p, curvature="hessian", max_cg_iter=8),
    "empirical Fisher": lambda p: NewtonCG(p, curvature="empirical_fisher", max_cg_iter=8),
    "Nystrom": lambda p: NewtonCG(p, preconditioner="nystrom", max_cg_iter=5),
    "AdaHessian": AdaHessian,
    "Sophia": lambda p: Sophia(p, lr=1e-2, update_period=2),
}
#: Those that draw labels: two ranks draw others than one process does.
DRAWING: dict[str, Callable[[Any], Any]] = {
    "Fisher": lambda p: NewtonCG(p, curvature="fisher", max_cg_iter=8),
    "kfac": lambda p: NewtonCG(p, preconditioner="kfac", max_cg_iter=5),
    "martens": lambda p: NewtonCG(p, preconditioner="martens", max_cg_iter=8),
    "gnb": lambda p: Sophia(p, lr=5e-2, estimator="gnb"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "uneven": {"uneven": True},
    "sum": {"reduction": "sum"},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


def run_optimizer(name: str, rank: int, ranks: int) -> list[Any]:
    closure = closure_of(rank, ranks)
    return train(closure, (OPTIMIZERS | DRAWING)[name](closure.model.parameters()))


def run_setting(name: str, rank: int, ranks: int) -> list[Any]:
    found = []
    for optimizer in ("LBFGS", "GGN", "AdaHessian"):
        closure = closure_of(rank, ranks, **SETTINGS[name])
        if optimizer == "GGN" and name != "sum":  # a mean over other numbers of samples
            closure.keep_graphs = 1
        made = OPTIMIZERS[optimizer](closure.model.parameters())
        if name == "sum" and optimizer == "AdaHessian":
            made.param_groups[0]["lr"] = 0.01
        found += train(closure, made, 3)
    return found


def run_nan(rank: int, ranks: int) -> list[Any]:
    """One batch of the last rank is not finite."""
    found: list[Any] = []
    for make in (LBFGS, NewtonCG, AdaHessian):
        closure = closure_of(rank, ranks)
        before = [p.detach().clone() for p in closure.model.parameters()]
        if rank == ranks - 1:
            closure.loader.dataset.tensors[0][-1] = torch.nan
        optimizer = make(closure.model.parameters())
        optimizer.step(closure)
        after = [p.detach() for p in closure.model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        found.append([list(StepStatus).index(optimizer.info.status), same])
    return found


def count_messages(rank: int, ranks: int) -> list[Any]:
    """All-reductions of vectors as long as the parameters, in an evaluation and a product."""
    counts = []
    closure = closure_of(rank, ranks)
    optimizer = NewtonCG(closure.model.parameters(), max_cg_iter=1)
    original, reduced = dist.all_reduce, []

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        optimizer.step(closure)
    finally:
        dist.all_reduce = original
    size = sum(p.numel() for p in closure.model.parameters())
    counts.append(sum(n == size for n in reduced) - optimizer.info.products)
    return counts


def sum_residuals(rank: int, ranks: int) -> list[Any]:
    """Normal equations of the same residuals, on whichever rank."""
    found: list[Any] = []
    for options in ({}, {"uneven": True}):
        closure = closure_of(rank, ranks, **options)
        decay = Regularization(weight_decay=0.1)
        objective = DatasetObjective.for_step(closure, closure.model.parameters(), decay)
        objective.evaluate(curvature="jacobian")  # finds the ranks
        residuals = BatchResiduals(objective)
        found += [residuals.rows, residuals.normal_matrix(), residuals.rest_diagonal]
        found.append(residuals.finite)
    return found


def checks(rank: int, ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in OPTIMIZERS | DRAWING:
        found[name] = run_optimizer(name, rank, ranks)
    for name in SETTINGS:
        found[name] = run_setting(name, rank, ranks)
    found["nan"] = run_nan(rank, ranks)
    found["residuals"] = sum_residuals(rank, ranks)
    if ranks > 1:
        found["messages"] = count_messages(rank, ranks)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the first rank; the ranks agree bit for bit."""
    ranks = run_on_ranks([checks], tmp_path_factory.mktemp("ranks"))
    return on_both(ranks, "checks")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by one process."""
    return checks(0, 1)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *SETTINGS])
def test_two_ranks_are_one_process_with_all_data(
    found: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=1e-12)
    assert found[name][0][-1] < found[name][0][0]


def test_normal_equations_of_two_ranks_are_those_of_all_data(
    found: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert found["residuals"][0] == 44
    torch.testing.assert_close(found["residuals"], alone["residuals"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DRAWING)
def test_two_ranks_train_with_labels_that_they_draw(found: dict[str, Any], name: str) -> None:
    losses, _ = found[name]
    assert losses[-1] < 0.97 * losses[0]


def test_a_batch_that_is_not_finite_on_one_rank_is_rejected_by_all(found: dict[str, Any]) -> None:
    assert found["nan"] == [[list(StepStatus).index(StepStatus.NONFINITE_START), True]] * 3


def test_one_message_for_each_product(found: dict[str, Any]) -> None:
    assert found["messages"] == [0]
