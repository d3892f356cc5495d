"""Sophia with `target_unclipped`, where the factor of the curvature is tuned."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_secondorder.optim.sophia
from tests.support.closures import standard
from tests.support.diagonal_references import Task, assert_same, values
from tests.support.host_reads import HostReads
from torch_secondorder import Sophia, StepStatus

DOUBLE = torch.float64
CURVATURES = torch.cat([torch.logspace(-2, 2, 19, dtype=DOUBLE), torch.tensor([-1.0, 0.0])])


def start(device: torch.device) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(len(CURVATURES), dtype=DOUBLE).to(device))


def quadratic(x: Tensor, scale: float = 1.0) -> Tensor:
    """Random signs find its diagonal exactly."""
    a = CURVATURES.to(x)
    return scale * ((a * x.square()).sum() / 2 + x[-1] * 0.3)


def plain_run(x: Tensor, steps: int, share: float, period: int, **group: Any) -> Tensor:
    """The same by plain numbers."""
    beta1, beta2 = group["betas"]
    theta, slopes = x.tolist(), CURVATURES.tolist()
    m, h = [0.0] * len(theta), [0.0] * len(theta)
    gamma = 0.0
    for step in range(1, steps + 1):
        gradient = [a * t for a, t in zip(slopes, theta, strict=True)]
        gradient[-1] += 0.3
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradient, strict=True)]
        if (step - 1) % period == 0:
            h = [beta2 * a + (1 - beta2) * b for a, b in zip(h, slopes, strict=True)]
            ranked = sorted(
                abs(a) / b / (1 - beta1**step) for a, b in zip(m, h, strict=True) if b > 0
            )
            gamma = ranked[max(0, math.ceil(share * len(ranked)) - 1)]
            gamma = torch.tensor(gamma, dtype=torch.float32).item()
        factor = gamma * (1 - beta1**step)
        for i, (a, b) in enumerate(zip(m, h, strict=True)):
            move = max(-1.0, min(1.0, a / max(factor * b, group["eps"])))
            theta[i] -= group["lr"] * (group["weight_decay"] * theta[i] + move)
    return torch.tensor(theta, dtype=DOUBLE)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.47, 0.97])
def test_fifty_steps_are_those_of_plain_numbers(
    share: float, capturable: bool, device: torch.device
) -> None:
    x = start(device)
    group = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.1}
    expected = plain_run(x, 50, share, 4, **group)
    optimizer = Sophia([x], **group, target_unclipped=share, update_period=4, capturable=capturable)
    before = x.detach().clone()
    for _ in range(50):
        optimizer.step(standard(optimizer, lambda: quadratic(x)))
    # Numbers on a device are counted in float32.
    tolerance = 1e-5 if capturable or device.type != "cpu" else 1e-6
    torch.testing.assert_close(x.detach().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert (x != before).all()


@pytest.mark.parametrize("estimator", ["hutchinson", "gnb"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_estimate_leaves_the_wanted_share_unclipped(
    estimator: Any, share: float, device: torch.device
) -> None:
    task = Task(device)
    optimizer = Sophia(
        task.model.parameters(), lr=1e-3, estimator=estimator, target_unclipped=share
    )
    for step in range(12):
        optimizer.step(standard(optimizer, task.loss))
        if step not in (0, 10):
            continue
        moments = [optimizer.state[p] for p in task.model.parameters()]
        curvature = torch.cat([state["exp_hessian"].flatten() for state in moments])
        gradient = torch.cat([state["exp_avg"].flatten() for state in moments])
        assert len({state["gamma"].item() for state in moments}) == 1
        (still,) = ((gradient == 0) & (curvature <= 0)).sum().view(1).tolist()
        positive = int((curvature > 0).sum())
        unclipped = optimizer.info.unclipped * len(curvature) - still
        assert abs(unclipped - share * positive) <= 1.5


def test_steps_do_not_depend_on_the_scale_of_the_loss() -> None:
    ends = []
    for scale in (1.0, 1e4, 1e-4):
        x = start(torch.device("cpu"))
        optimizer = Sophia([x], lr=0.01, target_unclipped=0.5, update_period=3)
        for _ in range(20):
            optimizer.step(standard(optimizer, lambda x=x, scale=scale: quadratic(x, scale)))
        ends.append(x.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-6, atol=1e-6)


def test_a_large_block_is_ranked_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_secondorder.optim.sophia, "_SAMPLE", 300)
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(100, 64))
    slopes = torch.rand(100, 64).add(0.01)
    optimizer = Sophia([x], lr=1e-3, target_unclipped=0.7)
    optimizer.step(standard(optimizer, lambda: (slopes * x.square().square()).sum()))
    assert abs(optimizer.info.unclipped - 0.7) < 0.06


def test_each_group_has_a_share_of_its_own() -> None:
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(40, dtype=DOUBLE)) for _ in range(2))
    slopes = torch.rand(40, dtype=DOUBLE) + 0.1
    groups = [{"params": [first], "target_unclipped": 0.25}, {"params": [second]}]
    optimizer = Sophia(groups, lr=1e-3, gamma=1e-9)
    optimizer.step(standard(optimizer, lambda: (slopes * (first**4 + second.square())).sum()))
    assert optimizer.info.unclipped == pytest.approx((0.25 * 40 - 1) / 80)
    assert "gamma" in optimizer.state[first] and "gamma" not in optimizer.state[second]


def test_training_goes_on_bit_for_bit(device: torch.device) -> None:
    for cut in (1, 4, 11):
        ours, theirs = Task(device), Task(device)
        options: dict[str, Any] = {"lr": 0.01, "target_unclipped": 0.8, "update_period": 5}
        optimizer = Sophia(ours.model.parameters(), **options)
        for _ in range(cut):
            optimizer.step(standard(optimizer, ours.loss))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = Sophia(theirs.model.parameters(), lr=1.0)
        theirs.model.load_state_dict(copy.deepcopy(ours.model.state_dict()))
        other.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(8):
            optimizer.step(standard(optimizer, ours.loss))
            other.step(standard(other, theirs.loss))
            assert_same(ours.model, theirs.model, 0)


def test_a_checkpoint_from_before_the_option_goes_on_with_a_fixed_factor() -> None:
    ours, theirs = Task(), Task()
    optimizer = Sophia(ours.model.parameters(), lr=0.01, gamma=2.0)
    for _ in range(3):
        optimizer.step(standard(optimizer, ours.loss))
    saved = optimizer.state_dict()
    assert not any("gamma" in state for state in saved["state"].values())
    for group in saved["param_groups"]:
        del group["target_unclipped"]
    other = Sophia(theirs.model.parameters(), lr=1.0)
    theirs.model.load_state_dict(copy.deepcopy(ours.model.state_dict()))
    other.load_state_dict(saved)
    for _ in range(3):
        optimizer.step(standard(optimizer, ours.loss))
        other.step(standard(other, theirs.loss))
        assert_same(ours.model, theirs.model, 0)


def test_the_option_may_be_set_while_training() -> None:
    task = Task()
    optimizer = Sophia(task.model.parameters(), lr=0.01, estimator="gnb", update_period=4)
    for step in range(9):
        if step == 2:
            optimizer.param_groups[0]["target_unclipped"] = 0.9
        before = values(task.model)
        optimizer.step(standard(optimizer, task.loss))
        for a, b in zip(values(task.model), before, strict=True):
            assert (a - b).abs().max() <= 0.01 * (1 + 1e-9)
    share = optimizer.info.unclipped
    assert share is not None and 0.7 < share <= 1.0


@pytest.mark.parametrize("capturable", [False, True])
def test_where_nothing_can_be_learned_the_factor_stays(capturable: bool) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    size = torch.ones(())
    optimizer = Sophia(
        [x], lr=0.1, betas=(0.0, 0.0), target_unclipped=0.5, update_period=1, capturable=capturable
    )

    def loss() -> Tensor:
        return (x.square() * torch.tensor([1.0, 2.0, 5.0])).sum() * size

    optimizer.step(standard(optimizer, loss))
    gamma = optimizer.state[x]["gamma"].item()
    assert 0 < gamma < math.inf
    for bad in (0.0, -1.0, math.nan):
        size.fill_(bad)
        optimizer.step(standard(optimizer, loss))
        assert optimizer.state[x]["gamma"].item() == gamma
        assert x.isfinite().all()
    assert optimizer.info.status is StepStatus.NONFINITE_START


def test_on_a_device_nothing_is_read_on_the_host() -> None:
    x = nn.Parameter(torch.ones(30))
    optimizer = Sophia([x], lr=0.02, update_period=2, target_unclipped=0.5, capturable=True)
    closure = standard(optimizer, lambda: (x**4).sum())
    reads = []
    for _ in range(8):
        with HostReads() as counted:
            optimizer.step(closure)
        reads.append(counted.count)
    assert reads[2:] == [0] * 6


def test_empty_parameters_and_no_gradients() -> None:
    empty, zero = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([{"params": [empty]}, {"params": [zero]}], lr=0.1, target_unclipped=0.5)
    for _ in range(2):
        optimizer.step(standard(optimizer, lambda: empty.sum() + 0 * zero.square().sum()))
    assert torch.equal(zero, torch.ones(2))
    assert optimizer.state[zero]["gamma"].item() == 0


def test_complex_and_narrow_parameters(device: torch.device) -> None:
    number = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64, device=device))
    narrow = nn.Parameter(torch.randn(8, dtype=torch.bfloat16, device=device))
    optimizer = Sophia([number, narrow], lr=1e-2, target_unclipped=0.6, update_period=2)

    def loss() -> Tensor:
        return number.abs().pow(4).sum() + narrow.float().pow(4).sum()

    before = loss().item()
    for _ in range(10):
        optimizer.step(standard(optimizer, loss))
    assert loss().item() < before
    assert optimizer.state[number]["gamma"].item() > 0


def test_labels_of_rare_classes_do_not_throw_it_off() -> None:
    """A layer most of whose curvature is zero at the first estimate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    x = torch.randint(0, 10, (32,))
    y = (x * 3) % 50

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    optimizer = Sophia(model.parameters(), lr=0.02, estimator="gnb", target_unclipped=0.9)
    before = loss().item()
    for _ in range(60):
        optimizer.step(standard(optimizer, loss))
    assert loss().item() < before / 2


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, "half"])
def test_bad_shares_are_shown(value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    for make in (
        lambda: Sophia([p], target_unclipped=value),
        lambda: Sophia([{"params": [p], "target_unclipped": value}]),
    ):
        with pytest.raises(ValueError, match="target_unclipped") as caught:
            make()
        assert repr(value) in str(caught.value)


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_secondorder.optim.sophia, "is_distributed", lambda p: True)
    with pytest.raises(ValueError, match="fully_shard cuts apart: use a fixed gamma"):
        Sophia([nn.Parameter(torch.ones(2))], target_unclipped=0.5)
