"""What two ranks do under `fully_shard` with optimizers that keep matrices of whole parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from tests.support.fully_sharded import FOLDER, Share, load, own_mesh, resharded, save
from tests.support.small_optimizers import Kronecker
from torch_secondorder import KFAC, SOAP, Shampoo, StepStatus
from torch_secondorder.curvature import Hutchinson
from torch_secondorder.optim.extending import DiagonalOptimizer, Factors, declare

#: Each with numbers for which rounding stays rounding.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Kronecker": lambda params, **more: Kronecker(params, **({"lr": 0.05} | more)),
    # Blocks of uneven sizes, and a matrix with one long side.
    "Shampoo": lambda params, **more: Shampoo(
        params, **({"lr": 0.01, "update_period": 3, "block_size": 3} | more), max_precond_dim=10
    ),
    "SOAP": lambda params, **more: SOAP(
        params,
        **({"lr": 0.01, "eps": 1e-3, "update_period": 3, "block_size": 3} | more),
        max_precond_dim=10,
    ),
}


class Pictures(Share):
    """A convolution, a matrix with a long side and a short one, and an embedding."""

    def __init__(self, rank: int, ranks: int, **how: Any) -> None:
        super().__init__(0, 0)
        model = nn.Module()
        model.filters, model.dense = nn.Conv2d(1, 3, 3), nn.Linear(50, 5)
        model.words, model.last = nn.Embedding(7, 2), nn.Linear(5, 1)
        self.model = model.double()
        x, y = torch.randn(16, 1, 6, 6).double(), torch.randn(16, 1).double()
        words = torch.randint(7, (16,))
        self.x, self.y, self.words = (t.chunk(ranks or 1)[rank] for t in (x, y, words))
        if ranks:
            self.mesh = how.pop("mesh", None) or init_device_mesh("cpu", (ranks,))
            self.group = self.mesh.get_group(0)
            # One matrix is cut by columns.
            fully_shard(
                model,
                mesh=self.mesh,
                shard_placement_fn=lambda p: Shard(1) if p.shape == (5, 50) else None,
                **how,
            )
            model.forward = lambda: self._outputs()
        self.outputs = model if ranks else self._outputs

    def _outputs(self) -> Tensor:
        model = self.model
        seen = model.filters(self.x).tanh().flatten(1)
        joined = torch.cat([seen, model.words(self.words)], 1)
        return model.last(model.dense(joined).tanh())

    def loss(self) -> Tensor:
        return F.mse_loss(self.outputs(), self.y)


def matrices(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    for make in OPTIMIZERS.values():
        for kind, how, more in (
            (Pictures, {}, {"weight_decay": 0.1}),
            (Share, {"mesh": "replicated"}, {}),
            (Share, {}, {"maximize": True, "capturable": True}),
        ):
            if ranks and "mesh" in how:  # a copy on each rank, cut into one part
                names = ("copies", "parts")
                how = {"mesh": init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)}
            share = kind(rank, ranks, **(how if ranks else {}))
            optimizer = make(share.model.parameters(), **more)
            found += [optimizer.step(share.closure).item() for _ in range(8)]
            found += [optimizer.info.grad_norm, optimizer.info.iterations, *share.values()]
    return found


def matrices_in_groups(rank: int, ranks: int) -> list[Any]:
    """No closure; a frozen layer, a later group, a copy, and weights that are set from outside."""
    found: list[Any] = []
    for make in OPTIMIZERS.values():
        share = Share(rank, ranks)
        first, second, last = share.model[0], share.model[2], share.model[4]
        groups = [{"params": first.parameters(), "lr": 0.02}, {"params": second.parameters()}]
        optimizer = make(groups)
        for step in range(8):
            second.requires_grad_(step // 2 != 1)
            if step == 3:
                optimizer.add_param_group({"params": last.parameters(), "weight_decay": 0.1})
            if step == 5:
                optimizer = _on_same(optimizer)
            if step == 6:  # as by an average of weights
                with torch.no_grad():
                    for p in share.model.parameters():
                        p.mul_(0.9)
            share.closure()
            optimizer.step()
            found += share.values()
    return found


def _on_same(optimizer: Any) -> Any:
    """A copy that goes on with the same parameters."""
    params = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return copy.deepcopy(optimizer, params)


def reshard_matrices(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    kinds = ("plain", "by name", "plain")
    for make, kind in zip(OPTIMIZERS.values(), kinds, strict=True):
        found += resharded(make, kind, rank, ranks)
    return found


def resume_matrices(rank: int, ranks: int) -> list[Any]:
    """From a checkpoint of before any step, and from one of a state that was just loaded."""
    found: list[Any] = []
    make = OPTIMIZERS["SOAP"]
    share = Share(rank, ranks)
    optimizer = make(share.model.parameters())
    for number, steps in enumerate((0, 3, 0, 2)):
        for _ in range(steps):
            optimizer.step(share.closure)
        if ranks:
            path = f"{FOLDER[-1]}/resumed-{number}"
            save("plain", share, optimizer, path)
            share = Share(rank, ranks)
            optimizer = make(share.model.parameters())
            load("plain", share, optimizer, path)
        found.append(share.values())
    return found


def measure_matrices(rank: int, ranks: int) -> list[Any]:
    """The ranks' parts of the state, and the entries of each message in a step.

    They are those of a step after a checkpoint, of which all ranks have had all factors. Then the
    report of a step in which the only matrix is one rank's.
    """
    found: list[Any] = []
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(output: Tensor, message: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(message.numel())
        return real(output, message, *args, **kwargs)

    for make in OPTIMIZERS.values():
        share = Share(rank, ranks)
        share.model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6))).double()
        fully_shard(share.model, mesh=share.mesh)
        share.loss = lambda share=share: share.model(share.x).square().mean()
        optimizer = make(share.model.parameters())
        optimizer.step(share.closure)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step(share.closure)
        dist.all_to_all_single = counted
        try:
            optimizer.step(share.closure)
        finally:
            dist.all_to_all_single = real
        held = [v for s in optimizer.state.values() for v in s.values() if v is not None]
        here = sum(v.numel() for v in held if v.dim())
        saved = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        total = sum(v.numel() for v in saved if isinstance(v, Tensor) and v.dim() > 1)
        found.append([here / total, list(sent), sum(p.numel() for p in share.model.parameters())])
        sent.clear()
        single = nn.Linear(4, 4, bias=False).double()
        share.model = fully_shard(single, mesh=share.mesh)
        optimizer = make(single.parameters())
        optimizer.step(share.closure)
        info = optimizer.info
        found[-1] += [info.iterations, info.status is StepStatus.MOVED]
    return found


def meet_nan_with_matrices(rank: int, ranks: int) -> list[Any]:
    """The last rank's loss is not finite in the third step of five."""
    found: list[Any] = []
    for make in OPTIMIZERS.values():
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        for step in range(1, 6):
            scale = math.nan if step == 3 and rank == max(ranks - 1, 0) else 1.0
            share.scale = scale

            def closure(share: Any = share) -> Tensor:
                share.model.zero_grad()
                loss = share.loss() * share.scale
                loss.backward()
                return loss

            optimizer.step(closure)
            found += [list(StepStatus).index(optimizer.info.status), share.values()]
    return found


