"""AdaHessian against the paper's algorithm, written down parameter by parameter."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import lr_scheduler

from tests.support.closures import standard
from tests.support.diagonal_references import (
    DEFAULTS,
    PlainAdaHessian,
    PlainAdaHessianG,
    Task,
    assert_moved,
    assert_same,
    assert_trajectories_agree,
    plain,
    values,
)
from tests.support.host_reads import HostReads
from tests.support.oracles import CASES, make_case
from torch_secondorder import AdaHessian, Sophia, StepStatus
from torch_secondorder._autograd.twice_differentiable import twice_differentiable
from torch_secondorder._optim.diagonal.blocks import nonfinite
from torch_secondorder.curvature import Hutchinson

DOUBLE = torch.float64

# A rate at which rounding does not grow by orders of magnitude over the steps.
RATE = {"lr": 0.02}

GROUPS = (
    {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
    {"hessian_power": 0.5, "average_block": 4, "lr": 0.003},
    {"average_block": None, "betas": (0.0, 0.9)},
)

OPTIONS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "defaults": ({}, ()),
    "groups": ({}, GROUPS),
    "groups, now and then": ({"update_period": 3}, GROUPS),
    "weight decay": ({"weight_decay": 0.3}, ()),
    "square root": ({"hessian_power": 0.5, "lr": 0.005}, ()),
    "power above one": ({"hessian_power": 1.5, "eps": 0.1, "lr": 0.001}, ()),
    "every third": ({"update_period": 3}, ()),
    "every tenth": ({"update_period": 10}, ()),
    "every third, square root": ({"update_period": 3, "hessian_power": 0.5, "lr": 0.005}, ()),
    "no averaging": ({"average_block": None}, ()),
    "blocks of four": ({"average_block": 4}, ()),
    "blocks with a remainder": ({"average_block": 5}, ()),
    "blocks of all": ({"average_block": 1000}, ()),
    "blocks of one": ({"average_block": 1}, ()),
    "three samples": ({"n_samples": 3}, ()),
    "nine samples": ({"n_samples": 9, "update_period": 3}, ()),
    "seed": ({"seed": 5}, ()),
    "maximize": ({"maximize": True, "lr": 0.005}, ()),
    "no memory": ({"betas": (0.0, 0.0), "lr": 0.001, "eps": 0.1}, ()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_fifty_steps_are_those_of_the_paper(name: str, device: torch.device) -> None:
    options, groups = OPTIONS[name]
    options = {**RATE, "capturable": False, **options}
    optimizer, _ = assert_trajectories_agree(
        AdaHessian, PlainAdaHessian, options, *groups, device=device
    )
    assert optimizer.info.status is StepStatus.MOVED


@pytest.mark.parametrize("name", ["groups, now and then", "three samples", "maximize"])
def test_without_looking_at_the_host_it_is_the_same(name: str, device: torch.device) -> None:
    """To float32, in which steps are counted there."""
    options, groups = OPTIONS[name]
    options = {**RATE, "capturable": True, **options}
    assert_trajectories_agree(
        AdaHessian, PlainAdaHessian, options, *groups, device=device, tolerance=1e-4
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("maximize", [False, True])
def test_fifty_steps_with_labels_drawn_from_the_model(
    samples: int, maximize: bool, device: torch.device
) -> None:
    options = {"n_samples": samples, "maximize": maximize, "update_period": 2, "lr": 0.001}
    assert_trajectories_agree(
        partial(AdaHessian, estimator="gnb"),
        PlainAdaHessianG,
        {"capturable": False, "eps": 0.1, **options},
        device=device,
    )


def test_an_estimator_that_is_given_is_used() -> None:
    p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    estimator = Hutchinson(2, distribution="gaussian")
    optimizer = AdaHessian([p], estimator=estimator)
    assert optimizer.estimator is estimator
    optimizer.step(standard(optimizer, lambda: (p**4).sum()))
    assert optimizer.info.products == 2
    assert AdaHessian([p], n_samples=3).estimator.n_samples == 3
    for bad in ("fisher", None, 3, Hutchinson):
        kind = ValueError if isinstance(bad, str) else TypeError
        with pytest.raises(kind, match=r"estimator must be one of.*gnb"):
            AdaHessian([p], estimator=bad)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_reference() -> None:
    signature = inspect.signature(AdaHessian).parameters
    defaults = {name: signature[name].default for name in DEFAULTS[PlainAdaHessian]}
    assert defaults == DEFAULTS[PlainAdaHessian]


def pair_of(*tensors: Tensor) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters twice."""
    return tuple([nn.Parameter(t.clone()) for t in tensors] for _ in range(2))  # type: ignore[return-value]


