"""Old names of arguments work for one release, with a warning that names the new ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.closures import rosenbrock, standard, start_at
from torch_secondorder import LBFGS, StepInfo, StepStatus
from torch_secondorder.diagnostics import from_closure


def test_powell_damping_has_its_old_name_in_the_constructor() -> None:
    with pytest.warns(DeprecationWarning, match="powell_damping") as caught:
        optimizer = LBFGS([start_at(1.0)], damping=True)
    assert [warning.filename for warning in caught] == [__file__]
    assert optimizer.param_groups[0]["powell_damping"] is True
    assert "damping" not in optimizer.param_groups[0]


def test_powell_damping_has_its_old_name_in_a_group() -> None:
    with pytest.warns(DeprecationWarning, match="'damping' of LBFGS is called 'powell_damping'"):
        optimizer = LBFGS([{"params": [start_at(1.0)], "damping": True}])
    assert optimizer.param_groups[0]["powell_damping"] is True


def test_powell_damping_can_be_set_by_its_old_name_between_steps() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x])
    optimizer.param_groups[0]["damping"] = True
    with pytest.warns(DeprecationWarning, match="powell_damping"):
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.param_groups[0]["powell_damping"] is True
    assert "damping" not in optimizer.param_groups[0]


def test_old_checkpoints_have_the_old_name_of_powell_damping() -> None:
    def make(**options: Any) -> tuple[torch.Tensor, LBFGS]:
        x = start_at(-1.2, 1.0)
        return x, LBFGS([x], max_iter=4, **options)

    x, optimizer = make(powell_damping=True)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["damping"] = group.pop("powell_damping")
    y, loaded = make()
    with torch.no_grad():
        y.copy_(x)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["powell_damping"] is True
    assert "damping" not in loaded.param_groups[0]
    for point, each in ((x, optimizer), (y, loaded)):
        each.step(standard(each, lambda point=point: rosenbrock(point)))
    assert torch.equal(x, y)


def test_the_gauss_newton_matrix_of_a_diagnosis_has_its_old_name() -> None:
    x = start_at(1.0, 2.0)
    old: Any = "gauss_newton"

    def closure() -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(3 * x, torch.zeros_like(x))
        loss.backward()
        return loss

    with pytest.warns(DeprecationWarning, match="'gauss_newton' is called 'ggn' now") as caught:
        from_closure(closure, [x], curvature=old)
    assert [warning.filename for warning in caught] == [__file__]


def test_reports_give_the_former_values_of_fields_that_do_not_apply() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=2)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    info = optimizer.info
    with pytest.warns(DeprecationWarning, match=r"LBFGSInfo has no field 'products'") as caught:
        assert info.products == 0  # type: ignore[attr-defined]
    assert [warning.filename for warning in caught] == [__file__]
    assert info.step_length > 0
    assert "products" not in info.as_dict() and "products" not in dir(info)
    with pytest.warns(DeprecationWarning, match="'gain_ratio'"):
        assert StepInfo(StepStatus.MOVED, 1.0, None, None).gain_ratio is None  # type: ignore
    with pytest.raises(AttributeError, match="'LBFGSInfo' object has no attribute 'los'"):
        _ = info.los  # type: ignore[attr-defined]
