"""Reports with tensors: their table and their dict."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from torch_secondorder._foundation.report import Report


@dataclass(frozen=True, slots=True)
class Found(Report):
    value: Tensor | None
    after: float = 0.5


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.tensor(0.25), "0.25"),
        (torch.tensor(3), "3"),
        (torch.tensor([1.0, 2.5]), "[1, 2.5]"),
        (torch.tensor([3.0, 1.0, 2.0, 5.0, 0.1]), "from 0.1 to 5, shape (5,)"),
        (torch.tensor([[1.0], [2.0]]), "from 1 to 2, shape (2, 1)"),
        (torch.zeros(0), "[]"),
        (torch.zeros(3, 0), "shape (3, 0)"),
    ],
)
def test_tensors_are_shown_short(value: Tensor, shown: str) -> None:
    assert str(Found(value)) == f"Found\n  value  {shown}\n  after  0.5"


def test_a_dict_has_numbers_and_lists() -> None:
    assert Found(torch.tensor(0.25)).as_dict() == {"value": 0.25, "after": 0.5}
    assert Found(torch.tensor([1.0, 2.0])).as_dict()["value"] == [1.0, 2.0]
    assert Found(None).as_dict()["value"] is None
    assert "value" not in str(Found(None))
