"""A wrapper that keeps parameters in sets, such as spheres and simplices, with any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._closure.validation import check_is_closure
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import makes_state_only
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder._optim.info import Report
from torch_secondorder._optim.present import Scaling
from torch_secondorder._optim.wrapper import Values, WrapperOptimizer
from torch_secondorder._params.space import is_distributed
from torch_secondorder.constraints._sets import ConvexSet, Manifold, TensorSet, widened
from torch_secondorder.constraints.box import Box
from torch_secondorder.optim.constrained import Constrained

__all__ = ["Projected", "ProjectedInfo"]

#: The sets of parameters: pairs of a parameter, or a list of them, and a set; or a dict.
Sets: TypeAlias = Sequence[tuple[Tensor | Sequence[Tensor], TensorSet]] | Mapping[Tensor, TensorSet]

# A parameter is in its set if it is this close to it, in units of the relative precision and of its
# size.
_ROUNDING = 32.0


@dataclass(frozen=True, slots=True)
class ProjectedInfo(Report):
    """Report of one call of `Projected.step()`.

    Attributes:
        violation: The largest distance of an entry from where its set has it, at the end: rounding.
        start_projected: Whether the step began outside of a set, and went to the nearest point of
            it first.
        correction: The distance that the projection at the end has moved the parameters: what the
            optimizer's own step has lost. Zero if the optimizer itself stayed in the sets.
        inner: The report of the optimizer inside, if it has one.

    >>> from torch_secondorder.constraints import NormBall
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = Projected(torch.optim.SGD([x], lr=0.1), [(x, NormBall(1.0))])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = -x.sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.start_projected, optimizer.info.violation < 1e-6
    (True, True)
    """

    violation: float
    start_projected: bool
    correction: float
    inner: Report | None


class _Member(NamedTuple):
    """A parameter, its set, and the sign that makes the optimizer minimize.

    Attributes:
        pressed: Where the last gradient leads out of a curved boundary; a list of at most one mask.
    """

    parameter: Tensor
    set: TensorSet
    sign: float
    pressed: list[Tensor]


class Projected(WrapperOptimizer):
    """Keeps parameters in sets, by wrapping an optimizer.

    The sets are those of `torch_secondorder.constraints`: manifolds (`UnitNorm`, `Orthogonal`) and
    convex sets (`NormBall`, `Box`, `Simplex`). What is done depends on the optimizer inside:

    - **Optimizers of one flat vector** (`LBFGS`, `BFGS`, `NonlinearCG`, `NewtonCG`, `Newton`,
      `LevenbergMarquardt`) minimize along manifolds: steps are tangent and bent back by a
      retraction, gradients and products with the curvature are those along the manifold. They
      converge as fast as without constraints, Newton's method quadratically. A `Box` becomes the
      bounds of those that take bounds. They take no other convex set, because a projection after
      the step may raise the loss.
    - **All others** (`Adam`, `SGD`, `AdaHessian`, ...) get gradients projected onto the tangent
      space, or at the boundary of a convex set onto its tangent cone, and the projection of the
      parameters follows the step. A step that does nothing then is one at a minimum within the
      sets, whatever the optimizer multiplies gradients by. A parameter at the boundary of a ball
      stays there as long as the loss falls outwards. If the optimizer evaluates the closure
      more than once in a step, as `torch.optim.LBFGS` does, the closure sees the projection of
      where it stands, and the gradient is that of the loss of the projection: the projection at the
      end of the step leaves the loss as it was last seen.

    Parameters that begin outside of their set are moved to the nearest point of it first.

    `AdaHessian` and `Sophia` estimate the curvature of the loss itself; with a
    `FunctionalObjective`, that of the loss along the sets.

    Weight decay as part of the loss has no effect on manifolds, where the norm is constant. The
    decay that optimizers such as `AdamW` do themselves shrinks parameters, which the projection
    undoes; in a ball it draws to the center.

    Args:
        optimizer: Any optimizer, of this package or another.
        sets: Pairs `(parameter, set)` or `(list of parameters, set)`, or a dict of sets by
            parameter. Parameters without a set are free.

    Attributes:
        optimizer: The optimizer inside.

    Raises:
        TypeError: The optimizer is no `torch.optim.Optimizer`, a set is none, or a parameter has a
            dtype that its set does not take.
        ValueError: A parameter is not the optimizer's, has two sets, or has a shape that its set
            does not take; or the optimizer does not take the set.

    >>> from torch_secondorder import LBFGS
    >>> from torch_secondorder.constraints import UnitNorm
    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    >>> optimizer = Projected(LBFGS([x]), [(x, UnitNorm())])
    >>> def closure():  # its minimum is the eigenvector of the smallest eigenvalue
    ...     optimizer.zero_grad()
    ...     loss = x @ A @ x
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> [abs(round(v, 6)) for v in x.tolist()], optimizer.info.start_projected
    ([0.0, 0.0, 1.0], True)
    """

    _entry = "projected"
    _keeps_sets = True
    _carried = (*WrapperOptimizer._carried, "_sets")
    _saved: ClassVar[dict[str, str]] = {"steps": "_steps"}

    def __init__(self, optimizer: Optimizer, sets: Sets) -> None:
        super().__init__(optimizer, _NoTerm())
        self._sets = _checked_sets(sets, optimizer)
        inside = self._innermost
        if isinstance(inside, FlatOptimizer):
            _check_flat(inside, [found for _, found in self._sets])
        elif inside is not optimizer and any(isinstance(w, Constrained) for w in self._wrappers()):
            raise ValueError(
                "Constrained measures the constraints at the end of its step, before the "
                "projection: wrap the other way round, as in Constrained(Projected(optimizer, "
                "sets), ...)"
            )

    def _set_up(self) -> None:
        super()._set_up()
        # The parameters as the last step left them, by their versions: they are in their sets.
        self._left: list[int] | None = None
        self._start_projected: bool | None = None
        self._correction: Tensor | None = None
        self._evaluations = 0
        self._present: Sequence[_Member] = ()  # during a step

    @property
    def info(self) -> ProjectedInfo | None:
        """The report of the last step, None before the first."""
        if self._start_projected is None:
            return None
        violation = 0.0
        with torch.no_grad():
            for p, found, *_ in self._members():
                gap = (found.project(p) - p).abs().amax()
                violation = max(violation, gap.item())
        correction = 0.0 if self._correction is None else self._correction.item()
        inner = getattr(self._inside, "info", None)
        return ProjectedInfo(violation, self._start_projected, correction, inner)

    def _members(self) -> list[_Member]:
        """The trainable parameters that have a set."""
        signs = {
            id(p): -1.0 if group.get("maximize") else 1.0
            for group in self.param_groups
            for p in group["params"]
        }
        return [
            _Member(p, found, signs.get(id(p), 1.0), [])
            for p, found in self._sets
            if p.requires_grad
        ]

    # The step.

    def step(self, closure: Any = None, **more: Any) -> Any:
        """Performs a step of the optimizer inside, and keeps the parameters in their sets.

        Args:
            closure: The argument of the optimizer inside: the standard closure, a
                `FunctionalObjective`, or None if the gradients are there already.
            **more: Further arguments of the optimizer inside.

        Returns:
            The value that the optimizer inside returns.

        Raises:
            RuntimeError: A `GradScaler` calls, and a closure was given.
        """
        scaling = Scaling(self)
        if closure is not None:
            scaling.refuse_closure()
        elif makes_state_only(self.param_groups):
            return self._inside.step(**more)
        members, inside = self._members(), self._inside
        # Where it is handed on, gradients keep their scale, which projections do not depend on.
        if scaling.active and not self._hands_on(scaling):
            params = [p for group in self.param_groups for p in group["params"]]
            if not self._unscale(scaling, params):
                return None  # a GradScaler has found infinity
        self._enter(members)
        flat = self._innermost
        with self._handed_on(scaling):
            if isinstance(flat, FlatOptimizer):
                with _handed_over(flat, members):
                    result = inside.step(closure, **more)
                self._correction = None
            else:
                result = self._projected_step(members, closure, more)
        self._left = [p._version for p, *_ in members]
        self._steps += 1
        return result

    def _enter(self, members: Sequence[_Member]) -> None:
        """Moves parameters that are outside of their sets to the nearest point."""
        self._start_projected = False
        if self._left == [p._version for p, *_ in members]:
            return
        with torch.no_grad():
            for p, found, *_ in members:
                nearest = found.project(p)
                size = p.abs().amax().item()
                rounding = _ROUNDING * torch.finfo(p.dtype).eps * max(size, 1.0)
                if (nearest - p).abs().amax().item() > rounding:
                    p.copy_(nearest)
                    self._start_projected = True

    def _projected_step(self, members: Sequence[_Member], closure: Any, more: Any) -> Any:
        """A step of an optimizer that knows nothing of the sets."""
        self._evaluations, self._present = 0, members
        try:
            if closure is None:
                for member in members:
                    _turn_gradient(member)
                return self._inside.step(**more)
            return self._inside.step(self._wrapped(closure), **more)
        finally:
            self._correction = _projected(members)
            self._present = ()

    def _wrapped(self, closure: Any) -> Any:
        """A closure or `FunctionalObjective` whose gradients are projected."""
        # Partial functions of methods of this object, see `PenalizedLoss.closure`.
        if isinstance(closure, FunctionalObjective):
            return closure.with_function(partial(self._evaluate_function, closure))
        check_is_closure(closure)
        return partial(self._evaluate, closure)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        members = self._present
        first, self._evaluations = self._evaluations == 0, self._evaluations + 1
        if first:  # the parameters are in their sets
            loss = closure()
            for member in members:
                _turn_gradient(member)
            return loss
        places = [p.detach().clone() for p, *_ in members]
        with torch.no_grad():
            for p, found, *_ in members:
                p.data.copy_(found.project(p))
        try:
            loss = closure()
        finally:
            for (p, *_), place in zip(members, places, strict=True):
                p.data.copy_(place)
        for member, place in zip(members, places, strict=True):
            _pull_back_gradient(member, place)
        return loss

    def _evaluate_function(self, closure: FunctionalObjective, tree: Any) -> Tensor:
        sets = {id(member.parameter): member for member in self._present}
        leaves, structure = pytree.tree_flatten(tree)
        for i, known in enumerate(closure.leaves):
            if id(known) in sets:
                leaves[i] = _tangential(leaves[i], sets[id(known)])
        return closure.function(pytree.tree_unflatten(leaves, structure))

    # See `WrapperOptimizer`.

    def _factor(self) -> float:
        return 0.0

    def _present_term(self) -> Tensor:  # pragma: no cover - there is none
        raise RuntimeError("a Projected adds no term")

    def __repr__(self) -> str:
        kinds = ", ".join(f"{tuple(p.shape)}: {found!r}" for p, found in self._sets)
        return f"Projected({self._inside!r}, {{{kinds}}})"


# Gradients along a set.


def _along(member: _Member, point: Tensor, gradient: Tensor) -> Tensor:
    """The gradient that leads along the set: minus the tangent part of the step downhill."""
    if isinstance(member.set, Manifold):  # linear: no sign matters
        return member.set._along(point, gradient)
    down = -member.sign * gradient
    if isinstance(member.set, ConvexSet):
        pressed = member.set.pressed(point, down.detach())
        member.pressed[:] = [] if pressed is None else [pressed]
    return -member.sign * member.set._along(point, down)


def _put_gradient(p: Tensor, gradient: Tensor, along: Tensor) -> None:
    """Replaces `p.grad`, in place if it has no graph: others may know it by its memory."""
    if gradient.grad_fn is not None or gradient.layout is not torch.strided:
        p.grad = along
    else:
        gradient.copy_(along)


def _turn_gradient(member: _Member) -> None:
    """Projects `p.grad` at a parameter in its set."""
    p = member.parameter
    gradient = p.grad
    if gradient is None:
        return
    with torch.enable_grad() if gradient.grad_fn is not None else torch.no_grad():
        dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
        _put_gradient(p, gradient, _along(member, p.detach(), dense))


def _pull_back_gradient(member: _Member, place: Tensor) -> None:
    """Turns `p.grad` at the projection of a place into the gradient of the loss there."""
    p = member.parameter
    gradient = p.grad
    if gradient is None:
        return
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    if isinstance(member.set, Manifold):
        with torch.enable_grad() if gradient.grad_fn is not None else torch.no_grad():
            _put_gradient(p, gradient, member.set.differential(place, dense))
        return
    with torch.enable_grad():
        variable = place.requires_grad_()
        nearest = member.set.project(variable)
        (back,) = torch.autograd.grad(nearest, variable, dense.detach())
    with torch.no_grad():
        # On the boundary itself the projection has a derivative to one side only.
        apart = (nearest - variable).abs().amax()
        rounding = _ROUNDING * torch.finfo(p.dtype).eps * variable.abs().amax().clamp(min=1)
        along = _along(member, nearest, dense.detach())
        _put_gradient(p, gradient, torch.where(apart > rounding, back, along))
    member.pressed.clear()  # the loss was seen where the parameters end


class _Tangential(torch.autograd.Function):
    """A parameter whose gradient is projected; a linear map where the set is a manifold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, member: _Member) -> Tensor:
        ctx.member, ctx.point = member, x.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _along(ctx.member, ctx.point, grads[0]), None


