"""Constraints in SciPy's forms, as the equalities and inequalities of a `Constrained` optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder.minimization._bounds import Bound
from torch_secondorder.minimization._gradients import recorded
from torch_secondorder.minimization._jacobians import Differences, WithJacobian
from torch_secondorder.minimization._trees import as_tensor

_FORMS = (
    "a dict {'type': 'eq' or 'ineq', 'fun': function}, or an object with fun, lb and ub, such as "
    "scipy.optimize.NonlinearConstraint, or with A, lb and ub, such as LinearConstraint"
)
_KEYS = ("type", "fun", "jac", "args")
_SCHEMES = ("2-point", "3-point")


@dataclass
class Given:
    """One constraint `low <= fun(x) <= high`, as it was given.

    Attributes:
        name: In errors and results.
        fun: Takes the tree.
        jac: A function that takes the tree, the name of a scheme of differences, or None for
            autograd.
        low: Float64, of a shape that broadcasts to the values'.
        high: Likewise.
        rel_step: The relative step of differences; None for the default.
    """

    name: str
    fun: Callable[[Any], Any]
    jac: Callable[[Any], Any] | str | None
    low: Tensor
    high: Tensor
    rel_step: float | None = None


def read_constraints(constraints: Any, leaves: Sequence[Tensor]) -> list[Given]:
    """The constraints, checked as far as that takes no evaluation.

    Args:
        constraints: One in any of the forms that `minimize` takes, a list or tuple of them, or a
            dict of them by name.
        leaves: The leaves of `x0`.

    Raises:
        TypeError: Something given has none of the forms, or a part of it a wrong type.
        ValueError: A dict has wrong entries, bounds cross or are NaN, or a matrix does not fit.
    """
    return [_read(name, one, leaves) for name, one in _named(constraints).items()]


def _named(constraints: Any) -> dict[str, Any]:
    if constraints is None:
        return {}
    if isinstance(constraints, Mapping):
        if constraints and all(_is_one(value) for value in constraints.values()):
            return {str(name): value for name, value in constraints.items()}
        return {"constraints": constraints}
    if isinstance(constraints, (list, tuple)):
        return {f"constraints[{i}]": one for i, one in enumerate(constraints)}
    return {"constraints": constraints}


def _is_one(value: Any) -> bool:
    """True for what may be meant as a constraint, rather than as an entry of one."""
    return isinstance(value, Mapping) or (hasattr(value, "lb") and hasattr(value, "ub"))


def _read(name: str, one: Any, leaves: Sequence[Tensor]) -> Given:
    if isinstance(one, Mapping):
        return _of_dict(name, one)
    if not _is_one(one):
        raise TypeError(f"{name} must be {_FORMS}; got {type(one).__name__}")
    if hasattr(one, "fun"):
        fun, jac = one.fun, _checked_jac(name, getattr(one, "jac", None))
        if not callable(fun):
            raise TypeError(f"fun of {name} must be a function, got {type(fun).__name__}")
    elif hasattr(one, "A"):
        fun, jac = _Product(name, one.A, leaves), None
    else:
        raise TypeError(
            f"{name} has lb and ub, but neither fun nor A: pass bounds of x as bounds={name}"
        )
    low, high = _limits(name, one.lb, one.ub)
    keep = as_tensor(getattr(one, "keep_feasible", False))
    if bool(keep.any()):
        warnings.warn(
            f"keep_feasible of {name} is not kept: iterates may violate constraints on the way, "
            "only bounds hold throughout. Where a function is undefined, let it return NaN: such "
            "trials are stepped back from",
            stacklevel=4,
        )
    step = getattr(one, "finite_diff_rel_step", None)
    return Given(name, fun, jac, low, high, step)


def _of_dict(name: str, one: Mapping[str, Any]) -> Given:
    unknown = [key for key in one if key not in _KEYS]
    if unknown:
        raise ValueError(
            f"{name} has unknown keys {', '.join(map(repr, unknown))}: a constraint is {_FORMS}; "
            "further keys of a dict are 'jac' and 'args'"
        )
    for key in ("type", "fun"):
        if key not in one:
            raise ValueError(f"{name} has no {key!r}: a constraint is {_FORMS}")
    kind = one["type"]
    if not isinstance(kind, str):
        raise TypeError(f"the type of {name} must be 'eq' or 'ineq', got {kind!r}")
    if kind.lower() not in ("eq", "ineq"):
        raise ValueError(
            f"the type of {name} must be 'eq' for fun(x) = 0 or 'ineq' for fun(x) >= 0, got "
            f"{kind!r}"
        )
    fun, jac = one["fun"], _checked_jac(name, one.get("jac"))
    if not callable(fun):
        raise TypeError(f"fun of {name} must be a function, got {type(fun).__name__}")
    args = one.get("args", ())
    if args is None:
        args = ()
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    if args:
        fun = _with_arguments(fun, args)
        jac = _with_arguments(jac, args) if callable(jac) else jac
    zero = torch.zeros((), dtype=torch.float64)
    return Given(name, fun, jac, zero, zero if kind.lower() == "eq" else zero + inf)


def _with_arguments(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Any], Any]:
    return lambda x: function(x, *args)


def _checked_jac(name: str, jac: Any) -> Any:
    if jac is None or callable(jac) or jac in (*_SCHEMES, "cs"):
        return jac
    raise ValueError(
        f"jac of {name} must be None for autograd, a function, '2-point' or '3-point', got {jac!r}"
    )


def _limits(name: str, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """The bounds of a constraint's values, broadcast against each other."""
    found = []
    for side, bound in (("lb", low), ("ub", high)):
        try:
            limit = as_tensor(bound).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{side} of {name} must be a number or an array, got {type(bound).__name__}"
            ) from None
        if bool(limit.isnan().any()):
            raise ValueError(f"{side} of {name} is NaN: use -inf or inf where there is no bound")
        found.append(limit)
    try:
        lower, upper = torch.broadcast_tensors(*found)
    except RuntimeError:
        shapes = [tuple(limit.shape) for limit in found]
        raise ValueError(
            f"lb and ub of {name} have shapes {shapes[0]} and {shapes[1]}, which do not broadcast"
        ) from None
    crossed = (lower > upper) | (lower == inf) | (upper == -inf)
    if bool(crossed.any()):
        place = tuple(crossed.nonzero()[0].tolist())
        raise ValueError(
            f"lb of {name} is {float(lower[place])} and ub is {float(upper[place])}"
            f"{_at(place)}: no value lies between them"
        )
    return lower, upper


