"""The dense inverse Hessian of the Broyden family against its textbook formulas."""

from __future__ import annotations

import io
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.broyden import textbook
from torch_secondorder._foundation import memory
from torch_secondorder.curvature import InverseBroyden
from torch_secondorder.curvature.inverse_broyden import (
    _GATHERED,
    _LEAST,
    _MOST,
    BroydenUpdate,
    update_parameters,
)

UPDATES = get_args(BroydenUpdate)
Pair = tuple[Tensor, Tensor]


def make_pairs(count: int, size: int, device: torch.device, decades: float = 2.0) -> list[Pair]:
    """Pairs of a slowly changing diagonal curvature: s'y > 0."""
    generator = torch.Generator().manual_seed(count)
    curvature = torch.logspace(0, decades, size, dtype=torch.float64)
    pairs = []
    for _ in range(count):
        s = torch.randn(size, dtype=torch.float64, generator=generator)
        noise = torch.rand(size, dtype=torch.float64, generator=generator)
        y = curvature * (0.8 + 0.4 * noise) * s
        pairs.append((s.to(device), y.to(device)))
    return pairs


def eye(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)


def filled(pairs: list[Pair], update: Any, **more: Any) -> InverseBroyden:
    s = pairs[0][0]
    inverse = InverseBroyden(len(s), s.dtype, s.device, update=update, **more)
    for s, y in pairs:
        assert inverse.push(s, y)
    return inverse


def assert_near(ours: Tensor, reference: Tensor, relative: float = 1e-10) -> None:
    assert torch.linalg.vector_norm(ours - reference) <= relative * torch.linalg.vector_norm(
        reference
    )


def test_without_pairs_it_is_the_identity(device: torch.device) -> None:
    v = torch.randn(5, device=device)
    inverse = InverseBroyden(5, device=device)
    assert torch.equal(inverse @ v, v)
    assert torch.equal(inverse.direction(v), -v)
    assert torch.equal(inverse @ v[:, None], v[:, None])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("size", [2, 3, 24])
def test_against_the_textbook(size: int, update: Any, device: torch.device) -> None:
    """Over several writes into the matrix, after each pair."""
    inverse = InverseBroyden(size, torch.float64, device, update=update)
    H = eye(size, device)
    for count, (s, y) in enumerate(make_pairs(3 * _GATHERED + 2, size, device)):
        H = textbook(H, s, y, update, count)
        assert inverse.push(s, y)
        assert inverse.count == count + 1
        assert_near(inverse @ eye(size, device), H, 1e-9)
        v = torch.randn(size, dtype=torch.float64, device=device)
        assert_near(inverse @ v, H @ v, 1e-9)
        assert_near(inverse.direction(v), -(H @ v), 1e-9)
        assert_near(inverse @ y, s, 1e-9)
    assert inverse.tau <= 1


def test_unscaled_bfgs_is_the_product_form(device: torch.device) -> None:
    """Nocedal and Wright 2006, equation 6.17: after 2 n pairs."""
    pairs = make_pairs(22, 6, device)
    inverse = filled(pairs[:12], "bfgs")
    H = inverse @ eye(6, device)
    for s, y in pairs[12:]:
        inverse.push(s, y)
        rho = 1 / (s @ y)
        v = eye(6, device) - rho * torch.outer(y, s)
        H = v.T @ H @ v + rho * torch.outer(s, s)
    assert_near(inverse @ eye(6, device), H)


def test_bfgs_scales_up_by_a_few_percent(device: torch.device) -> None:
    """Pairs 9 to 2 n, where the curvature along the step is smaller than that of H."""
    pairs = make_pairs(13, 6, device)
    scales = ((8, 0.5, 1.0), (8, 1.0, 1.0), (8, 1.02, 1 / 1.02), (8, 10.0, 0.93))
    for count, b, tau in (*scales, (11, 10.0, 0.93), (12, 10.0, 1.0)):
        s = pairs[count][0]
        inverse = filled(pairs[:count], "bfgs")
        y = torch.linalg.solve(inverse @ eye(6, device), s) / b
        assert inverse.push(s, y, expected=float(y @ s) * b)
        assert inverse.ratio == pytest.approx(b)
        assert inverse.tau == pytest.approx(tau)
        assert_near(inverse @ y, s)