def assert_both_train(
    loss: Callable[..., Tensor],
    *tensors: Tensor,
    steps: int = 20,
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    ours, theirs = pair_of(*tensors)
    options = {**RATE, **options}
    optimizer = AdaHessian(ours, **options)
    reference = plain(PlainAdaHessian, [{"params": theirs}], options)
    for _ in range(steps):
        optimizer.step(standard(optimizer, lambda: loss(*ours)))
        reference.step(lambda: loss(*theirs))
        assert_same(ours, theirs, tolerance)
    assert_moved(ours, list(tensors))


@pytest.mark.parametrize("block", ["spatial", None, 2, 5])
@pytest.mark.parametrize("conv", [F.conv1d, F.conv2d, F.conv3d])
def test_kernels_of_any_dimension(conv: Any, block: Any, device: torch.device) -> None:
    dims = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}[conv]
    weight = torch.randn(2, 3, *[2] * dims, dtype=DOUBLE, device=device)
    bias = torch.randn(2, dtype=DOUBLE, device=device)
    x = torch.randn(2, 3, *[4] * dims, dtype=DOUBLE, device=device)
    assert_both_train(
        lambda w, b: conv(x, w, b).tanh().square().mean(),
        weight,
        bias,
        average_block=block,
        capturable=False,
    )


@pytest.mark.parametrize("block", ["spatial", None])
def test_complex_vectors_and_matrices(block: Any, device: torch.device) -> None:
    vector = torch.randn(3, dtype=torch.complex128, device=device)
    matrix = torch.randn(3, 3, dtype=torch.complex128, device=device)
    bias = torch.randn(3, dtype=DOUBLE, device=device)
    assert_both_train(
        lambda v, m, b: (m @ v + b).abs().square().square().mean() + (v.real * v.imag).sum(),
        vector,
        matrix,
        bias,
        average_block=block,
        capturable=False,
    )


def test_a_complex_matrix_is_none_the_less_for_a_complex_kernel_beside_it() -> None:
    matrix, kernel = torch.randn(2, 2, dtype=torch.complex128), torch.randn(2, 2, 3).cdouble()
    weight = torch.randn(2, 2, 2, dtype=DOUBLE)

    def loss(m: Tensor, *_: Tensor) -> Tensor:
        return (weight * torch.view_as_real(m) ** 4).sum()

    alone, beside = nn.Parameter(matrix.clone()), nn.Parameter(matrix.clone())
    kernel = nn.Parameter(kernel)
    first, second = AdaHessian([alone]), AdaHessian([beside, kernel])
    first.step(standard(first, lambda: loss(alone)))
    second.step(standard(second, lambda: loss(beside) + kernel.abs().square().sum()))
    assert_same([alone], [beside])


def test_blocks_of_a_complex_matrix_are_of_neighbors() -> None:
    """Of as many entries as were asked for, real and imaginary parts by themselves."""
    matrix = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))
    curvature = torch.arange(1.0, 9.0, dtype=DOUBLE).view(2, 2, 2)
    optimizer = AdaHessian([matrix], average_block=4, betas=(0.9, 0.0))

    def loss() -> Tensor:
        return (curvature * torch.view_as_real(matrix).square()).sum() / 2

    optimizer.step(standard(optimizer, loss))
    roots = optimizer.state[matrix]["exp_hessian"].sqrt().flatten()
    expected = torch.tensor([4.0, 5.0] * 4, dtype=DOUBLE)
    torch.testing.assert_close(roots, expected)


