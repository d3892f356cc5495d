"""Every private part of PyTorch that this package uses, each with a fallback.

A release of PyTorch that renames one of these breaks this file at most. All names are looked up
once, at import, so that a call costs what it costs in PyTorch. A fallback uses public functions
only; its comment says what is slower, or lost, without the private one.

Not in here, because the documentation of PyTorch has them: `torch._foreach_*`, `Tensor._version`,
and what a node has saved (`grad_fn._saved_self`).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = [
    "APPLY_HOLDER",
    "APPLY_IN_C",
    "BATCHES_DIRECTLY",
    "DDP_FIRST_PASS_SEEN",
    "ENGINE_ENTRY",
    "FORWARD_CLASS",
    "FUSED_WEIGHT_NORM",
    "OPTIMIZER_HOOKS",
    "WEIGHT_NORM_HOLDERS",
    "WEIGHT_NORM_NAME",
    "BatchNorm",
    "DispatchMode",
    "NormBase",
    "add_batch_dim",
    "any_autocast_enabled",
    "attention_by_definition",
    "begin_batch",
    "dynamo_error",
    "enable_overrideable_attention",
    "end_batch",
    "engine_run_backward",
    "executes",
    "flatten_tensors",
    "forward_mode_active",
    "fsdp_dtype",
    "fused_adam",
    "global_module_hooks",
    "innermost_transform",
    "is_batched_gradient",
    "load_forward_rules",
    "matmul_transposed",
    "module_hooks",
    "number_of_dispatch_modes",
    "number_of_function_modes",
    "overrideable_attention_enabled",
    "own_apply",
    "plainly",
    "pytree",
    "remove_batch_dim",
    "running_pass",
    "sequence_number",
    "sequence_number_of",
    "set_grad_mode",
    "shares_storage",
    "steps_are_seen",
    "tensor_hooks",
    "traces_autograd",
    "unflatten_tensors",
    "unscale",
    "without_zero_tensors",
]


def _found(path: str) -> Any:
    """The attribute at `module:name.name`; None where this version of PyTorch has none."""
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


# Trees of tensors. Later versions have the same functions under a public name.
try:
    pytree: Any = importlib.import_module("torch.utils._pytree")
except ImportError:
    pytree = importlib.import_module("torch.utils.pytree.python")


# --- Tensors ---


class _Plainly(TorchFunctionMode):
    """Runs functions as `Tensor` itself does, whatever classes their arguments have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run: Any = Tensor.__torch_function__
        return run(func, (), args, kwargs or {})


#: A context inside which functions take subclasses for plain tensors, and return these. The
#: fallback is a function mode, which costs some microseconds an operation.
plainly: Any = _found("torch:_C.DisableTorchFunctionSubclass") or _Plainly


class _SeesNothing:
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


#: The base class of contexts that see each operation below autograd, in `__torch_dispatch__`. The
#: fallback sees none; operations that wait for a device are then found when a graph is recorded.
DispatchMode: Any = _found("torch.utils._python_dispatch:TorchDispatchMode") or _SeesNothing

# How many tensors use a storage. Without it every storage counts as shared, so that no memory is
# used again.
_storage_uses: Callable[[int], int] | None = _found("torch:_C._storage_Use_Count")


def _uses(tensor: Tensor) -> int:
    assert _storage_uses is not None
    storage = tensor.untyped_storage()
    return int(_storage_uses(storage._cdata))


_ALONE = 0 if _storage_uses is None else _uses(torch.empty(1))


def shares_storage(tensor: Tensor) -> bool:
    """True where other tensors use the same storage."""
    return _storage_uses is None or _uses(tensor) > _ALONE


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, likes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = flat.split([t.numel() for t in likes])
    return tuple(part.view(t.shape) for part, t in zip(parts, likes, strict=True))


#: One vector of several tensors, and views of a vector with the shapes of several tensors. From
#: C++: in Python, one by one, they take longer than the arithmetic on a small network.
flatten_tensors: Callable[[Any], Tensor] = _found("torch._utils:_flatten_dense_tensors") or _flatten
unflatten_tensors: Callable[[Tensor, Any], tuple[Tensor, ...]] = (
    _found("torch._utils:_unflatten_dense_tensors") or _unflatten
)

_linear: Any = _found("torch:ops.mkldnn._linear_pointwise")
_worth = 2**22  # multiplications, below which calls are what takes time


def _oneDNN_multiplies(A: Tensor, B: Tensor) -> bool:
    return (
        _linear is not None
        and A.dtype == torch.float32
        and A.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and A.is_contiguous()
        and B.is_contiguous()
        and len(A) * len(B) * A.shape[1] > _worth
    )