def _at(place: tuple[int, ...]) -> str:
    return f" at {place[0] if len(place) == 1 else place}" if place else ""


class _Product:
    """The function `A x` of a linear constraint, with the leaves of a tree one after another."""

    def __init__(self, name: str, A: Any, leaves: Sequence[Tensor]) -> None:
        if any(leaf.is_complex() for leaf in leaves):
            raise TypeError(
                f"A of {name} multiplies real numbers, and x0 is complex: pass a function that "
                "returns real numbers, with lb and ub"
            )
        try:
            matrix = as_tensor(A.toarray() if hasattr(A, "toarray") else A).detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"A of {name} must be a matrix, got {type(A).__name__}") from None
        if matrix.layout is not torch.strided:
            matrix = matrix.to_dense()
        size = sum(leaf.numel() for leaf in leaves)
        if matrix.dim() not in (1, 2) or matrix.shape[-1] != size:
            raise ValueError(
                f"A of {name} has shape {tuple(matrix.shape)}, and x0 has {size} entries: its "
                f"shape must be (m, {size}), or ({size},) for one constraint"
            )
        if matrix.is_complex() or not bool(matrix.isfinite().all()):
            raise ValueError(f"A of {name} must hold finite real numbers")
        dtype = leaves[0].dtype
        for leaf in leaves:
            dtype = torch.promote_types(dtype, leaf.dtype)
        self._A = torch.atleast_2d(matrix).to(leaves[0].device, dtype)

    def __call__(self, x: Any) -> Tensor:
        A = self._A
        leaves = [x] if isinstance(x, Tensor) else pytree.tree_leaves(x)
        product: Tensor = A @ torch.cat([leaf.reshape(-1).to(A) for leaf in leaves])
        return product


