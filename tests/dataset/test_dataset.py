"""Losses over whole data sets, batch by batch, against the same data as one batch."""

from __future__ import annotations

import gc
import io
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torch_secondorder
from torch_secondorder import (
    LBFGS,
    AdaHessian,
    Contractive,
    DatasetClosure,
    NewtonCG,
    Sophia,
    StepStatus,
)
from torch_secondorder._objective.base import Evaluation, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import (
    Damped,
    Fisher,
    GaussNewton,
    Hessian,
    LinearOperator,
    exact_diagonal,
)
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._operator import BatchSum, curvature_at
from torch_secondorder.diagnostics import from_closure, from_model, second_order_model, trace
from torch_secondorder.solvers import Nystrom

Batch = tuple[Tensor, Tensor]


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def data(n: int = 23) -> Batch:
    """So many samples that a last batch of 5 is smaller than the others."""
    torch.manual_seed(4)
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def loader(batch_size: int = 5, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=batch_size, **options)


def whole(model: nn.Module, reduction: str = "mean") -> Callable[[], Tensor]:
    """The standard closure on all data."""
    x, y = data()

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction=reduction)
        loss.backward()
        return loss

    return closure


def micro(
    model: nn.Module, batches: list[Batch], loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """The same by hand: a closure with one `backward()` for each batch."""
    count = sum(len(x) for x, _ in batches)

    def closure() -> Tensor:
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in batches:
            loss = loss_fn(model(x), y) * (len(x) / count)
            loss.backward()
            total += loss.detach()
        return total

    return closure


def close(ours: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# Loss and gradient.


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Batch]:
        yield from zip(*data(), strict=True)


class Named(Dataset[Any]):
    """Samples as dicts, and inputs of two arguments."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> Any:
        x, y = data()
        if self.kind == "dict":
            return {"x": x[i], "y": y[i]}
        return ({"x": x[i], "scale": 1.0} if self.kind == "inputs" else (x[i], 1.0)), y[i]


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.inner(x * scale.unsqueeze(1))


def pieces() -> list[Batch]:
    return [*zip(*(t.split(5) for t in data()), strict=True)]


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": loader,
    "shuffled": lambda: loader(shuffle=True),
    "one": lambda: loader(100),
    "list": pieces,
    "iterable": lambda: DataLoader(Stream(), batch_size=5),
    "one by one": lambda: DataLoader(TensorDataset(*data()), batch_size=1),
    "no batching": lambda: DataLoader(pieces(), batch_size=None),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOADERS)
def test_loss_and_gradient_equal_those_of_one_batch(name: str, reduction: str) -> None:
    model = network()

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction)

    closure = DatasetClosure(model, loss_fn, LOADERS[name](), reduction=reduction)
    for _ in range(2):  # nothing accumulates
        loss = closure()
        ours = [p.grad.clone() for p in model.parameters()]
    close(loss, whole(model, reduction)().detach())
    close(ours, [p.grad for p in model.parameters()])
    assert not loss.requires_grad


@pytest.mark.parametrize("kind", ["dict", "inputs", "tuple"])
def test_batches_of_other_structures(kind: str) -> None:
    model = network()

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return module(batch["x"]), batch["y"]

    batches = DataLoader(Named(kind), batch_size=5)
    if kind == "dict":
        closure = DatasetClosure(model, F.cross_entropy, batches, forward=forward)
    else:
        closure = DatasetClosure(Scaled(model), F.cross_entropy, batches)
    close(closure(), whole(model)().detach())


class Encoding(UserDict[str, Tensor]):
    """A batch of a class of its own, such as those of tokenizers."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({name: t.to(device) for name, t in self.items()})


def test_batches_of_a_special_class(device: torch.device) -> None:
    model = network().to(device)
    batches = [Encoding(x=x, y=y) for x, y in pieces()]
    closure = DatasetClosure(
        model, F.cross_entropy, batches, forward=lambda module, b: (module(b["x"]), b["y"])
    )
    close(closure().cpu(), whole(network())().detach())


def test_a_forward_that_returns_the_loss() -> None:
    model = network()
    closure = DatasetClosure(
        model,
        lambda loss: loss,
        loader(),
        forward=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
    )
    close(closure(), whole(model)().detach())


def test_a_mean_over_tokens_instead_of_samples() -> None:
    model, (x, y) = network(), data()
    y = torch.where(torch.arange(len(y)) % 3 == 0, -100, y)
    y[5:10] = -100  # a batch with nothing in it
    batches = DataLoader(TensorDataset(x, y), batch_size=5)
    closure = DatasetClosure(
        model, F.cross_entropy, batches, count=lambda batch: (batch[1] != -100).sum()
    )
    loss = closure()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = F.cross_entropy(model(x), y)
    expected.backward()
    close(loss, expected.detach())
    close(ours, [p.grad for p in model.parameters()])


def test_batches_go_to_the_device_of_the_model(device: torch.device) -> None:
    model = network().to(device)
    loss = DatasetClosure(model, F.cross_entropy, loader())()
    assert loss.device.type == device.type
    close(loss.cpu(), whole(network())().detach())


# Products.

KINDS: dict[str, Callable[[Evaluation, Any], LinearOperator]] = {
    "hessian": lambda e, _: Hessian(e),
    "ggn": lambda e, _: GaussNewton(e),
    "empirical_fisher": lambda e, _: Fisher(e, labels="empirical"),
    "damped": lambda e, _: Damped(GaussNewton(e), 0.1),
}
REGULARIZATIONS = [
    Regularization(),
    Regularization(weight_decay=0.3),
    Regularization(maximize=True, weight_decay=(0.1, 0.2, 0.3, 0.4)),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("keep", [0, 2, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_those_of_one_batch(kind: str, keep: int, reduction: str) -> None:
    if kind == "damped" and reduction == "sum":
        pytest.skip("what an operator adds by itself counts once for each batch")
    model = network()

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction)

    closure = DatasetClosure(model, loss_fn, loader(), reduction=reduction, keep_graphs=keep)
    for regularization in REGULARIZATIONS:
        if kind == "damped" and regularization.maximize:
            continue
        vector = ParameterVector(model.parameters(), [1.0, 0.5, 2.0, 1.0])
        ours = DatasetObjective.for_step(closure, vector, regularization)
        expected = ClosureObjective.for_step(whole(model, reduction), vector, regularization)
        with ours, expected:
            e1, e2 = ours.evaluate(curvature=True), expected.evaluate(curvature=True)
            assert e1.linearization is None
            close([e1.loss, e1.grad], [e2.loss, e2.grad])
            a, b = curvature_at(ours, e1, KINDS[kind]), KINDS[kind](e2, None)
            eye = torch.eye(vector.size, dtype=torch.float64)
            for _ in range(2):
                close(a @ eye[:, :9], b @ eye[:, :9])
                close(a @ eye[2], b @ eye[2])
            ours.accept(eye[0])
            with pytest.raises(RuntimeError, match="the parameters have moved"):
                a @ eye[0]


def rich() -> nn.Sequential:
    """Modules that draw random numbers or change buffers when they are called."""
    torch.manual_seed(5)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8))
    for buffer in first.parametrizations.buffers():
        buffer.normal_()  # far from its limit
    return nn.Sequential(
        first, nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    ).double()


@pytest.mark.parametrize("keep", [0, 2, 100])
def test_all_passes_see_the_same_masks_and_buffers(keep: int) -> None:
    results = []
    for by_hand in (False, True):
        model = rich()
        torch.manual_seed(6)
        if by_hand:
            objective = ClosureObjective(
                micro(model, pieces(), F.cross_entropy), model.parameters()
            )
        else:
            closure = DatasetClosure(model, F.cross_entropy, pieces(), keep_graphs=keep)
            objective = DatasetObjective(closure, model.parameters())
        with objective:
            evaluation = objective.evaluate(curvature=True)
            v = torch.linspace(-1, 1, objective.vector.size, dtype=torch.float64)
            operator = curvature_at(objective, evaluation, lambda e, _: Hessian(e))
            found = [evaluation.loss, evaluation.grad, operator @ v, objective.trial(v * 0.1).loss]
            found += [operator @ v, operator @ torch.stack([v, v.flip(0)], 1)]
        results.append([*found, *model.state_dict().values(), torch.rand(3)])
    close(results[0][:6], results[1][:6], 1e-11)
    close(results[0][6:-1], results[1][6:-1], 1e-11)
    counts = [b for name, b in rich().named_buffers() if "tracked" in name]
    assert [int(b) for b in counts] == [0]
    tracked = [v for v in results[0] if v.dtype == torch.int64]
    assert [int(v) for v in tracked] == [len(pieces())]  # once a step


def test_sampled_labels_are_drawn_once() -> None:
    model = network()
    seen = []
    for keep in (0, 2, 100):
        closure = DatasetClosure(model, F.cross_entropy, loader(), keep_graphs=keep)
        objective = DatasetObjective(closure, model.parameters())
        generator = torch.Generator().manual_seed(1)
        with objective:
            evaluation = objective.evaluate(curvature=True)
            operator = BatchSum(objective, lambda e, g: Fisher(e, generator=g), generator)
            eye = torch.eye(objective.vector.size, dtype=torch.float64)
            matrix = operator @ eye
            operator.diagonal(2, generator)  # draws from elsewhere
            close(operator @ eye[1], matrix[1])
            close(matrix, matrix.T)
            seen.append(matrix)
            # The next one has labels of its own.
            other = BatchSum(objective, lambda e, g: Fisher(e, generator=g), generator)
            assert not torch.allclose(other @ eye, matrix)
        del evaluation
    close(seen[0], seen[1])
    close(seen[0], seen[2])


def test_random_numbers_of_a_custom_curvature_do_not_affect_the_model() -> None:
    model = rich()
    closure = DatasetClosure(model, F.cross_entropy, pieces())
    products = []
    for draws in (False, True):

        def kind(e: Evaluation, _: Any, draws: bool = draws) -> LinearOperator:
            if draws:
                torch.rand(3)
            return Hessian(e)

        torch.manual_seed(6)
        objective = DatasetObjective(closure, model.parameters())
        with objective:
            objective.abandon()
            evaluation = objective.evaluate(curvature=True)
            products.append(curvature_at(objective, evaluation, kind) @ evaluation.grad)
    close(products[0], products[1], 0.0)


def test_products_under_autocast_equal_those_of_the_closure() -> None:
    found = []
    seen = set()

    def kind(evaluation: Evaluation, _: Any) -> LinearOperator:
        seen.add(torch.is_autocast_enabled("cpu"))
        return GaussNewton(evaluation)

    for by_hand in (False, True):
        model = network().float()
        batches = [(x.float(), y) for x, y in pieces()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if by_hand:
                objective = ClosureObjective(
                    micro(model, batches, F.cross_entropy), model.parameters()
                )
            else:
                closure = DatasetClosure(model, F.cross_entropy, batches)
                objective = DatasetObjective(closure, model.parameters())
            with torch.autocast("cpu", enabled=False), objective:
                evaluation = objective.evaluate(curvature=True)
                operator = curvature_at(objective, evaluation, kind)
                found.append([evaluation.grad, operator @ evaluation.grad])
    close(found[0], found[1], 1e-2)
    assert seen == {False}  # it is for the model alone


def test_an_accepted_trial_is_not_evaluated_again() -> None:
    counts, values = [], []
    for ours in (True, False):
        model = network()
        optimizer = NewtonCG(model.parameters(), max_iter=3, max_cg_iter=5)
        optimizer.step(DatasetClosure(model, F.cross_entropy, loader()) if ours else whole(model))
        counts.append(optimizer.info.evaluations)
        values.append([p.detach() for p in model.parameters()])
    close(values[0], values[1], 1e-10)
    assert counts[0] == counts[1]  # nor with a graph, which is kept


# Preconditioners.


def regression(
    batch_size: int, reduction: str = "mean"
) -> tuple[nn.Module, DatasetClosure, Callable[[], Tensor]]:
    """One output, so that random signs cancel in the second moments of samples."""
    model, (x, y) = network(1), data()
    target = y.double().unsqueeze(1)
    batches = DataLoader(TensorDataset(x, target), batch_size=batch_size)

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y, reduction=reduction)

    ours = DatasetClosure(model, loss_fn, batches, reduction=reduction)
    return model, ours, lambda: loss_fn(model(x), target)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kronecker_factors_equal_those_of_one_batch(reduction: str) -> None:
    model, ours, closure = regression(5, reduction)
    objective = DatasetObjective(ours, model.parameters())
    expected = GaussNewton(ClosureObjective(closure, model.parameters()).evaluate(curvature=True))
    with objective:
        evaluation = objective.evaluate(curvature=True)
        operator = curvature_at(objective, evaluation, lambda e, _: GaussNewton(e))
        assert isinstance(operator, BatchSum)
        found = operator.factors()
        for a, b in zip(found, expected.factors(), strict=True):
            assert (a.weight, a.bias) == (b.weight, b.bias)
            close([a.inputs, a.outputs], [b.inputs, b.outputs])
        assert operator.slots() == expected.slots()


def test_diagonal_from_batches_of_one_sample_is_exact() -> None:
    model, ours, closure = regression(1)
    regularization = Regularization(weight_decay=(0.1, 0.2, 0.3, 0.4))
    vector = ParameterVector(model.parameters(), [1.0, 0.5, 2.0, 1.0])
    objective = DatasetObjective.for_step(ours, vector, regularization)
    expected = ClosureObjective.for_step(closure, vector, regularization).evaluate(curvature=True)
    with objective:
        evaluation = objective.evaluate(curvature=True)
        operator = BatchSum(objective, lambda e, _: GaussNewton(e))
        close(operator.diagonal(), exact_diagonal(GaussNewton(expected)))
        del evaluation


@pytest.mark.parametrize("name", ["kfac", "martens"])
def test_preconditioners_from_outputs_reject_a_hessian(name: str) -> None:
    model = network()
    optimizer = NewtonCG(model.parameters(), curvature="hessian", preconditioner=name)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"Hessian is not made from model outputs.*'nystrom'"):
        optimizer.step(DatasetClosure(model, F.cross_entropy, loader()))
    close([p.detach() for p in model.parameters()], before, 0.0)


