"""`Contractive` gives what the same optimizer gives with the penalty written into the loss."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from torch_secondorder import (
    LBFGS,
    AdaHessian,
    Contractive,
    FunctionalObjective,
    NewtonCG,
    Sophia,
)
from torch_secondorder._autograd.backward_hook import patched_backward
from torch_secondorder.penalties import contractive_penalty

WEIGHT = 0.3
INNER: dict[str, Callable[..., Any]] = {
    "adam": partial(torch.optim.Adam, lr=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "torch_lbfgs": partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=4),
    "lbfgs": partial(LBFGS, max_iter=4),
    # Few iterations: conjugate gradients enlarge rounding errors with each.
    "newton": partial(NewtonCG, max_cg_iter=5),
    "newton_hessian": partial(NewtonCG, curvature="hessian"),
    "newton_differences": partial(NewtonCG, curvature_products="finite_difference"),
    "adahessian": AdaHessian,
    "sophia": partial(Sophia, lr=0.03),
    "sophia_gnb": partial(Sophia, lr=0.03, estimator="gnb"),
}


class Autoencoder(nn.Module):
    """A small autoencoder, its data, and its loss by hand."""

    def __init__(self, device: Any = "cpu", upstream: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(6, 6) if upstream else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid())
        self.decoder = nn.Linear(4, 6)
        self.to(device, torch.float64)
        self.x = torch.rand(20, 6, dtype=torch.float64, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.before(x)))

    def loss(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return F.mse_loss(self(x), x)

    def penalized(
        self, x: Tensor | None = None, weight: float = WEIGHT, **arguments: Any
    ) -> Tensor:
        x = self.x if x is None else x
        penalty = contractive_penalty(self.encoder, self.before(x), **arguments)
        return self.loss(x) + weight * penalty

    def closure(self, loss: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.zero_grad()
            value = (loss or self.loss)()
            value.backward()
            return value

        return closure


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 1e-11) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pair(name: str, **arguments: Any) -> tuple[Autoencoder, Any, Autoencoder, Any]:
    """A net with a wrapped optimizer, and one with a plain one."""
    wrapped, plain = Autoencoder(**arguments), Autoencoder(**arguments)
    make = INNER[name]
    optimizer = Contractive(make(wrapped.parameters()), wrapped.encoder, WEIGHT)
    return wrapped, optimizer, plain, make(plain.parameters())


@pytest.mark.parametrize("upstream", [False, True], ids=["of_data", "of_features"])
@pytest.mark.parametrize("name", INNER)
def test_it_is_the_penalty_in_the_loss(name: str, upstream: bool, device: torch.device) -> None:
    wrapped, optimizer, plain, expected = pair(name, device=device, upstream=upstream)
    for _ in range(4):
        loss = optimizer.step(wrapped.closure())
        reference = expected.step(plain.closure(plain.penalized))
        torch.testing.assert_close(loss, reference, rtol=1e-10, atol=0.0, check_dtype=False)
    assert_same(wrapped, plain, 1e-9 if "differences" in name else 1e-11)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "adahessian", "sophia_gnb"])
def test_a_closure_without_backward(name: str) -> None:
    wrapped, optimizer, plain, expected = pair(name)
    for _ in range(3):
        optimizer.step(wrapped.loss)
        expected.step(plain.penalized)
    assert_same(wrapped, plain)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "adahessian"])
def test_a_function(name: str) -> None:
    wrapped, optimizer, plain, expected = pair(name)

    def function(net: Autoencoder, loss: str, params: dict[str, Tensor]) -> Tensor:
        parametrized = {f"net.{key}": value for key, value in params.items()}
        return functional_call(Call(net, loss), parametrized, ())

    for _ in range(3):
        optimizer.step(
            FunctionalObjective(
                partial(function, wrapped, "loss"), dict(wrapped.named_parameters())
            )
        )
        expected.step(
            FunctionalObjective(
                partial(function, plain, "penalized"), dict(plain.named_parameters())
            )
        )
    assert_same(wrapped, plain)


class Call(nn.Module):
    """Calls a method of a net, so that `functional_call` can."""

    def __init__(self, net: nn.Module, method: str) -> None:
        super().__init__()
        self.net, self.method = net, method

    def forward(self) -> Tensor:
        return getattr(self.net, self.method)()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("name", ["adam", "sgd", "adahessian"])
def test_a_loop_without_a_closure(name: str, zero_first: bool) -> None:
    wrapped, optimizer, plain, expected = pair(name)
    graph = name == "adahessian"
    for _ in range(3):
        wrapped.loss()  # differentiated by nobody
        if zero_first:
            optimizer.zero_grad()
        loss = wrapped.loss()
        if not zero_first:
            optimizer.zero_grad()
        loss.backward(create_graph=graph)
        optimizer.step()
        expected.zero_grad()
        plain.penalized().backward(create_graph=graph)
        expected.step()
    assert_same(wrapped, plain)
    assert math.isnan(optimizer.info.loss)
    assert optimizer.info.penalty > 0


def test_micro_batches_without_a_closure_are_one_mean() -> None:
    wrapped, optimizer, plain, expected = pair("sgd")
    for _ in range(2):
        optimizer.zero_grad()
        for x in wrapped.x.split([15, 5]):
            (wrapped.loss(x) * (len(x) / 20)).backward()
        optimizer.step()
        expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain)


def test_gradients_that_are_dropped_take_their_inputs_along() -> None:
    wrapped, optimizer, plain, expected = pair("sgd")
    for x in wrapped.x.split(5):
        wrapped.loss(x + 1).backward()
        optimizer.zero_grad()  # as where a loop skips a batch
        wrapped.loss(x).backward()
        optimizer.step()
        optimizer.optimizer.zero_grad()
        expected.step(plain.closure(partial(plain.penalized, x)))
    assert_same(wrapped, plain)


def test_each_step_has_inputs_of_its_own() -> None:
    wrapped, optimizer, plain, expected = pair("sgd")
    for x in wrapped.x.split(5):
        wrapped.zero_grad()
        wrapped.loss(x).backward()
        optimizer.step()
        expected.step(plain.closure(partial(plain.penalized, x)))
    assert_same(wrapped, plain)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "adahessian"])
def test_each_backward_in_a_closure_adds_its_own(name: str) -> None:
    wrapped, optimizer, plain, expected = pair(name)
    optimizer.weight = WEIGHT / 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for x in wrapped.x.chunk(2):
            loss = wrapped.loss(x) / 2
            loss.backward()
            total = total + loss.detach()
        return total

    def whole() -> Tensor:
        parts = [plain.penalized(x) / 2 for x in plain.x.chunk(2)]
        return parts[0] + parts[1]

    for _ in range(2):
        optimizer.step(closure)
        expected.step(plain.closure(whole))
    assert_same(wrapped, plain)


def test_several_calls_before_one_backward_are_one_mean() -> None:
    wrapped, optimizer, plain, expected = pair("lbfgs")
    parts = [15, 5]

    def loss(net: Autoencoder) -> Tensor:
        return sum(net.loss(x) * (len(x) / 20) for x in net.x.split(parts))

    optimizer.step(wrapped.closure(lambda: loss(wrapped)))
    expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain)


@pytest.mark.parametrize("name", ["adam", "newton_hessian"])
def test_a_weighted_backward(name: str) -> None:
    wrapped, optimizer, plain, expected = pair(name)

    def closure() -> Tensor:
        optimizer.zero_grad()
        errors = (wrapped(wrapped.x) - wrapped.x).square().mean(1)
        errors.backward(torch.full_like(errors, 1 / 20))
        return errors.detach().mean()

    for _ in range(2):
        optimizer.step(closure)
        expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain)


def test_what_a_closure_clips_is_the_sum() -> None:
    wrapped, optimizer, plain, expected = pair("sgd")

    def clipped(net: Autoencoder, loss: Callable[[], Tensor]) -> Tensor:
        value = net.closure(loss)()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        return value

    optimizer.step(lambda: clipped(wrapped, wrapped.loss))
    expected.step(lambda: clipped(plain, plain.penalized))
    assert_same(wrapped, plain)


def test_maximize_takes_the_penalty_off() -> None:
    wrapped, plain = Autoencoder(), Autoencoder()
    optimizer = Contractive(
        torch.optim.Adam(wrapped.parameters(), maximize=True), wrapped.encoder, WEIGHT
    )
    expected = torch.optim.Adam(plain.parameters())
    for _ in range(3):
        optimizer.step(wrapped.closure(lambda: -wrapped.loss()))
        expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain)


def test_a_curvature_closure_gets_it_too() -> None:
    wrapped, optimizer, plain, expected = pair("newton_hessian")
    half = slice(0, 10)
    optimizer.step(
        wrapped.closure(),
        curvature_closure=wrapped.closure(lambda: wrapped.loss(wrapped.x[half])),
    )
    expected.step(
        plain.closure(plain.penalized),
        curvature_closure=plain.closure(lambda: plain.penalized(plain.x[half])),
    )
    assert_same(wrapped, plain)


def test_the_report() -> None:
    net = Autoencoder()
    optimizer = Contractive(LBFGS(net.parameters()), net.encoder, WEIGHT)
    assert optimizer.info is None
    loss, penalty = net.loss().item(), contractive_penalty(net.encoder, net.x).item()
    returned = optimizer.step(net.closure())
    info = optimizer.info
    assert info.loss == pytest.approx(loss, rel=1e-12)
    assert info.penalty == pytest.approx(penalty, rel=1e-12)
    assert info.weight == WEIGHT
    assert info.inner is optimizer.optimizer.info
    assert info.inner.loss == pytest.approx(loss + WEIGHT * penalty, rel=1e-12)
    assert returned.item() == info.inner.loss
    adam = Contractive(torch.optim.Adam(net.parameters()), net.encoder, WEIGHT)
    adam.step(net.closure())
    assert adam.info.inner is None


def test_it_contracts() -> None:
    """What it is for: the encoder's Jacobian gets smaller, and more so with more weight."""
    sizes = []
    for weight in (0.0, 0.03, 0.3):
        net = Autoencoder()
        optimizer = Contractive(LBFGS(net.parameters(), max_iter=50), net.encoder, weight)
        optimizer.step(net.closure())
        sizes.append(contractive_penalty(net.encoder, net.x).item())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("arguments", [{"method": "projection"}, {"noise": 0.1, "n_noise": 2}])
