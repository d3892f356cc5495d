"""Declared state on its way into checkpoints and back.

State of the whole model is saved under the first trainable parameter, beside what is that
parameter's own; `torch.distributed.checkpoint` drops the state of frozen ones. Where vectors are
cut up, there is a part of each under each parameter, in full size from the beginning, and numbers
are tensors: `torch.distributed.checkpoint` loads into the tensors that a new optimizer shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._optim.state import cut_state, held_state
from torch_secondorder._params.vector import ParameterVector

#: Names of cut-up vectors in a checkpoint begin with it.
_PREFIX = "flat_"


def show_names(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Puts the names of whole-model state where `torch.distributed.checkpoint` looks for them.

    It finds in a flattened checkpoint only what `optimizer.state` has a name for. There is None
    under each; `state_dict` gives values.

    Args:
        optimizer: The optimizer.
        params: Its trainable parameters, or all if none is trained.
    """
    state, named = optimizer.state, optimizer._named
    if not params or (named is not None and state.get(params[0]) is named):
        return
    hide_names(optimizer)
    optimizer._named = state[params[0]]
    shown = [name for f in optimizer._model_fields for name in (f.name, *f.small_names)]
    optimizer._named.update(dict.fromkeys(sorted(shown)))
    if optimizer._in_pieces:
        vectors = [_PREFIX + name for f in optimizer._model_fields for name in f.vector_names]
        for p in params:
            if p.numel():
                state[p].update(dict.fromkeys(vectors))


def hide_names(optimizer: Any) -> None:
    """Takes the names of whole-model state out of `optimizer.state`, and what is under them."""
    names = _names(optimizer)
    for state in optimizer.state.values():
        for name in [n for n in state if n in names or n.startswith(_PREFIX)]:
            del state[name]
    optimizer._named = None


def _names(optimizer: Any) -> set[str]:
    return {name for field in optimizer._model_fields for name in field.names}


def add_state(optimizer: Any, states: dict[int, dict[str, Any]]) -> None:
    """Adds whole-model state to a state dict.

    Args:
        optimizer: The optimizer.
        states: The states by the numbers of their parameters. All trainable parameters get one,
            which distributed checkpoints want.
    """
    optimizer._before_saving()
    if optimizer._in_pieces and optimizer._trainable:
        _add_pieces(optimizer, states)
        return
    params, names = optimizer._parameters, _names(optimizer)
    numbers = [number for number, p in enumerate(params) if p.requires_grad]
    for number in numbers or range(len(params))[:1]:
        states.setdefault(number, {})
    # Beside the parameter's own state, not in it: the tensors may be replaced.
    for number, state in states.items():
        states[number] = {k: v for k, v in state.items() if k not in names and v is not None}
    for number in (numbers or range(len(params)))[:1]:
        states[number] |= optimizer._export_state()


def _add_pieces(optimizer: Any, states: dict[int, dict[str, Any]]) -> None:
    """See `add_state`; for vectors that are cut up."""
    vector = ParameterVector(optimizer._trainable)
    trained = {number: p for number, p in enumerate(optimizer._parameters) if p.requires_grad}
    fields = optimizer._parameter_fields
    states.clear()
    held, groups = optimizer._state_in_parts(), _groups(optimizer)
    states.update({n: cut_state(fields, held.get(p, {}), p, groups[n]) for n, p in trained.items()})
    numbers = [number for number, p in trained.items() if p.numel()]
    for field in optimizer._model_fields:
        small, vectors = field.cut(optimizer)
        states[numbers[0]] |= {name: _as_tensor(value) for name, value in small.items()}
        for name, rows in vectors.items():
            for number, part in zip(numbers, vector.distribute(*rows), strict=True):
                states[number][_PREFIX + name] = part


def take_state(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Takes over a checkpoint's state, from the original: torch casts to the parameters' dtypes.

    Raises:
        ValueError: It does not fit.
    """
    states, groups = _by_parameter(state_dict), _groups(optimizer)
    for number, (p, saved) in enumerate(zip(optimizer._parameters, states, strict=True)):
        held = held_state(optimizer._parameter_fields, saved, p, number, groups[number])
        if held:
            optimizer.state[p].update(held)
    found: dict[str, Any] = {}
    names = _names(optimizer)
    for state in states:
        found |= {k: _as_number(v) for k, v in state.items() if k in names and k not in found}
    if any(f.vector_names for f in optimizer._model_fields) and (
        optimizer._sharded or any(name.startswith(_PREFIX) for s in states for name in s)
    ):
        found = (found | _joined_vectors(optimizer, states)) if any(states) else {}
    optimizer._import_state(found)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The group of each parameter."""
    return [group for group in optimizer.param_groups for _ in group["params"]]


def _joined_vectors(optimizer: Any, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Vectors by their names, from their parts under each parameter."""
    if not optimizer._trainable:
        return {}
    vector = ParameterVector(optimizer._trainable)
    trained = {id(p) for p in vector.params}
    found = [s for p, s in zip(optimizer._parameters, states, strict=True) if id(p) in trained]
    names = [name for name in found[0] if name.startswith(_PREFIX)]
    if not names or any(name not in state for name in names for state in found):
        raise ValueError(
            "this state is not one of sharded parameters, or others were frozen when it was "
            "saved: save it from an optimizer of parameters that are sharded (over one rank "
            "is fine) and trained as here"
        )
    return {
        name.removeprefix(_PREFIX): vector.collect([state[name] for state in found])
        for name in names
    }


def _by_parameter(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The states in the order of the parameters, which are numbers, or names in checkpoints."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    found = [state_dict["state"].get(key, {}) for key in keys]
    # A flattened checkpoint gives an empty dict for a name that it does not have.
    return [
        {
            name: v
            for name, v in state.items()
            if v is not None and not (isinstance(v, dict) and not v)
        }
        for state in found
    ]


def _as_tensor(value: Any) -> Any:
    """A number as a tensor, also in dicts.

    `torch.distributed.checkpoint` loses plain numbers of states that are named by integers.
    """
    if isinstance(value, dict):
        return {name: _as_tensor(v) for name, v in value.items()}
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype) if isinstance(value, (int, float)) else value


def _as_number(value: Any) -> Any:
    """A 0-dim tensor as a number, also in dicts."""
    if isinstance(value, dict):
        return {name: _as_number(v) for name, v in value.items()}
    return value.item() if isinstance(value, Tensor) and not value.dim() else value
