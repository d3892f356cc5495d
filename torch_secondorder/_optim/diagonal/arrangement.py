"""Which parameters are updated together, from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._optim.diagonal.blocks import COUNTS, MOMENTS, Block, as_real

__all__ = ["BlockLayout", "prepare"]


class BlockLayout:
    """Puts parameters into blocks, and leaves them there as long as nothing changes.

    Attributes:
        blocks: The blocks of the last step.
        waiting: Whether a parameter had a gradient in the last step, and no curvature.
        served: Whether one got its first curvature, looked at where somebody waits for that.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.waiting = False
        self.served = False
        self._key: object = None

    def of(
        self,
        groups: Sequence[dict[str, Any]],
        states: Any,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        *,
        curved: bool,
        on_device: bool,
        expected: bool = False,
    ) -> list[Block]:
        """Blocks of those that have a gradient; one without any curvature waits for it.

        Args:
            groups: The optimizer's groups.
            states: The optimizer's states by parameter, where the blocks keep theirs.
            params: All trainable parameters.
            gradients: Theirs.
            curved: Whether there is a new estimate of the curvature.
            on_device: Whether counts are kept on the device.
            expected: Whether some are known to wait for a curvature.
        """
        self.served = False
        key = (
            on_device,
            [(id(group), len(group["params"])) for group in groups],
            [0 if g is None else id(p) for p, g in zip(params, gradients, strict=True)],
        )
        settled = key == self._key and not (self.waiting and curved)
        if settled and all(block.intact(states) for block in self.blocks):
            return self.blocks
        for block in self.blocks:
            block.dissolve()
        members, self.waiting = {}, False
        for place, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
            if gradient is not None:
                state = states[p]
                prepare(state, p, on_device=on_device)
                if curved or bool(state["curvature_step"]):
                    members[id(p)] = place, state
                    if expected and curved and not self.served:
                        self.served = not bool(state["curvature_step"])
                else:
                    self.waiting = True
        sizes = [as_real(p).numel() for p in params]
        self.blocks = _blocks_of(groups, members, sizes)
        self._key = key
        return self.blocks


def _blocks_of(
    groups: Sequence[dict[str, Any]],
    members: dict[int, tuple[int, dict[str, Any]]],
    sizes: Sequence[int],
) -> list[Block]:
    """Puts parameters into blocks, and makes the state of those that have none.

    Args:
        groups: The groups.
        members: By the id of each parameter that belongs in one: its place among the trainable
            parameters and its state.
        sizes: How many real numbers each of the trainable parameters is.
    """
    ends = [0, *accumulate(sizes)]
    blocks = []
    for group in groups:
        kinds: dict[Any, list[tuple[Tensor, dict[str, Any], int]]] = {}
        for p in group["params"]:
            if id(p) not in members:
                continue
            place, state = members[id(p)]
            counts = float(state["step"]), float(state["curvature_step"])
            kind = (counts, p.device, p.dtype, state["step"].device)
            kinds.setdefault(kind, []).append((p, state, place))
        for found in kinds.values():
            params, states, places = zip(*found, strict=True)
            first, last = places[0], places[-1]
            joined = places == tuple(range(first, last + 1))
            span = (ends[first], ends[last + 1]) if joined else None
            blocks.append(Block(group, params, states, places, span))
    return blocks


def prepare(state: dict[str, Any], p: Tensor, *, on_device: bool) -> None:
    """Makes the state of a parameter, or brings it to what the parameter is now."""
    real = as_real(p)
    dtype = torch.promote_types(real.dtype, torch.float32)
    device = p.device if on_device else torch.device("cpu")
    for name in COUNTS:
        count = torch.as_tensor(state.get(name, 0.0), dtype=torch.float32)
        state[name] = count.to(device)
    for name in MOMENTS:
        if name in state:
            state[name] = state[name].to(p.device, dtype)
        else:
            state[name] = torch.zeros(real.shape, dtype=dtype, device=p.device)
    if dtype == real.dtype:
        state.pop("master", None)
    elif "master" not in state:
        state["master"] = real.to(dtype, copy=True)
