"""Second derivatives of custom autograd functions, compared with differences.

Nothing tells whether the backward of a `torch.autograd.Function` can be differentiated: if it runs
without a graph, or reuses results of the forward pass, a second derivative is silently wrong. So a
function is examined by itself whenever it is applied in a new way. Let `F(x, g)` be its backward,
for inputs `x` and incoming gradients `g`. With random `w`:

* `F` is linear in `g`, so the derivative of `w'F` by `g`, times `g`, is `w'F` again. That is exact,
  and all that products with a Jacobian and its transpose need (Gauss-Newton, Fisher).
* The derivative of `w'F` by `x`, times a direction, is a difference of `w'F`. Hessians need it.

First derivatives are taken as they are: a straight-through estimator is a function like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_secondorder._foundation.private_torch import APPLY_IN_C, FORWARD_CLASS
from torch_secondorder._foundation.random_state import random_state, set_random_state

#: Modules of PyTorch whose functions are right, raise by themselves, or do more than compute.
_TRUSTED = (
    "torch.autograd.",
    "torch.distributed.",
    "torch.nn.modules._functions.SyncBatchNorm",
    "torch.nn.modules._functions.BackwardHookFunction",
    "torch.nn.parallel.",
    "torch.nested.",
    "torch.utils.checkpoint.",
    "torch._dynamo.",
    "torch._functorch.",
    "torch._higher_order_ops.",
    "torch_secondorder.",
)
# The file of the wrapper that `once_differentiable` puts around a backward.
_MARKED_IN = once_differentiable(lambda *_: None).__code__.co_filename

# Errors that pass, relative to what is compared. What is wrong lacks a term, or has one too many.
_TOLERANCE, _TOLERANCE_OF_WHOLE = 0.02, 0.1
# The second time few entries of each input move, so that hardly any passes a kink; how many, and
# how often.
_ENTRIES, _TIMES = 16, 4
# The shortest step, as a multiple of the usual.
_NEAREST = 0.125

_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError)


class Finding(NamedTuple):
    """The result of examining a custom function.

    Attributes:
        name: The function's.
        transposes: Whether its backward can be differentiated by the incoming gradient.
        curves: Whether it can be differentiated by the inputs as well.
        reason: What is wrong.
    """

    name: str
    transposes: bool = True
    curves: bool = True
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.reason}"


# By function and by how it was applied.
_findings: WeakKeyDictionary[Any, dict[Any, Finding]] = WeakKeyDictionary()


def trusted(cls: type) -> bool:
    """True if a function is known to be right, or must not be run for a test."""
    return f"{cls.__module__}.{cls.__qualname__}".startswith(_TRUSTED)


def applied(cls: Any, apply: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Finding | None]:
    """Applies a custom function, and examines it first where that is new.

    Args:
        cls: The function.
        apply: What applies it.
        args: Its arguments.

    Returns:
        What it returned, and what was found; None where no gradient passes through it.
    """
    if not any(map(_differentiated, args)):
        return apply(*args), None
    found = _findings.setdefault(cls, {})
    kind = tuple(map(_kind, args))
    finding = found.get(kind)
    if finding is None:
        finding, lasts = _examined(cls, apply, args)
        if lasts:
            found[kind] = finding
    return apply(*args), finding


def _differentiated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _kind(argument: Any) -> Any:
    """The kind of an argument, which tells ways to apply a function apart."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device.type, argument.dim(), argument.requires_grad
    if argument is None or isinstance(argument, (bool, str)):
        return argument
    return type(argument)


def _examined(cls: Any, apply: Callable[..., Any], args: Sequence[Any]) -> tuple[Finding, bool]:
    """The finding, and whether it holds for other values."""
    name = cls.__name__
    if marked_once_differentiable(cls):
        return Finding(name, False, False, "marked once_differentiable"), True
    rerun = _Rerun(apply, args)
    with rerun.undisturbed():
        try:
            examination = _Examination(rerun, rerun.points)
            if examination.telling:
                return Finding(name, *examination.result), True
            # Nothing changes here, where all is zero perhaps, or saturated.
            blank = examination.blank
            for points in rerun.elsewhere():
                with suppress(_NotFinite, *_ERRORS):  # beyond the domain
                    examination = _Examination(rerun, points)
                    blank = blank and examination.blank
                    if examination.telling:
                        break
            return Finding(name, *examination.result), not blank
        except _NotFinite:
            return Finding(name), False
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:
            reason = str(error).strip().partition("\n")[0]
            return Finding(name, False, False, f"which raises {reason!r}"), True


_NOTE = "_torch_secondorder_finding"


def note(node: Any, finding: Finding | None) -> None:
    """Notes at the node of a custom function what was found where it was applied."""
    if node is not None and finding is not None:
        setattr(node, _NOTE, finding)


