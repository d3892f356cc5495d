"""Cost of penalties on the Jacobian in a training step of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import alternate, load_ours, progress, ratio
from .registry import Options, command
from .report import Report, Table, seconds

PROJECTIONS = 8
WEIGHT = 0.1

# Pixels, units of the code, batch: the sizes of the papers, and one dominated by call overhead.
SIZES = ((784, 500, 256), (64, 30, 32))

Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Step:
    """Forward and backward pass of an autoencoder with sigmoid units, with or without a penalty.

    Args:
        sizes: Pixels, units, batch.
        device: The device to run on.
    """

    def __init__(self, sizes: tuple[int, int, int], device: torch.device) -> None:
        pixels, units, batch = sizes
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(pixels, units), nn.Sigmoid()).to(device)
        self.decoder = nn.Sequential(nn.Linear(units, pixels), nn.Sigmoid()).to(device)
        self.x = torch.rand(batch, pixels, device=device)
        self.params = [*self.encoder.parameters(), *self.decoder.parameters()]

    def __call__(self, penalty: Penalty | None = None, *, differentiated: bool = False) -> None:
        """One step.

        Args:
            penalty: Takes the encoder, the batch and its code.
            differentiated: Makes the code with a graph that includes the batch.
        """
        for p in self.params:
            p.grad = None
        x = self.x.detach().requires_grad_(differentiated)
        code = self.encoder(x)
        loss = F.mse_loss(self.decoder(code), self.x)
        if penalty is not None:
            loss = loss + WEIGHT * penalty(self.encoder, x, code)
        loss.backward()


def loop_penalty(encoder: nn.Module, x: Tensor, code: Tensor, projections: int) -> Tensor:
    """One backward pass for each projection, as in facebookresearch/jacobian_regularizer.

    Written from its description: a random unit vector for each sample, the vector-Jacobian product
    with a graph, and the mean of the squared norms.
    """
    n, count = code.shape
    total = x.new_zeros(())
    for _ in range(projections):
        v = torch.randn(n, count, device=x.device)
        v = v / v.norm(dim=1, keepdim=True)
        (product,) = torch.autograd.grad(code, x, v, create_graph=True, retain_graph=True)
        total = total + count * product.norm() ** 2 / (projections * n)
    return total


def candidates(step: Step, contractive: Any, jacobian: Any) -> dict[str, Callable[[], object]]:
    """The steps of the comparison; "(code)" means that the penalty uses the code of the loss."""

    def projected(encoder: nn.Module, x: Tensor, code: Tensor, count: int, shared: bool) -> Tensor:
        outputs = code if shared else None
        result: Tensor = jacobian(encoder, x, "projection", count, outputs=outputs)
        return result

    def closed(encoder: nn.Module, x: Tensor, code: Tensor, shared: bool) -> Tensor:
        result: Tensor = contractive(encoder, x, code=code if shared else None)
        return result

    def one(count: int, shared: bool) -> Callable[[], object]:
        penalty = partial(projected, count=count, shared=shared)
        return partial(step, penalty, differentiated=shared)

    loop = partial(loop_penalty, projections=PROJECTIONS)
    return {
        "plain": step,
        "contractive (code)": partial(step, partial(closed, shared=True)),
        "contractive": partial(step, partial(closed, shared=False)),
        "1 projection (code)": one(1, True),
        "1 projection": one(1, False),
        f"{PROJECTIONS} projections (code)": one(PROJECTIONS, True),
        f"{PROJECTIONS} projections, loop (code)": partial(step, loop, differentiated=True),
    }


@command("penalties", "training steps with penalties on the Jacobian, compared with plain ones")
def run(options: Options, report: Report) -> None:
    """Measures each size."""
    contractive = load_ours("torch_secondorder.penalties", "contractive_penalty")
    jacobian = load_ours("torch_secondorder.penalties", "jacobian_penalty")
    if contractive is None or jacobian is None:
        return
    header = ["step", "time", "over plain", "over the loop"]
    for sizes in progress(SIZES[-1:] if options.quick else SIZES, "penalties"):
        name = f"{sizes[0]}-{sizes[1]}, batch {sizes[2]}"
        calls = candidates(Step(sizes, options.device), contractive, jacobian)
        # The differences are small, so more rounds are needed.
        timings = alternate(calls, 4 * options.repeat, options.device)
        table = Table(f"Forward and backward of an autoencoder, {name}", header)
        looped = timings[f"{PROJECTIONS} projections, loop (code)"]
        result: dict[str, Any] = {}
        for label, timing in timings.items():
            plain, loop = ratio(timing, timings["plain"]), ratio(timing, looped)
            shown = loop if label.startswith(str(PROJECTIONS)) else "-"
            table.add(label, seconds(timing.median), plain, shown)
            result[label] = {
                **timing.as_dict(),
                "over plain": plain.as_dict(),
                "over the loop": loop.as_dict(),
            }
        report.record(f"penalties.{name}", result)
        report.show(table)