def test_all_evaluations_of_a_step_see_the_same_noise(arguments: dict[str, Any]) -> None:
    """Else a line search would not find the decrease that the gradient promises."""
    net = Autoencoder()
    optimizer = Contractive(
        torch.optim.LBFGS(net.parameters(), max_iter=3), net.encoder, 1.0, **arguments
    )
    losses: list[float] = []

    def closure() -> Tensor:
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.full_like(p, 0.5))
        return net.closure()()

    def observed(evaluated: Callable[[], Tensor]) -> None:
        losses.extend(evaluated().item() for _ in range(3))

    optimizer.optimizer.step = observed
    optimizer.step(closure)
    optimizer.step(closure)
    assert len(set(losses[:3])) == len(set(losses[3:])) == 1
    assert losses[0] != losses[3]
    other = Contractive(torch.optim.Adam(net.parameters()), net.encoder, 1.0, seed=9, **arguments)
    other.optimizer.step = observed
    other.step(closure)
    assert losses[6] not in losses[:6]


def test_wrapped_twice_has_both_penalties() -> None:
    wrapped, plain = Autoencoder(), Autoencoder()
    inner = Contractive(LBFGS(wrapped.parameters(), max_iter=3), wrapped.encoder, 0.1)
    optimizer = Contractive(inner, wrapped.encoder, 0.2)
    expected = LBFGS(plain.parameters(), max_iter=3)
    for _ in range(2):
        optimizer.step(wrapped.closure())
        expected.step(plain.closure(partial(plain.penalized, weight=0.1 + 0.2)))
    assert_same(wrapped, plain)
    assert optimizer.info.weight == 0.2
    adam = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    both = Contractive(Contractive(adam, wrapped.encoder, 0.1), wrapped.encoder, 0.2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    both.zero_grad()
    wrapped.loss().backward()
    both.step()
    sgd.step(plain.closure(partial(plain.penalized, weight=0.1 + 0.2)))
    assert_same(wrapped, plain)


def test_an_encoder_that_has_no_closed_form() -> None:
    def with_norm(net: Autoencoder) -> None:
        net.encoder = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Sigmoid()).double()
        for p in net.encoder.parameters():
            nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(1))

    wrapped, plain = Autoencoder(), Autoencoder()
    with_norm(wrapped)
    with_norm(plain)
    optimizer = Contractive(NewtonCG(wrapped.parameters()), wrapped.encoder, WEIGHT)
    expected = NewtonCG(plain.parameters())
    for _ in range(2):
        optimizer.step(wrapped.closure())
        expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain)


