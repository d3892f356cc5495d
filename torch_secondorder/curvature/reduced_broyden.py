"""The inverse Hessian of the self-scaled Broyden family in limited memory, dense in a subspace."""

from __future__ import annotations

from math import inf, isnan, log, nan, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._params.space import WHOLE, Space, to_cpu
from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.curvature.inverse_bfgs import products
from torch_secondorder.curvature.inverse_broyden import BroydenUpdate, update_parameters

__all__ = ["ReducedBroyden"]

# Vectors that one call may add to the basis: of a gradient, a step and a difference.
_SPARE = 3
# The basis has at least so many vectors, and the spare ones, where `n` allows it.
_FEWEST = 6
# Columns of the basis that are rotated at once.
_BLOCK = 1 << 14
# A vector lies in the basis if all but this share of its square does, in units of rounding.
_INSIDE = 1e3
# A vector has a new direction if so much of it is left by the projection, in units of rounding, and
# a second projection leaves this share of the square of that.
_NOISE, _NEW = 100.0, 0.25

_NUMBERS = ("history_size", "count", "rank", "scale", "tau", "phi", "ratio")


class _Pair(NamedTuple):
    """A pair that is not in `H` yet, and what is known of the step."""

    vectors: Tensor  # s and y, shape (2, n)
    expected: float | None
    initial: float | None


