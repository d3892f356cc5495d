"""The ways in which DistributedDataParallel is used, with every optimizer; and torchrun."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import LBFGS, AdaHessian, FunctionalObjective, NewtonCG, Sophia, StepStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

ROOT = Path(__file__).resolve().parents[2]

newton = partial(NewtonCG, lr=0.5, max_cg_iter=4, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "LBFGS": partial(LBFGS, max_iter=2, max_eval=20, weight_decay=0.1),
    "NewtonCG": newton,
    "NewtonCG, kfac": partial(newton, preconditioner="kfac"),
    "NewtonCG, fisher": partial(newton, curvature="fisher", preconditioner="martens"),
    "NewtonCG, differences": partial(newton, curvature_products="finite_difference"),
    "AdaHessian": partial(AdaHessian, lr=0.02, eps=0.01, update_period=2),
    "Sophia": partial(Sophia, lr=0.02, gamma=5.0, update_period=2),
    "Sophia, gnb": partial(Sophia, lr=0.02, gamma=5.0, update_period=2, estimator="gnb"),
}


class Net(nn.Module):
    """Two heads; each call uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, heads: str = "both") -> Tensor:
        z = self.body(x).tanh()
        if heads == "both":
            return self.left(z) + self.right(z)
        return self.left(z) if heads == "left" else self.right(z)


MOVED = {
    "LBFGS": StepStatus.MAX_ITERATIONS,
    "NewtonCG": StepStatus.MAX_ITERATIONS,
    "AdaHessian": StepStatus.MOVED,
    "Sophia": StepStatus.MOVED,
}

#: What DistributedDataParallel is told.
MODES: dict[str, dict[str, Any]] = {
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "static, views": {"static_graph": True, "gradient_as_bucket_view": True},
    "no_sync": {},
    "different": {"find_unused_parameters": True},
    "different, views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
}


class Task:
    """A network in one of the modes, and this rank's part of a batch of four quarters."""

    def __init__(self, rank: int, ranks: int, mode: str) -> None:
        torch.manual_seed(5)
        self.plain = Net()
        self.model: Any = self.plain
        if ranks > 1:
            self.model = DistributedDataParallel(self.plain, **MODES[mode])
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        #: Heads and samples of each `backward()`.
        self.pieces: list[tuple[str, list[int]]] = [("both", [0, 1, 2, 3])]
        if mode == "no_sync":
            self.pieces = [("both", [0, 2]), ("both", [1, 3])]
        elif mode.startswith("different"):
            self.pieces = [("left", [0, 1]), ("right", [2, 3])]
        quarters = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]
        if ranks > 1:
            own = (2 * rank, 2 * rank + 1)
            self.pieces = [(heads, [i for i in held if i in own]) for heads, held in self.pieces]
            self.pieces = [piece for piece in self.pieces if piece[1]]
        self.quarters = quarters

    def closure(self) -> Tensor:
        self.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for number, (heads, held) in enumerate(self.pieces, 1):
            x, y = (torch.cat([self.quarters[i][k] for i in held]) for k in (0, 1))
            last = number == len(self.pieces)
            ready = last or not isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if ready else self.model.no_sync():
                loss = F.cross_entropy(self.model(x, heads), y) / len(self.pieces)
                loss.backward()
            total += loss.detach()
        return total

    def state(self) -> list[Tensor]:
        """Weights, and what an ordinary call of the closure leaves in `p.grad`."""
        self.closure()
        params = list(self.plain.parameters())
        return [p.detach().clone() for p in params] + [p.grad.clone() for p in params]


def use(rank: int, ranks: int) -> dict[str, list[Tensor]]:
    """Some steps, each followed by an ordinary forward and backward."""
    found = {}
    for mode in MODES:
        for name, make in OPTIMIZERS.items():
            task = Task(rank, ranks, mode)
            optimizer = make(task.model.parameters())
            states = []
            for _ in range(3):
                optimizer.step(task.closure)
                states += task.state()
            found[f"{mode}: {name}"] = states
    return found


