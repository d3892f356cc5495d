"""SOAP against a plain implementation, and its promises about scales, shapes and settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.soap_reference import SOAPReference
from torch_secondorder import SOAP, Shampoo

STEPS = 50


class Problem:
    """Parameters with noisy gradients, whose covariances have their own structure."""

    def __init__(self, shapes: list[tuple[int, ...]], device: Any = "cpu") -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.params = [nn.Parameter(normal(*shape).to(device)) for shape in shapes]
        self.scales = [normal(*shape).exp().to(device) for shape in shapes]
        self.noise = [[normal(*shape).to(device) for shape in shapes] for _ in range(STEPS)]

    def set_gradients(self, step: int) -> None:
        for p, scale, noise in zip(self.params, self.scales, self.noise[step], strict=True):
            p.grad = scale * (torch.tanh(p.detach()) + noise)


def differences(first: list[nn.Parameter], second: list[nn.Parameter]) -> float:
    return max((p - q).abs().max().item() for p, q in zip(first, second, strict=True))


def assert_same_steps(ours: Problem, optimizer: SOAP, theirs: Problem, reference: Any) -> None:
    for step in range(STEPS):
        ours.set_gradients(step)
        theirs.set_gradients(step)
        optimizer.step()
        reference.step()
        assert differences(ours.params, theirs.params) < 1e-12, step


CASES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "plain": ([(5, 4), (4,), (3, 5), (5, 4), ()], {}),
    "convolutions": ([(4, 2, 3, 3), (4,), (4, 2, 3, 3), (6, 4, 2)], {}),
    "equal blocks": ([(12, 4), (4, 12), (8, 8), (4, 4)], {"block_size": 4}),
    "blocks of two lengths": ([(7, 5), (7, 5), (3, 7)], {"block_size": 4}),
    "one-sided": ([(9, 3), (3, 9), (9, 8), (2, 3)], {"max_precond_dim": 8}),
    "one-sided blocks": ([(20, 6), (6, 20)], {"max_precond_dim": 8, "block_size": 3}),
    "no factors": ([(9, 9), (3, 3)], {"max_precond_dim": 8}),
    "rows and columns": ([(1, 5), (5, 1), (1, 1), (1, 1, 4)], {}),
    "stacked matrices": ([(3, 4, 5), (2, 2, 4, 5), (4, 5)], {"merge_dims": False}),
    "weight decay": ([(5, 4), (4,)], {"weight_decay": 0.3}),
    "other rates of decay": ([(5, 4), (4,)], {"betas": (0.8, 0.99), "shampoo_beta": 0.7}),
    "maximize": ([(5, 4), (4,)], {"maximize": True, "weight_decay": 0.1}),
    "each step": ([(5, 4), (4,)], {"update_period": 1}),
    "every third step": ([(5, 4), (6, 3)], {"update_period": 3}),
    "rarely": ([(5, 4), (6, 3)], {"update_period": 17}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_a_plain_implementation(case: str, device: torch.device) -> None:
    shapes, arguments = CASES[case]
    ours, theirs = Problem(shapes, device), Problem(shapes, device)
    arguments = {"lr": 0.01} | arguments
    optimizer = SOAP(ours.params, capturable=False, **arguments)
    reference = SOAPReference([{"params": theirs.params}], **arguments)
    assert_same_steps(ours, optimizer, theirs, reference)


def test_groups_have_settings_of_their_own(device: torch.device) -> None:
    shapes = [(8, 6), (6,), (8, 6), (4, 2, 3), (8,)]
    settings: list[dict[str, Any]] = [
        {"lr": 0.02, "block_size": 3, "weight_decay": 0.1},
        {"betas": (0.9, 0.8), "update_period": 10, "max_precond_dim": 5, "eps": 1e-3},
    ]
    ours, theirs = Problem(shapes, device), Problem(shapes, device)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        parts = params[:2], params[2:]
        return [{"params": part} | more for part, more in zip(parts, settings, strict=True)]

    optimizer = SOAP(groups(ours.params), lr=0.01)
    reference = SOAPReference(groups(theirs.params), lr=0.01)
    assert_same_steps(ours, optimizer, theirs, reference)


def test_parameters_have_schedules_of_their_own(device: torch.device) -> None:
    """One that gets its first gradient later gathers later; one without a gradient stands still."""
    shapes = [(5, 4), (4, 3), (5, 4), (4,)]
    ours, theirs = Problem(shapes, device), Problem(shapes, device)
    optimizer = SOAP(ours.params, lr=0.01, capturable=False)
    reference = SOAPReference([{"params": theirs.params}], lr=0.01)
    for step in range(STEPS):
        for problem in (ours, theirs):
            problem.set_gradients(step)
            if step < 7:
                problem.params[1].grad = None
            if 20 <= step < 24:
                problem.params[2].grad = problem.params[3].grad = None
        optimizer.step()
        reference.step()
    assert differences(ours.params, theirs.params) < 1e-12


def test_steps_that_wait_for_nothing_are_the_same(device: torch.device) -> None:
    shapes = [(8, 6), (6,), (8, 6), (2, 4)]
    ours, theirs = Problem(shapes, device), Problem(shapes, device)
    settings: dict[str, Any] = {"lr": 0.01, "block_size": 4, "weight_decay": 0.1}
    optimizer = SOAP(ours.params, capturable=True, **settings)
    reference = SOAPReference([{"params": theirs.params}], **settings)
    assert_same_steps(ours, optimizer, theirs, reference)


def test_exact_eigenvectors_after_a_jump(device: torch.device) -> None:
    """The covariances turn over at once; a step of the power method would be far off."""
    ours, theirs = Problem([(6, 6), (6, 5)], device), Problem([(6, 6), (6, 5)], device)
    settings: dict[str, Any] = {"lr": 1e-3, "shampoo_beta": 0.5}
    optimizer = SOAP(ours.params, capturable=False, **settings)
    reference = SOAPReference([{"params": theirs.params}], **settings)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0].to(device)
    shares = []
    for step in range(STEPS):
        for problem in (ours, theirs):
            problem.set_gradients(step)
            for p in problem.params:
                ramp = torch.logspace(0, -4, len(p)).to(p)[:, None]
                p.grad = ramp * p.grad if step < 24 else turn @ (ramp * p.grad)
        optimizer.step()
        reference.step()
        shares.append(optimizer.info.off_diagonal)
    assert differences(ours.params, theirs.params) < 1e-12
    assert reference.exact > 2 * 2  # more than those at the start
    assert [step + 1 for step, share in enumerate(shares) if share is not None] == [20, 30, 40, 50]
    assert shares[19] < 0.4
    assert shares[29] > 0.5


def test_the_report_of_a_refresh() -> None:
    problem = Problem([(6, 4), (5, 4)])
    optimizer = SOAP(problem.params, lr=0.01)
    for step in range(20):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        problem.set_gradients(step)
        optimizer.step()
    left = whole = 0.0
    for number, p in enumerate(problem.params):
        for side, gram in (("left", p.grad @ p.grad.T), ("right", p.grad.T @ p.grad)):
            factor = 0.95 * before[number][f"factor_{side}_0"][0] + 0.05 * gram
            factor /= factor.diagonal().max()
            basis = before[number][f"basis_{side}_0"][0]
            inside = (basis.T @ factor @ basis).square()
            left += (inside.sum() - inside.diagonal().sum()).item()
            whole += inside.sum().item()
    assert optimizer.info.off_diagonal == pytest.approx(left / whole, rel=1e-6)
    problem.params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.info.off_diagonal is None  # that was the last step


# Checkpoints.


@pytest.mark.parametrize("steps", [0, 1, 9, 10, 11, 19, 20, 23])
def test_a_checkpoint_at_any_step_goes_on_bit_for_bit(steps: int, tmp_path: Any) -> None:
    shapes = [(7, 5), (5,), (7, 5), (2, 3, 3), (9, 2)]
    settings: dict[str, Any] = {"lr": 0.01, "block_size": 4, "max_precond_dim": 8}
    problem = Problem(shapes)
    optimizer = SOAP(problem.params, **settings)
    for step in range(steps):
        problem.set_gradients(step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(problem)
    other = SOAP(resumed.params, lr=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied, copied_problem = copy.deepcopy((optimizer, problem))
    for step in range(steps, steps + 14):
        for used, each in ((problem, optimizer), (resumed, other), (copied_problem, copied)):
            used.set_gradients(step)
            each.step()
    assert differences(problem.params, resumed.params) == 0
    assert differences(problem.params, copied_problem.params) == 0


def test_the_names_and_shapes_of_the_state() -> None:
    problem = Problem([(8, 9), (3,)])
    optimizer = SOAP(problem.params, block_size=4)
    problem.set_gradients(0)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    tensors = {name: value for name, value in state[0].items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if value.dim()}
    shapes.pop("generator")  # of the whole model
    assert shapes == {
        "exp_avg": (8, 9),
        "exp_avg_sq": (8, 9),
        "factor_left_0": (6, 4, 4),
        "factor_right_0": (6, 3, 3),
        "basis_left_0": (6, 4, 4),
        "basis_right_0": (6, 3, 3),
    }
    assert {n for n, v in state[1].items() if v.dim()} == {"exp_avg", "exp_avg_sq"}


def test_a_state_of_other_blocks_is_refused() -> None:
    problem = Problem([(8, 9)])
    optimizer = SOAP(problem.params, block_size=4)
    problem.set_gradients(0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["block_size"] = 8
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"factor_left_0 of parameter 0 has shape \(6, 4, 4\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["block_size"] == before["param_groups"][0]["block_size"]


def test_a_state_of_shampoo_is_refused() -> None:
    """Its groups have all hyperparameters of SOAP, and its parameters have factors."""
    problem = Problem([(8, 9), (3,)])
    optimizer, other = SOAP(problem.params), Shampoo(problem.params)
    for step in range(12):
        problem.set_gradients(step)
        optimizer.step()
        other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="no state of SOAP: its groups have 'grafting', which is"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["basis_left_0"], before["state"][0]["basis_left_0"])


@pytest.mark.parametrize(
    "change", [{"block_size": 3}, {"max_precond_dim": 5}, {"merge_dims": False}]
)
def test_other_blocks_begin_anew(change: dict[str, Any]) -> None:
    shapes = [(8, 2, 3), (3,), (6, 6)]
    ours, fresh = Problem(shapes), Problem(shapes)
    optimizer = SOAP(ours.params, lr=0.01, block_size=4)
    for step in range(15):
        ours.set_gradients(step)
        optimizer.step()
    optimizer.param_groups[0].update(change)
    with torch.no_grad():
        for p, q in zip(fresh.params, ours.params, strict=True):
            p.copy_(q)
    moved = [0, 2] if "max_precond_dim" in change else [0]  # the other one has the same blocks
    other = SOAP([fresh.params[k] for k in moved], **({"lr": 0.01, "block_size": 4} | change))
    for step in range(15, 40):
        ours.set_gradients(step)
        optimizer.step()
        fresh.set_gradients(step)
        other.step()
    for k in moved:
        torch.testing.assert_close(fresh.params[k], ours.params[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("change", [2, 4, 9])
def test_a_shorter_period_while_gradients_are_gathered(then: int, change: int) -> None:
    """The bases begin in the first step that is late enough for the new period."""
    ours, same = Problem([(5, 4), (4,)]), Problem([(5, 4), (4,)])
    start = max(then, change + 1)
    optimizer = SOAP(ours.params, lr=0.01, update_period=10)
    other = SOAP(same.params, lr=0.01, update_period=start)
    for step in range(30):
        if step == change:
            optimizer.param_groups[0]["update_period"] = then
        if step == start:
            other.param_groups[0]["update_period"] = then
        for problem, used in ((ours, optimizer), (same, other)):
            problem.set_gradients(step)
            used.step()
        assert differences(ours.params, same.params) == 0


def test_a_longer_period_leaves_the_first_bases() -> None:
    ours, same = Problem([(5, 4), (4,)]), Problem([(5, 4), (4,)])
    optimizers = [SOAP(problem.params, lr=0.01, update_period=2) for problem in (ours, same)]
    for step in range(13):
        if step == 4:
            optimizers[0].param_groups[0]["update_period"] = 50
            basis = optimizers[0].state[ours.params[0]]["basis_left_0"].clone()
        for problem, optimizer in zip((ours, same), optimizers, strict=True):
            problem.set_gradients(step)
            optimizer.step()
        if step <= 4:  # the fifth step refreshes nothing, whatever the period
            assert differences(ours.params, same.params) == 0
    assert torch.equal(optimizers[0].state[ours.params[0]]["basis_left_0"], basis)


# Scales and degenerate gradients.


@pytest.mark.parametrize("exponent", [-66, 66])
def test_steps_do_not_depend_on_the_scale_of_the_loss(exponent: int) -> None:
    ours, scaled = Problem([(8, 6), (6,), (5, 5)]), Problem([(8, 6), (6,), (5, 5)])
    scale = 2.0**exponent
    optimizer = SOAP(ours.params, lr=0.01, block_size=4)
    other = SOAP(scaled.params, lr=0.01, block_size=4, eps=scale * 1e-8)
    for step in range(STEPS):
        ours.set_gradients(step)
        scaled.set_gradients(step)
        for p in scaled.params:
            p.grad *= scale
        optimizer.step()
        other.step()
    assert differences(ours.params, scaled.params) == 0


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_gradients_leave_no_damage(
    scale: float, dtype: torch.dtype, capturable: bool, device: torch.device
) -> None:
    """Squares may underflow or overflow in float32; steps go on when gradients are usual again."""
    problem = Problem([(8, 6), (6,), (5, 5)], device)
    params = [nn.Parameter(p.detach().to(dtype)) for p in problem.params]
    optimizer = SOAP(params, lr=0.01, block_size=4, capturable=capturable)
    for step in range(STEPS):
        problem.set_gradients(step)
        for p, source in zip(params, problem.params, strict=True):
            p.grad = (source.grad * (scale if 12 < step < 25 else 1.0)).to(dtype)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moves = [(p - q).abs().max().item() for p, q in zip(params, before, strict=True)]
        assert all(move < 0.2 for move in moves), step
        if scale < 1 or step > 40:
            assert all(move > 0 for move in moves if step < 12 or step > 30), step
    assert all(
        value.isfinite().all()
        for state in optimizer.state.values()
        for value in state.values()
        if value is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "one row", "one column", "rank one", "constant"])
def test_degenerate_gradients(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Whatever the null spaces of the factors, no entry moves further than in Adam's steps."""
    p = nn.Parameter(torch.zeros(12, 9, dtype=dtype, device=device))
    optimizer = SOAP([p], lr=0.01, block_size=6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 1, generator=generator).to(p)
    for _ in range(45):
        noise = torch.randn(12, 9, generator=generator).to(p)
        gradient = torch.zeros_like(noise)
        if kind == "one row":
            gradient[4] = noise[4]
        elif kind == "one column":
            gradient[:, 7] = noise[:, 7]
        elif kind == "rank one":
            gradient = rows * noise[:1]
        elif kind == "constant":
            gradient = torch.ones_like(noise)
        p.grad = gradient
        before = p.detach().clone()
        optimizer.step()
        assert p.isfinite().all()
        assert (p - before).norm() <= 0.01 * 12 * 9
    moved = p.detach().abs() > 1e-5
    if kind in ("zero", "constant"):
        assert moved.all() == (kind == "constant")
    elif kind == "one row":
        assert moved[4].all()
        assert moved.sum() == 9
    elif kind == "one column":
        assert moved[:, 7].all()
        assert moved.sum() == 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, capturable: bool) -> None:
    problem = Problem([(5, 4), (4,)])
    optimizer = SOAP(problem.params, lr=0.01, capturable=capturable)
    for step in range(13):
        problem.set_gradients(step)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    values = [p.detach().clone() for p in problem.params]
    problem.params[0].grad[2, 1] = bad
    optimizer.step()
    assert optimizer.info.status.name == "NONFINITE_START"
    after = optimizer.state_dict()["state"]
    for number, state in before.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "host_step":
                assert torch.equal(value, after[number][name]), name
    assert all(torch.equal(p, q) for p, q in zip(problem.params, values, strict=True))


