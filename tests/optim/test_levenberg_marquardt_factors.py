"""Factors in float32 in Levenberg-Marquardt: the steps of a float64 problem stay the same."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import LevenbergMarquardt
from torch_secondorder.solvers import _cholesky


def fit(device: torch.device, rows: int, factor_dtype: Any, solver: str) -> tuple[list[float], Any]:
    torch.manual_seed(0)
    x = torch.rand(rows, 2, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    y = (3 * x[:, :1] * x[:, 1:]).sin().to(device)
    x, net = x.to(device), net.to(device)
    optimizer = LevenbergMarquardt(net.parameters(), factor_dtype=factor_dtype, solver=solver)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(12)], optimizer


@pytest.mark.parametrize(("solver", "rows"), [("primal", 250), ("dual", 150)])
def test_losses_are_those_of_factors_in_float64(
    solver: str, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = fit(device, rows, None, solver)
    refined = []
    solve = _cholesky.RefinedCholesky._refined

    def counting(self: Any, right: Tensor) -> Tensor | None:
        found = solve(self, right)
        refined.append(found is not None)
        return found

    monkeypatch.setattr(_cholesky.RefinedCholesky, "_refined", counting)
    found, _ = fit(device, rows, torch.float32, solver)
    assert sum(refined) >= 5
    assert found[-1] < 1e-2 * found[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(found[:5], expected[:5], rtol=1e-8, atol=0)


def test_the_dtype_goes_along_with_copies() -> None:
    _, optimizer = fit(torch.device("cpu"), 20, torch.float32, "auto")
    assert pickle.loads(pickle.dumps(optimizer)).factor_dtype is torch.float32


@pytest.mark.parametrize("bad", [torch.float16, torch.int64, "float32"])
def test_other_dtypes(bad: Any) -> None:
    message = re.escape(f"factor_dtype must be float32, float64 or None, got {bad!r}")
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt([nn.Parameter(torch.ones(2))], factor_dtype=bad)