# Schedulers, checkpoints, copies.


@pytest.mark.parametrize("outer", [False, True])
def test_a_scheduler_moves_the_inner_one(outer: bool) -> None:
    net = Autoencoder()
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = Contractive(inner, net.encoder, WEIGHT)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer if outer else inner, 0.5)
    for _ in range(2):
        optimizer.step(net.closure())
        scheduler.step()
    assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", ["adam", "lbfgs", "newton", "adahessian"])
def test_a_checkpoint_goes_on_bit_for_bit(name: str) -> None:
    def make(net: Autoencoder, weight: float, seed: int) -> Contractive:
        inner = INNER[name](net.parameters())
        return Contractive(inner, net.encoder, weight, "projection", seed=seed)

    net = Autoencoder()
    optimizer = make(net, WEIGHT, 5)
    for _ in range(2):
        optimizer.step(net.closure())
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = Autoencoder()
    resumed = make(other, 1.0, 0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.weight == WEIGHT
    for _ in range(2):
        optimizer.step(net.closure())
        resumed.step(other.closure())
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_checkpoint_of_the_inner_one_alone() -> None:
    net = Autoencoder()
    inner = torch.optim.Adam(net.parameters())
    inner.step(net.closure())
    optimizer = Contractive(torch.optim.Adam(net.parameters()), net.encoder, WEIGHT)
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.weight == WEIGHT
    first = next(net.parameters())
    assert torch.equal(optimizer.state[first]["exp_avg"], inner.state[first]["exp_avg"])


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_copy_goes_its_own_way(name: str, closure: bool) -> None:
    if name == "lbfgs" and not closure:
        pytest.skip("needs a closure")
    net = Autoencoder()
    optimizer = Contractive(INNER[name](net.parameters()), net.encoder, WEIGHT)

    def step(net: Autoencoder, optimizer: Contractive) -> None:
        if closure:
            optimizer.step(net.closure())
        else:
            net.zero_grad()
            net.loss().backward()
            optimizer.step()

    step(net, optimizer)
    for twin, copied in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        assert copied.info.penalty == optimizer.info.penalty
        before = [p.clone() for p in net.parameters()]
        step(twin, copied)
        assert all(map(torch.equal, net.parameters(), before))
        reference, own = copy.deepcopy((net, optimizer))
        step(reference, own)
        assert all(map(torch.equal, reference.parameters(), twin.parameters()))


def test_a_copy_of_the_model_alone_notes_nothing() -> None:
    net = Autoencoder()
    optimizer = Contractive(torch.optim.SGD(net.parameters(), lr=0.1), net.encoder, WEIGHT)
    copied = copy.deepcopy(net)
    copied.loss().backward()
    with pytest.raises(RuntimeError, match="the encoder was not called"):
        optimizer.step()
    assert len(net.encoder._forward_hooks) == 1
    del optimizer
    assert not net.encoder._forward_hooks


def test_a_group_that_is_added() -> None:
    net = Autoencoder()
    optimizer = Contractive(torch.optim.SGD(net.encoder.parameters(), lr=0.1), net.encoder, WEIGHT)
    optimizer.add_param_group({"params": net.decoder.parameters(), "lr": 0.2})
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.1, 0.2]
    assert "SGD" in repr(optimizer) and "0.3" in repr(optimizer)
    assert optimizer.defaults["lr"] == 0.1


