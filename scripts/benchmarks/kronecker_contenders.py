"""The optimizers and networks of the benchmark: ours, AdamW and those of other libraries.

All Kronecker-factored optimizers refresh bases or inverse roots in every tenth step; the other
settings are the defaults of their authors. Peers are optional:

    pip install --no-deps pytorch-optimizer heavyball opt-einsum

and the folder `distributed_shampoo` of https://github.com/facebookresearch/optimizers on
PYTHONPATH.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .harness import load_ours, load_peer
from .networks import Case, chain, cnn, mlp
from .race import load_example
from .registry import Options

PERIOD = 10
LAYERS = 4
WIDTHS = (64, 128, 256)
BASE, PEER = "AdamW", "pytorch_optimizer SOAP"

Make = Callable[..., Any]  # takes parameters and `lr`


@dataclass(frozen=True)
class Problem:
    """A network with several batches, which take turns.

    Attributes:
        name: Name in the tables.
        model: The network, on the device.
        loss: Maps outputs and targets to a scalar.
        batches: Inputs and targets.
    """

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]] = field(repr=False)


class CrossEntropy(nn.Module):
    """Cross-entropy of outputs `(batch, length, classes)`."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over batch and length."""
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def transformer(device: torch.device, width: int, layers: int = LAYERS) -> Problem | None:
    """The transformer of `examples/train_char_lm.py` on windows of its text."""
    example = load_example("_char_lm")
    if example is None:
        return None
    text = example.load_text(device)
    torch.manual_seed(0)
    model = example.Transformer(len(text.characters), width, layers).to(device)
    windows = text.training.unfold(0, example.CONTEXT + 1, 1)
    chosen = torch.randint(len(windows), (PERIOD, example.BATCH)).to(device)
    batches = [(w[:, :-1], w[:, 1:]) for w in windows[chosen]]
    return Problem(f"transformer {layers} x {width}", model, CrossEntropy(), batches)


def classifier(case: Case) -> Problem:
    """A classifier of the other benchmarks, with more batches of random data."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(PERIOD):
        inputs = torch.randn(case.inputs.shape, generator=generator)
        targets = torch.randint(10, case.targets.shape, generator=generator)
        batches.append((inputs.to(case.inputs.device), targets.to(case.inputs.device)))
    return Problem(case.name, case.model, case.loss, batches)


def problems(options: Options) -> Iterator[Problem]:
    """The networks: transformers of several widths, a CNN and an MLP."""
    for width, layers in ((8, 1),) if options.quick else ((width, LAYERS) for width in WIDTHS):
        made = transformer(options.device, width, layers)
        if made is not None:
            yield made
    if options.quick:
        torch.manual_seed(0)
        model = chain([20, 20, 10], nn.ReLU)
        inputs, targets = torch.randn(8, 20), torch.randint(10, (8,))
        yield classifier(Case("MLP 20-20-10", model, nn.CrossEntropyLoss(), inputs, targets))
    else:
        yield classifier(cnn(options.device))
        yield classifier(mlp(options.device, batch=128))


def take_steps(problem: Problem, model: nn.Module, optimizer: Any) -> None:
    """Takes a step with the standard closure on each batch: one period."""
    for inputs, targets in problem.batches:

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)


def contenders(options: Options) -> dict[str, Make]:
    """All installed optimizers whose names contain the text of `--only`; AdamW always."""
    table = ours() | pytorch_optimizer() | heavyball() | distributed_shampoo()
    return {BASE: torch.optim.AdamW} | options.chosen(table)


def ours() -> dict[str, Make]:
    """The optimizers of this library."""
    table = {}
    for name in ("SOAP", "Shampoo", "KFAC"):
        found = load_ours("torch_secondorder", name)
        if found is not None:
            table[f"{name} (ours)"] = partial(found, update_period=PERIOD)
    return table


def pytorch_optimizer() -> dict[str, Make]:
    """The optimizers of kozistr/pytorch_optimizer."""
    peer = load_peer("pytorch_optimizer")
    if peer is None:
        return {}
    return {
        PEER: partial(peer.SOAP, precondition_frequency=PERIOD),
        "pytorch_optimizer Shampoo": partial(peer.Shampoo, preconditioning_compute_steps=PERIOD),
        "pytorch_optimizer ScalableShampoo": partial(
            peer.ScalableShampoo, preconditioning_compute_steps=PERIOD, start_preconditioning_step=1
        ),
    }


def heavyball() -> dict[str, Make]:
    """SOAP of HomebrewML/HeavyBall, not compiled."""
    peer = load_peer("heavyball")
    if peer is None:
        return {}
    peer.utils.compile_mode = None
    return {"HeavyBall SOAP": partial(peer.SOAP, precondition_frequency=PERIOD, compile_step=False)}


def distributed_shampoo() -> dict[str, Make]:
    """SOAP and Shampoo of facebookresearch/optimizers."""
    peer = load_peer("distributed_shampoo", "facebookresearch/optimizers")
    if peer is None:
        return {}
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)
    common = {"epsilon": 1e-8, "precondition_frequency": PERIOD}
    common["start_preconditioning_step"] = PERIOD  # its smallest value
    soap = {"betas": (0.95, 0.95), "preconditioner_config": peer.DefaultSOAPConfig}
    grafting = peer.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8)
    shampoo = {"betas": (0.9, 0.95), "grafting_config": grafting}
    return {
        "distributed_shampoo SOAP": partial(peer.DistributedShampoo, **common, **soap),
        "distributed_shampoo Shampoo": partial(peer.DistributedShampoo, **common, **shampoo),
    }
