"""`SecondOrderMonitor` logs reports, and rejects incompatible settings."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
from torch_secondorder import (
    LBFGS,
    SOAP,
    AdaHessian,
    SecondOrderOptimizer,
    Sophia,
    StepInfo,
    StepStatus,
)
from torch_secondorder.integrations.lightning import SecondOrderMonitor
from torch_secondorder.integrations.lightning._checks import check_settings
from torch_secondorder.integrations.lightning._host import found_bases

pytestmark = NOISE

LOGGED = {
    "LBFGS": {"grad_norm", "evaluations", "step_length", "skipped_pairs"},
    "NewtonCG": {"damping", "gain_ratio", "step_length", "solver_iterations", "evaluations"},
    "LevenbergMarquardt": {"damping", "step_length", "rows", "jacobians", "evaluations"},
    "AdaHessian": {"grad_norm", "products"},
    "Sophia": {"grad_norm", "products", "unclipped"},
}
SHOWN = {
    "LBFGS": {"evals", "step_length", "skipped"},
    "NewtonCG": {"evals", "step_length", "damping", "gain", "cg"},
    "LevenbergMarquardt": {"evals", "step_length", "damping", "cg"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reports_are_logged_without_changing_the_weights(
    host: Any, name: str, tmp_path: Path
) -> None:
    seen = []

    def on_train_batch_end(self: Any, *_: Any) -> None:
        seen.append((dict(self.trainer.progress_bar_metrics), self.optimizers().info))

    model = module(host, OPTIMIZERS[name], on_train_batch_end=on_train_batch_end)
    fitted = trainer(
        host,
        tmp_path,
        logger=host.loggers.CSVLogger(tmp_path),
        log_every_n_steps=1,
        callbacks=[SecondOrderMonitor()],
    )
    fitted.fit(model, Batches())
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {f"{name}/{field}" for field in LOGGED[name]} <= set(rows[0])
    assert len(rows) == 4
    infos = [info for _, info in seen]
    for row, info in zip(rows, infos, strict=True):
        for field in LOGGED[name]:
            value = getattr(info, field)
            assert row[f"{name}/{field}"] == (
                "" if value is None else str(torch.tensor(value * 1.0).item())
            )
    assert set(fitted.progress_bar_metrics) - {"v_num"} == SHOWN.get(name, set())
    plain = module(host, OPTIMIZERS[name])
    trainer(host, tmp_path).fit(plain, Batches())
    assert identical(weights(model.net), weights(plain.net))


def test_lazy_reports_are_made_at_logging_steps_only(tmp_path: Path) -> None:
    model = module(HOSTS[0], OPTIMIZERS["AdaHessian"])
    fitted = trainer(
        HOSTS[0],
        tmp_path,
        logger=HOSTS[0].loggers.CSVLogger(tmp_path),
        log_every_n_steps=3,
        callbacks=[SecondOrderMonitor(progress_bar=False)],
    )
    fitted.fit(model, Batches(7))
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "5"]
    assert all(row["AdaHessian/grad_norm"] for row in rows)
    assert not fitted.progress_bar_metrics.keys() - {"v_num"}


def test_logged_values_can_stop_the_training(host: Any, tmp_path: Path) -> None:
    stop = host.callbacks.EarlyStopping(
        "LBFGS/grad_norm", stopping_threshold=1e-3, check_on_train_epoch_end=True, patience=99
    )
    model = module(host, lambda p: LBFGS(p, weight_decay=0.1))
    fitted = trainer(host, tmp_path, max_epochs=50, callbacks=[SecondOrderMonitor(), stop])
    fitted.fit(model, Batches(1))
    assert fitted.current_epoch < 10
    assert fitted.optimizers[0].info.grad_norm < 1e-3


@dataclass(frozen=True, slots=True)
class OwnInfo(StepInfo):
    temperature: float = 0.0
    note: str = ""


class Own(SecondOrderOptimizer):
    """An optimizer of another package, with a report of its own."""

    def _export_state(self) -> dict[str, Any]:
        return {}

    def _import_state(self, state: dict[str, Any]) -> None:
        pass

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.info = OwnInfo(StepStatus.MOVED, loss.item(), None, 0.5, temperature=2, note="warm")
        return loss


def test_the_numbers_of_any_report_are_logged(host: Any, tmp_path: Path) -> None:
    model = module(host, lambda params: Own(params, {"lr": 1.0, "weight_decay": 0.0}))
    fitted = trainer(host, tmp_path, callbacks=[SecondOrderMonitor()])
    fitted.fit(model, Batches())
    names = {name for name in fitted.callback_metrics if name.startswith("Own/")}
    fields = {"loss", "grad_norm", "iterations", "evaluations", "temperature"}
    assert names == {f"Own/{field}" for field in fields}
    assert fitted.callback_metrics["Own/temperature"] == 2.0


def test_optimizers_of_other_packages_are_ignored(host: Any, tmp_path: Path) -> None:
    model = module(host, lambda p: torch.optim.Adam(p))
    fitted = trainer(host, tmp_path, accumulate_grad_batches=2, callbacks=[SecondOrderMonitor()])
    fitted.fit(model, Batches())
    assert set(fitted.callback_metrics) == {"loss"}


def test_two_optimizers_of_one_class_have_different_names(tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    def configure_optimizers(self: Any) -> Any:
        return [LBFGS(self.net[i].parameters(), max_iter=2) for i in (0, 2)]

    model = module(
        HOSTS[0],
        None,
        training_step=training_step,
        configure_optimizers=configure_optimizers,
        automatic_optimization=False,
    )
    fitted = trainer(HOSTS[0], tmp_path, callbacks=[SecondOrderMonitor()])
    fitted.fit(model, Batches())
    assert {"LBFGS/evaluations", "LBFGS-1/evaluations"} <= set(fitted.callback_metrics)


# Accumulated batches.


def accumulated(name: str, net: nn.Module, batches: Any, parts: int) -> None:
    """Training as Lightning does with `accumulate_grad_batches`, in one closure."""
    optimizer = OPTIMIZERS[name](net.parameters())
    data = list(batches)
    for start in range(0, len(data), parts):

        def closure(some: Any = tuple(data[start : start + parts])) -> Any:
            optimizer.zero_grad()
            for x, y in some[:-1]:
                (nn.functional.cross_entropy(net(x), y) / parts).backward()
            loss = nn.functional.cross_entropy(net(some[-1][0]), some[-1][1]) / parts
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", ["AdaHessian", "Sophia"])
def test_accumulated_batches_are_counted(host: Any, name: str, tmp_path: Path) -> None:
    """With equal batches, the last one's curvature times their number is that of all."""
    batches = Batches(7)
    batches.x[:], batches.y[:] = batches.x[0].clone(), batches.y[0].clone()
    net = network()
    accumulated(name, net, batches, 3)  # 3, 3, and 1 at the end of the epoch
    model = module(host, OPTIMIZERS[name])
    fitted = trainer(host, tmp_path, accumulate_grad_batches=3, callbacks=[SecondOrderMonitor()])
    fitted.fit(model, batches)
    assert fitted.global_step == 3
    for ours, theirs in zip(weights(model.net), weights(net), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert fitted.optimizers[0].param_groups[0]["accumulation_steps"] == 1  # as it was


def test_accumulated_batches_are_rejected_without_the_monitor(host: Any, tmp_path: Path) -> None:
    model = module(host, OPTIMIZERS["Sophia"])
    fitted = trainer(host, tmp_path, accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="accumulation_steps=N"):
        fitted.fit(model, Batches())


# Rejected settings and arguments.


def refusal(host: Any, tmp_path: Path, optimizer: str, model: Any = None, **arguments: Any) -> str:
    callbacks = [SecondOrderMonitor(), *arguments.pop("callbacks", [])]
    model = model or module(host, OPTIMIZERS[optimizer])
    before = weights(model.net)
    with pytest.raises(ValueError, match=f"{optimizer} cannot train with these settings") as found:
        trainer(host, tmp_path, callbacks=callbacks, **arguments).fit(model, Batches())
    assert identical(before, weights(model.net))
    return str(found.value)


@pytest.mark.parametrize("optimizer", ["LBFGS", "NewtonCG"])
def test_accumulation_and_clipping_are_rejected(host: Any, optimizer: str, tmp_path: Path) -> None:
    said = refusal(host, tmp_path, optimizer, accumulate_grad_batches=4, gradient_clip_val=0.5)
    assert (
        "accumulate_grad_batches=4: " in said
        and "SOAP, Shampoo, KFAC, AdaHessian or Sophia" in said
    )
    assert "gradient_clip_val=0.5: " in said and "remove it" in said
    schedule = host.callbacks.GradientAccumulationScheduler({3: 2})
    said = refusal(host, tmp_path, optimizer, callbacks=[schedule])
    assert "accumulate_grad_batches" in said and "clip" not in said


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_batches_fetched_inside_the_step_are_rejected(host: Any, tmp_path: Path) -> None:
    def training_step(self: Any, dataloader_iter: Any) -> Any:
        raise AssertionError

    model = module(host, OPTIMIZERS["LBFGS"], training_step=training_step)
    assert "use the signature (batch, batch_idx)" in refusal(host, tmp_path, "LBFGS", model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_scaler_is_rejected(host: Any, optimizer: str, tmp_path: Path) -> None:
    plugin = host.plugins.MixedPrecision("16-mixed", "cpu")
    said = refusal(host, tmp_path, optimizer, plugins=[plugin])
    assert "precision='16-mixed': " in said and "use precision='bf16-mixed'" in said


def test_a_gradient_scaler_scales_for_optimizers_that_take_gradients_only(
    host: Any, tmp_path: Path
) -> None:
    """The loss is finite in float16, and the scale a power of two: training is as without."""
    plugin = host.plugins.MixedPrecision("16-mixed", "cpu")
    scaled, plain = (module(host, lambda p: SOAP(p, update_period=2)) for _ in range(2))
    trainer(host, tmp_path, plugins=[plugin], callbacks=[SecondOrderMonitor()]).fit(
        scaled, Batches()
    )
    before = weights(network())
    trainer(host, tmp_path, precision="bf16-mixed").fit(plain, Batches())
    assert not identical(weights(scaled.net), before)
    for ours, theirs in zip(weights(scaled.net), weights(plain.net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_hide_the_parameters_are_rejected(host: Any, strategy: str) -> None:
    """Only the class of the strategy is checked: running it needs devices or packages."""
    kind = getattr(host.strategies, strategy)
    made = host.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    made.strategy.precision_plugin = None
    made.strategy.__class__ = type("Custom", (kind,), {})
    model = module(host, OPTIMIZERS["Sophia"])
    optimizers = {"Sophia": Sophia(model.parameters())}
    with pytest.raises(ValueError, match=f"- {strategy} .*; use strategy='ddp'"):
        check_settings(made, model, optimizers)
    optimizers = {"SOAP": SOAP(model.parameters())}
    if strategy == "ModelParallelStrategy":  # takes gradients, which fully_shard gives
        check_settings(made, model, optimizers)
    else:
        with pytest.raises(ValueError, match=f"- {strategy} .*; use strategy='ddp'"):
            check_settings(made, model, optimizers)


def test_several_optimizers_under_automatic_optimization(host: Any, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        return [AdaHessian(self.net[i].parameters()) for i in (0, 2)]

    model = module(host, None, configure_optimizers=configure_optimizers)
    with pytest.raises(RuntimeError, match="only supported with manual optimization"):
        trainer(host, tmp_path, callbacks=[SecondOrderMonitor()]).fit(model, Batches())


# Both packages.


def test_callbacks_belong_to_both_packages() -> None:
    assert all(isinstance(SecondOrderMonitor(), host.Callback) for host in HOSTS)


def test_one_lightning_package_is_enough() -> None:
    assert found_bases(("nothing_here", "pytorch_lightning")) == (HOSTS[1].Callback,)
    with pytest.raises(ImportError, match="pip install lightning"):
        found_bases(("nothing_here",))