class ReducedBroyden(LinearOperator):
    """`H` of the self-scaled Broyden family in limited memory: dense in a subspace.

    With the updates of `InverseBroyden`, `H` differs from a multiple of the identity only in the
    space that the gradients span. With an orthonormal basis of that space as rows of `Q`,

        H = Q'A Q + c (I - Q'Q)

    and an iteration makes `Q` longer by one vector and updates the small matrix `A` as
    `InverseBroyden` would update `H`: so far this is the dense method, exactly. A basis that is
    full is cut down to half: the eigenvectors of `A` whose eigenvalues are farthest from `c`, in
    ratio, stay, and `c` becomes the geometric mean of the eigenvalues of the others.

    The self-scaled updates need this. Each rescales what `H` knew before, so that their old pairs
    count: they lose most of their advantage where these are dropped, as `InverseBFGS` drops them.

    `A` is a float64 matrix on the host. An iteration takes five passes over `Q` and two waits for
    the device; `InverseBFGS` takes two passes over as much memory and no wait.

    References:
        P. E. Gill, M. W. Leonard 2003, "Limited-memory reduced-Hessian methods for large-scale
        unconstrained optimization", SIAM J. Optim. 14, for BFGS in the space of the gradients;
        B. A. van de Rotten, S. M. Verduyn Lunel 2005, "A limited memory Broyden method to solve
        high-dimensional systems of nonlinear equations", Proc. EQUADIFF 2003, for a low-rank
        approximation in place of dropped pairs. For the updates see `InverseBroyden`.

    Args:
        size: `n`.
        history_size: `m`: the memory is that of `m` pairs, `2 m n` numbers, and grows as it fills;
            at least that of nine vectors.
        dtype: Of the vectors.
        device: Of the vectors.
        update: `"bfgs"`, `"ssbfgs"`, `"ssbroyden"` or `"dfp"`.
        space: The space of the vectors. If they are sharded, `n` is the length of this process's
            part, and `A` is the same on all processes.

    Attributes:
        count: Pairs learned.
        rank: Vectors in the basis.
        scale: `c`.
        tau: Of the last update.
        phi: Of the last update.
        ratio: `s'H^-1 s / s'y` of the last update; see `InverseBroyden`.

    Raises:
        ValueError: `size` or `history_size` is no positive integer, or `update` is unknown.

    >>> H = ReducedBroyden(2, history_size=5)
    >>> H.push(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    >>> H.push(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    >>> [abs(round(x, 4)) for x in (H @ torch.tensor([0.0, 2.0])).tolist()]
    [0.0, 1.0]
    """

    def __init__(
        self,
        size: int,
        history_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        update: BroydenUpdate = "ssbroyden",
        space: Space = WHOLE,
    ) -> None:
        check_integer("history_size", history_size)
        check_choice("update", update, BroydenUpdate)
        self.space = space
        self.size = size
        self.history_size = history_size
        self.dtype = dtype
        self.device = device or torch.device("cpu")
        self.update = update
        self._whole_size = 0  # not asked for yet
        self.reset()

    @property
    def capacity(self) -> int:
        """Vectors that the basis has room for."""
        return max(2 * self.history_size, _FEWEST + _SPARE)

    def reset(self) -> None:
        """Forgets all pairs: `H` is the identity."""
        self.count = self.rank = 0
        self.scale = self.tau = self.phi = self.ratio = 1.0
        self._pending: _Pair | None = None
        self._basis = torch.zeros(0, self.size, dtype=self.dtype, device=self.device)  # Q
        self._matrix = torch.zeros(0, 0, dtype=torch.float64)  # A

    def push(
        self,
        s: Tensor,
        y: Tensor,
        *,
        expected: float | None = None,
        initial: float | None = None,
    ) -> None:
        """Adds a pair.

        The caller makes sure that `s'y > 0`.

        Args:
            s: The step, shape `(n,)`.
            y: The difference of the gradients, shape `(n,)`.
            expected: `s'H^-1 s`, if it is known. The self-scaled updates solve a system with `A`
                without it.
            initial: For the first pair: the `H` that the step was made with, as a multiple of the
                identity.
        """
        self._settle()
        self._pending = _Pair(torch.stack((s, y)), expected, initial)
        self.count += 1

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        self._settle()
        if not self.rank:
            return self.scale * v
        basis = self._basis[: self.rank]
        of_v = self.space.total(torch.mv(basis, v))
        outside = torch.addmv(v, basis.t(), of_v, alpha=-1)
        inside = self._on_device(self._matrix @ to_cpu(of_v)[0])
        return torch.addmv(outside, basis.t(), inside, beta=self.scale)

    def direction(self, grad: Tensor) -> Tensor:
        """The quasi-Newton direction `-H grad`, shape `(n,)`; `grad` enters the basis."""
        if not self.count:
            return -grad
        pending, self._pending = self._pending, None
        if pending is None:
            of_grad = self._extend(grad)[0].coordinates
        else:
            of_grad = self._learn(pending, grad)
        of_grad = self._shorten(of_grad)
        inside = self._on_device(self._matrix @ of_grad).neg_()
        return torch.mv(self._basis[: self.rank].t(), inside)

    def reduced(self) -> tuple[Tensor, Tensor, float]:
        """`Q`, shape `(rank, n)`, `A` on the host, and `c`."""
        self._settle()
        return self._basis[: self.rank], self._matrix, self.scale

    # Learning.

    def _settle(self) -> None:
        """Puts a pair that is pending into `H`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._shorten(self._learn(pending, pending.vectors[1]))

    def _learn(self, pair: _Pair, v: Tensor) -> Tensor:
        """Updates `H`, and takes `v` into the basis; its coordinates."""
        first = not self.rank
        if first:
            self.scale = 1.0 if pair.initial is None else pair.initial
            self._extend(pair.vectors[0])
        of_v, of_s, of_y = self._extend(v, *pair.vectors)
        coordinates = []
        for vector, of_vector in zip(pair.vectors, (of_s, of_y), strict=True):
            # Unless the function or the basis has changed, both lie in the basis now.
            if not of_vector.is_whole(_INSIDE * torch.finfo(self.dtype).eps):
                of_vector = self._extend(vector)[0]
            coordinates.append(of_vector.coordinates)
        s, y = (_lengthened(c, self.rank) for c in coordinates)
        self._update(s, y, pair.expected, first=first)
        return _lengthened(of_v.coordinates, self.rank)

    def _update(self, s: Tensor, y: Tensor, expected: float | None, *, first: bool) -> None:
        """Updates `A` and `c` from the coordinates of a pair."""
        matrix = self._matrix
        of_y = torch.mv(matrix, y)
        s_y, y_h_y = float(s @ y), float(y @ of_y)
        if not (0 < s_y < inf and 0 < y_h_y < inf):  # by rounding
            return
        if expected is None:
            expected = float(s @ torch.linalg.solve(matrix, s))
        if not self._whole_size:
            size = torch.tensor(float(self.size), device=self.device)
            self._whole_size = int(self.space.total(size))
        count = self.count - 1  # this one is counted already
        tau, phi = update_parameters(self.update, count, self._whole_size, s_y, y_h_y, expected)
        across = s / s_y - of_y / y_h_y
        matrix.addr_(of_y, of_y, alpha=-1.0 / y_h_y).addr_(across, across, alpha=phi * y_h_y)
        matrix.div_(tau).addr_(s, s, alpha=1.0 / s_y)
        self.scale /= tau
        self.tau, self.phi = tau, phi
        self.ratio = 1.0 if first else expected / s_y

    def _extend(self, v: Tensor, *others: Tensor) -> list[_Located]:
        """Takes the part of `v` that lies outside of the basis into it.

        Returns:
            The coordinates of `v` and of other vectors.
        """
        k, basis = self.rank, self._basis[: self.rank]
        of_all = products(basis, torch.stack((v, *others)))
        of_all = self.space.total(of_all)
        rest = torch.addmv(v, basis.t(), of_all[0], alpha=-1)
        # Once more: what rounding has left of the basis in it, or all if `v` lies in the basis.
        again = torch.mv(basis, rest)
        # Wide, for squares out of the dtype's range.
        wide = torch.stack((rest, v, *others)).to(self._wide)
        gram = torch.mm(wide, wide.t())
        numbers = self.space.total(torch.cat((again.to(self._wide), gram.flatten())))
        coordinates, numbers = to_cpu(of_all, numbers)
        again_there, gram = numbers.split((k, gram.numel()))
        gram = gram.view(2 + len(others), -1)
        coordinates[0] += again_there
        square, *squares = gram.diagonal().tolist()
        left = square - float(again_there @ again_there)
        noise = _NOISE * torch.finfo(self.dtype).eps
        if left > max(_NEW * square, noise * noise * squares[0]):
            rest.addmv_(basis.t(), self._on_device(again_there), alpha=-1)
            length = sqrt(left)
            self._append(rest, length)
            along = (gram[0, 1:] - coordinates @ again_there) / length
            along[0] = length
            coordinates = torch.cat((coordinates, along[:, None]), 1)
        return [_Located(c, square) for c, square in zip(coordinates, squares, strict=True)]

    def _append(self, vector: Tensor, length: float) -> None:
        """Makes a vector that is orthogonal to the basis its last one."""
        k = self.rank
        if k == len(self._basis):
            room = min(max(20, 2 * k), self.capacity)
            basis = torch.zeros(room, self.size, dtype=self.dtype, device=self.device)
            basis[:k] = self._basis
            self._basis = basis
        torch.div(vector, length, out=self._basis[k])
        matrix = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        matrix[:k, :k], matrix[k, k] = self._matrix, self.scale
        self._matrix, self.rank = matrix, k + 1

    def _shorten(self, of_v: Tensor) -> Tensor:
        """Cuts the basis down to half where it is full.

        Args:
            of_v: The coordinates of a vector that is to stay in it.

        Returns:
            Its new coordinates.
        """
        if self.rank <= self.capacity - _SPARE:
            return of_v
        values, vectors = torch.linalg.eigh(self._matrix)
        values.clamp_(min=float(values[-1]) * 1e-20)  # a sign may be lost in rounding
        logs = values.log()
        order = (logs - log(self.scale)).abs().argsort(descending=True, stable=True)
        kept, gone = order[: self.capacity // 2], order[self.capacity // 2 :]
        self.scale = float(logs[gone].mean().exp())
        axes, diagonal = vectors[:, kept], values[kept]
        inside = axes.t() @ of_v
        rest = of_v - axes @ inside
        length = float(torch.linalg.vector_norm(rest))
        of_v = inside
        if length > 1e-10 * float(torch.linalg.vector_norm(inside)):
            rest /= length
            rest -= axes @ (axes.t() @ rest)
            axes = torch.cat((axes, rest[:, None]), 1)
            diagonal = torch.cat((diagonal, diagonal.new_tensor([self.scale])))
            of_v = torch.cat((inside, inside.new_tensor([length])))
        self._turn(axes)
        self._matrix = torch.diag(diagonal)
        return of_v

    def _turn(self, axes: Tensor) -> None:
        """Replaces the basis by combinations of its vectors, the columns of `axes`."""
        turn = self._on_device(axes.t())
        for piece in self._basis[: self.rank].split(_BLOCK, dim=1):
            piece[: len(turn)] = turn @ piece
        self.rank = len(turn)

    @property
    def _wide(self) -> torch.dtype:
        # Not every accelerator has float64.
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _on_device(self, small: Tensor) -> Tensor:
        return small.to(dtype=self.dtype).to(self.device)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers: a copy, for the basis is turned in place."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        pair = self._pending
        state |= {"size": self.size, "matrix": self._matrix.clone()}
        state["basis"] = self._basis[: self.rank].clone()
        if pair is not None:
            state["pair"] = pair.vectors.clone()
            state |= {"expected": pair.expected, "initial": pair.initial}
        return state

    def split_state(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The same with the vectors apart: numbers and `A`, the basis, and the pending pair.

        `A` has room for a full basis and is a copy; the vectors are not. Numbers that are not there
        are NaN.
        """
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        pair = self._pending or _Pair(self._basis[:0], None, None)
        state["expected"] = nan if pair.expected is None else pair.expected
        state["initial"] = nan if pair.initial is None else pair.initial
        unused = self.capacity - self.rank
        state["matrix"] = torch.nn.functional.pad(self._matrix, (0, unused, 0, unused))
        state["is_pending"] = self._pending is not None
        return state, self._basis[: self.rank], pair.vectors

    @staticmethod
    def join_state(state: dict[str, Any], basis: Tensor, pair: Tensor) -> dict[str, Any]:
        """A state for `load_state_dict`: the parts of `split_state`, vectors of any size."""
        rank = state["rank"]
        joined = {name: state[name] for name in _NUMBERS}
        joined |= {"size": basis.shape[-1], "matrix": state["matrix"][:rank, :rank]}
        joined["basis"] = basis[:rank]
        if state["is_pending"]:
            joined["pair"] = pair
            for name in ("expected", "initial"):
                joined[name] = None if isnan(state[name]) else state[name]
        return joined

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state, bit for bit; the tensors move to this operator's device.

        Raises:
            ValueError: The state is of vectors of another length; nothing has changed.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"this inverse Hessian is of vectors of length {state['size']}, not {self.size}"
            )
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self._matrix = state["matrix"].to("cpu", torch.float64, copy=True)
        room = min(max(20, self.rank), self.capacity)
        self._basis = torch.zeros(room, self.size, dtype=self.dtype, device=self.device)
        self._basis[: self.rank] = state["basis"]
        self._pending = None
        if "pair" in state:
            vectors = state["pair"].to(self.device, self.dtype, copy=True)
            self._pending = _Pair(vectors, state["expected"], state["initial"])


class _Located(NamedTuple):
    """The coordinates of a vector in the basis, on the host, and its square."""

    coordinates: Tensor
    square: float

    def is_whole(self, tolerance: float) -> bool:
        """True if the vector has no part outside of the basis."""
        missing = self.square - float(self.coordinates @ self.coordinates)
        return missing <= tolerance * self.square


def _lengthened(coordinates: Tensor, rank: int) -> Tensor:
    """Coordinates with zeros for the vectors that the basis has got since."""
    return torch.nn.functional.pad(coordinates, (0, rank - len(coordinates)))