# Training.

TRAININGS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LBFGS": lambda p: LBFGS(p, max_iter=3),
    "LBFGS Hager-Zhang": lambda p: LBFGS(p, max_iter=3, line_search_fn="hager_zhang"),
    "GGN": lambda p: NewtonCG(p, max_cg_iter=10, weight_decay=1e-2),
    "Hessian": lambda p: NewtonCG(p, curvature="hessian", max_cg_iter=10),
    "empirical Fisher": lambda p: NewtonCG(p, curvature="empirical_fisher", max_cg_iter=10),
    "own": lambda p: NewtonCG(p, curvature=GaussNewton, max_cg_iter=10, max_iter=2),
    "Nystrom": lambda p: NewtonCG(p, preconditioner="nystrom", max_cg_iter=5),
    "minres": lambda p: NewtonCG(p, solver="minres", max_cg_iter=10),
    "differences": lambda p: NewtonCG(p, curvature_products="finite_difference", max_cg_iter=3),
    "AdaHessian": lambda p: AdaHessian(p, n_samples=2),
    "Sophia": lambda p: Sophia(p, lr=1e-2, update_period=2),
    "torch": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_equals_that_on_one_batch(name: str) -> None:
    values, losses = [], []
    for ours in (True, False):
        model = network()
        optimizer = TRAININGS[name](model.parameters())
        closure = DatasetClosure(model, F.cross_entropy, loader()) if ours else whole(model)
        losses.append([float(optimizer.step(closure).detach()) for _ in range(4)])
        values.append([p.detach().clone() for p in model.parameters()])
    # Rounding is amplified by differences of gradients.
    close(values[0], values[1], 1e-5 if name == "differences" else 1e-9)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: NewtonCG(p, curvature="fisher", max_cg_iter=10),
        lambda p: NewtonCG(p, preconditioner="kfac", max_cg_iter=5),
        lambda p: NewtonCG(p, preconditioner="martens", max_cg_iter=10),
        lambda p: Sophia(p, lr=5e-2, estimator="gnb"),
    ],
    ids=["fisher", "kfac", "martens", "gnb"],
)
def test_training_with_estimates_from_labels(make: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    closure = DatasetClosure(model, F.cross_entropy, loader(shuffle=True))
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < 0.95 * losses[0]


def test_either_closure_may_be_over_a_data_set() -> None:
    values = []
    for which in ("neither", "products", "gradient", "both"):
        model = network()
        optimizer = NewtonCG(model.parameters(), max_cg_iter=5, weight_decay=1e-2)
        ours = DatasetClosure(model, F.cross_entropy, loader())
        plain = whole(model)
        for _ in range(2):
            optimizer.step(
                ours if which in ("gradient", "both") else plain,
                ours if which in ("products", "both") else plain,
            )
        values.append([p.detach().clone() for p in model.parameters()])
    for other in values[1:]:
        close(other, values[0], 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["LBFGS", "GGN", "AdaHessian"])
def test_the_contractive_penalty_equals_that_on_one_batch(name: str, reduction: str) -> None:
    values, losses = [], []
    for ours in (True, False):
        model = network()
        encoder = nn.Sequential(*model[:2])
        optimizer = Contractive(TRAININGS[name](model.parameters()), encoder, weight=0.3)
        model = nn.Sequential(encoder, model[2])

        def loss_fn(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y, reduction=reduction)

        closure: Any = whole(model, reduction)
        if ours:
            closure = DatasetClosure(model, loss_fn, loader(), reduction=reduction)
        for _ in range(3):
            loss = float(optimizer.step(closure))
            losses.append([loss, optimizer.info.loss, optimizer.info.penalty])
        values.append([p.detach().clone() for p in model.parameters()])
    close(values[0], values[1], 1e-9)
    close(losses[:3], losses[3:], 1e-9)


def test_a_batch_that_is_not_finite_is_rejected() -> None:
    x, y = data()
    x[12] = torch.nan
    batches = DataLoader(TensorDataset(x, y), batch_size=5)
    for make in (LBFGS, NewtonCG, AdaHessian, Sophia):
        model = network()
        optimizer = make(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(DatasetClosure(model, F.cross_entropy, batches))
        assert optimizer.info.status is StepStatus.NONFINITE_START
        close([p.detach() for p in model.parameters()], before, 0.0)


# Order.


class Logged(Dataset[Any]):
    """Writes down which samples were asked for."""

    def __init__(self) -> None:
        self.x, self.y = data()
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Batch:
        self.asked.append(i)
        return self.x[i], self.y[i]


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "its own"])
@pytest.mark.parametrize("make", [LBFGS, NewtonCG], ids=["LBFGS", "NewtonCG"])
def test_a_shuffling_loader_keeps_its_order_for_a_step(make: Any, own: bool) -> None:
    samples, model = Logged(), network()
    generator = torch.Generator().manual_seed(2) if own else None
    batches = DataLoader(samples, batch_size=5, shuffle=True, generator=generator, drop_last=True)
    optimizer = make(model.parameters())
    closure = DatasetClosure(model, F.cross_entropy, batches)
    orders = []
    for _ in range(3):
        samples.asked.clear()
        optimizer.step(closure)
        passes = [samples.asked[i : i + 20] for i in range(0, len(samples.asked), 20)]
        assert len(passes) > 2
        assert all(one == passes[0] for one in passes)
        orders.append(passes[0])
    assert orders[0] != orders[1] != orders[2]


