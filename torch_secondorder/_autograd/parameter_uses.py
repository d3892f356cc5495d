"""The operations of a graph that take parameters, found by walking over its nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_secondorder._foundation.private_torch import output_shape, plainly

__all__ = [
    "Survey",
    "Unsupported",
    "Use",
    "made_alone",
    "params_below",
    "selected_entries",
    "surveyed",
    "uses_of",
]


class Unsupported(Exception):
    """An operation whose parameters have no known derivative by samples; its text names it."""


class Use(NamedTuple):
    """A node that takes a tensor made of parameters alone, and is not such a tensor itself.

    Attributes:
        node: The place of the node in its survey.
        slot: Which of the node's inputs.
        source: The place of the node behind that tensor, an accumulator for a parameter itself.
        output: Which of that node's outputs.
        shape: The shape of the tensor.
        raises: Whether what the node makes depends on nothing but parameters and constants, so that
            it may count as such a tensor as well.
    """

    node: int
    slot: int
    source: int
    output: int
    shape: tuple[int, ...]
    raises: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """All nodes below some outputs, breadth first.

    Attributes:
        nodes: The nodes.
        key: The same for graphs of the same operations on the same parameters.
        params: The parameters among them, by the places of their accumulators.
        outputs: The places of the outputs.
    """

    nodes: Sequence[Any]
    key: Hashable
    params: Mapping[int, int]
    outputs: Sequence[int]

    def edge(self, use: Use) -> GradientEdge:
        """The place of a node's result in the graph."""
        return GradientEdge(self.nodes[use.node], 0)

    def source(self, use: Use) -> GradientEdge:
        """The place in the graph of the tensor that a node takes."""
        return GradientEdge(self.nodes[use.source], use.output)