def _tangential(x: Tensor, member: _Member) -> Tensor:
    result: Tensor = _Tangential.apply(x, member)  # type: ignore[no-untyped-call]
    return result


def _projected(members: Sequence[_Member]) -> Tensor | None:
    """Moves the parameters into their sets; the distance of the move, without a wait."""
    total: Tensor | None = None
    with torch.no_grad():
        for p, found, _, pressed in members:
            if pressed and isinstance(found, ConvexSet):
                # Multiples of gradients by coordinate may lead inwards, where the next step would
                # come back from: without end, and with a part along the boundary each time.
                nearest = found.on_boundary(p, pressed[0])
            else:
                nearest = found._nearest(p)
            moved = torch.linalg.vector_norm(widened(nearest) - widened(p))
            total = moved if total is None else torch.hypot(total, moved.to(total))
            p.copy_(nearest)
    return total


# Optimizers that stay in the sets themselves.


@contextmanager
def _handed_over(optimizer: FlatOptimizer, members: Sequence[_Member]) -> Iterator[None]:
    """Gives a flat optimizer the sets for a step: manifolds as they are, boxes as bounds."""
    boxes = {id(p): found for p, found, *_ in members if isinstance(found, Box)}
    optimizer._charts = {id(p): found for p, found, *_ in members if isinstance(found, Manifold)}
    before = [group.get("bounds") for group in optimizer.param_groups]
    try:
        if boxes:
            for group in optimizer.param_groups:
                found = [boxes.get(id(p)) for p in group["params"]]
                if any(box is not None for box in found):
                    lows = [None if box is None else box.low for box in found]
                    highs = [None if box is None else box.high for box in found]
                    group["bounds"] = (lows, highs)
        yield
    finally:
        optimizer._charts = None
        for group, bounds in zip(optimizer.param_groups, before, strict=False):
            if boxes:
                group["bounds"] = bounds


