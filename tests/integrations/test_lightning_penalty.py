"""`JacobianPenaltyCallback` makes training contractive, in every evaluation of every optimizer."""

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
    saver,
    trainer,
)
from torch_secondorder import LBFGS, Contractive, StepStatus
from torch_secondorder.integrations.lightning import CurvatureMonitor, JacobianPenaltyCallback
from torch_secondorder.penalties import contractive_penalty

# A penalty on a Jacobian is no sum of squared residuals, and Levenberg-Marquardt says so.
UNMARKED = pytest.mark.filterwarnings("ignore:a term of the loss is in none of the residuals")
pytestmark = [*NOISE, UNMARKED]
CONFIGURATIONS = {**OPTIMIZERS, "Adam": lambda p: torch.optim.Adam(p, lr=0.05)}
WEIGHT = 0.3


def autoencoder() -> nn.Module:
    torch.manual_seed(4)
    encoder = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid())
    return nn.ModuleDict({"encoder": encoder, "decoder": nn.Linear(4, 5)}).double()


def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
    x = batch[0]
    loss = F.mse_loss(self.net["decoder"](self.net["encoder"](x)), x)
    self.log("plain", loss)
    return loss


def made(host: Any, configure: Any, **methods: Any) -> Any:
    model = module(host, configure, **({"training_step": training_step} | methods))
    model.net = autoencoder()
    return model


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def by_hand(
    configure: Any, loss_of: Callable[[nn.Module, Tensor], Tensor], batches: Any
) -> list[Tensor]:
    net = autoencoder()
    optimizer = configure(net.parameters())
    for x, _ in batches:

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, x)
            loss.backward()
            return loss

        optimizer.step(closure)
    return weights(net)


