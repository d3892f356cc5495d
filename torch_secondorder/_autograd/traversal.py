"""Nodes of a graph that is there already: leaves, standard losses, and missing second derivatives.

Captures arrange such things in the forward pass. If only `backward()` is seen, the values that the
nodes have saved take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_secondorder._autograd.convolution import with_second_derivatives
from torch_secondorder._autograd.graph import MissingSecondDerivative, Output, versions, walk
from torch_secondorder._autograd.weight_norm import weight_norm
from torch_secondorder._foundation.private_torch import attention_by_definition


def nodes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """All nodes of the graph of some tensors, leaves included."""
    return list(walk(get_gradient_edge(t).node for t in tensors if t.requires_grad))


def leaves_of(nodes: Iterable[Any]) -> list[Tensor]:
    """The leaves that gradients accumulate in."""
    return [node.variable for node in nodes if type(node).__name__ == "AccumulateGrad"]


# Second derivatives.


@contextmanager
def twice_differentiable(nodes: Iterable[Any]) -> Iterator[None]:
    """Lets some nodes be differentiated twice that PyTorch has no (right) second derivative of.

    These are fused attention and fused weight normalization. Inside, their derivatives are those of
    the same function in elementary operations, computed from what the nodes have saved. Those of
    convolutions get the faster second derivatives of `torch_secondorder._autograd.convolution`.

    Args:
        nodes: The nodes of a graph.
    """
    handles = []
    for node in nodes:
        name = type(node).__name__
        if name == "ConvolutionBackward0":
            handles.append(node.register_hook(_Amended(node)))
        elif name in _FORMULAS:
            handles.append(node.register_hook(_Recomputed(node, _FORMULAS[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Amended:
    """A hook that gives the derivatives of a convolution other derivatives of their own."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __call__(
        self, derivatives: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        if cotangents[0] is None:
            return None
        return with_second_derivatives(self._node, derivatives, cotangents[0])


class _Recomputed:
    """A hook that puts other derivatives in the place of those of a node."""

    def __init__(self, node: Any, formula: Callable[[Any], tuple[Tensor, list[Any]]]) -> None:
        self._node = node
        self._formula = formula

    def __call__(
        self, derivatives: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        if cotangents[0] is None:
            return None
        with torch.enable_grad():
            try:
                value, inputs = self._formula(self._node)
            except RuntimeError as error:
                # A checkpoint, for one, gives what was saved only once.
                raise MissingSecondDerivative(
                    f"{type(self._node).__name__} has no (right) second derivative of its own, and "
                    f"what it has saved is not there: {error}"
                ) from error
            wanted = [
                x if d is not None else None for x, d in zip(inputs, derivatives, strict=False)
            ]
            found = torch.autograd.grad(
                value,
                [x for x in wanted if x is not None],
                cotangents[0],
                create_graph=True,
                allow_unused=True,
            )
        rest = iter(found)
        replaced = [None if x is None else next(rest) for x in wanted]
        return (*replaced, *derivatives[len(replaced) :])


def _attention(node: Any) -> tuple[Tensor, list[Any]]:
    if node._saved_dropout_p:
        raise RuntimeError(f"the mask of dropout_p={node._saved_dropout_p}")
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    bias = getattr(node, "_saved_attn_mask", None)
    if bias is None:
        bias = getattr(node, "_saved_attn_bias", None)
    grouped = query.shape[-3] != key.shape[-3]
    result = attention_by_definition(
        query, key, value, bias, node._saved_is_causal, node._saved_scale, grouped
    )
    return result, [query, key, value, bias]


def _weight_norm(node: Any) -> tuple[Tensor, list[Any]]:
    v, g = node._saved_v, node._saved_g
    return weight_norm(v, g, _signed(node._saved_dim)), [v, g]


_FORMULAS: dict[str, Callable[[Any], tuple[Tensor, list[Any]]]] = {
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
    "WeightNormInterfaceBackward0": _weight_norm,
}
#: Names of the nodes that `twice_differentiable` gives other second derivatives.
MENDED = frozenset(_FORMULAS)


# Model outputs.


def standard_losses(nodes: Iterable[Any]) -> list[Output]:
    """The model outputs that standard losses among the nodes have taken."""
    found: list[Output] = []
    for node in nodes:
        loss = _LOSSES.get(type(node).__name__)
        if loss is not None:
            found += _outputs(node, *loss)
    return found


def _outputs(node: Any, loss: Callable[..., Any], names: tuple[str, ...]) -> list[Output]:
    arguments = {name: getattr(node, f"_saved_{name}") for name in names}
    arguments["input"] = node._saved_self
    arguments["reduction"] = ("none", "mean", "sum")[node._saved_reduction]
    if "ignore_index" in arguments:
        arguments["ignore_index"] = _signed(arguments["ignore_index"])
    if loss is F.nll_loss and _is_log_softmax(node.next_functions[0][0], node._saved_self):
        # Of logarithms of probabilities that add up to one, cross-entropy is the same.
        loss, arguments["label_smoothing"] = F.cross_entropy, 0.0
    value, before = GradientEdge(node, 0), versions(arguments.values())
    return [
        Output(arguments[name], loss, name, arguments, value, before)
        for name in ("input", "target")
        # A leaf has no place of its own in the graph.
        if isinstance(arguments[name], Tensor) and arguments[name].grad_fn is not None
    ]


def _is_log_softmax(node: Any, result: Tensor) -> bool:
    """True if a node has made logarithms of the probabilities of classes."""
    if type(node).__name__ != "LogSoftmaxBackward0":
        return False
    return _signed(node._saved_dim) % result.dim() == (1 if result.dim() > 1 else 0)


def _signed(number: int) -> int:
    """An integer that a node shows without its sign."""
    return number - 2**64 if number >= 2**63 else number


_CLASSES = ("target", "weight", "ignore_index")
_LOSSES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "NllLossBackward0": (F.nll_loss, _CLASSES),
    "NllLoss2DBackward0": (F.nll_loss, _CLASSES),
    "MseLossBackward0": (F.mse_loss, ("target",)),
    "BinaryCrossEntropyBackward0": (F.binary_cross_entropy, ("target", "weight")),
    "BinaryCrossEntropyWithLogitsBackward0": (
        F.binary_cross_entropy_with_logits,
        ("target", "weight", "pos_weight"),
    ),
    "HuberLossBackward0": (F.huber_loss, ("target",)),
    "SmoothL1LossBackward0": (F.smooth_l1_loss, ("target",)),
    "SoftMarginLossBackward0": (F.soft_margin_loss, ("target",)),
}
