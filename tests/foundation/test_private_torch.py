"""Private parts of PyTorch are used in one module, and every fallback gives the right answer."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_secondorder import LBFGS, AdaHessian, NewtonCG
from torch_secondorder._autograd import backward_hook, convolution, graph
from torch_secondorder._closure import capture
from torch_secondorder._foundation import (
    buffer_pool,
    cached_tensors,
    private_torch,
    subclasses,
)
from torch_secondorder.func import jacobian

ROOT = Path(private_torch.__file__).resolve().parents[1]

#: Private by their names, but described in the documentation of PyTorch.
DOCUMENTED = ("_foreach_", "_saved_", "_version")


def private_uses(path: Path) -> list[str]:
    """The places where a file uses attributes with underscores that it does not define."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own else [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            continue
        for name in names:
            private = any(
                part.startswith("_") and not part.startswith(("__", *DOCUMENTED))
                for part in str(name).split(".")
            )
            if private:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def names_of_the_package() -> set[str]:
    """All names with one underscore that the package defines itself."""
    names = {"_replace", "_asdict"}  # of every named tuple
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(t.id for t in targets if isinstance(t, ast.Name))
    return names


def test_no_other_module_uses_private_parts_of_torch() -> None:
    own = names_of_the_package()
    found = [
        use
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "private_torch.py"
        for use in private_uses(path)
        if use.rpartition(": ")[2].rpartition(".")[2] not in own
    ]
    assert found == []


def test_a_private_use_elsewhere_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(
        "from torch._utils import _flatten_dense_tensors\n"
        "import torch._dynamo\n"
        "torch._C._functorch.peek_interpreter_stack()\n"
        "getattr(torch, '_fused_adam_')\n"
        "torch._foreach_add_([], 1)\n"
        "self._own, tensor._version, node._saved_self\n"
    )
    found = [use.partition(":")[2] for use in private_uses(file)]
    assert sorted(found) == [
        "1: torch._utils._flatten_dense_tensors",
        "2: torch._dynamo",
        "3: _C",
        "3: _functorch",
        "4: _fused_adam_",
    ]


def test_this_version_of_torch_has_all_of_them() -> None:
    """A fallback in use here would go unnoticed: it is right, but slower."""
    assert private_torch.plainly is not private_torch._Plainly
    assert private_torch.DispatchMode is not private_torch._SeesNothing
    assert not private_torch.shares_storage(torch.empty(3))
    assert private_torch.fused_adam is not None
    assert private_torch.BATCHES_DIRECTLY
    assert private_torch.ENGINE_ENTRY == "_engine_run_backward"
    assert private_torch.WEIGHT_NORM_HOLDERS
    assert isinstance(private_torch.BatchNorm, type) and isinstance(private_torch.NormBase, type)
    for name, value in vars(private_torch).items():
        if callable(value) and name in private_torch.__all__:
            assert getattr(value, "__name__", "") != "<lambda>", name


