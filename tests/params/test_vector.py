"""Parameters to one flat vector and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_secondorder._params.space import max_norm, to_host
from torch_secondorder._params.vector import ParameterVector, check_parameters

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
]


def parameter_lists() -> st.SearchStrategy[list[torch.Tensor]]:
    shapes = st.lists(st.integers(1, 4), max_size=3)
    one = st.tuples(shapes, st.sampled_from(DTYPES))
    return st.lists(one, min_size=1, max_size=5).map(
        lambda kinds: [torch.randn(shape, dtype=torch.complex128).to(dtype)
                       if dtype.is_complex else torch.randn(shape).to(dtype)
                       for shape, dtype in kinds]
    )  # fmt: skip


@settings(deadline=None)
@given(parameter_lists())
def test_reading_then_writing_changes_nothing(params: list[torch.Tensor]) -> None:
    before = [p.clone() for p in params]
    vector = ParameterVector(params)
    flat = vector.read()
    assert flat.shape == (vector.size,)
    assert flat.dtype in (torch.float32, torch.float64)
    vector.write(torch.zeros_like(flat))
    assert all((p == 0).all() for p in params)
    vector.move(flat)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@settings(deadline=None)
@given(parameter_lists())
def test_gather_is_the_adjoint_of_split(params: list[torch.Tensor]) -> None:
    """<gather(t), v> = sum of Re<t, split(v)>, which is what makes gradients and steps agree."""
    vector = ParameterVector(params)
    grads = [torch.randn_like(p) for p in params]
    v = torch.ones(vector.size, dtype=vector.dtype)  # exact in every dtype
    direct = sum(
        (torch.view_as_real(g).double().sum() if g.is_complex() else g.double().sum())
        for g in grads
    )
    assert math.isclose(vector.gather(grads) @ v, direct, rel_tol=1e-4, abs_tol=1e-4)
    pieces = vector.split(v)
    for piece, p in zip(pieces, params, strict=True):
        assert piece.shape == p.shape and piece.dtype == p.dtype


def test_gather_copies_even_a_single_tensor() -> None:
    p = torch.zeros(3)
    grad = torch.ones(3)
    flat = ParameterVector([p]).gather([grad])
    grad.mul_(5)
    assert torch.equal(flat, torch.ones(3))


def test_missing_and_sparse_gradients() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    unused = nn.Parameter(torch.ones(2))
    embedding(torch.tensor([1, 1])).sum().backward()
    flat = ParameterVector([embedding.weight, unused]).gather([embedding.weight.grad, None])
    assert flat.tolist() == [0, 0, 2, 2, 0, 0, 0, 0, 0, 0]


def test_batched_gather_and_split_are_rows_of_the_single_ones() -> None:
    params = [torch.randn(2, 3), torch.randn(2, dtype=torch.complex64), torch.randn(())]
    vector = ParameterVector(params)
    rows = torch.randn(4, vector.size)
    pieces = vector.split(rows)
    for i, row in enumerate(rows):
        for batch, one in zip(pieces, vector.split(row), strict=True):
            assert torch.equal(batch[i], one)
    assert torch.equal(vector.gather(pieces, batch=(4,)), rows)


def test_the_work_dtype_is_the_widest_and_at_least_float32() -> None:
    def dtype(*dtypes: torch.dtype) -> torch.dtype:
        return ParameterVector([torch.zeros(1, dtype=d) for d in dtypes]).dtype

    assert dtype(torch.bfloat16) is torch.float32
    assert dtype(torch.float16, torch.bfloat16) is torch.float32
    assert dtype(torch.float32, torch.float64) is torch.float64
    assert dtype(torch.complex128, torch.float32) is torch.float64
    assert dtype(torch.complex64) is torch.float32


def test_the_scale_is_a_change_of_variables() -> None:
    a, b = torch.zeros(2), torch.zeros(1)
    vector = ParameterVector([a, b], scale=[1.0, 0.5])
    assert vector.scaled(torch.ones(3)).tolist() == [1, 1, 0.5]
    assert not vector.matches([a, b], None)
    assert vector.matches([a, b], [1.0, 0.5])


def test_a_master_copy_holds_what_bfloat16_cannot() -> None:
    p = torch.ones(2, dtype=torch.bfloat16)
    vector = ParameterVector([p])
    assert vector.needs_master and not ParameterVector([torch.ones(2)]).needs_master
    position = torch.tensor([1.0001, 1.0])
    vector.write(position)
    assert torch.equal(p, torch.ones(2, dtype=torch.bfloat16))
    assert torch.equal(vector.read(position), position)
    p[1] = 3  # loaded from outside: the master is out of date there
    assert vector.read(position).tolist() == [position[0].item(), 3.0]


def test_moving_leaves_version_counters_alone_and_writing_does_not() -> None:
    p = nn.Parameter(torch.ones(2))
    vector = ParameterVector([p])
    version = p._version
    vector.move(torch.zeros(2))
    assert p._version == version and p.tolist() == [0, 0]
    vector.write(torch.ones(2))
    assert p._version > version


def test_matches_notices_replaced_data() -> None:
    p = nn.Parameter(torch.ones(2))
    vector = ParameterVector([p])
    assert vector.matches([p], None)
    p.data = p.data.double()
    assert not vector.matches([p], None)
    p.data = torch.ones(3)
    assert not vector.matches([p], None)
    assert not vector.matches([p, p], None)


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.zeros(2), 3], TypeError, "parameter 1 is a int"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, r"shape \(2,\) has dtype torch.int64"),
        ([torch.zeros(0, 3)], ValueError, r"shape \(0, 3\) is empty"),
    ],
)
def test_bad_parameters(params: list, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_parameters(params)


def test_a_lazy_parameter_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="run one forward pass"):
        check_parameters(list(nn.LazyLinear(3).parameters()))


def test_host_numbers(device: torch.device) -> None:
    v = torch.tensor([1.0, -3.0, 2.0], device=device)
    assert to_host(max_norm(v), v.double() @ v.double()) == [3.0, 14.0]
    assert math.isnan(to_host(max_norm(torch.tensor([1.0, math.nan], device=device)))[0])


def test_several_devices(device: torch.device) -> None:
    a, b = torch.ones(3, device=device), torch.zeros(1)
    vector = ParameterVector([a, b])
    assert vector.device.type == device.type
    assert vector.read().tolist() == [1, 1, 1, 0]
    vector.write(torch.arange(4.0, device=vector.device))
    assert a.tolist() == [0, 1, 2] and b.tolist() == [3]


def test_numbers_of_several_dtypes_come_together(device: torch.device) -> None:
    numbers = [torch.tensor(x, device=device) for x in (2.5, 3, True)]
    numbers.append(torch.tensor(0.1, dtype=torch.float64, device=device))
    assert to_host(*numbers) == [2.5, 3, 1, 0.1]
    assert to_host(numbers[1], numbers[2]) == [3, 1]
