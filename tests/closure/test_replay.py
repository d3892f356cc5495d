"""All evaluations of a step see the same model."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracles import make_case
from torch_secondorder import LBFGS, NewtonCG
from torch_secondorder._closure.runner import ModuleRegistry, Replay
from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector


def run_step(objective: Objective, evaluations: int, curvature: bool = False) -> list[Tensor]:
    """Losses at the same point, and at trial points in between."""
    losses = []
    with objective:
        for _ in range(evaluations):
            losses.append(objective.evaluate(curvature=curvature).loss)
            objective.trial(torch.full_like(objective.position, 100.0))
    return losses


@pytest.mark.parametrize("curvature", [False, True])
def test_dropout_draws_the_same_masks_within_a_step(curvature: bool, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(), nn.Linear(30, 1)).to(device)
    x = torch.randn(5, 4, device=device)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    torch.manual_seed(1)
    losses = run_step(ClosureObjective(closure, model.parameters()), 3, curvature)
    after = torch.rand(3), torch.rand(3, device=device)
    assert len({loss.item() for loss in losses}) == 1
    # What follows the step is as if there had been one evaluation.
    torch.manual_seed(1)
    assert closure().item() == losses[0].item()
    assert torch.equal(torch.rand(3), after[0])
    assert torch.equal(torch.rand(3, device=device), after[1])
    # The next step draws others.
    other = run_step(ClosureObjective(closure, model.parameters()), 1)
    assert other[0] != losses[0]


@pytest.mark.parametrize("kind", ["closure", "function"])
@pytest.mark.parametrize("steps", [1, 3])
def test_running_statistics_move_once_a_step(steps: int, kind: str, device: torch.device) -> None:
    case, plain = make_case("batchnorm", device), make_case("batchnorm", device)
    registry = ModuleRegistry()
    for _ in range(steps):
        plain.value()
        if kind == "closure":
            objective: Objective = ClosureObjective.for_step(
                case.closure(), case.params(), registry=registry
            )
        else:
            pure = case.pure()
            objective = FunctionalObjective(
                lambda p: pure(*p),  # noqa: B023
                case.params(),
            ).bind(ParameterVector(case.params()), registry=registry)
        run_step(objective, 3, curvature=True)
    assert int(case.model[1].num_batches_tracked) == steps
    for ours, theirs in zip(case.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_of_a_layer_that_is_set_to_train_later() -> None:
    case = make_case("batchnorm", torch.device("cpu"))
    registry = ModuleRegistry()
    case.model.eval()
    run_step(ClosureObjective.for_step(case.closure(), case.params(), registry=registry), 2)
    case.model.train()
    run_step(ClosureObjective.for_step(case.closure(), case.params(), registry=registry), 2)
    assert int(case.model[1].num_batches_tracked) == 1


def test_numbers_that_are_drawn_in_later_evaluations_only(device: torch.device) -> None:
    p = torch.ones(3, device=device, requires_grad=True)
    drawn: list[Tensor] = []
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if evaluations > 1:
            drawn.append(torch.rand(3, device=device))
        return (p * p).sum()

    run_step(ClosureObjective(closure, [p]), 2)
    assert len(drawn) == 3
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_sharded_modules_gather_again_after_a_first_evaluation_that_failed() -> None:
    class Sharded:
        reshards = 0

        def reshard(self) -> None:
            self.reshards += 1

    registry, module = ModuleRegistry(), Sharded()
    replay = Replay(registry, [torch.device("cpu")])

    def closure() -> None:
        registry.sharded.add(module)  # as `watch` does
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        replay.run(closure)
    assert module.reshards == 0
    replay.run(lambda: None)
    assert module.reshards == 1


class _Counting(nn.Module):
    """Has a buffer that forward changes, in place or by putting a new tensor there."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("constant", torch.ones(2))

    def forward(self) -> Tensor:
        if self.in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return (self.weight * self.calls * self.constant).square().sum()