class Estimating(DiagonalOptimizer):
    """Matrices beside a diagonal, which `fully_shard` does not go with."""

    _state_fields = declare(factor=Factors())

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr}, Hutchinson())

    def _update(self, block: Any, inputs: Any) -> None:
        raise NotImplementedError


def refusals(share: Share) -> list[Callable[[], Any]]:
    """Calls that raise; see `REFUSALS`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("rows", "columns"))
    cuts = [Shard(0), Shard(1)]
    twice = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, cuts, src_data_rank=None))
    elsewhere = list(Share(0, 1, mesh=own_mesh(dist.get_world_size())).model.parameters())
    saved = Kronecker(elsewhere).state_dict()

    def cut_twice() -> None:
        twice.grad = torch.ones_like(twice)
        Kronecker([twice]).step()

    return [
        lambda: Estimating(share.model.parameters()),
        lambda: KFAC(share.model.parameters()),
        cut_twice,
        lambda: Kronecker(share.model.parameters()).load_state_dict(saved),
    ]


REFUSALS = (
    "ValueError: Estimating estimates the curvature and keeps matrices for the dimensions",
    "ValueError: KFAC takes the inputs of layers from the graph of whole parameters",
    "ValueError: a parameter of shape (4, 4) is placed as (Shard(dim=0), Shard(dim=1)), cut up",
    "ValueError: exp_avg of parameter 0 has shape (5, 4) in this process",
)
