"""A simulated CUDA device: numbers on the host, the rules of a device, and a count of its waits."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.host_reads import reads
from torch_secondorder._autograd.backward_hook import is_outermost

#: The device that is simulated.
DEVICE = torch.device("cuda", 0)

_META = torch.device("meta")
_IS_META: Callable[[Tensor], bool] = torch._C.TensorBase.is_meta.__get__
_PLACE: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__
_REAL_GENERATOR = torch.Generator
# Operations, besides pointwise ones, that take 0-dim tensors of the host.
_TAKE_NUMBERS = ("aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPYING = ("aten::copy_", "aten::_foreach_copy_", "aten::_to_copy")
_ROOTS = ("torch_secondorder", "tests")


class Event(NamedTuple):
    """A moment when host and device meet.

    Attributes:
        name: The operation.
        frames: The functions that were running, as `file:function`, innermost first.
    """

    name: str
    frames: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} in {' < '.join(self.frames[:4])}"

    def within(self, *names: str) -> bool:
        """True if one of these functions was running: `file:function`, or `file:` for any."""
        return any(frame.startswith(name) for frame in self.frames for name in names)


class SimulatedDevice(contextlib.ExitStack):
    """A context in which `cuda` is a device without a GPU.

    Tensors of the device are plain tensors on PyTorch's `meta` device, so that autograd,
    `torch.func` and compiled formulas treat them as any tensor. Python code sees them on
    `cuda:0`. Each of their storages has a twin in the host's memory, on which operations compute:
    numbers are right. As on a device,

    - an operation on tensors of two places raises, except for copies, 0-dim tensors of the host in
      pointwise operations, and indices;
    - a generator of another device raises;
    - `.numpy()` raises.

    `cuda` stands for one device. Sparse tensors, CUDA autocast, streams and graphs are not
    simulated.

    Attributes:
        reads: Where the host waited for the device.
        uploads: Where the host sent tensors to the device.

    >>> with SimulatedDevice() as device:
    ...     x = torch.tensor([3.0, 4.0], device="cuda", requires_grad=True)
    ...     x.square().sum().backward()
    ...     x.grad.device, x.grad.tolist(), len(device.reads)
    (device(type='cuda', index=0), [6.0, 8.0], 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Event] = []
        self.uploads: list[Event] = []

    def __enter__(self) -> SimulatedDevice:
        super().__enter__()
        generator = torch.Generator().manual_seed(0)
        for target, name, new in _replacements(generator):
            self.enter_context(mock.patch.object(target, name, new, create=True))
        self.enter_context(_Placing())
        self.enter_context(_Numbers(self, generator))
        return self

    def take(self) -> list[Event]:
        """The reads so far, which are forgotten."""
        taken, self.reads = self.reads, []
        return taken


def _event(name: str) -> Event:
    frame: types.FrameType | None = sys._getframe(1)
    frames = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _ROOTS and not module.startswith("tests.support.simu"):
            frames.append(f"{module.removeprefix('torch_secondorder.')}:{frame.f_code.co_name}")
        frame = frame.f_back
    return Event(name, tuple(frames))


# What Python code sees.


def _seen_device(tensor: Tensor) -> torch.device:
    if _on_device(tensor):
        return DEVICE
    with torch._C.DisableTorchFunction():
        return _PLACE(tensor)


def _is_seen_on_meta(tensor: Tensor) -> bool:
    return _seen_device(tensor).type == "meta"


def _on_device(value: Any) -> bool:
    # Below the simulation, or where somebody has taken it off to print, meta tensors are just that.
    if not isinstance(value, Tensor) or not torch._C._len_torch_dispatch_stack():
        return False
    with torch._C.DisableTorchFunction():
        return _IS_META(value)


class _GeneratorType(type(_REAL_GENERATOR)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _REAL_GENERATOR)


class _Generator(_REAL_GENERATOR, metaclass=_GeneratorType):
    """A generator of the host that may belong to the device; its numbers are the host's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self.place.type == "cuda" else self.place


def _replacements(generator: torch.Generator) -> Iterator[tuple[Any, str, Any]]:
    """What is put in the place of PyTorch's own."""
    yield torch.Tensor, "device", property(_seen_device)
    yield torch.Tensor, "is_cuda", property(_on_device)
    yield (
        torch.Tensor,
        "is_meta",
        property(lambda t: _PLACE(t).type == "meta" and not _on_device(t)),
    )
    yield torch, "Generator", _Generator
    yield torch.backends.cudnn, "is_acceptable", lambda tensor: False
    yield torch.autograd, "_engine_run_backward", _placing(torch.autograd._engine_run_backward)
    cuda = torch.cuda
    yield cuda, "get_rng_state", lambda device="cuda": generator.get_state()
    yield cuda, "set_rng_state", lambda state, device="cuda": generator.set_state(state)
    yield cuda, "is_current_stream_capturing", lambda: False
    yield cuda, "current_device", lambda: 0
    yield cuda, "memory_allocated", lambda device=None: 0
    yield cuda, "memory_reserved", lambda device=None: 0
    yield cuda, "mem_get_info", lambda device=None: (2**34, 2**34)
    stream = types.SimpleNamespace(synchronize=lambda: None)
    yield cuda, "current_stream", lambda device=None: stream
    properties = types.SimpleNamespace(total_memory=2**34, multi_processor_count=100)
    yield cuda, "get_device_properties", lambda device=None: properties