# Kinds of parameters.


def test_complex_parameters_are_pairs() -> None:
    pairs, generator = Problem([(4, 3, 2), (5, 2)]), torch.Generator().manual_seed(1)
    values = [torch.view_as_complex(p.detach().clone()) for p in pairs.params]
    numbers = [nn.Parameter(value) for value in values]
    # Pairs of one dimension are no matrix.
    matrices = [pairs.params[0], nn.Parameter(pairs.params[1].detach().reshape(-1))]
    ours, theirs = SOAP(numbers, lr=0.01), SOAP(matrices, lr=0.01)
    for _ in range(25):
        for p, q in zip(numbers, matrices, strict=True):
            noise = torch.randn(torch.view_as_real(p).shape, generator=generator).double()
            p.grad, q.grad = torch.view_as_complex(noise), noise.reshape(q.shape).clone()
        ours.step()
        theirs.step()
    for p, q in zip(numbers, matrices, strict=True):
        torch.testing.assert_close(
            torch.view_as_real(p.detach()).reshape(q.shape), q.detach(), rtol=0, atol=1e-13
        )


def test_layouts_of_memory_make_no_difference() -> None:
    """Blocks of a convolution in channels-last order, and of a transposed matrix, are no views."""
    shapes = [(6, 4, 3, 3), (9, 8)]
    usual, other = Problem(shapes), Problem(shapes)
    other.params[0] = nn.Parameter(other.params[0].detach().to(memory_format=torch.channels_last))
    other.params[1] = nn.Parameter(other.params[1].detach().t().contiguous().t())
    first = SOAP(usual.params, lr=0.01, block_size=4)
    second = SOAP(other.params, lr=0.01, block_size=4)
    for step in range(25):
        usual.set_gradients(step)
        other.set_gradients(step)
        first.step()
        second.step()
    assert differences(usual.params, other.params) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_master_copy(dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem([(9, 8), (6, 4, 3), (5,)], device)
    wide = [nn.Parameter(p.detach().to(dtype).float()) for p in problem.params]
    narrow = [nn.Parameter(p.detach().to(dtype)) for p in problem.params]
    settings: dict[str, Any] = {"lr": 1e-3, "block_size": 4, "weight_decay": 0.1}
    first, second = SOAP(wide, **settings), SOAP(narrow, **settings)
    for step in range(25):
        problem.set_gradients(step)
        for p, q, source in zip(wide, narrow, problem.params, strict=True):
            q.grad = source.grad.to(dtype)
            p.grad = q.grad.float()
        first.step()
        second.step()
    for p, q in zip(wide, narrow, strict=True):
        assert q.dtype == dtype
        torch.testing.assert_close(q, p.to(dtype), rtol=0, atol=0)


def test_factors_in_bfloat16(device: torch.device) -> None:
    problem = Problem([(9, 8), (8, 8)], device)
    params = [nn.Parameter(p.detach().float()) for p in problem.params]
    wide = [nn.Parameter(p.detach().float()) for p in problem.params]
    narrow = SOAP(params, lr=0.01, factor_dtype=torch.bfloat16)
    usual = SOAP(wide, lr=0.01)
    for step in range(STEPS):
        problem.set_gradients(step)
        for p, q, source in zip(params, wide, problem.params, strict=True):
            p.grad = q.grad = source.grad.float()
        narrow.step()
        usual.step()
    state = narrow.state[params[0]]
    assert state["factor_left_0"].dtype == torch.bfloat16
    assert state["basis_left_0"].dtype == state["exp_avg"].dtype == torch.float32
    # The bases are much the same, and so are the steps.
    moved = torch.cat(
        [(p - q.to(p)).flatten() for p, q in zip(params, problem.params, strict=True)]
    )
    other = torch.cat([(p - q.to(p)).flatten() for p, q in zip(wide, problem.params, strict=True)])
    assert torch.cosine_similarity(moved, other, dim=0) > 0.9
    identity = torch.eye(9, device=device)
    torch.testing.assert_close(state["basis_left_0"][0] @ state["basis_left_0"][0].T, identity)


def test_products_are_not_made_in_half_precision() -> None:
    """A step inside of autocast is the same as outside."""
    inside, outside = Problem([(8, 6)]), Problem([(8, 6)])
    params = [[nn.Parameter(each.params[0].detach().float())] for each in (inside, outside)]
    optimizers = [SOAP(each, lr=0.01) for each in params]
    for step in range(25):
        inside.set_gradients(step)
        for each in params:
            each[0].grad = inside.params[0].grad.float()
        with torch.autocast("cpu", torch.bfloat16):
            optimizers[0].step()
        optimizers[1].step()
    assert torch.equal(params[0][0], params[1][0])


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "bmm" in str(func) or "geqrf" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [15, 20])
def test_equal_layers_share_calls(steps: int) -> None:
    counts = []
    for layers in (1, 5):
        problem = Problem([(12, 4), (4,), (4, 8)] * layers)
        optimizer = SOAP(problem.params, block_size=4)
        for step in range(steps):
            problem.set_gradients(step)
            with Calls() as calls:
                optimizer.step()
        counts.append(calls.count)
    # One shape of blocks: two products for the factors, two into the bases and two back.
    assert counts == [6, 6] if steps == 15 else counts == [14, 14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"shampoo_beta": 1.0}, r"shampoo_beta must lie in \[0, 1\)"),
        ({"update_period": 0}, "update_period must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"max_precond_dim": 1.5}, "max_precond_dim must be"),
        ({"merge_dims": 1}, "merge_dims must be"),
        ({"factor_dtype": torch.int32}, "factor_dtype must be"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP([nn.Parameter(torch.ones(2, 2))], **arguments)
