"""`CurvatureMonitor` shows the Hessian of the training loss, and leaves no trace."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
    trainer,
    weights,
)
from torch_secondorder.integrations.lightning import CurvatureMonitor
from torch_secondorder.integrations.lightning._unnoticed import unnoticed

pytestmark = NOISE
FIGURES = ["top_eigenvalue", "trace", "trace_error", "lowest", "negative"]
CONFIGURATIONS = {**OPTIMIZERS, "Adam": lambda p: torch.optim.Adam(p, lr=0.05)}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def oracle(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All eigenvalues of the Hessian of the loss."""
    params = dict(net.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in params.values()])
        named = {n: v.view_as(p) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, named, x), y)

    return torch.linalg.eigvalsh(torch.func.jacrev(torch.func.jacrev(loss))(flat))


def noisy_step(self: Any, batch: Any, batch_idx: int) -> Any:
    """Does all that a training step may do beside its loss, changing its batch included."""
    x, y = batch
    x += torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
    z = self.net(x)
    loss = F.cross_entropy(z, y)
    self.accuracy(z, y)
    self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
    self.log("mean_loss", loss, on_step=False, on_epoch=True)
    self.log_dict({"a": loss, "b": torch.rand(())})
    return {"loss": loss, "more": z}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_is_bit_for_bit_unchanged(host: Any, name: str, tmp_path: Path) -> None:
    ended, logged = [], []
    for callbacks in ([], [CurvatureMonitor(1, max_products=6, trace_products=4)]):
        layers = nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.3)
        model = module(host, CONFIGURATIONS[name], *layers, training_step=noisy_step)
        model.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        folder = tmp_path / str(len(callbacks))
        logger = host.loggers.CSVLogger(folder)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(2)
        fitted = trainer(
            host, folder, max_epochs=2, logger=logger, log_every_n_steps=1, callbacks=callbacks
        )
        fitted.fit(model, Batches())
        ended.append([*weights(model.net), torch.rand(3)])
        own = [{k: v for k, v in row.items() if "curvature" not in k} for row in rows(folder)]
        logged.append([row for row in own if any(v for k, v in row.items() if k != "step")])
        assert "log" not in vars(model) and "log_dict" not in vars(model)
    assert identical(*ended)
    assert logged[0] == logged[1] and len(logged[0]) > 8
    assert any("curvature/top_eigenvalue" in row for row in rows(folder))


@pytest.mark.parametrize("batch", ["current", "first"])
def test_logged_values_agree_with_the_hessian(host: Any, batch: str, tmp_path: Path) -> None:
    batches, expected = Batches(dtype=torch.float64), []

    def on_train_batch_start(self: Any, data: Any, batch_idx: int) -> None:
        x, y = data if batch == "current" else (batches.x[0], batches.y[0])
        expected.append(oracle(self.net, x, y))

    model = module(host, OPTIMIZERS["LBFGS"], on_train_batch_start=on_train_batch_start).double()
    monitor = CurvatureMonitor(2, batch, max_products=57, trace_products=57)
    logger = host.loggers.CSVLogger(tmp_path)
    fitted = trainer(host, tmp_path, logger=logger, log_every_n_steps=1, callbacks=[monitor])
    fitted.fit(model, batches)
    found = [row for row in rows(tmp_path) if row["curvature/trace"]]
    assert [row["step"] for row in found] == ["0", "2"]
    for row, values in zip(found, expected[::2], strict=True):
        top, total, error, lowest, negative = (float(row[f"curvature/{name}"]) for name in FIGURES)
        assert top == pytest.approx(float(values[-1]), rel=0.02)
        assert total == pytest.approx(float(values.sum()))
        assert error == 0
        assert float(values[0]) <= lowest + 1e-12 and negative == float(values[0] < -1e-9)
    assert fitted.callback_metrics["curvature/trace"] == pytest.approx(total)