@pytest.fixture
def without() -> Callable[..., ModuleType]:
    """Gives `private_torch` as it is in a version of PyTorch that lacks some names."""

    def load(*paths: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            for path in paths:
                owner_path, _, names = path.partition(":")
                owner: Any = importlib.import_module(owner_path)
                *parents, name = names.split(".")
                for parent in parents:
                    owner = getattr(owner, parent)
                patch.delattr(owner, name)
            spec = importlib.util.spec_from_file_location("private_torch", private_torch.__file__)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module

    return load


Without = Callable[..., ModuleType]


class Labelled(Tensor):
    """A subclass that nothing but plain functions keeps away."""

    calls = 0

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        Labelled.calls += 1
        return super().__torch_function__(*args, **kwargs)


def test_subclasses_are_plain_without_the_private_context(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C.DisableTorchFunctionSubclass")
    assert module.plainly is module._Plainly
    monkeypatch.setattr(subclasses, "plainly", module.plainly)
    x = torch.arange(3.0, requires_grad=True).as_subclass(Labelled)
    Labelled.calls = 0
    y = subclasses.plain(x)
    assert type(y) is Tensor
    assert y.requires_grad
    with module.plainly():
        assert type(torch.mul(x, 2)) is not float and torch.equal(torch.mul(x, 2), 2 * y)
    assert type(subclasses.snapshot(x)) is Tensor
    assert type(subclasses.like(torch.ones(2), x)) is Labelled
    assert Labelled.calls == 0


def test_without_dispatch_modes_nothing_is_seen(without: Without) -> None:
    module = without("torch.utils._python_dispatch:TorchDispatchMode")

    class Seeing(module.DispatchMode):
        def __torch_dispatch__(self, *_: Any) -> None:
            raise AssertionError

    with Seeing() as seeing:
        assert torch.ones(2).sum().item() == 2
    assert isinstance(seeing, module._SeesNothing)


def test_memory_counts_as_shared_where_its_uses_cannot_be_counted(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C._storage_Use_Count")
    pool = buffer_pool.BufferPool()
    cpu = torch.device("cpu")
    first = pool.empty("a", 5, torch.float32, cpu).data_ptr()
    assert pool.empty("a", 5, torch.float32, cpu).data_ptr() == first
    kept = pool.empty("a", 5, torch.float32, cpu)
    monkeypatch.setattr(buffer_pool, "shares_storage", module.shares_storage)
    assert pool.empty("a", 5, torch.float32, cpu).data_ptr() != kept.data_ptr()


def test_gradients_are_switched_by_a_public_function(without: Without) -> None:
    module = without("torch:_C._set_grad_enabled")
    assert module.set_grad_mode is torch.set_grad_enabled is not private_torch.set_grad_mode
    for found in (module, private_torch):
        with torch.no_grad():
            found.set_grad_mode(True)
            assert torch.is_grad_enabled()
            found.set_grad_mode(False)
            assert not torch.is_grad_enabled()


def test_vectors_are_joined_and_cut_by_public_functions(without: Without) -> None:
    module = without("torch._utils:_flatten_dense_tensors", "torch._utils:_unflatten_dense_tensors")
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(0, 4), torch.randn(5)[::2]]
    for found in (module, private_torch):
        flat = found.flatten_tensors(tensors)
        parts = found.unflatten_tensors(flat, tensors)
        assert torch.equal(flat, torch.cat([t.reshape(-1) for t in tensors]))
        for part, tensor in zip(parts, tensors, strict=True):
            assert torch.equal(part, tensor) and part.shape == tensor.shape
        parts[0].zero_()
        assert not flat[:6].any()


def test_adahessian_steps_alike_without_the_fused_kernel(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_secondorder._optim.diagonal import blocks

    module = without("torch:_fused_adam_")
    assert module.fused_adam is None

    def run() -> Tensor:
        torch.manual_seed(0)
        x = torch.randn(50, requires_grad=True)
        optimizer = AdaHessian([x], lr=0.1, seed=1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (x**4).sum() + (x**2).sum()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return x.detach()

    expected = run()
    monkeypatch.setattr(blocks, "fused_adam", module.fused_adam)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_unscaling_finds_nonfinite_entries(without: Without, bad: float | None) -> None:
    module = without("torch:_amp_foreach_non_finite_check_and_unscale_")
    assert module.unscale is not private_torch.unscale
    results = []
    for found in (module, private_torch):
        tensors = [torch.full((3,), 6.0), torch.ones(2, 2)]
        if bad is not None:
            tensors[0][1] = bad
        flag = torch.zeros(())
        found.unscale(tensors, flag, torch.tensor(0.5))
        results.append((flag, tensors))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    assert bool(results[0][0]) == (bad is not None)


def test_autocast_counts_as_on_where_nobody_tells(without: Without) -> None:
    from torch_secondorder._closure import runner

    module = without("torch:_C._is_any_autocast_enabled")
    assert module.any_autocast_enabled()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(runner, "any_autocast_enabled", module.any_autocast_enabled)
        with runner.without_autocast([torch.ones(1)]):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def minimized(kind: Any, **options: Any) -> Tensor:
    x = torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = kind([x], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    return x.detach()


def test_products_are_the_same_by_public_functions(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch.autograd:Variable._execution_engine")
    assert module.engine_run_backward is module._run_backward
    expected = minimized(NewtonCG)
    monkeypatch.setattr(graph, "engine_run_backward", module.engine_run_backward)
    assert torch.equal(minimized(NewtonCG), expected)

    x = torch.ones(2, requires_grad=True)
    module.engine_run_backward(
        ((x * 3).sum(),), (torch.ones(()),), False, False, (), True, accumulate_grad=True
    )
    assert x.grad is not None and x.grad.tolist() == [3.0, 3.0]


def test_accumulated_gradients_are_noticed_without_the_engines_entry(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch.autograd:_engine_run_backward")
    assert module.ENGINE_ENTRY == "backward"
    patch = backward_hook.Patch(torch.autograd, module.ENGINE_ENTRY, capture._noticing_accumulation)
    monkeypatch.setattr(capture, "_ACCUMULATES", True)
    monkeypatch.setattr(capture, "_accumulations", patch)
    x = torch.ones(2, requires_grad=True)
    with capture.Capture([x]) as found:
        torch.autograd.backward((x * x).sum())
    assert found.foreign
    with capture.Capture([x]) as found:
        torch.autograd.grad((x * x).sum(), [x])
    assert not found.foreign


def test_passes_are_seen_where_they_have_no_number(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C._current_graph_task_id")
    monkeypatch.setattr(backward_hook, "running_pass", module.running_pass)
    seen = []

    def handler(those: Any, own: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(len(those))
        own(*args, **kwargs)

    listeners = backward_hook.BackwardListeners(handler)
    someone = {1}
    listeners.add(someone)
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
    y.sum().backward()
    listeners.discard(someone)
    assert seen == [1]
    torch.testing.assert_close(x.grad, torch.cos(torch.ones(2)))


def test_convolutions_are_right_without_private_questions(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without(
        "torch:_C._will_engine_execute_node",
        "torch._C._functorch:peek_interpreter_stack",
        "torch._C._functorch:is_legacy_batchedtensor",
        "torch.autograd.forward_ad:_current_level",
    )
    for name in (
        "executes",
        "forward_mode_active",
        "innermost_transform",
        "is_batched_gradient",
    ):
        assert getattr(module, name) is not getattr(private_torch, name)
        monkeypatch.setattr(convolution, name, getattr(module, name))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, convolve: Any = convolution.convolution) -> Tensor:
        y = convolve(torch.conv2d, x, w) if convolve else torch.conv2d(x, w)
        return y.sin().sum()

    v = torch.randn_like(w)
    found, expected = (
        torch.autograd.functional.vhp(lambda w, c=c: loss(w, c), w, v)[1]
        for c in (convolution.convolution, None)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.func.grad(loss)(w), torch.func.grad(lambda w: loss(w, None))(w)
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w.detach(), v)
        moved = forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(moved, (torch.func.grad(loss)(w) * v).sum())


def test_transformations_are_noticed_by_a_probe(without: Without) -> None:
    module = without("torch._C._functorch:peek_interpreter_stack")
    assert module.innermost_transform() is None
    inside = []

    def f(x: Tensor) -> Tensor:
        inside.append(module.innermost_transform() is not None)
        return x * x

    torch.func.grad(f)(torch.tensor(1.0))
    torch.func.vmap(f)(torch.ones(2))
    f(torch.ones(()))
    assert inside == [True, True, False]


def test_forward_mode_is_noticed_by_a_dual_tensor(without: Without) -> None:
    module = without("torch.autograd.forward_ad:_current_level")
    assert not module.forward_mode_active()
    with forward_ad.dual_level():
        assert module.forward_mode_active()
    assert not module.forward_mode_active()


def test_lengths_of_graphs_without_sequence_numbers(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C._autograd._get_sequence_nr")
    x = torch.ones(3, requires_grad=True)
    assert module.sequence_number_of((x * x).sum().grad_fn) == 3
    expected = minimized(NewtonCG)
    monkeypatch.setattr(capture, "sequence_number", module.sequence_number)
    monkeypatch.setattr(capture, "sequence_number_of", module.sequence_number_of)
    assert torch.equal(minimized(NewtonCG), expected)


def test_jacobians_without_the_parts_of_vmap(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_secondorder.func import _recorded

    module = without("torch._C._functorch:_add_batch_dim")
    assert not module.BATCHES_DIRECTLY

    def f(x: Tensor) -> Tensor:
        return torch.stack([x.prod(), x.square().sum()])

    x = torch.tensor([1.0, 2.0, 3.0])
    expected = jacobian(f, x)
    monkeypatch.setattr(_recorded, "BATCHES_DIRECTLY", False)
    torch.testing.assert_close(jacobian(f, x), expected)


def test_modes_count_as_none_where_nobody_tells(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C._len_torch_function_stack")
    monkeypatch.setattr(backward_hook, "number_of_function_modes", module.number_of_function_modes)
    x = torch.tensor(3.0, requires_grad=True)
    with backward_hook.patched_backward(lambda loss: (loss + x).backward()):
        (x * x).backward()
    assert x.grad is not None and x.grad.item() == 7.0
    assert torch.isfinite(minimized(LBFGS)).all()


def test_tensors_are_made_anew_where_nobody_tells_of_modes(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch:_C._len_torch_dispatch_stack")
    count = module.number_of_dispatch_modes
    monkeypatch.setattr(cached_tensors, "number_of_dispatch_modes", count)
    ones = cached_tensors.cached_tensors(torch.ones)
    assert ones(2) is not ones(2)


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_by_public_functions(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    q = torch.randn(1, 4, 5, 8)
    k, v = (torch.randn(1, 2 if grouped else 4, 5, 8) for _ in range(2))
    arguments = (q, k, v, None, True, None, grouped)
    expected = private_torch.attention_by_definition(*arguments)
    monkeypatch.setattr(private_torch, "_attention_math", None)
    torch.testing.assert_close(private_torch.attention_by_definition(*arguments), expected)


def test_switches_of_attention_may_be_missing(without: Without) -> None:
    module = without("torch:_C._get_overrideable_sdp_enabled", "torch:_C._set_sdp_use_overrideable")
    assert module.overrideable_attention_enabled() is False
    module.enable_overrideable_attention(True)


def test_weight_norm_may_have_moved(without: Without) -> None:
    module = without("torch:_weight_norm", "torch.nn.utils.weight_norm:_weight_norm")
    assert module.FUSED_WEIGHT_NORM is None and module.WEIGHT_NORM_HOLDERS == ()
    # A version without the fused operation has nothing that a closure could go wrong by.
    layer = parametrizations.weight_norm(nn.Linear(2, 1))
    assert private_torch.FUSED_WEIGHT_NORM is torch._weight_norm and layer(torch.ones(2)).shape


def test_layers_with_running_statistics_are_known(without: Without) -> None:
    module = without(
        "torch.nn.modules.batchnorm:_BatchNorm", "torch.nn.modules.batchnorm:_NormBase"
    )
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert isinstance(kind(2), module.BatchNorm) and isinstance(kind(2), module.NormBase)
    for other in (nn.InstanceNorm1d(2), nn.InstanceNorm2d(2), nn.InstanceNorm3d(2)):
        assert isinstance(other, module.NormBase) and not isinstance(other, module.BatchNorm)
    assert not isinstance(nn.LayerNorm(2), module.NormBase)


def test_hooks_that_cannot_be_read_count_as_hooks() -> None:
    from torch_secondorder.penalties import _layers

    layer = nn.Linear(2, 2)
    assert _layers._is_plain(layer)
    del vars(layer)["_forward_hooks"]
    assert not _layers._is_plain(layer)
    assert private_torch.tensor_hooks(object()) is None  # type: ignore[arg-type]
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda g: g)
    assert len(private_torch.tensor_hooks(x) or ()) == 1


def test_steps_count_as_seen_where_nobody_tells(without: Without) -> None:
    assert not private_torch.steps_are_seen()
    # torch 2.11 warns of what it does without `acc_events`.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        assert private_torch.steps_are_seen()
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert private_torch.steps_are_seen()
    handle.remove()
    for name in (
        "torch.optim.optimizer:_global_optimizer_pre_hooks",
        "torch.autograd:_profiler_enabled",
    ):
        assert without(name).steps_are_seen()


def test_names_of_attributes_are_those_of_this_version() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)])
    assert all(hasattr(optimizer, name) for name in private_torch.OPTIMIZER_HOOKS)
    assert len(list(private_torch.global_module_hooks())) == 4
    assert all(h is not private_torch._UNKNOWN for h in private_torch.global_module_hooks())

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    node = Double.apply(torch.ones(1, requires_grad=True)).grad_fn
    assert getattr(type(node), private_torch.FORWARD_CLASS) is Double
    assert torch.equal(private_torch.own_apply(Double)(torch.ones(1)), torch.full((1,), 2.0))


def test_custom_functions_are_applied_without_the_class_below(without: Without) -> None:
    for path in ("torch.autograd.function:_SingleLevelFunction", "torch:_C._FunctionBase"):
        module = without(path)

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

        assert torch.equal(module.own_apply(Double)(torch.ones(1)), torch.full((1,), 2.0))
        assert "apply" in vars(module.APPLY_HOLDER) or module.APPLY_HOLDER is module._below


def test_fsdp_modules_without_a_policy_compute_in_their_own_dtype() -> None:
    class State:
        _mp_policy = torch.nn.Identity()

    class Module:
        def _get_fsdp_state(self) -> State:
            return State()

    assert private_torch.fsdp_dtype(object()) is None
    assert private_torch.fsdp_dtype(Module()) is None
    State._mp_policy.param_dtype = torch.bfloat16  # type: ignore[assignment]
    assert private_torch.fsdp_dtype(Module()) is torch.bfloat16


def test_forward_mode_works_without_loading_its_rules_first(without: Without) -> None:
    module = without("torch.autograd.forward_ad:_maybe_load_decompositions")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(forward_ad, "_maybe_load_decompositions")
        module.load_forward_rules()


def test_trees_are_found_under_their_public_name() -> None:
    with pytest.MonkeyPatch.context() as patch:
        public = ModuleType("torch.utils.pytree")
        python = importlib.import_module("torch.utils._pytree")
        patch.delattr(torch.utils, "_pytree")
        patch.setitem(sys.modules, "torch.utils._pytree", None)
        patch.setitem(sys.modules, "torch.utils.pytree", public)
        patch.setitem(sys.modules, "torch.utils.pytree.python", python)
        spec = importlib.util.spec_from_file_location("private_torch", private_torch.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.pytree is python


def test_errors_and_options_of_dynamo_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    assert private_torch.dynamo_error("no_such_error") is private_torch._NeverRaised
    assert private_torch.dynamo_error("TorchDynamoException") is not private_torch._NeverRaised
    assert not isinstance(private_torch.traces_autograd(), nullcontext) or not hasattr(
        torch._dynamo.config, "trace_autograd_ops"
    )
    monkeypatch.delattr(torch._dynamo, "config")
    assert isinstance(private_torch.traces_autograd(), nullcontext)


def test_zeros_have_memory_only_where_torch_lets_functions_be_replaced(
    without: Without, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = without("torch.utils._python_dispatch:TorchDispatchMode")
    assert module.without_zero_tensors is nullcontext
    monkeypatch.setattr(module, "_DispatchMode", private_torch._DispatchMode)
    monkeypatch.setattr(module, "_zero_without_memory", None)
    assert module._with_memory() is nullcontext
    with private_torch.without_zero_tensors():
        zeros = torch.ops.aten._efficientzerotensor((2,))
    assert not zeros._is_zerotensor()
