"""Derivatives of pure functions are those of dense references, and compose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from tests.support.oracles import dense_gauss_newton, dense_hessian
from torch_secondorder.func import (
    batch_jacobian,
    ggnvp,
    hessian_diagonal,
    hvp,
    jacobian,
    jvp,
    module_jacobian,
    vhp,
    vjp,
)

DTYPE = torch.float64
MODES = ["auto", "forward", "reverse"]


def draw(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=DTYPE).to(device)


def network(device: torch.device, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Softmax(-1)).to(device, DTYPE)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def tree_function(p: dict[str, Any]) -> dict[str, Any]:
    w, (b, c) = p["w"], p["rest"]
    return {"s": (w @ b).tanh(), "t": [(c * w.sum()).exp(), c.sin().prod()]}


def tree_point(device: torch.device) -> dict[str, Any]:
    draws = [draw(*shape, device=device) / 2 for shape in ((2, 3), (3,), (2, 2))]
    return {"w": draws[0], "rest": (draws[1], draws[2])}


def scalar_of_tree(p: dict[str, Any]) -> Tensor:
    out = tree_function(p)
    return out["s"].pow(2).sum() + out["t"][0].sum() * out["t"][1]


# --- Jacobians ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize("width", [2, 9])
def test_the_jacobian_of_a_network(
    mode: Any, chunk_size: int | None, width: int, device: torch.device
) -> None:
    net, x = network(device, 6, 8, width), draw(6, device=device)
    expected = torch.autograd.functional.jacobian(net, x)
    close(jacobian(net, x, mode, chunk_size), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_trees_give_trees_of_trees(mode: Any, chunk_size: int | None, device: torch.device) -> None:
    x = tree_point(device)
    close(jacobian(tree_function, x, mode, chunk_size), jacrev(tree_function)(x))


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(max_examples=30, deadline=None)
@given(shapes, shapes, st.integers(1, 5))
def test_all_shapes_and_modes_agree(inside: Any, outside: Any, chunk_size: int) -> None:
    count = torch.Size(inside).numel()
    weight, x = draw(torch.Size(outside).numel(), count), draw(*inside)

    def f(x: Tensor) -> Tensor:
        return (weight @ x.reshape(-1).sin()).view(outside)

    expected = (weight * x.reshape(-1).cos()).view((*outside, *inside))
    for mode in MODES:
        close(jacobian(f, x, mode), expected)  # type: ignore[arg-type]
        close(jacobian(f, x, mode, chunk_size), expected)  # type: ignore[arg-type]
    batch = torch.stack([x, 2 * x, -x])
    rows = torch.stack([jacobian(f, row) for row in batch])
    for mode in MODES:
        close(batch_jacobian(vmap(f), batch, mode), rows)  # type: ignore[arg-type]
        close(batch_jacobian(vmap(f), batch, mode, chunk_size), rows)  # type: ignore[arg-type]


def test_far_more_outputs_than_inputs_go_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_secondorder.func.jacobians as module

    pushed = []

    def spy(f: Any, inputs: Any, tangents: Any) -> Any:
        pushed.append(len(tangents[0]))
        return original(f, inputs, tangents)

    original = module.push
    monkeypatch.setattr(module, "push", spy)
    weight = draw(1500, 3)
    close(jacobian(lambda x: weight @ x, draw(3)), weight)
    assert pushed == [3]
    jacobian(lambda x: weight.T @ x, draw(1500))
    assert pushed == [3]


@pytest.mark.parametrize("mode", MODES)
def test_mixed_dtypes_take_that_of_the_input(mode: Any) -> None:
    x = {"a": torch.ones(2), "b": torch.ones(3, dtype=DTYPE)}
    found = jacobian(lambda p: p["a"].sum() * p["b"], x, mode)
    assert (found["a"].dtype, found["b"].dtype) == (torch.float32, DTYPE)
    assert (found["a"].shape, found["b"].shape) == ((3, 2), (3, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("f", [lambda x: torch.ones(3), lambda x: x.detach()[:1], torch.round])
def test_what_does_not_depend_on_the_input_has_zeros(mode: Any, f: Any) -> None:
    found = jacobian(f, torch.full((2,), 1.3), mode)
    assert found.shape == (*f(torch.ones(2)).shape, 2)
    assert not found.any()


def test_the_identity_and_aliases() -> None:
    x = draw(3)
    close(jacobian(lambda x: x, x), torch.eye(3, dtype=DTYPE))
    close(jacobian(lambda x: (x, x.view(3, 1)[:, 0]), x), (torch.eye(3, dtype=DTYPE),) * 2)


class NoBatching(torch.autograd.Function):
    """Its backward pass reads numbers, which vmap cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * 2 * x if g.abs().sum().item() > 0 else torch.zeros_like(x)


def test_operations_that_cannot_be_batched_go_row_by_row() -> None:
    x = draw(4)
    close(jacobian(NoBatching.apply, x), torch.diag(2 * x))
    twice = jacobian(NoBatching.apply, x.expand(2, 4), chunk_size=3)
    close(twice.sum((0, 2)), 4 * torch.diag(x))


