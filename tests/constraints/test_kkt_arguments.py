"""Sources, parameters and multipliers of a certificate, which changes none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_secondorder import LBFGS, DatasetClosure, FunctionalObjective, kkt_residuals
from torch_secondorder.constraints._rows import jacobian_rows

ROOT2 = math.sqrt(2.0)


def tensor(*values: float, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)


# Ways in.


def model_problem(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double().to(device)
    x = torch.randn(8, 3, dtype=torch.float64, device=device)
    return model, x, torch.randn(8, 1, dtype=torch.float64, device=device)


def test_all_sources_give_the_same_report(device: torch.device) -> None:
    model, x, y = model_problem(device)
    named = dict(model.named_parameters())
    weight = named["0.weight"]

    def plain() -> Tensor:
        return F.mse_loss(model(x), y)

    def standard() -> Tensor:
        model.zero_grad()
        loss = plain()
        loss.backward()
        return loss

    def in_parts() -> float:
        model.zero_grad()
        total = 0.0
        for part in (slice(0, 4), slice(4, 8)):
            loss = F.mse_loss(model(x[part]), y[part]) / 2
            loss.backward()
            total += loss.item()
        return total

    def function(p: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, p, (x,)), y)

    data = DatasetClosure(
        model, F.mse_loss, DataLoader(TensorDataset(x, y), batch_size=3), progress=False
    )
    constraints: Callable[[], Tensor] = lambda: weight.square().sum(1) - 1  # noqa: E731
    reports = [
        kkt_residuals(source, model.named_parameters(), None, constraints, second_order=True)
        for source in (plain, standard, in_parts, data)
    ]
    reports.append(
        kkt_residuals(
            FunctionalObjective(function, named),
            None,
            None,
            lambda p: p["0.weight"].square().sum(1) - 1,
            second_order=True,
        )
    )
    first = reports[0].as_dict()
    assert set(reports[0].direction) == set(named)
    for report in reports[1:]:
        found = report.as_dict()
        for name in ("loss", "stationarity", "feasibility", "complementarity", "curvature"):
            assert found[name] == pytest.approx(first[name], rel=1e-6, abs=1e-12), name
        assert found["where"] == first["where"]
        assert found["multipliers"]["inequalities"] == pytest.approx(
            first["multipliers"]["inequalities"], rel=1e-6, abs=1e-12
        )


def test_a_constraint_may_depend_on_what_the_closure_computed() -> None:
    x = tensor(0.5, 1.0)
    seen: dict[str, Tensor] = {}

    def closure() -> Tensor:
        x.grad = None
        seen["output"] = x * x
        loss = seen["output"].sum()
        loss.backward()
        return loss

    report = kkt_residuals(closure, [x], None, lambda: 1 - seen["output"].sum(), second_order=True)
    assert report.values["inequalities"].item() == -0.25
    # Without a tie to the closure the graph would be gone.
    assert report.multipliers["inequalities"].item() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_constraint_on_batches_is_a_mean_over_the_data(reduction: Any) -> None:
    model, x, y = model_problem(torch.device("cpu"))
    seen: list[Tensor] = []

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        seen[:] = [model(batch[0])]
        return seen[0], batch[1]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction=reduction)

    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    data = DatasetClosure(model, loss, loader, forward=forward, reduction=reduction, progress=False)
    report = kkt_residuals(data, model.parameters(), lambda: seen[0].mean(), second_order=True)
    assert report.values["equalities"].item() == pytest.approx(model(x).mean().item())
    whole = kkt_residuals(
        lambda: loss(model(x), y), model.parameters(), lambda: model(x).mean(),
        second_order=True,
    )  # fmt: skip
    assert report.multipliers["equalities"].item() == pytest.approx(
        whole.multipliers["equalities"].item()
    )
    assert report.curvature == pytest.approx(whole.curvature, rel=1e-8)


def test_groups_bring_their_options() -> None:
    x, w = tensor(1.0, 2.0), tensor(3.0)
    optimizer = LBFGS(
        [{"params": [x], "bounds": (None, 2.0)}, {"params": [w], "weight_decay": 0.5}],
        maximize=True,
    )
    report = kkt_residuals(lambda: x.sum() + w.sum() * 1.5, optimizer.param_groups)
    # Minimized is -loss + w^2 / 4: at w = 3 it is stationary, and x[1] is at its bound.
    assert report.loss == -3 - 4.5 + 9 / 4
    assert report.stationarity == 1.0 and report.where["stationarity"] == "parameter 0[0]"
    assert report.bound_multipliers["parameter 0"].tolist() == [0.0, -1.0]
    plain = kkt_residuals(
        lambda: x.sum() + w.sum() * 1.5, optimizer.param_groups, weight_decay=0.0, maximize=False
    )
    assert plain.loss == 7.5 and plain.stationarity == 1.5


def test_decoupled_weight_decay_is_no_part_of_the_loss() -> None:
    x = tensor(1.0)
    optimizer = torch.optim.AdamW([x], weight_decay=10.0)
    assert kkt_residuals(lambda: x.sum(), optimizer.param_groups).stationarity == 1.0
    coupled = torch.optim.SGD([x], lr=0.1, weight_decay=10.0)
    assert kkt_residuals(lambda: x.sum(), coupled.param_groups).stationarity == 11.0


def test_maximizing_keeps_the_signs_of_multipliers() -> None:
    # The largest sum on a ball.
    x = tensor(1 / ROOT2, 1 / ROOT2)
    report = kkt_residuals(
        lambda: x.sum(), [x], None, lambda: x.square().sum() - 1, maximize=True, second_order=True
    )
    assert report.multipliers["inequalities"].item() == pytest.approx(1 / ROOT2)
    assert report.verdict == "minimum" and report.curvature == pytest.approx(ROOT2)


def test_names_of_trees() -> None:
    tree = {"layers": [{"w": torch.zeros(2).double()}, {"w": torch.ones(()).double()}]}
    report = kkt_residuals(
        FunctionalObjective(lambda p: p["layers"][0]["w"].sum() + p["layers"][1]["w"] ** 4, tree)
    )
    assert report.where["stationarity"] == "layers.1.w"
    alone = torch.ones(2)
    report = kkt_residuals(FunctionalObjective(lambda p: (p**2).sum(), alone), alone)
    assert report.where["stationarity"] == "parameter 0[0]"


def test_parameters_outside_the_tree_or_frozen_are_left_alone() -> None:
    x, other = tensor(1.0), tensor(5.0)
    report = kkt_residuals(
        FunctionalObjective(lambda p: p["x"].sum(), {"x": x}),
        [x, other],
        lambda p: p["x"] - 1,
    )
    assert report.largest < 1e-15
    frozen = torch.ones(2)
    assert kkt_residuals(lambda: (x * frozen.sum()).sum(), [x, frozen]).stationarity == 2.0


def test_complex_parameters() -> None:
    z = torch.tensor([0.6 + 0.8j], dtype=torch.complex128, requires_grad=True)
    report = kkt_residuals(
        lambda: (z - (1.2 + 1.6j)).abs().square().sum(), [z], lambda: z.abs().square().sum() - 1
    )
    assert report.largest < 1e-14
    assert report.multipliers["equalities"].item() == pytest.approx(1.0)


# Nothing changes.


def test_nothing_changes(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model = model.double().to(device)
    x = torch.randn(8, 3, dtype=torch.float64, device=device)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    random = torch.get_rng_state()

    def closure() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = model(x).square().mean() + torch.rand(()).item()
        loss.backward()
        return loss

    with torch.no_grad():  # as in a validation loop
        reports = [
            kkt_residuals(
                closure, model.parameters(), lambda: model[0].weight.sum(), second_order=True
            )
            for _ in range(2)
        ]
    assert str(reports[0]) == str(reports[1])
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    for p, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_nothing_changes_after_an_error() -> None:
    model = nn.BatchNorm1d(2)
    x = torch.randn(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="the value of the constraint h is not finite here"):
        kkt_residuals(
            lambda: model(x).sum(), model.parameters(), {"h": lambda: model.weight.sum() / 0}
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.weight.grad is None


# Rows.


class NoRule(torch.autograd.Function):
    """A square whose backward pass cannot be vectorized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert len(grad.tolist()) == 3  # batched tensors have no numbers to be read
        return 2 * x * grad