def contractive_loss(net: Any, x: Tensor) -> Tensor:
    loss = F.mse_loss(net["decoder"](net["encoder"](x)), x)
    return loss + WEIGHT * contractive_penalty(net["encoder"], x)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_weights_are_those_of_a_loop_with_the_penalty(host: Any, name: str, tmp_path: Path) -> None:
    batches = Batches(dtype=torch.float64)
    expected = by_hand(CONFIGURATIONS[name], contractive_loss, batches)
    model = made(host, CONFIGURATIONS[name])
    callbacks = [JacobianPenaltyCallback("net.encoder", WEIGHT)]
    fitted = trainer(host, tmp_path, callbacks=callbacks)
    fitted.fit(model, batches)
    for ours, theirs in zip(weights(model.net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    assert model.training_step.__func__ is training_step  # as it was
    plain = made(host, CONFIGURATIONS[name])
    trainer(host, tmp_path).fit(plain, batches)
    assert (weights(plain.net)[0] - expected[0]).abs().max() > 1e-3


def test_line_searches_see_matching_losses_and_gradients(host: Any, tmp_path: Path) -> None:
    """A penalty in the gradient alone would not let L-BFGS converge."""
    model = made(host, lambda p: LBFGS(p, max_iter=200, weight_decay=1e-2))
    fitted = trainer(
        host, tmp_path, max_epochs=2, callbacks=[JacobianPenaltyCallback("net.encoder", WEIGHT)]
    )
    batches = Batches(1, 30, dtype=torch.float64)
    fitted.fit(model, batches)
    info = fitted.optimizers[0].info
    assert info.status is StepStatus.CONVERGED_GRADIENT
    decay = 0.5e-2 * sum(p.square().sum() for p in model.parameters())
    loss = contractive_loss(model.net, batches.x[0]) + decay
    assert info.loss_after == pytest.approx(loss.item(), rel=1e-12)


def test_the_penalty_is_logged_as_it_was_before_the_step(host: Any, tmp_path: Path) -> None:
    seen, expected = [], []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        expected.append(contractive_penalty(self.net["encoder"], batch[0]).item())

    def on_train_batch_end(self: Any, *_: Any) -> None:
        seen.append(self.trainer.callback_metrics["jacobian_penalty/net.encoder"].item())

    model = made(
        host,
        OPTIMIZERS["LBFGS"],
        on_train_batch_start=on_train_batch_start,
        on_train_batch_end=on_train_batch_end,
    )
    callbacks = [JacobianPenaltyCallback("net.encoder", WEIGHT)]
    trainer(host, tmp_path, callbacks=callbacks).fit(model, Batches(dtype=torch.float64))
    assert seen == pytest.approx(expected, rel=1e-6) and len(set(seen)) == 4


def test_accumulation_scales_the_penalty_like_the_loss(host: Any, tmp_path: Path) -> None:
    batches = Batches(dtype=torch.float64)

    def mean(net: Any, x: Tensor) -> Tensor:
        return (contractive_loss(net, x[:8]) + contractive_loss(net, x[8:])) / 2

    pairs = [(batches.x[i : i + 2].flatten(0, 1), None) for i in (0, 2)]
    expected = by_hand(CONFIGURATIONS["Adam"], mean, pairs)
    model = made(host, CONFIGURATIONS["Adam"])
    callbacks = [JacobianPenaltyCallback("net.encoder", WEIGHT)]
    trainer(host, tmp_path, callbacks=callbacks, accumulate_grad_batches=2).fit(model, batches)
    for ours, theirs in zip(weights(model.net), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["LBFGS", "AdaHessian"])
def test_noise_and_projections_are_drawn_once_a_step_and_resumed(name: str, tmp_path: Path) -> None:
    batches, path = Batches(dtype=torch.float64), tmp_path / "middle.ckpt"
    ended = []
    for callbacks, start in (([saver(HOSTS[0], 6, path)], None), ([], path)):
        penalty = JacobianPenaltyCallback(
            "net.encoder", WEIGHT, "projection", noise=0.1, n_projections=2, seed=5
        )
        model = made(HOSTS[0], OPTIMIZERS[name])
        fitted = trainer(HOSTS[0], tmp_path, callbacks=[penalty, *callbacks], max_epochs=3)
        fitted.fit(model, batches, ckpt_path=start)
        ended.append(weights(model.net))
    assert identical(*ended)


def test_line_searches_see_the_same_noise(tmp_path: Path) -> None:
    penalty = JacobianPenaltyCallback("net.encoder", WEIGHT, "projection", noise=0.1)
    model = made(HOSTS[0], lambda p: LBFGS(p, max_iter=300, weight_decay=1e-2))
    fitted = trainer(HOSTS[0], tmp_path, callbacks=[penalty])
    fitted.fit(model, Batches(1, 30, dtype=torch.float64))
    assert fitted.optimizers[0].info.status is StepStatus.CONVERGED_GRADIENT


@pytest.mark.parametrize("name", ["NewtonCG", "Adam"])
def test_the_contractive_wrapper_trains_in_lightning(host: Any, name: str, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        inner = CONFIGURATIONS[name](self.parameters())
        return Contractive(inner, self.net["encoder"], WEIGHT)

    wrapped = made(host, None, configure_optimizers=configure_optimizers)
    batches = Batches(dtype=torch.float64)
    trainer(host, tmp_path).fit(wrapped, batches)
    expected = by_hand(CONFIGURATIONS[name], contractive_loss, batches)
    for ours, theirs in zip(weights(wrapped.net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_with_autocast_and_a_dict_of_outputs_and_the_other_monitor(
    host: Any, tmp_path: Path
) -> None:
    def step(self: Any, batch: Any) -> dict[str, Any]:
        x = batch[0]
        return {"loss": F.mse_loss(self.net["decoder"](self.net["encoder"](x)).float(), x), "x": x}

    model = made(host, OPTIMIZERS["AdaHessian"], training_step=step).float()
    callbacks = [
        CurvatureMonitor(2, max_products=5),
        JacobianPenaltyCallback("net.encoder", WEIGHT, "exact"),
    ]
    fitted = trainer(host, tmp_path, callbacks=callbacks, precision="bf16-mixed")
    fitted.fit(model, Batches())
    assert fitted.callback_metrics["jacobian_penalty/net.encoder"] > 0
    assert "training_step" not in vars(model)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_skipped_stays_skipped(tmp_path: Path) -> None:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return training_step(self, batch, batch_idx) if batch_idx % 2 else None

    model = made(HOSTS[0], CONFIGURATIONS["Adam"], training_step=step)
    fitted = trainer(HOSTS[0], tmp_path, callbacks=[JacobianPenaltyCallback("net.encoder", 1.0)])
    fitted.fit(model, Batches(dtype=torch.float64))
    assert "jacobian_penalty/net.encoder" in fitted.callback_metrics


def test_modules_that_cannot_be_penalized_are_rejected(host: Any, tmp_path: Path) -> None:
    def fit(model: Any, encoder: str = "net.encoder") -> None:
        callbacks = [JacobianPenaltyCallback(encoder, WEIGHT)]
        trainer(host, tmp_path, callbacks=callbacks).fit(model, Batches(dtype=torch.float64))

    for name in ("encoder", ""):
        with pytest.raises(ValueError, match=f"no module '{name}' to penalize; .*'net.encoder'"):
            fit(made(host, OPTIMIZERS["LBFGS"]), name)
    manual = made(host, OPTIMIZERS["LBFGS"], automatic_optimization=False)
    with pytest.raises(ValueError, match=r"wrap the optimizer in torch_secondorder\.Contractive"):
        fit(manual)

    def elsewhere(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.net["decoder"].weight.sum()

    model = made(host, OPTIMIZERS["LBFGS"], training_step=elsewhere)
    with pytest.raises(RuntimeError, match=r"did not call 'net\.encoder'"):
        fit(model)
    assert "training_step" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number of at least 0, got -1.0"),
        ({"method": "jacobian"}, "method"),
        ({"noise": 0.0}, "noise"),
        ({"n_projections": 0}, "n_projections"),
    ],
)
def test_arguments_are_checked_before_any_fit(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JacobianPenaltyCallback("encoder", **({"weight": 1.0} | arguments))