def test_a_number_and_a_vector_of_one() -> None:
    assert_both_train(
        lambda a, b: (a - 2).square() * b.square().sum() + b.sum(),
        torch.tensor(1.0, dtype=DOUBLE),
        torch.tensor([1.5], dtype=DOUBLE),
        average_block=3,
    )


@pytest.mark.parametrize("name", CASES)
def test_models_of_any_kind(name: str, device: torch.device) -> None:
    """Attention, recurrence, and losses with derivatives inside among them."""
    ours, theirs = make_case(name, device), make_case(name, device)
    options = {**RATE, "update_period": 2, "capturable": False}
    optimizer = AdaHessian(ours.params(), **options)
    reference = plain(PlainAdaHessian, [{"params": theirs.params()}], options)

    def value() -> Tensor:
        with twice_differentiable():
            return theirs.value()

    for _ in range(8):
        optimizer.step(ours.closure())
        reference.step(value)
    assert_same(ours.model, theirs.model, 1e-11)


@pytest.mark.parametrize("period", [1, 3])
def test_sparse_gradients(period: int, device: torch.device) -> None:
    tokens = torch.tensor([[1, 2, 2], [0, 4, 1]], device=device)

    def trained(sparse: bool) -> list[Tensor]:
        torch.manual_seed(1)
        embedding, linear = nn.Embedding(5, 2, sparse=sparse), nn.Linear(2, 2)
        model = nn.Sequential(embedding, linear).to(device, DOUBLE)
        optimizer = AdaHessian(model.parameters(), **RATE, update_period=period)
        for _ in range(5):
            optimizer.step(standard(optimizer, lambda: model(tokens).pow(4).sum()))
        return values(model)

    assert_same(trained(True), trained(False))


# How memory is laid out, and who owns it.


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_channels_last_is_a_layout_and_no_other_model(kind: Any, device: torch.device) -> None:
    def trained(layout: torch.memory_format) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Conv2d(3, 4, 3).to(device, DOUBLE).to(memory_format=layout)
        x = torch.randn(2, 3, 5, 5, dtype=DOUBLE, device=device)
        optimizer = kind(model.parameters(), lr=0.02)
        for _ in range(5):
            optimizer.step(standard(optimizer, lambda: model(x).tanh().square().mean()))
        return values(model)

    assert_same(trained(torch.channels_last), trained(torch.contiguous_format))


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_a_transposed_parameter(kind: Any, device: torch.device) -> None:
    start = torch.randn(3, 4, dtype=DOUBLE, device=device)
    weight = torch.rand(3, 4, dtype=DOUBLE, device=device)

    def trained(p: Tensor) -> Tensor:
        p.requires_grad_()
        optimizer = kind([p], lr=0.02)
        for _ in range(5):
            optimizer.step(standard(optimizer, lambda: (weight * p**4).sum()))
        return p

    transposed = start.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert_same([trained(transposed)], [trained(start.clone())])


def set_through_data(params: list[nn.Parameter]) -> None:
    for p in params:
        p.data = p.data.clone()


def set_through_a_vector(params: list[nn.Parameter]) -> None:
    vector_to_parameters(parameters_to_vector(params).detach(), params)


@pytest.mark.parametrize("set_", [set_through_data, set_through_a_vector])
@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_parameters_may_get_new_memory_between_steps(kind: Any, set_: Any) -> None:
    ours, theirs = Task(), Task()
    first, second = (kind(task.model.parameters(), lr=0.02) for task in (ours, theirs))
    for _ in range(4):
        first.step(standard(first, ours.loss))
        second.step(standard(second, theirs.loss))
        set_(list(ours.model.parameters()))
    assert_same(ours.model, theirs.model)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_a_model_that_is_widened_between_steps_goes_on(kind: Any) -> None:
    model = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    optimizer = kind(model.parameters(), lr=0.02)
    optimizer.step(standard(optimizer, lambda: model(x).square().sum()))
    model.double()
    before = values(model)
    optimizer.step(standard(optimizer, lambda: model(x.double()).square().sum()))
    assert_moved(values(model), before)


# Precision.


