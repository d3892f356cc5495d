"""Records checkpoints of the installed version: `python record_checkpoints.py FILE`.

For each kind of optimizer there is the state of a small model and its optimizer after three steps,
and the parameters after three more. `tests/optim/checkpoints_0_1_0.pt` was recorded with version
0.1.0; later versions have to load it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import torch_secondorder as so

STEPS = 3
#: By the name of the checkpoint: the optimizer, its arguments, and the dtype of the model.
KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "lbfgs": ("LBFGS", {"max_iter": 2, "history_size": 4}, torch.float64),
    "lbfgs_bfloat16": ("LBFGS", {"max_iter": 2, "history_size": 4}, torch.bfloat16),
    "newton_kfac": ("NewtonCG", {"preconditioner": "kfac"}, torch.float64),
    "newton_auto": ("NewtonCG", {"curvature": "hessian", "max_cg_iter": 4}, torch.float64),
    "newton_differences": (
        "NewtonCG",
        {"curvature_products": "finite_difference", "max_cg_iter": 4},
        torch.float64,
    ),
    "adahessian": ("AdaHessian", {"lr": 0.05, "update_period": 2}, torch.float64),
    "sophia_bfloat16": ("Sophia", {"lr": 0.01, "update_period": 2}, torch.bfloat16),
}


class Training:
    """A training of a kind, from the beginning."""

    def __init__(self, kind: str) -> None:
        name, arguments, dtype = KINDS[kind]
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.x, self.y = torch.randn(8, 3).to(dtype), torch.randint(2, (8,))
        self.optimizer = getattr(so, name)(self.model.parameters(), **arguments)

    def steps(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x).float(), self.y)
            loss.backward()
            return loss

        for _ in range(STEPS):
            self.optimizer.step(closure)


def recorded(kind: str) -> dict[str, Any]:
    training = Training(kind)
    training.steps()
    state = copy.deepcopy(
        {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    )
    training.steps()
    return state | {"later": [p.detach().clone() for p in training.model.parameters()]}


def main() -> None:
    checkpoints = {kind: recorded(kind) for kind in KINDS}
    # In a process group the vectors of these are cut up, also over one process.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for kind, (name, _, _) in KINDS.items():
        if name in ("LBFGS", "NewtonCG"):
            checkpoints[f"{kind}_in_pieces"] = recorded(kind)
    dist.destroy_process_group()
    torch.save(checkpoints, sys.argv[1])


if __name__ == "__main__":
    main()