def test_a_gradient_scaler() -> None:
    wrapped, optimizer, plain, expected = pair("adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(wrapped.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        expected.step(plain.closure(plain.penalized))
    assert_same(wrapped, plain, 1e-9)


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_a_gradient_scaler_around_estimates_of_the_curvature(name: str) -> None:
    """The optimizer inside sees scaled products too."""
    trained = []
    for enabled in (True, False):
        net = Autoencoder()
        optimizer = Contractive(INNER[name](net.parameters()), net.encoder, WEIGHT)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(net.loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        if enabled:  # a step that is skipped
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.zero_grad()
            scaler.scale(net.loss() * math.inf).backward()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 128.0
            assert all(torch.equal(p, v) for p, v in zip(net.parameters(), before, strict=True))
            assert not hasattr(optimizer.optimizer, "found_inf")
        trained.append(net)
    assert_same(*trained, 1e-9)


# What is refused.


def test_bad_arguments() -> None:
    net = Autoencoder()
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(TypeError, match="optimizer is what trains the model, got list"):
        Contractive(list(net.parameters()), net.encoder, 1.0)
    with pytest.raises(TypeError, match=r"the encoder is the module .* got function"):
        Contractive(adam, lambda x: x, 1.0)
    with pytest.raises(ValueError, match=r"weight must be .*-1\.0"):
        Contractive(adam, net.encoder, -1.0)
    with pytest.raises(ValueError, match=r"method must be one of .*'wild'"):
        Contractive(adam, net.encoder, 1.0, "wild")
    with pytest.raises(ValueError, match="noise must be a finite number above 0"):
        Contractive(adam, net.encoder, 1.0, noise=-1.0)
    with pytest.raises(ValueError, match="n_noise must be an integer of at least 1"):
        Contractive(adam, net.encoder, 1.0, n_noise=0)
    with pytest.raises(ValueError, match="n_projections must be an integer of at least 1"):
        Contractive(adam, net.encoder, 1.0, n_projections=0)
    with pytest.raises(ValueError, match="none of the encoder's parameters is among"):
        Contractive(adam, copy.deepcopy(net.encoder), 1.0)
    optimizer = Contractive(adam, net.encoder, 1.0)
    optimizer.weight = math.nan
    with pytest.raises(ValueError, match=r"weight must be .*nan"):
        optimizer.step(net.closure())
    assert not net.encoder[0].weight.isnan().any()


@pytest.mark.parametrize("name", ["adam", "lbfgs", "newton", "adahessian"])
def test_an_encoder_that_is_not_called(name: str) -> None:
    net = Autoencoder()
    optimizer = Contractive(INNER[name](net.parameters()), net.encoder, 1.0)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="the encoder was not called"):
        optimizer.step(net.closure(lambda: net.decoder(net.x[:, :4]).square().mean()))
    assert all(map(torch.equal, net.parameters(), before))


def test_a_backward_that_cannot_be_seen() -> None:
    net = Autoencoder()
    optimizer = Contractive(torch.optim.Adam(net.parameters()), net.encoder, 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.loss()
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) instead"):
        optimizer.step(closure)


def test_a_loop_without_a_closure_over_features() -> None:
    net = Autoencoder(upstream=True)
    optimizer = Contractive(torch.optim.Adam(net.parameters()), net.encoder, 1.0)
    net.loss().backward()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"inputs depend on parameters(.|\n)*closure"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))