def matmul_transposed(A: Tensor, B: Tensor) -> Tensor:
    """`A B'` of two matrices, neither with a graph.

    On CPUs by oneDNN where that is there, which takes half the time of MKL on those of AMD, and no
    more on others; without the private function by MKL.
    """
    if _oneDNN_multiplies(A, B):
        product: Tensor = _linear(A, B, None, "none", [], "")
        return product
    return A @ B.T


#: PyTorch's fused kernel of Adam, None without one: then updates take several passes.
fused_adam: Callable[..., Any] | None = _found("torch:_fused_adam_")


def _unscale(tensors: Sequence[Tensor], found: Tensor, inverse_scale: Tensor) -> None:
    for t in tensors:
        found.copy_(torch.maximum(found, (~t.isfinite()).any().to(found)))
        t.mul_(inverse_scale.to(t.dtype))


#: Multiplies tensors by a number in place and sets `found` to one where an entry is not finite, in
#: one pass.
unscale: Callable[[Sequence[Tensor], Tensor, Tensor], None] = (
    _found("torch:_amp_foreach_non_finite_check_and_unscale_") or _unscale
)

#: Whether autocast is on for any type of device. The fallback says yes, and the caller asks for
#: each type.
any_autocast_enabled: Callable[[], bool] = _found("torch:_C._is_any_autocast_enabled") or (
    lambda: True
)

# --- The autograd engine ---

#: Switches gradients on or off. `torch.enable_grad` takes half a microsecond, which counts for a
#: function of ten operations.
set_grad_mode: Callable[[bool], Any] = (
    _found("torch:_C._set_grad_enabled") or torch.set_grad_enabled
)


