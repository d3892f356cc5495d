"""The state of parameters that are updated together, in one vector.

Coordinate by coordinate an update needs a dozen operations. On flat vectors that is a dozen calls
however many parameters there are; only what touches gradients and parameters goes by lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

# From C++: views one by one take longer than the arithmetic on a small network.
from torch._utils import _unflatten_dense_tensors

from torch_secondorder._params.space import local

__all__ = [
    "COUNTS",
    "MOMENTS",
    "Block",
    "BlockLayout",
    "Number",
    "as_real",
    "narrowed",
    "nonfinite",
    "prepare",
]

#: A number on the host, or a 0-dim tensor on the device.
Number: TypeAlias = float | Tensor

#: The moments that each parameter has.
MOMENTS = ("exp_avg", "exp_hessian")
#: What is counted for each parameter.
COUNTS = ("step", "curvature_step")
_ALMOST_ONE = 1 - 2.0**-53
_fused: Callable[..., Any] | None = getattr(torch, "_fused_adam_", None)  # it is not public


class Block:
    """Parameters of one group that have seen as many gradients and estimates.

    Their state under `optimizer.state[p]` are views of the vectors here; their counts are shared
    0-dim tensors.

    Args:
        group: The group they belong to.
        params: The parameters, of one device and dtype.
        states: Their states.
        places: Their places among all trainable parameters.
        span: Where they begin and end in one vector of all of these; None if others are between.

    Attributes:
        group: The group they belong to.
        exp_avg: First moments, `(n,)`, float32 or wider.
        exp_hessian: Moments of the curvature, `(n,)`.
        master: The parameters themselves where these are narrower; else None.
        step: How many gradients they have seen, 0-dim.
        curvature_step: How many estimates of the curvature.
        has_kernels: Whether some parameter has more than two dimensions.
        complex: Whether each of the parameters is complex.
    """

    def __init__(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        places: Sequence[int],
        span: tuple[int, int] | None,
    ) -> None:
        self.group = group
        self.places = list(places)
        self._span = span
        self._params = list(params)
        self._states = list(states)
        self._reals = [as_real(p) for p in params]
        self.has_kernels = any(p.dim() > 2 for p in params)
        self.complex = [p.is_complex() for p in params]
        self.exp_avg, self._exp_avg_parts = self._joined("exp_avg")
        self.exp_hessian, self._exp_hessian_parts = self._joined("exp_hessian")
        self.master: Tensor | None = None
        if "master" in states[0]:
            self.master, _ = self._joined("master")
        self.step: Tensor = states[0]["step"]
        self.curvature_step: Tensor = states[0]["curvature_step"]
        for state in states:
            state["step"], state["curvature_step"] = self.step, self.curvature_step
        self._pointers = [local(p).data_ptr() for p in params]
        self._dtypes = [p.dtype for p in params]
        self._own = [[id(state[name]) for state in states] for name in MOMENTS]
        # The fused kernel goes through memory from end to end; in double precision people count
        # on more digits than it leaves to the first moment.
        self._fuses = all(
            real.is_contiguous() and real.dtype == torch.float32 and not real.is_cuda
            for real in self._reals
        )

    def _joined(self, name: str) -> tuple[Tensor, list[Tensor]]:
        flat = torch.cat([state[name].reshape(-1) for state in self._states])
        parts = self.cut(flat)
        for state, part in zip(self._states, parts, strict=True):
            state[name] = part
        return flat, parts

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views shaped like the parameters."""
        return list(_unflatten_dense_tensors(flat, self._reals))

    def intact(self, states: Any) -> bool:
        """Whether parameters and the optimizer's state still are where they were."""
        return (
            states.get(self._params[0]) is self._states[0]
            and [local(p).data_ptr() for p in self._params] == self._pointers
            and [p.dtype for p in self._params] == self._dtypes
            and [id(state.get("exp_avg")) for state in self._states] == self._own[0]
            and [id(state.get("exp_hessian")) for state in self._states] == self._own[1]
        )

    def dissolve(self) -> None:
        """Gives each parameter a state of its own again."""
        for state in self._states:
            for name in (*COUNTS, *MOMENTS, "master"):
                if name in state:
                    state[name] = state[name].clone()

    def part_of(self, whole: Tensor | None, parts: Callable[[], Sequence[Tensor | None]]) -> Tensor:
        """The block's part of something, one vector; a view where that is possible.

        Args:
            whole: It for all trainable parameters in order as one vector, if there is one.
            parts: Gives it for each of them.
        """
        like = self.exp_avg
        kind = like.dtype, like.device
        if whole is not None and self._span is not None and (whole.dtype, whole.device) == kind:
            return whole[slice(*self._span)]
        pieces = parts()
        return torch.cat([self._piece(pieces[place]) for place in self.places])

    def _piece(self, part: Tensor | None) -> Tensor:
        assert part is not None
        return as_real(part).reshape(-1).to(self.exp_avg.dtype)

    def average_gradient(
        self, whole: Tensor | None, parts: Sequence[Tensor | None], weight: Number
    ) -> None:
        """`exp_avg += weight * (gradient - exp_avg)`.

        Args:
            whole: See `part_of`.
            parts: One by one.
            weight: On a device zero where the gradient is not finite.
        """
        if isinstance(weight, Tensor):
            gradient = self.part_of(whole, lambda: parts)
            gradient = torch.where(weight > 0, gradient, 0.0)
            self.exp_avg.lerp_(gradient, narrowed(weight, gradient))
        elif whole is not None and self._span is not None:
            self.exp_avg.lerp_(self.part_of(whole, lambda: parts), weight)
        else:
            own = [as_real(g) for place in self.places if (g := parts[place]) is not None]
            torch._foreach_lerp_(
                self._exp_avg_parts, [g.to(self.exp_avg.dtype) for g in own], weight
            )

    def decay(self, factor: Number) -> None:
        """Multiplies the parameters."""
        if self.master is not None:
            self._catch_up()
            self.master.mul_(narrowed(factor, self.master))
            self._hand_on()
        else:
            torch._foreach_mul_(self._reals, narrowed(factor, self._reals[0]))

    def adam(self, rate: float, beta: float, eps: float, estimate: Tensor) -> bool:
        """`divide` by `sqrt(exp_hessian) + eps`, after that has taken in a new estimate's square.

        All in one pass, by PyTorch's fused kernel of Adam with the estimate in the place of the
        gradient. The first moment has had its gradient; its weight here is the largest number below
        one, so that it takes in the estimate times 1e-16, and a step 1e-16 of the learning rate.

        Returns:
            Whether there is such a kernel for these parameters; nothing has changed if not.
        """
        if self.master is not None or _fused is None or not self._fuses:
            return False
        _fused(
            self._reals,
            self.cut(estimate),
            self._exp_avg_parts,
            self._exp_hessian_parts,
            [],
            [_one(torch.device("cpu"))] * len(self._reals),
            # Corrections are those of a first step; they are taken out again.
            lr=rate * (1 - _ALMOST_ONE) / (1 - beta) ** 0.5,
            beta1=_ALMOST_ONE,
            beta2=beta,
            weight_decay=0.0,
            eps=eps / (1 - beta) ** 0.5,
            amsgrad=False,
            maximize=False,
        )
        return True

    def divide(self, rate: Number, denominator: Tensor) -> None:
        """`theta -= rate * exp_avg / denominator`; the denominator may be overwritten."""
        if self.master is None and not isinstance(rate, Tensor):
            torch._foreach_addcdiv_(
                self._reals, self._exp_avg_parts, self.cut(denominator), value=-rate
            )
        else:
            self.move(rate, torch.div(self.exp_avg, denominator, out=denominator))

    def move(self, rate: Number, direction: Tensor) -> None:
        """`theta -= rate * direction`; the direction may be overwritten."""
        if isinstance(rate, Tensor):
            direction.mul_(narrowed(rate, direction))
            rate = 1.0
        if self.master is None:
            torch._foreach_add_(self._reals, self.cut(direction), alpha=-rate)
        else:
            self._catch_up()
            self.master.add_(direction, alpha=-rate)
            self._hand_on()

    def _catch_up(self) -> None:
        """Where somebody has set a parameter, it counts instead of the copy."""
        assert self.master is not None
        for real, part in zip(self._reals, self.cut(self.master), strict=True):
            part.copy_(torch.where(part.to(real.dtype) == real, part, real.to(part.dtype)))

    def _hand_on(self) -> None:
        assert self.master is not None
        torch._foreach_copy_(self._reals, self.cut(self.master))


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


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without a graph, dense and real, a complex number as a pair.

    Of a sharded one the part that this process holds.
    """
    tensor = local(tensor).detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def narrowed(number: Number, like: Tensor) -> Number:
    """A number on the device in the dtype of what it is to meet; others as they are.

    Numbers are worked out in double precision there as on the host. Kernels that take two dtypes
    are slower, and lists of tensors go one by one through them.
    """
    return number.to(like.dtype) if isinstance(number, Tensor) else number


def nonfinite(tensors: Sequence[Tensor], inverse_scale: Tensor | None = None) -> Tensor:
    """Zero if all entries are finite, in one pass; multiplies them by a scale.

    Args:
        tensors: Multiplied in place.
        inverse_scale: A number on a device; None for one.
    """
    total: Tensor | None = None
    for (device, dtype), group in _by_kind(tensors).items():
        found = torch.zeros((), dtype=torch.float32, device=device)
        inverse = _one(device)
        if inverse_scale is not None:
            inverse = inverse_scale.to(device, torch.float32)
        if dtype == torch.bfloat16:  # the kernel below does not take it everywhere
            entries = [t for t in group if t.numel()]
            if entries:
                largest = torch.stack(torch._foreach_norm(entries, float("inf")))
                found = (~largest.isfinite()).any().to(found)
            if inverse_scale is not None:
                for t in group:
                    t.copy_(t.float().mul_(inverse))
        else:
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, inverse)
        total = found if total is None else total + found.to(total.device)
    assert total is not None
    return total


def _by_kind(
    tensors: Sequence[Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return kinds


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)
