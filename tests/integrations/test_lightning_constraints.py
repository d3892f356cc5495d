"""Wrappers that keep constraints, in unchanged LightningModules, as in a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.lightning_problems import (
    HOSTS,
    NOISE,
    OPTIMIZERS,
    Batches,
    identical,
    module,
    network,
    saver,
    trainer,
    weights,
)
from torch_secondorder import LBFGS, Constrained, Projected
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.constraints import NormBall, UnitNorm
from torch_secondorder.integrations.lightning import SecondOrderMonitor

# The constraints are no sum of squared residuals, and Levenberg-Marquardt says so.
UNMARKED = pytest.mark.filterwarnings("ignore:a term of the loss is in none of the residuals")
pytestmark = [*NOISE, UNMARKED]

INNER: dict[str, Callable[[Any], Any]] = {
    **OPTIMIZERS,
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


class Classifier(nn.Module):
    """A network with constraints on its weights and on its outputs for the last batch."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = network(*layers)
        self.outputs: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.outputs = self.layers(x)
        return self.outputs

    def centred(self) -> Tensor:
        return self.layers[-1].bias.sum() - 0.3

    def short(self) -> Tensor:
        return self.layers[0].weight.square().sum(1) - 0.25

    def balanced(self) -> Tensor:
        """On the batch at hand: the mean probabilities of two classes."""
        assert self.outputs is not None
        p = self.outputs.float().softmax(-1).mean(0)
        return (p[0] - p[1]).abs() - 0.05


def constrained(optimizer: Any, net: Classifier) -> Constrained:
    return Constrained(optimizer, net.centred, {"short": net.short, "balanced": net.balanced})


def projected(optimizer: Any, net: Classifier) -> Projected:
    sets: list[Any] = [(net.layers[0].weight, UnitNorm(dim=1))]
    if not isinstance(optimizer, FlatOptimizer):
        sets.append((net.layers[-1].weight, NormBall(0.5, dim=1)))
    return Projected(optimizer, sets)


#: Each wraps an optimizer of the network.
WRAPPERS: dict[str, Callable[[Any, Classifier], Any]] = {
    "Constrained": constrained,
    "Projected": projected,
}
CASES = [(wrapper, name) for wrapper in WRAPPERS for name in INNER]
CASES.remove(("Projected", "LevenbergMarquardt"))  # it takes boxes only, and none with momentum
cases = pytest.mark.parametrize(("wrapper", "name"), CASES)


def wrapped(wrapper: str, name: str, net: Classifier) -> Any:
    return WRAPPERS[wrapper](INNER[name](net.parameters()), net)


def made(host: Any, wrapper: str, name: str, *layers: nn.Module, **methods: Any) -> Any:
    """A LightningModule whose optimizer is wrapped."""

    def configure_optimizers(self: Any) -> Any:
        return wrapped(wrapper, name, self.net)

    methods = {"configure_optimizers": configure_optimizers} | methods
    model = module(host, None, **methods)
    model.net = Classifier(*layers)
    return model


def state_of(net: Classifier, optimizer: Any) -> list[Tensor]:
    """Everything that training has changed: weights, buffers and multipliers."""
    multipliers = optimizer.multipliers.values() if isinstance(optimizer, Constrained) else []
    return [*weights(net), *multipliers]


def by_hand(
    wrapper: str,
    name: str,
    *layers: nn.Module,
    epochs: int = 1,
    clip: float | None = None,
    precision: torch.dtype | None = None,
) -> list[Tensor]:
    """The same training in a loop."""
    net = Classifier(*layers)
    torch.manual_seed(1)
    optimizer = wrapped(wrapper, name, net)
    for _ in range(epochs):
        for x, y in Batches():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast(
                    "cpu", precision, enabled=precision is not None, cache_enabled=False
                ):
                    loss = F.cross_entropy(net(x).float(), y)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                return loss

            optimizer.step(closure)
    return state_of(net, optimizer)


@cases
def test_the_weights_are_those_of_a_loop_by_hand(wrapper: str, name: str, tmp_path: Path) -> None:
    host = HOSTS[0]

    def layers() -> tuple[nn.Module, ...]:
        return nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.2)

    expected = by_hand(wrapper, name, *layers(), epochs=2)
    model = made(host, wrapper, name, *layers())
    torch.manual_seed(1)
    fitted = trainer(host, tmp_path, max_epochs=2)
    fitted.fit(model, Batches())
    (optimizer,) = fitted.optimizers
    assert identical(state_of(model.net, optimizer), expected)
    assert not identical(expected, weights(Classifier(*layers())))
    assert fitted.global_step == 8  # steps, however often the closure was evaluated