class Augmented(Logged):
    """Augments by random numbers that nobody puts back."""

    def __getitem__(self, i: int) -> Batch:
        x, y = super().__getitem__(i)
        return x + np.random.default_rng().normal(), y


def test_a_loader_that_changes_within_a_step_is_rejected() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    closure = DatasetClosure(model, F.cross_entropy, DataLoader(Augmented(), batch_size=5))
    with pytest.raises(RuntimeError, match="other batches than before in the same step"):
        LBFGS(model.parameters()).step(closure)
    close([p.detach() for p in model.parameters()], before, 0.0)
    AdaHessian(model.parameters()).step(closure)  # evaluates once


class Noisy(Logged):
    """Augments by PyTorch's random numbers, in whatever process."""

    def __getitem__(self, i: int) -> Batch:
        return self.x[i] + 0.1 * torch.randn(4, dtype=torch.float64), self.y[i]


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}], ids=["here", "workers"])
def test_augmentations_from_torch_are_the_same_for_a_step(options: dict[str, Any]) -> None:
    model = network()
    batches = DataLoader(Noisy(), batch_size=5, shuffle=True, **options)
    optimizer = NewtonCG(model.parameters(), max_cg_iter=3)
    closure = DatasetClosure(model, F.cross_entropy, batches)
    losses = [optimizer.step(closure) for _ in range(2)]
    assert losses[1] < losses[0]