def test_dfp_is_bfgs_of_the_inverse(device: torch.device) -> None:
    """With s and y exchanged, one is the inverse of the other."""
    pairs = make_pairs(20, 6, device)
    inverse = filled(pairs[:10], "dfp")
    B = torch.linalg.inv(inverse @ eye(6, device))
    for s, y in pairs[10:]:
        inverse.push(s, y)
        rho = 1 / (s @ y)
        v = eye(6, device) - rho * torch.outer(s, y)
        B = v.T @ B @ v + rho * torch.outer(y, y)
    assert_near(torch.linalg.inv(inverse @ eye(6, device)), B, 1e-8)


@pytest.mark.parametrize("update", UPDATES)
def test_what_is_known_need_not_be_computed(update: Any, device: torch.device) -> None:
    pairs = make_pairs(12, 7, device)
    ours, told = filled(pairs[:10], update), filled(pairs[:10], update)
    for s, y in pairs[10:]:
        H = ours @ eye(7, device)
        expected = float(s @ torch.linalg.solve(H, s))
        ours.push(s, y)
        told.push(s, y, expected=expected, of_y=H @ y)
        assert_near(told @ eye(7, device), ours @ eye(7, device))
        v = torch.randn(7, dtype=torch.float64, device=device)
        assert_near(told.advance(H @ v, v), told @ v)


@pytest.mark.parametrize("update", UPDATES)
def test_the_first_pair_gives_the_scale(update: Any, device: torch.device) -> None:
    """For BFGS and DFP it does not depend on the H that the step was made with."""
    ((s, y),) = make_pairs(1, 5, device)
    for initial in (1.0, 1e-3, 1e5):
        inverse = InverseBroyden(5, torch.float64, device, update=update)
        inverse.push(s, y, initial=initial, expected=float(s @ s) / initial)
        assert_near(inverse @ eye(5, device), textbook(initial * eye(5, device), s, y, update, 0))
        if update in ("bfgs", "dfp"):
            assert_near(inverse @ eye(5, device), textbook(eye(5, device), s, y, update, 0))


