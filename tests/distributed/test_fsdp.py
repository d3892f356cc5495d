"""Under `fully_shard`: parameters cut up over two real ranks, against one process."""

from __future__ import annotations

import datetime
import gc
import math
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from tests.support import sharded_matrices
from tests.support.fully_sharded import (
    FOLDER,
    Share,
    load,
    own_mesh,
    resharded,
    save,
    whole,
)
from tests.support.ranks import RANKS, start_on_ranks
from tests.support.sharded_matrices import (
    matrices,
    matrices_in_groups,
    measure_matrices,
    meet_nan_with_matrices,
    reshard_matrices,
    resume_matrices,
)
from tests.support.small_optimizers import Averaging, Everything
from torch_secondorder import (
    LBFGS,
    AdaHessian,
    FunctionalObjective,
    NewtonCG,
    NonlinearCG,
    Sophia,
    StepStatus,
)
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.space import WHOLE, ShardedSpace, Space
from torch_secondorder.curvature import Diagonal, Hutchinson, InverseBFGS
from torch_secondorder.globalization import MarquardtDamping
from torch_secondorder.solvers import CG, MINRES, SolveStatus


def lbfgs(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    for how, arguments in (
        ({}, {}),
        ({"reshard_after_forward": False}, {"weight_decay": 0.01}),
        ({}, {"line_search_fn": "hager_zhang", "history_size": 3, "powell_damping": True}),
        ({}, {"line_search_fn": None, "lr": 0.1}),
        ({"mesh": "replicated"}, {"weight_decay": 0.01}),
        ({}, {"update": "ssbroyden", "history_size": 5}),
    ):
        if ranks and "mesh" in how:  # a copy on each rank, cut into one part
            names = ("copies", "parts")
            how["mesh"] = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)
        share = Share(rank, ranks, **(how if ranks else {}))
        optimizer = LBFGS(share.model.parameters(), max_iter=3, **arguments)
        # Without `backward()` it is the optimizer that calls it.
        closure = share.loss if "powell_damping" in arguments else share.closure
        found += [optimizer.step(closure).item() for _ in range(6)]
        found += [optimizer.info.grad_norm, optimizer.info.loss_after, *share.values()]
    return found


