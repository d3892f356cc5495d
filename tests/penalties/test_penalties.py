"""Penalties on Jacobians are those of dense per-sample Jacobians, in value and derivatives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.support.oracles import assert_matrix, dense_hessian
from torch_secondorder import FunctionalObjective, NewtonCG
from torch_secondorder._foundation import memory
from torch_secondorder.curvature import Hessian
from torch_secondorder.penalties import _squares as squares
from torch_secondorder.penalties import contractive, contractive_penalty, jacobian_penalty
from torch_secondorder.solvers import CG


@pytest.fixture(autouse=True)
def _as_with_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_WORTHWHILE", 0)


ACTIVATIONS: list[nn.Module] = [
    *(nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.Softplus()),
    *(nn.ELU(), nn.ELU(inplace=True), nn.CELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish()),
    *(nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), nn.ReLU6(), nn.Hardtanh()),
    *(nn.Hardswish(), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink()),
    *(nn.Softsign(), nn.LogSigmoid(), nn.Threshold(0.1, 0.3)),
]


def dense(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of each sample, one after the other: shape `(n, C, d)`."""
    each = [jacrev(lambda s: f(s.unsqueeze(0))[0])(s) for s in x]
    return torch.stack([j.reshape(-1, s.numel()) for j, s in zip(each, x, strict=True)])


def norm(jacobians: Tensor) -> Tensor:
    return jacobians.square().sum((1, 2)).mean()


def gradients(value: Tensor, *by: Tensor) -> list[Tensor]:
    if not value.requires_grad:  # the slope of a ReLU moves with nothing
        return [torch.zeros_like(t) for t in by]
    return list(torch.autograd.grad(value, by, allow_unused=True, materialize_grads=True))


def assert_penalty(penalty: Callable[..., Tensor], f: Any, x: Tensor, **arguments: Any) -> None:
    """The value, and its gradients by parameters and input, are those of dense Jacobians."""
    x = x.clone().requires_grad_()
    params = f.parameters() if isinstance(f, nn.Module) else ()
    by = [x, *(p for p in params if p.requires_grad)]
    found, expected = penalty(f, x, **arguments), norm(dense(f, x))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(found, *by), gradients(expected, *by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def data(device: torch.device | str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


def stack(*widths: int, activation: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Sequential:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers).double()


class Wide(nn.Module):
    """Outputs of rank three, many more than inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)).view(-1, 3, 4)


class Scalar(nn.Linear):
    """One output for a sample, without a dimension of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(super().forward(x)).squeeze(1)


FUNCTIONS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "mlp": (lambda: stack(5, 6, 3), (4, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), (3, 1, 5, 5)),
    "wide": (Wide, (4, 2)),
    "scalar": (lambda: Scalar(5, 1), (4, 5)),
    "of numbers": (lambda: lambda x: torch.sin(3 * x), (6,)),
    "batchnorm in evaluation": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid()).eval(),
        (3, 4),
    ),
    "layernorm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), (3, 4)),
}


def function(name: str, device: torch.device) -> tuple[Any, Tensor]:
    make, shape = FUNCTIONS[name]
    f = make()
    return f.to(device, torch.float64) if isinstance(f, nn.Module) else f, data(device, *shape)


# Values and first derivatives.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_exact_penalty_agrees_with_dense_jacobians(name: str, device: torch.device) -> None:
    f, x = function(name, device)
    assert_penalty(jacobian_penalty, f, x)
    assert_penalty(contractive_penalty, f, x, method="exact")
    assert_penalty(contractive_penalty, f, x)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_closed_form_of_one_layer(activation: nn.Module, device: torch.device) -> None:
    encoder = nn.Sequential(nn.Linear(4, 6), activation).to(device, torch.float64)
    assert_penalty(contractive_penalty, encoder, data(device, 5, 4))
    for p in encoder.parameters():
        p.requires_grad_(False)
    assert_penalty(contractive_penalty, encoder, data(device, 5, 4))