@pytest.mark.parametrize("in_place", [True, False])
def test_any_buffer_that_a_forward_pass_changes(in_place: bool) -> None:
    model = _Counting(in_place)
    registry = ModuleRegistry()
    for step in range(1, 4):
        objective = ClosureObjective.for_step(
            lambda: model(), model.parameters(), registry=registry
        )
        losses = run_step(objective, 3)
        assert [loss.item() for loss in losses] == [2.0 * step**2] * 3
        assert model.calls.item() == step


def test_spectral_norm_iterates_once_a_step() -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    model, plain, x = make(), make(), torch.randn(3, 4)
    registry = ModuleRegistry()
    for _ in range(3):
        plain(x)
        objective = ClosureObjective.for_step(
            lambda: model(x).square().mean(), model.parameters(), registry=registry
        )
        run_step(objective, 2)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Buffers that the loss depends on move on with each iterate.


def spectral() -> nn.Module:
    torch.manual_seed(2)
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).double()


@pytest.mark.parametrize("accepted", ["the last trial", "an earlier one"])
def test_an_accepted_step_moves_them_as_one_evaluation_there_does(accepted: str) -> None:
    model, plain, x = spectral(), spectral(), torch.randn(3, 4).double()
    registry = ModuleRegistry()
    step = 0.3 * torch.randn(20).double()
    for _ in range(2):
        objective = ClosureObjective.for_step(
            lambda: model(x).square().mean(), model.parameters(), registry=registry
        )
        with objective:
            entry = [b.clone() for b in plain.buffers()]
            assert objective.evaluate().loss == plain(x).square().mean()
            assert all(map(torch.equal, model.buffers(), plain.buffers()))
            for b, value in zip(plain.buffers(), entry, strict=True):  # trials begin there
                b.copy_(value)
            for _ in range(3):
                before = [b.clone() for b in plain.buffers()]
                objective.trial(step)
                if accepted != "the last trial":
                    objective.trial(-step)
                objective.accept(step)
                assert objective.renewed
                torch.nn.utils.vector_to_parameters(
                    torch.nn.utils.parameters_to_vector(plain.parameters()) + step,
                    plain.parameters(),
                )
                # One evaluation there, and then another one begins where it ended.
                plain(x)
                found = objective.evaluate().loss
                assert not objective.renewed
                moved = [b.clone() for b in plain.buffers()]
                assert not all(map(torch.equal, before, moved))
                torch.testing.assert_close(found, plain(x).square().mean().detach())
                for b, value in zip(plain.buffers(), moved, strict=True):
                    b.copy_(value)
        for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


