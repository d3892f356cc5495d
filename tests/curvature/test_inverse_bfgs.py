"""The compact inverse BFGS matrix against the two textbook forms of it."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.curvature.inverse_bfgs import _BLOCK

Pair = tuple[Tensor, Tensor]
HISTORY_SIZES = [1, 2, 3, 5, 8, 20]


def make_pairs(
    count: int, size: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Pair]:
    """Pairs of a slowly changing diagonal curvature between 1 and 100: s'y > 0."""
    generator = torch.Generator().manual_seed(count)
    curvature = torch.logspace(0, 2, size, dtype=torch.float64)
    pairs = []
    for _ in range(count):
        s = torch.randn(size, dtype=torch.float64, generator=generator)
        noise = torch.rand(size, dtype=torch.float64, generator=generator)
        y = curvature * (0.8 + 0.4 * noise) * s
        pairs.append((s.to(device, dtype), y.to(device, dtype)))
    return pairs


def gamma_of(pairs: Sequence[Pair]) -> Tensor:
    scales = torch.stack([s @ y / (y @ y) for s, y in pairs])
    return torch.minimum(scales.max(), 5 * scales[-1])


def two_loops(pairs: Sequence[Pair], v: Tensor) -> Tensor:
    """Nocedal and Wright 2006, algorithm 7.4."""
    q, alphas = v.clone(), []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (s @ y))
        q = q - alphas[-1] * y
    r = gamma_of(pairs) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + (alpha - y @ r / (s @ y)) * s
    return r


def product_form(pairs: Sequence[Pair]) -> Tensor:
    """Nocedal and Wright 2006, equation 6.17, from `gamma I`."""
    eye = torch.eye(len(pairs[0][0]), dtype=pairs[0][0].dtype, device=pairs[0][0].device)
    h = gamma_of(pairs) * eye
    for s, y in pairs:
        rho = 1 / (s @ y)
        v = eye - rho * torch.outer(y, s)
        h = v.T @ h @ v + rho * torch.outer(s, s)
    return h


def filled(pairs: Sequence[Pair], history_size: int) -> InverseBFGS:
    s = pairs[0][0]
    inverse = InverseBFGS(len(s), history_size, s.dtype, s.device)
    for pair in pairs:
        inverse.push(*pair)
    return inverse


def dense(inverse: InverseBFGS, device: torch.device) -> Tensor:
    return inverse @ torch.eye(inverse.size, dtype=torch.float64, device=device)


def assert_near(ours: Tensor, reference: Tensor, relative: float) -> None:
    assert torch.linalg.vector_norm(ours - reference) <= relative * torch.linalg.vector_norm(
        reference
    )


def test_without_pairs_it_is_the_identity(device: torch.device) -> None:
    v = torch.randn(5, device=device)
    inverse = InverseBFGS(5, 3, device=device)
    assert torch.equal(inverse @ v, v)
    assert torch.equal(inverse.direction(v), -v)


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("m", HISTORY_SIZES)
def test_against_both_textbook_forms(m: int, every: int, device: torch.device) -> None:
    """Growing and wrapping several times, with one, two or seven pushes between products."""
    size = 24
    pairs = make_pairs(4 * m + 3, size, device)
    inverse = InverseBFGS(size, m, torch.float64, device)
    for i, pair in enumerate(pairs, start=1):
        inverse.push(*pair)
        held = pairs[max(0, i - m) : i]
        assert inverse.count == len(held)
        if i % every:
            continue
        v = torch.randn(size, dtype=torch.float64, device=device)
        assert_near(inverse @ v, two_loops(held, v), 1e-10)
        assert_near(inverse.direction(v), -two_loops(held, v), 1e-10)
        assert_near(dense(inverse, device), product_form(held), 1e-10)