@cases
@pytest.mark.parametrize("step", [4, 6], ids=["after an epoch", "within an epoch"])
def test_a_resumed_training_ends_bit_for_bit_the_same(
    wrapper: str, name: str, step: int, tmp_path: Path
) -> None:
    host = HOSTS[0]

    def configure_optimizers(self: Any) -> Any:
        optimizer = wrapped(wrapper, name, self.net)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def model() -> Any:
        layers = nn.Tanh(), nn.BatchNorm1d(6)
        return made(host, wrapper, name, *layers, configure_optimizers=configure_optimizers)

    path = tmp_path / "middle.ckpt"
    whole, resumed = model(), model()
    first = trainer(host, tmp_path, max_epochs=3, callbacks=[saver(host, step, path)])
    first.fit(whole, Batches())
    second = trainer(host, tmp_path, max_epochs=3)
    second.fit(resumed, Batches(), ckpt_path=path)
    assert second.global_step == first.global_step == 12
    (ours,), (theirs,) = second.optimizers, first.optimizers
    assert identical(state_of(resumed.net, ours), state_of(whole.net, theirs))
    (group,) = ours.param_groups
    assert group["lr"] == group["initial_lr"] * 0.5**4
    torch.load(path, weights_only=True)["optimizer_states"]


@cases
def test_bfloat16_autocast_is_that_of_a_loop_by_hand(
    wrapper: str, name: str, tmp_path: Path
) -> None:
    model = made(HOSTS[0], wrapper, name)
    fitted = trainer(HOSTS[0], tmp_path, precision="bf16-mixed")
    fitted.fit(model, Batches())
    expected = by_hand(wrapper, name, precision=torch.bfloat16)
    assert identical(state_of(model.net, fitted.optimizers[0]), expected)


@pytest.mark.parametrize("name", ["Adam", "AdaHessian", "Sophia"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clipping_is_that_of_a_loop_by_hand(wrapper: str, name: str, tmp_path: Path) -> None:
    model = made(HOSTS[0], wrapper, name)
    fitted = trainer(HOSTS[0], tmp_path, gradient_clip_val=0.01)
    fitted.fit(model, Batches())
    expected = by_hand(wrapper, name, clip=0.01)
    assert identical(state_of(model.net, fitted.optimizers[0]), expected)
    assert not identical(expected, by_hand(wrapper, name))


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG", "AdaHessian", "Adam"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_manual_optimization(host: Any, wrapper: str, name: str, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    methods = {"training_step": training_step, "automatic_optimization": False}
    model = made(host, wrapper, name, **methods)
    fitted = trainer(host, tmp_path)
    fitted.fit(model, Batches())
    expected = by_hand(wrapper, name)
    assert identical(state_of(model.net, fitted.optimizers[0]), expected)
    assert model.optimizers().info == fitted.optimizers[0].info  # through Lightning's wrapper


def test_the_constraints_of_a_module_hold_after_training(host: Any, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        inner = LBFGS(self.net.parameters(), max_iter=20, weight_decay=0.01)
        return Constrained(inner, self.net.centred, [self.net.short, self.net.balanced])

    model = made(host, "Constrained", "LBFGS", configure_optimizers=configure_optimizers).double()
    callbacks = [SecondOrderMonitor()]
    fitted = trainer(host, tmp_path, max_epochs=20, callbacks=callbacks)
    batches = Batches(1, 40, dtype=torch.float64)
    fitted.fit(model, batches)
    assert model.net.centred().abs() < 1e-6
    assert model.net.short().max() < 1e-6
    model.net(batches.x[0])
    assert model.net.balanced() < 1e-6
    assert fitted.callback_metrics["Constrained/violation"] < 1e-6


@pytest.mark.parametrize("name", ["LBFGS", "Adam", "AdaHessian"])
def test_the_monitor_logs_wrappers_and_what_they_wrap(host: Any, name: str, tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []

    def on_train_batch_end(self: Any, *_: Any) -> None:
        logged.append({key: float(v) for key, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self: Any) -> Any:
        first = Constrained(INNER[name](self.net.parameters()), self.net.centred)
        return Constrained(first, None, {"short": self.net.short}, method="penalty")

    model = made(
        host,
        "Constrained",
        name,
        on_train_batch_end=on_train_batch_end,
        configure_optimizers=configure_optimizers,
    )
    callbacks = [SecondOrderMonitor()]
    fitted = trainer(host, tmp_path, callbacks=callbacks, log_every_n_steps=1)
    fitted.fit(model, Batches())
    (outer,) = fitted.optimizers
    last = logged[-1]
    assert last["Constrained/violation"] == pytest.approx(outer.info.violation, rel=1e-6)
    inside = outer.optimizer.info
    assert last["Constrained-1/violation"] == pytest.approx(inside.violation, rel=1e-6)
    if name != "Adam":
        assert last[f"{name}/loss"] == pytest.approx(inside.inner.loss, rel=1e-6)
    assert "Constrained/inner" not in last