@settings(max_examples=60, deadline=None)
@given(
    update=st.sampled_from(UPDATES),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    decades=st.floats(0, 5),
    count=st.integers(1, 20),
)
def test_it_stays_symmetric_positive_definite(
    update: Any, size: int, seed: int, decades: float, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inverse = InverseBroyden(size, torch.float64, update=update)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    curvature = 10 ** (decades * torch.rand(size, dtype=torch.float64, generator=generator))
    for _ in range(count):
        s = torch.randn(size, dtype=torch.float64, generator=generator)
        y = basis @ (curvature * (basis.T @ s))
        assert inverse.push(s, y)
        H = inverse @ torch.eye(size, dtype=torch.float64)
        assert_near(H, H.T, 1e-12)
        assert torch.linalg.eigvalsh(H).min() > 0
        assert_near(inverse @ y, s, 1e-6)


@pytest.mark.parametrize("size", [30, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matrix_is_symmetric_to_the_last_bit(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Also where it is written in several strips, with an odd last one."""
    inverse = InverseBroyden(size, dtype, device, update="ssbroyden")
    for s, y in make_pairs(2 * _GATHERED + 2, size, device):
        assert inverse.push(s.to(dtype), y.to(dtype), expected=float(s @ y))
    assert inverse._gathered < _GATHERED
    assert torch.equal(inverse._matrix, inverse._matrix.T)
    assert (inverse._matrix - inverse._matrix.diag().diag()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update", ["bfgs", "ssbroyden"])
def test_it_stays_definite_for_thousands_of_pairs(
    update: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """A pair grows an asymmetric error with each scaling up, and does not see it."""
    inverse = InverseBroyden(30, dtype, device, update=update)
    for s, y in make_pairs(3000, 30, device):
        assert inverse.push(s.to(dtype), y.to(dtype))
    H = inverse @ torch.eye(30, dtype=dtype, device=device)
    assert_near(H, H.T, 4 * torch.finfo(dtype).eps)
    assert torch.linalg.eigvalsh(H.double()).min() > 0


def test_scales_of_many_decades(device: torch.device) -> None:
    """The scale of H leaves the range in which it is kept apart from the matrix."""
    inverse = InverseBroyden(4, torch.float64, device, update="ssbfgs")
    H = eye(4, device)
    for count, (s, y) in enumerate(make_pairs(60, 4, device)):
        y = y * 10.0**-count
        H = textbook(H, s, y, "ssbfgs", count)
        inverse.push(s, y)
        assert_near(inverse @ eye(4, device), H, 1e-8)
        assert _LEAST <= inverse._scale <= _MOST  # an unbounded one ends beyond float32
    assert torch.linalg.matrix_norm(H) > 1e40


@pytest.mark.parametrize("held", [0, 3])
def test_pairs_without_curvature_change_nothing(held: int, device: torch.device) -> None:
    pairs = make_pairs(held + 1, 5, device)
    inverse = (
        filled(pairs[:held], "ssbroyden") if held else InverseBroyden(5, torch.float64, device)
    )
    s, y = pairs[-1]
    before = inverse @ eye(5, device)
    for bad in (-y, 0 * y, y * float("nan"), y * float("inf")):
        assert not inverse.push(s, bad)
        assert inverse.count == held
        assert torch.equal(inverse @ eye(5, device), before)


def test_reset_begins_anew(device: torch.device) -> None:
    pairs = make_pairs(12, 5, device)
    inverse = filled(pairs, "ssbroyden")
    inverse.reset()
    assert (inverse.count, inverse.tau, inverse.phi) == (0, 1.0, 1.0)
    assert torch.equal(inverse @ eye(5, device), eye(5, device))
    for pair in pairs:
        inverse.push(*pair)
    assert torch.equal(inverse @ eye(5, device), filled(pairs, "ssbroyden") @ eye(5, device))


@pytest.mark.parametrize("count", [0, 3, 16, 21])
def test_a_loaded_state_goes_on_bit_for_bit(count: int, device: torch.device) -> None:
    pairs = make_pairs(count + 20, 6, device)
    inverse = InverseBroyden(6, torch.float64, device, update="ssbroyden")
    for pair in pairs[:count]:
        inverse.push(*pair)
    file = io.BytesIO()
    torch.save(inverse.state_dict(), file)
    file.seek(0)
    resumed = InverseBroyden(6, torch.float64, device, update="ssbroyden")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for s, y in pairs[count:]:
        inverse.push(s, y)
        resumed.push(s, y)
        assert torch.equal(inverse.direction(y), resumed.direction(y))
    assert (resumed.count, resumed.tau, resumed.phi) == (inverse.count, inverse.tau, inverse.phi)


def test_a_state_is_a_copy(device: torch.device) -> None:
    pairs = make_pairs(12, 5, device)
    inverse = filled(pairs[:4], "bfgs")
    state = inverse.state_dict()
    before = inverse @ eye(5, device)
    for pair in pairs[4:]:
        inverse.push(*pair)
    inverse.load_state_dict(state)
    inverse.push(*pairs[5])
    inverse.load_state_dict(state)
    assert torch.equal(inverse @ eye(5, device), before)


def test_a_state_of_another_length_is_refused() -> None:
    inverse = filled(make_pairs(2, 5, torch.device("cpu")), "bfgs")
    with pytest.raises(ValueError, match="vectors of length 5, not 4"):
        InverseBroyden(4).load_state_dict(inverse.state_dict())


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e9)
    inverse = InverseBroyden(20_000, torch.float64)
    v = torch.ones(20_000, dtype=torch.float64)
    with pytest.raises(MemoryError, match=r"20,000 x 20,000 .* 3\.0 GiB.*LBFGS"):
        inverse.push(v, v)
    assert inverse.count == 0
    assert torch.equal(inverse @ v, v)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        InverseBroyden(0)
    with pytest.raises(ValueError, match=r"update must be one of 'bfgs', .*, got 'sr1'"):
        InverseBroyden(2, update="sr1")  # type: ignore[arg-type]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_parameters_of_curvature_far_from_expected(update: BroydenUpdate, n: int) -> None:
    """They are numbers, and leave the matrix positive definite: `phi > -1 / a` (Fletcher 1970)."""
    for b in (1e-100, 1e-17, 1.0, 1e17, 1e19, 1e100):
        for h_b in (1.0, 1.0 + 1e-12, 3.0, 1e17, 1e100):
            for count in (0, 5, 20, 200):
                h = h_b / b
                tau, phi = update_parameters(update, count, n, 1.0, h, b)
                assert 0 < tau < math.inf
                assert abs(phi) < math.inf
                assert 1 + max(b * h - 1, 0) * phi > 0
