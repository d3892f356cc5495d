"""Declared state: an optimizer lists what its checkpoints hold, and writes no code for it.

An optimizer lists its state in the class attribute `_state_fields`, by the names that checkpoints
use. Each kind of field knows its form in memory, in a checkpoint, and in a checkpoint of sharded
parameters:

| kind | value | under `fully_shard` |
|---|---|---|
| `Number` | a number | whole in all processes |
| `Choice` | one of a few strings | whole |
| `Vector` | a vector `(n,)` over the trainable parameters, or a stack `(k, n)` | in parts |
| `Matrix` | a matrix `(n, n)` over the trainable parameters | refused |
| `Random` | the generator of random numbers | whole |
| `Nested` | an object with `state_dict` and `load_state_dict` | whole |
| `Count` | a number for each parameter | whole |
| `Moment` | a tensor like each parameter | in parts |
| `MasterCopy` | a copy of each low-precision parameter | in parts |
| `Factors` | a square matrix for each dimension of each parameter | whole |
| `BlockMatrices` | square matrices for the blocks that each parameter is cut into | whole |

Fields of the first six kinds describe the whole model; their values are attributes of the
optimizer, named like the field with an underscore in front. The values of the others are in
`optimizer.state[parameter]`; `prepare` makes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._optim.kronecker.partition import partition_of
from torch_secondorder._params.space import is_distributed, local, sharded_like
from torch_secondorder._params.vector import ParameterVector


def declare(**fields: Field) -> dict[str, Field]:
    """The fields by the names that checkpoints use, for the class attribute `_state_fields`."""
    for name, field in fields.items():
        field.bind(name)
    return fields


class Field:
    """A piece of state that an optimizer declares.

    Attributes:
        name: Its name in checkpoints.
    """

    name = ""

    def bind(self, name: str) -> None:
        """Notes the name that the field is declared under."""
        self.name = name


# State of the whole model.


#: State for checkpoints of sharded parameters. First numbers and tensors that are the same in all
#: processes: all of them from the beginning, in their final shapes. Then vectors, which are cut up:
#: `(n,)` and None, or a stack `(k, n)` and the number of rows that there is to be room for.
Pieces: TypeAlias = tuple[dict[str, Any], dict[str, tuple[Tensor, int | None]]]


class ModelField(Field, ABC):
    """State of the whole model, in an attribute of the optimizer.

    Args:
        at: The attribute, with dots for one of an object that an attribute holds; the field's name
            with an underscore in front by default.
    """

    #: Further names in checkpoints of sharded parameters, and those of vectors there.
    small_names: tuple[str, ...] = ()
    vector_names: tuple[str, ...] = ()
    #: Names in checkpoints of other optimizers, which `load` understands.
    foreign_names: tuple[str, ...] = ()
    #: The value before the first step.
    initial: Any = None
    #: Whether the value belongs to one vector of trainable parameters, and is dropped with it.
    of_vector = False

    def __init__(self, at: str = "") -> None:
        self.at = at

    def bind(self, name: str) -> None:
        """See `Field.bind`."""
        super().bind(name)
        self.at = self.at or f"_{name}"

    @property
    def names(self) -> tuple[str, ...]:
        """All names in checkpoints that belong to the field, parts of vectors left out."""
        return (self.name, *self.small_names, *self.vector_names, *self.foreign_names)

    def check_sharded(self, optimizer: str) -> None:
        """Raises a ValueError where the state cannot be kept for sharded parameters.

        Args:
            optimizer: The optimizer's name.
        """

    @property
    def held(self) -> bool:
        """True if the value belongs to an object that the optimizer holds, which also resets it."""
        return "." in self.at

    def get(self, optimizer: Any) -> Any:
        """The value."""
        return attrgetter(self.at)(optimizer)

    def set(self, optimizer: Any, value: Any) -> None:
        """Replaces the value."""
        *path, last = self.at.split(".")
        setattr(reduce(getattr, path, optimizer), last, value)

    def save(self, optimizer: Any) -> dict[str, Any]:
        """The state for a checkpoint: copies; empty where there is none."""
        value = self.get(optimizer)
        return {} if value is None else {self.name: copied(value)}

    def cut(self, optimizer: Any) -> Pieces:
        """The state for a checkpoint of sharded parameters, some of which are trainable."""
        return self.save(optimizer), {}

    @abstractmethod
    def load(self, found: Mapping[str, Any], optimizer: Any) -> Any:
        """The value from a checkpoint, which is `set` once the values of all fields are there.

        Args:
            found: What was saved, with vectors put together; it has one of the field's names.
            optimizer: The optimizer, which is not to change yet.

        Raises:
            ValueError: It does not fit.
        """


class Number(ModelField):
    """An integer, a float or a bool.

    Args:
        start: The number before the first step.
        at: See `ModelField`.
    """

    def __init__(self, start: float = 0, at: str = "") -> None:
        super().__init__(at)
        self.initial = start

    def load(self, found: Mapping[str, Any], optimizer: Any) -> Any:
        """See `ModelField.load`."""
        return type(self.initial)(found[self.name])


class Choice(ModelField):
    """One of a few strings, of which checkpoints have the number; or None, which is not saved.

    Args:
        options: The strings. The first is the initial one.
        at: See `ModelField`.
    """

    def __init__(self, options: Sequence[str], at: str = "") -> None:
        super().__init__(at)
        self.options, self.initial = options, options[0]

    def save(self, optimizer: Any) -> dict[str, Any]:
        """See `ModelField.save`."""
        value = self.get(optimizer)
        return {} if value is None else {self.name: self.options.index(value)}

    def load(self, found: Mapping[str, Any], optimizer: Any) -> str:
        """See `ModelField.load`."""
        return self.options[int(found[self.name])]


class Vector(ModelField):
    """A vector over all trainable parameters, `(n,)`, or None.

    Args:
        at: See `ModelField`.
        rows: For a stack `(k, n)` the largest `k`, computed from the optimizer.
    """

    of_vector = True

    def __init__(self, at: str = "", rows: Callable[[Any], int] | None = None) -> None:
        super().__init__(at)
        self.rows = rows

    def bind(self, name: str) -> None:
        """See `Field.bind`."""
        super().bind(name)
        self.small_names, self.vector_names = (f"has_{name}",), (name,)

    def fits(self, optimizer: Any, vector: ParameterVector) -> bool:
        """True if there is a value, and it has the size of the vector."""
        value = self.get(optimizer)
        return value is not None and value.shape[-1] == vector.size

    def cut(self, optimizer: Any) -> Pieces:
        """See `ModelField.cut`; zeros, marked as such, stand for a missing value."""
        vector = optimizer._known_vector()
        there = self.fits(optimizer, vector)
        value = self.get(optimizer) if there else self.zeros(vector)
        if self.rows is None:
            return {f"has_{self.name}": there}, {self.name: (value, None)}
        return {f"has_{self.name}": len(value)}, {self.name: (value, self.rows(optimizer))}

    def zeros(self, vector: ParameterVector) -> Tensor:
        """The place of a missing value."""
        shape = (vector.size,) if self.rows is None else (0, vector.size)
        return torch.zeros(shape, dtype=vector.dtype, device=vector.device)

    def load(self, found: Mapping[str, Any], optimizer: Any) -> Tensor | None:
        """See `ModelField.load`."""
        value, there = found.get(self.name), found.get(f"has_{self.name}", True)
        vector = optimizer._known_vector()
        if value is None or vector is None or there is False:
            return None
        if optimizer._trainable:
            check_size(value.shape[-1], vector)
        result: Tensor = value if there is True else value[:there]
        return result.to(vector.device, vector.dtype, copy=True)


class Matrix(Vector):
    """A matrix over all trainable parameters, `(n, n)`, or None. Parameters cannot be sharded.

    Args:
        at: See `ModelField`.
    """

    def __init__(self, at: str = "") -> None:
        super().__init__(at)

    def bind(self, name: str) -> None:
        """See `Field.bind`."""
        super().bind(name)
        self.vector_names = ()

    def check_sharded(self, optimizer: str) -> None:
        """See `ModelField.check_sharded`."""
        raise ValueError(
            f"{optimizer} keeps a matrix over all pairs of parameters, which cannot be sharded: "
            "use LBFGS, which shards its history, or leave fully_shard out"
        )

    def cut(self, optimizer: Any) -> Pieces:
        """See `ModelField.cut`; whole parameters of several processes are saved like that too."""
        small, vectors = super().cut(optimizer)
        return small | {self.name: vectors[self.name][0].clone()}, {}

    def zeros(self, vector: ParameterVector) -> Tensor:
        """See `Vector.zeros`."""
        return torch.zeros(vector.size, vector.size, dtype=vector.dtype, device=vector.device)


class Random(ModelField):
    """The optimizer's generator of random numbers, made where it is missing; see `_random`."""

    def save(self, optimizer: Any) -> dict[str, Any]:
        """See `ModelField.save`."""
        if optimizer._generator is None and optimizer._trainable:
            optimizer._random(optimizer._known_vector().device)  # there has to be one to load into
        generator = optimizer._generator
        return {} if generator is None else {self.name: generator.get_state()}

    def load(self, found: Mapping[str, Any], optimizer: Any) -> torch.Generator | None:
        """See `ModelField.load`."""
        vector = optimizer._known_vector()
        if vector is None:
            return None
        generator = torch.Generator(vector.device)
        try:
            return generator.set_state(found[self.name].cpu())
        except RuntimeError:  # saved on a device of another type: other numbers, as good
            return generator.manual_seed(int(optimizer._seed) + int(found.get("steps", 0)))