@pytest.mark.parametrize("square", [torch.square, NoRule.apply], ids=["batched", "in turn"])
def test_rows_of_a_jacobian(square: Callable[[Tensor], Tensor], device: torch.device) -> None:
    a, b = tensor(1.0, 2.0, 3.0, device=device), tensor(0.5, device=device)
    other = tensor(1.0, device=device)
    A = torch.randn(11, 3, dtype=torch.float64, device=device)
    values = A @ square(a) + b
    rows = jacobian_rows(values, [a, other, b])
    assert rows[0] is not None and rows[1] is None and rows[2] is not None
    torch.testing.assert_close(rows[0], 2 * A * a.detach())
    torch.testing.assert_close(rows[2], torch.ones(11, 1, dtype=torch.float64, device=device))
    values.sum().backward()  # the graph is still there


# Errors.


def line() -> tuple[Tensor, dict[str, Any]]:
    x = tensor(1.0, 2.0)
    return x, {"equalities": {"h": lambda: x.sum()}, "inequalities": {"g": lambda: x - 1}}


@pytest.mark.parametrize(
    ("multipliers", "kind", "words"),
    [
        ({"h": 1.0}, ValueError, "one entry for each of h, g, got h"),
        ({"h": 1.0, "g": torch.ones(2), "k": 1.0}, ValueError, "got h, g, k"),
        ({"h": 1.0, "g": torch.ones(3)}, ValueError, r"multipliers of g .* shape \(2,\), got \(3"),
        (torch.ones(2), ValueError, r"each of the 3 constraints, equalities first, got .*\(2,\)"),
        (torch.tensor([1.0, math.nan, 1.0]), ValueError, "all constraints must be finite"),
        ({"h": "one", "g": torch.ones(2)}, TypeError, "the multipliers of h must be numbers"),
    ],
)
def test_multipliers_that_do_not_fit(multipliers: Any, kind: type[Exception], words: str) -> None:
    x, constraints = line()
    with pytest.raises(kind, match=words):
        kkt_residuals(lambda: (x**2).sum(), [x], **constraints, multipliers=multipliers)