def _placing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which tensors are placed, also where another one is being handled."""

    def placing(*args: Any, **kwargs: Any) -> Any:
        with _Placing():
            return function(*args, **kwargs)

    return placing


def _place(value: Any) -> Any:
    """A device as PyTorch is told it."""
    if isinstance(value, torch.device):
        return _META if value.type == "cuda" else value
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return _META
    return value


class _Placing(TorchFunctionMode):
    """Puts tensors for `cuda` where the simulation has them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        special = _SPECIAL.get(func) or _SPECIAL.get(_let_through(func))
        if special is not None:
            done, result = special(*args, **kwargs)
            if done:
                return result
        if kwargs.get("generator") is not None:
            _check_generator(func, args, kwargs)
        args = tuple(map(_place, args))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _place(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _let_through(func: Any) -> Any:
    """PyTorch's own `backward`, where the package's replacement has nobody to ask."""
    replaced = getattr(func, "__name__", None) == "backward" and hasattr(func, "__wrapped__")
    return inspect.unwrap(func) if replaced and is_outermost() else None


def _check_generator(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    at = kwargs.get("device") or (None if first is None else _seen_device(first))
    wanted, found = torch.device(at or "cpu").type, kwargs["generator"].device.type
    if wanted != found:
        raise RuntimeError(
            f"Expected a '{wanted}' device type for generator but found '{found}' ({func})"
        )


_Special = tuple[bool, Any]
_NOT_DONE = (False, None)


def _tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any):
    if _place(device) is not _META:
        return _NOT_DONE
    made = torch.tensor(data, **kwargs).to(_META)
    return True, made.requires_grad_(requires_grad)


def _as_tensor(data: Any, *, device: Any = None, **kwargs: Any) -> _Special:
    if isinstance(data, Tensor) or _place(device) is not _META:
        return _NOT_DONE
    return True, torch.as_tensor(data, **kwargs).to(_META)


def _new_tensor(tensor: Tensor, data: Any, *, dtype: Any = None, device: Any = None) -> _Special:
    if not _on_device(tensor) and _place(device) is not _META:
        return _NOT_DONE
    return True, torch.tensor(data, dtype=dtype or tensor.dtype).to(_place(device) or _META)


def _tolist(tensor: Tensor) -> _Special:
    return (True, tensor.cpu().tolist()) if _on_device(tensor) else _NOT_DONE


def _to_numpy(tensor: Tensor, *_: Any, **__: Any) -> _Special:
    if _on_device(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return _NOT_DONE


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> _Special:
    if not _on_device(tensor):
        return _NOT_DONE
    if id(tensor) in memo:
        return True, memo[id(tensor)]
    with torch.no_grad():
        made = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, tensor.requires_grad)
    else:
        made.requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = made
    return True, made


def _data_ptr(tensor: Tensor) -> _Special:
    numbers = _Numbers.active
    if numbers is None or not _on_device(tensor):
        return _NOT_DONE
    with torch._C.DisableTorchFunction():
        return True, numbers.value(tensor.detach()).data_ptr()


def _repr(tensor: Tensor, *_: Any, **__: Any) -> _Special:
    if not _on_device(tensor):
        return _NOT_DONE
    return True, f"{tensor.detach().cpu()!r} on {DEVICE}"


def _backward(
    tensor: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any
) -> _Special:
    # A mode is off while it handles a function; inside this one, others make tensors.
    with _Placing():
        torch.autograd.backward(tensor, gradient, *args, **kwargs)
    return True, None


def _cuda(tensor: Tensor, *_: Any, **__: Any) -> _Special:
    return True, tensor.to(_META)


def _get_device(tensor: Tensor) -> _Special:
    return (True, 0) if _on_device(tensor) else _NOT_DONE


_SPECIAL: dict[Any, Callable[..., _Special]] = {
    torch.tensor: _tensor,
    torch.as_tensor: _as_tensor,
    Tensor.new_tensor: _new_tensor,
    Tensor.tolist: _tolist,
    Tensor.numpy: _to_numpy,
    Tensor.__array__: _to_numpy,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.data_ptr: _data_ptr,
    Tensor.cuda: _cuda,
    Tensor.backward: _backward,
    Tensor.__repr__: _repr,
    Tensor.get_device: _get_device,
}


# What operations do.


class _Plan(NamedTuple):
    """The way to run an operation.

    Attributes:
        name: Its name.
        native: True if it changes or makes views, which meta tensors do by themselves.
        results: For each result the argument that it is, by position and name; None for a new one.
        written: The arguments that are written, by position and name.
        pointwise: True if 0-dim tensors of the host may take part.
        random: True if it draws.
        composite: True if it is made of other operations only.
    """

    name: str
    native: bool
    results: tuple[tuple[int, str] | None, ...]
    written: tuple[tuple[int, str], ...]
    pointwise: bool
    random: bool
    composite: bool


def _plan(func: Any) -> _Plan:
    schema = func._schema
    sets = {}
    written = []
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None:
            for name in a.alias_info.before_set:
                sets[name] = (i, a.name)
            if a.alias_info.is_write:
                written.append((i, a.name))
    native, results = torch.Tag.inplace_view in func.tags, []
    for r in schema.returns:
        info = r.alias_info
        if info is None:
            results.append(None)
        elif info.is_write:
            results.append(sets[next(iter(info.before_set))])
        else:
            native = True
    if schema.name == "aten::set_":
        native = True
    pointwise = torch.Tag.pointwise in func.tags or schema.name.startswith("aten::_foreach")
    return _Plan(
        schema.name,
        native,
        tuple(results),
        tuple(written),
        pointwise or schema.name in _TAKE_NUMBERS,
        torch.Tag.nondeterministic_seeded in func.tags,
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Numbers(TorchDispatchMode):
    """Computes on the twins of the device's tensors."""

    active: ClassVar[_Numbers | None] = None
    # Twins by the address of the storage, which is not used again while the reference is held.
    # Tensors may be kept from one simulation to the next.
    _twins: ClassVar[dict[int, tuple[StorageWeakRef, torch.UntypedStorage]]] = {}
    _room: ClassVar[int] = 256
    _plans: ClassVar[dict[Any, _Plan]] = {}

    def __init__(self, device: SimulatedDevice, generator: torch.Generator) -> None:
        super().__init__()
        self._device, self._generator = device, generator

    def __enter__(self) -> _Numbers:
        _Numbers.active = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _Numbers.active = None
        super().__exit__(*exception)

    def value(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor of the device, as a tensor of the host in the twin's memory."""
        twin = self._twins[tensor.untyped_storage()._cdata][1]
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        value = torch.empty(0, dtype=tensor.dtype).set_(twin, *place)
        if tensor.is_conj():
            value = value.conj()
        return torch._neg_view(value) if tensor.is_neg() else value

    def _bind(self, storage: torch.UntypedStorage, twin: torch.UntypedStorage) -> None:
        if len(self._twins) >= self._room:
            gone = [key for key, (ref, _) in self._twins.items() if ref.expired()]
            for key in gone:
                del self._twins[key]
            _Numbers._room = 2 * len(self._twins) + 256
        self._twins[storage._cdata] = StorageWeakRef(storage), twin

    def _made(self, value: Any, among: list[tuple[Tensor, Tensor]]) -> Any:
        """A result as a tensor of the device."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._made(v, among) for v in value)
        if not isinstance(value, Tensor):
            return value
        if value.layout is not torch.strided:
            raise NotImplementedError("sparse tensors are not simulated")
        if value._is_zerotensor():  # without memory
            value = torch.zeros(value.shape, dtype=value.dtype)
        twin, shape = value.untyped_storage(), (value.size(), value.stride())
        for tensor, own in among:  # an operation that hands its argument on in another shape
            if own.untyped_storage()._cdata == twin._cdata:
                made = torch.empty(0, dtype=value.dtype, device=_META)
                return made.set_(tensor.untyped_storage(), value.storage_offset(), *shape)
        made = torch.empty_strided(*shape, dtype=value.dtype, device=_META)
        storage = made.untyped_storage()
        if value.storage_offset() or storage.nbytes() != twin.nbytes():
            storage = torch.empty(twin.nbytes(), dtype=torch.uint8, device=_META).untyped_storage()
            made = made.new_empty(0).set_(storage, value.storage_offset(), *shape)
        self._bind(storage, twin)
        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = _plan(func)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        there = [t for t in given if _IS_META(t)]
        target = kwargs.get("device")
        if not there and (target is None or target.type != "meta"):
            return func(*args, **kwargs)
        if plan.composite:  # in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if plan.name in _COPYING:
            return self._copy(plan, func, args, kwargs)
        if len(there) < len(given):
            if plan.name.startswith("aten::_foreach") and len(set(map(_IS_META, args[0]))) > 1:
                return self._by_place(func, args, kwargs)
            self._check_places(plan, func, args, kwargs)
        if there and reads(func, args, kwargs):
            self._device.reads.append(_event(plan.name))
        if plan.native:
            return func(*args, **kwargs)
        if plan.name == "aten::resize_":
            func(*args, **kwargs)
            storage = args[0].untyped_storage()
            self._twins[storage._cdata][1].resize_(storage.nbytes())
            return args[0]
        return self._compute(plan, func, args, kwargs)

    def _compute(self, plan: _Plan, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        among: list[tuple[Tensor, Tensor]] = []

        def on_host(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not _IS_META(value):
                    return value
                own = self.value(value)
                among.append((value, own))
                return own
            if isinstance(value, (list, tuple)):
                return type(value)(map(on_host, value))
            return value

        own_args = tuple(map(on_host, args))
        own_kwargs = {name: on_host(value) for name, value in kwargs.items()}
        target = kwargs.get("device")
        if target is not None:
            own_kwargs["device"] = torch.device("cpu")
        own_kwargs.pop("pin_memory", None)
        with self._drawing() if plan.random else contextlib.nullcontext():
            result = func(*own_args, **own_kwargs)
        for tensor, own in among:
            if tensor.shape != own.shape:
                raise NotImplementedError(f"{plan.name} has changed the shape of a result")
        if target is not None and target.type != "meta":  # `zeros_like(x, device="cpu")`
            return result
        if not plan.results:
            return result
        results = (result,) if len(plan.results) == 1 else result
        made = []
        for value, source in zip(results, plan.results, strict=True):
            if source is None:
                made.append(self._made(value, among))
            else:
                at, name = source
                made.append(kwargs[name] if name in kwargs else args[at])
        return made[0] if len(plan.results) == 1 else tuple(made)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draws from the device's own random numbers where no generator is given."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._generator.get_state())
        try:
            yield
        finally:
            self._generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _by_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on lists whose tensors are in two places, as on a device: one by one."""
        count, results = len(args[0]), [None] * len(args[0])
        for there in (True, False):
            chosen = [i for i in range(count) if _IS_META(args[0][i]) == there]
            if not chosen:
                continue
            part = [
                [a[i] for i in chosen] if isinstance(a, (list, tuple)) and len(a) == count else a
                for a in args
            ]
            found = self._run(func, tuple(part), kwargs)
            if found is not None:
                for i, value in zip(chosen, found, strict=True):
                    results[i] = value
        return None if not count or results[0] is None else results

    def _check_places(self, plan: _Plan, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises where tensors of two places meet."""
        arguments = [(i, v) for i, v in enumerate(args)] + list(kwargs.items())
        written = {key for place in plan.written for key in place}
        for key, value in arguments:
            for tensor in _tensors((value,)):
                if _IS_META(tensor) or (plan.name in _INDEXING and key == 1):
                    continue
                number = tensor.dim() == 0 and key not in written
                if number and (plan.pointwise or plan.name in _INDEXING):
                    continue
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:0 and cpu! (argument {key} of {func}, shape "
                    f"{tuple(tensor.shape)})"
                )
            if plan.name in _INDEXING and key == 1:
                self._device.uploads += [
                    _event(plan.name) for i in value if i is not None and not _IS_META(i)
                ]

    def _copy(self, plan: _Plan, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copies, within a place or from one to the other."""
        if plan.name == "aten::_to_copy":
            source, target = args[0], kwargs.get("device")
            to_device = _IS_META(source) if target is None else target.type == "meta"
            self._note(plan, source, to_device)
            own = self.value(source) if _IS_META(source) else source
            options = {name: v for name, v in kwargs.items() if name != "pin_memory"}
            copied = func(own, **{**options, "device": torch.device("cpu")})
            return self._made(copied, []) if to_device else copied
        several = plan.name == "aten::_foreach_copy_"
        pairs = zip(args[0], args[1], strict=True) if several else [(args[0], args[1])]
        for to, source in pairs:
            self._note(plan, source, _IS_META(to))
            own_to, own = (self.value(t) if _IS_META(t) else t for t in (to, source))
            own_to.copy_(own)
        return None if several else args[0]

    def _note(self, plan: _Plan, source: Tensor, to_device: bool) -> None:
        if _IS_META(source) and not to_device:
            self._device.reads.append(_event(plan.name))
        elif to_device and not _IS_META(source):
            self._device.uploads.append(_event(plan.name))
