"""A function with its derivatives written down, operation by operation, to be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from torch_secondorder._autograd.graph import Graph, Multiply
from torch_secondorder._closure.capture import Capture, uncaptured
from torch_secondorder._closure.validation import differentiable, scalar
from torch_secondorder._foundation.private_torch import without_zero_tensors

_aten = torch.ops.aten


def traced(
    function: Callable[..., Any],
    places: Sequence[int | None],
    build: Callable[[Graph], Multiply] | None,
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> fx.GraphModule:
    """All operations from the inputs and a direction to loss, gradients and product.

    Args:
        function: Takes the inputs, returns the loss in a tuple.
        places: Which of the inputs are differentiated by, for each part of the direction; None for
            what the loss does not depend on.
        build: Gives the product with a graph; None for none.
        inputs: An example.
        tangents: An example of a direction.

    Raises:
        RuntimeError: What the function does is not the same from one call to the next.
    """

    def run(inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
        leaves = [*inputs]
        params = []
        for place, tangent in zip(places, tangents, strict=True):
            p = (tangent if place is None else inputs[place]).detach().requires_grad_()
            params.append(p)
            if place is not None:
                leaves[place] = p
        with uncaptured(), without_zero_tensors(), torch.enable_grad():
            with Capture(params) as capture:
                loss = scalar(function(*leaves)[0])
            gradients = capture.differentiate(differentiable(loss))
            capture.graph.check_differentiable()
            products = () if build is None else build(capture.graph)(tangents, False)
        found = [loss, *gradients, *products]
        return [None if t is None else t.detach() for t in found]

    before = [t._version for t in inputs]
    try:
        whole = make_fx(run, tracing_mode="real")(inputs, tangents)
    except RuntimeError as error:
        if "tracing tensor" in str(error):
            raise not_compiled("it looks at the value of a tensor, as float(x) does") from error
        raise
    if before != [t._version for t in inputs]:
        raise not_compiled(
            "it changes a tensor in place, as BatchNorm does with its running statistics; "
            "model.eval() stops that"
        )
    for node in whole.graph.nodes:
        _check(node)
    whole.graph.eliminate_dead_code()
    return whole


def _check(node: fx.Node) -> None:
    """Raises where an operation's result is not determined by what the graph was made for."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        raise not_compiled(
            f"it draws random numbers ({node.target}), which compiled code draws anew at each "
            "evaluation of a step"
        )
    if torch.Tag.dynamic_output_shape in tags:
        masks = [n for n in node.all_input_nodes if n.meta["val"].dtype == torch.bool]
        if node.target is not _aten.index.Tensor or masks:  # whole numbers as indices are fine
            raise not_compiled(
                f"the shape of a tensor depends on values ({node.target}); index with whole "
                "numbers instead of a mask, or multiply by the mask"
            )


def split(whole: fx.GraphModule, given: int, known: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cuts a graph in two: what the first inputs determine, and what the others have a part in.

    Args:
        whole: The graph.
        given: How many inputs come first.
        known: How many outputs come first, which these determine: loss and gradients.

    Returns:
        From the first inputs to the first outputs and what is kept; from what is kept, and the
        other inputs, to the other outputs.
    """
    *nodes, end = whole.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    along = dict.fromkeys(inputs[given:])
    for node in nodes:
        if any(n in along for n in node.all_input_nodes):
            along[node] = None
    outputs = end.args[0]
    needed = [n for node in along for n in node.all_input_nodes]
    needed += [n for n in outputs[known:] if n is not None]
    kept = list(dict.fromkeys(n for n in needed if n not in along))

    first, second = fx.Graph(), fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in along:
            at[node] = first.node_copy(node, at.__getitem__)
    first.output(([n if n is None else at[n] for n in outputs[:known]], [at[n] for n in kept]))
    then = {n: second.placeholder(f"kept_{i}") for i, n in enumerate(kept)}
    for node in along:
        then[node] = second.node_copy(node, then.__getitem__)
    second.output([n if n is None else then[n] for n in outputs[known:]])
    return fx.GraphModule(whole, first), fx.GraphModule(whole, second)


def not_compiled(why: str) -> RuntimeError:
    """The error for a function that cannot be compiled with its derivatives."""
    return RuntimeError(
        "the function cannot be compiled with its derivatives; leave compile=True out, or change "
        f"the function: {why}"
    )