@pytest.mark.parametrize(
    "encoder",
    [
        nn.Linear(6, 3),
        nn.Sequential(nn.Linear(6, 3), nn.Sigmoid(), nn.Tanh()),
        nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4, bias=False), nn.Sigmoid()),
        nn.Sequential(nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Sequential(nn.Linear(9, 2))),
        stack(6, 5, 4, 3),
        stack(6, 9, 4, 8),  # from the output, with more units than inputs
        stack(2, 7, 9, activation=nn.SiLU),
        stack(2, 5, 4, 30),  # from the input
    ],
    ids=["linear", "activations", "linears", "nested", "3", "unequal", "2 wide", "3 wide"],
)
def test_the_product_through_layers(encoder: nn.Module, device: torch.device) -> None:
    encoder = copy.deepcopy(encoder).to(device, torch.float64)
    linear = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
    assert_penalty(contractive_penalty, encoder, data(device, 5, linear.in_features))


def test_the_product_starts_from_the_cheaper_end() -> None:
    from torch_secondorder.penalties._chain import _output_first, largest

    thin = [torch.empty(5, 2), torch.empty(4, 5), torch.empty(30, 4)]
    assert not _output_first(thin) and largest(thin) == 2 * 30
    wide = [torch.empty(5, 40), torch.empty(4, 5), torch.empty(3, 4)]
    assert _output_first(wide) and largest(wide) == 3 * 5


def test_a_flatten_before_the_first_layer() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Sigmoid()).double()
    x = data("cpu", 4, 2, 3)
    assert contractive.stack_of(encoder, x) is not None
    assert_penalty(contractive_penalty, encoder, x)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("noise", [None, 0.3])
def test_a_given_code_gives_the_same_penalty(activation: Any, noise: float | None) -> None:
    encoder, x = stack(4, 6, activation=activation), data("cpu", 5, 4).requires_grad_()
    by = [x, *encoder.parameters()]

    def penalty(code: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return contractive_penalty(encoder, x, noise=noise, generator=generator, code=code)

    expected = penalty(None)
    code = encoder(x)
    found = penalty(code)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *by), gradients(expected, *by))


def test_a_code_saves_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = stack(4, 6), data("cpu", 5, 4)
    code = encoder(x)
    monkeypatch.setattr(contractive, "chain_of", None)
    contractive_penalty(encoder, x, code=code)


@pytest.mark.parametrize("method", ["exact", "projection"])
def test_given_outputs_give_the_same_penalty(method: Any) -> None:
    f, x = stack(4, 6), data("cpu", 5, 4).requires_grad_()
    made = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = jacobian_penalty(f, x, method, 2, made[0])
    found = jacobian_penalty(f, x, method, 2, made[1], outputs=f(x))
    torch.testing.assert_close(found, expected)
    by = [x, *f.parameters()]
    torch.testing.assert_close(gradients(found, *by), gradients(expected, *by))


