"""AdaHessian and Sophia under DistributedDataParallel: two ranks are one with the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import Check, on_both, run_on_ranks
from tests.support.shares import Share
from torch_secondorder import SOAP, AdaHessian, Shampoo, Sophia, StepStatus
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._optim.kronecker import division
from torch_secondorder.curvature import Hutchinson

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

#: Those that divide work over the ranks.
DIVIDING: dict[str, Callable[..., Any]] = {
    "Shampoo": Shampoo,
    "SOAP": partial(SOAP, eps=1e-3),
}
#: Those whose estimates are of the whole batch, whoever draws the probes.
CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "AdaHessian": lambda params: AdaHessian(params, lr=0.01, eps=0.01),
    "AdaHessian, now and then": lambda params: AdaHessian(
        params, lr=0.01, eps=0.01, update_period=3
    ),
    "AdaHessian, three samples": lambda params: AdaHessian(params, lr=0.01, eps=0.01, n_samples=3),
    "AdaHessian, on the device": lambda params: AdaHessian(
        params, lr=0.01, eps=0.01, capturable=True
    ),
    "Sophia": lambda params: Sophia(params, lr=0.05, gamma=5.0, update_period=1),
    "Sophia, now and then": lambda params: Sophia(params, lr=0.05, gamma=5.0, update_period=3),
    "Sophia, Gaussian": lambda params: Sophia(
        params,
        lr=0.05,
        gamma=5.0,
        update_period=1,
        estimator=Hutchinson(2, distribution="gaussian"),
    ),
    **{
        name: lambda params, kind=kind: kind(params, lr=0.01, block_size=3, update_period=2)
        for name, kind in DIVIDING.items()
    },
}


class Wide(nn.Module):
    """Parameters of two widths, one of which the last rank has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.scale = nn.Parameter(torch.ones(3))
        self.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        z = self.linear(x).tanh() * self.scale.double()
        return z * self.idle if use else z


def train(rank: int, ranks: int) -> list[Any]:
    losses, values = [], []
    for make in CONTENDERS.values():
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        losses.append([optimizer.step(share.closure).item() for _ in range(10)])
        values.append(share.values())
    return [losses, values]


def train_without_backward(rank: int, ranks: int) -> list[Any]:
    losses, values = [], []
    for make in CONTENDERS.values():
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        losses.append([optimizer.step(share.loss).item() for _ in range(10)])
        values.append(share.values())
    return [losses, values]


def train_a_mix(rank: int, ranks: int) -> list[Any]:
    """Of dtypes, and of what the ranks use."""
    found = []
    for kind in (AdaHessian, Sophia):
        torch.manual_seed(3)
        plain, x, y = Wide(), torch.randn(8, 4).double(), torch.randint(3, (8,))
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        model: Any = plain
        if ranks > 1:
            model = DistributedDataParallel(plain, find_unused_parameters=True)
        optimizer = kind(model.parameters(), lr=0.02, update_period=2)

        def closure(optimizer: Any = optimizer, model: Any = model, x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            if ranks == 1:
                first = F.cross_entropy(model(x[:4]), y[:4])
                loss = (first + F.cross_entropy(model(x[4:], False), y[4:])) / 2
            else:
                loss = F.cross_entropy(model(x, rank == 0), y)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(6)]
        found += [losses, [p.detach().clone() for p in plain.parameters()]]
    return found


def draw_labels(rank: int, ranks: int) -> list[Any]:
    share = Share(rank, ranks)
    optimizer = Sophia(share.model.parameters(), lr=0.05, estimator="gnb", update_period=2)
    losses = [optimizer.step(share.closure).item() for _ in range(10)]
    return [losses, share.values()]


def meet_nan(rank: int, ranks: int) -> list[Any]:
    """The last rank's loss is not finite in the third and fourth step of six."""
    found: list[Any] = []
    for make in (*CONTENDERS.values(), lambda params: Sophia(params, capturable=True)):
        share = Share(rank, ranks)
        optimizer = make(share.model.parameters())
        for step in range(1, 7):

            def closure(step: int = step, share: Share = share) -> Tensor:
                share.model.zero_grad()
                bad = rank == ranks - 1 and step in (3, 4)
                loss = share.loss() * (math.nan if bad else 1.0)
                loss.backward()
                return loss

            optimizer.step(closure)
            found += [list(StepStatus).index(optimizer.info.status), share.values()]
    return found


def resume_and_meet_infinity(rank: int, ranks: int) -> list[Any]:
    """In the first step after a checkpoint was loaded, where no curvature is due.

    The loss is infinite on one rank, by a constant: all gradients are finite.
    """
    share = Share(rank, ranks)
    optimizer = Sophia(share.model.parameters(), lr=0.05, update_period=3)
    optimizer.step(share.closure)
    resumed = Sophia(share.model.parameters(), lr=0.05, update_period=3)
    resumed.load_state_dict(optimizer.state_dict())

    def closure() -> Tensor:
        share.model.zero_grad()
        loss = share.loss() + (math.inf if rank == ranks - 1 else 0.0)
        loss.backward()
        return loss

    loss = resumed.step(closure)
    return [loss.item(), share.values()]


def bend_one(rank: int, ranks: int) -> list[Any]:
    """The last rank's products are not finite in the second step."""
    torch.manual_seed(3)
    plain = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(plain.weight)
    model = DistributedDataParallel(plain) if ranks > 1 else plain
    optimizer = AdaHessian(model.parameters(), lr=0.1)
    x, found = torch.ones(1, 1, dtype=torch.float64), []
    for step in range(3):
        at = float(plain.weight.detach()) if step == 1 and rank == ranks - 1 else -3.0

        def closure(at: float = at) -> Tensor:
            optimizer.zero_grad()
            z = model(x)
            loss = ((z - at).abs().pow(1.5) + z).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        status = list(StepStatus).index(optimizer.info.status)
        found += [status, plain.weight.detach().clone()]
    return found