def test_float32(device: torch.device) -> None:
    ours, theirs = Task(device, torch.float32), Task(device, torch.float32)
    optimizer = AdaHessian(ours.model.parameters(), **RATE)
    reference = plain(PlainAdaHessian, [{"params": theirs.model.parameters()}], RATE)
    for _ in range(30):
        optimizer.step(standard(optimizer, ours.loss))
        reference.step(theirs.loss)
    assert_same(ours.model, theirs.model, 1e-3)
    assert {s["exp_hessian"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert not any("master" in s for s in optimizer.state.values())


@pytest.mark.parametrize("period", [1, 3])
def test_bfloat16_keeps_float32_copies(period: int, device: torch.device) -> None:
    start = torch.linspace(0.5, 1.5, 12, device=device).bfloat16().view(3, 4)
    options = {"lr": 1e-3, "update_period": period, "weight_decay": 0.1}
    ours, theirs = pair_of(start)
    optimizer = AdaHessian(ours, **options)
    reference = plain(PlainAdaHessian, [{"params": theirs}], options)
    for _ in range(40):
        optimizer.step(standard(optimizer, lambda: ours[0].square().sum()))
        reference.step(lambda: theirs[0].square().sum())
    state = optimizer.state[ours[0]]
    assert {state[n].dtype for n in ("exp_avg", "exp_hessian", "master")} == {torch.float32}
    assert torch.equal(state["master"].bfloat16(), ours[0])
    torch.testing.assert_close(state["master"], reference.state[theirs[0]]["theta"])


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_resolution_add_up(
    kind: Any, dtype: torch.dtype, device: torch.device
) -> None:
    p = nn.Parameter(torch.full((3,), 100.0, dtype=dtype, device=device))
    rate = 1e-2 if dtype is torch.bfloat16 else 1e-3
    optimizer = kind([p], lr=rate)
    # A gradient as large as curvature: AdaHessian moves by the rate; and Sophia always.
    for _ in range(200):
        optimizer.step(standard(optimizer, lambda: ((p - 99) ** 2).sum() / 2))
    moved = 100.0 - p.detach().float()
    assert float(moved.mean()) == pytest.approx(200 * rate, rel=0.7)
    assert (moved > 0).all()


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_a_narrow_parameter_that_was_set_counts(kind: Any) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = kind([p], lr=1e-3)
    for _ in range(3):
        optimizer.step(standard(optimizer, lambda: (p**2).sum()))
    with torch.no_grad():
        p.copy_(torch.tensor([5.0, 1.0, -7.0]))
    optimizer.step(standard(optimizer, lambda: (p**2).sum()))
    torch.testing.assert_close(
        optimizer.state[p]["master"], torch.tensor([5.0, 1.0, -7.0]), rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("period", [1, 3])
def test_a_mix_of_dtypes(period: int, device: torch.device) -> None:
    tensors = [
        torch.randn(3, dtype=torch.float32, device=device),
        torch.randn(3, 2, dtype=DOUBLE, device=device),
        torch.randn(2, dtype=torch.complex64, device=device),
        torch.randn(4, dtype=DOUBLE, device=device),
    ]

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        product = a.double() @ b * (c.abs().double() + 1)
        return product.square().sum().log1p() + d.tanh().square().sum() * product.cos().sum()

    assert_both_train(loss, *tensors, tolerance=1e-4, update_period=period)


@pytest.mark.parametrize("capturable", [False, True])
def test_first_moments_are_not_touched_by_the_curvature(
    capturable: bool, device: torch.device
) -> None:
    """However large it is beside them."""
    p = nn.Parameter(torch.tensor([1e-12], dtype=DOUBLE, device=device))
    optimizer = AdaHessian([p], lr=0.0, capturable=capturable)
    for _ in range(50):
        optimizer.step(standard(optimizer, lambda: (1e12 * p**2 / 2).sum()))
    expected = 1 - 0.9**50
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_numbers_on_the_device_are_those_of_the_host(
    kind: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """Both work them out in double precision, `1 - 0.999**t` among them."""
    results = []
    for capturable in (False, True):
        start = torch.tensor([1.0, -2.0, 0.5], dtype=dtype, device=device)
        p = nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.02, weight_decay=0.3, update_period=2, capturable=capturable)
        for _ in range(6):
            optimizer.step(standard(optimizer, lambda p=p: (p**4).sum()))
        results.append(p.detach())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=20 * eps, atol=0.0)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_bad_step_on_the_device_does_not_count(
    kind: Any, steps_before: int, device: torch.device
) -> None:
    """Without any curvature the next step estimates, as where the host decides."""
    p = nn.Parameter(torch.ones(3, dtype=DOUBLE, device=device))
    optimizer = kind([p], lr=0.02, update_period=100, capturable=True)
    for _ in range(3):
        optimizer.step(standard(optimizer, lambda: (p**4).sum() * math.nan))
        assert optimizer.curvature_due and torch.equal(p, torch.ones_like(p))
    for _ in range(steps_before):
        optimizer.step(standard(optimizer, lambda: (p**4).sum()))
    assert bool((p < 1).all()) is (steps_before > 0)
    copied = kind([p], lr=0.02, update_period=100, capturable=True)
    copied.load_state_dict(optimizer.state_dict())
    assert copied.curvature_due is optimizer.curvature_due


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_the_device_wait_for_it_once(kind: Any, dtype: torch.dtype) -> None:
    """Whether there is any curvature; from then on not at all."""
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = kind([p], lr=0.02, update_period=2, weight_decay=0.1, capturable=True)
    closure = standard(optimizer, lambda: (p**4).sum())
    reads = []
    for _ in range(8):
        with HostReads() as counted:
            optimizer.step(closure)
        reads.append(counted.count)
    assert reads[2:] == [0] * 6 and sum(reads[:2]) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1.0])
