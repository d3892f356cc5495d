"""Flat vectors that hold the state of parameters which are updated together.

An update takes a dozen operations for each coordinate. On flat vectors that is a dozen calls for
any number of parameters. Only the steps that touch gradients and parameters work on lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.cached_tensors import cached_tensors
from torch_secondorder._foundation.private_torch import fused_adam, unflatten_tensors, unscale
from torch_secondorder._optim.kronecker.partition import Partition, partition_of
from torch_secondorder._optim.kronecker.stacks import Stacks, sorted_by_blocks
from torch_secondorder._optim.state import (
    BlockMatrices,
    MasterCopy,
    Moment,
    ParameterField,
    as_real,
    prepare,
)
from torch_secondorder._params.space import local

#: A number on the host, or a 0-dim tensor on the device.
Number: TypeAlias = float | Tensor

#: The counts that parameters have; the second one only where there are estimates, the third one,
#: which is on the host, only where there are matrices of blocks.
COUNTS = ("step", "curvature_step", "host_step")
#: Hyperparameters on which the matrices of blocks depend.
_OF_BLOCKS = ("block_size", "max_precond_dim", "merge_dims", "factor_dtype")
_ALMOST_ONE = 1 - 2.0**-53
_ONE = torch.ones((), dtype=torch.float32)
_NOTHING: Mapping[Tensor, Tensor] = MappingProxyType({})


class Block:
    """Parameters of one group, dtype and device, with equal counts of gradients and estimates.

    Their state under `optimizer.state[p]` consists of views of the vectors here; they share the
    0-dim tensors that count.

    Args:
        group: The group they belong to.
        params: The parameters.
        states: The state of each.
        places: The place of each among all trainable parameters.
        span: The slice that they take in one vector of all trainable parameters; None if other
            parameters are between them.
        moments: The names of the moments that the optimizer declares.
        partitions: The blocks that each parameter is cut into; None without matrices of blocks.
        matrices: The names of the matrices of blocks that the optimizer declares.
        wholes: The tensors that are moved in place of some parameters.

    Attributes:
        group: The group they belong to.
        places: The place of each among all trainable parameters.
        span: The same as the argument.
        moments: All declared moments by name, `(n,)` each, float32 or wider.
        exp_avg: The first moments.
        exp_hessian: The moments of the curvature, for optimizers that estimate it.
        master: The parameters in the precision of the moments if they are narrower; else None.
        step: The number of gradients they have had, 0-dim.
        curvature_step: The number of estimates of the curvature, 0-dim; one without any estimates.
        dtype: Of the moments.
        device: Of the moments.
        counts: The names of the counts that the parameters have.
        has_kernels: Whether some parameter has more than two dimensions.
        complex: For each parameter, whether it is complex.
        host_step: The number of steps they have had, a number on the host. On a device it also
            counts those that turned out to move nothing. For optimizers with matrices of blocks.
        stacks: The blocks that the parameters are cut into, for these optimizers. The moments are
            in block order then, see `torch_secondorder._optim.kronecker.stacks`.
    """

    stacks: Stacks

    def __init__(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        places: Sequence[int],
        span: slice | None,
        moments: Sequence[str],
        wholes: Mapping[Tensor, Tensor],
        partitions: Sequence[Partition | None] | None = None,
        matrices: Sequence[str] = (),
    ) -> None:
        self.group = group
        self.places = list(places)
        self.span = span
        self._states = list(states)
        tensors = [wholes.get(p, p) for p in params]
        self._reals = [as_real(p) for p in tensors]
        self.has_kernels = any(p.dim() > 2 for p in params)
        self.complex = [p.is_complex() for p in params]
        self.moments: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {}
        for name in moments:
            self.moments[name], parts[name] = self._join(name)
        self.exp_avg, self._exp_avg_parts = self.moments["exp_avg"], parts["exp_avg"]
        if "exp_hessian" in parts:
            self.exp_hessian = self.moments["exp_hessian"]
            self._exp_hessian_parts = parts["exp_hessian"]
        self.dtype, self.device = self.exp_avg.dtype, self.exp_avg.device
        self.master = self._join("master")[0] if "master" in states[0] else None
        self.counts = [name for name in COUNTS if name in states[0]]
        # Of their own: in a copy of an optimizer, parameters that are left out here may share them.
        counts = {name: states[0][name].clone() for name in self.counts}
        for state in states:
            state.update(counts)
        self.step: Tensor = states[0]["step"]
        self.curvature_step: Tensor = states[0].get("curvature_step", _ONE)
        if partitions is not None:
            self.host_step: Tensor = states[0]["host_step"]
            self.stacks = Stacks(self._reals, partitions, states, matrices, self.dtype)
        self._placement = [
            (p, tensor, local(tensor).data_ptr(), p.dtype, state)
            for p, tensor, state in zip(params, tensors, states, strict=True)
        ]
        self._pieces = [
            (state, name, piece)
            for name in moments
            for state, piece in zip(states, parts[name], strict=True)
        ]
        if partitions is not None:
            self._pieces += self.stacks.pieces
        # The fused kernel goes through memory from end to end. Float64 is left out: the kernel
        # disturbs the first moment by 1e-16, which users of float64 may notice.
        self._can_fuse = (
            fused_adam is not None
            and self.master is None
            and all(
                real.is_contiguous() and real.dtype == torch.float32 and real.device.type == "cpu"
                for real in self._reals
            )
        )
        self._first_steps = [_ONE] * len(self._reals)

    def _join(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Joins one entry of all states to a vector, and puts views of it in their place."""
        flat = torch.cat([state[name].reshape(-1) for state in self._states])
        parts = self.pieces(flat)
        for state, part in zip(self._states, parts, strict=True):
            state[name] = part
        return flat, parts

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector `(n,)`, shaped like the parameters (as pairs if these are complex)."""
        return list(unflatten_tensors(flat, self._reals))

    def members(self, flat: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The state of each parameter, with its piece of a vector, a view of the same shape."""
        return zip(self._states, self.pieces(flat), strict=True)

    def is_intact(self, states: Any) -> bool:
        """True if parameters and moments are still where they were when the block was made.

        Args:
            states: The optimizer's state by parameter.
        """
        for p, tensor, pointer, dtype, state in self._placement:
            held = tensor if type(tensor) is torch.nn.Parameter else local(tensor)
            if held.data_ptr() != pointer or p.dtype != dtype or states.get(p) is not state:
                return False
        for state, name, piece in self._pieces:  # noqa: SIM110 - a generator takes longer
            if state.get(name) is not piece:
                return False
        return True

    def dissolve(self) -> None:
        """Gives each parameter a state of its own again."""
        for state in self._states:
            for name in (*COUNTS, *self.moments, "master"):
                if name in state:
                    state[name] = state[name].clone()
        for state, name, piece in self._pieces:
            if state.get(name) is piece:
                state[name] = piece.clone()

    def join(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The block's share of some tensors as one vector in the precision of the moments, a copy.

        Args:
            parts: One tensor for each of all trainable parameters.
        """
        own = [parts[place] for place in self.places]
        return torch.cat([as_real(t).reshape(-1).to(self.dtype) for t in own if t is not None])

    def average_parts(self, parts: Sequence[Tensor | None], weight: float) -> None:
        """`exp_avg += weight * (gradient - exp_avg)`, without a vector of the gradients.

        Args:
            parts: The gradients of all trainable parameters.
            weight: The weight.
        """
        own = [as_real(g) for place in self.places if (g := parts[place]) is not None]
        torch._foreach_lerp_(self._exp_avg_parts, [g.to(self.dtype) for g in own], weight)

    def decay(self, factor: Number) -> None:
        """Multiplies the parameters."""
        if self.master is not None:
            self._read_into_master()
            self.master.mul_(narrowed(factor, self.master))
            self._write_from_master()
        else:
            torch._foreach_mul_(self._reals, narrowed(factor, self._reals[0]))

    def fused_divide(self, rate: float, beta: float, eps: float, estimate: Tensor) -> bool:
        """Averages the squared estimate, then divides by `sqrt(exp_hessian) + eps`, in one pass.

        PyTorch's fused kernel of Adam does it, with the estimate in place of the gradient. The
        first moment has had its gradient; its decay rate here is the largest number below one, so
        that it takes in the estimate times 1e-16, and a step 1e-16 of the learning rate.

        Args:
            rate: See `divide`.
            beta: The decay rate of `exp_hessian`.
            eps: Added to the root.
            estimate: The new estimate of the curvature.

        Returns:
            Whether these parameters have such a kernel. If not, nothing has changed.
        """
        if not self._can_fuse:
            return False
        assert fused_adam is not None
        fused_adam(
            self._reals,
            list(unflatten_tensors(estimate, self._reals)),
            self._exp_avg_parts,
            self._exp_hessian_parts,
            [],
            self._first_steps,
            # The kernel corrects for the bias of a first step; here that is taken out again.
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
                self._reals, self._exp_avg_parts, self.pieces(denominator), value=-rate
            )
        else:
            self.move(rate, torch.div(self.exp_avg, denominator, out=denominator))

    def move(self, rate: Number, direction: Tensor) -> None:
        """`theta -= rate * direction`; the direction may be overwritten."""
        if isinstance(rate, Tensor):
            direction.mul_(narrowed(rate, direction))
            rate = 1.0
        if self.master is None:
            torch._foreach_add_(self._reals, self.pieces(direction), alpha=-rate)
        else:
            self._read_into_master()
            self.master.add_(direction, alpha=-rate)
            self._write_from_master()

    def gather(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The block's share of some tensors in block order, `(n,)`, in memory of `stacks`.

        Args:
            parts: One tensor for each of all trainable parameters.
        """
        own = [parts[place] for place in self.places]
        return self.stacks.gather([as_real(t) for t in own if t is not None])

    def move_blocks(self, rate: Number) -> None:
        """`theta -= rate * direction`, with `stacks.direction`, which may be overwritten.

        Args:
            rate: The factor.
        """
        if isinstance(rate, Tensor):
            direction = self.stacks.direction
            direction.mul_(narrowed(rate, direction))
            rate = 1.0
        if self.master is None:
            self.stacks.add_to(self._reals, -rate)
        else:
            self._read_into_master()
            self.stacks.add_to(self.pieces(self.master), -rate)
            self._write_from_master()

    def _read_into_master(self) -> None:
        """Takes over the entries of parameters that were set from outside since the last step."""
        assert self.master is not None
        for real, part in zip(self._reals, self.pieces(self.master), strict=True):
            part.copy_(torch.where(part.to(real.dtype) == real, part, real.to(part.dtype)))

    def _write_from_master(self) -> None:
        assert self.master is not None
        torch._foreach_copy_(self._reals, self.pieces(self.master))


class BlockLayout:
    """Puts parameters into blocks, and leaves them there as long as nothing changes.

    Args:
        fields: The declared state of each parameter.

    Attributes:
        blocks: The blocks of the last step.
        lacks_curvature: Whether a parameter had a gradient in the last step, and no curvature yet.
        got_curvature: Whether a parameter had its first estimate in the last step, if that was
            asked.
    """

    def __init__(self, fields: Sequence[ParameterField]) -> None:
        self._fields = fields
        self._moments = [field.name for field in fields if isinstance(field, Moment)]
        self._matrices = [field for field in fields if isinstance(field, BlockMatrices)]
        self._estimates = any(field.name == "curvature_step" for field in fields)
        self.blocks: list[Block] = []
        self.lacks_curvature = self.got_curvature = False
        self._key: list[object] = []

    def arrange(
        self,
        groups: Sequence[dict[str, Any]],
        states: Any,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        *,
        has_estimate: bool,
        on_device: bool,
        notes_first: bool = False,
        wholes: Mapping[Tensor, Tensor] = _NOTHING,
    ) -> list[Block]:
        """The blocks of the parameters that have a gradient.

        If the optimizer estimates the curvature, a parameter is left out until its first estimate.

        Args:
            groups: The optimizer's groups.
            states: The optimizer's state by parameter, where the blocks keep theirs.
            params: All trainable parameters.
            gradients: The gradient of each.
            has_estimate: Whether there is a new estimate of the curvature.
            on_device: Whether counts are kept on the device.
            notes_first: Whether to set `got_curvature`, which may wait for the device.
            wholes: Whole tensors in place of sharded parameters, see `owners.Owners`.
        """
        self.got_curvature = False
        key: list[object] = [on_device]
        for group in groups:
            key += (id(group), len(group["params"]))
            if self._matrices:
                key += [group.get(name) for name in _OF_BLOCKS]
        for p, gradient in zip(params, gradients, strict=True):
            key.append(0 if gradient is None else id(p))
        if key == self._key and not (self.lacks_curvature and has_estimate):
            for block in self.blocks:
                if not block.is_intact(states):
                    break
            else:
                return self.blocks
        for block in self.blocks:
            block.dissolve()
        members, self.lacks_curvature = {}, False
        group_of = {id(p): group for group in groups for p in group["params"]}
        for place, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
            if gradient is not None:
                state = states[p]
                whole, group = wholes.get(p, p), group_of[id(p)]
                self._drop_other_blocks(state, whole, group)
                prepare(self._fields, state, whole, on_device=on_device, group=group)
                if has_estimate or not self._estimates or bool(state["curvature_step"]):
                    members[id(p)] = place, state
                    if notes_first and has_estimate and not self.got_curvature:
                        self.got_curvature = not bool(state["curvature_step"])
                else:
                    self.lacks_curvature = True
        sizes = [as_real(p).numel() for p in params]
        names = [field.name for field in self._matrices]
        self.blocks = _make_blocks(groups, members, sizes, self._moments, wholes, names)
        self._key = key
        return self.blocks

    def _drop_other_blocks(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        """Lets a parameter begin anew whose matrices are of other blocks than it has now."""
        if "exp_avg" in state and not all(f.fits(state, p, group) for f in self._matrices):
            for field in self._fields:
                if not isinstance(field, MasterCopy):
                    for name in field.names(p, group):
                        state.pop(name, None)


def _make_blocks(
    groups: Sequence[dict[str, Any]],
    members: dict[int, tuple[int, dict[str, Any]]],
    sizes: Sequence[int],
    moments: Sequence[str],
    wholes: Mapping[Tensor, Tensor],
    matrices: Sequence[str],
) -> list[Block]:
    """Puts parameters into blocks.

    Args:
        groups: The groups.
        members: The parameters to put into blocks, by their ids: the place of each among the
            trainable parameters, and its state.
        sizes: The number of real entries of each trainable parameter.
        moments: The names of the moments.
        matrices: The names of the matrices of blocks; if there are any, parameters are sorted by
            the shapes of their blocks.
        wholes: See `BlockLayout.arrange`.
    """
    ends = [0, *accumulate(sizes)]
    blocks = []
    for group in groups:
        kinds: dict[Any, list[tuple[Tensor, dict[str, Any], int]]] = {}
        for p in group["params"]:
            if id(p) not in members:
                continue
            place, state = members[id(p)]
            counts = tuple(float(state[name]) for name in COUNTS if name in state)
            # Whole tensors and parts, which are not updated alike, stay apart.
            kind = (counts, p.device, p.dtype, state["step"].device, p in wholes)
            kinds.setdefault(kind, []).append((p, state, place))
        for found in kinds.values():
            partitions = None
            if matrices:
                partitions = [partition_of(p, group) for p, _, _ in found]
                order = sorted_by_blocks(partitions)
                found = [found[number] for number in order]
                partitions = [partitions[number] for number in order]
            params, states, places = zip(*found, strict=True)
            first, last = places[0], places[-1]
            adjacent = places == tuple(range(first, last + 1)) and params[0] not in wholes
            span = slice(ends[first], ends[last + 1]) if adjacent else None
            blocks.append(
                Block(group, params, states, places, span, moments, wholes, partitions, matrices)
            )
    return blocks


def narrowed(number: Number, like: Tensor) -> Number:
    """A number on a device as its operand is, in dtype and device; one on the host unchanged.

    Numbers on the device are computed in double precision, as on the host. Kernels that mix two
    dtypes are slower, and lists of tensors fall back to one kernel for each tensor.
    """
    return number.to(like) if isinstance(number, Tensor) else number


def nonfinite(tensors: Sequence[Tensor], inverse_scale: Tensor | None = None) -> Tensor:
    """Zero if all entries are finite, 0-dim, found in one pass that also multiplies by a scale.

    Args:
        tensors: Multiplied in place.
        inverse_scale: A number on a device; None for one.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    total: Tensor | None = None
    for (device, dtype), group in kinds.items():
        found = torch.zeros((), dtype=torch.float32, device=device)
        if inverse_scale is not None:
            inverse = inverse_scale.to(device, torch.float32)
        else:
            inverse = _one_on(device)
        if dtype == torch.bfloat16:  # some devices lack the kernel below for it
            entries = [t for t in group if t.numel()]
            if entries:
                largest = torch.stack(torch._foreach_norm(entries, float("inf")))
                found = (~largest.isfinite()).any().to(found)
            if inverse_scale is not None:
                for t in group:
                    t.copy_(t.float().mul_(inverse))
        else:
            unscale(group, found, inverse)
        total = found if total is None else total + found.to(total.device)
    assert total is not None
    return total


@cached_tensors
def _one_on(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)
