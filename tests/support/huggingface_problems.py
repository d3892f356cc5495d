"""A tiny classifier for the Hugging Face Trainer, its data, and arguments of short trainings."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

#: Arguments of `TrainingArguments`.
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "warmup_steps": 2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "train_sampling_strategy": "sequential",
    "dataloader_pin_memory": False,
}


def bert() -> nn.Module:
    """A classifier, in float64 from end to end."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double()


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    tokens = torch.randint(16, (count, 8), generator=torch.Generator().manual_seed(1))
    # Nothing predicts the first; every way to average counts these labels.
    labels = torch.cat([torch.full((count, 1), -100), tokens[:, 1:]], 1)
    return [{"input_ids": row, "labels": own} for row, own in zip(tokens, labels, strict=True)]


def classes(count: int = 64) -> list[dict[str, Tensor]]:
    rows = [row["input_ids"] for row in texts(count)]
    return [{"input_ids": row, "labels": row.sum() % 3} for row in rows]