def test_what_is_not_finite_is_found(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    tensors = [torch.ones(2, 2), torch.zeros(0), torch.tensor([1.0, bad, 3.0])]
    tensors = [t.to(device, dtype) for t in tensors]
    assert bool(nonfinite(tensors)) is (bad != 1.0)
    scale = torch.tensor(1 / 3, device=device)
    assert bool(nonfinite(tensors, scale)) is (bad != 1.0)
    torch.testing.assert_close(tensors[0], torch.full_like(tensors[0], 1 / 3))


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_default_dtype_does_not_matter(kind: Any, dtype: torch.dtype, capturable: bool) -> None:
    def trained() -> Tensor:
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = kind([p], lr=0.02, capturable=capturable)
        for _ in range(3):
            optimizer.step(standard(optimizer, lambda: (p**4).sum()))
        return p.detach()

    expected = trained()
    torch.set_default_dtype(DOUBLE)
    try:
        found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


# Parameters that come, go, and rest.


@pytest.mark.parametrize("period", [1, 3])
def test_frozen_and_thawed_between_steps(period: int, device: torch.device) -> None:
    options = {**RATE, "update_period": period, "capturable": False}
    ours, theirs = Task(device), Task(device)
    optimizer = AdaHessian(ours.groups(), **options)
    reference = plain(PlainAdaHessian, theirs.groups(), options)
    for step in range(20):
        for task in (ours, theirs):
            task.model.embedding.weight.requires_grad_(step % 7 > 2)
            task.model.layernorm.bias.requires_grad_(step < 10)
            task.model.linear.weight.requires_grad_(step >= 5)
        optimizer.step(standard(optimizer, ours.loss))
        reference.step(theirs.loss)
        assert_same(ours.model, theirs.model)


@pytest.mark.parametrize("period", [1, 3])
def test_a_parameter_without_gradient_in_some_steps(period: int) -> None:
    tensors = [torch.linspace(0.5, 1.5, n, dtype=DOUBLE) for n in (2, 3, 2)]
    ours, theirs = pair_of(*tensors)
    options = {**RATE, "update_period": period}
    optimizer = AdaHessian(ours, **options)
    reference = plain(PlainAdaHessian, [{"params": theirs}], options)

    for step in range(20):

        def loss(p: list[nn.Parameter], step: int = step) -> Tensor:
            used = [q for i, q in enumerate(p) if i == 0 or (step + i) % 4]
            return torch.stack([(q**4).sum() for q in used]).sum().log1p()

        optimizer.step(standard(optimizer, lambda: loss(ours)))
        reference.step(lambda: loss(theirs))
        assert_same(ours, theirs)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "thawed"])