@pytest.mark.parametrize("m", [3, 20])
def test_errors_do_not_pile_up(m: int, device: torch.device) -> None:
    """Thousands of pairs in a row, many of them nearly parallel, over scales of eight decades."""
    generator = torch.Generator().manual_seed(1)
    curvature = torch.logspace(-4, 4, 30, dtype=torch.float64)
    main = torch.randn(30, dtype=torch.float64, generator=generator)
    inverse, pairs = InverseBFGS(30, m, torch.float64, device), []
    for i in range(3000):
        s = main * (i % 3) + 0.1 * torch.randn(30, dtype=torch.float64, generator=generator)
        s = s * 10.0 ** (i % 7 - 3)
        pairs = [*pairs[-m + 1 :], (s.to(device), (curvature * s).to(device))]
        inverse.push(*pairs[-1])
        if i % 2:
            _ = inverse @ pairs[0][1]
    v = torch.randn(30, dtype=torch.float64, generator=generator).to(device)
    # What the same pairs give without a past; itself no better than they are conditioned.
    fresh = filled(pairs, m) @ v
    error = torch.linalg.vector_norm(fresh - two_loops(pairs, v))
    drift = torch.linalg.vector_norm(inverse @ v - fresh)
    assert drift <= 10 * error + 1e-12 * torch.linalg.vector_norm(fresh)


