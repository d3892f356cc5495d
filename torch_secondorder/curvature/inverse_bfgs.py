"""The limited-memory BFGS approximation of the inverse Hessian, in compact form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._foundation.precision import rounds_float32_products
from torch_secondorder._params.space import WHOLE, Space
from torch_secondorder.curvature.base import LinearOperator

__all__ = ["InverseBFGS"]

# Columns that are multiplied while they lie in cache, for several vectors at once.
_BLOCK = 1 << 16
# How many times the newest scale the largest may count.
_BOLDEST = 5.0


_NUMBERS = ("size", "history_size", "count", "_room", "_newest", "_pending")


class _Buffers(NamedTuple):
    """Room for `c` pairs; it doubles up to `m`.

    Rows that hold no pair are zero everywhere: they take no part, and nothing has to be cut out.
    """

    steps: Tensor  # S, (c, n)
    differences: Tensor  # Y, (c, n)
    inverse: Tensor  # R^-1, (c, c)
    diagonal: Tensor  # D, (c,)


class _Views(NamedTuple):
    """Views of all buffers, made once: for small `n`, each takes as long as the arithmetic."""

    of_steps: Tensor  # S'
    of_differences: Tensor  # Y'
    of_inverse: Tensor  # R^-T
    steps: tuple[Tensor, ...]  # the rows
    differences: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]  # of R^-1
    diagonal: tuple[Tensor, ...]
    units: tuple[Tensor, ...]  # the unit vectors


class InverseBFGS(LinearOperator):
    """`H`, built from the last `m` pairs of steps `s` and gradient differences `y`.

    The compact representation (Byrd, Nocedal, Schnabel 1994, "Representations of quasi-Newton
    matrices", eq. 3.1). With the pairs as rows of `S` and `Y`, oldest first,
    `R_ij = s_i'y_j` for `i <= j` and `D = diag(s_i'y_i)`,

        H v = r + S'p1
        p2 = R^-1 S v,    r = gamma (v - Y'p2),    p1 = R^-T (D p2 - Y r)

    which is their formula with its terms `gamma (Y Y'p2 - Y v)` taken together as `-Y r`: the same
    two passes over the history, without the cancellation between the two terms and without the
    matrix `Y Y'`. The products `S y` with a new `y` are computed in the first pass of the next
    multiplication. Nothing here waits for the device.

    `R^-1` is kept rather than `R`, in float64. A new pair adds one column to it, and dropping the
    oldest pair zeroes a row and a column. The other entries are not touched, so rounding errors do
    not accumulate, and rows stay in the order of the ring buffers.

    `gamma`, the scale of directions that no pair covers, is the largest `s'y / y'y` of the pairs
    held, but at most five times that of the newest pair, which is the textbook's choice. The larger
    scale saves evaluations with a line search, and is too bold without one.

    Args:
        size: `n`.
        history_size: `m`. The history grows as it fills, up to `2 m n` numbers.
        dtype: Of the work vectors.
        device: Of the work vectors.
        largest_scale: Whether `gamma` follows the largest scale; otherwise it is that of the newest
            pair.
        space: The space of the vectors. If they are sharded, `n` is the length of this process's
            part, the small matrices are the same on all processes, and a product with `H` takes two
            messages of up to `2 m` numbers.

    Attributes:
        count: Pairs held, at most `m`.
        boldness: How many times the newest scale the largest may count.
        changes: Counts pairs that were added, each by one, and other changes, by more.

    >>> H = InverseBFGS(2, history_size=5)
    >>> H.push(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    >>> H.push(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    >>> H @ torch.tensor([4.0, 2.0])
    tensor([1., 1.])
    """

    def __init__(
        self,
        size: int,
        history_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        largest_scale: bool = True,
        space: Space = WHOLE,
    ) -> None:
        self.space = space
        self.largest_scale, self.boldness = largest_scale, _BOLDEST
        self.changes = 0
        self.size = size
        self.history_size = history_size
        self.dtype = dtype
        self.device = device or torch.device("cpu")
        # Not every accelerator has float64.
        mps = device is not None and device.type == "mps"
        self._small_dtype = torch.float32 if mps else torch.float64
        self._mixed = self._small_dtype != dtype
        self.reset()

    def reset(self) -> None:
        """Forgets all pairs: `H` is the identity."""
        self.count = 0
        self._room = 0  # pairs that the buffers have room for
        self._newest = -1  # the row of the newest pair
        self._pending = False  # whether it is not in R^-1 yet
        self._scales: list[float] = []  # s'y / y'y of the pairs held, oldest first
        self._buffers: _Buffers | None = None
        self._views: _Views | None = None
        self.changes += 2

    def push(self, s: Tensor, y: Tensor, scale: float | None = None) -> None:
        """Adds a pair, in place of the oldest where the history is full.

        The caller makes sure that `s'y > 0`.

        Args:
            s: The step, shape `(n,)`.
            y: The difference of the gradients, shape `(n,)`.
            scale: `s'y / y'y`, if it is known on the host.
        """
        if self._pending:
            assert self._buffers is not None and self._views is not None
            newest = self._views.differences[self._newest]
            of_y = self.space.total(torch.mv(self._buffers.steps, newest))
            self._enter(of_y, self._buffers, self._views)
        if self.count == self.history_size:
            del self._scales[0]
        elif self.count == self._room:
            # Twenty at once: where the memory counts there are no more than twenty.
            self._grow(min(max(20, 2 * self.count), self.history_size))
        if scale is None:
            s_y, y_y = self.space.totals(s @ y, y @ y)
            scale = float(s_y / y_y)
        self._scales.append(scale)
        self.count = len(self._scales)
        self._newest = (self._newest + 1) % self._room
        assert self._views is not None
        self._views.steps[self._newest].copy_(s)
        self._views.differences[self._newest].copy_(y)
        self._pending = True
        self.changes += 1

    @property
    def newest(self) -> int:
        """The row of the newest pair in `pairs()`."""
        return self._newest

    @property
    def gamma(self) -> float:
        """The scale of directions that no pair covers."""
        gamma = self._scales[-1]
        return min(max(self._scales), self.boldness * gamma) if self.largest_scale else gamma

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs held: `S` and `Y`, shape `(count, n)`, and the age of each row.

        The oldest has age zero, the next one, and so on.
        """
        assert self._buffers is not None
        rows = torch.arange(self.count, device=self.device)
        ages = (rows - self._newest - 1) % self.count
        return self._buffers.steps[: self.count], self._buffers.differences[: self.count], ages

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self._multiply(v, 1.0)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`; two passes over the pairs serve all columns."""
        if not self.count or V.shape[1] < 2 or self.space is not WHOLE:
            return super().matmat(V)
        if self._pending:
            self.matvec(V[:, 0])  # gives R^-1 the column of the newest pair
        assert self._buffers is not None and self._views is not None
        steps, differences, inverse, diagonal = self._buffers
        views, work = self._views, self.dtype
        rows = V.t()
        p2 = torch.mm(torch.mm(rows, views.of_steps).to(inverse.dtype), views.of_inverse)
        scaled = torch.addmm(rows, p2.to(work), differences, alpha=-1).mul_(self.gamma)
        p1 = torch.mm(diagonal * p2 - torch.mm(scaled, views.of_differences), inverse)
        return torch.addmm(scaled, p1.to(work), steps).t()

    def direction(self, grad: Tensor) -> Tensor:
        """The quasi-Newton direction `-H grad`, shape `(n,)`."""
        return self._multiply(grad, -1.0)

    def _multiply(self, v: Tensor, sign: float) -> Tensor:
        if not self.count:
            return sign * v
        assert self._buffers is not None and self._views is not None
        views = self._views
        steps, differences, inverse, diagonal = self._buffers
        space, whole = self.space, self.space is WHOLE
        if self._pending:
            newest = views.differences[self._newest]
            if self.size < 2 * _BLOCK:  # the rows lie in cache the second time
                of_y, of_v = torch.mv(steps, newest), torch.mv(steps, v)
            else:
                of_y, of_v = products(steps, torch.stack((newest, v))).unbind()
            if not whole:
                of_y, of_v = space.totals(of_y, of_v)
            self._enter(of_y, self._buffers, views)
        else:
            of_v = torch.mv(steps, v)
            if not whole:
                of_v = space.total(of_v)
        gamma = self.gamma
        # Converted where they differ only: for small `n`, asking takes as long as the arithmetic.
        work, small, mixed = self.dtype, self._small_dtype, self._mixed
        p2 = torch.mv(inverse, of_v.to(small) if mixed else of_v)
        # Scaled before it is multiplied by Y: the square of a gradient may leave the dtype's range.
        along = p2.to(work) if mixed else p2
        scaled = torch.addmv(v, views.of_differences, along, alpha=-1).mul_(gamma)
        of_scaled = torch.mv(differences, scaled)
        if not whole:
            of_scaled = space.total(of_scaled)
        p1 = torch.mv(views.of_inverse, torch.mul(diagonal, p2).sub_(of_scaled))
        if mixed:
            p1 = p1.to(work)
        return scaled.addmv_(views.of_steps, p1, beta=sign, alpha=sign)

    def _enter(self, of_y: Tensor, buffers: _Buffers, views: _Views) -> None:
        """Gives `R^-1` the column of the newest pair, from `S y`, `(c,)`."""
        newest, inverse = self._newest, buffers.inverse
        if self._mixed:
            of_y = of_y.to(self._small_dtype)
        s_y = of_y[newest]
        if self.count == self.history_size:  # the oldest had this row
            inverse[newest].zero_()
            views.columns[newest].zero_()
        # Its row of R^-1 is zero: -R^-1 S y everywhere else, and one there, all over s'y.
        column = torch.addmv(views.units[newest], inverse, of_y, alpha=-1)
        torch.div(column, s_y, out=views.columns[newest])
        views.diagonal[newest].copy_(s_y)
        self._pending = False

    def _grow(self, room: int) -> None:
        """Makes room for more pairs."""
        small, work, device = self._small_dtype, self.dtype, self.device
        # Each in memory of its own, as after loading: sums depend on where a vector begins.
        steps = torch.zeros(room, self.size, dtype=work, device=device)
        differences = torch.zeros_like(steps)
        inverse = torch.zeros(room, room, dtype=small, device=device)
        diagonal = torch.zeros(room, dtype=small, device=device)
        if self._buffers is not None:
            k = self._room
            steps[:k], differences[:k], inverse[:k, :k], diagonal[:k] = self._buffers
        self._hold(_Buffers(steps, differences, inverse, diagonal))

    def _hold(self, buffers: _Buffers) -> None:
        self._buffers = buffers
        self.changes += 2
        self._room = len(buffers.diagonal)
        self._views = _Views(
            buffers.steps.t(),
            buffers.differences.t(),
            buffers.inverse.t(),
            buffers.steps.unbind(),
            buffers.differences.unbind(),
            buffers.inverse.unbind(1),
            buffers.diagonal.unbind(),
            torch.eye(self._room, dtype=self._small_dtype, device=self.device).unbind(),
        )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and dicts: a copy, for rows are overwritten in place."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        if self._buffers is not None:
            state["buffers"] = {name: b.clone() for name, b in self._buffers._asdict().items()}
        return state | {"scales": torch.tensor(self._scales, dtype=torch.float64)}

    def split_state(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The same with the vectors apart: numbers and small tensors, `S` and `Y`.

        The small tensors have room for `m` pairs and are copies; `S` and `Y`, `(c, n)`, are not.
        """
        m, small = self.history_size, self._small_dtype
        none = torch.zeros(0, self.size, dtype=self.dtype, device=self.device)
        empty = torch.zeros(0, dtype=small, device=self.device)
        held = self._buffers or _Buffers(none, none, empty.view(0, 0), empty)
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS if name != "size"}
        scales = torch.tensor(self._scales, dtype=small, device=self.device)
        state |= {"scales": _padded(scales, m), "inverse": _padded(held.inverse, m)}
        state["diagonal"] = _padded(held.diagonal, m)
        return state, held.steps, held.differences

    @staticmethod
    def join_state(state: dict[str, Any], steps: Tensor, differences: Tensor) -> dict[str, Any]:
        """A state for `load_state_dict`: the parts of `split_state`, vectors of any size."""
        room, count = state["_room"], state["count"]
        joined = {name: state[name] for name in _NUMBERS if name != "size"}
        buffers = [
            steps[:room].clone(),
            differences[:room].clone(),
            state["inverse"][:room, :room],
            state["diagonal"][:room],
        ]
        return joined | {
            "size": steps.shape[-1],
            "scales": state["scales"][:count].tolist(),
            "buffers": buffers if room else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state, bit for bit; the tensors move to this operator's device.

        Raises:
            ValueError: The state is of vectors of another length; nothing has changed.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"this history is of vectors of length {state['size']}, not {self.size}"
            )
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self._scales = [float(scale) for scale in state["scales"]]
        self._buffers = self._views = None
        buffers = state.get("buffers")
        if buffers:
            # A list in checkpoints of version 0.1; the order is the same.
            held = buffers.values() if isinstance(buffers, dict) else buffers
            dtypes = (self.dtype, self.dtype, self._small_dtype, self._small_dtype)
            self._hold(_Buffers(*(b.to(self.device, d) for b, d in zip(held, dtypes, strict=True))))


def _padded(tensor: Tensor, size: int) -> Tensor:
    """A copy with zeros after what there is, so that all dimensions are of that size."""
    result = tensor.new_zeros((size,) * tensor.dim())
    result[tuple(slice(length) for length in tensor.shape)] = tensor
    return result


def products(rows: Tensor, vectors: Tensor) -> Tensor:
    """`vectors @ rows.T`, shape `(j, k)`, in one pass over `rows`, shape `(k, n)`."""
    if rows.dtype == torch.float32 and rounds_float32_products():
        # Curvature would have three digits then; products with one vector keep all.
        return torch.stack([torch.mv(rows, vector) for vector in vectors])
    n = rows.shape[1]
    blocks = n // _BLOCK
    if blocks < 2 or rows.device.type != "cpu":
        return torch.mm(vectors, rows.t())
    # CPU libraries take one pass per vector when n is large; block by block the rows stay in cache.
    cut = blocks * _BLOCK
    left = vectors[:, :cut].unflatten(1, (blocks, _BLOCK)).transpose(0, 1)
    right = rows[:, :cut].unflatten(1, (blocks, _BLOCK)).permute(1, 2, 0)
    total = torch.bmm(left, right).sum(0)
    if cut < n:
        total.addmm_(vectors[:, cut:], rows[:, cut:].t())
    return total
