"""Unchanged LightningModules train with every optimizer, as a loop written by hand does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.lightning_problems import (
    ALL_OPTIMIZERS,
    HOSTS,
    NOISE,
    OPTIMIZERS,
    Batches,
    by_hand,
    identical,
    module,
    network,
    saver,
    trainer,
    weights,
)
from torch_secondorder.integrations.lightning import CurvatureMonitor, SecondOrderMonitor

pytestmark = NOISE
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=OPTIMIZERS)
def configure(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


@pytest.fixture(params=ALL_OPTIMIZERS)
def configure_any(request: pytest.FixtureRequest) -> Any:
    return ALL_OPTIMIZERS[request.param]


def test_the_weights_are_those_of_a_loop_by_hand(
    host: Any, configure_any: Any, tmp_path: Path
) -> None:
    configure = configure_any
    layers = nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.2)
    net = network(*layers)
    torch.manual_seed(1)
    expected = by_hand(configure, net, Batches(), epochs=2)
    model = module(host, configure, nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.2))
    torch.manual_seed(1)
    fitted = trainer(host, tmp_path, max_epochs=2)
    fitted.fit(model, Batches())
    assert identical(weights(model.net), expected)
    assert not identical(expected, weights(network(*layers)))
    assert fitted.global_step == 8  # steps, however often the closure was evaluated


@pytest.mark.parametrize("step", [4, 6], ids=["after an epoch", "within an epoch"])
def test_a_resumed_training_ends_bit_for_bit_the_same(
    host: Any, configure_any: Any, step: int, tmp_path: Path
) -> None:
    def configured(params: Any) -> Any:
        optimizer = configure_any(params)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    path = tmp_path / "middle.ckpt"
    whole = module(host, configured, nn.Tanh(), nn.BatchNorm1d(6))
    first = trainer(host, tmp_path, max_epochs=3, callbacks=[saver(host, step, path)])
    first.fit(whole, Batches())
    resumed = module(host, configured, nn.Tanh(), nn.BatchNorm1d(6))
    second = trainer(host, tmp_path, max_epochs=3)
    second.fit(resumed, Batches(), ckpt_path=path)
    assert second.global_step == first.global_step == 12
    assert identical(weights(resumed.net), weights(whole.net))
    assert first.optimizers[0].info.loss == second.optimizers[0].info.loss
    (group,) = second.optimizers[0].param_groups
    assert group["lr"] == group["initial_lr"] * 0.5**4
    torch.load(path, weights_only=True)["optimizer_states"]


def test_schedulers_monitors_and_several_loggers(host: Any, configure: Any, tmp_path: Path) -> None:
    def configured(params: Any) -> Any:
        optimizer = configure(params)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=9.0)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    loggers = host.loggers.CSVLogger(tmp_path), host.loggers.TensorBoardLogger(tmp_path, "board")
    callbacks = [
        host.callbacks.LearningRateMonitor("step"),
        host.callbacks.ModelCheckpoint(save_last=True, save_top_k=-1),
        host.callbacks.EarlyStopping(monitor="val_loss"),
    ]
    fitted = trainer(
        host,
        tmp_path,
        max_epochs=3,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    model = module(host, configured, validation_step=validation_step)
    fitted.fit(model, Batches(), Batches())
    (optimizer,) = fitted.optimizers
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(optimizer.defaults["lr"] * 0.001)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert f"lr-{type(optimizer).__name__}" in rows[0] and len(rows) > 12
    assert list((tmp_path / "board").rglob("events.*"))
    last = torch.load(callbacks[1].last_model_path, weights_only=True)
    assert identical(list(last["state_dict"].values()), list(model.state_dict().values()))


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_bfloat16_autocast_is_that_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    configure, net = ALL_OPTIMIZERS[name], network()
    optimizer = configure(net.parameters())
    for x, y in Batches():

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                loss = nn.functional.cross_entropy(net(x).float(), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    model = module(HOSTS[0], configure)
    trainer(HOSTS[0], tmp_path, precision="bf16-mixed").fit(model, Batches())
    assert identical(weights(model.net), weights(net))
    plain = module(HOSTS[0], configure)
    trainer(HOSTS[0], tmp_path).fit(plain, Batches())
    assert not identical(weights(plain.net), weights(net))


@pytest.mark.parametrize("name", ["AdaHessian", "Sophia", "SOAP", "KFAC"])
def test_clipping_is_that_of_a_loop_by_hand(name: str, tmp_path: Path) -> None:
    configure, net = ALL_OPTIMIZERS[name], network()
    optimizer = configure(net.parameters())
    for x, y in Batches():

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x).float(), y)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            return loss

        optimizer.step(closure)
    model = module(HOSTS[0], configure)
    trainer(HOSTS[0], tmp_path, gradient_clip_val=0.01).fit(model, Batches())
    assert identical(weights(model.net), weights(net))


def test_two_optimizers_under_manual_optimization(
    host: Any, configure: Any, tmp_path: Path
) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)

            def closure(optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self: Any) -> Any:
        return configure(self.net[0].parameters()), configure(self.net[2].parameters())

    model = module(
        host,
        configure,
        training_step=training_step,
        configure_optimizers=configure_optimizers,
        automatic_optimization=False,
    )
    fitted = trainer(host, tmp_path)
    fitted.fit(model, Batches())
    net = network()
    optimizers = configure(net[0].parameters()), configure(net[2].parameters())
    for x, y in Batches():
        for optimizer in optimizers:
            for layer in (net[0], net[2]):
                layer.requires_grad_(
                    any(p is layer.weight for p in optimizer.param_groups[0]["params"])
                )

            def closure(x: Any = x, y: Any = y, optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert identical(weights(model.net), weights(net))
    assert fitted.global_step == 8


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("name", ["AdaHessian", "Sophia", "SOAP"])
def test_manual_optimization_without_a_closure(host: Any, name: str, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss, create_graph=optimizer.curvature_due)
        optimizer.step()

    model = module(
        host, ALL_OPTIMIZERS[name], training_step=training_step, automatic_optimization=False
    )
    fitted = trainer(host, tmp_path)
    fitted.fit(model, Batches())
    assert identical(weights(model.net), by_hand(ALL_OPTIMIZERS[name], network(), Batches()))
    (optimizer,) = fitted.optimizers
    assert model.optimizers().info is optimizer.info is not None  # through Lightning's wrapper


@pytest.mark.slow
def test_two_processes_train_as_one_with_whole_batches(tmp_path: Path) -> None:
    """`strategy="ddp"`, with both monitors; see lightning_ddp_script.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.lightning_ddp_script", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 8
    for name, (ours, figures) in first.items():
        assert identical(ours, second[name][0]) and figures == second[name][1]
        kind, _, accumulated = name.partition(", ")
        model = module(HOSTS[0], ALL_OPTIMIZERS[kind]).double()
        monitors = [SecondOrderMonitor(), CurvatureMonitor(2, max_products=57, trace_products=57)]
        parts = 2 if accumulated else 1
        fitted = trainer(HOSTS[0], tmp_path, callbacks=monitors, accumulate_grad_batches=parts)
        fitted.fit(model, Batches(dtype=torch.float64))
        for a, b in zip(ours, weights(model.net), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for key, value in figures.items():
            assert fitted.callback_metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_without_lightning_the_package_is_the_same_and_says_what_is_missing() -> None:
    code = """
import sys, torch_secondorder
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
sys.modules["lightning"] = None
import torch_secondorder.integrations.lightning as ours, pytorch_lightning
from lightning_utilities.core import rank_zero
assert rank_zero.log.name.startswith("pytorch_lightning")
del sys.modules["lightning"]
ours._host.found_bases()  # whose logger it is stays, though another package came
assert "lightning.pytorch" in sys.modules and rank_zero.log.name.startswith("pytorch_lightning")
assert issubclass(ours.SecondOrderMonitor, pytorch_lightning.Callback)
package = "torch_secondorder.integrations.lightning"
for name in [name for name in sys.modules if name.startswith(package)]:
    del sys.modules[name]
for name in ("lightning.pytorch", "pytorch_lightning"):
    sys.modules[f"{name}.callbacks"] = None
try:
    import torch_secondorder.integrations.lightning
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("needs Lightning: pip install lightning")