@pytest.mark.parametrize("name", ["one layer", "layers", "from the input", "general"])
def test_the_second_order_penalty(name: str, device: torch.device) -> None:
    encoder = {
        "one layer": stack(4, 6),
        "layers": stack(4, 6, 3),
        "from the input": stack(2, 5, 30),
        "general": nn.Sequential(nn.Linear(4, 6), nn.Softmax(1)),
    }[name].to(device, torch.float64)
    x = data(device, 5, 2 if name == "from the input" else 4).requires_grad_()
    seeds = [torch.Generator(device).manual_seed(5) for _ in range(2)]
    found = contractive_penalty(encoder, x, noise=0.4, n_noise=3, generator=seeds[0])
    e = 0.4 * torch.randn(15, x.shape[1], dtype=x.dtype, device=device, generator=seeds[1])
    moved = dense(encoder, x.repeat(3, 1) + e)
    expected = norm(dense(encoder, x).repeat(3, 1, 1) - moved)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    by = [x, *encoder.parameters()]
    for a, b in zip(gradients(found, *by), gradients(expected, *by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_linear_encoder_has_no_curvature() -> None:
    assert contractive_penalty(nn.Linear(3, 2), torch.randn(4, 3), noise=1.0).item() == 0.0


# Random projections.


@pytest.mark.parametrize("name", ["mlp", "wide", "scalar", "convolution"])
def test_projections_agree_with_a_loop_of_products(name: str, device: torch.device) -> None:
    f, x = function(name, device)
    made = [torch.Generator(device).manual_seed(4) for _ in range(2)]
    found = jacobian_penalty(f, x, "projection", 3, made[0])
    jacobians = dense(f, x)
    n, count, _ = jacobians.shape
    v = torch.randn(3, n, count, dtype=x.dtype, device=device, generator=made[1])
    v = F.normalize(v, dim=2)
    expected = count * torch.einsum("pnc,ncd->pnd", v, jacobians).square().sum() / (3 * n)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise", [None, 0.5])
def test_projections_are_unbiased(noise: float | None) -> None:
    # 20,000 draws: by chance the mean is off by 4 standard errors once in 15,000 times.
    encoder = stack(6, 7, 5, activation=nn.Tanh)
    for p in encoder.parameters():
        p.requires_grad_(False)
    x = 2 * data("cpu", 1, 6)
    generator = torch.Generator().manual_seed(0)
    batch = x.repeat(20_000, 1)
    if noise is None:
        point = batch.requires_grad_()
        rows, scale = contractive.projected_rows(encoder(point), point, 1, generator)
        expected = norm(dense(encoder, x))
        draws = scale * rows.square().sum((0, 2))
    else:
        moved = x + noise * torch.randn(1, 6, dtype=x.dtype, generator=generator)
        point = torch.cat([batch, moved.repeat(20_000, 1)]).requires_grad_()
        rows, scale = contractive.projected_rows(encoder(point), point, 1, generator, 2)
        expected = norm(dense(encoder, x) - dense(encoder, moved))
        draws = scale * contractive.changes(rows.transpose(0, 1), 20_000).square().sum((1, 2))
    error = draws.std() / math.sqrt(len(draws))
    assert error < 0.02 * expected
    assert (draws.mean() - expected).abs() < 4 * error


def test_more_projections_vary_less() -> None:
    f, x = stack(6, 7, 5, activation=nn.Tanh), data("cpu", 3, 6)
    spread = [
        torch.stack([jacobian_penalty(f, x, "projection", k) for _ in range(200)]).std().item()
        for k in (1, 16)
    ]
    # A quarter; with 200 draws each, the ratio is within a third of that but once in 1,000 times.
    assert 1 / 6 < spread[1] / spread[0] < 3 / 8


def test_all_projections_take_one_pass() -> None:
    calls: list[int] = []
    f, x = stack(6, 7, 5), data("cpu", 3, 6)

    def counted(x: Tensor) -> Tensor:
        y = f(x)
        y.register_hook(lambda g: calls.append(1))
        return y

    jacobian_penalty(counted, x, "projection", 8)
    assert len(calls) == 1
    jacobian_penalty(counted, x, "exact")
    assert len(calls) == 2


# Higher derivatives.


@pytest.mark.parametrize("noise", [None, 0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: stack(3, 4),
        lambda: stack(3, 4, activation=nn.Tanh),
        lambda: stack(3, 4, activation=nn.Softplus),
        lambda: stack(3, 4, 2),
        lambda: stack(2, 3, 6),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)).double(),
    ],
    ids=["sigmoid", "tanh", "softplus", "output first", "input first", "general"],
)
def test_two_more_derivatives_of_the_contractive_penalty(make: Any, noise: float | None) -> None:
    encoder = make()
    names = [name for name, _ in encoder.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in encoder.parameters()]
    x = data("cpu", 2, encoder[0].in_features).requires_grad_()

    def value(x: Tensor, *params: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        for name, p in zip(names, params, strict=True):  # real modules, so that layers are seen
            owner, _, key = name.rpartition(".")
            module = encoder.get_submodule(owner)
            module._parameters.pop(key, None)
            setattr(module, key, p)
        return contractive_penalty(encoder, x, noise=noise, generator=generator)

    assert torch.autograd.gradcheck(value, (x, *params))
    assert torch.autograd.gradgradcheck(value, (x, *params))


@pytest.mark.parametrize("method", ["exact", "projection"])
@pytest.mark.parametrize("n_projections", [1, 2])
@pytest.mark.parametrize("widths", [(3, 4, 2), (1, 3, 4)])
def test_two_more_derivatives_of_the_jacobian_penalty(
    method: Any, n_projections: int, widths: tuple[int, ...]
) -> None:
    encoder = stack(*widths)
    names = [name for name, _ in encoder.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in encoder.parameters()]
    x = data("cpu", 2, widths[0]).requires_grad_()

    def value(x: Tensor, *params: Tensor) -> Tensor:
        named = dict(zip(names, params, strict=True))
        generator = torch.Generator().manual_seed(0)
        return jacobian_penalty(
            lambda x: functional_call(encoder, named, (x,)), x, method, n_projections, generator
        )

    assert torch.autograd.gradcheck(value, (x, *params))
    assert torch.autograd.gradgradcheck(value, (x, *params))


PENALTIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "closed form": lambda encoder, x: contractive_penalty(encoder, x),
    "second order": lambda encoder, x: contractive_penalty(
        encoder, x, noise=0.3, generator=torch.Generator(x.device).manual_seed(0)
    ),
    "exact": lambda encoder, x: jacobian_penalty(encoder, x),
    "projection": lambda encoder, x: jacobian_penalty(
        encoder, x, "projection", 2, torch.Generator(x.device).manual_seed(0)
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_newton_steps_on_a_loss_with_the_penalty(name: str, device: torch.device) -> None:
    encoder = stack(5, 3).to(device)
    decoder = nn.Linear(3, 5).to(device, torch.float64)
    model = nn.Sequential(encoder, decoder)
    params, x = list(model.parameters()), data(device, 8, 5)

    def value() -> Tensor:
        return F.mse_loss(model(x), x) + 0.5 * PENALTIES[name](encoder, x)

    def closure() -> Tensor:
        model.zero_grad()
        loss = value()
        loss.backward()
        return loss

    def of_parameters(*values: Tensor) -> Tensor:
        named = dict(zip([n for n, _ in model.named_parameters()], values, strict=True))

        def encode(x: Tensor) -> Tensor:
            weights = {n.removeprefix("0."): p for n, p in named.items() if n.startswith("0.")}
            return functional_call(encoder, weights, (x,))

        error = F.mse_loss(functional_call(model, named, (x,)), x)
        if name == "projection":  # a vectorized oracle of its own
            generator = torch.Generator(x.device).manual_seed(0)
            v = torch.randn(2, 8, 3, dtype=x.dtype, device=x.device, generator=generator)
            rows = torch.einsum("pnc,ncd->pnd", F.normalize(v, dim=2), jacobians(encode, x))
            return error + 0.5 * 3 / 16 * rows.square().sum()
        if name == "second order":
            generator = torch.Generator(x.device).manual_seed(0)
            e = torch.randn(8, 5, dtype=x.dtype, device=x.device, generator=generator)
            change = jacobians(encode, x) - jacobians(encode, x + 0.3 * e)
            return error + 0.5 * norm(change)
        return error + 0.5 * norm(jacobians(encode, x))

    def jacobians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return vmap(jacrev(lambda s: f(s.unsqueeze(0))[0]))(x)

    optimizer = NewtonCG(
        params,
        curvature="hessian",
        globalization="line_search",
        damping=1.0,
        solver=CG(200, tolerance=1e-13),
    )
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        hessian = dense_hessian(of_parameters, before)
        leaves = [p.clone().requires_grad_() for p in before]
        gradient = torch.cat([g.flatten() for g in gradients(of_parameters(*leaves), *leaves)])
        loss = optimizer.step(closure)
        eye = torch.eye(len(gradient), dtype=x.dtype, device=device)
        direction = -torch.linalg.solve(hessian + eye, gradient)
        moved = torch.cat([(p - q).flatten() for p, q in zip(params, before, strict=True)])
        expected = optimizer.info.step_length * direction
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-7, atol=1e-10)
        assert value() < loss


def test_the_hessian_of_the_penalty_agrees_with_the_dense_one(device: torch.device) -> None:
    encoder = stack(4, 3, 2).to(device)
    x, names = data(device, 6, 4), [name for name, _ in encoder.named_parameters()]
    params = {name: p.detach().clone() for name, p in encoder.named_parameters()}

    def exact(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        f = vmap(jacrev(lambda s: functional_call(encoder, named, (s.unsqueeze(0),))[0]))
        return norm(f(x))

    def penalty(named: dict[str, Tensor]) -> Tensor:
        return jacobian_penalty(lambda x: functional_call(encoder, named, (x,)), x)

    evaluation = FunctionalObjective(penalty, params).evaluate(curvature=True)
    assert_matrix(Hessian(evaluation), dense_hessian(exact, list(params.values())))


# Where the closed form would be wrong.


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _with_hook(encoder: nn.Sequential) -> nn.Sequential:
    encoder[0].register_forward_hook(lambda module, args, output: output**2)
    return encoder


def _with_pre_hook(encoder: nn.Sequential) -> nn.Sequential:
    encoder.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return encoder


def _with_own_forward(encoder: nn.Sequential) -> nn.Sequential:
    encoder[1].forward = lambda x: torch.sin(x)
    return encoder


def _with_weight_norm(encoder: nn.Sequential) -> nn.Sequential:
    parametrizations.weight_norm(encoder[0])
    return encoder


def _with_subclass(encoder: nn.Sequential) -> nn.Sequential:
    encoder[0] = Doubled(4, 3).double()
    return encoder


@pytest.mark.parametrize(
    "change", [_with_hook, _with_pre_hook, _with_own_forward, _with_weight_norm, _with_subclass]
)
def test_modified_modules_are_differentiated(change: Any) -> None:
    encoder, x = change(stack(4, 3)), data("cpu", 5, 4)
    assert contractive.stack_of(encoder, x) is None
    assert_penalty(contractive_penalty, encoder, x)


def test_a_replaced_forward_of_a_class_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Sigmoid, "forward", lambda self, x: torch.sin(x))
    assert_penalty(contractive_penalty, stack(4, 3), data("cpu", 5, 4))


def test_global_hooks_are_respected() -> None:
    encoder, x = stack(4, 3), data("cpu", 5, 4)

    def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return 3 * output if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(scaled)
    try:
        assert_penalty(contractive_penalty, encoder, x)
    finally:
        handle.remove()


def test_positions_are_not_samples() -> None:
    encoder, x = stack(4, 3), data("cpu", 5, 2, 4)  # the layer acts on each of two positions
    assert contractive.stack_of(encoder, x) is None
    assert_penalty(contractive_penalty, encoder, x)


def test_large_encoders_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    x, deep, other = (
        data("cpu", 5, 4),
        stack(4, 6, 3),
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)),
    )
    monkeypatch.setattr(contractive, "_LARGEST_JACOBIAN", 0)
    monkeypatch.setattr(contractive, "_LARGEST_CHAIN", 0)
    monkeypatch.setattr(contractive, "exact_rows", None)
    for encoder in (deep, other.double()):
        made = [torch.Generator().manual_seed(1) for _ in range(2)]
        found = contractive_penalty(encoder, x, n_projections=2, generator=made[0])
        expected = jacobian_penalty(encoder, x, "projection", 2, made[1])
        torch.testing.assert_close(found, expected)