def nonlinear_cg(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    for arguments in (
        {},
        {"weight_decay": 0.01, "restart": None},
        {"beta": "hager_zhang", "line_search_fn": "hager_zhang"},
        {"beta": "polak_ribiere", "preconditioner": lambda v: 0.1 * v},
        {"preconditioner": lambda v: 0.1 * v},
        {"beta": "dai_yuan", "line_search_fn": None, "lr": 0.05},
    ):
        share = Share(rank, ranks)
        optimizer = NonlinearCG(share.model.parameters(), max_iter=2, **arguments)
        found += [optimizer.step(share.closure).item() for _ in range(5)]
        info = optimizer.info
        found += [info.grad_norm, info.loss_after, info.beta, info.restarts, *share.values()]
    return found


def reshard_nonlinear_cg(rank: int, ranks: int) -> list[Any]:
    found = resharded(lambda p: NonlinearCG(p, max_iter=2), "plain", rank, ranks)
    make = lambda p: NonlinearCG(p, max_iter=1, beta="hager_zhang")  # noqa: E731
    return found + resharded(make, "by name", rank, ranks)


def lbfgs_in_groups(rank: int, ranks: int) -> list[Any]:
    """Relative learning rates, decay in one group alone, the last layer frozen for a while."""
    share = Share(rank, ranks)
    groups = [
        {"params": share.model[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
        {"params": [*share.model[2].parameters(), *share.model[4].parameters()]},
    ]
    optimizer = LBFGS(groups, max_iter=2)
    found: list[Any] = []

    def closure() -> float:
        """In micro-batches."""
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(share.x.chunk(2), share.y.chunk(2), strict=True):
            loss = F.mse_loss(share.model(x), y) / 2
            loss.backward()
            total += loss.item()
        return total

    for step in range(9):
        share.model[4].requires_grad_(step // 3 != 1)
        found += [optimizer.step(closure).item(), *share.values()]
    return found


def look_after_backward(rank: int, ranks: int) -> list[Any]:
    """The closure ends with a forward pass without a backward one, which leaves gathered copies."""
    seen: list[Any] = []
    for make in (lambda p: LBFGS(p, max_iter=4), lambda p: Sophia(p, lr=0.01, update_period=2)):
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())

        def closure(share: Share = share) -> Tensor:
            loss = share.closure()
            with torch.no_grad():
                assert torch.equal(share.loss(), loss)
            return loss

        for _ in range(4):
            loss = optimizer.step(closure).item()
            with torch.no_grad():  # by a new forward pass, and from the parameters' parts
                outputs = [share.model(share.x)]
                for module in share.model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
                outputs += [share.model(share.x)]
            assert torch.equal(*outputs)
            if isinstance(optimizer, LBFGS):
                seen += [loss, *share.values()]
    return seen


def reshard_lbfgs(rank: int, ranks: int) -> list[Any]:
    found = resharded(lambda p: LBFGS(p, max_iter=3, history_size=7), "plain", rank, ranks)
    scaled = partial(LBFGS, update="ssbroyden", max_iter=3, history_size=5)
    found += resharded(scaled, "plain", rank, ranks)
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
            found[-1] += [
                info.grad_norm,
                getattr(info, "unclipped", None) or 0.0,
                info.evaluations,
                info.products,
            ]
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


def reshard_diagonal(rank: int, ranks: int) -> list[Any]:
    """Resharded on the way, and on two ranks without a break."""
    found: list[Any] = [[], []]
    for kind, make in (
        ("plain", lambda p: AdaHessian(p, lr=0.02, update_period=3)),
        ("by name", lambda p: Sophia(p, lr=0.05, gamma=1.0, update_period=3)),
    ):
        found[0] += resharded(make, kind, rank, ranks)
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        found[1] += [[optimizer.step(share.closure).item() for _ in range(12)], share.values()]
    return found


def newton(rank: int, ranks: int) -> list[Any]:
    """By differences on both sides."""
    found: list[Any] = []
    for arguments in (
        {},
        {"globalization": "damping", "damping": 0.1, "weight_decay": 0.01},
        {"globalization": "line_search", "solver": "minres", "damping": 0.1},
        {"weight_decay": 0.05, "max_iter": 30, "tolerance_change": 0.02},
    ):
        share = Share(rank, ranks)
        optimizer = NewtonCG(
            share.model.parameters(),
            curvature="hessian",
            curvature_products="finite_difference",
            max_cg_iter=5,
            **arguments,
        )
        for _ in range(4):
            found.append(optimizer.step(share.closure).item())
            found += [optimizer.info.products, optimizer.info.iterations]
        found += [optimizer.info.grad_norm, *share.values()]
    return found


def reshard_newton(rank: int, ranks: int) -> list[Any]:
    def make(params: Any) -> NewtonCG:
        return NewtonCG(
            params,
            curvature="hessian",
            curvature_products="finite_difference",
            # Damping that stays: less of it amplifies the rounding of differences.
            globalization=MarquardtDamping(initial=0.1, smallest=0.5),
            max_cg_iter=5,
        )

    return resharded(make, "by name", rank, ranks)


def reshard_declared(rank: int, ranks: int) -> list[Any]:
    """An optimizer of another package, which only declares its state."""
    return [r for kind in ("plain", "by name") for r in resharded(Averaging, kind, rank, ranks)]


def unsharded(rank: int, ranks: int) -> list[Any]:
    """A state of full tensors goes on without sharding."""
    found: list[Any] = [[], []]
    for make in (
        lambda p: LBFGS(p, max_iter=3),
        lambda p: Sophia(p, lr=0.05, update_period=100),
        *sharded_matrices.OPTIMIZERS.values(),
    ):
        share, plain = Share(rank, ranks), Share(0, 0)
        optimizer, other = make(share.model.parameters()), make(plain.model.parameters())
        for _ in range(4):
            optimizer.step(share.closure)
        options = StateDictOptions(full_state_dict=True)
        plain.model.load_state_dict(get_model_state_dict(share.model, options=options))
        other.load_state_dict(get_optimizer_state_dict(share.model, optimizer, options=options))
        found[0] += [optimizer.step(share.closure).item() for _ in range(4)] + share.values()
        found[1] += [other.step(plain.closure).item() for _ in range(4)] + plain.values()
    return found


def lbfgs_on_tiny_numbers(rank: int, ranks: int) -> list[Any]:
    """Where squares of float32 gradients underflow."""
    share = Share(rank, ranks, torch.float32)
    optimizer = LBFGS(share.model.parameters(), max_iter=1, max_eval=20, tolerance_grad=0)
    losses = [optimizer.step(lambda: 1e-22 * share.loss()).item() for _ in range(4)]
    return [*(1e22 * loss for loss in losses), *share.values()]


def history(rank: int, ranks: int) -> list[Any]:
    """Pairs that come without a product in between, and without their scale."""
    space, part, vectors = cut_up(rank, ranks)
    inverse = InverseBFGS(vectors[0, part].numel(), 3, torch.float64, space=space)
    for v in vectors[:5, part]:
        inverse.push(v, v * torch.arange(2.0, 11.0)[part])
    product = inverse @ vectors[5, part]
    return [space.total(product @ product), space.total(product.sum())]


def solve(rank: int, ranks: int) -> list[Any]:
    """Every way through the solvers."""
    space, part, vectors = cut_up(rank, ranks)
    found: list[Any] = []

    def diagonal(entries: Tensor) -> Diagonal:
        operator = Diagonal(entries[part])
        operator.space = space
        return operator

    definite, indefinite = vectors[0].square() + 0.1, vectors[0] + 0.5
    b, x0, inverse = vectors[1, part], vectors[2, part], diagonal(1 / (vectors[3] ** 2 + 1))
    through = MINRES(4, stop_at_negative_curvature=False)
    for solver in (CG(4, recompute=2), CG(4), MINRES(4), through):
        for operator in (diagonal(definite), diagonal(indefinite)):
            for more in ({}, {"x0": x0}, {"preconditioner": inverse}, {"radius": 0.7}):
                if "radius" in more and isinstance(solver, MINRES):
                    continue
                result = solver(operator, b, **more)
                found += [list(SolveStatus).index(result.status), result.iterations]
                found += [result.residual_norm, result.decrease, result.length]
                found += [result.negative_curvature, space.total(result.x @ b)]
    x0 = vectors[2].clone()
    x0[8] = math.nan  # which the first of two ranks does not have
    with pytest.raises(ValueError, match="x0 must be finite"):
        MINRES()(diagonal(definite), b, x0=x0[part])
    return found


def cut_up(rank: int, ranks: int) -> tuple[Space, slice, Tensor]:
    """Six vectors of nine numbers, seven of which the first of two ranks has."""
    torch.manual_seed(3)
    vectors = torch.randn(6, 9, dtype=torch.float64)
    if not ranks:
        return WHOLE, slice(None), vectors
    space = ShardedSpace(init_device_mesh("cpu", (ranks,)), [0])
    return space, slice(0, 7) if rank == 0 else slice(7, 9), vectors


def draw_labels(rank: int, ranks: int) -> list[Any]:
    """With one sample a rank the diagonal is one of two, by the signs of their errors."""
    share = Share(rank, ranks)
    share.model = nn.Linear(4, 1).double()
    x = torch.randn(2, 4).double()
    fully_shard(share.model, mesh=init_device_mesh("cpu", (ranks,)))
    share.x, share.y = x[rank : rank + 1], torch.zeros(1, 1).double()
    optimizer = Sophia(share.model.parameters(), lr=0.01, estimator="gnb", update_period=1)
    loss = optimizer.step(share.closure)
    estimates = [s["exp_hessian"] for s in optimizer.state_dict()["state"].values()]
    with_one = torch.cat([x, torch.ones(2, 1)], 1)
    sums = [(with_one[0] + sign * with_one[1]).square() / 2 * 0.01 * 2 for sign in (1, -1)]
    ours = torch.cat([whole(e).flatten() for e in estimates])
    matches = [torch.allclose(ours, s, rtol=1e-12) for s in sums]
    assert any(matches), (ours, sums)
    losses = [optimizer.step(share.closure).item() for _ in range(20)]
    assert losses[-1] < loss
    return [losses, share.values()]


def meet_nan(rank: int, ranks: int) -> list[Any]:
    """The last rank's loss is not finite in the third step of five."""
    found: list[Any] = []
    for make in (
        lambda p: LBFGS(p, max_iter=2),
        AdaHessian,
        lambda p: NewtonCG(p, curvature="hessian"),
    ):
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        for step in range(1, 6):

            def closure(step: int = step, share: Share = share) -> Tensor:
                share.model.zero_grad()
                loss = share.loss() * (math.nan if step == 3 and rank == ranks - 1 else 1.0)
                loss.backward()
                return loss

            optimizer.step(closure)
            found += [list(StepStatus).index(optimizer.info.status), share.values()]
    return found


def meet_infinity(rank: int, ranks: int) -> list[Any]:
    """In the last rank's part of a gradient, in the third step; then in all differences."""
    found: list[Any] = []
    for make in (
        lambda p: LBFGS(p, max_iter=2),
        lambda p: AdaHessian(p, lr=0.02),
        lambda p: Sophia(p, lr=0.02),
    ):
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        for step, bad in ((1, ()), (2, ()), (3, (1,)), (4, range(2, 50)), (5, ())):
            evaluations = 0

            def closure(share: Share = share, bad: Sequence[int] = bad) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                loss = share.closure()
                if evaluations in bad and rank == ranks - 1:
                    share.model[0].weight.grad.to_local().fill_(math.inf)
                return loss

            optimizer.step(closure)
            found += [step, list(StepStatus).index(optimizer.info.status), share.values()]
    return found


def half_precision(rank: int, ranks: int) -> list[Any]:
    """Computing in bfloat16, and parameters in bfloat16, whose unrounded copies are saved."""
    found: list[Any] = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for optimizer_of in (
        LBFGS,
        lambda p: AdaHessian(p, lr=0.02),
        *sharded_matrices.OPTIMIZERS.values(),
    ):
        share = Share(rank, ranks, torch.float32, mp_policy=policy)
        share.y = share.y.bfloat16()
        optimizer = optimizer_of(share.model.parameters())
        losses = [optimizer.step(share.closure).item() for _ in range(5)]
        assert losses[-1] < losses[0], losses
        narrow = Share(rank, ranks, torch.bfloat16)
        optimizer = optimizer_of(narrow.model.parameters())
        losses += [optimizer.step(narrow.closure).item() for _ in range(4)]
        resumed = Share(rank, ranks, torch.bfloat16)
        again = optimizer_of(resumed.model.parameters())
        path = f"{FOLDER[-1]}/narrow-{type(again).__name__}"
        save("by name", narrow, optimizer, path)
        load("by name", resumed, again, path)
        optimizer.step(narrow.closure), again.step(resumed.closure)
        first, second = optimizer.state_dict()["state"], again.state_dict()["state"]
        for own, other in zip(first.values(), second.values(), strict=True):
            name = "flat_master" if "flat_master" in own else "master"
            assert own[name].dtype == torch.float32
            torch.testing.assert_close(whole(own[name]), whole(other[name]), rtol=0, atol=0)
        found += [losses, share.values(), narrow.values()]
    return found


def measure(rank: int, ranks: int) -> list[Any]:
    """Bytes of the history here, and bytes and messages of ours in an iteration of L-BFGS."""
    share = Share(rank, ranks)
    share.model = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 2)).double()
    fully_shard(share.model, mesh=share.mesh)
    share.loss = lambda: (share.model(share.x) - share.y).square().mean()
    optimizer = LBFGS(share.model.parameters(), history_size=20, max_iter=1, max_eval=1)
    for _ in range(25):
        optimizer.step(share.closure)
    history = optimizer._inverse._buffers
    sent: list[int] = []
    real = dist.all_reduce, dist.all_gather

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return real[0](tensor, *args, **kwargs)

    def gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return real[1](tensors, tensor, *args, **kwargs)

    optimizer.param_groups[0].update(max_iter=10, max_eval=100)
    dist.all_reduce, dist.all_gather = reduce, gather
    try:
        optimizer.step(share.closure)
    finally:
        dist.all_reduce, dist.all_gather = real
    info = optimizer.info
    here = history.steps.nbytes + history.differences.nbytes
    size = sum(p.numel() for p in share.model.parameters())
    return [here / (2 * 20 * size * 8), sum(sent), len(sent), info.iterations, info.evaluations]


def refuse(rank: int, ranks: int) -> list[Any]:
    """What each of these raises; see `REFUSALS`."""
    share, plain = Share(rank, ranks), Share(0, 0)
    params, others = list(share.model.parameters()), list(plain.model.parameters())
    mesh = own_mesh(ranks)
    elsewhere = list(Share(0, 1, mesh=mesh).model.parameters())
    strange = distribute_tensor(torch.ones(2), share.mesh, [Replicate()], src_data_rank=None)
    part = DTensor.from_local(torch.ones(2), share.mesh, [Partial()]).requires_grad_()
    trained = LBFGS(others, max_iter=1)
    trained.step(plain.closure)
    adapted = AdaHessian(others)
    adapted.step(plain.closure)
    lbfgs_of = LBFGS(params)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        alone = trained.state_dict()  # as one process saves it

    def add() -> Tensor:
        loss = share.loss()
        loss.backward()
        return loss

    def add_to_a_gradient() -> None:
        share.closure()
        AdaHessian(params).step(add)

    def build_a_function() -> None:
        FunctionalObjective(lambda p: p[0].sum(), params)

    actions = [
        lambda: LBFGS([params[0], others[0]]).step(share.closure),
        lambda: LBFGS([params[0], elsewhere[0]]).step(share.closure),
        lambda: LBFGS([params[0], strange.requires_grad_()]).step(share.closure),
        lambda: LBFGS([part]).step(share.closure),
        build_a_function,
        lambda: ClosureObjective(share.closure, params).evaluate(curvature=True),
        lambda: NewtonCG(params, curvature=lambda e: None),
        lambda: NewtonCG(params, curvature="hessian", preconditioner="kfac"),
        lambda: AdaHessian(params).step(),
        lambda: AdaHessian(params, average_block=4),
        lambda: AdaHessian([_three_dimensional(share.mesh)]),
        lambda: AdaHessian(params, estimator=_Other()).step(share.closure),
        add_to_a_gradient,
        lambda: lbfgs_of.load_state_dict(alone),
        lambda: lbfgs_of.load_state_dict(trained.state_dict()),
        lambda: trained.load_state_dict(lbfgs_of.state_dict()),
        lambda: LBFGS(elsewhere).load_state_dict(lbfgs_of.state_dict()),
        lambda: AdaHessian(params).load_state_dict(adapted.state_dict()),
        lambda: Everything(params),
        lambda: LBFGS(params, bounds=(0.0, 1.0)),
        *sharded_matrices.refusals(share),
    ]
    found = []
    for action in actions:
        try:
            action()
        except (RuntimeError, TypeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("nothing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = NewtonCG(params, curvature="ggn")
    found += [str(w.message) for w in caught] + [optimizer.curvature_products]
    return found


REFUSALS = (
    "ValueError: parameter 1 of shape (5, 4) is a plain tensor, while parameter 0 is sharded",
    "ValueError: parameter 1 is placed as (Shard(dim=0),) on",
    "ValueError: parameter 1 is placed as (Replicate(),) on",
    "ValueError: parameter 0 of shape (2,) is placed as Partial; only Shard and Replicate",
    "TypeError: a FunctionalObjective is a function of whole tensors",
    "RuntimeError: the hooks of fully_shard let no second derivative through",
    "ValueError: a curvature of one's own is made from a retained graph",
    "ValueError: preconditioner='kfac' needs whole vectors or a retained graph",
    "RuntimeError: the curvature is due at this step (optimizer.curvature_due)",
    "ValueError: average_block=4 averages neighboring entries",
    "ValueError: parameters are sharded along dimension 2, and average_block='spatial'",
    "TypeError: _Other works inside of backward()",
    "RuntimeError: the closure adds to gradients from before this step",
    "ValueError: this state is not one of sharded parameters",
    "ValueError: the state of parameter 0",
    "ValueError: the state of parameter 0",
    "ValueError: the state of parameter 0",
    "ValueError: exp_avg of parameter 0 has shape (5, 4) in this process",
    "ValueError: Everything keeps a matrix over all pairs of parameters",
    "ValueError: LBFGS takes no bounds for sharded parameters",
    *sharded_matrices.REFUSALS,
    "for sharded parameters products are finite differences of gradients",
    "finite_difference",
)


class _Other(Hutchinson.__base__):
    n_samples, signed = 1, True

    def watch(self, *_: Any) -> Any:
        raise NotImplementedError


def _three_dimensional(mesh: Any) -> Any:
    whole = torch.ones(2, 2, 4)
    return nn.Parameter(distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None))


CHECKS: dict[str, Callable[[int, int], list[Any]]] = {
    check.__name__: check
    for check in (
        lbfgs,
        nonlinear_cg,
        lbfgs_in_groups,
        look_after_backward,
        reshard_lbfgs,
        reshard_nonlinear_cg,
        diagonal,
        exact_diagonal,
        reshard_diagonal,
        newton,
        reshard_newton,
        reshard_declared,
        unsharded,
        lbfgs_on_tiny_numbers,
        history,
        solve,
        draw_labels,
        meet_nan,
        meet_infinity,
        half_precision,
        measure,
        matrices,
        matrices_in_groups,
        reshard_matrices,
        resume_matrices,
        measure_matrices,
        meet_nan_with_matrices,
        refuse,
    )
}


def run_rank(rank: int, folder: str) -> None:
    """One process: what each check gives, or how it failed, goes to a file."""
    FOLDER.append(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
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
    start_on_ranks(run_rank, str(folder))
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


def results(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    """One list for each rank, and the ranks bit-identical."""
    failures = [f for found in ranks for f in found.values() if isinstance(f, str)]
    assert not failures, "\n".join(failures)
    first, second = (found[name] for found in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return first


SAME_AS_PLAIN = (
    "lbfgs",
    "nonlinear_cg",
    "reshard_nonlinear_cg",
    "lbfgs_in_groups",
    "look_after_backward",
    "reshard_lbfgs",
    "newton",
    "reshard_newton",
    "reshard_declared",
    "lbfgs_on_tiny_numbers",
    "history",
    "solve",
    "matrices",
    "matrices_in_groups",
    "reshard_matrices",
    "resume_matrices",
    "meet_nan_with_matrices",
)


@pytest.mark.parametrize("name", ["diagonal", "reshard_diagonal", "unsharded"])
def test_estimates_of_two_ranks_are_those_of_one(ranks: list[dict[str, Any]], name: str) -> None:
    two, one = results(ranks, name)
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-9)


def test_differences_stand_for_products(ranks: list[dict[str, Any]]) -> None:
    ours, expected = results(ranks, "exact_diagonal"), exact_diagonal(0, 0)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_go_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for message, expected in zip(found["refuse"], REFUSALS, strict=True):
            assert message.startswith(expected)


@pytest.mark.parametrize("name", ["draw_labels", "half_precision"])
def test_ranks_stay_together(ranks: list[dict[str, Any]], name: str) -> None:
    results(ranks, name)


def test_all_ranks_reject_what_one_finds_not_finite(ranks: list[dict[str, Any]]) -> None:
    found = results(ranks, "meet_nan")
    for i in range(0, len(found), 10):
        statuses = [list(StepStatus)[number] for number in found[i : i + 10 : 2]]
        values = found[i + 1 : i + 10 : 2]
        assert [s is StepStatus.NONFINITE_START for s in statuses] == [False] * 2 + [True] + [
            False
        ] * 2
        torch.testing.assert_close(values[2], values[1], rtol=0, atol=0)
        assert not torch.equal(values[3][0], values[2][0])


def test_all_ranks_reject_what_is_not_finite_in_a_part_of_one(ranks: list[dict[str, Any]]) -> None:
    found = results(ranks, "meet_infinity")
    names = [list(StepStatus)[number].name for number in found[1::3]]
    assert names[2] == "NONFINITE_START"
    assert names[5:10] == [
        *("MOVED", "MOVED", "NONFINITE_START", "MOVED_ON_OLD_CURVATURE", "MOVED")
    ]
    assert names[10:] == ["MOVED", "MOVED", "NONFINITE_START", "MOVED", "MOVED"]
    for values in found[2::3]:
        assert all(torch.isfinite(value).all() for value in values)


def test_the_history_is_cut_up_and_little_is_sent(ranks: list[dict[str, Any]]) -> None:
    share, sent, messages, iterations, evaluations = results(ranks, "measure")
    assert share == pytest.approx(0.5, rel=0.01)
    assert iterations == 10
    assert sent < 1024 * iterations
    assert messages <= 4 * iterations + 2 * evaluations


def test_matrices_are_divided_and_two_messages_are_sent(ranks: list[dict[str, Any]]) -> None:
    """One with this rank's parts of gradients and values, one with whole new values."""
    for share, messages, size, *report in results(ranks, "measure_matrices"):
        assert share == pytest.approx(0.5)
        assert messages == [size, size / 2]
        assert report == [1, True]


@pytest.mark.parametrize("name", SAME_AS_PLAIN)
def test_two_ranks_do_what_one_process_does(ranks: list[dict[str, Any]], name: str) -> None:
    ours, expected = results(ranks, name), CHECKS[name](0, 0)
    # Differences amplify rounding.
    tolerance = {"lbfgs_on_tiny_numbers": 1e-5}.get(name, 1e-6 if "newton" in name else 1e-10)
    torch.testing.assert_close(ours, expected, rtol=10 * tolerance, atol=tolerance)
