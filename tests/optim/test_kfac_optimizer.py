"""K-FAC as an optimizer, against its algorithm written down layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.diagonal_references import assert_moved, assert_same, values
from tests.support.kfac_reference import PlainKFAC, Problem
from torch_secondorder import KFAC, StepStatus

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "often": {"update_period": 1, "basis_period": 1},
    "every third": {"update_period": 3, "basis_period": 6},
    "eigenbases": {"ekfac": True, "update_period": 2, "basis_period": 8},
    "one-sided": {"max_size": 6, "update_period": 2},
    "one-sided eigenbases": {"max_size": 6, "ekfac": True, "update_period": 2, "basis_period": 4},
    "labels of the data": {"labels": "empirical", "update_period": 2},
    "no clipping": {"kl_clip": None, "lr": 1e-3},
    "clipping": {"kl_clip": 1e-3, "lr": 0.1},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 3.0},
    "damping": {"damping": 0.3, "factor_decay": 0.5},
    "maximize": {"maximize": True},
    "seed": {"seed": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_trajectory_is_that_of_the_plain_algorithm(options: dict[str, Any]) -> None:
    ours, plain = Problem(), Problem()
    optimizer, reference = (
        KFAC(ours.model.parameters(), **options),
        PlainKFAC(plain.model, **options),
    )
    before = values(ours.model)
    for turn in range(12):
        ours.turn = plain.turn = turn
        optimizer.step(ours.closure(optimizer))
        reference.step(plain.loss)
    assert_same(ours.model, plain.model, 1e-9)
    assert_moved(values(ours.model), before)