def test_an_encoder_of_two_tensors() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x + y)

    encoder = Pair()
    optimizer = Contractive(torch.optim.Adam(encoder.parameters()), encoder, 1.0)
    with pytest.raises(TypeError, match=r"takes one tensor; .* called with \(Tensor, Tensor\)"):
        optimizer.step(lambda: encoder(torch.ones(2, 3), torch.ones(2, 3)).sum())


def test_an_encoder_that_mixes_samples() -> None:
    net = Autoencoder()
    net.encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Sigmoid()).double()
    optimizer = Contractive(LBFGS(net.parameters()), net.encoder, 1.0)
    before = [b.clone() for b in (*net.parameters(), *net.buffers())]
    with pytest.raises(ValueError, match="statistics of the batch"):
        optimizer.step(net.closure())
    assert all(map(torch.equal, (*net.parameters(), *net.buffers()), before))


def test_handlers_and_modes_come_to_their_turn() -> None:
    """The last that was entered sees a call first, and only within its own thread."""
    seen: list[str] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.backward:
                seen.append("mode")
            return func(*args, **(kwargs or {}))

    def handler(name: str) -> Callable[..., None]:
        def handle(loss: Tensor, **_: Any) -> None:
            seen.append(name)
            loss.backward()

        return handle

    x = torch.ones((), requires_grad=True)
    original = Tensor.backward
    with patched_backward(handler("outer")), Mode(), patched_backward(handler("inner")):
        (x * 2).backward()
    assert seen == ["inner", "mode", "outer"]
    assert Tensor.backward is original
    assert x.grad == 2