def test_multipliers_come_in_several_forms() -> None:
    x, constraints = line()
    forms: list[Any] = [
        {"h": 1.0, "g": torch.tensor([2.0, 3.0])},
        {"h": torch.tensor(1.0), "g": [2.0, 3.0]},
        torch.tensor([1.0, 2.0, 3.0]),
    ]
    reports = [
        kkt_residuals(lambda: (x**2).sum(), [x], **constraints, multipliers=form) for form in forms
    ]
    assert len({str(report) for report in reports}) == 1 and not reports[0].estimated
    # What an optimizer has before its first step.
    assert kkt_residuals(lambda: (x**2).sum(), [x], **constraints, multipliers={}).estimated


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda x: kkt_residuals(3, [x]), TypeError, "closure must be callable"),  # type: ignore[arg-type]
        (lambda x: kkt_residuals(lambda: x.sum()), ValueError, "params must be given beside a cl"),
        (lambda x: kkt_residuals(lambda: x.sum(), []), ValueError, "no parameter"),
        (lambda x: kkt_residuals(lambda: x.sum(), [3]), TypeError, "not a tensor"),  # type: ignore[list-item]
        (lambda x: kkt_residuals(lambda: x.sum(), [x], {}), ValueError, "there is no constraint"),
        (lambda x: kkt_residuals(lambda: x.sum(), [x], 3), TypeError, "must be a function"),  # type: ignore[arg-type]
        (lambda x: kkt_residuals(lambda: x.sum(), [x], tolerance=0.0), ValueError, "tolerance"),
        (lambda x: kkt_residuals(lambda: x.sum(), [x], weight_decay=-1), ValueError, "weight_dec"),
        (lambda x: kkt_residuals(lambda: x.sum(), [x], bounds=(2, 1)), ValueError, "leave no numb"),
        (
            lambda x: kkt_residuals(
                lambda: x.sum(),
                [{"params": [x], "maximize": True}, {"params": [x.detach().requires_grad_()]}],
            ),
            ValueError,
            "maximize must be the same",
        ),
        (lambda x: kkt_residuals(lambda: x.sum() / 0, [x]), RuntimeError, "the loss is inf here"),
        (
            lambda x: kkt_residuals(lambda: (x - 1).sqrt().sum(), [x]),
            RuntimeError,
            "gradient of the loss is not finite",
        ),
        (
            lambda x: kkt_residuals(lambda: x.sum(), [x], lambda: torch.stack([x[0], x[0] / 0])),
            RuntimeError,
            r"the value of the constraint equalities\[1\] is not finite",
        ),
        (
            lambda x: kkt_residuals(lambda: x.sum(), [x], {"r": lambda: (x[0] - 1).sqrt()}),
            RuntimeError,
            "the gradient of the constraint r is not finite",
        ),
        (
            lambda x: kkt_residuals(lambda: x.sum(), [x], lambda: x.detach()),
            RuntimeError,
            "without a graph",
        ),
        (
            lambda x: kkt_residuals(lambda: x.sum(), [x], {"k": lambda: tensor(1.0)}),
            RuntimeError,
            "the constraint k depends on none of the parameters",
        ),
    ],
)  # fmt: skip
def test_errors(call: Callable[[Tensor], Any], kind: type[Exception], words: str) -> None:
    x = tensor(1.0, 2.0)
    with pytest.raises(kind, match=words):
        call(x)
    assert x.grad is None and x.tolist() == [1.0, 2.0]


def test_a_model_or_a_closure_in_place_of_parameters() -> None:
    model = torch.nn.Linear(2, 1)

    def closure() -> torch.Tensor:
        loss = model.weight.sum()
        loss.backward()
        return loss

    for given in (model, closure):
        with pytest.raises(TypeError, match=r"params must be parameters, as model.parameters\(\)"):
            kkt_residuals(closure, given)  # type: ignore[arg-type]


def test_a_violated_inequality_is_called_so() -> None:
    x = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)

    def closure() -> torch.Tensor:
        loss = x.square().sum()
        loss.backward()
        return loss

    wall = {"wall": lambda: x - torch.tensor([1.0, 1.0])}
    lines = str(kkt_residuals(closure, [x], inequalities=wall)).splitlines()
    assert [line.split()[-1] for line in lines if "wall[0]" in line][-1] == "violated"
    assert [line.split()[-1] for line in lines if "wall[1]" in line][-1] == "active"
