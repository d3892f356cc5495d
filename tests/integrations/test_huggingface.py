"""The Hugging Face Trainer and Accelerate, offline, on tiny models with random weights."""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from tests.support.diagonal_references import assert_moved, assert_same, values
from tests.support.examples import run_example
from torch_secondorder import KFAC, LBFGS, SOAP, AdaHessian, NewtonCG, Sophia, StepStatus

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from tests.support.huggingface_problems import SHORT, bert, classes, texts  # noqa: E402
from torch_secondorder.integrations.huggingface import SecondOrderCallback, unwrapped  # noqa: E402

Make = Callable[..., Any]

# With an `eps` above the rounding in gradients that are zero, those of biases of attention keys.
SOPHIA = {"lr": 0.01, "gamma": 1.0, "update_period": 2, "eps": 1e-4}

#: Class and arguments, as `optimizer_cls_and_kwargs` takes them.
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "AdaHessian": (AdaHessian, {"lr": 0.02, "update_period": 2}),
    "Sophia": (Sophia, {**SOPHIA}),
    "Sophia-G": (Sophia, {**SOPHIA, "estimator": "gnb"}),
}
every = pytest.mark.parametrize("kind", [*KINDS])
KINDS |= {
    "SOAP": (SOAP, {"lr": 0.01, "eps": 1e-4, "update_period": 2}),
    "KFAC": (KFAC, {"damping": 0.1, "update_period": 2}),
}
every_and_more = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _singletons_are_made_anew() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def llama(dropout: float = 0.0, **options: Any) -> nn.Module:
    """A language model of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=dropout,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def trainer_of(
    folder: Path, model: nn.Module, kind: str | None = None, watches: bool = True, **options: Any
) -> Any:
    more = {name: options.pop(name) for name in ("optimizers",) if name in options}
    data = options.pop("data", None) or texts()
    if kind is not None:
        more["optimizer_cls_and_kwargs"] = copy.deepcopy(KINDS[kind])
    args = TrainingArguments(str(folder), **{**SHORT, **options})
    trainer = Trainer(model, args, train_dataset=data, **more)
    if watches:
        trainer.add_callback(SecondOrderCallback(trainer))
    return trainer


def by_hand(model: nn.Module, optimizer: Any, steps: int, parts: int, data: Any) -> list[Tensor]:
    """Training as by the Trainer, with a closure: accumulation, clipping, warm-up and decay."""
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, steps)
    model.train()
    for step in range(steps):
        rows = data[2 * parts * step :][: 2 * parts]

        def closure(rows: Any = rows) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for i in range(parts):
                batch = {k: torch.stack([r[k] for r in rows[2 * i : 2 * i + 2]]) for k in rows[0]}
                loss = model(**batch).loss / parts
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return total

        optimizer.step(closure)
        schedule.step()
    return values(model)


def groups(model: nn.Module, decay: float = 0.0) -> list[dict[str, Any]]:
    """As the Trainer makes them."""
    from transformers.trainer_pt_utils import get_parameter_names

    named = dict(model.named_parameters())
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decays = get_parameter_names(model, [nn.LayerNorm], forbidden)
    return [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]


# Training.


@every_and_more
@pytest.mark.parametrize("parts", [1, 4])
def test_a_classifier_is_trained_as_by_closures(kind: str, parts: int, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        bert(),
        kind,
        data=classes(),
        gradient_accumulation_steps=parts,
        weight_decay=0.1,
    )
    trainer.loss_is_scaled_for_ga = False  # the model's loss is a mean whatever it is told
    trainer.train()
    assert unwrapped(trainer.optimizer).info.status is StepStatus.MOVED
    model = bert()
    make, options = KINDS[kind]
    expected = by_hand(model, make(groups(model, 0.1), **options), 6, parts, classes())
    assert_same(values(trainer.model), expected, 1e-9)
    assert_moved(values(trainer.model), values(bert()))


@every
@pytest.mark.parametrize("make", [llama, gpt2])
def test_language_models_are_trained_as_by_closures(kind: str, make: Make, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, make(), kind, gradient_accumulation_steps=4)
    trainer.train()
    model = make()
    kind_of, options = KINDS[kind]
    expected = by_hand(model, kind_of(groups(model), **options), 6, 4, texts())
    assert_same(values(trainer.model), expected, 1e-5)


@every
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    """Autocast rounds, and little else."""
    rounded, exact = (
        trainer_of(tmp_path, llama(), kind, bf16=narrow, gradient_accumulation_steps=2)
        for narrow in (True, False)
    )
    for trainer in (rounded, exact):
        trainer.train()
        assert unwrapped(trainer.optimizer).info.status is StepStatus.MOVED
    ours, theirs, start = (
        torch.cat([v.flatten() for v in values(m)]) for m in (rounded.model, exact.model, llama())
    )
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.2 * (theirs - start).norm()


@every_and_more
def test_training_from_a_checkpoint_is_bit_for_bit_the_same(kind: str, tmp_path: Path) -> None:
    whole = trainer_of(
        tmp_path / "a", gpt2(0.1), kind, save_strategy="steps", save_steps=3, max_steps=7
    )
    whole.train()
    saved = tmp_path / "a" / "checkpoint-3"
    assert torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    other = trainer_of(tmp_path / "b", gpt2(0.1), kind, max_steps=7)
    for p in other.model.parameters():
        nn.init.zeros_(p)
    other.train(resume_from_checkpoint=str(saved))
    assert other.state.global_step == 7
    assert_same(values(other.model), values(whole.model), 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = llama()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    trainer = trainer_of(tmp_path, model, "AdaHessian", max_steps=2)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=True; False works"):
            trainer.train()
        return
    trainer.train()
    plain = trainer_of(tmp_path, llama(), "AdaHessian", max_steps=2)
    plain.train()
    assert_same(values(trainer.model), values(plain.model), 1e-6)


def test_an_optimizer_made_in_advance(tmp_path: Path) -> None:
    model, steps = llama(), []

    class Losses(TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
            steps.append((unwrapped(optimizer).info.products, unwrapped(optimizer).curvature_due))

    optimizer = Sophia(model.parameters(), update_period=3)
    trainer = trainer_of(tmp_path, model, optimizers=(optimizer, None))
    trainer.add_callback(Losses())
    trainer.train()
    assert unwrapped(trainer.optimizer) is optimizer
    assert steps == [(1, False), (0, False), (0, True)] * 2
    trainer.train()  # once more
    assert "training_step" not in vars(trainer)


def test_other_optimizers_are_ignored(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append("training_step" in vars(trainer))

    trainer = trainer_of(tmp_path, llama(), max_steps=1)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [False]


def live_graphs() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) and o.grad_fn is not None for o in gc.get_objects())


@every
def test_no_graph_is_left(kind: str, tmp_path: Path) -> None:
    before, found = live_graphs(), []

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.append(live_graphs() - before)

    trainer = trainer_of(tmp_path, llama(), kind, max_steps=3, gradient_accumulation_steps=2)
    trainer.add_callback(Count())
    trainer.train()
    assert found == [0, 0, 0]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    model = llama()
    trainer = trainer_of(tmp_path, model, "Sophia-G")
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.forward = fails
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert _get_current_function_mode_stack() == []
    other = nn.Linear(2, 2)
    F.mse_loss(other(torch.ones(1, 2)), torch.zeros(1, 2)).backward()
    assert other.weight.grad is not None
    trainer.train()
    assert trainer.state.global_step == 6


# Rejected settings and arguments.


@pytest.mark.parametrize("kind", [LBFGS, NewtonCG])
@pytest.mark.parametrize("watches", [True, False])
def test_optimizers_that_need_a_closure(kind: Any, watches: bool, tmp_path: Path) -> None:
    model = llama()
    optimizers = (kind(model.parameters()), None)
    trainer = trainer_of(tmp_path, model, watches=watches, optimizers=optimizers)
    name = kind.__name__
    message = rf"use SOAP, Shampoo, KFAC, AdaHessian or Sophia here(.|\n)*works for {name}"
    if not watches:
        message = rf"{name}.step\(\) evaluates the loss more than once and needs a closure"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


@every
def test_the_callback_is_not_needed(kind: str, tmp_path: Path) -> None:
    """Without the callback, fused attention is differentiated by its saved tensors."""
    results = []
    for watches in (False, True):
        trainer = trainer_of(
            tmp_path, llama(), kind, watches=watches, gradient_accumulation_steps=2, max_steps=3
        )
        trainer.train()
        results.append(values(trainer.model))
    assert_same(*results, 1e-4)


def test_float16(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, llama(), "Sophia", fp16=True)
    with pytest.raises(RuntimeError, match=r"Sophia with fp16=True(.|\n)*bf16=True"):
        trainer.train()


def test_engines_with_their_own_backward_are_rejected(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, llama(), "Sophia")
    trainer.create_optimizer()
    trainer.accelerator.state.distributed_type = DistributedType.DEEPSPEED
    callback = SecondOrderCallback(trainer)
    with pytest.raises(RuntimeError, match="Sophia under DEEPSPEED"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(("engine", "version", "runs"), [("FSDP", 1, False), ("FSDP", 2, True)])
def test_engines_that_keep_matrices_give_gradients_to_soap(
    engine: str, version: int, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 shards matrices, which SOAP steps; FSDP1 makes vectors of them."""
    trainer = trainer_of(tmp_path, llama(), "SOAP")
    trainer.create_optimizer()
    trainer.accelerator.state.distributed_type = DistributedType(engine)
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", version == 2)
    callback = SecondOrderCallback(trainer)
    if runs:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        callback.on_train_end(trainer.args, trainer.state, trainer.control)
        return
    with pytest.raises(RuntimeError, match=f"SOAP under {engine}(.|\n)*fsdp_version=2"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_float16_scales_for_soap(tmp_path: Path) -> None:
    """A loss scale is removed from gradients, which are all that SOAP takes."""
    trainer = trainer_of(tmp_path, llama(), "SOAP", fp16=True)
    trainer.create_optimizer()
    SecondOrderCallback(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_an_argument_that_is_not_a_trainer_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"got Linear: trainer.add_callback"):
        SecondOrderCallback(nn.Linear(1, 1))


# Accelerate.


@pytest.mark.parametrize(
    "make",
    [
        lambda params: LBFGS(params, max_iter=4),
        lambda params: NewtonCG(params, max_cg_iter=5),
        lambda params: NewtonCG(params, curvature="hessian", max_cg_iter=5),
        lambda params: AdaHessian(params, lr=0.02),
        lambda params: Sophia(params, lr=0.01, estimator="gnb", update_period=2),
    ],
    ids=["LBFGS", "NewtonCG", "NewtonCG-Hessian", "AdaHessian", "Sophia-G"],
)
def test_closures_under_accelerate(make: Make) -> None:
    data = classes(16)
    x, y = (torch.stack([row[k] for row in data]) for k in ("input_ids", "labels"))

    def run(accelerates: bool) -> list[Tensor]:
        model = bert()
        inner = optimizer = make(model.parameters())
        backward, parts = (lambda loss: loss.backward()), [slice(0, 8), slice(8, 16)]
        if accelerates:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, inner)
            assert unwrapped(optimizer) is inner
            backward = accelerator.backward
        model.train()

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = []
            for part in parts:
                loss = model(input_ids=x[part], labels=y[part]).loss / len(parts)
                backward(loss)
                losses.append(loss.detach())
            return sum(losses)

        for _ in range(3):
            optimizer.step(closure)
        assert inner.info.loss < 1.2
        return values(model)

    assert_same(run(True), run(False), 0)


@every
def test_accumulation_under_accelerate(kind: str) -> None:
    data = classes(32)
    make, options = KINDS[kind]
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = bert()
    inner = make(model.parameters(), **options)
    schedule = transformers.get_linear_schedule_with_warmup(inner, 2, 4)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, inner, loader, schedule)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model), inner.watching():
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    plain = bert()
    expected = by_hand(plain, make(plain.parameters(), **options), 4, 4, data)
    assert_same(values(model), expected, 1e-9)


def test_the_package_imports_neither_transformers_nor_accelerate() -> None:
    program = (
        "import torch_secondorder, sys; print({'transformers', 'accelerate'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    arguments = ("--steps", "4", "--width", "8", "--optimizers", "sophia-gnb,adahessian")
    done = run_example(*arguments, cwd=tmp_path, script="huggingface_trainer.py")
    assert done.returncode == 0, done.stderr
    header, _, ours, other = done.stdout.splitlines()[1:]
    assert header.split()[0] == "optimizer" and "validation" in header
    assert ours.startswith("Sophia gnb (ours)") and other.startswith("AdaHessian (ours)")
    assert float(ours.split()[-2]) < 5.0
    assert list(tmp_path.iterdir()) == []