def _run_backward(
    outputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    allow_unreachable: bool = True,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    if accumulate_grad:
        torch.autograd.backward(
            outputs, gradients, keep_graph, create_graph, inputs=tuple(inputs) or None
        )
        return ()
    return torch.autograd.grad(
        outputs, inputs, gradients, keep_graph, create_graph, allow_unused=allow_unreachable
    )


#: Runs a backward pass. `torch.autograd.grad` looks at every shape before it does so, which takes
#: four microseconds a tensor.
engine_run_backward: Callable[..., tuple[Tensor | None, ...]] = (
    _found("torch.autograd:Variable._execution_engine.run_backward") or _run_backward
)

#: The attribute through which `torch.autograd.backward` goes, and `torch.autograd.grad` as well.
#: The fallback is `backward` itself, of which some may have kept a copy.
ENGINE_ENTRY = (
    "_engine_run_backward" if hasattr(torch.autograd, "_engine_run_backward") else "backward"
)

#: The number of the backward pass that runs in this thread, -1 for none. Without it a checkpoint
#: that a pass computes anew on a device counts as a pass of its own.
running_pass: Callable[[], int] = _found("torch:_C._current_graph_task_id") or (lambda: -1)

#: Whether the engine, while it runs, will need a node. Without it derivatives are computed that
#: nobody asked for.
executes: Callable[[Any], bool] = _found("torch:_C._will_engine_execute_node") or (lambda _: True)


def _length(node: Any) -> int:
    """The number of nodes behind one, it included."""
    seen, to_do = {node}, [node]
    while to_do:
        for parent, _ in to_do.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                to_do.append(parent)
    return len(seen)


#: The number of the operation that comes next, and the one that a node had, so that a difference is
#: the length of a forward pass. The fallback walks over the graph.
sequence_number: Callable[[], int] = _found("torch:_C._autograd._get_sequence_nr") or (lambda: 0)
sequence_number_of: Callable[[Any], int] = (
    _length
    if _found("torch:_C._autograd._get_sequence_nr") is None
    else methodcaller("_sequence_nr")
)


def output_shape(node: Any, number: int) -> tuple[int, ...] | None:
    """The shape of one of a node's outputs; None where the node does not tell."""
    found = getattr(node, "_input_metadata", ())  # of gradients, which are the inputs of a node
    metadata = found[number] if number < len(found) else None
    return None if metadata is None else tuple(metadata.shape)


def output_size(node: Any) -> int:
    """The number of elements of a node's outputs; 0 where the node does not tell."""
    found = getattr(node, "_input_metadata", ())  # of gradients, which are the inputs of a node
    return sum(math.prod(metadata.shape) for metadata in found if metadata is not None)


#: The attribute of a node's type that is the custom function which made the node. Without it custom
#: functions without second derivatives are found where they are applied only.
FORWARD_CLASS = "_forward_cls"


def tensor_hooks(tensor: Tensor) -> dict[Any, Any] | None:
    """The hooks of `Tensor.register_hook`, if there are any; nobody else keeps them."""
    return getattr(tensor, "_backward_hooks", None)


# --- Custom functions ---

# Up to torch 2.13 `Function.apply` is written in Python, and goes through the class below it, which
# those who have kept a copy of it do as well. Later it is in C, and copies are not seen.
_APPLY = vars(torch.autograd.Function)["apply"]
_below: Any = _found("torch.autograd.function:_SingleLevelFunction")
_base: Any = _found("torch:_C._FunctionBase")

#: Whether `Function.apply` is written in C.
APPLY_IN_C = not isinstance(_APPLY, classmethod)
#: The class with the `apply` that all custom functions go through.
APPLY_HOLDER: Any = torch.autograd.Function if APPLY_IN_C or _below is None else _below


def own_apply(cls: Any) -> Callable[..., Any]:
    """The `apply` of a custom function that nobody has replaced."""
    if APPLY_HOLDER is _below:
        above: Callable[..., Any] = super(_below, cls).apply
        return above
    apply = _APPLY if _base is None or not APPLY_IN_C else vars(_base)["apply"]
    bound: Callable[..., Any] = apply.__get__(None, cls)
    return bound


# --- Transformations: torch.func, forward mode, function modes ---


class _Probe(torch.autograd.Function):
    """A custom function that transformations of torch.func refuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def _refuses_probe() -> bool | None:
    try:
        _Probe.apply(torch.zeros(()))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return None


#: The transformation of torch.func that is running, None outside of all. The fallback applies a
#: custom function, which takes some microseconds.
innermost_transform: Callable[[], Any] = (
    _found("torch._C._functorch:peek_interpreter_stack") or _refuses_probe
)

#: Whether a gradient stands for several, for `is_grads_batched`. The fallback says yes: then second
#: derivatives of convolutions are those of PyTorch, which are slower.
is_batched_gradient: Callable[[Tensor], bool] = _found(
    "torch._C._functorch:is_legacy_batchedtensor"
) or (lambda _: True)

# The parts of `torch.func.vmap`.
begin_batch: Any = _found("torch._C._functorch:_vmap_increment_nesting")
end_batch: Any = _found("torch._C._functorch:_vmap_decrement_nesting")
add_batch_dim: Any = _found("torch._C._functorch:_add_batch_dim")
remove_batch_dim: Any = _found("torch._C._functorch:_remove_batch_dim")
#: Whether they are there. Without them, Jacobians are taken by the transformations of torch.func.
BATCHES_DIRECTLY = None not in (begin_batch, end_batch, add_batch_dim, remove_batch_dim)


@cache
def load_forward_rules() -> None:
    """Compiles some rules of forward mode, which else happens at its first use.

    PyTorch does it in a way of its own that it warns of, in categories that differ by version. That
    is no business of our callers, who may have made warnings errors. Without the private function
    they see the warning.
    """
    load = _found("torch.autograd.forward_ad:_maybe_load_decompositions")
    if load is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()


if hasattr(forward_ad, "_current_level"):

    def forward_mode_active() -> bool:
        """True where forward-mode differentiation is on."""
        return forward_ad._current_level >= 0

else:

    def forward_mode_active() -> bool:
        """True where forward-mode differentiation is on."""
        load_forward_rules()  # which the first dual tensor does else, with a warning
        try:
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
        except RuntimeError:
            return False
        return True


#: How many dispatch modes are active. Without it there might always be one.
number_of_dispatch_modes: Callable[[], int] = _found("torch:_C._len_torch_dispatch_stack") or (
    lambda: 1
)
#: How many function modes are active. Without it a `backward` that is intercepted comes before all
#: modes, also those that were entered later.
number_of_function_modes: Callable[[], int] = _found("torch:_C._len_torch_function_stack") or (
    lambda: 0
)


# --- Attention and weight normalization ---

#: Whether the attention of another package is used, and the switch for it: the only backend without
#: a public name. Where there is no such switch, that backend stays as it is.
overrideable_attention_enabled: Callable[[], bool] = _found(
    "torch:_C._get_overrideable_sdp_enabled"
) or (lambda: False)
enable_overrideable_attention: Callable[[bool], None] = _found(
    "torch:_C._set_sdp_use_overrideable"
) or (lambda enabled: None)

_attention_math: Any = _found("torch:ops.aten._scaled_dot_product_attention_math")


def attention_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Scaled dot-product attention of operations that can be differentiated twice."""
    if _attention_math is not None:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        found: Tensor = _attention_math(query, key, value, bias, 0.0, is_causal, **options)[0]
        return found
    with sdpa_kernel(SDPBackend.MATH):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, bias, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )


