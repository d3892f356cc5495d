"""Sharded parameters that a step needs whole, each of which one process steps for all.

Kronecker factors belong to whole matrices, and `fully_shard` leaves a part of each in every
process. So each matrix has an owner: a process that has its state, gets all parts of its gradient
and value, makes its step as if nothing were sharded, and sends the parts of the new value back.
Both ways take one message for all matrices, of which a process sends and receives no more than a
few times its own part of the model. The work and the state are divided over the processes.

In checkpoints, moments are cut up along with the parameters, and factors are whole; so they can be
loaded by any number of processes. Parameters without factors are stepped in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._optim.diagonal.update import FiniteCheck
from torch_secondorder._optim.state import Count, ParameterField, prepare
from torch_secondorder._params.space import is_distributed, local

_PLAIN = torch.empty(0)


def _matrices(
    fields: Iterable[ParameterField], p: Tensor, group: dict[str, Any]
) -> list[torch.Size]:
    """The shapes of a parameter's state that is not cut up along with it, counts apart."""
    return [
        field.shape(p, name, group)
        for field in fields
        if not field.sharded and not isinstance(field, Count)
        for name in field.names(p, group)
    ]


def needs_whole(fields: Iterable[ParameterField], p: Tensor, group: dict[str, Any]) -> bool:
    """True if a parameter is sharded, and a step needs the whole of it.

    Args:
        fields: The declared state of each parameter.
        p: The parameter.
        group: Its group.
    """
    return is_distributed(p) and bool(_matrices(fields, p, group))


def check_not_whole(name: str, fields: Sequence[ParameterField], group: dict[str, Any]) -> None:
    """Raises a ValueError where estimates of the curvature would be needed of whole parameters.

    Args:
        name: The name of an optimizer that estimates the curvature.
        fields: The declared state of each parameter.
        group: A group.
    """
    if any(needs_whole(fields, p, group) for p in group["params"]):
        raise ValueError(
            f"{name} estimates the curvature and keeps matrices for the dimensions of whole "
            "parameters, which fully_shard cuts apart: use DistributedDataParallel, or SOAP or "
            "Shampoo, whose matrices are made of gradients"
        )