def test_what_has_no_gradient_may_be_frozen_or_thawed(kind: Any, freeze: bool) -> None:
    """The others keep their gradients, and change their places."""

    def trained(change: bool) -> list[Tensor]:
        idle, *others = (nn.Parameter(torch.full((2,), v, dtype=DOUBLE)) for v in (1.0, 2.0, 3.0))
        idle.requires_grad_(freeze)
        groups = [{"params": [p]} for p in (idle, *others)]
        optimizer = kind(groups, lr=0.1, update_period=1)  # else what is thawed has one made

        def loss() -> Tensor:
            return (others[0] ** 3).sum() - 5 * (others[1] ** 3).sum()

        for step in range(4):
            if change and step == 2:
                idle.requires_grad_(not freeze)
            optimizer.step(standard(optimizer, loss))
        return values(others)

    assert_same(trained(True), trained(False))  # whatever the signs: the Hessian is diagonal


def test_the_first_steps_all_estimate() -> None:
    """One noisy estimate would lead astray until the next."""
    for period, expected in ((1, [0, 1, 2]), (3, [0, 1, 2, 3, 6]), (15, [*range(10), 15])):
        p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        optimizer = AdaHessian([p], update_period=period)
        due = []
        for step in range(expected[-1] + 1):
            due += [step] if optimizer.curvature_due else []
            optimizer.step(standard(optimizer, lambda p=p: (p**4).sum()))
        assert due == expected


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_a_parameter_that_is_added_gets_a_curvature_at_once(kind: Any, capturable: bool) -> None:
    first, late = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    optimizer = kind([first], update_period=3, lr=0.1, capturable=capturable)

    def step() -> list[Tensor]:
        before = values([first, late])
        optimizer.step(standard(optimizer, lambda: (first**4).sum() + (late**4).sum()))
        return [q - p for p, q in zip(before, values([first, late]), strict=True)]

    for _ in range(4):  # the fourth estimates
        step()
    assert not optimizer.curvature_due
    optimizer.add_param_group({"params": [late], "lr": 0.05})
    assert optimizer.curvature_due
    moved = step()
    assert moved[0].all() and moved[1].all()
    assert optimizer.info.status is StepStatus.MOVED
    # As if it had never been there before.
    fresh = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    other = kind([fresh], lr=0.05, capturable=capturable)
    other.step(standard(other, lambda: (fresh**4).sum()))
    assert_same([late], [fresh])


def test_the_added_group_has_the_trajectory_of_the_paper() -> None:
    tensors = [torch.linspace(0.5, 1.5, n, dtype=DOUBLE) for n in (2, 3)]
    ours, theirs = pair_of(*tensors)
    options = {**RATE, "update_period": 3}
    optimizer = AdaHessian(ours[:1], **options)
    reference = plain(PlainAdaHessian, [{"params": theirs[:1]}], options)

    def loss(p: list[nn.Parameter]) -> Tensor:
        return ((p[0] ** 4).sum() * (p[1] ** 2).sum()).log1p()

    for step in range(20):
        if step == 4:
            optimizer.add_param_group({"params": ours[1:], "lr": 0.01})
            reference.groups.append({**reference.groups[0], "params": theirs[1:], "lr": 0.01})
        optimizer.step(standard(optimizer, lambda: loss(ours)))
        reference.step(lambda: loss(theirs))
        assert_same(ours, theirs)
    assert_moved(ours, tensors)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_where_all_wait_the_curvature_comes(kind: Any, capturable: bool) -> None:
    """What was trained is frozen, and the rest thawed, as from one layer to the next."""
    first, second = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    second.requires_grad_(False)
    optimizer = kind([first, second], lr=0.1, update_period=3, capturable=capturable)
    closure = standard(optimizer, lambda: (first**2 + second**2).sum())
    optimizer.step(closure)
    first.requires_grad_(False)
    second.requires_grad_(True)
    reports = []
    for _ in range(3):
        before = values([second])
        optimizer.step(closure)
        moved = not torch.equal(second, before[0])
        reports.append(optimizer.info.iterations == moved)
    assert (second < 1).all()
    assert all(reports)


