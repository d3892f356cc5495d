"""Closed-form Jacobians of encoders made of linear layers and elementwise activations.

They need no differentiation by the input: the modules are inspected, and called layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_secondorder._foundation.private_torch import global_module_hooks, module_hooks
from torch_secondorder.penalties._chain import Chain
from torch_secondorder.penalties._squares import logistic_slope


def _forward_of(kind: type[nn.Module]) -> Any:
    return getattr(kind, "forward", None)


#: Activations with derivatives that follow from their values.
_FROM_OUTPUT: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Sigmoid: logistic_slope,
    nn.Tanh: lambda h: 1 - h.square(),
    nn.ReLU: lambda h: (h > 0).to(h.dtype),
}
#: Other deterministic elementwise activations with two derivatives.
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU6, nn.SELU, nn.SiLU, nn.Softplus),
    *(nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold),
)
# The original forward functions, to detect replacements.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: _forward_of(kind)
    for kind in (nn.Sequential, nn.Flatten, nn.Linear, *_FROM_OUTPUT, *_ELEMENTWISE)
}


def stack_of(encoder: object, x: Tensor) -> list[nn.Module] | None:
    """The modules of an encoder made of linear layers and elementwise activations.

    Subclasses (such as those made by parametrizations), modules with hooks and replaced forwards
    may compute anything, and are not accepted.

    Args:
        encoder: The encoder.
        x: Its input.

    Returns:
        Linear layers and activations in order; the first is a linear layer, or a Flatten before
        one. None if the encoder is anything else.
    """
    if not isinstance(encoder, nn.Module) or _watched_globally():
        return None
    modules = list(_unrolled(encoder))
    if not all(type(module) in _FORWARDS and _is_plain(module) for module in modules):
        return None
    modules = [module for module in modules if type(module) is not nn.Sequential]
    layers = modules
    if modules and isinstance(modules[0], nn.Flatten):
        if (modules[0].start_dim, modules[0].end_dim) != (1, -1) or x.dim() < 2:
            return None
        layers = modules[1:]
    elif x.dim() != 2:
        return None
    if not layers or type(layers[0]) is not nn.Linear or nn.Flatten in map(type, layers):
        return None
    return modules


def _unrolled(module: nn.Module) -> Iterator[nn.Module]:
    """A module and, for nested Sequentials, the modules that it calls, in order."""
    yield module
    if type(module) is nn.Sequential:
        for inner in module:
            yield from _unrolled(inner)


def _is_plain(module: nn.Module) -> bool:
    replaced = "forward" in vars(module) or _forward_of(type(module)) is not _FORWARDS[type(module)]
    return not replaced and not _hooked(module_hooks(module))


def _watched_globally() -> bool:
    """True if there are global hooks on all modules."""
    return _hooked(global_module_hooks())


def _hooked(hooks: Iterable[Mapping[Any, Any]]) -> bool:
    """True if there are hooks that do not belong to this package.

    Optimizers of this package set hooks to observe the modules of a closure; they change nothing.
    """
    package = __name__.partition(".")[0]
    return any(
        getattr(hook, "__module__", "").partition(".")[0] != package
        for some in hooks
        for hook in some.values()
    )


def slope_from_output(modules: list[nn.Module], code: Tensor) -> Tensor | None:
    """The derivative of a single layer's activation, from the encoder's output.

    Args:
        modules: The encoder's modules, see `stack_of`.
        code: The encoder's output, shape `(n, units)`.

    Returns:
        The derivative, shaped like `code`; None if the output does not determine it.
    """
    linear, *activations = (m for m in modules if type(m) is not nn.Flatten)
    if type(linear) is nn.Linear and len(activations) == 1:
        derive = _FROM_OUTPUT.get(type(activations[0]))
        return None if derive is None else derive(code)
    return None


def _slope(activation: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of an activation at `a`, and its value there."""
    derive = _FROM_OUTPUT.get(type(activation))
    if derive is not None:
        h: Tensor = activation(a)
        return derive(h), h
    if not a.requires_grad:
        a = a.detach().requires_grad_()
    # An in-place activation would overwrite the tensor to differentiate by.
    h = activation(a.clone() if getattr(activation, "inplace", False) else a)
    # Each element affects one term of the sum, so this is the elementwise derivative.
    (slope,) = torch.autograd.grad(h.sum(), a, create_graph=True)
    return slope, h


def chain_of(modules: list[nn.Module], x: Tensor) -> Chain:
    """The factors of the Jacobian, from calling the modules of a stack one by one.

    Args:
        modules: See `stack_of`.
        x: Shape `(entries, inputs)`, or any shape if the first module is a Flatten.
    """
    weights: list[Tensor] = []
    slopes: list[Tensor | None] = []
    for module in modules:
        if isinstance(module, nn.Linear):
            x = module(x)
            weights.append(module.weight)
            slopes.append(None)
        elif isinstance(module, (nn.Flatten, nn.Identity)):
            x = module(x)
        else:
            slope, x = _slope(module, x)
            before = slopes[-1]
            slopes[-1] = slope if before is None else before * slope
    filled = [
        w.new_ones(len(x), w.shape[0]) if slope is None else slope
        for w, slope in zip(weights, slopes, strict=True)
    ]
    return Chain(weights, filled)