@pytest.mark.parametrize("pushes", [1, 4, 5, 11])
def test_symmetric_positive_definite_and_secant(pushes: int, device: torch.device) -> None:
    pairs = make_pairs(pushes, 12, device)
    inverse = filled(pairs, 5)
    h = dense(inverse, device)
    torch.testing.assert_close(h, h.T, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(h).min() > 0
    s, y = pairs[-1]
    assert_near(inverse @ y, s, 1e-10)


@pytest.mark.parametrize("m", HISTORY_SIZES)
def test_float32(m: int, device: torch.device) -> None:
    pairs = make_pairs(2 * m + 1, 50, device, torch.float32)
    v = torch.randn(50, device=device)
    result = filled(pairs, m) @ v
    assert result.dtype == torch.float32
    exact = [(s.double(), y.double()) for s, y in pairs[-m:]]
    assert_near(result.double(), two_loops(exact, v.double()), 1e-4)


def test_the_scale_from_the_host_is_taken(device: torch.device) -> None:
    (s, y), other = make_pairs(2, 6, device)
    given = InverseBFGS(6, 5, torch.float64, device)
    given.push(s, y, scale=float(s @ y / (y @ y)))
    given.push(*other)
    v = torch.randn(6, dtype=torch.float64, device=device)
    torch.testing.assert_close(given @ v, filled([(s, y), other], 5) @ v, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [2 * _BLOCK - 1, 2 * _BLOCK, 2 * _BLOCK + 37, 3 * _BLOCK + 1])
@pytest.mark.parametrize("m", [1, 3])
def test_products_in_blocks(size: int, m: int, device: torch.device) -> None:
    pairs = make_pairs(m + 1, size, device)
    v = torch.randn(size, dtype=torch.float64, device=device)
    inverse = filled(pairs, m)
    in_blocks, plain = inverse @ v, inverse @ v  # the pair is pending the first time only
    assert_near(in_blocks, two_loops(pairs[-m:], v), 1e-10)
    assert_near(plain, in_blocks, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_vectors_at_once(dtype: torch.dtype, device: torch.device) -> None:
    vectors = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vectors = vectors.to(device, dtype)
    h = InverseBFGS(30, 5, dtype, device)
    assert torch.equal(h @ vectors, vectors)
    for s, y in make_pairs(8, 30, device, dtype):  # more than it holds
        h.push(s, y)
        together = h @ vectors
        one_by_one = torch.stack([h @ v for v in vectors.T.contiguous()]).T
        tolerance = 100 * torch.finfo(dtype).eps * one_by_one.abs().max().item()
        torch.testing.assert_close(together, one_by_one, rtol=0.0, atol=tolerance)


def test_reset_forgets_everything(device: torch.device) -> None:
    pairs = make_pairs(9, 10, device)
    inverse = filled(pairs, 4)
    inverse.reset()
    v = torch.randn(10, dtype=torch.float64, device=device)
    assert inverse.count == 0
    assert torch.equal(inverse @ v, v)
    inverse.push(*pairs[3])
    assert_near(inverse @ v, two_loops(pairs[3:4], v), 1e-10)


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("pushes", [0, 1, 3, 4, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_goes_on_bit_for_bit(
    dtype: torch.dtype, pushes: int, pending: bool, device: torch.device
) -> None:
    pairs = make_pairs(pushes + 3, 10, device, dtype)
    original = InverseBFGS(10, 4, dtype, device)
    for pair in pairs[:pushes]:
        original.push(*pair)
    v = torch.randn(10, dtype=dtype, device=device)
    if not pending:
        _ = original @ v
    resumed = InverseBFGS(10, 4, dtype, device)
    resumed.push(*pairs[-1])  # must not survive
    resumed.load_state_dict(copy.deepcopy(original.state_dict()))
    assert resumed.count == original.count
    assert torch.equal(resumed @ v, original @ v)
    for pair in pairs[pushes:]:
        original.push(*pair)
        resumed.push(*pair)
        assert torch.equal(resumed.direction(v), original.direction(v))


def test_a_state_moves_to_this_device(device: torch.device) -> None:
    inverse = filled(make_pairs(3, 10, torch.device("cpu")), 4)
    moved = InverseBFGS(10, 4, torch.float64, device)
    moved.load_state_dict(copy.deepcopy(inverse.state_dict()))
    v = torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close((moved @ v.to(device)).cpu(), inverse @ v, rtol=1e-10, atol=0)


def test_a_state_of_another_size_is_refused() -> None:
    pairs = make_pairs(3, 10, torch.device("cpu"))
    inverse, other = filled(pairs, 4), filled(make_pairs(2, 7, torch.device("cpu")), 4)
    v = torch.randn(10, dtype=torch.float64)
    before = inverse @ v
    with pytest.raises(ValueError, match="of vectors of length 7, not 10"):
        inverse.load_state_dict(other.state_dict())
    assert torch.equal(inverse @ v, before)


class _NoWaiting(TorchDispatchMode):
    """Refuses what reads a tensor's value on the host, on every device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), name
        return func(*args, **(kwargs or {}))


def test_a_direction_does_not_wait_for_the_device(device: torch.device) -> None:
    pairs = make_pairs(12, 50, device)
    inverse = InverseBFGS(50, 5, torch.float64, device)
    known = [(s, y, float(s @ y / (y @ y))) for s, y in pairs]
    for s, y, scale in known:  # once before, so that the libraries are set up
        inverse.push(s, y, scale)
        inverse.direction(s)
    on_cuda = device.type == "cuda"
    if on_cuda:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode does not see everything
            torch.cuda.set_sync_debug_mode("error")
    try:
        with _NoWaiting():
            for s, y, scale in known:
                inverse.push(s, y, scale)
                inverse.direction(s)
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", [1, 7, 67])
def test_what_is_multiplied_begins_where_it_does_after_loading(size: int) -> None:
    """In memory of its own: sums may depend on where in a line of cache a vector begins."""
    inverse = InverseBFGS(size, 30, torch.float32)
    for s, y in make_pairs(25, size, torch.device("cpu"), torch.float32):  # grows once
        inverse.push(s, y)
    _, *vectors = inverse.split_state()
    assert [v.storage_offset() for v in vectors] == [0, 0]


def test_a_history_that_was_dropped_holds_no_memory() -> None:
    inverse = InverseBFGS(7, 3)
    for s, y in make_pairs(4, 7, torch.device("cpu"), torch.float32):
        inverse.push(s, y)
        inverse.direction(s)
    vectors = [weakref.ref(v.untyped_storage()) for v in inverse.split_state()[1:]]
    assert all(v() is not None for v in vectors)
    inverse.reset()
    assert all(v() is None for v in vectors)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiplies shapes \(3,\) and \(3, k\), got \(4,\)"):
        InverseBFGS(3, 2) @ torch.ones(4)