def _check_flat(optimizer: FlatOptimizer, sets: Sequence[TensorSet]) -> None:
    """Raises unless a flat optimizer can stay in the sets."""
    name = type(optimizer).__name__
    boxes = [found for found in sets if isinstance(found, Box)]
    others = [found for found in sets if not isinstance(found, (Box, Manifold))]
    if others:
        raise ValueError(
            f"{name} cannot stay in {others[0]!r}, and a projection after its step could raise the "
            "loss: use Constrained(optimizer, inequalities=...) or, with Projected, an optimizer "
            "such as torch.optim.SGD or Adam"
        )
    if boxes and not optimizer._takes_bounds:
        raise ValueError(
            f"{name} takes no bounds and so no Box: use LBFGS, BFGS, Newton or LevenbergMarquardt, "
            "or an optimizer such as torch.optim.Adam"
        )
    bounded = any(group.get("bounds") is not None for group in optimizer.param_groups)
    if boxes and bounded:
        raise ValueError(
            f"{name} has bounds already, which a Box would replace: say all bounds in one place"
        )
    if len(boxes) < len(sets) and (boxes or bounded):
        raise ValueError(
            f"{name} takes bounds or manifolds, not both: keep the bounds by Constrained("
            "optimizer, inequalities=...), or use an optimizer such as torch.optim.Adam"
        )
    if len(boxes) < len(sets) and not optimizer._takes_manifolds:
        raise ValueError(
            f"{name} takes no manifolds: use LBFGS, BFGS, NonlinearCG, NewtonCG, Newton or "
            "LevenbergMarquardt"
        )