def meet_nan(rank: int, ranks: int) -> dict[str, Any]:
    """The last rank's loss, gradient or products are not finite: at the start, or in a trial."""
    found: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        task = Task(rank, ranks, "views")
        optimizer = make(task.model.parameters())
        for place in ("nowhere", "loss", "gradient", "trial", "nowhere"):
            if place == "trial" and isinstance(optimizer, AdaHessian | Sophia):
                continue
            evaluations = 0

            def closure(task: Task = task, place: str = place) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                task.model.zero_grad()
                x, y = task.quarters[2 * rank]
                z = task.model(x)
                bad = rank == ranks - 1 and (place != "trial" or evaluations == 2)
                if bad and place == "gradient":
                    z.register_hook(lambda g: g * math.nan)
                loss = F.cross_entropy(z, y)
                loss = loss * math.nan if bad and place in ("loss", "trial") else loss
                loss.backward()
                return loss

            before = [p.detach().clone() for p in task.plain.parameters()]
            optimizer.step(closure)
            after = [p.detach().clone() for p in task.plain.parameters()]
            stayed = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            status = list(StepStatus).index(optimizer.info.status)
            found[f"{name}, {place} {len(found)}"] = [
                status,
                stayed,
                getattr(optimizer.info, "nonfinite_trials", 0),
                bool(getattr(optimizer.info, "repair", "")),
                after,
            ]
    return found