class ConstraintSet:
    """All constraints of a problem, evaluated together, and their multipliers.

    The values `c` of each constraint become rows: an equality `c - low` where both bounds are the
    same number, and otherwise inequalities `low - c <= 0` and `c - high <= 0` for finite bounds.
    All equalities come first; the inequalities follow, each constraint's lower ones before its
    upper ones.

    Args:
        given: The constraints.
        tree: The start, within the bounds, where each function is evaluated once.
        limits: The bounds of each leaf of `x`, for differences; None for none.

    Attributes:
        names: Of the constraints.
        n_equalities: Rows that are equalities.
        n_inequalities: Rows that are inequalities.
        nfev: Evaluations of each constraint.
        njev: Jacobians of each constraint.

    Raises:
        TypeError: A function returns no numbers, or no tensor with a graph where autograd needs
            one.
        ValueError: Bounds do not broadcast to the values, or a Jacobian has a wrong shape.
    """

    def __init__(
        self,
        given: Sequence[Given],
        tree: Any,
        limits: Sequence[tuple[Bound, Bound]] | None,
    ) -> None:
        self._parts = [_Part(one, tree, limits) for one in given]
        self.names = [one.name for one in given]
        self._pending: tuple[Any, list[Tensor]] | None = None
        largest = [part.violation(part.first) for part in self._parts]
        #: The largest violation at the start.
        self.violation_at_start = max((v.max().item() for v in largest if v.numel()), default=0.0)
        self.n_equalities = sum(len(part.equal) for part in self._parts)
        self.n_inequalities = sum(len(part.lower) + len(part.upper) for part in self._parts)

    @property
    def nfev(self) -> list[int]:
        return [part.nfev for part in self._parts]

    @property
    def njev(self) -> list[int]:
        return [part.njev for part in self._parts]

    @property
    def schemes(self) -> set[str]:
        """The schemes of differences that derivatives come from."""
        return {part.scheme for part in self._parts if part.scheme is not None}

    def values(self, tree: Any) -> list[Tensor]:
        """The values of each constraint in the shape of its function, with their graph."""
        return [part(tree) for part in self._parts]

    def equalities(self, tree: Any) -> Tensor:
        """The rows that are equalities; those of a tree come before its inequalities."""
        values = self.values(tree)
        if self.n_inequalities:
            self._pending = tree, values
        return self.rows(values)[0]

    def inequalities(self, tree: Any) -> Tensor:
        """The rows that are inequalities."""
        pending, self._pending = self._pending, None
        known = pending is not None and pending[0] is tree
        return self.rows(pending[1] if known and pending else self.values(tree))[1]

    def rows(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The equalities and the inequalities of values."""
        first = values[0]
        equal, unequal = [], []
        for part, value in zip(self._parts, values, strict=True):
            c = value.reshape(-1).to(first.device)
            low, high = part.low.to(c), part.high.to(c)
            equal.append((c - low)[part.equal])
            unequal += [(low - c)[part.lower], (c - high)[part.upper]]
        return torch.cat(equal), torch.cat(unequal)

    def spread(self, rows: Tensor) -> list[Tensor]:
        """Multipliers of the rows as multipliers of the values, each in its function's shape.

        With them, the gradient of the Lagrangian is that of the function plus the sum of `J'v`.
        Those at an upper bound are not negative, those at a lower bound not positive, as in SciPy.
        """
        sizes = [len(part.equal) for part in self._parts]
        for part in self._parts:
            sizes += [len(part.lower), len(part.upper)]
        pieces = rows.split(sizes)
        n, found = len(self._parts), []
        for i, part in enumerate(self._parts):
            v = rows.new_zeros(len(part.low))
            v[part.equal] += pieces[i]
            v[part.lower] -= pieces[n + 2 * i]
            v[part.upper] += pieces[n + 2 * i + 1]
            found.append(v.reshape(part.shape))
        return found

    def violations(self, values: Sequence[Tensor]) -> list[Tensor]:
        """By how much the values lie outside of their bounds, in the shapes of the values."""
        return [part.violation(value) for part, value in zip(self._parts, values, strict=True)]

    def entry(self, constraint: int, place: int) -> str:
        """The name of an entry of a constraint, such as `constraints[0][3]`."""
        shape = self._parts[constraint].shape
        where = [int(i) for i in torch.unravel_index(torch.tensor(place), shape)]
        name = self.names[constraint]
        return f"{name}[{', '.join(map(str, where))}]" if where else name


class _Part:
    """One constraint: its values with their derivatives, and which of them are bounded how.

    Attributes:
        first: The values at the start.
        shape: Their shape.
        low: The lower bounds, flat, float64 on the CPU.
        high: The upper ones.
        equal: The places of the equalities among the flat values.
        lower: Those of inequalities with a lower bound.
        upper: Likewise.
        nfev: Evaluations.
        njev: Jacobians.
    """

    def __init__(
        self, given: Given, tree: Any, limits: Sequence[tuple[Bound, Bound]] | None
    ) -> None:
        self._given = given
        self._like = pytree.tree_leaves(tree)[0]
        self._evaluations = 0
        self.first, self._numeric = self._first(tree, limits)
        self.shape = self.first.shape
        single = self.first.numel() == 1
        try:
            low, high = (
                b.reshape(self.shape) if single else b.broadcast_to(self.shape)
                for b in (given.low, given.high)
            )
        except RuntimeError:
            raise ValueError(
                f"{given.name} returns values of shape {tuple(self.shape)}, to which its bounds of "
                f"shape {tuple(given.low.shape)} do not broadcast"
            ) from None
        self.low, self.high = low.reshape(-1), high.reshape(-1)
        equal = self.low == self.high
        self.equal, self.lower, self.upper = (
            mask.nonzero()[:, 0]
            for mask in (equal, ~equal & (self.low > -inf), ~equal & (self.high < inf))
        )
        if self._numeric is not None:  # a Jacobian of a wrong shape is an error now
            self(tree)

    @property
    def scheme(self) -> str | None:
        """The scheme of differences that derivatives come from, if they do."""
        jac = self._given.jac
        return jac if isinstance(jac, str) and self._numeric is not None else None

    @property
    def nfev(self) -> int:
        return self._evaluations

    @property
    def njev(self) -> int:
        return self._evaluations if self._numeric is None else self._numeric.jacobians

    def __call__(self, tree: Any) -> Tensor:
        """The values, with their graph."""
        if self._numeric is not None:
            value = self._numeric(tree)
        else:
            self._evaluations += 1
            value = self._tensor(recorded(self._given.fun, tree))
        if value.shape != self.shape:
            raise RuntimeError(
                f"{self._given.name} returned values of shape {tuple(value.shape)} after some of "
                f"shape {tuple(self.shape)}: every entry has a multiplier, so the shape must stay"
            )
        return value

    def violation(self, value: Tensor) -> Tensor:
        """By how much values lie outside of their bounds, in their shape."""
        c = value.detach().reshape(-1)
        low, high = self.low.to(c), self.high.to(c)
        return torch.maximum(low - c, c - high).clamp(min=0).reshape(value.shape)

    def _first(
        self, tree: Any, limits: Sequence[tuple[Bound, Bound]] | None
    ) -> tuple[Tensor, WithJacobian | None]:
        """The values at the start, and where derivatives come from if not from autograd."""
        jac, name = self._given.jac, self._given.name
        if not callable(jac):
            value = self._by_autograd(tree, required=jac is None)
            if value is not None:
                return value, None
            if jac is None:
                raise ValueError(
                    f"the values of {name} do not depend on x by operations that autograd records: "
                    "compute them from x by operations of torch, without .detach(), .item() or "
                    "NumPy, or give the constraint a jac: a function, '2-point' or '3-point'"
                )
            if jac == "cs":
                raise ValueError(
                    f"jac='cs' of {name} needs a function of complex numbers: compute the values "
                    "by operations of torch, for exact derivatives, or pass '2-point' or '3-point'"
                )
        if any(leaf.is_complex() for leaf in pytree.tree_leaves(tree)):
            raise TypeError(
                f"{name} must be computed by operations of torch, for x0 is complex: its values "
                "have no graph"
            )
        with torch.no_grad():
            value = self._numbers(tree)
        if callable(jac):
            return value, WithJacobian(self._numbers, self._jacobian)
        assert isinstance(jac, str)
        return value, Differences(self._numbers, jac, limits, self._given.rel_step)

    def _by_autograd(self, tree: Any, *, required: bool) -> Tensor | None:
        """The values at the start, detached; None if they have no graph."""
        copies = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree)
        self._evaluations += 1
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                if not required:  # of a tensor that becomes a number, as it may
                    warnings.simplefilter("ignore", UserWarning)
                value = self._tensor(recorded(self._given.fun, copies))
        except TypeError as error:
            if required or "hands x to NumPy" not in str(error):
                raise TypeError(f"{self._given.name}: {error}") from error.__cause__
            return None
        return value.detach() if value.requires_grad else None

    def _numbers(self, tree: Any) -> Tensor:
        """The values without their graph."""
        self._evaluations += 1
        return self._tensor(self._given.fun(tree)).detach()

    def _jacobian(self, tree: Any) -> Any:
        """The Jacobian that the user gives, in the shapes that `WithJacobian` takes."""
        assert callable(self._given.jac)
        found = self._given.jac(tree)
        leaves = pytree.tree_leaves(tree)
        parts = [found] if isinstance(tree, Tensor) else pytree.tree_leaves(found)
        if len(parts) != len(leaves):
            raise ValueError(
                f"jac of {self._given.name} returned {len(parts)} tensors, and x0 has "
                f"{len(leaves)}: return a tree like x0"
            )
        return [self._jacobian_by(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]

    def _jacobian_by(self, part: Any, leaf: Tensor) -> Tensor:
        J = self._tensor(part.toarray() if hasattr(part, "toarray") else part, "jac")
        wanted = (*self.shape, *leaf.shape)
        if self.shape.numel() == 1 and J.numel() == leaf.numel():
            J = J.reshape(wanted)
        if J.shape != wanted:
            raise ValueError(
                f"jac of {self._given.name} returned shape {tuple(J.shape)}; for values of shape "
                f"{tuple(self.shape)} and x of shape {tuple(leaf.shape)} it must be {wanted}"
            )
        return J

    def _tensor(self, found: Any, source: str = "fun") -> Tensor:
        """The tensor of real numbers that a function returned, or that what it returned becomes."""
        like = self._like
        try:
            if isinstance(found, (list, tuple)) and any(isinstance(v, Tensor) for v in found):
                found = torch.stack([torch.as_tensor(v).to(like.device) for v in found])
            value = found if isinstance(found, Tensor) else as_tensor(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{source} of {self._given.name} must return numbers, got {type(found).__name__}"
            ) from error
        if value.is_complex():
            raise TypeError(f"{source} of {self._given.name} must return real numbers, not complex")
        if value.layout is not torch.strided:
            value = value.to_dense()
        if isinstance(found, Tensor) and value.is_floating_point():
            return value
        real = torch.float64 if like.dtype in (torch.float64, torch.complex128) else torch.float32
        return value.to(like.device, real)
