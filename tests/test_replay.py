"""All evaluations of a step see the same model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles import make_case
from torch_secondorder.evaluation import Objective
from torch_secondorder.objective import ClosureObjective, FunctionalObjective
from torch_secondorder.replay import Surroundings


def run_step(objective: Objective, evaluations: int, curvature: bool = False) -> list[Tensor]:
    """Losses at the same point, and at trial points in between."""
    losses = []
    with objective:
        for _ in range(evaluations):
            losses.append(objective.evaluate(curvature=curvature).loss)
            objective.trial(100 * torch.ones(objective.vector.size, dtype=objective.vector.dtype))
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
    surroundings = Surroundings()
    for _ in range(steps):
        plain.value()
        if kind == "closure":
            objective: Objective = ClosureObjective(
                case.closure(), case.params(), surroundings=surroundings
            )
        else:
            pure = case.pure()
            objective = FunctionalObjective(
                lambda p: pure(*p),  # noqa: B023
                case.params(),
                surroundings=surroundings,
            )
        run_step(objective, 3, curvature=True)
    assert int(case.model[1].num_batches_tracked) == steps
    for ours, theirs in zip(case.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_of_a_layer_that_is_set_to_train_later() -> None:
    case = make_case("batchnorm", torch.device("cpu"))
    surroundings = Surroundings()
    case.model.eval()
    run_step(ClosureObjective(case.closure(), case.params(), surroundings=surroundings), 2)
    case.model.train()
    run_step(ClosureObjective(case.closure(), case.params(), surroundings=surroundings), 2)
    assert int(case.model[1].num_batches_tracked) == 1


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
    surroundings = Surroundings()
    for step in range(1, 4):
        objective = ClosureObjective(lambda: model(), model.parameters(), surroundings=surroundings)
        losses = run_step(objective, 3)
        assert [loss.item() for loss in losses] == [2.0 * step**2] * 3
        assert model.calls.item() == step


def test_spectral_norm_iterates_once_a_step() -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    model, plain, x = make(), make(), torch.randn(3, 4)
    surroundings = Surroundings()
    for _ in range(3):
        plain(x)
        objective = ClosureObjective(
            lambda: model(x).square().mean(), model.parameters(), surroundings=surroundings
        )
        run_step(objective, 2)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


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


def test_modules_are_watched_only_in_the_first_evaluation() -> None:
    from torch.nn.modules import module

    case = make_case("mlp", torch.device("cpu"))
    surroundings, hooks = Surroundings(), []

    def closure() -> Tensor:
        hooks.append(len(module._global_forward_pre_hooks))
        return case.value()

    for _ in range(2):
        run_step(ClosureObjective(closure, case.params(), surroundings=surroundings), 2)
    assert hooks == [1] + [0] * 7


@pytest.mark.slow
def test_compiled_modules_are_watched_without_a_warning() -> None:
    case = make_case("batchnorm", torch.device("cpu"), torch.float32)
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")

    def closure() -> Tensor:
        return F.mse_loss(compiled(case.x), case.y)

    surroundings = Surroundings()
    for step in range(1, 3):
        run_step(ClosureObjective(closure, case.params(), surroundings=surroundings), 2)
        assert int(case.model[1].num_batches_tracked) == step
