"""Unchanged LightningModules train with every optimizer, as a loop written by hand does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lightning_problems import (
    HOSTS,
    NOISE,
    OPTIMIZERS,
    Batches,
    by_hand,
    identical,
    module,
    network,
    trainer,
    weights,
)

pytestmark = NOISE


@pytest.fixture(params=HOSTS, ids=lambda host: host.__name__)
def host(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=OPTIMIZERS)
def configure(request: pytest.FixtureRequest) -> Any:
    return OPTIMIZERS[request.param]


def test_the_weights_are_those_of_a_loop_by_hand(host: Any, configure: Any, tmp_path: Path) -> None:
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