class Cube(torch.autograd.Function):
    """Without a rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_operations_without_forward_mode() -> None:
    x = draw(3)
    close(hessian_diagonal(lambda x: Cube.apply(x).sum(), x, chunk_size=2), 6 * x)
    close(vhp(lambda x: Cube.apply(x).sum(), x, x), 6 * x * x)
    close(jacobian(lambda x: Cube.apply(x).expand(1000, 3), x)[7], torch.diag(3 * x**2))
    for call in (
        lambda: hvp(lambda x: Cube.apply(x).sum(), x, x),
        lambda: jacobian(Cube.apply, x, "forward"),
    ):
        with pytest.raises(NotImplementedError, match=r"no forward mode: take `vhp`.*'reverse'"):
            call()


def test_random_numbers_are_drawn_once_in_reverse_mode() -> None:
    x = draw(50)
    found = jacobian(lambda x: F.dropout(x, 0.5), x, chunk_size=7)
    values = found.diagonal()
    assert set(values.tolist()) == {0.0, 2.0}
    close(found, torch.diag(values))
    # Where columns would pay but cannot be made, the rows are.
    tall = jacobian(lambda x: F.dropout(x.expand(3000, 1), 0.5), x[:1])
    assert set(tall.unique().tolist()) == {0.0, 2.0}


def test_the_callers_modes_and_tensors_stay_as_they_are() -> None:
    x = draw(3).requires_grad_()
    with torch.no_grad():
        assert not jacobian(torch.sin, x).requires_grad
    with torch.inference_mode():
        close(jacobian(torch.sin, torch.ones(2)), torch.ones(2).cos().diag())
    assert jacobian(torch.sin, x).requires_grad
    assert not jacobian(torch.sin, x.detach()).requires_grad
    assert x.grad is None


# --- batches ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_jacobians_of_a_batch(mode: Any, chunk_size: int | None, device: torch.device) -> None:
    net, x = network(device, 5, 7, 3), draw(8, 5, device=device)
    close(batch_jacobian(net, x, mode, chunk_size), vmap(jacrev(net))(x))
    image = draw(4, 2, 5, 5, device=device)
    conv = nn.Conv2d(2, 3, 3).to(device, DTYPE)
    close(batch_jacobian(conv, image, mode, chunk_size), vmap(jacrev(conv))(image))


def test_a_batch_with_far_more_outputs_goes_forward() -> None:
    weight, x = draw(40, 2), draw(64, 2)
    found = batch_jacobian(lambda x: (x @ weight.T).sin(), x)
    close(found, (x @ weight.T).cos().unsqueeze(2) * weight)


@pytest.mark.parametrize("wrt", ["inputs", "parameters"])
def test_the_jacobian_of_a_module(wrt: Any, device: torch.device) -> None:
    net, x = network(device, 3, 4, 2), draw(5, 3, device=device)
    net[0].bias.requires_grad_(False)
    if wrt == "inputs":
        close(module_jacobian(net, x), vmap(jacrev(net))(x))
        return
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    expected = jacrev(lambda p: functional_call(net, p, (x,)))(params)
    assert set(expected) == {"0.weight", "2.weight", "2.bias"}
    for chunk_size in (None, 1, 3):
        close(module_jacobian(net, x, "parameters", chunk_size=chunk_size), expected)


def test_batch_norm_by_parameters_is_that_of_the_whole_batch(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).to(device, DTYPE)
    x = draw(5, 3, device=device)
    mean = net[1].running_mean.clone()
    params = dict(net.named_parameters())
    found = module_jacobian(net, x, "parameters")
    close(net[1].running_mean, mean)
    assert net[1].num_batches_tracked.item() == 0
    expected = torch.autograd.functional.jacobian(
        lambda w: functional_call(net, {"0.weight": w}, (x,)), params["0.weight"]
    )
    close(found["0.weight"], expected)

    class Centred(nn.Linear):  # vmap sees nothing wrong with it, its values do
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    centred = Centred(3, 2).to(device, DTYPE)
    expected = torch.autograd.functional.jacobian(
        lambda w: functional_call(centred, {"weight": w}, (x,)), centred.weight
    )
    close(module_jacobian(centred, x, "parameters")["weight"], expected)
    for wrt in ("inputs", "parameters"):  # in eval mode rows are independent
        made = module_jacobian(net.eval(), x, wrt)  # type: ignore[arg-type]
        shape = made.shape if wrt == "inputs" else made["0.weight"].shape
        assert tuple(shape) == ((5, 4, 3) if wrt == "inputs" else (5, 4, 4, 3))


# --- second derivatives ---


def small(device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight = draw(4, 6, device=device)
    return lambda x: ((weight @ x).tanh() ** 2).sum() + x.prod(), draw(6, device=device)


@pytest.mark.parametrize("product", [hvp, vhp])
def test_hessian_products(product: Any, device: torch.device) -> None:
    f, x = small(device)
    hessian = dense_hessian(f, [x])
    close(torch.stack([product(f, x, e) for e in torch.eye(6, dtype=DTYPE).to(device)]), hessian)
    batched = vmap(lambda v: product(f, x, v))(torch.eye(6, dtype=DTYPE, device=device))
    close(batched, hessian)
    close(product(lambda x: x.sum(), x, x), torch.zeros_like(x))


@pytest.mark.parametrize("product", [hvp, vhp])
def test_hessian_products_of_trees(product: Any, device: torch.device) -> None:
    x, v = tree_point(device), tree_point(device)
    h = jacrev(grad(scalar_of_tree))(x)
    found = product(scalar_of_tree, x, v)
    pairs = [
        (h["w"], found["w"]),
        (h["rest"][0], found["rest"][0]),
        (h["rest"][1], found["rest"][1]),
    ]
    for row, product_ in pairs:
        parts = zip((row["w"], *row["rest"]), (v["w"], *v["rest"]), strict=True)
        close(product_, sum(torch.tensordot(a, b, b.dim()) for a, b in parts))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_the_diagonal_of_the_hessian(chunk_size: int | None, device: torch.device) -> None:
    f, x = small(device)
    close(hessian_diagonal(f, x, chunk_size=chunk_size), dense_hessian(f, [x]).diagonal())
    tree = tree_point(device)
    found = hessian_diagonal(scalar_of_tree, tree, chunk_size=chunk_size)
    h = jacrev(grad(scalar_of_tree))(tree)
    close(found["w"], h["w"]["w"].reshape(6, 6).diagonal().view(2, 3))
    close(found["rest"][1], h["rest"][1]["rest"][1].reshape(4, 4).diagonal().view(2, 2))


def test_gauss_newton_products(device: torch.device) -> None:
    inputs, y = draw(5, 3, device=device), torch.tensor([0, 1, 0, 1, 1], device=device)
    params = {"w": draw(2, 3, device=device), "b": draw(2, device=device)}

    def model(p: dict[str, Tensor]) -> Tensor:
        return (inputs @ p["w"].T + p["b"]).sin()

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    dense = dense_gauss_newton(
        lambda w, b: [model({"w": w, "b": b})], loss, [params["w"], params["b"]]
    )
    v = {"w": draw(2, 3, seed=1, device=device), "b": draw(2, seed=1, device=device)}
    found = ggnvp(model, loss, params, v)
    flat = torch.cat([v["w"].reshape(-1), v["b"]])
    close(torch.cat([found["w"].reshape(-1), found["b"]]), dense @ flat)


# --- composition ---


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_everything_composes_with_vmap_and_grad(device: torch.device) -> None:
    f, x = small(device)
    many = torch.stack([x, x / 2, -x])
    each = [[g(row) for row in many] for g in compositions(f)]
    for g, expected in zip(compositions(f), each, strict=True):
        close(vmap(g)(many), torch.stack(expected))
        gradient = grad(lambda x, g=g: g(x).square().sum())(x)
        leaf = x.clone().requires_grad_()
        close(gradient, torch.autograd.grad(g(leaf).square().sum(), leaf)[0])
        compiled = torch.compile(g, backend="eager")
        close(compiled(x), g(x))
        torch._dynamo.reset()


def compositions(f: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
    def vector(x: Tensor) -> Tensor:
        return torch.stack([f(x), x.sin().sum()])

    def rows(x: Tensor) -> Tensor:
        return x.exp() * x.sum(1, keepdim=True)

    return [
        lambda x: jacobian(vector, x),
        lambda x: jacobian(vector, x, "forward", 4),
        lambda x: batch_jacobian(rows, x.view(2, 3)),
        lambda x: hvp(f, x, x),
        lambda x: vhp(f, x, x),
        lambda x: hessian_diagonal(f, x),
        lambda x: ggnvp(vector, lambda z: z.pow(3).sum(), x, x),
    ]


def test_transformations_nest(device: torch.device) -> None:
    f, x = small(device)
    third = jacrev(lambda x: hvp(f, x, x))(x) @ x
    close(jvp(lambda x: hvp(f, x, x), (x,), (x,))[1], third)
    close(jacobian(lambda x: jacobian(f, x), x), dense_hessian(f, [x]))
    close(jacobian(lambda x: jacobian(f, x, "forward"), x, "forward"), dense_hessian(f, [x]))


def test_a_jacobian_can_be_trained_on(device: torch.device) -> None:
    net, x = network(device, 3, 4, 2), draw(6, 3, device=device)
    for penalty in (
        lambda: batch_jacobian(net, x).square().sum(),
        lambda: jacobian(net, x[0]).square().sum(),
    ):
        found = torch.autograd.grad(penalty(), list(net.parameters()), allow_unused=True)
        assert found[0] is not None and found[0].abs().sum() > 0
    expected = torch.autograd.grad(vmap(jacrev(net))(x).square().sum(), net[0].weight)[0]
    close(torch.autograd.grad(batch_jacobian(net, x).square().sum(), net[0].weight)[0], expected)


def test_torch_funcs_own_are_at_hand() -> None:
    x, v = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    close(jvp(torch.sin, (x,), (v,))[1], x.cos() * v)
    (y, pull, aux), expected = vjp(lambda x: (x.sin(), x), x, has_aux=True), x.cos() * v
    close(pull(v)[0], expected)
    close(y, aux.sin())
