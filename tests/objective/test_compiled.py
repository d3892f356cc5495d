"""torch.compile: functions compiled with their products, and compiled modules in closures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn import functional as F

from tests.support.diagonal_references import assert_same, values
from tests.support.oracles import compiles_gradients
from torch_secondorder import (
    LBFGS,
    AdaHessian,
    FunctionalObjective,
    NewtonCG,
    Sophia,
    mark_outputs,
)
from torch_secondorder.curvature import Fisher, GaussNewton, Hessian

pytestmark = pytest.mark.slow

DOUBLE = torch.float64
EAGER = {"backend": "aot_eager"}  # all but code generation

Loss = Callable[[dict[str, Tensor]], Tensor]


@pytest.fixture(autouse=True)
def _forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        # The compiler's own, about functions of its own.
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\..*")
        yield
    torch._dynamo.reset()


class Task:
    """A network, data, and losses that are pure functions of the parameters."""

    def __init__(self, net: nn.Module | None = None) -> None:
        torch.manual_seed(3)
        self.net = net or nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        self.net.double()
        self.x = torch.rand(8, 2, dtype=DOUBLE)
        self.y = torch.randint(3, (8,))

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def call(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.net, p, x)

    def classify(self, p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.call(p, self.x), self.y)

    def penalized(self, p: dict[str, Tensor]) -> Tensor:
        return self.classify(p) + 0.1 * sum((w**4).sum() for w in p.values())

    def marked(self, p: dict[str, Tensor]) -> Tensor:
        return mark_outputs(self.call(p, self.x) - 0.5).pow(2).sum()

    def physics(self, p: dict[str, Tensor]) -> Tensor:
        """Derivatives by the input, as PINNs take them."""
        x = self.x.clone().requires_grad_()
        u = self.call(p, x)[:, 0]
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = sum(
            torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
        )
        return F.mse_loss(second, torch.ones_like(second)) + F.mse_loss(u, torch.zeros_like(u))

    def functional_physics(self, p: dict[str, Tensor]) -> Tensor:
        """The same by torch.func, forward over reverse."""

        def u(x: Tensor) -> Tensor:
            return self.call(p, x)[0]

        second = torch.func.vmap(lambda x: torch.func.hessian(u)(x).diagonal().sum())(self.x)
        z = self.call(p, self.x)[:, 0]
        return F.mse_loss(second, torch.ones_like(second)) + F.mse_loss(z, torch.zeros_like(z))

    def unshown(self, p: dict[str, Tensor]) -> Tensor:
        return self.call(p, self.x).pow(4).sum()


def close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


KINDS: dict[str, Callable[[Any], Any]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "part": lambda e: GaussNewton(e, remainder="ignore"),
    "empirical": lambda e: Fisher(e, labels="empirical"),
}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("classify", ["hessian", "empirical"]),
        ("penalized", ["ggn", "part"]),
        ("marked", ["ggn"]),
        ("physics", ["hessian", "ggn"]),
        ("functional_physics", ["hessian"]),
    ],
)
def test_loss_gradient_and_products_equal_those_without(name: str, kinds: list[str]) -> None:
    task = Task()
    loss = getattr(task, name)
    plain = FunctionalObjective(loss, task.params)
    compiled = FunctionalObjective(loss, task.params, compile=EAGER)
    if name == "physics" and not compiles_gradients():
        with pytest.raises(RuntimeError, match="leave compile=True out, or change the function"):
            compiled.evaluate(curvature=True)
        return
    for _ in range(2):
        ours, expected = compiled.evaluate(curvature=True), plain.evaluate(curvature=True)
        close((ours.loss, ours.grad), (expected.loss, expected.grad))
        directions = torch.randn(len(ours.grad), 2, dtype=DOUBLE)
        for kind in kinds:
            a, b = KINDS[kind](ours), KINDS[kind](expected)
            close(a @ directions, b @ directions)
            close(a @ directions[:, 0], b @ directions[:, 0])
        step = 0.1 * directions[:, 0]
        ours, expected = compiled.trial(step), plain.trial(step)
        close((ours.loss, ours.grad), (expected.loss, expected.grad))
        for objective in (compiled, plain):
            objective.accept(step)


CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda params: LBFGS(params, max_iter=3),
    "NewtonCG": lambda params: NewtonCG(
        params, preconditioner="nystrom", max_cg_iter=5, weight_decay=1e-3
    ),
    "Hessian": lambda params: NewtonCG(params, curvature="hessian", max_cg_iter=5),
    "differences": lambda params: NewtonCG(
        params, curvature_products="finite_difference", max_cg_iter=5
    ),
    "AdaHessian": lambda params: AdaHessian(params, lr=0.05, n_samples=2),
}


@pytest.mark.parametrize("kind", CONTENDERS)
def test_optimizers_train_as_without_and_compile_once(kind: str) -> None:
    """The objective is made anew at each step, and data change."""

    def run(**options: Any) -> tuple[list[Tensor], list[int]]:
        task = Task()
        task.net[0].bias.requires_grad_(False)
        optimizer = CONTENDERS[kind](task.net.parameters())
        graphs = []
        for _ in range(5):
            task.x = torch.rand(8, 2, dtype=DOUBLE)
            optimizer.step(FunctionalObjective(task.classify, task.params, **options))
            graphs.append(counters["stats"]["unique_graphs"])
        return values(task.net), graphs

    expected, _ = run()
    ours, graphs = run(compile=EAGER)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]
    assert graphs[-1] <= 4  # the function, the gradient, what is done at a point, a product


def test_generated_code() -> None:
    """By the default backend; once, for that takes seconds."""
    task = Task(nn.Linear(2, 3))
    plain = FunctionalObjective(task.classify, task.params)
    compiled = FunctionalObjective(task.classify, task.params, compile=True)
    ours, expected = compiled.evaluate(curvature=True), plain.evaluate(curvature=True)
    v = torch.randn_like(expected.grad)
    close(GaussNewton(ours) @ v, GaussNewton(expected) @ v)
    close((ours.loss, ours.grad), (expected.loss, expected.grad))


def test_what_changes_is_noticed() -> None:
    """Shapes, and a number that the function refers to."""
    task, factor = Task(), 1.0

    def loss(p: dict[str, Tensor]) -> Tensor:
        return factor * task.unshown(p)

    for count, number in ((8, 1.0), (5, 1.0), (8, 2.0), (8, 1.0)):
        task.x, factor = torch.rand(count, 2, dtype=DOUBLE), number
        ours, expected = (
            FunctionalObjective(loss, task.params, **options).evaluate()
            for options in ({"compile": EAGER}, {})
        )
        close((ours.loss, ours.grad), (expected.loss, expected.grad))
    assert counters["stats"]["unique_graphs"] == 6


# What is refused.

REFUSED: dict[str, tuple[Callable[[Task, Any], Any], str]] = {
    "dropout": (lambda t, p: F.dropout(t.call(p, t.x)).sum(), r"draws random numbers \(aten"),
    "value": (lambda t, p: t.classify(p) * float(p["0.bias"].detach().sum()), "value of a tensor"),
    "branch": (lambda t, p: t.classify(p) if p["0.bias"].sum() > 0 else t.unshown(p), "branch"),
    "mask": (
        lambda t, p: (lambda z: z[z > 0].sum())(t.call(p, t.x)),
        "shape of a tensor depends on values",
    ),
    "in place": (lambda t, p: (t.x.mul_(0.5), t.classify(p))[1], "changes a tensor in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_are_refused(name: str) -> None:
    loss, message = REFUSED[name]
    task = Task()
    objective = FunctionalObjective(lambda p: loss(task, p), task.params, compile=EAGER)
    with pytest.raises(RuntimeError, match=rf"leave compile=True out(.|\n)*{message}"):
        objective.evaluate()


def test_integer_indices_are_fine() -> None:
    task = Task()
    index = torch.tensor([0, 2])

    def loss(p: dict[str, Tensor]) -> Tensor:
        return task.call(p, task.x)[index].pow(2).sum()

    ours, expected = (
        FunctionalObjective(loss, task.params, **c).evaluate() for c in ({"compile": EAGER}, {})
    )
    close((ours.loss, ours.grad), (expected.loss, expected.grad))


@pytest.mark.parametrize("bad", ["constant", "vector", "number"])
def test_no_loss(bad: str) -> None:
    task = Task()
    loss = {"constant": lambda p: task.x.sum(), "number": lambda p: 3.0, "vector": lambda p: p}[bad]
    kind = ValueError if bad == "vector" else RuntimeError
    if bad == "vector":

        def loss(p: dict[str, Tensor]) -> Tensor:
            return task.call(p, task.x)

    with pytest.raises(kind, match=r"no gradient reached|real scalar loss, got shape"):
        FunctionalObjective(loss, task.params, compile=EAGER).evaluate()


def test_outputs_that_are_not_shown() -> None:
    task = Task()
    objective = FunctionalObjective(task.classify, task.params, compile=EAGER)
    message = r"does not show the model's outputs(.|\n)*leave compile out"
    for optimizer in (
        NewtonCG(task.net.parameters(), curvature="fisher"),
        NewtonCG(task.net.parameters(), preconditioner="kfac"),
        NewtonCG(task.net.parameters(), preconditioner="martens"),
        Sophia(task.net.parameters(), estimator="gnb"),
    ):
        before = values(task.net)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step(objective)
        assert_same(values(task.net), before, 0)
    with pytest.raises(RuntimeError, match="no model output was found"):
        NewtonCG(task.net.parameters(), curvature="ggn").step(
            FunctionalObjective(task.unshown, task.params, compile=EAGER)
        )


class Scaled:
    """A function that is an object."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, p: dict[str, Tensor]) -> Tensor:
        return self.task.unshown(p)


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("wrap", [Scaled, lambda task: partial(Task.unshown, task)])
def test_functions_of_other_kinds_are_recognized(wrap: Any, anew: bool) -> None:
    task = Task()
    optimizer = LBFGS(task.net.parameters(), max_iter=2)
    for step in range(3):
        if step == 0 or anew:
            objective = FunctionalObjective(wrap(task), task.params, compile=EAGER)
        optimizer.step(objective)
        if step == 0:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before