# Arguments.

_FORM = (
    "sets must be a list of pairs (parameter or list of parameters, set), or a dict of sets by "
    "parameter"
)


def _checked_sets(sets: Any, optimizer: Optimizer) -> list[tuple[Tensor, TensorSet]]:
    """The parameters with their sets."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: list[tuple[Tensor, TensorSet]] = []
    for given, tensor_set in _pairs(sets):
        if not isinstance(tensor_set, TensorSet):
            _refuse_set(tensor_set)
        if not isinstance(given, (Tensor, Sequence)) or isinstance(given, str):
            raise TypeError(f"{_FORM}; got {type(given).__name__} for a parameter")
        for p in [given] if isinstance(given, Tensor) else given:
            if not isinstance(p, Tensor):
                raise TypeError(f"{_FORM}; got {type(p).__name__} for a parameter")
            if id(p) not in owned:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a set but is not the optimizer's: "
                    "give the very tensors that the optimizer was given"
                )
            if any(p is other for other, _ in found):
                raise ValueError(f"a parameter of shape {tuple(p.shape)} has two sets")
            if is_distributed(p):
                raise ValueError(
                    "a set is one of whole tensors, and the parameters are sharded: leave "
                    "fully_shard out (DistributedDataParallel is fine)"
                )
            tensor_set.check(p)
            found.append((p, tensor_set))
    if not found:
        raise ValueError("there is no set: give at least one parameter with its set")
    return found


def _pairs(sets: Any) -> list[tuple[Any, Any]]:
    if isinstance(sets, Mapping):
        return list(sets.items())
    if not isinstance(sets, Sequence) or isinstance(sets, str):
        raise TypeError(f"{_FORM}; got {type(sets).__name__}")
    for pair in sets:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{_FORM}; got {type(pair).__name__} as one of the pairs")
    return list(sets)


def _refuse_set(found: Any) -> NoReturn:
    if isinstance(found, type) and issubclass(found, TensorSet):
        raise TypeError(f"{found.__name__} is a class: make a set, as in {found.__name__}()")
    raise TypeError(
        "a set is one of torch_secondorder.constraints, such as UnitNorm(), got "
        f"{type(found).__name__}"
    )


class _NoTerm:
    """A term for the base class, which is never asked for; see `Term`."""

    def watching(self, seed: int, tree: Any = None) -> Any:  # pragma: no cover - never asked
        return nullcontext(Values)

    def missing(self) -> RuntimeError:  # pragma: no cover - never asked
        return RuntimeError("a Projected adds no term")
