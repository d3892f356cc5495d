"""The contractive penalty of an encoder inside a model, computed when the model calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder._foundation.private_torch import plainly
from torch_secondorder._foundation.subclasses import plain
from torch_secondorder.penalties.contractive import contractive_penalty


class Calls:
    """The penalties of an encoder's calls, until they are added to a loss.

    Attributes:
        taken: The values taken so far.
    """

    def __init__(self) -> None:
        self.taken: list[Tensor] = []
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, samples: int, penalty: Tensor) -> None:
        """Records the penalty of a call with a number of samples."""
        self._waiting.append((samples, penalty))

    def take(self) -> Tensor | None:
        """The mean over all samples since the last call, with its graph; None without samples."""
        if not self._waiting:
            return None
        total = sum(samples for samples, _ in self._waiting)
        value = torch.stack([penalty * (n / total) for n, penalty in self._waiting]).sum()
        self._waiting.clear()
        self.taken.append(value.detach())
        return value

    def seeds(self) -> None:
        """See `torch_secondorder._optim.wrapper.Values`."""


class EncoderPenalty:
    """The `contractive_penalty` of an encoder at the inputs it gets.

    Args:
        encoder: The module.
        method: See `contractive_penalty`.
        noise: Standard deviation of the noise; None for the plain penalty.
        n_noise: Noisy copies of each sample.
        n_projections: Random vectors for each sample.

    Raises:
        TypeError: The encoder is not a module.
        ValueError: An argument is out of range.

    >>> encoder = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
    >>> penalty = EncoderPenalty(encoder)
    >>> with penalty.watching() as calls:
    ...     _ = encoder(torch.zeros(5, 2))
    >>> bool(calls.take() == contractive_penalty(encoder, torch.zeros(5, 2)))
    True
    """

    def __init__(
        self,
        encoder: nn.Module,
        method: Literal["auto", "exact", "projection"] = "auto",
        *,
        noise: float | None = None,
        n_noise: int = 1,
        n_projections: int = 1,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                "the encoder is the module inside the model that maps inputs to codes, got "
                f"{type(encoder).__name__}"
            )
        check_choice("method", method, ("auto", "exact", "projection"))
        check_number("noise", noise, above=0, optional=True)
        check_integer("n_noise", n_noise)
        check_integer("n_projections", n_projections)
        self.encoder = encoder
        self._penalty = partial(
            contractive_penalty,
            encoder,
            method=method,
            noise=noise,
            n_noise=n_noise,
            n_projections=n_projections,
        )

    def at(
        self, x: Tensor, *, code: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The penalty of a batch; see `contractive_penalty`."""
        return self._penalty(x, generator=generator, code=code)

    @contextmanager
    def watching(
        self, generator: Callable[[torch.device], torch.Generator | None] = lambda _: None
    ) -> Iterator[Calls]:
        """A context that computes the penalty of each call with gradients enabled.

        If possible, the penalty shares the graph of the call, so one `backward()` serves both.

        Args:
            generator: Source of noise and random vectors, by device.

        Raises:
            TypeError: The encoder's input or output is not a tensor.
            ValueError: See `contractive_penalty`.
        """
        calls, busy = Calls(), False

        def note(module: nn.Module, args: Any, kwargs: Any, code: Any) -> None:
            nonlocal busy
            if busy or not torch.is_grad_enabled():
                return
            x = input_of(args, kwargs)
            values = plain(x)
            busy = True  # the penalty may call the encoder itself
            try:
                penalty = self.at(x, code=code, generator=generator(values.device))
                calls.add(len(values), penalty)
            finally:
                busy = False

        handle = self.encoder.register_forward_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()


class Recorder:
    """A forward hook that records the inputs of calls whose code a backward pass has reached.

    This is for loops without a closure, in which only `backward()` shows which calls count. A copy
    of the module gets a copy of its hooks: that copy is empty and records nothing.

    Args:
        encoder: The module to record; None for no module.

    Attributes:
        inputs: The recorded inputs.
        active: False pauses recording.
    """

    def __init__(self, encoder: nn.Module | None = None) -> None:
        self.inputs: list[Tensor] = []
        self.active = True
        self._encoder = (lambda: None) if encoder is None else weakref.ref(encoder)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, code: Any) -> None:
        """Registers a hook on the code for the backward pass."""
        if not (self.active and isinstance(code, Tensor)) or module is not self._encoder():
            return
        with plainly():
            if code.requires_grad:
                code.register_hook(partial(self._note, input_of(args, kwargs)))

    def _note(self, x: Tensor, _: Tensor) -> None:
        self.inputs.append(x)

    def __reduce__(self) -> Any:
        return Recorder, ()


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The only argument of an encoder's call, a tensor.

    Raises:
        TypeError: The encoder was called with other arguments.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        kinds = ", ".join(type(value).__name__ for value in given)
        raise TypeError(
            f"the penalty needs an encoder that takes one tensor; this one was called with "
            f"({kinds}): choose a module inside it that does, or add contractive_penalty of a "
            "function of one tensor to the loss"
        )
    return given[0]


def seeded(seed: int) -> Callable[[torch.device], torch.Generator]:
    """A function that makes a random generator for each device, with a seed."""
    made: dict[torch.device, torch.Generator] = {}

    def generator(device: torch.device) -> torch.Generator:
        if device not in made:
            made[device] = torch.Generator(device).manual_seed(seed)
        return made[device]

    return generator
