"""The objective behind a pure function, in the style of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.runner import ModuleRegistry, Run, run
from torch_secondorder._closure.validation import NoGradient, touched
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.base import Curvature, Objective, Regularization
from torch_secondorder._objective.compiled import (
    NO_OUTPUTS,
    CompiledFunction,
    CompileModeName,
    check_mode,
)
from torch_secondorder._params.vector import ParameterVector


class FunctionalObjective(Objective):
    """The objective behind a pure function of a tree of tensors, in the style of `torch.func`.

    Nothing is moved while it is evaluated and no `p.grad` is made. Pass it to an optimizer's
    `step()` in place of a closure.

    Args:
        function: Takes a tree like `params`, returns the loss: a tensor with one element.
        params: The tree: a tensor, or a list, tuple or dict of tensors. An optimizer recognizes its
            parameters in it by identity (`dict(model.named_parameters())` is fine); what it does
            not own is passed on as a constant.
        compile: Whether loss, gradient and products with the curvature are compiled, each as a
            whole; or arguments for `torch.compile`, such as `{"backend": "aot_eager"}`. It pays
            where operations are small and the same shapes come back for many steps. The function
            must draw no random numbers and change no tensor in place.
        mode: See `torch.compile`: `"max-autotune"` tries out several kernels for each operation,
            and on a GPU uses CUDA graphs, as `"reduce-overhead"` does without the trials. The first
            evaluations take longer. For `compile=True`, or a mapping without `backend` and
            `options`. Losses, gradients and products can be kept in all modes.

    Raises:
        ValueError: The tree holds none of the parameters, or the mode is unknown or does not go
            with `compile`.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0])
    >>> objective = FunctionalObjective(lambda p: (p["w"] ** 4).sum(), {"w": w})
    >>> objective.evaluate(curvature=True).linearization.hessian_product(torch.ones(2))
    tensor([12., 48.])
    """

    def __init__(
        self,
        function: Callable[[Any], Tensor],
        params: Any,
        *,
        compile: bool | Mapping[str, Any] = False,
        mode: CompileModeName | None = None,
    ) -> None:
        self._compiled: CompiledFunction | None = None
        options = {} if isinstance(compile, bool) else compile
        if mode is not None:
            check_mode(mode, options, compiles=compile is not False)
            options = {**options, "mode": mode}
        if compile is not False:
            self._compiled = CompiledFunction(function, options)
        self._function = function
        self._tree = params
        self._leaves, self._structure = pytree.tree_flatten(params)
        numbers = [  # other leaves are constants
            leaf
            for leaf in self._leaves
            if isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf.is_complex())
            and leaf.numel()
        ]
        self._begin(ParameterVector(numbers))

    def _begin(
        self,
        vector: ParameterVector,
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
    ) -> None:
        super().__init__(vector, regularization, master, registry)
        if vector.sharded:
            raise TypeError(
                "a FunctionalObjective is a function of whole tensors, and these parameters are "
                "sharded: use a closure that calls the sharded module"
            )
        places = {id(p): i for i, p in enumerate(vector.params)}
        self._places = [places.get(id(leaf)) for leaf in self._leaves]
        if all(place is None for place in self._places):
            raise ValueError(
                "the tree of parameters holds none of the optimizer's: pass the very tensors that "
                "the optimizer was given, for instance dict(model.named_parameters())"
            )

    @property
    def function(self) -> Callable[[Any], Tensor]:
        """The function of the tree that is evaluated."""
        return self._function

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the tree."""
        return list(self._leaves)

    def with_function(self, function: Callable[[Any], Tensor]) -> FunctionalObjective:
        """Another function of the same tree."""
        return FunctionalObjective(function, self._tree)

    @property
    def source(self) -> Callable[[], Any]:
        """The function of the very tensors of the tree, to be called without arguments."""
        return partial(self._function, self._tree)

    def bind(
        self,
        vector: ParameterVector,
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
    ) -> FunctionalObjective:
        """The same function on an optimizer's own vector and terms, for one step.

        Args:
            vector: See `Objective`.
            regularization: See `Objective`.
            master: See `Objective`.
            registry: See `Objective`; this objective's own by default.
        """
        bound = copy(self)
        bound._begin(vector, regularization, master, registry or self.registry)
        return bound

    def bind_to(self, params: Sequence[Tensor]) -> Callable[[bool], tuple[Tensor, Graph]] | None:
        """Loss and graph at some parameters, where they stand; None where it is not compiled.

        Args:
            params: Some of the tree's tensors.

        Returns:
            A function that takes whether products are needed.
        """
        compiled = self._compiled
        if compiled is None:
            return None
        places = {id(p): i for i, p in enumerate(params)}
        found = [places.get(id(leaf)) for leaf in self._leaves]

        def run(curvature: bool) -> tuple[Tensor, Graph]:
            pieces = [p.detach().requires_grad_() for p in params]
            return compiled(self._filled(pieces, found), pieces, curvature)

        return run

    @property
    def _captured_source(self) -> Callable[..., Any] | None:
        return None if self._compiled is not None else self._function

    def _filled(self, pieces: Sequence[Tensor], places: Sequence[int | None]) -> Any:
        """The tree, with some of its leaves replaced."""
        leaves = [
            leaf if place is None else pieces[place]
            for leaf, place in zip(self._leaves, places, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def _run(self, position: Tensor, curvature: Curvature) -> Run:
        try:
            return self._differentiated(position, curvature)
        except NoGradient:
            raise NoGradient(
                "no gradient reached any of the optimizer's parameters: the function must compute "
                "its value from the tensors that it is given, not from others that it finds, such "
                "as the parameters of a module: torch.func.functional_call(model, given, inputs) "
                "puts those that are given into the model"
            ) from None

    def _differentiated(self, position: Tensor, curvature: Curvature) -> Run:
        """See `_run`."""
        if self._compiled is not None and curvature == "jacobian":
            raise RuntimeError(NO_OUTPUTS)
        pieces = [piece.detach().requires_grad_() for piece in self.vector.split(position)]
        tree = self._filled(pieces, self._places)
        if self._compiled is not None:
            loss, graph = self._compiled(tree, pieces, bool(curvature))
            return Run(loss, touched(graph.gradients[0]), graph if curvature else None)
        capture = None
        if curvature:
            copies = self._copies(self._function)
            capture = Capture(pieces, copies=copies, twice=curvature is True)
        call = partial(self._replay.run, partial(self._function, tree))
        loss, gradients = run(call, pieces, self.registry, capture, pure=True)
        if capture is None:
            return Run(loss, touched(gradients))
        return Run(loss, gradients, capture.graph, copies=capture.copies)
