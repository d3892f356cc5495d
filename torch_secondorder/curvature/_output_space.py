"""The loss as a function of the model's outputs: the maps to and from them, and its curvature.

A loss is taken apart as `L(z(theta), theta)`. Derivatives "at fixed z" are taken by cutting the
graph at the outputs while autograd runs; nothing has to be evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_secondorder._autograd.graph import Graph, Output, Overwritten, Suspect, explained, refuse
from torch_secondorder._autograd.vectorized import several
from torch_secondorder._foundation.private_torch import plainly
from torch_secondorder.curvature._likelihoods import Likelihood, likelihood_of

Tensors = Sequence[Tensor | None]
#: A node of the graph, and the number of one of its outputs.
Place: TypeAlias = tuple[Any, int]

_NO_OUTPUT = """\
no model output was found that the loss depends on: Gauss-Newton and Fisher products need one. The
losses of torch.nn and torch.nn.functional show theirs; mark the output of any other with
    z = torch_secondorder.mark_outputs(model(x))
where a loss is a sum of squared residuals, mark the residuals. Or use curvature that needs no
outputs (curvature="hessian", estimator="hutchinson"), or an optimizer that takes gradients only
(SOAP)"""


class UnknownOutputs(RuntimeError):
    """No model output was found that Gauss-Newton or Fisher products could be taken at.

    The losses of `torch.nn` and `torch.nn.functional` show theirs. Mark the output of any other
    loss with `torch_secondorder.mark_outputs`.
    """


class OutputSpace:
    """The outputs `z` of one evaluation, and the Jacobian `J` of `z` by the parameters.

    Args:
        graph: The retained graph.

    Attributes:
        outputs: Those that the loss depends on, each tensor once. Of two that lie behind one
            another the nearer to the loss counts, or the one that was marked.

        tensors: They themselves.
        values: The same without graph.

    Raises:
        UnknownOutputs: There is none, or one was changed in place.
        ValueError: An output is complex.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._losses = _places(graph.losses)
        found = _relevant(graph, self._losses)
        if not found:
            raise UnknownOutputs(_NO_OUTPUT)
        self._places, self.outputs = list(found), list(found.values())
        self._ends = set(found)
        self.tensors: list[Tensor] = []
        self.values: list[Tensor] = []
        for output in self.outputs:
            z = output.values
            if z.is_complex():
                raise ValueError("model outputs must be real: mark torch.view_as_real(z) instead")
            self.tensors.append(output.tensor)
            self.values.append(z)

    @property
    def params(self) -> Sequence[Tensor]:
        """The tensors that the loss was differentiated with respect to."""
        return self._graph.params

    @cached_property
    def _pulled(self) -> tuple[Tensors, Sequence[Tensor]]:
        """`J'w` and `w`: differentiated by `w` it gives `J` (the double-vjp trick)."""
        weights = [torch.zeros_like(z).requires_grad_() for z in self.values]
        return _differentiated(self.tensors, self._graph.params, weights), weights

    def sandwiched(
        self, between: Callable[[Tensors, bool], Tensors], tangents: Sequence[Tensor], batched: bool
    ) -> Tensors:
        """`J' B J v`, where `between` multiplies with `B`."""
        pulled, weights = self._pulled
        changes = _derivative(pulled, weights, tangents, batched)
        products = between(changes, batched)
        return _derivative(self.tensors, self._graph.params, products, batched)

    def push(self, tangents: Sequence[Tensor], batched: bool = False) -> Tensors:
        """`J v`: from tensors shaped like the parameters to changes of the outputs."""
        pulled, weights = self._pulled
        return _derivative(pulled, weights, tangents, batched)

    def pull_each(self, cotangents: Sequence[Tensors]) -> Tensors:
        """`J' u` for several `u`, stacked; in one vectorized pass where operations allow."""
        columns = zip(*cotangents, strict=True)
        stacked = [None if any(q is None for q in c) else torch.stack(c) for c in columns]
        return several(self.pull, stacked)

    def pull(self, cotangents: Tensors, batched: bool = False) -> Tensors:
        """`J' u`: from weights shaped like the outputs to tensors shaped like the parameters."""
        return _derivative(self.tensors, self._graph.params, cotangents, batched)

    # The loss around the outputs.

    def gradient(self, tensors: Sequence[Tensor | GradientEdge]) -> Tensors:
        """Derivatives of the loss by tensors between it and the outputs, at fixed outputs."""
        if not tensors:
            return ()
        with self._cut():
            return _differentiated(self._graph.losses, tensors, self._graph.weights)

    def product_at_fixed_parameters(
        self, gradient: Tensors, tensors: Sequence[Tensor], tangents: Tensors, batched: bool
    ) -> Tensors:
        """The Hessian of the loss by some of the outputs times tangents, from their `gradient`."""
        refuse(self._curving_above)
        with self._cut():
            return _derivative(gradient, tensors, tangents, batched)

    def reaches(self, stops: Collection[Tensor | GradientEdge]) -> tuple[list[bool], bool]:
        """Follows the paths from the loss to the parameters.

        Args:
            stops: Tensors where a way ends.

        Returns:
            For each output whether a way reaches it that passes through no stop, and whether one
            reaches a parameter that passes through neither stops nor outputs.
        """
        met = _walk(self._losses, self._ends.union(_places(stops)))
        params, bypassed = set(map(id, self._graph.params)), False
        for node, _ in met:
            if id(getattr(node, "variable", None)) in params:
                bypassed = True
                break
        return list(map(met.__contains__, self._places)), bypassed

    def depends(self, tensor: Tensor, others: Collection[Tensor | GradientEdge]) -> bool:
        """True if a tensor is made from one of the outputs or of some others."""
        ends = self._ends.union(_places(others))
        return not ends.isdisjoint(_walk(_places((tensor,)), ends))

    def remainder(self) -> Tensors:
        """The gradient of the loss by the parameters at fixed outputs, with its graph."""
        return self.gradient(self._graph.params)

    def remainder_product(
        self, remainder: Tensors, tangents: Sequence[Tensor], batched: bool
    ) -> Tensors:
        """The Hessian of the loss by the parameters at fixed outputs times a direction."""
        refuse(self._curving_above)
        with self._cut():
            return _derivative(remainder, self._graph.params, tangents, batched)

    @cached_property
    def _curving_above(self) -> list[Suspect]:
        """The custom functions on the way to the outputs that have a wrong second derivative."""
        if not self._graph.curving and self._graph.twice:
            return []
        met = _walk(self._losses, self._ends) - self._ends
        nodes = {node for node, _ in met}
        if not self._graph.twice:  # not looked over yet
            self._graph.check_nodes(nodes)
        return [suspect for suspect in self._graph.curving if suspect.node in nodes]

    @contextmanager
    def _cut(self) -> Iterator[None]:
        """Lets no derivative pass from the outputs down to the parameters."""
        handles: list[Any] = []
        for node, index in self._ends:
            handles.append(node.register_prehook(partial(_without, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class LossCurvature:
    """The second derivative `B` of the loss by the outputs, block by block.

    An output has a likelihood of its own where one standard loss took it, the total loss is linear
    in what that loss returned, and depends on the output in no other way. All other outputs form
    one block, whose products are taken by differentiating the loss twice at the outputs.

    Args:
        space: The outputs.

    Attributes:
        likelihoods: One for each output; None for those of the common block.
        coefficients: For each output what the total loss is multiplied by where it is linear in
            what the standard loss returned, of that shape; None for all other outputs.
        bypassed: Whether the loss depends on the parameters in other ways than through the outputs.
    """

    def __init__(self, space: OutputSpace) -> None:
        self._space = space
        self.coefficients, self.bypassed = _loss_coefficients(space)
        self.likelihoods: list[Likelihood | None] = []
        self._rest: list[int] = []  # outputs without a likelihood, and their tensors
        self._tensors: list[Tensor] = []
        with torch.no_grad():
            for i, (output, c) in enumerate(zip(space.outputs, self.coefficients, strict=True)):
                found = None
                if c is not None and _separates(output, space):
                    found = likelihood_of(output, c)
                if found is None:
                    self._rest.append(i)
                    self._tensors.append(space.tensors[i])
                self.likelihoods.append(found)
        self._gradient = space.gradient(self._tensors) if self._rest else ()

    def gradients(self) -> list[Tensor]:
        """The gradient of the loss by each output, at fixed outputs."""
        known = [i for i in range(len(self._space.tensors)) if i not in self._rest]
        found = self._space.gradient([self._space.tensors[i] for i in known])
        by_place = dict(zip([*known, *self._rest], [*found, *self._gradient], strict=True))
        return [
            torch.zeros_like(z) if (g := by_place[i]) is None else g.detach()
            for i, z in enumerate(self._space.values)
        ]

    @property
    def unknown(self) -> bool:
        """True if the curvature by some outputs is not in closed form."""
        return bool(self._rest)

    def product(self, tangents: Tensors, batched: bool = False) -> Tensors:
        """`B t`, shaped like the outputs; with `batched` each with a leading dimension."""
        result: list[Tensor | None] = [None] * len(tangents)
        for i, (likelihood, tangent) in enumerate(zip(self.likelihoods, tangents, strict=True)):
            if likelihood is not None and tangent is not None:
                result[i] = likelihood.product(tangent).to(tangent.dtype)
        if self._rest:
            chosen = [tangents[i] for i in self._rest]
            products = self._space.product_at_fixed_parameters(
                self._gradient, self._tensors, chosen, batched
            )
            for i, product in zip(self._rest, products, strict=True):
                result[i] = product
        return result


def _loss_coefficients(space: OutputSpace) -> tuple[list[Tensor | None], bool]:
    values = [o.value for o in space.outputs if o.value is not None]
    directly, bypassed = space.reaches(values)
    by_value = dict(zip(map(id, values), space.gradient(values), strict=True))
    coefficients = []
    for output, direct in zip(space.outputs, directly, strict=True):
        c = None if direct else by_value.get(id(output.value))
        # One that depends on the outputs is none: the loss is not linear in the value.
        linear = c is not None and not space.depends(c, values)
        coefficients.append(c.detach() if c is not None and linear else None)
    return coefficients, bypassed


def _separates(output: Output, space: OutputSpace) -> bool:
    """True if the information has no entries between this output and others."""
    if len(space.outputs) == 1:
        return True
    together = {o.argument for o in space.outputs if o.value is output.value}
    # Mean and variance are orthogonal.
    return len(together) == 1 or (
        output.loss is F.gaussian_nll_loss and together == {"input", "var"}
    )


def _without(index: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Drops the gradient of one of a node's outputs."""
    return (*gradients[:index], None, *gradients[index + 1 :])


def _differentiated(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | GradientEdge], weights: Tensors
) -> Tensors:
    """Derivatives with a graph of their own."""
    try:
        with torch.enable_grad(), plainly():
            return torch.autograd.grad(
                outputs,
                inputs,  # type: ignore[arg-type]  # of both kinds
                weights,
                create_graph=True,
                allow_unused=True,
            )
    except RuntimeError as error:
        raise explained(error) from error


def _derivative(
    outputs: Tensors, inputs: Sequence[Tensor], weights: Tensors, batched: bool
) -> Tensors:
    """`torch.autograd.grad` over what has a graph; None where there is no derivative."""
    kept: list[Tensor] = []
    chosen: list[Tensor] = []
    with plainly():
        for output, weight in zip(outputs, weights, strict=True):
            if output is not None and weight is not None and output.requires_grad:
                kept.append(output)
                chosen.append(weight)
    if not kept:
        return [None] * len(inputs)
    try:
        with plainly():
            return torch.autograd.grad(
                kept, inputs, chosen, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
    except RuntimeError as error:
        raise explained(error) from error


def _places(tensors: Iterable[Tensor | GradientEdge]) -> list[Place]:
    """The places of some tensors, none of them a leaf, in the graph."""
    places: list[Place] = []
    with plainly():
        for tensor in tensors:
            if isinstance(tensor, GradientEdge):
                places.append((tensor.node, tensor.output_nr))
            else:
                places.append((tensor.grad_fn, tensor.output_nr))
    return places


def _relevant(graph: Graph, losses: Sequence[Place]) -> dict[Place, Output]:
    """The outputs that the losses depend on, but not by way of another output alone."""
    outputs = graph.outputs
    tensors: list[Tensor] = []
    values: list[Tensor | GradientEdge] = []
    for output in outputs:
        tensors.append(output.tensor)
        # One that was marked has no value; its own place stands in and is not looked at.
        values.append(output.tensor if output.value is None else output.value)
    places, of_values = _places(tensors), _places(values)
    # A loss that was evaluated for a report only says nothing.
    ends = set(places)
    met = _walk(losses, ends)
    candidates: dict[Place, Output] = {}
    used: dict[Place, list[Output]] = {}
    for output, place, of_value in zip(outputs, places, of_values, strict=True):
        if output.loss is None:
            candidates[place] = output
        if output.value is not None and of_value in met:
            used.setdefault(place, []).append(output)
    marked = set(candidates)
    for place, takers in used.items():
        # Where what a loss is given is made from a marked output, the mark says more.
        if marked and place not in marked and _walk(place[0].next_functions, marked) & marked:
            continue
        for output in takers:
            if not output.intact:
                name = getattr(takers[0].loss, "__name__", "a loss")
                raise Overwritten(
                    f"an argument of {name} was changed in place after the loss took it, so the "
                    "curvature there is lost: write z = z * 2, not z *= 2"
                )
        # With two losses on one output neither speaks for it alone.
        candidates[place] = takers[0] if len(takers) == 1 else Output(takers[0].tensor)
    if candidates.keys() != ends:
        met = _walk(losses, candidates)
    for place in list(candidates):
        if place not in met:
            del candidates[place]
    return candidates


def _walk(starts: Iterable[Place], ends: Collection[Place]) -> set[Place]:
    """All places on the ways down the graph, where `ends` are met and not passed."""
    waiting, met = list(starts), set[Place]()
    while waiting:
        place = waiting.pop()
        if place[0] is None or place in met:
            continue
        met.add(place)
        if place not in ends:
            waiting.extend(place[0].next_functions)
    return met
