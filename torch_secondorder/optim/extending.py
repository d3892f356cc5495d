"""Building blocks for optimizers of your own; the page "Adding an optimizer" shows how to use them.

>>> class Steepest(FlatOptimizer):
...     def __init__(self, params, lr=1.0, **defaults):
...         super().__init__(params, {"lr": lr, "weight_decay": 0.0, "maximize": False} | defaults)
...
...     def _iterate(self, descent):
...         descent.objective.accept(-descent.point.grad, descent.lr)
...         _, point = self._evaluate(descent.objective)
...         descent.arrive(point, descent.lr, descent.lr * descent.point.grad_norm)
>>> import torch
>>> x = torch.tensor([3.0], requires_grad=True)
>>> optimizer = Steepest([x], lr=0.5, max_iter=1)
>>> def closure():
...     optimizer.zero_grad()
...     loss = (x**2).sum() / 2
...     loss.backward()
...     return loss
>>> optimizer.step(closure), x.item(), optimizer.info.loss_after
(tensor(4.5000), 1.5, 1.125)
"""

from torch_secondorder._foundation.checks import check_betas, check_integer, check_number
from torch_secondorder._optim.base import SecondOrderOptimizer
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.flat import (
    BoundedInfo,
    Candidate,
    Descent,
    DescentInfo,
    FlatOptimizer,
    Line,
    Point,
)
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder._optim.line_search import LineSearchInfo, LineSearchOptimizer
from torch_secondorder._optim.state import (
    BlockMatrices,
    Choice,
    Count,
    Factors,
    MasterCopy,
    Matrix,
    ModelField,
    Moment,
    Nested,
    Number,
    ParameterField,
    Random,
    Vector,
    declare,
    prepare,
)
from torch_secondorder._optim.wrapper import Term, WrapperOptimizer

__all__ = [
    "Block",
    "BlockMatrices",
    "BoundedInfo",
    "Candidate",
    "Choice",
    "Count",
    "Descent",
    "DescentInfo",
    "DiagonalInfo",
    "DiagonalOptimizer",
    "Factors",
    "FlatOptimizer",
    "Line",
    "LineSearchInfo",
    "LineSearchOptimizer",
    "MasterCopy",
    "Matrix",
    "ModelField",
    "Moment",
    "Nested",
    "Number",
    "ParameterField",
    "Point",
    "Random",
    "SecondOrderOptimizer",
    "StepInfo",
    "StepInputs",
    "StepStatus",
    "Term",
    "Vector",
    "WrapperOptimizer",
    "check_betas",
    "check_integer",
    "check_number",
    "declare",
    "prepare",
]