def divide(rank: int, ranks: int) -> list[Any]:
    """Functions of stacks of matrices: the results, the entries made here, and the messages."""
    registered = Ranks()
    module = DistributedDataParallel(nn.Linear(1, 1)) if ranks > 1 else None  # kept alive
    if module is not None:
        registered.note(module)
    torch.manual_seed(5)
    sizes = ((3, 4), (1, 5), (2, 1), (7, 2))
    stacks = [(torch.randn(k, m, m), torch.randn(k, m, m)) for k, m in sizes]
    narrow = [(first.bfloat16(), second) for first, second in stacks[:1]]
    made: list[int] = []

    def function(first: Tensor, second: Tensor) -> Tensor:
        made.append(first.numel())
        return (first @ second.to(first.dtype)).mT  # of other strides

    found: list[Any] = []
    for least, chosen in ((0, stacks), (0, stacks[1:2]), (1e9, stacks), (0, stacks + narrow)):
        with (
            mock.patch.object(division, "LEAST", least),
            mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as messages,
        ):
            results = [torch.full_like(first, math.nan) for first, _ in chosen]
            division.divided(results, function, chosen, registered)
        found.append([results, sum(made), messages.call_count])
        made.clear()
    return found


def train_divided(rank: int, ranks: int) -> list[Any]:
    """However small the matrices are; with a closure and without, the first one of two ranks."""
    found: list[Any] = []
    for name in DIVIDING:
        for closes in (True, False):
            share = Share(rank, ranks)
            optimizer = CONTENDERS[name](share.model.parameters())
            with (
                mock.patch.object(division, "LEAST", 0),
                mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as messages,
            ):
                for _ in range(6):
                    if closes:
                        optimizer.step(share.closure)
                    else:
                        share.closure()
                        optimizer.step()
            assert optimizer._notice is None
            found.append([share.values(), messages.call_count])
    return found


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        train,
        train_without_backward,
        train_a_mix,
        draw_labels,
        meet_nan,
        resume_and_meet_infinity,
        bend_one,
        divide,
        train_divided,
    )
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks([*CHECKS.values()], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["train", "train_without_backward"])
def test_training_equals_that_on_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    losses, values = on_both(ranks, name)
    expected_losses, expected = CHECKS[name](0, 1)
    for ours, theirs, a, b in zip(losses, expected_losses, values, expected, strict=True):
        assert ours[-1] < ours[0]
        assert ours == pytest.approx(theirs, rel=1e-11)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_mix_of_dtypes_and_of_what_is_used(ranks: list[dict[str, Any]]) -> None:
    ours, expected = on_both(ranks, "train_a_mix"), train_a_mix(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_ranks_that_draw_labels_stay_together(ranks: list[dict[str, Any]]) -> None:
    losses, _ = on_both(ranks, "draw_labels")
    assert losses[-1] < losses[0]


def test_all_ranks_skip_what_one_finds_not_finite(ranks: list[dict[str, Any]]) -> None:
    found = on_both(ranks, "meet_nan")
    for i in range(0, len(found), 12):
        statuses = [list(StepStatus)[number] for number in found[i : i + 12 : 2]]
        values = found[i + 1 : i + 12 : 2]
        moved, skipped = StepStatus.MOVED, StepStatus.NONFINITE_START
        assert statuses == [moved, moved, skipped, skipped, moved, moved]
        torch.testing.assert_close(values[3], values[1], rtol=0, atol=0)
        assert all(torch.isfinite(v).all() for v in values[-1])


def test_ranks_agree_on_a_loss_right_after_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    on_both(ranks, "resume_and_meet_infinity")


def test_matrices_are_divided_over_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = [results for results, _, _ in divide(0, 1)]
    by_rank = [found["divide"] for found in ranks]
    for found in by_rank:
        assert not isinstance(found, str), found
        torch.testing.assert_close([results for results, _, _ in found], expected, rtol=0, atol=0)
        assert [messages for _, _, messages in found] == [1, 1, 0, 0]
    entries = [[made for _, made, _ in found] for found in by_rank]
    assert sum(entries[rank][0] for rank in (0, 1)) == entries[0][2] == 103  # each made once
    assert min(entries[rank][0] for rank in (0, 1)) > 30
    assert sorted(entries[rank][1] for rank in (0, 1)) == [0, 25]


def test_bases_and_roots_are_divided_over_ranks(ranks: list[dict[str, Any]]) -> None:
    """One message in each step that makes them: 1, 2, 4, 6 of Shampoo and 2, 4, 6 of SOAP."""
    found, expected = on_both(ranks, "train_divided"), train_divided(0, 1)
    for (values, _), (alone, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(values, alone, rtol=1e-12, atol=1e-12)
    assert [messages for _, messages in found] == [4, 4, 3, 3]
    assert [messages for _, messages in expected] == [0] * 4


def test_all_ranks_keep_their_curvature_where_one_products_are_not_finite(
    ranks: list[dict[str, Any]],
) -> None:
    found = on_both(ranks, "bend_one")
    statuses = [list(StepStatus)[number] for number in found[::2]]
    moved = StepStatus.MOVED
    assert statuses == [moved, StepStatus.MOVED_ON_OLD_CURVATURE, moved]