class Owners:
    """The owners of sharded parameters, and messages to and from them.

    Parameters go to the process that has least to do, the most expensive ones first. Those that
    come later, with another group, leave the others where they are. All processes come to the same
    division, for they have the same parameters in the same order.

    Args:
        fields: The declared state of each parameter.

    Attributes:
        groups: The group of each parameter.
        wholes: The whole parameters that this process owns. Their values are those of the last
            step.
    """

    def __init__(self, fields: Sequence[ParameterField]) -> None:
        self._fields = tuple(fields)
        self.groups: dict[Tensor, dict[str, Any]] = {}
        self._owners: dict[Tensor, int] = {}
        self._loads: dict[int, float] = {}
        self.wholes: dict[Tensor, Tensor] = {}
        self._started: dict[Tensor, None] = {}  # those that have a state
        self._in_parts = False  # as it was loaded, all processes have parts of that state
        self._moved: list[Tensor] = []  # those of this step

    def gather(
        self, params: Sequence[Tensor], gradients: Sequence[Tensor | None], states: Any
    ) -> list[Tensor | None]:
        """Brings gradients, values and loaded state to the owners.

        Args:
            params: All trainable parameters.
            gradients: This process's part of the gradient of each.
            states: The optimizer's state by parameter.

        Returns:
            The whole gradient of a parameter that is owned here, None for one that is owned
            elsewhere, and this process's part for one that is stepped in parts.
        """
        self._assign(params)
        self._adopt(states)
        moved = [
            place
            for place, p in enumerate(params)
            if p in self._owners and gradients[place] is not None
        ]
        keys = [params[place] for place in moved]
        parts = [part for place in moved if (part := gradients[place]) is not None]
        found = self._to_owners([*keys, *keys], [*parts, *map(local, keys)])
        result = list(gradients)
        for place, p, gradient, value in zip(
            moved, keys, found[: len(keys)], found[len(keys) :], strict=True
        ):
            result[place] = gradient
            self._started[p] = None
            if value is not None:
                held = self.wholes.get(p)
                if held is None or held.dtype != value.dtype or held.device != value.device:
                    self.wholes[p] = value
                else:  # blocks know it by its place
                    held.copy_(value)
        self._moved = keys
        return result

    def scatter(self, check: FiniteCheck) -> None:
        """Brings the parts of the new values to all processes, after `gather` and the update.

        Args:
            check: The check of the step, which has made one here too if all moved elsewhere.
        """
        if self._moved and not check.moves:
            check.moves.append(check.weight)
        parts = [local(p) for p in self._moved]
        self._from_owners(self._moved, [self.wholes.get(p) for p in self._moved], parts)

    def loaded(self, states: Any) -> None:
        """Notes that a state was loaded, of which all processes have parts.

        Args:
            states: The optimizer's state by parameter.
        """
        self._in_parts, self._started = True, {}
        for p, state in states.items():
            if not self._needs_whole(p):
                continue
            if any(name in state for _, name in self._entries(p)):
                self._started[p] = None

    def in_parts(self, states: Any) -> dict[Tensor, dict[str, Any]]:
        """The state by parameter as checkpoints have it, in all processes at once.

        Args:
            states: The optimizer's state by parameter.
        """
        result = dict(states)
        if self._in_parts or not self._started:
            return result
        started = list(self._started)
        own = [states[p] if p in self.wholes else None for p in started]
        for p in started:  # the right shapes, to receive into
            result[p] = {}
            prepare(self._fields, result[p], p, group=self.groups[p])
        keys, wholes, parts = [], [], []
        shared: list[tuple[Tensor, dict[str, Any], str]] = []
        for p, state in zip(started, own, strict=True):
            for field, name in self._entries(p):
                if name not in result[p]:
                    continue
                if not field.sharded:
                    if state is not None:
                        result[p][name] = state[name]
                    shared.append((p, result[p], name))
                    continue
                keys.append(p)
                wholes.append(None if state is None else state[name])
                parts.append(result[p][name])
        self._from_owners(keys, wholes, parts)
        self._broadcast(shared)
        return result

    # The division.

    def _assign(self, params: Sequence[Tensor]) -> None:
        """Gives an owner to each parameter that needs one and has none."""
        new = [p for p in params if p not in self._owners and self._needs_whole(p)]
        if not new:
            return
        self._check(new)
        ranks = self._size(new[0])
        for p in sorted(new, key=self._cost, reverse=True):  # equal ones stay in order
            rank = min(range(ranks), key=lambda rank: (self._loads.get(rank, 0.0), rank))
            self._owners[p] = rank
            self._loads[rank] = self._loads.get(rank, 0.0) + self._cost(p)

    def _cost(self, p: Tensor) -> float:
        """The operations of a step, roughly: products with factors, and what is made of these."""
        shapes = _matrices(self._fields, p, self.groups[p])
        return sum(shape[-1] * (p.numel() + math.prod(shape)) for shape in shapes)

    def _needs_whole(self, p: Tensor) -> bool:
        return p in self.groups and needs_whole(self._fields, p, self.groups[p])

    def _entries(self, p: Tensor) -> list[tuple[ParameterField, str]]:
        """The declared state of a parameter: the fields, and the names of what they have of it."""
        return [(field, name) for field in self._fields for name in field.names(p, self.groups[p])]

    def _check(self, params: Sequence[Any]) -> None:
        """Raises a ValueError where a parameter is cut along two dimensions."""
        for p in params:
            if len(_cutting(p)) > 1:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}, cut up "
                    "over two dimensions of a mesh, and optimizers with matrices for whole "
                    "parameters take one: use fully_shard on a mesh of one dimension, or on one "
                    "of copies and parts"
                )

    # Messages.

    def _adopt(self, states: Any) -> None:
        """Brings loaded state to the owners, and forgets it elsewhere."""
        if not self._in_parts:
            return
        self._in_parts = False
        self._assign(list(self._started))
        entries = [
            (p, name, states[p].pop(name))
            for p in self._started
            for field, name in self._entries(p)
            if field.sharded and name in states[p]
        ]
        keys = [p for p, _, _ in entries]
        wholes = self._to_owners(keys, [part for _, _, part in entries])
        for (p, name, _), whole in zip(entries, wholes, strict=True):
            if whole is not None:
                states[p][name] = whole
        for p in self._started:
            if self._owners[p] != self._own(p):
                for _, name in self._entries(p):
                    states[p].pop(name, None)

    def _to_owners(self, params: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor | None]:
        """The whole of each tensor that is cut up like a parameter; None where another owns it.

        Args:
            params: The parameters, some perhaps repeatedly.
            parts: This process's part of each tensor.
        """
        result: list[Tensor | None] = [None] * len(params)
        for places in _kinds(parts):
            size, own = self._size(params[places[0]]), self._own(params[places[0]])
            sent = _by_rank(size, places, [self._owners[p] for p in params])
            mine = sent[own]
            wholes = {i: parts[i].new_empty(params[i].shape) for i in mine}
            # Entry by entry, what each process holds of it.
            pieces = {i: _pieces(wholes[i], params[i], size) for i in mine}
            message = [parts[i] for row in sent for i in row]
            received = _exchange(
                [sum(parts[i].numel() for i in row) for row in sent],
                [sum(pieces[i][rank].numel() for i in mine) for rank in range(size)],
                message,
                parts[places[0]],
                _group(params[places[0]]),
            )
            _fill([pieces[i][rank] for rank in range(size) for i in mine], received)
            for i, whole in wholes.items():
                result[i] = whole
        return result

    def _from_owners(
        self, params: Sequence[Tensor], wholes: Sequence[Tensor | None], parts: Sequence[Tensor]
    ) -> None:
        """Fills this process's part of tensors that are cut up like parameters.

        Args:
            params: The parameters, some perhaps repeatedly.
            wholes: The tensors; None where another process owns them.
            parts: Where they go.
        """
        for places in _kinds(parts):
            size, own = self._size(params[places[0]]), self._own(params[places[0]])
            sources = _by_rank(size, places, [self._owners[p] for p in params])
            pieces: dict[int, Sequence[Tensor]] = {}
            for i in sources[own]:
                whole = wholes[i]
                assert whole is not None
                pieces[i] = _pieces(whole, params[i], size)
            received = _exchange(
                [sum(row[rank].numel() for row in pieces.values()) for rank in range(size)],
                [sum(parts[i].numel() for i in row) for row in sources],
                [row[rank] for rank in range(size) for row in pieces.values()],
                parts[places[0]],
                _group(params[places[0]]),
            )
            _fill([parts[i] for row in sources for i in row], received)

    def _broadcast(self, entries: Sequence[tuple[Tensor, dict[str, Any], str]]) -> None:
        """Replaces state by the owner's, with one message for each owner and dtype.

        Args:
            entries: The parameter, a state, and the name in it.
        """
        tensors = [state[name].to(p.device) for p, state, name in entries]
        for places in _kinds(tensors):
            first = entries[places[0]][0]
            size, own, group = self._size(first), self._own(first), _group(first)
            if size == 1:
                continue
            owners = [self._owners[p] for p, _, _ in entries]
            for rank, row in enumerate(_by_rank(size, places, owners)):
                if row:
                    message = torch.cat([tensors[i].reshape(-1) for i in row])
                    dist.broadcast(message, dist.get_global_rank(group, rank), group=group)
                    if rank != own:
                        _fill([tensors[i] for i in row], message)
        for (_, state, name), tensor in zip(entries, tensors, strict=True):
            state[name] = tensor

    def _size(self, p: Tensor) -> int:
        group = _group(p)
        return 1 if group is None else dist.get_world_size(group)

    def _own(self, p: Tensor) -> int:
        group = _group(p)
        return 0 if group is None else dist.get_rank(group)


