"""Trains a small GPT-2 with the Hugging Face Trainer, by AdamW, Sophia and AdaHessian.

The model has random weights and the text comes with Python (see _char_lm.py), so nothing is
downloaded. The Trainer is the library's own, with gradient accumulation, clipping, warm-up and a
cosine schedule. Sophia and AdaHessian need one more line, the callback.

    python examples/huggingface_trainer.py
    python examples/huggingface_trainer.py --optimizers sophia-gnb --steps 1000

Needs `transformers` and `accelerate`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_secondorder
from _char_lm import Text, load_text
from _command_line import names_among, positive
from _report import format_table

try:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from torch_secondorder.integrations.huggingface import SecondOrderCallback, unwrapped
except ModuleNotFoundError as error:
    sys.exit(f"huggingface_trainer: {error}; pip install transformers accelerate")

CONTEXT, BATCH, ACCUMULATION = 64, 8, 2

#: Class and arguments for the Trainer; the learning rates are the best of a few, on 250 steps.
CONTENDERS: dict[str, tuple[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]]] = {
    "adamw": ("AdamW", (torch.optim.AdamW, {"lr": 4e-3})),
    "sophia-gnb": (
        "Sophia gnb (ours)",
        (torch_secondorder.Sophia, {"lr": 5e-4, "estimator": "gnb"}),
    ),
    "sophia-hutchinson": ("Sophia hutchinson (ours)", (torch_secondorder.Sophia, {"lr": 5e-4})),
    "adahessian": (
        "AdaHessian (ours)",
        (torch_secondorder.AdaHessian, {"lr": 0.4, "update_period": 5}),
    ),
}


def windows(text: Tensor) -> list[dict[str, Tensor]]:
    """Cuts a text into pieces of `CONTEXT` characters."""
    return [{"input_ids": w, "labels": w} for w in text.unfold(0, CONTEXT, CONTEXT)]


def make_model(text: Text, width: int) -> GPT2LMHeadModel:
    """A GPT-2 of two layers, with random weights."""
    config = GPT2Config(
        vocab_size=len(text.characters),
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def make_trainer(name: str, text: Text, given: argparse.Namespace, folder: Path) -> Trainer:
    """An ordinary Trainer with the callback."""
    set_seed(given.seed)
    arguments = TrainingArguments(
        str(folder),
        max_steps=given.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=given.steps // 20,
        bf16=given.bf16,
        seed=given.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=given.device == "cpu",
        dataloader_pin_memory=given.device != "cpu",
    )
    trainer = Trainer(
        make_model(text, given.width),
        arguments,
        train_dataset=windows(text.training),
        eval_dataset=windows(text.validation)[:200],
        optimizer_cls_and_kwargs=CONTENDERS[name][1],
    )
    trainer.add_callback(SecondOrderCallback(trainer))  # the only line to add
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(name: str, text: Text, given: argparse.Namespace, folder: Path) -> list[str]:
    """Trains with one optimizer; returns its row of the table."""
    label, (_, options) = CONTENDERS[name]
    trainer = make_trainer(name, text, given, folder)
    start = time.perf_counter()
    training = trainer.train().training_loss
    seconds = time.perf_counter() - start
    validation = trainer.evaluate()["eval_loss"]
    share = getattr(getattr(unwrapped(trainer.optimizer), "info", None), "unclipped", None)
    return [
        label,
        f"{options['lr']:g}",
        f"{1000 * seconds / given.steps:.0f}",
        f"{training:.3f}",
        f"{validation:.3f}",
        "-" if share is None else f"{share:.1%}",
    ]


def main() -> int:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    chosen = ["adamw", "sophia-gnb", "adahessian"]
    add(
        "--optimizers",
        type=names_among(CONTENDERS),
        default=chosen,
        metavar="A,B,...",
        help=f"any of {', '.join(CONTENDERS)}; default: {','.join(chosen)}",
    )
    add("--steps", type=positive(int), default=250, help="default: 250")
    add(
        "--width",
        type=positive(int),
        default=64,
        help="width of the model, divisible by 4; default: 64",
    )
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    given = parser.parse_args()
    if given.width % 4:
        parser.error(f"--width must be divisible by 4, the number of heads, not {given.width}")
    text = load_text(torch.device("cpu"))
    print(f"{len(text.training):,} characters, {given.steps} steps of {BATCH * ACCUMULATION}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.optimizers:
            rows.append(run(name, text, given, Path(folder)))
            print(f"{rows[-1][0]}: done", file=sys.stderr, flush=True)
    header = ["optimizer", "lr", "ms/step", "mean training loss", "validation", "unclipped"]
    print(format_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