STEPS = ("step", "no closure")
EVENTS = (*STEPS, "freeze", "thaw", "use", "rest", "set", "new memory", "rate", "reload")


@given(
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3)), min_size=3, max_size=14),
    period=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_sequence_of_events(events: list[tuple[str, int]], period: int) -> None:
    """The Hessian is diagonal, so that probes do not matter."""
    torch.manual_seed(4)
    start = [torch.rand(n, dtype=DOUBLE) + 0.5 for n in (2, 3, 2, 4)]
    ours, theirs = pair_of(*start)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01, "weight_decay": 0.1}]

    options = {**RATE, "update_period": period}
    optimizer = AdaHessian(groups(ours), **options)
    reference = plain(PlainAdaHessian, groups(theirs), options)
    used = [True] * 4

    def loss(params: list[nn.Parameter]) -> Tensor:
        return torch.stack([(p**4).sum() for p, u in zip(params, used, strict=True) if u]).sum()

    for event, i in [*events, ("step", 0)]:
        if event in STEPS:
            if not any(p.requires_grad and u for p, u in zip(ours, used, strict=True)):
                continue
            for _ in range(2):
                seen = [
                    reference.state.get(p, {"s": 0})["s"]
                    for p, u in zip(theirs, used, strict=True)
                    if u and p.requires_grad
                ]
                if not optimizer.curvature_due and not any(seen):
                    break  # when the curvature is due then is the optimizer's affair
                if event == "step":
                    optimizer.step(standard(optimizer, lambda: loss(ours)))
                else:
                    optimizer.zero_grad()
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="Using backward")
                        loss(ours).backward(create_graph=optimizer.curvature_due)
                    optimizer.step()
                reference.step(lambda: loss(theirs))
                assert_same(ours, theirs, 1e-11)
        elif event in ("freeze", "thaw"):
            for params in (ours, theirs):
                params[i].requires_grad_(event == "thaw")
        elif event in ("use", "rest"):
            used[i] = event == "use"
        elif event == "set":
            for params in (ours, theirs):
                with torch.no_grad():
                    params[i].fill_(1.0)
        elif event == "new memory":
            ours[i].data = ours[i].data.clone()
        elif event == "rate":
            for groups_ in (optimizer.param_groups, reference.groups):
                groups_[i % 2]["lr"] = 0.005 * (1 + i)
        else:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AdaHessian(groups(ours), **options)
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_cleared_state_is_a_new_start(kind: Any) -> None:
    p = nn.Parameter(torch.full((3,), 2.0, dtype=DOUBLE))
    optimizer = kind([p], lr=0.1)
    closure = standard(optimizer, lambda: (p**4).sum())
    for _ in range(3):
        optimizer.step(closure)
    optimizer.state.clear()
    while not optimizer.curvature_due:
        optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_groups_that_were_put_in_the_place_of_others_count(kind: Any) -> None:
    p = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    optimizer = kind([p], lr=0.1)
    closure = standard(optimizer, lambda: (p**2).sum())
    optimizer.step(closure)
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.0}]
    before = values([p])
    optimizer.step(closure)
    assert_same([p], before, 0)


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_a_parameter_that_changes_its_group_gets_the_rate_there(kind: Any) -> None:
    first, second = (nn.Parameter(torch.ones(1, dtype=DOUBLE)) for _ in range(2))
    optimizer = kind([{"params": [first]}, {"params": [second], "lr": 0.0}], lr=0.1)
    closure = standard(optimizer, lambda: (first**2 + second**2).sum())
    optimizer.step(closure)
    assert second.item() == 1.0
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    del optimizer.param_groups[1]
    optimizer.step(closure)
    assert second.item() < 1.0


# Rates.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 2e-2, 12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
}