# Transforms of torch.func.


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of PyTorch, in forward mode
@pytest.mark.parametrize("widths", [(4, 3), (4, 5, 3)])
def test_closed_forms_work_under_transforms_of_torch_func(widths: tuple[int, ...]) -> None:
    encoder, x = stack(*widths), data("cpu", 5, 4)
    params = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    keys = list(params)

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            return contractive_penalty(self.encoder, x)

    def penalty(named: dict[str, Tensor]) -> Tensor:
        inside = {f"encoder.{name}": p for name, p in named.items()}
        return functional_call(Held(), inside, (x,))

    forward_over_reverse = hessian(penalty)(params)
    expected = dense_hessian(
        lambda *values: penalty(dict(zip(keys, values, strict=True))), list(params.values())
    )
    rows = [
        torch.cat([forward_over_reverse[a][b].flatten(params[a].dim()) for b in keys], -1)
        for a in keys
    ]
    found = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_hooks_of_this_package_do_not_prevent_the_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, x = stack(4, 3), data("cpu", 5, 4)
    monkeypatch.setattr(contractive, "_by_differentiation", None)

    def closure() -> Tensor:
        encoder.zero_grad()
        loss = contractive_penalty(encoder, x)
        loss.backward()
        return loss

    optimizer = NewtonCG(encoder.parameters(), curvature="hessian")
    first = optimizer.step(closure)
    assert closure() < first


