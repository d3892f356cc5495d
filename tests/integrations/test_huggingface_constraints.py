"""Constraints in the Hugging Face Trainer and under Accelerate, offline, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.diagonal_references import assert_same, values
from torch_secondorder import LBFGS, AdaHessian, Constrained, Projected
from torch_secondorder.constraints import NormBall, UnitNorm

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from tests.support.huggingface_problems import SHORT, bert, classes  # noqa: E402
from torch_secondorder.integrations.huggingface import SecondOrderCallback, unwrapped  # noqa: E402

#: The optimizers inside; the Trainer calls no closure.
INNER: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "AdaHessian": lambda p: AdaHessian(p, lr=0.02),
}


@pytest.fixture(autouse=True)
def _singletons_are_made_anew() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def constrained(optimizer: Any, model: Any) -> Constrained:
    """The embeddings are short, and the biases of the classifier have the mean 0.1."""
    return Constrained(
        optimizer,
        equalities=lambda: model.classifier.bias.mean() - 0.1,
        inequalities={
            "short": lambda: model.bert.embeddings.word_embeddings.weight.square().sum() - 0.5
        },
        penalty=10.0,
    )


def projected(optimizer: Any, model: Any) -> Projected:
    """The embeddings of words are unit vectors, the classifier has short rows."""
    words = model.bert.embeddings.word_embeddings.weight
    sets = [(words, UnitNorm(dim=1)), (model.classifier.weight, NormBall(0.05, dim=1))]
    return Projected(optimizer, sets[:1] if isinstance(optimizer, LBFGS) else sets)


WRAPPERS: dict[str, Callable[[Any, Any], Any]] = {
    "Constrained": constrained,
    "Projected": projected,
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def trainer_of(
    folder: Path, model: nn.Module, name: str, wrapper: str = "Constrained", **options: Any
) -> Any:
    optimizer = WRAPPERS[wrapper](INNER[name](model.parameters()), model)
    args = TrainingArguments(str(folder), **{**SHORT, **options})
    return Trainer(model, args, train_dataset=classes(), optimizers=(optimizer, None))


def state_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    optimizer = unwrapped(optimizer)
    multipliers = optimizer.multipliers.values() if isinstance(optimizer, Constrained) else []
    return [*values(model), *multipliers]


@wrappers
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("parts", [1, 4])
def test_training_is_that_of_a_loop_by_hand(
    wrapper: str, name: str, parts: int, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, bert(), name, wrapper, gradient_accumulation_steps=parts)
    trainer.loss_is_scaled_for_ga = False  # the model's loss is a mean whatever it is told
    trainer.train()
    model = bert()
    optimizer = WRAPPERS[wrapper](INNER[name](model.parameters()), model)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)
    model.train()
    rows = classes()
    for step in range(6):
        optimizer.zero_grad()
        for i in range(parts):
            pair = rows[2 * (parts * step + i) :][:2]
            batch = {k: torch.stack([row[k] for row in pair]) for k in pair[0]}
            (model(**batch).loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the loss's, without the constraints'
        optimizer.step()
        schedule.step()
    found = state_of(trainer.model, trainer.optimizer)
    assert_same(found, state_of(model, optimizer), 1e-9)
    assert not torch.equal(bert().classifier.bias, trainer.model.classifier.bias)
    if wrapper == "Constrained":
        assert any(y.abs().max() > 0 for y in optimizer.multipliers.values())
    else:
        assert optimizer.info.violation < 1e-12
        rows = trainer.model.bert.embeddings.word_embeddings.weight.norm(dim=1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


@wrappers
@pytest.mark.parametrize("name", INNER)
def test_training_from_a_checkpoint_is_bit_for_bit_the_same(
    wrapper: str, name: str, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole = trainer_of(tmp_path / "a", bert(), name, wrapper, **saving)
    whole.train()
    saved = tmp_path / "a" / "checkpoint-3"
    entries = torch.load(saved / "optimizer.pt", weights_only=True)
    assert "constrained" in entries or "projected" in entries
    other = trainer_of(tmp_path / "b", bert(), name, wrapper, max_steps=7)
    for p in other.model.parameters():
        nn.init.zeros_(p)
    other.train(resume_from_checkpoint=str(saved))
    assert other.state.global_step == 7
    expected = state_of(whole.model, whole.optimizer)
    assert_same(state_of(other.model, other.optimizer), expected, 0)


@pytest.mark.slow
def test_the_constraints_hold_after_training(tmp_path: Path) -> None:
    options = {"max_steps": 150, "warmup_steps": 0, "num_train_epochs": 5}
    trainer = trainer_of(tmp_path, bert(), "AdamW", **options)
    trainer.train()
    assert trainer.model.classifier.bias.mean().item() == pytest.approx(0.1, abs=3e-3)
    embeddings = trainer.model.bert.embeddings.word_embeddings.weight
    assert embeddings.square().sum() < 0.55


@wrappers
@pytest.mark.parametrize("name", ["LBFGS", "AdamW"])
def test_closures_under_accelerate(wrapper: str, name: str) -> None:
    rows = classes(16)
    x, y = (torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels"))
    make = {**INNER, "LBFGS": lambda p: LBFGS(p, max_iter=4)}[name]

    def run(accelerates: bool) -> list[Tensor]:
        model = bert()
        inner = optimizer = WRAPPERS[wrapper](make(model.parameters()), model)
        backward: Any = lambda loss: loss.backward()  # noqa: E731
        if accelerates:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, inner)
            assert unwrapped(optimizer) is inner
            backward = accelerator.backward
        model.train()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=y).loss
            backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return state_of(model, inner)

    assert_same(run(True), run(False), 0)


def test_the_callback_leaves_a_wrapper_alone(tmp_path: Path) -> None:
    """It serves optimizers that watch backward passes; constraints need nothing of it."""
    found = []
    for watches in (True, False):
        trainer = trainer_of(tmp_path, bert(), "AdamW")
        if watches:
            trainer.add_callback(SecondOrderCallback(trainer))
        trainer.train()
        found.append(state_of(trainer.model, trainer.optimizer))
    assert_same(found[0], found[1], 0)
