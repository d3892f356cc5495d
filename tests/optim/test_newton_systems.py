"""NewtonCG: the first system, singular and indefinite ones, and steps that are kept short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import GLOBALIZATIONS, closure_of, start_at
from torch_secondorder import NewtonCG, StepStatus
from torch_secondorder._params.space import WHOLE
from torch_secondorder.curvature import Diagonal
from torch_secondorder.globalization import TrustRegion
from torch_secondorder.solvers import CG, SolveStatus


def quadratic(
    eigenvalues: list[float], seed: int, size: float, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """A quadratic with its stationary point about `size` away from the start."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    a = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    a = ((a + a.T) / 2).to(device, dtype)
    solution = torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype)
    x = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))

    def value() -> Tensor:
        left = x / size - solution
        return size**2 * 0.5 * (left @ (a @ left))

    return x, value


SPECTRA = {
    "even": [-1e-11, *torch.logspace(-11, 5.146, 18).tolist()],
    "rank 10": [-1e-11, *[0.0] * 8, *torch.logspace(-3, 5.146, 10).tolist()],
    "rank 5": [-1e-11, *[1e-11] * 5, *[0.0] * 8, *torch.logspace(1, 5.146, 5).tolist()],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_curvature_below_rounding_does_not_decide(
    spectrum: str, seed: int, globalization: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Nineteen unknowns, eigenvalues from -1e-11 to 1.4e5."""
    x, value = quadratic(SPECTRA[spectrum], seed, 1e-3, dtype, device)
    start = value().item()
    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization, max_iter=200)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is not StepStatus.MAX_ITERATIONS
    assert value().item() < start * (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_a_singular_consistent_system(globalization: str, device: torch.device) -> None:
    eigenvalues = [0.0, 0.0, 0.0, 1.0, 2.0, 5.0, 10.0]
    x, value = quadratic(eigenvalues, 0, 1.0, torch.float64, device)
    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization, max_iter=60)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert value().item() == pytest.approx(0.0, abs=1e-12)
    assert x.norm() < 100  # nothing went along what has no curvature


def test_the_iterate_before_negative_curvature_is_kept(device: torch.device) -> None:
    a = torch.tensor([3.0, 1.0, -0.1, 2.0], dtype=torch.float64, device=device)
    b = torch.tensor([1.0, 2.0, 1e-3, 1.0], dtype=torch.float64, device=device)
    free, held = CG()(Diagonal(a), b), CG()(Diagonal(a), b, radius=50.0)
    assert free.status is held.status is SolveStatus.NEGATIVE_CURVATURE
    (interior,) = held.iterates
    assert held.iterations == free.iterations + 1 and free.iterations > 0
    assert torch.equal(interior.x, free.x)
    assert interior.decrease == pytest.approx(free.decrease, rel=1e-12)
    assert interior.length == pytest.approx(float(free.x.norm()), rel=1e-9)
    at_once = CG()(Diagonal(-a.abs()), b, radius=50.0)
    assert at_once.status is SolveStatus.NEGATIVE_CURVATURE and at_once.iterates == ()


def test_a_boundary_step_that_fails_leaves_the_iterate_before() -> None:
    x = start_at(0.999, 0.005)

    def value() -> Tensor:  # a wall not far along a direction of negative curvature
        a, b = x
        return 0.5 * (a - 1.0) ** 2 - 0.1 * b**2 + 1e6 * (b.abs() - 0.1).clamp(min=0.0) ** 2

    optimizer = NewtonCG([x], curvature="hessian", globalization=TrustRegion(initial=10.0))
    optimizer.step(closure_of(value, x))
    info = optimizer.info
    assert info.negative_curvature < 0 and info.iterations == 1
    assert info.evaluations == 3  # the start, the boundary, the iterate before
    assert info.loss_after < info.loss and abs(x[1].item()) < 0.1
    assert info.trust_radius == pytest.approx(0.25 * 10)


@pytest.mark.parametrize("arguments", [{}, {"curvature": "hessian"}, {"globalization": "armijo"}])
def test_the_first_system_is_solved_as_well_as_it_deserves(
    arguments: dict[str, Any], device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(400, 200) * torch.logspace(0, -3, 200)).to(device, torch.float64)
    y = torch.randint(2, (400,)).to(x)
    w = nn.Parameter(torch.zeros(200, dtype=torch.float64, device=device))
    optimizer = NewtonCG([w], **arguments)
    optimizer.step(
        closure_of(lambda: F.binary_cross_entropy_with_logits(x @ w, y) + 1e-6 * w @ w, w)
    )
    assert optimizer.info.products <= 20  # Martens' rule looks back ten iterations
    assert optimizer.info.loss_after < optimizer.info.loss


def test_a_problem_far_away(device: torch.device) -> None:
    """Of size 1e6: the radius is as long as the model says, and not one."""
    x = nn.Parameter(torch.zeros(5, dtype=torch.float64, device=device))
    target = 1e6 * torch.arange(1.0, 6.0, dtype=torch.float64, device=device)

    def value() -> Tensor:
        return (((x - target) / 1e6) ** 2 * (1 + torch.arange(5.0, device=device))).sum()

    optimizer = NewtonCG([x], curvature="hessian", max_iter=100)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert optimizer.info.evaluations <= 20


@pytest.mark.parametrize("scale", [1e-8, 1e-15])
def test_a_damping_far_too_large_does_not_end_a_step(scale: float, device: torch.device) -> None:
    """A step that is lost in rounding says nothing against the model."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, device=device), torch.randn(64, 2, device=device)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)

    def value() -> Tensor:
        return scale * F.mse_loss(net(x), y)

    optimizer = NewtonCG(net.parameters(), damping=1.0)
    before = value().item()
    closure = closure_of(value, *net.parameters())
    for _ in range(15):
        optimizer.step(closure)
        assert optimizer.info.status is not StepStatus.STALLED
    assert value().item() < 0.7 * before
    assert optimizer.info.damping < scale


def test_a_radius_far_too_short_does_not_end_a_step() -> None:
    x = start_at(0.0, 0.0)

    def value() -> Tensor:
        return 1.0 + (x[0] - 3e6) ** 2 * 1e-12 + (x[1] + 1e6) ** 2 * 3e-12

    optimizer = NewtonCG(
        [x], curvature="hessian", globalization=TrustRegion(initial=1e-6), max_iter=200
    )
    optimizer.step(closure_of(value, x))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert x.tolist() == pytest.approx([3e6, -1e6], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-25, 1e-12, 1.0, 1e12, 1e25, 1e36])
def test_norms_of_vectors_whose_squares_leave_the_range(
    size: float, dtype: torch.dtype, device: torch.device
) -> None:
    v = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64, device=device).mul(size).to(dtype)
    largest, norm = WHOLE.to_host(largest=[v], norms=[torch.linalg.vector_norm(v)])
    expected = float(torch.linalg.vector_norm(v.double() / size)) * size
    assert WHOLE.true_norm(v, largest, norm) == pytest.approx(expected, rel=1e-6)
    for bad in (float("inf"), float("nan")):
        assert not WHOLE.true_norm(v * bad, bad, bad) < float("inf")
    assert WHOLE.true_norm(v * 0, 0.0, 0.0) == 0.0


