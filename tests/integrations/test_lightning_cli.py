"""Optimizers and callbacks are made by LightningCLI from a YAML file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import torch_secondorder
from tests.support.lightning_problems import HOSTS, NOISE, Batches, module, network

pytestmark = [*NOISE, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]

#: Each optimizer with arguments of all kinds that it has.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "LBFGS": {"lr": 0.5, "max_iter": 3, "line_search_fn": "hager_zhang", "tolerance_grad": 1e-9},
    "NewtonCG": {"curvature": "fisher", "globalization": "damping", "preconditioner": "martens"},
    "AdaHessian": {"betas": [0.8, 0.99], "average_block": 2, "update_period": 3},
    "Sophia": {"lr": 0.01, "estimator": "gnb", "gamma": 0.1},
    "SOAP": {"betas": [0.8, 0.9], "block_size": 4, "max_precond_dim": None, "update_period": 3},
    "KFAC": {"damping": 0.1, "kl_clip": None, "labels": "empirical"},
    "AdaSecant": {"lr": 0.1, "delta_clip": 2.0, "use_adagrad": True},
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls deprecated functions of jsonargparse."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def run(host: Any, tmp_path: Path, config: dict[str, Any]) -> Any:
    """`python train.py fit --config config.yaml` with a module that has no optimizer."""

    kind = type(module(host, None, train_dataloader=lambda self: Batches()))
    del kind.configure_optimizers

    class Model(kind):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

    file = tmp_path / "config.yaml"
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
    }
    trainer = quiet | config.pop("trainer", {})
    file.write_text(yaml.safe_dump({"seed_everything": False, "trainer": trainer, **config}))
    cli = importlib.import_module(f"{host.__name__}.cli").LightningCLI
    return cli(Model, args=["fit", "--config", str(file)], save_config_callback=None)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_optimizer(host: Any, name: str, tmp_path: Path) -> None:
    entry = {"class_path": f"torch_secondorder.{name}", "init_args": ARGUMENTS[name]}
    done = run(host, tmp_path, {"optimizer": entry})
    (optimizer,) = done.trainer.optimizers
    assert type(optimizer) is getattr(torch_secondorder, name)
    for key, value in ARGUMENTS[name].items():
        if key in optimizer.defaults:
            assert optimizer.defaults[key] == (tuple(value) if isinstance(value, list) else value)
    assert done.trainer.global_step == 4
    before = network()
    assert all(
        not torch.equal(a, b)
        for a, b in zip(done.model.net.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("optimizer", "argument", "strategy", "arguments"),
    [
        ("LBFGS", "line_search_fn", "globalization.Armijo", {}),
        ("NewtonCG", "preconditioner", "solvers.KFAC", {"period": 2}),
        ("NewtonCG", "solver", "solvers.MINRES", {}),
        ("NewtonCG", "globalization", "globalization.MarquardtDamping", {"initial": 0.5}),
        ("AdaHessian", "estimator", "curvature.Hutchinson", {"n_samples": 2}),
        ("Sophia", "estimator", "curvature.GaussNewtonBartlett", {}),
    ],
)
def test_strategies_as_objects(
    optimizer: str, argument: str, strategy: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    made = {"class_path": f"torch_secondorder.{strategy}", "init_args": arguments}
    entry = {"class_path": f"torch_secondorder.{optimizer}", "init_args": {argument: made}}
    (found,) = run(HOSTS[0], tmp_path, {"optimizer": entry}).trainer.optimizers
    name = "line_search" if argument == "line_search_fn" else argument
    assert type(getattr(found, name)).__name__ == strategy.rpartition(".")[2]


def test_a_scheduler(host: Any, tmp_path: Path) -> None:
    config = {
        "optimizer": {"class_path": "torch_secondorder.LBFGS", "init_args": {"max_iter": 2}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.ExponentialLR",
            "init_args": {"gamma": 0.5},
        },
    }
    (optimizer,) = run(host, tmp_path, config).trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_every_callback(host: Any, tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "torch_secondorder.integrations.lightning.SecondOrderMonitor"},
        {
            "class_path": "torch_secondorder.integrations.lightning.CurvatureMonitor",
            "init_args": {"every_n_steps": 2, "batch": "first", "max_products": 5},
        },
        {
            "class_path": "torch_secondorder.integrations.lightning.JacobianPenaltyCallback",
            "init_args": {"encoder": "net.0", "weight": 0.1, "method": "exact", "noise": 0.1},
        },
    ]
    config = {
        "trainer": {"callbacks": callbacks},
        "optimizer": {"class_path": "torch_secondorder.LBFGS", "init_args": {"max_iter": 2}},
    }
    done = run(host, tmp_path, config)
    found = done.trainer.callback_metrics
    assert {"LBFGS/evaluations", "curvature/trace", "jacobian_penalty/net.0"} <= set(found)


def test_a_wrong_argument_is_reported(
    host: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"class_path": "torch_secondorder.Sophia", "init_args": {"lr": "fast"}}
    with pytest.raises(SystemExit):
        run(host, tmp_path, {"optimizer": entry})
    assert "lr" in capsys.readouterr().err