class Bent(torch.autograd.Function):
    """The identity, and its derivative's derivative is no number where that is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: bool) -> Tensor:
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        nothing = (gradient - gradient.detach()).abs().sqrt()
        return gradient + nothing if ctx.bad else gradient, None


def bend_one(rank: int, ranks: int) -> dict[str, Any]:
    """Products are not finite on the last rank in the second of three steps."""
    found: dict[str, Any] = {}
    contenders = {name: OPTIMIZERS[name] for name in ("NewtonCG", "NewtonCG, kfac")}
    contenders["NewtonCG, nystrom"] = partial(newton, preconditioner="nystrom")
    contenders["NewtonCG, hessian"] = partial(newton, curvature="hessian")
    contenders["AdaHessian"] = partial(AdaHessian, lr=0.02)
    contenders["Sophia"] = partial(Sophia, lr=0.02, update_period=1)
    for name, make in contenders.items():
        task = Task(rank, ranks, "views")
        optimizer = make(task.model.parameters())
        for step in range(3):

            def closure(task: Task = task, step: int = step) -> Tensor:
                task.model.zero_grad()
                x, y = task.quarters[2 * rank]
                z = Bent.apply(task.model(x), step == 1 and rank == ranks - 1)
                loss = F.cross_entropy(z.sin(), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            info = optimizer.info
            after = [p.detach().clone() for p in task.plain.parameters()]
            number = list(StepStatus).index(info.status)
            found[f"{name} {step}"] = [
                number,
                info.loss,
                info.loss_after,
                bool(getattr(info, "repair", "")),
                after,
            ]
    return found


def use_two_modules(rank: int, ranks: int) -> dict[str, Any]:
    """Of one group, of two groups of the same ranks, of different ranks."""
    found: dict[str, Any] = {}
    alike = dist.new_group([0, 1]) if ranks > 1 else None
    alone = [dist.new_group([i]) for i in range(ranks)] if ranks > 1 else [None]
    for name, make in OPTIMIZERS.items():
        for kind, group in {"one": None, "alike": alike, "alone": alone[rank]}.items():
            torch.manual_seed(2)
            plain = [nn.Linear(4, 5).double(), nn.Linear(5, 3).double()]
            body, head = plain
            if ranks > 1:
                body = DistributedDataParallel(plain[0])
                head = DistributedDataParallel(plain[1], process_group=group)
            x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
            x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
            params = [p for module in plain for p in module.parameters()]
            optimizer = make(params)

            def closure(body: Any = body, head: Any = head, x: Tensor = x, y: Tensor = y) -> Any:
                body.zero_grad()
                head.zero_grad()
                loss = F.cross_entropy(head(body(x).tanh()), y)
                loss.backward()
                return loss

            if kind == "alone":
                if ranks == 1:
                    continue
                before = [p.detach().clone() for p in params]
                with pytest.raises(RuntimeError, match=r"different process groups") as error:
                    optimizer.step(closure)
                assert f"of ranks [0, 1] and [{rank}]" in str(error.value)
                for p, old in zip(params, before, strict=True):
                    torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)
                continue
            for _ in range(3):
                optimizer.step(closure)
            found[f"{name}, {kind}"] = [p.detach().clone() for p in params]
    return found


def go_without_a_closure(rank: int, ranks: int) -> dict[str, list[Tensor]]:
    """The optimizer sees `backward()` itself, and averages curvature like gradients."""
    found: dict[str, list[Tensor]] = {}
    for mode in ("unused", "views", "no_sync", "different", "different, views"):
        for name in ("AdaHessian", "Sophia", "Sophia, gnb"):
            task = Task(rank, ranks, mode)
            optimizer = OPTIMIZERS[name](task.model.parameters())
            for _ in range(4):
                task.closure()
                optimizer.step()
            found[f"{mode}: {name}"] = task.state()
    return found


def go_without_watching(rank: int, ranks: int) -> bool:
    """Refused where curvature is due, for there is no graph of the average.

    With several parameters in a bucket PyTorch refuses by itself.
    """
    shown = True
    for views in (False, True):
        plain = nn.Linear(3, 2, bias=False)
        model = DistributedDataParallel(plain, gradient_as_bucket_view=views)
        optimizer = AdaHessian(model.parameters(), update_period=2, watch=False)
        before = plain.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.* with create_graph")
            model(torch.ones(2, 3)).square().sum().backward(create_graph=True)
        with pytest.raises(RuntimeError, match="DistributedDataParallel has averaged") as error:
            optimizer.step()
        assert torch.equal(plain.weight.detach(), before)
        shown &= "def closure" in str(error.value)
        plain.weight.grad = None
        # A closure where curvature is due; between, gradients as they are.
        while optimizer.curvature_due:
            optimizer.step(lambda model=model: model(torch.ones(2, 3)).square().sum())
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(plain.weight.detach(), before)
    return shown


def use_other_heads(rank: int, ranks: int) -> dict[str, Any]:
    """The ranks need random numbers of different kinds."""
    found: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        task = Task(rank, ranks, "different")
        optimizer = make(task.model.parameters())

        def closure(task: Task = task, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            ((heads, held),) = task.pieces
            x, y = (torch.cat([task.quarters[i][k] for i in held]) for k in (0, 1))
            z = task.model(x, heads)
            loss = F.cross_entropy(z, y) if rank == 0 else F.mse_loss(z, torch.ones_like(z))
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(10)]
        found[name] = [losses, [p.detach().clone() for p in task.plain.parameters()]]
    return found


class Once(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Wide(nn.Module):
    """So wide that linear layers have a preconditioner; a product of matrices is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor, operation: str) -> Tensor:
        z = self.body(x).tanh()
        if operation == "once":
            z = Once.apply(z)
        if operation == "product":
            return (z.unsqueeze(-1) * self.head.weight.T).sum(-2) + self.head.bias
        return self.head(z)


def use_other_operations(rank: int, ranks: int) -> dict[str, Any]:
    """Only one rank's graph lets the optimizer have what it takes by itself."""
    found: dict[str, Any] = {}
    for operation in ("linear", "product", "once"):
        torch.manual_seed(3)
        model = DistributedDataParallel(Wide())
        optimizer = NewtonCG(model.parameters(), lr=0.5)
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        own = operation if rank == 0 else "linear"

        def closure(model: Any = model, x: Tensor = x, y: Tensor = y, own: str = own) -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(x, own), y)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        after = [p.detach().clone() for p in model.parameters()]
        info = optimizer.info
        differs, chosen = info.curvature == "hessian by differences", bool(info.preconditioner)
        found[operation] = [losses, differs, chosen, after]
    return found


