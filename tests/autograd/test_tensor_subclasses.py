"""Data that are subclasses of `Tensor` train as plain tensors do, in every way of running."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder import (
    LBFGS,
    AdaHessian,
    Contractive,
    DatasetClosure,
    FunctionalObjective,
    NewtonCG,
    Sophia,
    diagnostics,
    mark_outputs,
)
from torch_secondorder._foundation.subclasses import like, plain
from torch_secondorder._objective.closure import ClosureObjective


class Labelled(Tensor):
    """Has labels; results of operations are of the class, and have none. As in PINA."""

    labels: list[str]

    @classmethod
    def of(cls, values: Tensor) -> Any:
        result = values.as_subclass(cls)
        result.labels = ["a", "b", "c"]
        return result

    def clone(self, *args: Any, **kwargs: Any) -> Labelled:
        result = super().clone(*args, **kwargs).as_subclass(Labelled)
        result.labels = self.labels
        return result

    def detach(self) -> Labelled:
        result = super().detach().as_subclass(Labelled)
        result.labels = self.labels
        return result


class Strict(Tensor):
    """Knows the functions of a model, and refuses all others; so it does what it is asked for."""

    KNOWN = frozenset({"linear", "tanh", "mse_loss", "backward", "square", "mean", "sub", "mul"})

    @classmethod
    def of(cls, values: Tensor) -> Any:
        return values.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in cls.KNOWN:
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


class Meta(Tensor):
    """Passes a dict on from the first argument to all results, as in MONAI."""

    @classmethod
    def of(cls, values: Tensor) -> Any:
        result = values.as_subclass(cls)
        result.meta = {"spacing": [1.0]}
        return result

    def __deepcopy__(self, memo: Any) -> Any:
        result = self.as_tensor().clone().as_subclass(Meta)
        result.meta = copy.deepcopy(self.meta)
        return result

    def as_tensor(self) -> Tensor:
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Meta):
            first = next(a for a in args if isinstance(a, Meta))
            result.meta = copy.deepcopy(first.meta)
        return result


class Unwrapping(Tensor):
    """Of which results are plain, as with the tensors of torchvision."""

    @classmethod
    def of(cls, values: Tensor) -> Any:
        return values.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


KINDS: dict[str, Any] = {
    "labelled": Labelled,
    "strict": Strict,
    "meta": Meta,
    "unwrapping": Unwrapping,
}
MAKERS: dict[str, Callable[..., Any]] = {
    "lbfgs": partial(LBFGS, max_iter=3),
    "newton": NewtonCG,
    "newton_hessian": partial(NewtonCG, curvature="hessian", max_iter=2),
    "newton_fisher": partial(NewtonCG, curvature="fisher"),
    "newton_empirical": partial(NewtonCG, curvature="empirical_fisher"),
    "newton_kfac": partial(NewtonCG, preconditioner="kfac"),
    "newton_martens": partial(NewtonCG, preconditioner="martens"),
    "newton_nystrom": partial(NewtonCG, preconditioner="nystrom"),
    "newton_differences": partial(
        NewtonCG, curvature="hessian", curvature_products="finite_difference"
    ),
    "adahessian": partial(AdaHessian, lr=0.1),
    "adahessian_gnb": partial(AdaHessian, lr=0.1, estimator="gnb", n_samples=2),
    "sophia": partial(Sophia, lr=0.1),
    "sophia_gnb": partial(Sophia, lr=0.1, estimator="gnb"),
}
DIAGONAL = [name for name in MAKERS if name.startswith(("ada", "sophia"))]
WITHOUT_OUTPUTS = [name for name in DIAGONAL if not name.endswith("gnb")]
WAYS = {
    "closure": [*MAKERS],
    "returned": [*MAKERS],
    "function": [*MAKERS],
    "dataset": [*MAKERS],
    "kept": ["newton", "newton_hessian"],
    "contractive": [*MAKERS],
    "noisy": ["newton", "lbfgs"],
    "watching": DIAGONAL,
    "no closure": WITHOUT_OUTPUTS,
}


class Model(nn.Module):
    """A layer, and what else a closure does with data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.decoder = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Labelled):
            assert x.labels == ["a", "b", "c"]
        if isinstance(x, Meta):
            assert x.meta == {"spacing": [1.0]}
        return self.decoder(self.encoder(x))


