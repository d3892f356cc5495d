"""Functions that are differentiated twice run on kernels that can be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, mha
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_secondorder import LBFGS, AdaHessian, Contractive, NewtonCG, Sophia, func
from torch_secondorder._autograd.twice_differentiable import twice_differentiable
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import Hessian
from torch_secondorder.penalties import contractive_penalty, jacobian_penalty

Tree = dict[str, Tensor]


def encoder(mode: str = "train") -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True, dtype=torch.float64)
    return layer.train(mode == "train")


def data() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def state() -> tuple[bool, ...]:
    """All switches."""
    return (
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        mha.get_fastpath_enabled(),
    )


def of_parameters(mode: str) -> tuple[Callable[[Tree], Tensor], Tree, Tree]:
    layer, x = encoder(mode), data()
    tree = {name: p.detach() for name, p in layer.named_parameters()}
    return lambda p: functional_call(layer, p, (x,)), tree, {n: p.sin() for n, p in tree.items()}


def scalar(mode: str) -> tuple[Callable[[Tree], Tensor], Tree, Tree]:
    f, tree, v = of_parameters(mode)
    return lambda p: f(p).pow(2).sum(), tree, v


def ggnvp(mode: str) -> Any:
    f, tree, v = of_parameters(mode)
    return func.ggnvp(f, lambda z: z.exp().sum(), tree, v)


def diagonal(mode: str) -> Any:
    f, tree, _ = scalar(mode)
    return func.hessian_diagonal(f, tree, chunk_size=20)


def report(mode: str) -> Any:
    f, tree, _ = scalar(mode)
    found = func.check_derivatives(f, tree, tolerance=1e-5)
    assert found, found
    return {"error": torch.tensor(found.hessian.error)}


def by_input(
    call: Callable[[nn.Module, Tensor], Tensor], mode: str, *, frozen: bool = False
) -> Any:
    layer = encoder(mode).requires_grad_(not frozen)
    return {"value": call(layer, data())}


def penalty(call: Callable[..., Tensor], mode: str) -> Any:
    layer = encoder(mode)
    call(layer, data()).backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


CALLS: dict[str, Callable[[str], Any]] = {
    "hvp": lambda mode: func.hvp(*scalar(mode)),
    "vhp": lambda mode: func.vhp(*scalar(mode)),
    "ggnvp": ggnvp,
    "hessian_diagonal": diagonal,
    "check_derivatives": report,
    "jvp": lambda mode: func.jvp(*((a,) if i else a for i, a in enumerate(of_parameters(mode))))[1],
    "vjp": lambda mode: func.vjp(*of_parameters(mode)[:2])[1](data())[0],
    "jvp, frozen": partial(by_input, lambda m, x: func.jvp(m, (x,), (x,))[1], frozen=True),
    "ggnvp, frozen": partial(
        by_input, lambda m, x: func.ggnvp(m, lambda z: z.exp().sum(), x, x), frozen=True
    ),
    "jacobian, forward": partial(by_input, partial(func.jacobian, mode="forward")),
    "jacobian, frozen": partial(by_input, partial(func.jacobian, mode="forward"), frozen=True),
    "jacobian, reverse": partial(by_input, partial(func.jacobian, mode="reverse")),
    "batch_jacobian": partial(by_input, func.batch_jacobian),
    "module_jacobian": lambda mode: func.module_jacobian(encoder(mode), data(), "parameters"),
    "jacobian_penalty": partial(penalty, jacobian_penalty),
    "contractive_penalty": partial(penalty, contractive_penalty),
    "projection": partial(
        penalty,
        lambda m, x: jacobian_penalty(
            m, x, "projection", generator=torch.Generator().manual_seed(0)
        ),
    ),
    "noise": partial(
        penalty,
        lambda m, x: contractive_penalty(
            m, x, noise=0.1, generator=torch.Generator().manual_seed(0)
        ),
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_attention_has_the_derivatives_of_the_math_backend(name: str, mode: str) -> None:
    before = state()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            expected = CALLS[name](mode)
    finally:
        mha.set_fastpath_enabled(True)
    found = CALLS[name](mode)
    found, expected = (t if isinstance(t, dict) else {"": t} for t in (found, expected))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    assert state() == before


@pytest.mark.parametrize("product", [func.hvp, func.vhp])
def test_products_compose_and_compile(product: Callable[..., Any]) -> None:
    def of(x: Tensor) -> Tensor:
        return product(lambda x: F.scaled_dot_product_attention(x, x, x).exp().sum(), x, x.cos())

    x = data().view(2, 1, 1, 3, 4)
    each = torch.stack([of(row) for row in x])
    torch.testing.assert_close(vmap(of)(x), each)
    torch.testing.assert_close(torch.compile(of, backend="aot_eager")(x[0].clone()), each[0])
    jacobian = func.jacobian(of, x[0], "reverse")  # a third derivative
    difference = (of(x[0] + 1e-5 * x[1]) - of(x[0] - 1e-5 * x[1])) / 2e-5
    torch.testing.assert_close(torch.tensordot(jacobian, x[1], 4), difference, rtol=1e-6, atol=1e-7)


def test_the_switches_of_others_are_put_back() -> None:
    q = torch.ones(1, 1, 2, 3)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        before = state()
        with twice_differentiable():
            inside = state()
            with twice_differentiable(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                assert cuda.flash_sdp_enabled()
                with twice_differentiable():
                    assert state() == inside
            assert state() == inside
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            func.hvp(lambda x: F.scaled_dot_product_attention(x, x, x).sum() / (1 // 0), q, q)
        assert state() == before


def test_threads_overlap() -> None:
    before = state()
    first, second = threading.Event(), threading.Event()
    seen: list[tuple[bool, ...]] = []

    def leaves_first() -> None:
        with twice_differentiable():
            first.set()
            second.wait(10)

    def leaves_last() -> None:
        first.wait(10)
        with twice_differentiable():
            second.set()
            threads[0].join(10)
            seen.append(state())

    threads = [threading.Thread(target=f) for f in (leaves_first, leaves_last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [(True, False, False, False, False)]
    assert state() == before


INNER: dict[str, Callable[..., Any]] = {
    "adam": torch.optim.Adam,
    "lbfgs": partial(LBFGS, max_iter=4),
    "newton": NewtonCG,
    "newton_hessian": partial(NewtonCG, curvature="hessian"),
    "newton_differences": partial(
        NewtonCG, curvature="hessian", curvature_products="finite_difference"
    ),
    "adahessian": AdaHessian,
    "sophia": Sophia,
    "sophia_gnb": partial(Sophia, estimator="gnb"),
}


@pytest.mark.parametrize(("name", "closed"), [*((name, True) for name in INNER), ("adam", False)])
def test_an_encoder_with_attention_is_made_contractive(name: str, closed: bool) -> None:
    def losses() -> list[float]:
        layer, x = encoder(), data()
        decoder = nn.Linear(4, 4, dtype=torch.float64)
        params = [*layer.parameters(), *decoder.parameters()]
        optimizer = Contractive(INNER[name](params), layer, weight=0.1)
        found = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(decoder(layer(x)), x)
            loss.backward()
            return loss

        for _ in range(3):
            if closed:
                found.append(optimizer.step(closure).item())
            else:
                found.append(closure().item())
                optimizer.step()
        return found

    with sdpa_kernel(SDPBackend.MATH):
        expected = losses()
    assert expected[-1] != expected[0]
    assert losses() == pytest.approx(expected, rel=1e-9)


def test_penalties_of_convolutions_keep_their_graph_in_closures() -> None:
    """The gradient of a penalty is the same with curvature and without."""
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    net = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    objective = ClosureObjective(lambda: contractive_penalty(net, x), net.parameters())
    plain = objective.evaluate().grad
    evaluation = objective.evaluate(curvature=True)
    torch.testing.assert_close(evaluation.grad, plain)
    v = torch.randn(len(plain), dtype=torch.float64)
    difference = (objective.trial(v, 1e-5).grad - objective.trial(v, -1e-5).grad) / 2e-5
    torch.testing.assert_close(Hessian(evaluation) @ v, difference, rtol=1e-7, atol=1e-8)
