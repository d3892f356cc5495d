"""Steps recorded as CUDA graphs. On the CPU a simulated graph records, undoes and repeats them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.simulated_device import SimulatedDevice
from tests.support.simulated_graph import SimulatedGraph
from torch_secondorder import KFAC, LBFGS, SOAP, AdaHessian, CapturedStep, Shampoo, Sophia
from torch_secondorder._optim.diagonal.replay import HostWaits, kind_of_step
from torch_secondorder.optim import captured_step

CASES = {
    "AdaHessian": (AdaHessian, {"update_period": 4, "weight_decay": 0.1, "n_samples": 2}),
    "AdaHessian, each step": (AdaHessian, {"hessian_power": 0.5}),
    "Sophia": (Sophia, {"update_period": 4, "target_unclipped": 0.5}),
    "Sophia, gnb": (Sophia, {"update_period": 4, "estimator": "gnb", "maximize": False}),
    "SOAP": (SOAP, {"update_period": 4, "block_size": 4, "weight_decay": 0.1}),
    "Shampoo": (Shampoo, {"update_period": 8}),
    "KFAC": (KFAC, {"update_period": 3, "momentum": 0.5, "damping": 0.1}),
    "KFAC, eigenbases": (KFAC, {"update_period": 3, "ekfac": True, "damping": 0.1}),
}
#: The kinds of steps that are recorded.
KINDS = {
    "AdaHessian": ("estimate", "plain"),
    "AdaHessian, each step": ("estimate",),
    "Sophia": ("estimate", "plain"),
    "Sophia, gnb": ("estimate", "plain"),
}
STEPS = 24


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedGraph]:
    """The graphs that are recorded, in the simulation."""
    made: list[SimulatedGraph] = []

    def new_recording(optimizer: Any, stream: Any, generators: Any) -> SimulatedGraph:
        made.append(SimulatedGraph(generators, captured_step.host_counts(optimizer)))
        return made[-1]

    monkeypatch.setattr(captured_step, "can_record", lambda device: True)
    monkeypatch.setattr(captured_step, "new_recording", new_recording)
    return made


class Training:
    """A network that is trained on random batches, with graphs or without."""

    def __init__(
        self,
        kind: Any,
        *,
        captured: bool,
        device: Any = "cpu",
        dropout: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
        if dropout:
            layers.insert(2, nn.Dropout(0.2))
        self.net = nn.Sequential(*layers).to(device)
        options = {"lr": 0.01, "capturable": True, **options}
        self.optimizer = kind(self.net.parameters(), **options)
        self.step = CapturedStep(self.optimizer, self.closure) if captured else self._plain
        self.batches = torch.Generator().manual_seed(1)
        self.device = device

    def _plain(self, *batch: Any) -> Tensor:
        return self.optimizer.step(lambda: self.closure(*batch))

    def closure(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x), y)
        loss.backward()
        return loss

    def batch(self, size: int = 8) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 4, generator=self.batches)[:size]
        y = torch.randint(0, 3, (8,), generator=self.batches)[:size]
        return x.to(self.device), y.to(self.device)

    def run(self, steps: int = STEPS) -> dict[str, Any]:
        """Everything that can be seen of some steps."""
        seen: dict[str, list[Any]] = {"losses": [], "reports": [], "gradients": []}
        for _ in range(steps):
            seen["losses"].append(self.step(*self.batch()))
            seen["reports"].append(str(self.optimizer.info))
            seen["gradients"].append([p.grad.clone() for p in self.net.parameters()])
        return seen | {"parameters": list(self.net.parameters())}


def run_all(step: CapturedStep, training: Training) -> None:
    for _ in range(STEPS):
        step(*training.batch())


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_bit_for_bit(case: str, graphs: list[SimulatedGraph]) -> None:
    kind, options = CASES[case]
    plain, captured = (Training(kind, captured=c, **options) for c in (False, True))
    expected, found = plain.run(), captured.run()
    reports = expected.pop("reports"), found.pop("reports")
    assert reports[0] == reports[1]
    assert_same(found, expected)
    assert captured.step.captured == KINDS.get(case, ("plain",)) and not captured.step.reason
    assert sum(graph.replays for graph in graphs) >= 8
    saved = [training.optimizer.state_dict() for training in (plain, captured)]
    assert_same(saved[1]["state"], saved[0]["state"])


def test_random_numbers_of_the_closure_go_on(graphs: list[SimulatedGraph]) -> None:
    runs = []
    for captured in (False, True):
        training = Training(AdaHessian, captured=captured, dropout=True, update_period=3)
        torch.manual_seed(5)
        runs.append(training.run()["losses"])
    assert_same(*runs)
    assert len(graphs) == 2


@pytest.mark.parametrize("tensor", [False, True])
def test_schedules_of_the_learning_rate(tensor: bool, graphs: list[SimulatedGraph]) -> None:
    runs = []
    for captured in (False, True):
        rate = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
        training = Training(AdaHessian, captured=captured, lr=rate, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.8)
        for _ in range(STEPS):
            training.step(*training.batch())
            assert isinstance(training.optimizer.param_groups[0]["lr"], Tensor) is tensor
            schedule.step()
        runs.append(list(training.net.parameters()))
    assert_same(*runs)
    assert len(graphs) == 1


def test_batches_of_another_size_run_as_usual(graphs: list[SimulatedGraph]) -> None:
    runs = []
    for captured in (False, True):
        training = Training(AdaHessian, captured=captured, update_period=2)
        for step in range(STEPS):
            training.step(*training.batch(5 if step % 8 == 7 else 8))
        runs.append(list(training.net.parameters()))
    assert_same(*runs)
    assert len(graphs) == 2


def change_betas(training: Training) -> None:
    training.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def load(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def freeze(training: Training) -> None:
    training.net[0].weight.requires_grad_(False)
    training.optimizer.zero_grad()


def replace_memory(training: Training) -> None:
    for p in training.net.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize("change", [change_betas, load, freeze, replace_memory])
def test_changes_between_steps_are_noticed(change: Any, graphs: list[SimulatedGraph]) -> None:
    runs = []
    for captured in (False, True):
        training = Training(Sophia, captured=captured, update_period=2)
        for _ in range(2):
            for _ in range(16):
                training.step(*training.batch())
            change(training)
        for _ in range(16):
            training.step(*training.batch())
        runs.append(list(training.net.parameters()))
    assert_same(*runs)
    assert len(graphs) == (4 if change in (change_betas, freeze) else 6)


def test_losses_and_gradients_that_are_kept_do_not_change(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)
    losses, values = [], []
    for _ in range(STEPS):
        losses.append(training.step(*training.batch()))
        values.append(losses[-1].item())
    assert [loss.item() for loss in losses] == values and len({*values}) == STEPS
    assert graphs[0].replays > 5


def test_a_step_in_between_without_a_graph(graphs: list[SimulatedGraph]) -> None:
    runs = []
    for captured in (False, True):
        training = Training(AdaHessian, captured=captured, update_period=3)
        for step in range(STEPS):
            make = training._plain if step % 7 == 6 else training.step
            make(*training.batch())
        runs.append(list(training.net.parameters()))
    assert_same(*runs)
    assert len(graphs) == 2


def test_batches_are_any_trees(graphs: list[SimulatedGraph]) -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([x], lr=0.01, capturable=True)

    def closure(batch: dict[str, Tensor], scale: float) -> Tensor:
        optimizer.zero_grad()
        loss = scale * ((x * batch["a"]) ** 2).sum() + batch["b"][0].sum()
        loss.backward()
        return loss

    step = CapturedStep(optimizer, closure, warm_up=1)
    for i in range(14):
        loss = step({"a": torch.full((3,), float(i)), "b": (torch.ones(2),)}, 2.0)
        assert loss.item() == pytest.approx(2 * i**2 * x.square().sum().item() + 2, rel=0.2)
    assert step.captured and graphs[0].replays
    step({"a": torch.ones(3), "b": (torch.ones(2),)}, 3.0)  # another number: not of the graph
    replays = graphs[0].replays
    step({"a": torch.ones(3), "b": (torch.ones(2),)}, 2.0)
    assert graphs[0].replays == replays + (len(graphs) == 1)


def test_a_closure_that_waits_runs_as_usual(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)
    closure = training.closure

    def printing(x: Tensor, y: Tensor) -> Tensor:
        loss = closure(x, y)
        loss.item()
        return loss

    step = CapturedStep(training.optimizer, printing)
    with pytest.warns(UserWarning, match=r"AdaHessian run without CUDA graphs: aten::_local_sca"):
        run_all(step, training)
    assert not graphs and "item()" in step.reason and step.captured == ()
    expected = Training(AdaHessian, captured=False).run()
    assert_same(list(training.net.parameters()), expected["parameters"])


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x[x > 0].sum(), "index"),
        (lambda x: x.nonzero().sum(), "nonzero"),
        (lambda x: x.unique().sum(), "unique"),
        (lambda x: x.clone().index_put_((x[:, 0] > 0,), x[:1]), "index_put"),
        (lambda x: torch.linalg.eigvalsh(x.T @ x), "_linalg_eigh"),
        (lambda x: torch.linalg.cholesky(x.T @ x + torch.eye(x.shape[1])), "_linalg_check_errors"),
    ],
)
def test_operations_that_wait(operation: Any, name: str, graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        operation(x)
        return training.closure(x, y)

    step = CapturedStep(training.optimizer, closure)
    with pytest.warns(UserWarning, match=name):
        run_all(step, training)
    assert not graphs


def test_masks_that_are_filled_with_a_number_wait_for_nothing(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[x > 0] = 0.0
        return training.closure(x, y)

    step = CapturedStep(training.optimizer, closure)
    run_all(step, training)
    assert step.captured and not step.reason


def test_gradients_that_are_zeros_are_looked_at(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True, update_period=3)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(training.net(x), y)
        loss.backward()
        return loss

    step = CapturedStep(training.optimizer, closure)

    def run() -> None:
        for _ in range(STEPS):
            training.optimizer.zero_grad(set_to_none=False)
            step(*training.batch())

    with pytest.warns(UserWarning, match=r"leave out item.*zero_grad\(set_to_none=False\)"):
        run()
    assert not graphs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fullgraph", "higher order"])
def test_closures_that_run_compiled_or_higher_order_operations(kind: str) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def loss_of(x: Tensor) -> Tensor:
        return x.sin().sum()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 1, 16, 16)
    with HostWaits() as waits:
        result = compiled(x) if kind == "fullgraph" else flex.flex_attention(x, x, x).sum()
    assert bool(result.isfinite()) and not waits.found


def test_batches_come_to_the_device_also_where_no_step_is_recorded() -> None:
    with SimulatedDevice():
        training = Training(AdaHessian, captured=True, device="cuda", capturable=False)
        training.device = "cpu"  # of the batches
        with pytest.warns(UserWarning, match="capturable=False"):
            losses = [training.step(*training.batch()) for _ in range(3)]
        assert all(loss.is_cuda for loss in losses) and training.step.reason


def test_parameters_on_several_devices() -> None:
    with SimulatedDevice():
        params = [nn.Parameter(torch.ones(2, device=device)) for device in ("cuda", "cpu")]
        optimizer = AdaHessian(params, capturable=True)
        devices = []

        def closure(x: Tensor) -> Tensor:
            devices.append(x.device.type)
            optimizer.zero_grad()
            loss = params[0].square().sum() + params[1].square().sum().to("cuda")
            loss.backward()
            return loss

        step = CapturedStep(optimizer, closure)
        with pytest.warns(UserWarning, match="parameters are on several devices"):
            step(torch.ones(2))
        assert devices == ["cpu"]


def test_decisions_on_the_host(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True, capturable=False)
    with pytest.warns(UserWarning, match="capturable=False lets the host decide"):
        training.run(2)
    assert training.step.reason


def test_hooks_of_steps_are_called_each_time(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)
    calls: list[Any] = []
    training.optimizer.register_step_post_hook(lambda *_: calls.append(None))
    with pytest.warns(UserWarning, match="hooks of steps are not called"):
        training.run()
    assert len(calls) == STEPS and not graphs


def test_a_recording_that_fails(
    graphs: list[SimulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SimulatedGraph):
        def record(self, run: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured_step, "new_recording", lambda *_: Failing())
    training = Training(AdaHessian, captured=True)
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph; call optimizer"):
        training.run()
    assert training.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("case", ["AdaHessian", "SOAP", "KFAC"])
def test_training_goes_on_after_a_recording_that_failed_at_its_end(
    case: str, graphs: list[SimulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SimulatedGraph):
        def record(self, run: Any) -> Any:
            super().record(run)
            raise RuntimeError("operation failed due to a previous error during capture")

    def new_recording(optimizer: Any, stream: Any, generators: Any) -> Failing:
        return Failing(generators, captured_step.host_counts(optimizer))

    monkeypatch.setattr(captured_step, "new_recording", new_recording)
    kind, options = CASES[case]
    plain, captured = (Training(kind, captured=c, **options) for c in (False, True))
    failures = 0
    for _ in range(STEPS):
        batch = plain.batch()
        plain.step(*batch)
        gradients = [p.grad for p in captured.net.parameters()]
        try:
            captured.step(*batch)
        except RuntimeError:
            failures += 1
            for p, gradient in zip(captured.net.parameters(), gradients, strict=True):
                assert p.grad is gradient
            captured._plain(*batch)
    assert failures > 3
    assert_same(list(captured.net.parameters()), list(plain.net.parameters()))
    saved = [training.optimizer.state_dict() for training in (plain, captured)]
    assert_same(saved[1]["state"], saved[0]["state"])


def test_rates_are_checked_when_they_change(graphs: list[SimulatedGraph]) -> None:
    training = Training(AdaHessian, captured=True)
    training.run()
    before = [p.clone() for p in training.net.parameters()]
    replays = graphs[0].replays
    for bad in (-1.0, float("nan")):
        training.optimizer.param_groups[0]["lr"] = bad
        with pytest.raises(ValueError, match="lr must be"):
            training.step(*training.batch())
    assert_same(list(training.net.parameters()), before)
    training.optimizer.param_groups[0]["lr"] = 0.02
    training.step(*training.batch())
    assert graphs[0].replays == replays + 1


def test_a_checkpoint_between_replays(graphs: list[SimulatedGraph]) -> None:
    first = Training(AdaHessian, captured=True, update_period=3, n_samples=2)
    first.run(17)
    second = Training(AdaHessian, captured=True, update_period=3, n_samples=2)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.batches.set_state(first.batches.get_state())
    expected, found = first.run(), second.run()
    assert expected.pop("reports") == found.pop("reports")
    assert_same(found, expected)
    assert len(graphs) == 4


def test_where_there_are_no_graphs_steps_run_as_usual() -> None:
    expected = Training(AdaHessian, captured=False, capturable=None).run()
    training = Training(AdaHessian, captured=True, capturable=None)
    found = training.run()
    assert expected.pop("reports") == found.pop("reports")
    assert_same(found, expected)
    assert training.step.captured == () and not training.step.reason


def test_arguments() -> None:
    x = nn.Parameter(torch.ones(2))
    for other in (torch.optim.Adam([x]), LBFGS([x])):
        with pytest.raises(TypeError, match=f"KFAC, got {type(other).__name__}: others decide"):
            CapturedStep(other, print)
    with pytest.raises(TypeError, match="closure must be callable, got int"):
        CapturedStep(AdaHessian([x]), 3)
    with pytest.raises(ValueError, match="warm_up must be"):
        CapturedStep(AdaHessian([x]), print, warm_up=0)


# On a device.


@pytest.mark.parametrize("case", CASES)
def test_steps_that_are_recorded_wait_for_nothing(case: str) -> None:
    """Nor do they send anything to the device: a graph would send the same again."""
    kind, options = CASES[case]
    kinds = set()
    with SimulatedDevice() as simulated:
        training = Training(kind, captured=False, device="cuda", **{**options, "capturable": None})
        for _ in range(STEPS):
            of_step, batch = kind_of_step(training.optimizer), training.batch()
            simulated.reads.clear()
            simulated.uploads.clear()
            training._plain(*batch)
            if of_step is not None:
                kinds.add(of_step)
                assert not simulated.reads, str(simulated.reads[0])
                assert not simulated.uploads, str(simulated.uploads[0])
    assert tuple(sorted(kinds)) == KINDS.get(case, ("plain",))


def test_a_rate_on_the_device_is_read_only_after_a_change() -> None:
    with SimulatedDevice() as simulated:
        rate = torch.tensor(0.01, device="cuda")
        training = Training(AdaHessian, captured=False, device="cuda", lr=rate)
        reads = []
        for step in range(16):
            batch = training.batch()
            simulated.reads.clear()
            if step == 14:
                rate.mul_(0.5)
            training._plain(*batch)
            reads.append(len(simulated.reads))
        assert reads[10:] == [0, 0, 0, 0, 1, 0]
        rate.mul_(-1)
        with pytest.raises(ValueError, match="lr must be"):
            training._plain(*batch)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_real_graphs(case: str) -> None:
    kind, options = CASES[case]
    options = {**options, "capturable": None, "device": "cuda"}
    plain, captured = (Training(kind, captured=c, **options) for c in (False, True))
    expected, found = plain.run(40), captured.run(40)
    del expected["reports"], found["reports"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert captured.step.captured == KINDS.get(case, ("plain",)) and not captured.step.reason


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [SOAP, Shampoo])
def test_the_recipe_of_torch(kind: Any) -> None:
    """`torch.cuda.graph` around a whole step, of an optimizer whose next steps are all alike."""
    training = Training(kind, captured=False, capturable=None, device="cuda", update_period=1000)
    x, y = training.batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            training._plain(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    other = copy.deepcopy(training)
    other.optimizer = type(training.optimizer)(other.net.parameters(), lr=0.01, update_period=1000)
    other.optimizer.load_state_dict(training.optimizer.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training._plain(x, y)
    for _ in range(5):
        graph.replay()
        other._plain(x, y)
    torch.testing.assert_close(
        list(training.net.parameters()), list(other.net.parameters()), rtol=1e-4, atol=1e-5
    )