class _Statistics(nn.Module):
    """Keeps a running mean, and does not look at it; not one of PyTorch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4).double())
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.batches += 1
        return x - x.mean(0)


@pytest.mark.parametrize(
    "make",
    [
        partial(LBFGS, max_iter=6),
        partial(NewtonCG, max_iter=4),
        partial(NewtonCG, max_iter=4, curvature="hessian"),
    ],
)
def test_running_statistics_of_any_layer_move_once_beside_them(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[type] = []
    examine = Objective._examine

    def counted(self: Objective, kind: type) -> None:
        examined.append(kind)
        before = self.evaluations
        examine(self, kind)
        assert self.evaluations == before + 3

    monkeypatch.setattr(Objective, "_examine", counted)
    torch.manual_seed(3)
    model = nn.Sequential(spectral(), _Statistics(), nn.BatchNorm1d(4), spectral()).double()
    x, y = torch.randn(12, 4).double(), torch.randint(4, (12,))
    optimizer = make(model.parameters())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(1, 5):
        before = [b.clone() for b in model[0].buffers()]
        calls.clear()
        optimizer.step(closure)
        assert int(model[1].batches) == int(model[2].num_batches_tracked) == step
        assert not all(map(torch.equal, model[0].buffers(), before))
        assert optimizer.info.iterations > 1 and optimizer.info.evaluations == len(calls)
        # Looking at two kinds of layers took three evaluations each, in the first step only.
        assert len(examined) == len(set(examined)) == 2


@pytest.mark.parametrize("make", [partial(LBFGS, max_iter=8), partial(NewtonCG, max_iter=2)])
def test_a_resumed_run_moves_them_as_the_uninterrupted_one(make: Any) -> None:
    """Looking at the layers, which is done anew, takes nothing of the budget of evaluations."""
    x, y = torch.randn(12, 4).double(), torch.randint(4, (12,))

    def training() -> tuple[nn.Module, Any, Any]:
        model = nn.Sequential(spectral(), _Statistics(), spectral())
        optimizer = make(model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return model, optimizer, closure

    model, optimizer, closure = training()
    for _ in range(2):
        optimizer.step(closure)
    other, resumed, other_closure = training()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(closure)
        resumed.step(other_closure)
        states = model.state_dict(), other.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert resumed.info.iterations == optimizer.info.iterations


def test_an_exception_leaves_them_as_before_the_step() -> None:
    model, x = spectral(), torch.randn(3, 4).double()
    before = [b.clone() for b in model.buffers()]
    step = 0.3 * torch.randn(20).double()
    objective = ClosureObjective(lambda: model(x).square().mean(), model.parameters())
    with pytest.raises(KeyboardInterrupt), objective:
        objective.evaluate()
        for _ in range(2):
            objective.trial(step)
            objective.accept(step)
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.buffers(), before))


def test_they_stand_still_in_eval_mode() -> None:
    model, x = spectral(), torch.randn(3, 4).double()
    registry = ModuleRegistry()
    for training in (True, False):
        model.train(training)
        before = [b.clone() for b in model.buffers()]
        objective = ClosureObjective.for_step(
            lambda: model(x).square().mean(), model.parameters(), registry=registry
        )
        step = 0.3 * torch.randn(20).double()
        with objective:
            objective.evaluate()
            objective.trial(step)
            objective.accept(step)
            assert objective.renewed is training
            if not training:
                assert objective.evaluations == 2
        assert all(map(torch.equal, model.buffers(), before)) is not training


@pytest.mark.parametrize("search", ["strong_wolfe", "hager_zhang", "armijo", None])
def test_lbfgs_minimizes_what_is_trained(search: str | None) -> None:
    """With vectors held for a whole step the loss after it is up to 0.4."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)
        ).double()
        x = torch.randn(64, 8).double()
        y = (x @ torch.randn(8, 3).double()).argmax(1)
        optimizer = LBFGS(
            model.parameters(), max_eval=50, line_search_fn=search, lr=1 if search else 0.1
        )

        def closure(optimizer: Any = optimizer, model: Any = model, x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(4 if search else 8):
            optimizer.step(closure)
        with torch.no_grad():
            for _ in range(30):
                model(x)
            model.eval()
            assert F.cross_entropy(model(x), y) < (1e-4 if search else 0.05)


def test_an_autocast_region_around_the_step_does_not_reuse_casts() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 1), torch.randn(16, 8)
    objective = ClosureObjective(lambda: F.mse_loss(model(x).float(), x[:, :1]), model.parameters())
    step = torch.ones(objective.vector.size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        here, there = objective.evaluate().loss, objective.trial(step).loss
    objective.accept(step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.evaluate().loss == there != here


def test_modules_are_watched_in_the_first_evaluation_of_a_step() -> None:
    from torch.nn.modules import module

    case = make_case("mlp", torch.device("cpu"))
    registry, hooks = ModuleRegistry(), []

    def closure() -> Tensor:
        hooks.append(len(module._global_forward_pre_hooks))
        return case.value()

    for _ in range(2):
        run_step(ClosureObjective.for_step(closure, case.params(), registry=registry), 2)
    assert hooks == [1, 0, 0, 0] * 2


@pytest.mark.slow
def test_compiled_modules_are_watched_without_a_warning() -> None:
    case = make_case("batchnorm", torch.device("cpu"), torch.float32)
    torch.compiler.reset()  # the limit of recompilations counts all tests of a process
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")

    def closure() -> Tensor:
        return F.mse_loss(compiled(case.x), case.y)

    registry = ModuleRegistry()
    for step in range(1, 3):
        run_step(ClosureObjective.for_step(closure, case.params(), registry=registry), 2)
        assert int(case.model[1].num_batches_tracked) == step


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def counted(model: nn.Module) -> int:
    return int(model[1].num_batches_tracked)


@pytest.mark.parametrize("kind", ["factory", "partial", "callable object", "decorated"])
def test_statistics_of_another_model_under_the_same_closure_code(kind: str) -> None:
    x = torch.randn(8, 4)

    def loss_of(model: nn.Module) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    class Closure:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self) -> Tensor:
            return loss_of(self.model)

    def decorated(function):
        def inner() -> Tensor:
            return function()

        return inner

    make = {
        "factory": lambda model: lambda: loss_of(model),
        "partial": lambda model: partial(loss_of, model),
        "callable object": Closure,
        "decorated": lambda model: decorated(lambda: loss_of(model)),
    }[kind]
    registry = ModuleRegistry()
    for _ in range(2):
        model = norm_net()
        for step in range(1, 3):
            objective = ClosureObjective.for_step(
                make(model), model.parameters(), registry=registry
            )
            run_step(objective, 3)
            assert counted(model) == step


def test_statistics_where_the_closure_sets_the_mode_itself() -> None:
    model, x, registry = norm_net(), torch.randn(8, 4), ModuleRegistry()

    def closure() -> Tensor:
        model.train()
        return model(x).square().mean()

    for step in range(1, 4):
        run_step(ClosureObjective.for_step(closure, model.parameters(), registry=registry), 3)
        assert counted(model) == step
        model.eval()


def test_a_buffer_that_moves_only_in_training_and_is_first_seen_in_eval() -> None:
    torch.manual_seed(2)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    x, registry = torch.randn(3, 4), ModuleRegistry()

    def losses() -> list[Tensor]:
        objective = ClosureObjective.for_step(
            lambda: model(x).square().mean(), model.parameters(), registry=registry
        )
        return run_step(objective, 3)

    model.eval()
    losses()
    model.train()
    losses()  # the mode has changed: compared anew
    assert len({loss.item() for loss in losses()}) == 1


def test_modules_of_another_thread_are_none_of_ours() -> None:
    mine, other, x = norm_net(), norm_net(), torch.randn(8, 4)
    registry = ModuleRegistry()

    def closure() -> Tensor:
        thread = threading.Thread(target=lambda: other(x))
        thread.start()
        thread.join()
        return mine(x).square().mean()

    run_step(ClosureObjective.for_step(closure, mine.parameters(), registry=registry), 2)
    assert counted(other) == 4  # as often as it was called
    assert counted(mine) == 1


@pytest.mark.filterwarnings("ignore")  # torch calls TorchScript deprecated
def test_torchscript_modules() -> None:
    model, x = norm_net(), torch.randn(8, 4)
    scripted = torch.jit.trace(model, x, check_trace=False)
    registry = ModuleRegistry()
    before = int(scripted.get_submodule("1").num_batches_tracked)
    for step in range(1, 3):
        objective = ClosureObjective.for_step(
            lambda: scripted(x).square().mean(), scripted.parameters(), registry=registry
        )
        run_step(objective, 2)
        assert int(scripted.get_submodule("1").num_batches_tracked) == before + step


def test_buffers_that_are_made_in_the_first_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d(affine=False), nn.Linear(6, 1))
    x = torch.randn(8, 4)
    run_step(ClosureObjective(lambda: model(x).square().mean(), model.parameters()), 2)
    assert torch.isfinite(model[1].running_mean).all()


def test_a_batch_of_nan_does_not_spoil_the_statistics() -> None:
    model, x = norm_net(), torch.full((8, 4), torch.nan)
    optimizer = LBFGS(model.parameters())
    before = [b.clone() for b in model.buffers()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