def call_a_function(rank: int, ranks: int) -> dict[str, Any]:
    """A pure function that calls the module, in place of a closure."""
    found: dict[str, Any] = {}
    for mode in ("static", "unused"):
        for name, make in OPTIMIZERS.items():
            task = Task(rank, ranks, mode)
            optimizer = make(task.model.parameters())
            ((_, held),) = task.pieces
            x, y = (torch.cat([task.quarters[i][k] for i in held]) for k in (0, 1))

            def function(
                params: dict[str, Tensor], task: Task = task, x: Tensor = x, y: Tensor = y
            ) -> Tensor:
                return F.cross_entropy(functional_call(task.model, params, x), y)

            states = []
            for _ in range(3):
                params = dict(task.model.named_parameters())
                optimizer.step(FunctionalObjective(function, params))
                states += task.state()
            found[f"{mode}: {name}"] = states
    return found


CHECKS = [
    use,
    meet_nan,
    bend_one,
    use_two_modules,
    go_without_a_closure,
    go_without_watching,
    use_other_heads,
    use_other_operations,
    call_a_function,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [use, use_two_modules, go_without_a_closure, call_a_function])
def test_the_ranks_are_one_process_with_the_whole_batch(
    ranks: list[dict[str, Any]], check: Callable[[int, int], dict[str, Any]]
) -> None:
    found = on_both(ranks, check.__name__)
    for name, expected in check(0, 1).items():
        # Differences of gradients lose a third of the digits.
        tolerance = 1e-10 if "differences" in name else 1e-12
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)


def test_all_ranks_reject_what_one_finds_not_finite(ranks: list[dict[str, Any]]) -> None:
    for name, (number, stayed, nonfinite, repaired, after) in on_both(ranks, "meet_nan").items():
        status = list(StepStatus)[number]
        if "loss" in name or "gradient" in name:
            assert (status, stayed) == (StepStatus.NONFINITE_START, True), name
        else:
            assert (status, stayed) == (MOVED[name.split(",")[0]], False), name
            # Where the second evaluation is one of a difference, all make a shorter one.
            tried = "trial" in name and "differences" not in name
            assert nonfinite == (1 if tried else 0), name
        assert not repaired, name
        assert all(torch.isfinite(p).all() for p in after), name


def test_all_ranks_meet_products_of_one_that_are_not_finite(ranks: list[dict[str, Any]]) -> None:
    """Newton-CG puts something in their place and goes downhill; others have older curvature."""
    for name, (number, loss, loss_after, repaired, after) in on_both(ranks, "bend_one").items():
        status, bad = list(StepStatus)[number], name.endswith("1")
        if name.startswith("NewtonCG"):
            assert status is StepStatus.MAX_ITERATIONS, name
            assert loss_after < loss, name
            assert repaired == bad, name
        else:
            assert (status is StepStatus.MOVED_ON_OLD_CURVATURE) == bad, name
        assert all(torch.isfinite(p).all() for p in after), name


def test_without_watching_the_error_shows_a_closure(ranks: list[dict[str, Any]]) -> None:
    assert on_both(ranks, "go_without_watching")


def test_ranks_that_draw_different_things_stay_together(ranks: list[dict[str, Any]]) -> None:
    for name, (losses, _) in on_both(ranks, "use_other_heads").items():
        assert losses[-1] < losses[0], name


def test_ranks_with_other_operations_choose_alike(ranks: list[dict[str, Any]]) -> None:
    for name, (losses, differs, chosen, _) in on_both(ranks, "use_other_operations").items():
        assert losses[-1] < losses[0], name
        assert (differs, chosen) == (name == "once", name == "linear"), name


SCRIPT = """
import gc
import sys

import torch
import torch.distributed as dist
import torch_secondorder
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def train(rank, ranks):
    found = []
    for name in ("LBFGS", "NewtonCG", "AdaHessian", "Sophia"):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 3, dtype=torch.float64)
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        model = module if ranks == 1 else DistributedDataParallel(module)
        optimizer = getattr(torch_secondorder, name)(model.parameters(), weight_decay=0.1)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for step in range(5):
            optimizer.step(closure)
        found.append([p.detach() for p in module.parameters()])
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(train(dist.get_rank(), dist.get_world_size()), sys.argv[1] + str(dist.get_rank()))
    gc.collect()
    dist.destroy_process_group()
"""


def test_a_script_started_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), str(tmp_path / "rank")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    script_itself: dict[str, Any] = {}
    exec(SCRIPT, script_itself)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, script_itself["train"](0, 1), rtol=1e-12, atol=1e-12)
