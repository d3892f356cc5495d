"""The inverse Hessian in a subspace against the dense one, and against its dense truncation."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from torch_secondorder.curvature import InverseBroyden, ReducedBroyden, reduced_broyden

UPDATES = ["bfgs", "ssbfgs", "ssbroyden", "dfp"]
DOUBLE = torch.float64


def quadratic(size: int, device: torch.device) -> Tensor:
    """A Hessian with eigenvalues between 0.1 and 1,000."""
    generator = torch.Generator().manual_seed(size)
    axes, _ = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator))
    return (axes * torch.logspace(-1, 3, size, dtype=DOUBLE) @ axes.T).to(device)


def descend(
    inverse: ReducedBroyden, count: int, device: torch.device, dtype: torch.dtype = DOUBLE
) -> Iterator[tuple[Tensor, Tensor, float, Tensor]]:
    """Pairs, with `s'H^-1 s` and the new gradient, of steps along its directions."""
    hessian = quadratic(inverse.size, device).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(inverse.size, dtype=DOUBLE, generator=generator).to(device, dtype)
    for _ in range(count):
        grad = hessian @ x
        direction = inverse.direction(grad)
        t = 0.3 + float(torch.rand((), generator=generator))
        if not inverse.count:
            t *= 0.001
        s = t * direction
        x = x + s
        y = hessian @ s
        expected = -t * float(s @ grad)
        inverse.push(s, y, expected=expected)
        yield s, y, expected, hessian @ x


def dense(inverse: ReducedBroyden | InverseBroyden, device: torch.device) -> Tensor:
    return inverse @ torch.eye(inverse.size, dtype=inverse.dtype, device=device)


def assert_near(ours: Tensor, reference: Tensor, relative: float) -> None:
    norm = torch.linalg.vector_norm
    assert norm(ours - reference) <= relative * norm(reference)


def test_without_pairs_it_is_the_identity(device: torch.device) -> None:
    v = torch.randn(5, device=device)
    inverse = ReducedBroyden(5, 3, device=device)
    assert torch.equal(inverse @ v, v)
    assert torch.equal(inverse.direction(v), -v)
    assert inverse.rank == 0


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("size", [2, 7, 40])
def test_until_it_is_full_it_is_the_dense_matrix(
    size: int, update: str, device: torch.device
) -> None:
    """Along directions of its own, with a product after each pair or only with the next one."""
    ours = ReducedBroyden(size, 20, DOUBLE, device, update=update)
    reference = InverseBroyden(size, DOUBLE, device, update=update)
    for i, (s, y, expected, grad) in enumerate(descend(ours, 25, device)):
        reference.push(s, y, expected=expected)
        if i % 3:
            assert_near(dense(ours, device), dense(reference, device), 1e-9)
            assert_near(ours @ y, s, 1e-9)
        assert_near(ours.direction(grad), reference.direction(grad), 1e-8)
        assert ours.tau == pytest.approx(reference.tau, rel=1e-7)
        assert ours.phi == pytest.approx(reference.phi, rel=1e-6, abs=1e-7)
        assert ours.rank <= min(size, i + 2)


@pytest.mark.parametrize("update", UPDATES)
def test_steps_and_gradients_of_anywhere(update: str, device: torch.device) -> None:
    """Pairs and gradients that have nothing to do with each other, as of changing functions."""
    generator = torch.Generator().manual_seed(2)
    hessian = quadratic(30, torch.device("cpu"))
    ours = ReducedBroyden(30, 20, DOUBLE, device, update=update)
    reference = InverseBroyden(30, DOUBLE, device, update=update)
    for i in range(9):
        s, grad = torch.randn(2, 30, dtype=DOUBLE, generator=generator)
        s, y, grad = s.to(device), (hessian @ s).to(device), grad.to(device)
        ours.push(s, y, initial=0.1)
        reference.push(s, y, initial=0.1, expected=None if i else 10 * float(s @ s))
        if i % 2:
            assert_near(ours.direction(grad), reference.direction(grad), 1e-8)
        assert_near(dense(ours, device), dense(reference, device), 1e-8)


@pytest.mark.parametrize("update", ["ssbfgs", "ssbroyden"])
def test_a_full_basis_keeps_the_eigenvalues_farthest_from_the_scale(
    update: str, device: torch.device
) -> None:
    ours, shortened = ReducedBroyden(40, 8, DOUBLE, device, update=update), 0
    for _, _, _, grad in descend(ours, 40, device):
        roomy = copy.deepcopy(ours)
        roomy.history_size = 100
        before = roomy.direction(grad)
        after, rank = ours.direction(grad), ours.rank
        assert rank <= ours.capacity - 3
        if rank == roomy.rank:
            assert_near(after, before, 1e-9)
            continue
        shortened += 1
        values, vectors = torch.linalg.eigh(dense(roomy, device))
        order = (values / roomy.scale).log().abs().argsort(descending=True)
        gone = order[ours.capacity // 2 :]
        seen = values[gone[: roomy.rank - ours.capacity // 2]]
        scale = seen.log().mean().exp()
        assert ours.scale == pytest.approx(float(scale), rel=1e-8)
        values[gone] = scale
        expected = vectors * values @ vectors.T
        assert_near(dense(ours, device), expected, 1e-8)
        assert_near(after, -expected @ grad, 1e-8)
        assert rank == ours.capacity // 2 + 1
    assert shortened > 3


@pytest.mark.parametrize("m", [1, 5, 12])
@pytest.mark.parametrize("update", UPDATES)
def test_it_stays_symmetric_positive_definite_and_small(
    update: str, m: int, device: torch.device
) -> None:
    ours = ReducedBroyden(30, m, DOUBLE, device, update=update)
    for i, _ in enumerate(descend(ours, 60, device)):
        if i % 10 == 9:
            matrix = dense(ours, device)
            assert_near(matrix, matrix.T, 1e-10)
            assert torch.linalg.eigvalsh(matrix).min() > 0
            basis, small, _ = ours.reduced()
            assert basis.shape == (ours.rank, 30)
            assert small.shape == (ours.rank, ours.rank)
            assert_near(basis @ basis.T, torch.eye(ours.rank, dtype=DOUBLE, device=device), 1e-9)
        assert len(ours._basis) <= max(2 * m, 9)


@pytest.mark.parametrize("factor", [2.0**-80, 1.0, 2.0**80])
def test_squares_of_float32_out_of_range(factor: float, device: torch.device) -> None:
    """Neither the space nor the matrix depends on the unit of the loss."""
    if device.type == "mps":
        pytest.skip("has no float64")
    ours, scaled = (ReducedBroyden(20, 8, torch.float32, device) for _ in range(2))
    for s, y, expected, grad in descend(ours, 20, device, torch.float32):
        scaled.push(s, factor * y, expected=factor * expected, initial=1 / factor)
        a, b = ours.direction(grad), scaled.direction(factor * grad)
        assert ours.rank == scaled.rank
        assert_near(b, a, 1e-3)


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_loaded_state_continues_bit_for_bit(
    whole: bool, pending: bool, device: torch.device
) -> None:
    original = ReducedBroyden(30, 8, DOUBLE, device)
    further = descend(original, 40, device)
    for _ in range(19):
        *_, grad = next(further)
    if not pending:
        original.direction(grad)
    if whole:
        state = original.state_dict()
    else:
        small, basis, pair = original.split_state()
        # As through a sharded checkpoint: with room for a full basis, and a pair in any case.
        padded = torch.zeros(original.capacity, 30, dtype=DOUBLE, device=device)
        padded[: len(basis)] = basis
        pair = pair if pending else torch.zeros(2, 30, dtype=DOUBLE, device=device)
        state = ReducedBroyden.join_state(small, padded, pair)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = ReducedBroyden(30, 8, DOUBLE, device, update="bfgs")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.update = original.update
    for s, y, expected, following in further:
        resumed.direction(grad)
        resumed.push(s, y, expected=expected)
        assert torch.equal(resumed @ following, original @ following)
        grad = following
    assert resumed.count == original.count


def test_a_state_is_a_copy(device: torch.device) -> None:
    ours = ReducedBroyden(30, 5, DOUBLE, device)
    further = descend(ours, 30, device)
    for _ in range(6):
        next(further)
    state = ours.state_dict()
    before = {name: v.clone() for name, v in state.items() if isinstance(v, Tensor)}
    for _ in further:
        pass
    assert before
    assert all(torch.equal(state[name], v) for name, v in before.items())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="history_size"):
        ReducedBroyden(3, 0)
    with pytest.raises(ValueError, match="update"):
        ReducedBroyden(3, 2, update="newton")  # type: ignore[arg-type]
    inverse = ReducedBroyden(3, 2)
    with pytest.raises(ValueError, match="of vectors of length 4, not 3"):
        inverse.load_state_dict(ReducedBroyden(4, 2).state_dict())


def test_long_vectors_are_turned_in_pieces(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def final(block: int) -> Tensor:
        monkeypatch.setattr(reduced_broyden, "_BLOCK", block)
        inverse = ReducedBroyden(50, 6, DOUBLE, device)
        for _ in descend(inverse, 30, device):
            pass
        return dense(inverse, device)

    assert_near(final(16), final(64), 1e-6)