#: The fused weight normalization, and the modules of PyTorch that look it up when they call it.
#: Without it nothing has to be replaced.
WEIGHT_NORM_NAME = "_weight_norm"
FUSED_WEIGHT_NORM: Any = getattr(torch, WEIGHT_NORM_NAME, None)
WEIGHT_NORM_HOLDERS: tuple[Any, ...] = tuple(
    module
    for module in (torch, importlib.import_module("torch.nn.utils.weight_norm"))
    if hasattr(module, WEIGHT_NORM_NAME)
)

# --- Modules, optimizers, wrappers ---

#: The layers that keep running statistics; a fallback knows those of PyTorch alone.
BatchNorm: Any = _found("torch.nn.modules.batchnorm:_BatchNorm") or (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
NormBase: Any = _found("torch.nn.modules.batchnorm:_NormBase") or (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

# Stands for hooks that nobody can look at.
_UNKNOWN: Mapping[Any, Any] = {None: object()}
_KINDS_OF_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_OWN_HOOKS = tuple(f"_{kind}" for kind in _KINDS_OF_HOOKS)
_GLOBAL_HOOKS = tuple(f"_global_{kind}" for kind in _KINDS_OF_HOOKS)
_UNKNOWNS = (_UNKNOWN,) * len(_KINDS_OF_HOOKS)
_MODULE_OF_MODULES = vars(importlib.import_module("torch.nn.modules.module"))


def module_hooks(module: nn.Module) -> Iterable[Mapping[Any, Any]]:
    """The hooks of a module by their kinds; a kind that cannot be read counts as one with hooks."""
    return map(vars(module).get, _OWN_HOOKS, _UNKNOWNS)


def global_module_hooks() -> Iterable[Mapping[Any, Any]]:
    """The hooks of all modules by their kinds, likewise."""
    return map(_MODULE_OF_MODULES.get, _GLOBAL_HOOKS, _UNKNOWNS)


#: The attributes that hold the hooks of an optimizer. An optimizer that wraps another one has to
#: make them; where they have other names, hooks cannot be registered with the wrapper.
OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

_hooks_before_steps: Any = _found("torch.optim.optimizer:_global_optimizer_pre_hooks")
_hooks_after_steps: Any = _found("torch.optim.optimizer:_global_optimizer_post_hooks")
_profiles: Callable[[], bool] | None = _found("torch.autograd:_profiler_enabled")


def steps_are_seen() -> bool:
    """True if a profiler or hooks of all optimizers are at work.

    The fallback says yes, and an optimizer that wraps another one takes some microseconds more.
    """
    if _hooks_before_steps is None or _hooks_after_steps is None or _profiles is None:
        return True
    return bool(_hooks_before_steps or _hooks_after_steps or _profiles())


#: The attribute of `DistributedDataParallel(static_graph=True)` that says whether it has seen a
#: backward pass. Without it a pass counts as seen.
DDP_FIRST_PASS_SEEN = "_static_graph_delay_allreduce_enqueued"


def fsdp_dtype(module: Any) -> torch.dtype | None:
    """The dtype that a module of `fully_shard` computes with; None for the parameters' own.

    None as well where the policy cannot be read: then the noise of a narrower dtype is not allowed
    for.
    """
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    policy = getattr(state, "_mp_policy", None)
    dtype: torch.dtype | None = getattr(policy, "param_dtype", None)
    return dtype


# --- torch.compile ---


class _NeverRaised(Exception):
    pass


def dynamo_error(name: str) -> type[BaseException]:
    """An error of `torch._dynamo.exc`; without it PyTorch's own message passes as it is."""
    found: type[BaseException] = _found(f"torch._dynamo.exc:{name}") or _NeverRaised
    return found


def traces_autograd() -> AbstractContextManager[Any]:
    """A context inside which Dynamo traces functions that call `torch.autograd.grad`.

    Without that option such functions cannot be compiled, and Dynamo says so.
    """
    config = _found("torch._dynamo:config")
    if not hasattr(config, "trace_autograd_ops"):
        return nullcontext()
    context: AbstractContextManager[Any] = config.patch(trace_autograd_ops=True)
    return context


_DispatchMode: Any = _found("torch.utils._python_dispatch:TorchDispatchMode")
_zero_without_memory: Any = _found("torch:ops.aten._efficientzerotensor.default")


def _with_memory() -> Callable[[], AbstractContextManager[Any]]:
    if _DispatchMode is None or _zero_without_memory is None:
        return nullcontext

    class WithMemory(_DispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is _zero_without_memory:
                func = torch.ops.aten.zeros.default
            return func(*args, **(kwargs or {}))

    return WithMemory


#: Forward mode makes zeros without memory, at which tracing in the real mode crashes; inside this
#: context they have memory. Without it functions in which some arise cannot be compiled.
without_zero_tensors = _with_memory()