def test_nothing_is_logged_within(host: Any) -> None:
    model = module(host, OPTIMIZERS["LBFGS"])
    with unnoticed(model):
        model.log("anything", 1.0)  # without a trainer this warns
        model.log_dict({"anything": 1.0})
    with pytest.raises(TypeError, match="Linear is not a LightningModule"), unnoticed(model.net[0]):
        pass


def spectra(folder: Path) -> list[int]:
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload()
    tags = events.Tags()
    assert "curvature/top_eigenvalue" in tags["scalars"]
    return [e.step for tag in tags["images"] for e in events.Images(tag) if "spectrum" in tag]


def test_the_spectrum_goes_to_tensorboard(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, products: int) -> None:
        loggers = host.loggers.TensorBoardLogger(folder), host.loggers.CSVLogger(folder)
        monitor = CurvatureMonitor(2, max_products=5, spectrum_products=products)
        model = module(host, OPTIMIZERS["Sophia"])
        trainer(host, folder, logger=loggers, callbacks=[monitor]).fit(model, Batches())

    fit(tmp_path / "drawn", 9)
    assert spectra(tmp_path / "drawn") == [0, 2]
    fit(tmp_path / "not asked for", 0)
    assert spectra(tmp_path / "not asked for") == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit(tmp_path / "without matplotlib", 9)
    assert spectra(tmp_path / "without matplotlib") == []


def test_accumulated_batches_are_logged_once(tmp_path: Path) -> None:
    host = HOSTS[0]
    logger = host.loggers.CSVLogger(tmp_path)
    monitor = CurvatureMonitor(1, max_products=5)
    model = module(host, CONFIGURATIONS["Adam"])
    fitted = trainer(host, tmp_path, logger=logger, callbacks=[monitor], accumulate_grad_batches=2)
    fitted.fit(model, Batches())
    assert [row["step"] for row in rows(tmp_path) if row["curvature/trace"]] == ["0", "1"]


def test_a_second_fit_logs_again(tmp_path: Path) -> None:
    host, monitor = HOSTS[0], CurvatureMonitor(100, max_products=5)
    for _ in range(2):
        fitted = trainer(host, tmp_path, callbacks=[monitor])
        fitted.fit(module(host, CONFIGURATIONS["Adam"]), Batches(1))
        assert "curvature/trace" in fitted.callback_metrics


def test_a_loss_that_became_infinite_does_not_end_the_training(tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.global_step == 0 else loss + torch.inf

    model = module(HOSTS[0], OPTIMIZERS["LBFGS"], training_step=training_step)
    fitted = trainer(HOSTS[0], tmp_path, callbacks=[CurvatureMonitor(1, max_products=5)])
    with pytest.warns(UserWarning, match="no curvature before step 1: the loss is inf here"):
        fitted.fit(model, Batches(2))
    assert fitted.global_step == 2


def test_modules_without_a_training_loss_are_rejected(host: Any, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        pass

    callbacks = [CurvatureMonitor()]
    manual = module(
        host, OPTIMIZERS["LBFGS"], training_step=training_step, automatic_optimization=False
    )
    with pytest.raises(ValueError, match="returns none with manual optimization"):
        trainer(host, tmp_path, callbacks=callbacks).fit(manual, Batches())
    nothing = module(host, OPTIMIZERS["LBFGS"], training_step=training_step)
    with pytest.raises(TypeError, match="training_step returned no loss"):
        trainer(host, tmp_path, callbacks=callbacks).fit(nothing, Batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"batch": "held"}, "batch must be one of 'current', 'first', got 'held'"),
        ({"max_products": 0}, "max_products must be"),
        ({"trace_products": 2}, "trace_products must be an integer of at least 3, got 2"),
        ({"spectrum_products": -1}, "spectrum_products must be"),
    ],
)
def test_arguments_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurvatureMonitor(**arguments)


def test_the_oracle_uses_the_initial_network() -> None:
    values = oracle(network(), *next(iter(Batches())))
    assert len(values) == 57 and values[0] < 0 < values[-1]
