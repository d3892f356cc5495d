"""Dense solutions under the transformations of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.support.rectangular import gaussian, graded
from torch_secondorder._foundation.private_torch import load_forward_rules
from torch_secondorder.linear import lstsq, norm_constrained, ridge

load_forward_rules()  # which warns of something deprecated in torch
SOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lstsq": lambda A, b: lstsq(A, b).x,
    "ridge": lambda A, b: ridge(A, b, 0.1).x,
    "norm_constrained": lambda A, b: norm_constrained(A, b, 0.3).x,
}


@pytest.mark.parametrize("solution", SOLUTIONS.values(), ids=SOLUTIONS)
@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6)])
def test_forward_and_reverse_mode(
    m: int, n: int, solution: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> None:
    A, b = graded(m, n, 5.0).to(device), gaussian(m).to(device)
    tangents = (gaussian(m, n, seed=3).to(device), gaussian(m, seed=4).to(device))
    h = 1e-6
    moved = [
        solution(A + sign * h * tangents[0], b + sign * h * tangents[1]) for sign in (1.0, -1.0)
    ]
    differences = (moved[0] - moved[1]) / (2 * h)
    value, forward = torch.func.jvp(solution, (A, b), tangents)
    torch.testing.assert_close(forward, differences, rtol=1e-6, atol=1e-7)
    assert torch.equal(value, solution(A, b))
    weights = gaussian(n, seed=5).to(device)
    _, pull = torch.func.vjp(solution, A, b)
    of_A, of_b = pull(weights)
    expected = (of_A * tangents[0]).sum() + of_b @ tangents[1]
    torch.testing.assert_close(weights @ forward, expected)
    with torch.no_grad(), forward_ad.dual_level():  # a forward mode that no_grad leaves alone
        dual = solution(forward_ad.make_dual(A, tangents[0]), b)
        along_A = forward_ad.unpack_dual(dual).tangent
    assert along_A is not None
    torch.testing.assert_close(weights @ along_A, (of_A * tangents[0]).sum())


@pytest.mark.parametrize("solution", SOLUTIONS.values(), ids=SOLUTIONS)
def test_second_derivatives(
    solution: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> None:
    """Forward over reverse and reverse over reverse are the same."""
    A, b = graded(5, 3, 5.0).to(device), gaussian(5).to(device)

    def square(b: Tensor) -> Tensor:
        return solution(A, b).pow(3).sum()

    forward_over_reverse = torch.func.hessian(square)(b)
    reverse = torch.autograd.functional.hessian(square, b)
    torch.testing.assert_close(forward_over_reverse, reverse)
    assert float(reverse.norm()) > 1e-3