def test_a_function_of_which_too_many_kinds_were_compiled() -> None:
    task = Task()
    scale = 0.0

    def loss(p: dict[str, Tensor]) -> Tensor:
        return scale * p["0.bias"].sum()

    objective = FunctionalObjective(loss, task.params, compile=EAGER)
    with pytest.raises(RuntimeError, match=r"leave compile=True out(.|\n)*recompile_limit"):
        for i in range(20):
            scale = float(i) + 0.5
            objective.evaluate()


# Compiled modules in closures.


class Compiled:
    """A task whose module is compiled."""

    def __init__(self, **options: Any) -> None:
        self.task = Task()
        self.calls = 0
        self.net = torch.compile(self.task.net, fullgraph=True, **options)

    def closure(self) -> Tensor:
        self.calls += 1
        self.net.zero_grad()
        loss = F.cross_entropy(self.net(self.task.x), self.task.y)
        loss.backward()
        return loss


@pytest.mark.parametrize("dynamic", [False, None])
def test_lbfgs_trains_a_compiled_module(dynamic: bool | None) -> None:
    compiled = Compiled(dynamic=dynamic, **EAGER)
    optimizer = LBFGS(compiled.net.parameters(), max_iter=3)
    graphs, losses = [], []
    for _ in range(6):
        losses.append(optimizer.step(compiled.closure).item())
        graphs.append(counters["stats"]["unique_graphs"])
    assert compiled.calls > 18
    assert graphs[0] <= 2
    assert graphs[-1] == graphs[1] <= 2
    plain = Task()
    other = LBFGS(plain.net.parameters(), max_iter=3)

    def closure() -> Tensor:
        plain.net.zero_grad()
        loss = plain.classify(plain.params)
        loss.backward()
        return loss

    assert losses == pytest.approx([other.step(closure).item() for _ in range(6)], rel=1e-8)


@pytest.mark.parametrize("make", [partial(NewtonCG, curvature="ggn"), AdaHessian, Sophia])
def test_curvature_of_a_compiled_module_is_refused_with_the_way_out(make: Any) -> None:
    compiled = Compiled(**EAGER)
    before = values(compiled.task.net)
    with pytest.raises(RuntimeError, match=r"torch\.compile") as caught:
        make(compiled.net.parameters()).step(compiled.closure)
    for way in ("FunctionalObjective(f, params, compile=True)", "finite_difference", "gnb"):
        assert way in str(caught.value)
    assert_same(values(compiled.task.net), before, 0)
    NewtonCG(compiled.net.parameters(), curvature_products="finite_difference").step(
        compiled.closure
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_labels_drawn_from_a_compiled_module_need_no_second_derivative(backend: str) -> None:
    def train(task: Task, net: Any) -> list[Tensor]:
        optimizer = Sophia(net.parameters(), lr=0.05, estimator="gnb", update_period=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(task.x), task.y)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return values(task.net)

    plain, compiled = Task(), Compiled(backend=backend)
    close(train(compiled.task, compiled.net), train(plain, plain.net))