@pytest.mark.parametrize("smallest", [0, math.inf])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_squares(dim: int | None, smallest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_WORTHWHILE", smallest)
    t = data("cpu", 3, 4).requires_grad_()
    torch.testing.assert_close(squares.squared_sum(t, dim), t.square().sum(dim))
    torch.testing.assert_close(squares.logistic_slope(t), t * (1 - t))
    for f in (lambda t: squares.squared_sum(t, dim), squares.logistic_slope):
        assert torch.autograd.gradcheck(f, t)
        assert torch.autograd.gradgradcheck(f, t)


# Side effects.


def test_penalties_leave_no_gradients() -> None:
    encoder, x = stack(4, 3), data("cpu", 5, 4).requires_grad_()
    jacobian_penalty(encoder, x)
    contractive_penalty(encoder, x)
    assert x.grad is None and all(p.grad is None for p in encoder.parameters())
    fixed = x.detach()
    jacobian_penalty(encoder, fixed).backward()
    assert not fixed.requires_grad and fixed.grad is None


@pytest.mark.parametrize("penalty", [jacobian_penalty, contractive_penalty])
def test_without_gradients(penalty: Any) -> None:
    encoder, x = stack(4, 3), data("cpu", 5, 4)
    with torch.no_grad():
        value = penalty(encoder, x)
    assert not value.requires_grad
    torch.testing.assert_close(value, norm(dense(encoder, x)).detach())


def test_derivatives_are_by_the_argument_alone() -> None:
    x = data("cpu", 5, 1).requires_grad_()
    found = jacobian_penalty(lambda z: z * x, x)
    torch.testing.assert_close(found, x.square().mean())


# Bad input.


def norm_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sigmoid()).double()


