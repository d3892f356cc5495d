"""Under `fully_shard`: parameters cut up over two real ranks, against one process."""

from __future__ import annotations

import datetime
import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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

from torch_secondorder import LBFGS, AdaHessian, Sophia

RANKS = 2


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
            self.group = mesh.get_group(0)
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


def lbfgs(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    for how, arguments in (
        ({}, {}),
        ({"reshard_after_forward": False}, {"weight_decay": 0.01}),
        ({}, {"line_search_fn": "hager_zhang", "history_size": 3, "damping": True}),
        ({}, {"line_search_fn": None, "lr": 0.1}),
    ):
        share = Share(rank, ranks, **(how if ranks else {}))
        optimizer = LBFGS(share.model.parameters(), max_iter=3, **arguments)
        found += [optimizer.step(share.closure).item() for _ in range(6)]
        found += [optimizer.info.grad_norm, optimizer.info.loss_after, *share.values()]
    return found


def lbfgs_in_groups(rank: int, ranks: int) -> list[Any]:
    """Relative learning rates, decay in one group alone, the last layer frozen for a while."""
    share = Share(rank, ranks)
    groups = [
        {"params": share.model[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
        {"params": [*share.model[2].parameters(), *share.model[4].parameters()]},
    ]
    optimizer = LBFGS(groups, max_iter=2)
    found: list[Any] = []
    for step in range(9):
        share.model[4].requires_grad_(step // 3 != 1)
        found += [optimizer.step(share.closure).item(), *share.values()]
    return found


def look_after_backward(rank: int, ranks: int) -> list[Any]:
    """The closure ends with a forward pass without a backward one, which leaves gathered copies."""
    share = Share(rank, ranks)
    optimizer = LBFGS(share.model.parameters(), max_iter=4)
    seen: list[Any] = []

    def closure() -> Tensor:
        loss = share.closure()
        with torch.no_grad():
            assert torch.equal(share.loss(), loss)
        return loss

    for _ in range(4):
        seen += [optimizer.step(closure).item(), *share.values()]
    return seen


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
        path = f"{FOLDER}/{kind}-{type(optimizer).__name__}-{name}"
        save(kind, share, optimizer, path)
        path = path.replace(f"one{rank}", "one0")
        dist.barrier()
    return [losses, share.values()]


def reshard_lbfgs(rank: int, ranks: int) -> list[Any]:
    found = resharded(lambda p: LBFGS(p, max_iter=3, history_size=7), "plain", rank, ranks)
    return found + resharded(lambda p: LBFGS(p, max_iter=1), "by name", rank, ranks)


def diagonal(rank: int, ranks: int) -> list[Any]:
    """The same on a mesh of two ranks and on one of one, where the same differences are taken."""
    found: list[Any] = []
    for share in (Share(rank, ranks), Share(0, 1, mesh=own_mesh(ranks))):
        found.append([])
        for make in (
            lambda p: AdaHessian(p, lr=0.02, weight_decay=0.1, n_samples=2),
            lambda p: AdaHessian(p, lr=0.02, update_period=3, average_block=None),
            lambda p: Sophia(p, lr=0.05, gamma=1.0, update_period=3),
        ):
            optimizer = make(share.model.parameters())
            found[-1] += [optimizer.step(share.closure).item() for _ in range(8)]
            info = optimizer.info
            found[-1] += [info.grad_norm, info.unclipped or 0.0, info.evaluations, info.products]
            found[-1] += share.values()
    return found


def exact_diagonal(rank: int, ranks: int) -> list[Any]:
    """With one parameter differences of gradients stand for the very products of one process."""
    found: list[Any] = []
    for make in (AdaHessian, lambda p: Sophia(p, lr=0.1, gamma=1.0, update_period=2)):
        share = Share(0, 0)
        share.model = nn.Linear(4, 5, bias=False).double()
        if ranks:
            fully_shard(share.model, mesh=init_device_mesh("cpu", (ranks,)))
            share.x, share.y = (t.chunk(ranks)[rank] for t in (share.x, share.y))
        share.y = share.y.expand(-1, 5).tanh()
        share.loss = lambda share=share: F.mse_loss(share.model(share.x).tanh(), share.y)
        optimizer = make(share.model.parameters())
        found += [optimizer.step(share.closure).item() for _ in range(6)] + share.values()
    return found


FOLDER = ""
CHECKS: dict[str, Callable[[int, int], list[Any]]] = {
    check.__name__: check
    for check in (
        lbfgs,
        lbfgs_in_groups,
        look_after_backward,
        reshard_lbfgs,
        diagonal,
        exact_diagonal,
    )
}


def run_rank(rank: int, folder: str) -> None:
    """One process: what each check gives, or how it failed, goes to a file."""
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(rank, RANKS)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the ranks are out of step now
    torch.save(found, f"{folder}/rank{rank}")
    gc.collect()  # nothing of the group may outlive it, or its threads end the process
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every check gave on each rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


def results(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    """One list for each rank, and the ranks bit-identical."""
    failures = [f for found in ranks for f in found.values() if isinstance(f, str)]
    assert not failures, "\n".join(failures)
    first, second = (found[name] for found in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return first


SAME_AS_PLAIN = ("lbfgs", "lbfgs_in_groups", "look_after_backward", "reshard_lbfgs")


def test_estimates_of_two_ranks_are_those_of_one(ranks: list[dict[str, Any]]) -> None:
    two, one = results(ranks, "diagonal")
    assert two[7] < 0.9 * two[0]
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-9)


def test_differences_stand_for_products(ranks: list[dict[str, Any]]) -> None:
    ours, expected = results(ranks, "exact_diagonal"), exact_diagonal(0, 0)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAME_AS_PLAIN)
def test_two_ranks_do_what_one_process_does(ranks: list[dict[str, Any]], name: str) -> None:
    ours, expected = results(ranks, name), CHECKS[name](0, 0)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