class Nested(ModelField):
    """An object that has `state_dict` and `load_state_dict`, or None.

    Its state is made of numbers, tensors, and lists and dicts of them, which are the same in all
    processes. 0-dim tensors come back as numbers. An empty dict resets it.
    """

    def save(self, optimizer: Any) -> dict[str, Any]:
        """See `ModelField.save`."""
        value = self.get(optimizer)
        return {} if value is None else {self.name: value.state_dict()}

    def load(self, found: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
        """See `ModelField.load`."""
        state: dict[str, Any] = copied(found[self.name])
        return state

    def set(self, optimizer: Any, value: dict[str, Any] | None) -> None:
        """See `ModelField.set`; takes a state."""
        held = self.get(optimizer)
        if held is not None:
            held.load_state_dict(value or {})


# State of each parameter.


#: The hyperparameters of a parameter's group.
Group: TypeAlias = Mapping[str, Any] | None


class ParameterField(Field, ABC):
    """State of each parameter, in `optimizer.state[parameter]`."""

    #: Whether processes that share a parameter have a part each.
    sharded = True

    def names(self, p: Tensor, group: Group = None) -> Iterable[str]:
        """The names of a parameter's state."""
        return (self.name,)

    @abstractmethod
    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """Makes the state of a parameter, or brings it to what the parameter is now.

        Args:
            state: Of the parameter.
            p: The parameter.
            on_device: Whether numbers are kept on the parameter's device.
            group: The hyperparameters of its group.
        """

    def shape(self, p: Tensor, name: str, group: Group = None) -> torch.Size:
        """The shape of a tensor in this process."""
        return as_real(p).shape


class Count(ParameterField):
    """A count for each parameter, a 0-dim float32 tensor.

    Args:
        on_host: Whether it is on the CPU also where other counts are on a device.
    """

    sharded = False

    def __init__(self, *, on_host: bool = False) -> None:
        self.on_host = on_host

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        count = torch.as_tensor(state.get(self.name, 0.0), dtype=torch.float32)
        stays = self.on_host or not on_device
        state[self.name] = count.to(torch.device("cpu") if stays else p.device)

    def shape(self, p: Tensor, name: str, group: Group = None) -> torch.Size:
        """See `ParameterField.shape`."""
        return torch.Size()


class Moment(ParameterField):
    """A tensor like each parameter, float32 or wider, zeros at first.

    A complex number is a pair, as in `torch.view_as_real`.
    """

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        real = as_real(p)
        dtype = torch.promote_types(real.dtype, torch.float32)
        held = state.get(self.name)
        initial = torch.zeros(real.shape) if held is None else held
        state[self.name] = initial.to(p.device, dtype)


class MasterCopy(ParameterField):
    """A float32 copy of each parameter that is narrower, so that small steps add up."""

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        real = as_real(p)
        dtype = torch.promote_types(real.dtype, torch.float32)
        if dtype == real.dtype:
            state.pop(self.name, None)
        elif self.name not in state:
            state[self.name] = real.to(dtype, copy=True)


class Factors(ParameterField):
    """A square matrix for each dimension of each parameter, as Kronecker-factored methods keep.

    The matrix of dimension `d` is `state[f"{name}_{d}"]`, of shape `(p.shape[d], p.shape[d])`, in
    the parameter's dtype or float32 where that is wider. Under `fully_shard` all processes have
    the matrices of whole parameters.

    Args:
        scale: What the identity is multiplied by at first.
        max_size: Longer dimensions get no matrix; None for no bound.

    >>> fields = declare(factor=Factors(max_size=100))
    >>> weight, state = torch.ones(3, 200), {}
    >>> prepare(fields.values(), state, weight)
    >>> {name: tuple(matrix.shape) for name, matrix in state.items()}
    {'factor_0': (3, 3)}
    """

    sharded = False

    def __init__(self, scale: float = 0.0, max_size: int | None = None) -> None:
        self.scale = scale
        self.max_size = max_size

    def names(self, p: Tensor, group: Group = None) -> Iterable[str]:
        """See `ParameterField.names`."""
        return [
            f"{self.name}_{dim}"
            for dim, size in enumerate(p.shape)
            if self.max_size is None or size <= self.max_size
        ]

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        for name in self.names(p):
            held = state.get(name)
            initial = self.scale * torch.eye(self.shape(p, name)[0]) if held is None else held
            state[name] = initial.to(p.device, dtype)

    def shape(self, p: Tensor, name: str, group: Group = None) -> torch.Size:
        """See `ParameterField.shape`."""
        size = p.shape[int(name.rpartition("_")[2])]
        return torch.Size((size, size))


class BlockMatrices(ParameterField):
    """Square matrices for the sides of the blocks that a parameter is cut into.

    See `torch_secondorder._optim.kronecker.partition`; the group of the parameter has the
    hyperparameters of the partition. For the blocks of tile `k` the matrices of the rows are
    `state[f"{name}_left_{k}"]`, `(blocks, rows, rows)`, and those of the columns are
    `state[f"{name}_right_{k}"]`. They are float32 or wider, or in `group["factor_dtype"]`. Under
    `fully_shard` all processes have the matrices of whole parameters.

    Args:
        scale: What the identity is multiplied by at first.
        wide: Whether they are float32 or wider in any case.

    >>> fields = declare(factor=BlockMatrices())
    >>> weight, state = torch.ones(3, 200), {}
    >>> group = {"block_size": 100, "max_precond_dim": 1000, "merge_dims": True}
    >>> prepare(fields.values(), state, weight, group=group)
    >>> {name: tuple(matrices.shape) for name, matrices in state.items()}
    {'factor_left_0': (2, 3, 3), 'factor_right_0': (2, 100, 100)}
    """

    sharded = False

    def __init__(self, scale: float = 0.0, *, wide: bool = False) -> None:
        self.scale, self.wide = scale, wide

    def _shapes(self, p: Tensor, group: Group) -> dict[str, tuple[int, int, int]]:
        assert group is not None
        blocks = partition_of(p, group)
        tiles = () if blocks is None else blocks.tiles
        return {
            f"{self.name}_{side}_{k}": (tile.blocks, size, size)
            for k, tile in enumerate(tiles)
            for side, size in tile.sides.items()
        }

    def names(self, p: Tensor, group: Group = None) -> Iterable[str]:
        """See `ParameterField.names`."""
        return self._shapes(p, group)

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        assert group is not None
        real = torch.promote_types(as_real(p).dtype, torch.float32)
        dtype = None if self.wide else group.get("factor_dtype")
        shapes = self._shapes(p, group)
        for name in [n for n in state if n.startswith(self._prefixes) and n not in shapes]:
            del state[name]
        for name, shape in shapes.items():
            held = state.get(name)
            initial = self.scale * torch.eye(shape[-1]).expand(shape) if held is None else held
            state[name] = initial.to(p.device, dtype or real)

    def shape(self, p: Tensor, name: str, group: Group = None) -> torch.Size:
        """See `ParameterField.shape`."""
        return torch.Size(self._shapes(p, group)[name])

    def fits(self, state: Mapping[str, Any], p: Tensor, group: Group) -> bool:
        """True if a state has the matrices of the parameter's blocks, and no others."""
        held = {name: tuple(state[name].shape) for name in state if name.startswith(self._prefixes)}
        return held == self._shapes(p, group)

    @property
    def _prefixes(self) -> tuple[str, str]:
        return f"{self.name}_left_", f"{self.name}_right_"


def prepare(
    fields: Iterable[ParameterField],
    state: dict[str, Any],
    p: Tensor,
    *,
    on_device: bool = False,
    group: Group = None,
) -> None:
    """Makes the declared state of a parameter, or brings it to what the parameter is now.

    Args:
        fields: What is declared; an optimizer has it as `_parameter_fields`.
        state: Of the parameter, `optimizer.state[p]`.
        p: The parameter.
        on_device: Whether counts are kept on its device.
        group: The hyperparameters of its group, for `BlockMatrices`.
    """
    for field in fields:
        field.prepare(state, p, on_device=on_device, group=group)


def cut_state(
    fields: Iterable[ParameterField], state: Mapping[str, Any], p: Tensor, group: Group = None
) -> dict[str, Any]:
    """A copy of a parameter's state for a checkpoint, all of it, and DTensors if it is sharded."""
    found, result = dict(state), {}
    for field in fields:
        field.prepare(found, p, on_device=False, group=group)
        for name in field.names(p, group):
            if name in found:
                value = found[name].clone()
                in_parts = field.sharded and is_distributed(p)
                result[name] = sharded_like(value, p) if in_parts else value
    return result


def held_state(
    fields: Iterable[ParameterField],
    saved: Mapping[str, Any],
    p: Tensor,
    number: int,
    group: Group = None,
) -> dict[str, Tensor]:
    """The part of a parameter's saved state that this process holds: copies.

    Args:
        fields: What is declared.
        saved: The state in the checkpoint.
        p: The parameter.
        number: Its number, for messages.
        group: The hyperparameters of its group.

    Raises:
        ValueError: A shape does not fit.
    """
    result = {}
    for field in fields:
        for name in field.names(p, group):
            if not isinstance(saved.get(name), Tensor):
                continue
            part, shape = local(saved[name]), field.shape(p, name, group)
            if part.shape != shape:
                raise ValueError(
                    f"{name} of parameter {number} has shape {tuple(part.shape)} in this process, "
                    f"and belongs to a shape of {tuple(shape)}: load it with the model that it was "
                    "saved with; if that is sharded, into this optimizer's state_dict() by "
                    "torch.distributed.checkpoint, which cuts it up anew"
                )
            result[name] = part.to(p.device, copy=True)
    return result


# Tools.


def as_real(tensor: Tensor) -> Tensor:
    """The tensor without a graph, dense and real, a complex number as a pair.

    Of a sharded tensor, the part that this process holds.
    """
    tensor = local(tensor).detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_size(size: int, vector: ParameterVector) -> None:
    """Raises a ValueError unless a state of `size` parameter entries fits the vector."""
    if size != vector.size:
        raise ValueError(
            f"this state is of {size} parameter entries, the optimizer has {vector.size}: load it "
            "with the model and the frozen parameters that it was saved with"
        )


def copied(value: Any) -> Any:
    """A copy of tensors, and of lists and dicts of them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copied(v) for v in value]
    return value
