"""What diagnostics look at: a model on some batches, a closure, a function, or a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import check_is_closure
from torch_secondorder._foundation.checks import check_callable, check_choice
from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.dataset import DatasetClosure, DatasetObjective
from torch_secondorder.dataset._batches import as_pair, call, length, moved
from torch_secondorder.diagnostics.problem import Curvature, Problem

__all__ = ["Source", "as_problem", "from_closure", "from_model"]


def from_model(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Any,
    params: Iterable[Tensor] | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    curvature: Curvature = "hessian",
    retain: bool = True,
) -> Problem:
    """The loss of a model on one batch or several.

    The model is evaluated in the mode that it is in: call `model.eval()` first if dropout is to be
    off and the norms are to use their running statistics.

    Args:
        model: The model.
        loss_fn: Takes the model's output and the targets, returns a scalar.
        batches: One pair `(inputs, targets)`, or an iterable of such pairs (a `DataLoader`), which
            is gone through once and kept. Inputs are a tensor, a tuple or list for several
            arguments, or a dict for named ones. Two pairs are two batches: put one batch whose
            inputs and targets are pairs themselves into a list. Tensors are moved to the device of
            the parameters when used.
        params: Whose curvature; by default all of the model that require a gradient.
        reduction: What `loss_fn` does over a batch. For `"mean"` the losses are averaged with the
            batches' lengths as weights, for `"sum"` they are added: either way as if all data were
            one batch.
        curvature: See `Problem`.
        retain: See `Problem`; False where the graphs of all batches do not fit into memory.

    Raises:
        TypeError: `loss_fn` cannot be called, or a batch is not a pair.
        ValueError: There is no batch, no parameter, or an argument is out of range.

    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> problem = from_model(model, nn.functional.mse_loss, (x, y))
    >>> problem.size, problem.names
    (3, ['weight', 'bias'])
    """
    check_callable("loss_fn", loss_fn)
    check_choice("reduction", reduction, ("mean", "sum"))
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        given = [batches] if _is_pair(batches) else batches
        pairs = [as_pair(batch, "from_closure") for batch in given]
    named: list[tuple[str, Tensor]] = [
        (name, p) for name, p in model.named_parameters() if p.requires_grad
    ]
    if params is not None:
        names = {id(p): name for name, p in named}
        named = [(names.get(id(p), str(i)), p) for i, p in enumerate(params)]
    device = named[0][1].device if named else None

    def loss(pair: tuple[Any, Any]) -> Tensor:
        inputs, targets = moved(pair, device)
        return loss_fn(call(model, inputs), targets)

    makers = [partial(_closure_objective, partial(loss, pair)) for pair in pairs]
    found = [length(pair) if reduction == "mean" else 1 for pair in pairs]
    counts = [1 if count is None else count for count in found]
    total = sum(counts) if reduction == "mean" else 1
    weights = [count / total for count in counts]
    tensors, labels = [p for _, p in named], [name for name, _ in named]
    modules = list(model.modules())
    return Problem(makers, weights, tensors, labels, modules, curvature, retain)


def from_closure(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    curvature: Curvature = "hessian",
    retain: bool = True,
) -> Problem:
    """The loss of a standard closure, the one that an optimizer's `step` takes.

    Args:
        closure: Called without arguments, returns the loss, with or without having called
            `loss.backward()`; or a `DatasetClosure`, whose products need the memory of one
            batch. What else it changes (the mode of a model, gradients of parameters
            that are not among `params`) stays changed.
        params: Whose curvature.
        curvature: See `Problem`.
        retain: See `Problem`.

    Raises:
        TypeError: The closure cannot be called, or a parameter is not a tensor of numbers.
        ValueError: There is no parameter, or `curvature` is unknown.

    >>> w = torch.ones(2, requires_grad=True)
    >>> from_closure(lambda: (w**2).sum(), [w]).size
    2
    """
    check_is_closure(closure)
    maker = partial(_closure_objective, closure)
    return Problem([maker], [1.0], params, None, (), curvature, retain)


Source: TypeAlias = Problem | FunctionalObjective | LinearOperator


def as_problem(source: Any) -> Problem:
    """A problem from whatever has a loss.

    Raises:
        TypeError: The source has none.
    """
    if isinstance(source, Problem):
        return source
    if isinstance(source, FunctionalObjective):

        def bind(vector: ParameterVector, _: ModuleRegistry) -> Objective:
            # A new one: the old one remembers where the parameters were when it was made.
            return source.bind(vector, source._regularization, None)

        return Problem([bind], [1.0], source.vector)
    hint = "from_model(model, loss_fn, batches), from_closure(closure, params)"
    if isinstance(source, LinearOperator):
        raise TypeError(
            f"{type(source).__name__} is a matrix, and this needs a loss as well: pass {hint}, or "
            "a FunctionalObjective"
        )
    raise TypeError(
        f"cannot take the curvature of a {type(source).__name__}: pass {hint}, a "
        "FunctionalObjective or a LinearOperator"
    )


def _closure_objective(
    closure: Callable[[], Any], vector: ParameterVector, registry: ModuleRegistry
) -> Objective:
    kind = DatasetObjective if isinstance(closure, DatasetClosure) else ClosureObjective
    return kind.for_step(closure, vector, registry=registry)


def _is_pair(batches: Any) -> bool:
    """Whether this is one batch: a tuple or list of inputs and targets, not of batches."""
    if not isinstance(batches, (tuple, list)) or len(batches) != 2:
        return False
    return not all(isinstance(batch, (tuple, list)) and len(batch) == 2 for batch in batches)