class WithoutClosedForm(nn.Sequential):
    """Its Jacobian is taken by differentiation, and it looks at what its input has."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Labelled):
            assert x.labels == ["a", "b", "c"]
        if isinstance(x, Meta):
            assert x.meta == {"spacing": [1.0]}
        return super().forward(x)


def trained(name: str, way: str, kind: Any) -> list[Tensor]:
    model = Model()
    if way in ("contractive", "noisy"):
        model.encoder = WithoutClosedForm(*model.encoder)
    values = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
    x: Any = values if kind is None else kind.of(values)
    y = values.cos()
    optimizer = MAKERS[name](model.parameters())
    if way in ("contractive", "noisy"):
        noise = 0.1 if way == "noisy" else None
        optimizer = Contractive(optimizer, model.encoder, weight=0.1, noise=noise)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(x, y)
        if way != "returned":
            loss.backward()
        return loss

    def function(params: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, params, (x,)), y)

    for _ in range(3):
        if way in ("dataset", "kept"):
            batches = [(x, y), (x, y * 2)]
            loss = optimizer.step(
                DatasetClosure(model, F.mse_loss, batches, keep_graphs=5 if way == "kept" else 0)
            )
        elif way == "function":
            loss = optimizer.step(FunctionalObjective(function, dict(model.named_parameters())))
        elif way == "watching":
            optimizer.zero_grad()
            with optimizer.watching():
                loss_of(x, y).backward()
            loss = optimizer.step()
        elif way == "no closure":
            optimizer.zero_grad()
            loss_of(x, y).backward(create_graph=optimizer.curvature_due)
            loss = optimizer.step()
        else:
            loss = optimizer.step(closure)
        assert type(loss) in (Tensor, type(None))
        assert all(type(p.grad) in (Tensor, type(None)) for p in model.parameters())
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in WAYS[way]])
def test_training_is_that_on_plain_tensors(way: str, name: str, kind: str) -> None:
    torch.testing.assert_close(trained(name, way, KINDS[kind]), trained(name, way, None))


@pytest.mark.parametrize("kind", KINDS)
def test_the_closure_keeps_what_it_computes_with(kind: str) -> None:
    """A loss comes back as of the same class, with what its class has given it."""
    model, values = Model(), torch.ones(2, 3, dtype=torch.float64)
    x = KINDS[kind].of(values)
    found: list[Any] = []

    def closure() -> Any:
        z = mark_outputs(model(x))
        loss = F.mse_loss(z, values)
        found.append((z, loss))
        loss.backward()
        return loss

    objective = ClosureObjective(closure, model.parameters())
    objective.evaluate()
    objective.evaluate(curvature=True)
    for without, captured in zip(*found, strict=True):
        assert type(without) is type(captured)
        assert getattr(without, "meta", None) == getattr(captured, "meta", None)


@pytest.mark.parametrize("kind", ["labelled", "meta"])
@pytest.mark.parametrize("name", MAKERS)
def test_parameters_of_a_subclass(name: str, kind: str) -> None:
    def run(kind: Any) -> list[Tensor]:
        model = Model()
        if kind is not None:
            for layer in (model.encoder[0], model.decoder):
                for key in ("weight", "bias"):
                    setattr(layer, key, nn.Parameter(kind.of(getattr(layer, key).detach())))
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
        optimizer = MAKERS[name](model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x.cos())
            loss.backward()
            return loss

        for _ in range(3):
            loss = optimizer.step(closure)
            assert type(loss) is Tensor
        assert kind is None or all(type(p) is kind for p in model.parameters())
        assert all(type(p.grad) is Tensor for p in model.parameters())
        return [plain(p).detach() for p in model.parameters()]

    torch.testing.assert_close(run(KINDS[kind]), run(None))


class Named(nn.Parameter):
    """A parameter with something more to say."""

    def __repr__(self) -> str:
        return "named"


@pytest.mark.parametrize("name", MAKERS)
def test_subclasses_of_parameter(name: str) -> None:
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
    found = []
    for kind in (Named, nn.Parameter):
        w = kind(torch.full((2, 3), 0.1, dtype=torch.float64))
        optimizer = MAKERS[name]([w])
        for _ in range(3):
            optimizer.step(lambda w=w: F.mse_loss(F.linear(x, w).tanh(), x[:, :2]))
        found.append(plain(w).detach())
        assert type(w) is kind
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_diagnostics(kind: str, curvature: Any) -> None:
    values, found = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3), []
    for x in (values, KINDS[kind].of(values)):
        problem = diagnostics.from_model(
            Model(), F.mse_loss, [(x, values.cos()), (x, values)], curvature=curvature
        )
        found.append(diagnostics.eigenpairs(problem, 2).values)
    torch.testing.assert_close(*found)


def test_only_what_is_added_in_python_is_taken_away() -> None:
    x = torch.ones(2, requires_grad=True)
    labelled = Labelled.of(x * 2)
    bare = plain(labelled)
    assert type(bare) is Tensor
    (gradient,) = torch.autograd.grad(bare.sum(), x)
    assert torch.equal(gradient, torch.full((2,), 2.0))
    assert like(bare, labelled).labels == labelled.labels
    assert type(like(bare, x)) is Tensor
    fake = torch._subclasses.FakeTensorMode().from_tensor(torch.ones(2))
    assert plain(fake) is fake
    assert plain(x) is x