def owners_of(
    fields: Sequence[ParameterField], groups: Sequence[dict[str, Any]], known: Owners | None
) -> Owners | None:
    """The owners of an optimizer's parameters; None where each process steps its part alone.

    Args:
        fields: The declared state of each parameter.
        groups: The groups. All of their parameters are sharded, or none.
        known: The owners so far.
    """
    if not is_distributed(next((p for group in groups for p in group["params"]), _PLAIN)):
        return None
    owners = Owners(fields) if known is None else known
    owners.groups = {p: group for group in groups for p in group["params"]}
    return owners if any(map(owners._needs_whole, owners.groups)) else None


def make_state(
    fields: Sequence[ParameterField],
    groups: Sequence[dict[str, Any]],
    states: Any,
    params: Sequence[Tensor],
    on_device: bool,
) -> None:
    """Gives parameters a state before any step, except for those that owners are to have.

    Args:
        fields: The declared state of each parameter.
        groups: The groups.
        states: The optimizer's state by parameter.
        params: The parameters.
        on_device: Whether counts are kept on their devices.
    """
    chosen = {id(p) for p in params}
    for group in groups:
        for p in group["params"]:
            if id(p) in chosen and not needs_whole(fields, p, group):
                prepare(fields, states[p], p, on_device=on_device, group=group)


def _cutting(p: Any) -> list[int]:
    """The dimensions of the mesh that cut a DTensor up."""
    return [i for i, placement in enumerate(p.placements) if placement.is_shard()]


def _group(p: Any) -> Any:
    """The processes that have parts of a DTensor; None where each has all of it."""
    dims = _cutting(p)
    return p.device_mesh.get_group(dims[0]) if dims else None


def _pieces(whole: Tensor, p: Any, size: int) -> Sequence[Tensor]:
    """Views of what each process holds of a tensor that is cut up like a parameter."""
    dims = _cutting(p)
    if not dims:
        return [whole]
    pieces = whole.chunk(size, dim=p.placements[dims[0]].dim)
    empty = whole.reshape(-1)[:0]
    return [*pieces, *[empty] * (size - len(pieces))]


def _kinds(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of one dtype and device, which can go into one message."""
    kinds: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    return list(kinds.values())


def _by_rank(size: int, places: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """The places that belong to each process."""
    rows: list[list[int]] = [[] for _ in range(size)]
    for place in places:
        rows[owners[place]].append(place)
    return rows


def _exchange(
    sizes: list[int], incoming: list[int], pieces: Sequence[Tensor], like: Tensor, group: Any
) -> Tensor:
    """Sends each process its share of a message, and gives what came from all of them.

    Args:
        sizes: The number of entries for each process.
        incoming: The number of entries from each.
        pieces: The entries, in the order of the processes.
        like: A tensor of their dtype and device.
        group: The processes; None for this one alone.
    """
    message = torch.cat([like.new_empty(0), *(piece.reshape(-1) for piece in pieces)])
    if group is None or len(sizes) == 1:
        return message
    received = like.new_empty(sum(incoming))
    dist.all_to_all_single(received, message, incoming, sizes, group=group)
    return received


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Copies a vector into tensors, one after the other."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))