def test_all_schedulers_are_tested() -> None:
    assert set(SCHEDULERS) | {"LRScheduler"} >= set(lr_scheduler.__all__)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, as_tensor: bool) -> None:
    if not hasattr(lr_scheduler, name):
        pytest.skip(f"no {name} in this version")
    torch.manual_seed(2)
    start = torch.randn(3, 4, dtype=DOUBLE)
    ours, theirs = pair_of(start)
    rate = torch.tensor(0.02, dtype=DOUBLE) if as_tensor else 0.02
    optimizer = AdaHessian(ours, lr=rate, update_period=2)
    reference = plain(PlainAdaHessian, [{"params": theirs}], {"update_period": 2})
    scheduler = SCHEDULERS[name](optimizer)
    rates, betas = set(), set()

    def loss(p: list[nn.Parameter]) -> Tensor:
        return (p[0] ** 2).sum().log1p() + p[0].cos().sum()

    for _ in range(12):
        group = optimizer.param_groups[0]
        for hyperparameter in DEFAULTS[PlainAdaHessian]:
            value = group[hyperparameter]
            reference.groups[0][hyperparameter] = float(value) if value is rate else value
        rates.add(float(group["lr"]))
        betas.add(group["betas"])
        value = optimizer.step(standard(optimizer, lambda: loss(ours)))
        reference.step(lambda: loss(theirs))
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        assert_same(ours, theirs)
    assert len(rates) > 1
    assert (len(betas) > 1) is (name in ("CyclicLR", "OneCycleLR"))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_rate_that_is_a_tensor(capturable: bool, device: torch.device) -> None:
    def trained(rate: Any) -> list[Tensor]:
        task = Task(device)
        optimizer = AdaHessian(
            task.model.parameters(), lr=rate, weight_decay=0.1, capturable=capturable
        )
        for _ in range(4):
            optimizer.step(standard(optimizer, task.loss))
        return values(task.model)

    # By half a number that float32 has as well.
    assert_same(trained(torch.tensor(0.03125, device=device)), trained(0.03125), 1e-7)


def test_a_rate_of_zero_keeps_the_parameters_and_counts() -> None:
    task = Task()
    before = values(task.model)
    optimizer = AdaHessian(task.model.parameters(), lr=0.0, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(standard(optimizer, task.loss))
    assert_same(task.model, before, 0)
    assert optimizer.state[task.model.linear.weight]["step"] == 3


# What it is for.


def test_scales_of_coordinates_do_not_matter() -> None:
    """A diagonal quadratic is solved in one step, signs and negative curvature aside."""
    scales = torch.tensor([1e-2, 1.0, 1e4], dtype=DOUBLE)
    p = nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=DOUBLE))
    optimizer = AdaHessian([p], lr=1.0, eps=1e-14)
    optimizer.step(standard(optimizer, lambda: (scales * p**2).sum()))
    assert p.abs().max() < 1e-11


def test_negative_curvature_is_left_along_the_gradient() -> None:
    p = nn.Parameter(torch.tensor([0.1, 0.1], dtype=DOUBLE))
    optimizer = AdaHessian([p], lr=0.1)
    optimizer.step(standard(optimizer, lambda: p[0] ** 2 - p[1] ** 2))
    assert p[0] < 0.1 < p[1]


# What is refused.

BAD: dict[str, list[Any]] = {
    "lr": [-0.1, math.inf, "fast"],
    "betas": [(0.9,), (1.0, 0.9), (0.9, -0.1), 0.9, (0.9, math.nan)],
    "eps": [0.0, -1.0, math.nan],
    "weight_decay": [-1.0, math.inf],
    "hessian_power": [-0.5, math.nan],
    "update_period": [0, -1, 1.5, "often"],
    "average_block": [0, -2, 1.5, "all", True],
    "accumulation_steps": [0, 2.5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, bad in BAD.items() for value in bad]
)
def test_bad_numbers_are_shown(name: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    for make in (
        lambda: AdaHessian([p], **{name: value}),
        lambda: AdaHessian([{"params": [p], name: value}]),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            make()
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "two"])
def test_bad_numbers_of_samples(value: Any) -> None:
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1") as caught:
        AdaHessian([nn.Parameter(torch.ones(2))], n_samples=value)
    assert repr(value) in str(caught.value)


def test_numbers_that_were_written_to_the_groups_are_checked_before_anything_moves() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([p])
    optimizer.param_groups[0]["eps"] = 0.0
    called = []
    with pytest.raises(ValueError, match="eps must be a finite number above 0"):
        optimizer.step(partial(called.append, 1))
    assert not called
    assert torch.equal(p, torch.ones(2))