BOTH = [jacobian_penalty, contractive_penalty]


@pytest.mark.parametrize("penalty", BOTH)
@pytest.mark.parametrize("track", [True, False])
def test_batchnorm_is_rejected_and_keeps_its_statistics(penalty: Any, track: bool) -> None:
    encoder, x = norm_encoder(), data("cpu", 5, 4)
    if not track:  # uses the batch in evaluation as well
        encoder[1] = nn.BatchNorm1d(3, track_running_stats=False).double()
        encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    for f in (encoder, encoder.forward):
        with pytest.raises(
            ValueError, match=r"BatchNorm1d '1' .* per-sample Jacobians are undefin"
        ):
            penalty(f, x)
    torch.testing.assert_close(dict(encoder.state_dict()), dict(before))


@pytest.mark.parametrize("penalty", BOTH)
@pytest.mark.parametrize(
    ("f", "x", "error", "message"),
    [
        (torch.sin, torch.arange(3), TypeError, "x has dtype torch.int64"),
        (
            torch.sin,
            torch.zeros(3, dtype=torch.complex64),
            TypeError,
            "x has dtype torch.complex64",
        ),
        (torch.sin, [1.0], TypeError, "x must be a tensor, got list"),
        (torch.sin, torch.tensor(1.0), ValueError, "must be a non-empty batch"),
        (torch.sin, torch.ones(0, 3), ValueError, r"a non-empty batch, .* \(0, 3\)"),
        (torch.sum, torch.ones(4, 3), ValueError, r"each of the 4 samples .* shape \(\)"),
        (lambda x: x.sum(0), torch.ones(4, 3), ValueError, r"4 samples .* shape \(3,\)"),
        (lambda x: x[:2], torch.ones(4, 3), ValueError, r"4 samples .* shape \(2, 3\)"),
        (lambda x: x[:, :0], torch.ones(4, 3), ValueError, "is empty"),
        (lambda x: (x, x), torch.ones(4, 3), TypeError, "must be a tensor, got tuple"),
        (lambda x: x.argmax(1), torch.ones(4, 3), TypeError, "real and floating-point, got torch."),
        (lambda x: x.detach(), torch.ones(4, 3), ValueError, "does not depend on x"),
        (
            lambda x: torch.ones(4, 2, requires_grad=True) * 2,
            torch.ones(4, 3),
            ValueError,
            "does not depend on x",
        ),
    ],
)
def test_bad_functions_and_samples(
    penalty: Any, f: Any, x: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        penalty(f, x)


@pytest.mark.parametrize("penalty", BOTH)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_projections": 0}, "n_projections must be an integer of at least 1, got 0"),
        ({"n_projections": 1.5}, "got 1.5"),
        ({"n_projections": True}, "got True"),
        ({"method": "fast"}, "method must be one of .*'exact', 'projection', got 'fast'"),
    ],
)
def test_bad_arguments(penalty: Any, arguments: dict[str, Any], message: str) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        penalty(never, torch.ones(2, 3), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": 0.0}, "noise must be a finite number above 0 or None, got 0.0"),
        ({"noise": math.nan}, "got nan"),
        ({"n_noise": 0}, "n_noise must be an integer of at least 1, got 0"),
        ({"code": torch.ones(5, 2)}, r"code must have shape \(5, 3\), got \(5, 2\)"),
        ({"code": torch.ones(4, 3)}, "code must have one output for each of the 5 samples"),
        ({"code": torch.ones(5, 3)}, "code has no graph"),
    ],
)
def test_bad_arguments_of_the_contractive_penalty(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contractive_penalty(stack(4, 3), torch.ones(5, 4, dtype=torch.float64), **arguments)


def test_given_outputs_without_a_graph_to_x_are_rejected() -> None:
    f, x = stack(4, 3), data("cpu", 5, 4)
    with pytest.raises(ValueError, match="x did not require a gradient when"):
        jacobian_penalty(f, x, outputs=f(x))


def test_jacobians_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, deep = data("cpu", 5, 4), stack(4, 6, 3)
    monkeypatch.setattr(memory, "total_memory", lambda device: 100.0)
    monkeypatch.setattr(memory, "_SMALL", 0)
    message = r"5 x 3 x 4 = 60 elements, .* and cpu has .* GiB: use method='projection'"
    with pytest.raises(ValueError, match=message):
        jacobian_penalty(deep, x)
    with pytest.raises(ValueError, match="use method='projection'"):
        contractive_penalty(deep, x, method="exact")
    jacobian_penalty(deep, x, "projection")


def test_total_memory_comes_from_the_system(device: torch.device) -> None:
    assert 2**28 < memory.total_memory(device) < 2**50