def finding_at(node: Any) -> Finding | None:
    """The finding for a node; None for one of PyTorch's own, or of a trusted function."""
    cls = getattr(type(node), FORWARD_CLASS, None)
    if cls is None or trusted(cls):
        return None
    reason = (
        "which was applied where it could not be examined, before the optimizer began to see "
        "anything or by a copy of its `apply` (say `Function.apply(...)` at each call)"
    )
    finding: Finding = getattr(node, _NOTE, Finding(cls.__name__, False, False, reason))
    return finding


def unseen(node: Any) -> bool:
    """True if a custom function was applied by a copy of its `apply` that nothing can notice."""
    return APPLY_IN_C and finding_at(node) is not None and not hasattr(node, _NOTE)


def marked_once_differentiable(cls: Any) -> bool:
    """True if the backward of a custom function is marked `once_differentiable`."""
    backward = getattr(cls, "backward", None)
    while backward is not None:
        code = getattr(backward, "__code__", None)
        if code is not None and code.co_filename == _MARKED_IN:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


class _NotFinite(Exception):
    """Nothing can be compared: numbers are infinite, or none."""


class _Rerun:
    """Applies a function again, at other points, with the same random numbers.

    Inputs that are leaves stay the tensors that they are and move in place, for some functions read
    them from where else they are held; of all others the function gets copies.

    Attributes:
        points: The inputs that are differentiated by.
    """

    def __init__(self, apply: Callable[..., Any], args: Sequence[Any]) -> None:
        self._apply = apply
        self._args = args
        self._places = [i for i, a in enumerate(args) if _differentiated(a)]
        self._given: list[Tensor] = [args[i] for i in self._places]
        self.points = [t.detach().clone() for t in self._given]
        devices = {torch.device("cpu"), *(t.device for t in self._given)}
        self._states = [(device, random_state(device)) for device in devices]
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leaves random state and the values of leaves as they were."""
        try:
            # Where a checkpoint counts what is saved, it is not to count this.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same), torch.enable_grad():
                yield
        finally:
            for tensor, point in zip(self._given, self.points, strict=True):
                if tensor.is_leaf:
                    tensor.data.copy_(point)
            self._rewind()

    def _rewind(self) -> None:
        for device, state in self._states:
            set_random_state(device, state)

    def at(self, points: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs at some points, and the outputs there."""
        self._rewind()
        args = [a.detach().clone() if isinstance(a, Tensor) else a for a in self._args]
        inputs = []
        for i, given, point in zip(self._places, self._given, points, strict=True):
            if given.is_leaf:
                given.data.copy_(point)
                args[i] = given
                inputs.append(given)
            else:
                inputs.append(point.clone().requires_grad_())
                args[i] = inputs[-1].clone()  # the function may write to it
        result = self._apply(*args)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        return inputs, [y for y in outputs if _differentiated(y)]

    def backward(self, points: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
        """The gradients `F` at some points."""
        inputs, outputs = self.at(points)
        found = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
        return _dense(found, inputs)

    def elsewhere(self) -> Iterator[list[Tensor]]:
        """Points some distance away in terms of the entries' sizes, and such of size one."""
        yield [p + 0.5 * _sizes(p) * self.normal(p) for p in self.points]
        yield [self.normal(p).abs() * _signs(p) for p in self.points]

    def normal(self, like: Tensor) -> Tensor:
        """Normal random numbers, as many as a tensor has."""
        dtype = torch.complex64 if like.is_complex() else torch.float32
        return torch.randn(like.shape, generator=self._generator, dtype=dtype).to(like)

    def uniform(self, like: Tensor) -> Tensor:
        """Random numbers from 0.5 to 1.5, as many as a tensor has."""
        return (0.5 + torch.rand(like.shape, generator=self._generator)).to(like)

    def chosen(self, weights: Tensor) -> Tensor:
        """One at a few random entries, rather at such of large weight, and zero at all others."""
        flat = weights.reshape(-1).to("cpu", torch.float64)
        mask = torch.zeros_like(flat)
        if len(flat):
            flat = flat + 0.1 * flat.mean() + 1e-300
            cumulative = flat.cumsum(0)
            at = torch.rand(_ENTRIES, generator=self._generator, dtype=flat.dtype) * cumulative[-1]
            mask[torch.searchsorted(cumulative, at).clamp(max=len(flat) - 1)] = 1.0
        return mask.view(weights.shape).to(weights.device)


class _Examination:
    """The comparison at one point.

    Attributes:
        result: Whether it transposes, whether it curves, and what is wrong.
        telling: Whether the gradients change at all, so that something could be seen.
        blank: Whether they are zero.
    """

    def __init__(self, rerun: _Rerun, points: Sequence[Tensor]) -> None:
        self._rerun, self._points = rerun, points
        self.result = (True, True, "")
        self.telling = True
        self.blank = False
        inputs, outputs = rerun.at(points)
        if not outputs:
            return
        self._incoming = [(rerun.normal(y) / _typical(y)).requires_grad_() for y in outputs]
        gradients = torch.autograd.grad(
            outputs, inputs, self._incoming, create_graph=True, allow_unused=True
        )
        self._values = values = _dense(gradients, inputs)
        self.blank = not any(bool(v.any()) for v in values)
        if not all(bool(v.isfinite().all()) for v in values):
            raise _NotFinite
        if any(not g.requires_grad and bool(g.any()) for g in gradients if g is not None):
            self.result = False, False, "whose backward leaves no graph"
            return
        # Each input has the same part in what is compared.
        self._weights = [
            rerun.uniform(v) * v.sgn() / v.abs().sum().clamp(min=_tiny(v)) for v in values
        ]
        self._slopes, self._of_incoming = self._seconds(gradients, inputs)
        self._incoming = [g.detach() for g in self._incoming]
        self._eps = max(torch.finfo(p.dtype).eps for p in points)
        whole = _dot(self._weights, values)
        error = abs(_dot(self._of_incoming, self._incoming) - whole)
        transposes = error <= (_TOLERANCE_OF_WHOLE + 4 * len(values) * self._eps)
        # Not linear in what comes in: what clips gradients is not, and has a second derivative.
        curves = (transposes or self._follows_incoming()) and self._curves()
        if not (transposes and curves):
            reason = "whose backward is not differentiated rightly by its inputs"
            self.result = transposes, curves, reason if transposes else _NOT_LINEAR

    def _seconds(
        self, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """The derivatives of `w'F` by the inputs, and by what came in."""
        by = [*inputs, *self._incoming]
        pairs = [
            (g, w)
            for g, w in zip(gradients, self._weights, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs), [None] * len(self._incoming)
        kept, chosen = zip(*pairs, strict=True)
        found = torch.autograd.grad(kept, by, chosen, allow_unused=True)
        return found[: len(inputs)], found[len(inputs) :]

    def _follows_incoming(self) -> bool:
        """True if the derivative by the incoming gradients is a difference."""
        still = [torch.zeros_like(p) for p in self._points]
        incoming = [g * self._rerun.uniform(g) for g in self._incoming]
        every = [torch.ones_like(w, dtype=torch.bool) for w in self._weights]
        view = self._view(still, incoming, every)
        return view.agrees and view.telling

    def _curves(self) -> bool:
        """True if products with the second derivative are differences."""
        direction = [self._direction(p, s) for p, s in zip(self._points, self._slopes, strict=True)]
        incoming = [torch.zeros_like(g) for g in self._incoming]
        every = [torch.ones_like(w, dtype=torch.bool) for w in self._weights]
        first = self._view(direction, incoming, every)
        self.telling = first.telling
        if first.agrees and first.telling:
            return True
        # Kinks may lie between the points that were compared: where few entries move, hardly any.
        votes = [first.agrees] * first.telling
        share = _ENTRIES / max(1, *(p.numel() for p in self._points))
        for _ in range(_TIMES):
            few = [
                d * self._rerun.chosen(smooth).to(d)
                for d, smooth in zip(direction, first.smooth, strict=True)
            ]
            view = self._view(few, incoming, self._reached(few, incoming))
            if view.telling or (first.telling and view.noise < 0.3 * share * first.error):
                votes.append(view.agrees)
        self.telling = bool(votes)
        return 2 * sum(votes) >= len(votes)

    def _direction(self, point: Tensor, slope: Tensor | None) -> Tensor:
        """A direction in which much changes, whose entries are as large as the point's."""
        signs = _signs(point if slope is None or not bool(slope.any()) else slope)
        return _sizes(point) * self._rerun.uniform(point) * signs

    def _reached(self, direction: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
        """The entries that may change along a direction: nothing is rounded elsewhere."""
        here = self._moved(direction, incoming, 0.0)
        there = self._moved(direction, incoming, 1.0)
        return [(a != b) | (d != 0) for a, b, d in zip(here, there, direction, strict=True)]

    def _moved(
        self, direction: Sequence[Tensor], incoming: Sequence[Tensor], step: float
    ) -> list[Tensor]:
        """The gradients a step away."""
        return self._rerun.backward(
            [p + step * d for p, d in zip(self._points, direction, strict=True)],
            [g + step * d for g, d in zip(self._incoming, incoming, strict=True)],
        )

    def _view(
        self, direction: Sequence[Tensor], incoming: Sequence[Tensor], where: Sequence[Tensor]
    ) -> _View:
        """Compares product and difference along a direction.

        Args:
            direction: Of the inputs.
            incoming: Of the incoming gradients.
            where: Where in the gradients there may be rounding.
        """
        product = _dot(self._slopes, direction) + _dot(self._of_incoming, incoming)
        near, _, bent = self._differences(direction, incoming, 1.0)
        far, rounded, _ = self._differences(direction, incoming, 4.0)
        difference = float(sum(d.sum() for d in far))
        spread = [(a - b).abs() for a, b in zip(near, far, strict=True)]
        rounding = float(sum((r * mask).sum() for r, mask in zip(rounded, where, strict=True)))
        # What bends so soon is rounded inside the function, and to a fourth of that farther out.
        noise = 3 * float(sum(s.sum() for s in spread)) + 4 * rounding + sum(bent)
        error, largest = abs(product - difference), max(abs(product), abs(difference))
        if not isfinite(largest + noise):
            raise _NotFinite
        smooth = [b.abs() * (s <= 0.25 * b.abs()) for b, s in zip(far, spread, strict=True)]
        agrees = error <= _TOLERANCE * largest
        telling = largest > noise or (agrees and largest > 0)
        if agrees or error <= noise:
            return _View(True, telling, error, noise, smooth)
        settled = self._settled(direction, incoming, where, product, difference, rounding)
        return _View(not settled, settled and telling, error, noise, smooth)

    def _settled(
        self,
        direction: Sequence[Tensor],
        incoming: Sequence[Tensor],
        where: Sequence[Tensor],
        product: float,
        difference: float,
        rounding: float,
    ) -> bool:
        """True if a difference is the derivative, and does not depend on the step."""
        unit = self._eps ** (1 / 3)
        nearest, rounded, _ = self._differences(direction, incoming, _NEAREST)
        again = float(sum(d.sum() for d in nearest))
        slack = 4 * float(sum((r * mask).sum() for r, mask in zip(rounded, where, strict=True)))
        if abs(again - difference) > 0.3 * max(abs(again), abs(difference)) + slack:
            return False
        # What oscillates changes by all of itself within the shortest step.
        parts = zip(self._weights, self._values, where, strict=True)
        size = sum(float((_wide(w) * _wide(v)).abs()[mask].sum()) for w, v, mask in parts)
        if abs(product) * _NEAREST * unit > 0.5 * size:
            return False
        if abs(difference) > 4 * rounding:
            return True
        # What is rounded to a few values only changes in leaps.
        leaps, _, _ = self._differences(direction, incoming, 0.25 / unit)
        return abs(float(sum(d.sum() for d in leaps))) <= 4 * rounding

    def _differences(
        self, direction: Sequence[Tensor], incoming: Sequence[Tensor], factor: float
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Derivatives of the entries of `F` times `w`, as differences.

        Also how large rounding is in each, and the sum of second differences over the same steps.
        """
        step = factor * self._eps ** (1 / 3)
        ahead, behind = (self._moved(direction, incoming, t) for t in (step, -step))
        differences, rounding, bent = [], [], []
        for w, a, b, c in zip(map(_wide, self._weights), ahead, behind, self._values, strict=True):
            change = w.conj() * (_wide(a) - _wide(b)) / (2 * step)
            differences.append(change.real if change.is_complex() else change)
            sizes = _wide(a).abs() + _wide(b).abs()
            rounding.append(w.abs() * sizes * (self._eps / (2 * step)))
            second = _wide(a) + _wide(b) - 2 * _wide(c)
            bent.append(float((w.abs() * second.abs()).sum()) / (2 * step))
        return differences, rounding, bent


class _View(NamedTuple):
    """The comparison along one direction.

    Attributes:
        agrees: Whether product and difference are the same.
        telling: Whether they are more than noise.
        error: Their distance.
        noise: What rounding and kinks may add to it.
        smooth: For each input how much each entry changes, zero where differences vary.
    """

    agrees: bool
    telling: bool
    error: float
    noise: float
    smooth: list[Tensor]


_NOT_LINEAR = "whose backward is not differentiated rightly by the incoming gradient"


def _dense(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g.detach().to_dense() if g.is_sparse else g.detach()
        for g, x in zip(found, inputs, strict=True)
    ]


def _sizes(point: Tensor) -> Tensor:
    """The sizes of a point's entries; for those that are zero that of all."""
    sizes = point.abs()
    return torch.where(sizes == 0, _typical(point), sizes)


def _signs(tensor: Tensor) -> Tensor:
    """The signs of a tensor's entries; one where they are zero."""
    signs = tensor.detach().sgn()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


def _typical(tensor: Tensor) -> Tensor:
    """The mean size of a tensor's entries; one where all are zero."""
    tensor = tensor.detach()
    if not tensor.numel():
        return tensor.abs().sum() + 1
    mean = tensor.abs().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """The real part of the inner product."""
    products = [
        float((_wide(a).conj() * _wide(b)).real.sum())
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    return sum(products)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor if tensor.device.type == "mps" else tensor.double()


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _same(tensor: Tensor) -> Tensor:
    return tensor