def surveyed(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Survey:
    """Walks over the graph below some outputs.

    Args:
        outputs: They; none of them a leaf.
        params: Leaves.

    Raises:
        Unsupported: A parameter is no leaf.
    """
    accumulators: dict[Any, int] = {}
    with plainly():
        starts = [(z.grad_fn, z.output_nr) for z in outputs]
        for i, p in enumerate(params):
            if not p.requires_grad:
                continue
            if p.grad_fn is not None:
                raise Unsupported("a parameter that is no leaf")
            accumulators[get_gradient_edge(p).node] = i
    nodes: list[Any] = []
    places: dict[Any, int] = {}
    key: list[Hashable] = []
    found: dict[int, int] = {}
    for node, number in starts:
        place = places.get(node)
        if place is None:
            place = places[node] = len(nodes)
            nodes.append(node)
        key += (place, number)
    for at, node in enumerate(nodes):  # grows on the way
        index = accumulators.get(node)
        if index is not None:
            found[at] = index
            key.append(index)
            continue
        key.append(cast(Hashable, type(node)))
        for following, number in node.next_functions:
            if following is None:
                key.append(None)
                continue
            place = places.get(following)
            if place is None:
                place = places[following] = len(nodes)
                nodes.append(following)
            key += (place, number)
    return Survey(nodes, tuple(key), found, [places[node] for node, _ in starts])


# Operations that repeat or choose entries of a tensor: they bring in the samples.
_SPREADING = frozenset(
    {
        "EmbeddingBackward0",
        "ExpandBackward0",
        "GatherBackward0",
        "IndexBackward0",
        "IndexSelectBackward0",
        "RepeatBackward0",
    }
)


def uses_of(survey: Survey, raised: Iterable[int] = ()) -> list[Use]:
    """The uses of parameters, highest first.

    Args:
        survey: The graph.
        raised: Places of nodes that count as made of parameters alone, see `Use.raises`.

    Raises:
        Unsupported: An output is made of parameters alone, or a shape is not known.
    """
    shared, ambiguous = _made_of_parameters(survey, frozenset(raised))
    places = {node: i for i, node in enumerate(survey.nodes)}
    if any(shared[at] for at in survey.outputs):
        raise Unsupported("an output that is made of parameters alone")
    uses: list[Use] = []
    for at, node in enumerate(survey.nodes):
        if shared[at]:
            continue
        for slot, (following, number) in enumerate(node.next_functions):
            source = places.get(following, -1)
            if source < 0 or not shared[source]:
                continue
            shape = output_shape(following, number)
            if source in survey.params:
                shape = tuple(following.variable.shape)
            if shape is None:
                raise Unsupported(f"{node.name()} on a tensor of unknown shape")
            uses.append(Use(at, slot, source, number, shape, at in ambiguous))
    return uses


def made_alone(survey: Survey) -> list[int]:
    """The numbers of the outputs that are made of parameters alone, as penalties are."""
    shared, _ = _made_of_parameters(survey, frozenset())
    return [number for number, at in enumerate(survey.outputs) if shared[at]]


def _made_of_parameters(
    survey: Survey, raised: frozenset[int]
) -> tuple[list[bool], frozenset[int]]:
    """Marks of the nodes that make tensors of parameters alone; those that may count as such."""
    nodes = survey.nodes
    places = {node: i for i, node in enumerate(nodes)}
    shared = [False] * len(nodes)
    ambiguous: set[int] = set()
    for at in _upwards(nodes, places):
        if at in survey.params:
            shared[at] = True
            continue
        following = [f for f, _ in nodes[at].next_functions]
        known = [places[f] for f in following if f is not None]
        if not known or not all(shared[k] for k in known):
            continue
        spreads = type(nodes[at]).__name__ in _SPREADING
        if at in raised or (len(known) == len(following) and not spreads):
            shared[at] = True
        else:
            ambiguous.add(at)
    return shared, frozenset(ambiguous)


def _upwards(nodes: Sequence[Any], places: Mapping[Any, int]) -> list[int]:
    """The nodes, each after those below it."""
    order: list[int] = []
    begun = [False] * len(nodes)
    for start in range(len(nodes)):
        stack = [(start, False)]
        while stack:
            at, finished = stack.pop()
            if finished:
                order.append(at)
            elif not begun[at]:
                begun[at] = True
                stack.append((at, True))
                stack += [(places[f], False) for f, _ in nodes[at].next_functions if f is not None]
    return order


# Operations that put the entries of a tensor, or some of them, into another order.
_SELECTING = frozenset(
    {
        "AliasBackward0",
        "CloneBackward0",
        "DiagonalBackward0",
        "FlipBackward0",
        "PermuteBackward0",
        "ReshapeAliasBackward0",
        "SelectBackward0",
        "SliceBackward0",
        "SplitBackward0",
        "SplitWithSizesBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "SqueezeBackward2",
        "SqueezeBackward3",
        "TBackward0",
        "ToCopyBackward0",
        "TransposeBackward0",
        "UnbindBackward0",
        "UnsafeSplitBackward0",
        "UnsafeViewBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)
_DIGIT = 4096


def selected_entries(
    survey: Survey, use: Use, params: Sequence[Tensor]
) -> tuple[int, Tensor] | None:
    """The entries of a parameter that a tensor consists of.

    Args:
        survey: The graph.
        use: Its source is the tensor.
        params: The parameters.

    Returns:
        The index of the parameter, and for each entry of the tensor the place in the flattened
        parameter; None where the tensor is more than a choice of entries.
    """
    at, node = use.source, survey.nodes[use.source]
    places = {n: i for i, n in enumerate(survey.nodes)}
    while at not in survey.params:
        if type(node).__name__ not in _SELECTING:
            return None
        node = node.next_functions[0][0]
        at = places[node]
    index = survey.params[at]
    p, count = params[index], 1
    for size in use.shape:
        count *= size
    if at == use.source:
        return index, torch.arange(count, device=p.device)
    # A vjp puts the number of each entry where it comes from; by digits, which float32 holds.
    numbers = torch.arange(count, device=p.device)
    digits = torch.stack([numbers % _DIGIT, numbers // _DIGIT + 1]).to(p.dtype)
    found = [
        torch.autograd.grad(survey.source(use), p, d.view(use.shape), retain_graph=True)[0]
        for d in digits
    ]
    low, high = (f.reshape(-1).round().long() for f in found)
    (chosen,) = high.nonzero(as_tuple=True)
    entries = torch.empty_like(numbers)
    entries[(high[chosen] - 1) * _DIGIT + low[chosen]] = chosen
    return index, entries


def params_below(survey: Survey, start: int) -> list[int]:
    """The parameters that the result of a node is made of."""
    places = {node: i for i, node in enumerate(survey.nodes)}
    waiting, seen = [start], {start}
    found: set[int] = set()
    while waiting:
        at = waiting.pop()
        if at in survey.params:
            found.add(survey.params[at])
            continue
        for following, _ in survey.nodes[at].next_functions:
            if following is not None and places[following] not in seen:
                seen.add(places[following])
                waiting.append(places[following])
    return sorted(found)
