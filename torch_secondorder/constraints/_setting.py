"""Arguments of a certificate: parameters with their names and options, and multipliers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._foundation.checks import check_number
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.bounds import BoxMaker
from torch_secondorder._params.box import Box
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.constraints._functions import ConstraintFunctions

#: Multipliers by the names of the constraints, or as one vector with the equalities first.
Multipliers: TypeAlias = Mapping[str, Tensor | float] | Tensor | None


class Setting(NamedTuple):
    """The parameters with what belongs to them.

    Attributes:
        vector: The parameters' vector.
        names: Their names.
        box: Their bounds; None for none.
        regularization: The changes to the loss before it is minimized.
    """

    vector: ParameterVector
    names: list[str]
    box: Box | None
    regularization: Regularization


def set_up(source: Any, params: Any, options: Mapping[str, Any]) -> Setting:
    """The setting that arguments give.

    Args:
        source: A closure or a `FunctionalObjective`.
        params: Parameters, groups or an optimizer; None for those of the latter.
        options: What takes the place of options of the groups; None in it for nothing.

    Raises:
        TypeError: Something given is no parameter, or parameters are sharded.
        ValueError: There is no parameter, or an option is out of range.
    """
    decoupled = False
    if isinstance(params, Optimizer):
        decoupled = getattr(_layers(params)[-1], "_decouples_weight_decay", False)
        params = params.param_groups
    elif params is not None and not isinstance(params, (Tensor, Iterable)):
        raise TypeError(
            f"params must be parameters, as model.parameters(), or an optimizer, got "
            f"{type(params).__name__}: it comes second, after the closure"
        )
    groups = _groups(source, params)
    for group in groups:
        if decoupled or group.get("decoupled_weight_decay"):
            group["weight_decay"] = 0.0
        group.update((name, value) for name, value in options.items() if value is not None)
        check_number("weight_decay", group.get("weight_decay", 0.0), low=0.0)
    signs = {bool(group.get("maximize", False)) for group in groups}
    if len(signs) > 1:
        raise ValueError("maximize must be the same in all groups: there is one loss")
    pure = isinstance(source, FunctionalObjective)
    found = [
        (p, name, float(group.get("weight_decay", 0.0)))
        for group in groups
        for p, name in zip(group["params"], group["param_names"], strict=True)
        if not isinstance(p, Tensor) or (p.numel() and (p.requires_grad or pure))
    ]
    vector = ParameterVector([p for p, _, _ in found])
    if vector.sharded:
        raise TypeError(
            "the parameters are sharded, and a certificate needs whole ones: load the full state "
            "dict into a model of its own, and certify that"
        )
    decays = tuple(decay for _, _, decay in found)
    regularization = Regularization(signs.pop(), decays if any(decays) else 0.0)
    box = BoxMaker()(groups, vector)
    return Setting(vector, [name for _, name, _ in found], box, regularization)


def _groups(source: Any, params: Any) -> list[dict[str, Any]]:
    """Parameters as groups with names; copies of those that were given."""
    names: dict[int, str] = {}
    if isinstance(source, FunctionalObjective):
        leaves, _ = pytree.tree_flatten_with_path(source._tree)
        names = {id(leaf): _dotted(pytree.keystr(path)) for path, leaf in leaves}
        if params is None:
            params = source.vector.params
    elif params is None:
        raise ValueError("params must be given beside a closure, for instance model.parameters()")
    listed: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    result: list[dict[str, Any]] = []
    count = 0
    for group in groups:
        found = group["params"]
        entries: Iterable[Any] = [found] if isinstance(found, Tensor) else found
        pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
        given = group.get("param_names") or [name for name, _ in pairs]
        tensors = [p for _, p in pairs]
        full = [
            name or names.get(id(p)) or f"parameter {count + i}"
            for i, (name, p) in enumerate(zip(given, tensors, strict=True))
        ]
        count += len(full)
        result.append({**group, "params": tensors, "param_names": full})
    return result


def _dotted(path: str) -> str:
    """The name of a leaf, such as `layers.0.weight` for `['layers'][0]['weight']`."""
    return ".".join(part for part in re.split(r"[\[\]'\".]+", path) if part)


def constraints_of(optimizer: Optimizer) -> tuple[ConstraintFunctions | None, Multipliers]:
    """The constraints and multipliers that an optimizer keeps; None for none.

    Multipliers of penalties alone stay zero, and count as none.

    Raises:
        ValueError: It keeps the parameters in sets, or constraints in two places.
    """
    # `Constrained` has a program; it is in a package above.
    layers = _layers(optimizer)
    keepers = [layer for layer in layers if vars(layer).get("_program") is not None]
    if any(getattr(layer, "_keeps_sets", False) for layer in layers):
        raise ValueError(
            "the optimizer keeps parameters in sets, which have multipliers that nobody knows: "
            "pass the parameters, and the sets as constraint functions"
        )
    if len(keepers) > 1:
        raise ValueError(
            "the optimizer has a Constrained inside another one: pass the parameters, and the "
            "constraints of both"
        )
    if not keepers:
        return None, None
    keeper: Any = keepers[0]
    program = keeper._program
    return program.functions, None if keeper.method == "penalty" else program.multipliers


def _layers(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those inside it, the innermost last."""
    layers = [optimizer]
    while isinstance(inside := vars(layers[-1]).get("_inside"), Optimizer):
        layers.append(inside)
    return layers


def given_multipliers(
    multipliers: Multipliers, functions: ConstraintFunctions | None
) -> Tensor | None:
    """Multipliers as a vector `(m,)`, float64 on the CPU; None if there are none."""
    if multipliers is None or (isinstance(multipliers, Mapping) and not multipliers):
        return None
    shapes = {} if functions is None else functions.split(torch.zeros(functions.size))
    if isinstance(multipliers, Mapping):
        if multipliers.keys() != shapes.keys():
            raise ValueError(
                f"multipliers must have one entry for each of {', '.join(shapes) or 'nothing'}, "
                f"got {', '.join(map(str, multipliers))}"
            )
        parts = [_numbers(name, multipliers[name]) for name in shapes]
        for (name, like), part in zip(shapes.items(), parts, strict=True):
            if part.shape != like.shape:
                raise ValueError(
                    f"the multipliers of {name} must have its shape {tuple(like.shape)}, got "
                    f"{tuple(part.shape)}"
                )
        vector = torch.cat([part.reshape(-1) for part in parts])
    else:
        vector = _numbers("all constraints", multipliers)
        size = sum(like.numel() for like in shapes.values())
        if vector.shape != (size,):
            raise ValueError(
                f"multipliers must be a vector with an entry for each of the {size} constraints, "
                f"equalities first, got shape {tuple(vector.shape)}"
            )
    return vector


def _numbers(name: str, given: Any) -> Tensor:
    try:
        found = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the multipliers of {name} must be numbers or a tensor, got {type(given).__name__}"
        ) from error
    if not bool(found.isfinite().all()):
        raise ValueError(f"the multipliers of {name} must be finite, got {given}")
    return found
