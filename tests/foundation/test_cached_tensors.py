"""Constants that are made once."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.support.closures import standard
from torch_secondorder import SOAP, AdaHessian
from torch_secondorder._foundation.cached_tensors import cached_tensors
from torch_secondorder._optim.diagonal import blocks
from torch_secondorder._optim.diagonal.update import FiniteCheck


def test_they_are_made_once_for_the_same_arguments() -> None:
    made = []

    @cached_tensors
    def constant(value: float) -> torch.Tensor:
        made.append(value)
        return torch.tensor(value)

    assert constant(1.0) is constant(1.0) and constant(2.0) is not constant(1.0)
    assert made == [1.0, 2.0]


def test_fake_ones_are_not_kept() -> None:
    ones = cached_tensors(torch.ones)
    with FakeTensorMode():
        assert isinstance(ones(2), FakeTensor)
    real = ones(2)
    assert type(real) is torch.Tensor
    with FakeTensorMode():
        assert isinstance(ones(2), FakeTensor)
    assert ones(2) is real


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", [SOAP, AdaHessian])
def test_a_step_after_one_with_fake_tensors(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance after one that has shown how much memory a step takes."""
    of_count = lambda x: 0.0 if isinstance(x, torch.Tensor) else float(x)  # noqa: E731
    monkeypatch.setattr(blocks, "float", of_count, raising=False)
    monkeypatch.setattr(FiniteCheck, "moved", True)
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), contextlib.nullcontext()):
        with mode:
            net, x = nn.Linear(3, 2), torch.ones(4, 3)
            optimizer = kind(net.parameters(), capturable=True)
            closure = standard(optimizer, lambda net=net, x=x: net(x).square().sum())
            closure()
            optimizer.step()
    assert optimizer.info.status.name == "MOVED"