def test_persistent_workers_with_augmentation_are_rejected() -> None:
    model = network()
    batches = DataLoader(Noisy(), batch_size=5, num_workers=1, persistent_workers=True)
    with pytest.raises(RuntimeError, match="other batches than before"):
        LBFGS(model.parameters()).step(DatasetClosure(model, F.cross_entropy, batches))


# Errors.


class Shrinking:
    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from pieces()[: -1 if self.passes == 3 else None]


class Growing(Shrinking):
    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from pieces()
        if self.passes == 3:
            yield pieces()[0]


@pytest.mark.parametrize("batches", [Shrinking, Growing])
def test_a_changed_number_of_samples_is_rejected(batches: type[Shrinking]) -> None:
    closure = DatasetClosure(network(), F.cross_entropy, batches())
    closure()
    with pytest.raises(RuntimeError, match=r"gave \d+ samples .* and 23 when they were counted"):
        closure()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": len}, TypeError, "must be a torch.nn.Module, got builtin"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable, got NoneType"),
        ({"forward": 3}, TypeError, "forward must be callable or None, got int"),
        ({"count": 3}, TypeError, "count must be callable or None, got int"),
        ({"loader": 3}, TypeError, "must be an iterable of batches.*got int"),
        ({"loader": iter([1])}, TypeError, "an iterator .* only once"),
        ({"loader": []}, ValueError, "the loader gives no samples"),
        ({"loader": [(torch.zeros(0, 4), torch.zeros(0))]}, ValueError, "gives no samples"),
        ({"loader": [("a", "b")]}, TypeError, "no tensor whose length .* pass count="),
        ({"loader": [torch.ones(2, 4)]}, TypeError, "must be a pair .* use forward="),
        ({"reduction": "none"}, ValueError, "'mean', 'sum', got 'none'"),
        ({"keep_graphs": -1}, ValueError, "keep_graphs .* got -1"),
        ({"loss_fn": lambda z, y: z}, ValueError, "scalar loss, got shape"),
        ({"loss_fn": lambda z, y: z.detach().sum()}, RuntimeError, "no gradient reached"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": network(), "loss_fn": F.cross_entropy, "loader": loader(), **change}
    with pytest.raises(error, match=message):
        DatasetClosure(**given)()


def test_counting_draws_nothing() -> None:
    model = network()
    generator = torch.Generator().manual_seed(1)
    batches = loader(shuffle=True, generator=generator)
    closure = DatasetClosure(model, F.cross_entropy, batches, count=lambda batch: len(batch[0]))
    state = torch.get_rng_state(), generator.get_state()
    closure._sample_counts()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert torch.equal(generator.get_state(), state[1])


# Memory.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as these live.

    Attributes:
        peak: The most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def peak_of_a_step(copies: int, make: Callable[[Any], Any], **options: Any) -> int:
    """The most bytes that a step takes on so many times as many batches."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    batches = [(x.repeat(20, 1), y.repeat(20)) for x, y in pieces()[:-1]] * copies
    by_hand = options.pop("by_hand", False)
    optimizer = make(model.parameters())
    if by_hand:
        closure: Any = micro(model, batches, F.cross_entropy)
    else:
        closure = DatasetClosure(model, F.cross_entropy, batches, **options)
    gc.disable()  # memory that only the collector frees is not free
    try:
        with LiveBytes() as live:
            optimizer.step(closure)
    finally:
        gc.enable()
    return live.peak


FLAT: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda p: LBFGS(p, max_iter=2),
    "GGN": lambda p: NewtonCG(p, max_cg_iter=3, preconditioner=None),
    "Hessian": lambda p: NewtonCG(p, curvature="hessian", max_cg_iter=3),
    "Fisher": lambda p: NewtonCG(p, curvature="fisher", max_cg_iter=3),
    "kfac": lambda p: NewtonCG(p, max_cg_iter=2, preconditioner="kfac"),
    "nystrom": lambda p: NewtonCG(p, max_cg_iter=2, preconditioner=Nystrom(rank=4)),
    "AdaHessian": AdaHessian,
    "gnb": lambda p: Sophia(p, estimator="gnb"),
}


@pytest.mark.parametrize("name", FLAT)
def test_memory_does_not_grow_with_the_number_of_batches(name: str) -> None:
    once, often = (peak_of_a_step(copies, FLAT[name]) for copies in (1, 8))
    assert often < 1.02 * once


def test_memory_grows_where_graphs_are_kept() -> None:
    once, often = (peak_of_a_step(copies, FLAT["GGN"], by_hand=True) for copies in (1, 4))
    assert often > 3 * once
    kept = peak_of_a_step(4, FLAT["GGN"], keep_graphs=8)
    assert peak_of_a_step(4, FLAT["GGN"]) < 0.3 * kept
    assert kept < 0.7 * often


# Diagnostics, progress.


def test_diagnostics_accept_a_dataset_closure() -> None:
    model, (x, y) = network(), data()
    closure = DatasetClosure(model, F.cross_entropy, loader())
    ours = from_closure(closure, model.parameters())
    expected = from_model(model, F.cross_entropy, (x, y))
    a, b = second_order_model(ours), second_order_model(expected)
    close([a.value, a.slope, a.curvature], [b.value, b.slope, b.curvature])
    assert trace(ours, 12).value == pytest.approx(trace(expected, 12).value, rel=1e-10)


def test_a_bar_over_the_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    model = network()
    for progress in (None, False):
        DatasetClosure(model, F.cross_entropy, loader(), progress=progress)()
    assert capsys.readouterr().err == ""
    closure = DatasetClosure(model, F.cross_entropy, loader(), progress=True)
    NewtonCG(model.parameters(), max_cg_iter=2).step(closure)
    shown = capsys.readouterr().err
    assert "loss and gradient" in shown
    assert "product with the curvature" in shown
    assert "/5" in shown
    # A short pass shows no bar, even on a terminal.
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    DatasetClosure(model, F.cross_entropy, loader())()
    assert "loss and gradient" not in terminal.getvalue()
    monkeypatch.setattr(torch_secondorder.dataset.closure, "_BAR_DELAY", 0.0)
    DatasetClosure(model, F.cross_entropy, loader())()
    assert "loss and gradient" in terminal.getvalue()
