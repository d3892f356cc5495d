"""A model under `fully_shard`, and checkpoints of it for other numbers of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

#: Where this process puts checkpoints.
FOLDER: list[str] = []


class Share:
    """A model, sharded over so many ranks, and a rank's part of the batch; 0 for neither.

    No dimension is divisible by two, and the last layer is the first rank's alone.
    """

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype = torch.float64, **how: Any):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
        self.model = model.append(nn.Linear(3, 1)).to(dtype)
        x, y = torch.randn(16, 4).to(dtype), torch.randn(16, 1).to(dtype)
        self.x, self.y = x.chunk(ranks or 1)[rank], y.chunk(ranks or 1)[rank]
        if ranks:
            mesh = how.pop("mesh", None) or init_device_mesh("cpu", (ranks,))
            self.mesh, self.group = mesh, mesh.get_group(0)
            for module in (self.model[0], self.model[2], self.model):
                fully_shard(module, mesh=mesh, **how)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def values(self) -> list[Tensor]:
        return [whole(p) for p in self.model.parameters()]


def own_mesh(ranks: int) -> Any:
    """For each rank a mesh of itself alone."""
    return init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("copies", "one"))["one"]


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def save(kind: str, share: Share, optimizer: Any, path: str) -> None:
    dcp.save(shown(kind, share, optimizer), checkpoint_id=path, process_group=share.group)


def load(kind: str, share: Share, optimizer: Any, path: str) -> None:
    state = shown(kind, share, optimizer)
    dcp.load(state, checkpoint_id=path, process_group=share.group)
    set_model_state_dict(share.model, state["model"])
    if kind == "plain":
        optimizer.load_state_dict(state["optimizer"])
    else:
        set_optimizer_state_dict(share.model, optimizer, state["optimizer"])


def shown(kind: str, share: Share, optimizer: Any) -> dict[str, Any]:
    own = optimizer.state_dict() if kind == "plain" else None
    own = own or get_optimizer_state_dict(share.model, optimizer)
    return {"model": get_model_state_dict(share.model), "optimizer": own}


def resharded(make: Callable[[Any], Any], kind: str, rank: int, ranks: int) -> list[Any]:
    """Two ranks, one, two again, each from the checkpoint of the one before."""
    if not ranks:
        share = Share(0, 0)
        optimizer = make(share.model.parameters())
        return [[optimizer.step(share.closure).item() for _ in range(12)], share.values()]
    alone = own_mesh(ranks)
    losses, path = [], ""
    for part, (mesh, name) in enumerate([(None, "two"), (alone, f"one{rank}"), (None, "back")]):
        share = Share(0, 1, mesh=alone) if mesh else Share(rank, ranks)
        optimizer = make(share.model.parameters())
        if part:
            load(kind, share, optimizer, path)
        losses += [optimizer.step(share.closure).item() for _ in range(4)]
        path = f"{FOLDER[-1]}/{kind}-{type(optimizer).__name__}-{name}"
        save(kind, share, optimizer, path)
        path = path.replace(f"one{rank}", "one0")
        dist.barrier()
    load(kind, share, optimizer, path)
    save(kind, share, optimizer, f"{path}-again")
    return [losses, share.values()]