# States.


@pytest.mark.parametrize("arguments", [{}, {"curvature": "hessian"}])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_a_rule_began_with_is_kept(arguments: dict[str, Any], steps: int) -> None:
    def run(*counts: int) -> tuple[list[float], NewtonCG]:
        x = start_at(-1.2, 1.0)

        def value() -> Tensor:
            return 1e-25 * (100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)

        def make() -> NewtonCG:
            named = arguments or {"curvature": "hessian", "globalization": "damping"}
            return NewtonCG([x], **named)

        optimizer = make()
        for i, count in enumerate(counts):
            if i:
                state = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
            for _ in range(count):
                optimizer.step(closure_of(value, x))
        return x.tolist(), optimizer

    (whole, one), (resumed, two) = run(steps + 6), run(steps, 6)
    assert whole == resumed and one.info == two.info


def test_states_of_earlier_releases() -> None:
    """Old states lack the first damping, which was one."""
    x = start_at(-1.2, 1.0)
    optimizer = NewtonCG([x], curvature="hessian", globalization="damping", damping=1.0)
    closure = closure_of(lambda: (x**4).sum(), x)
    optimizer.step(closure)
    state = optimizer.state_dict()
    for kept in state["state"].values():
        del kept["start"]
    again = NewtonCG([x], curvature="hessian", globalization="damping")
    again.load_state_dict(state)
    again.step(closure)
    assert 0 < again.info.damping < 2 and again.info.loss_after < again.info.loss
