"""A wrapper that adds the contractive penalty to what any optimizer minimizes."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._foundation.checks import check_number
from torch_secondorder._foundation.private_torch import OPTIMIZER_HOOKS
from torch_secondorder._optim.base import makes_state_only
from torch_secondorder._optim.info import Report, StepInfo
from torch_secondorder._optim.penalized import Penalized, not_called
from torch_secondorder._optim.present import Scaling
from torch_secondorder.penalties._encoder import Calls, EncoderPenalty, Recorder

__all__ = ["Contractive", "ContractiveInfo"]

_NAME = "contractive"  # in checkpoints


@dataclass(frozen=True, slots=True)
class ContractiveInfo(Report):
    """Report of one call of `Contractive.step()`.

    Attributes:
        loss: The closure's, without the penalty, in the first evaluation; NaN without a closure.
        penalty: The penalty there, not multiplied by the weight.
        weight: The weight.
        inner: The report of the optimizer inside, if it gives one; its losses are with the penalty.
    """

    loss: float
    penalty: float
    weight: float
    inner: StepInfo | None


class Contractive(Optimizer):
    """Makes the training of an autoencoder contractive, by wrapping its optimizer.

    The optimizer inside minimizes `loss + weight * contractive_penalty(encoder, x)` (see
    `torch_secondorder.penalties.contractive_penalty`) instead of the closure's loss, where `x` is
    what the encoder is called with: a forward hook sees that. The penalty is in every evaluation:
    its value in line searches, its gradient, its curvature in products. It joins the loss where
    `backward()` is called, so one pass serves both, and gradients that the closure clips are of the
    sum. Where a closure calls `backward()` several times, each adds the mean over what the encoder
    got since the last: for `n` micro-batches whose losses are divided by `n`, give `weight / n`.

    Without a closure (`loss.backward()`, then `optimizer.step()`) the gradient of the penalty is
    added in `step()`, at one more pass through the encoder; the mean is over all inputs whose codes
    `backward()` has reached since the last step or `zero_grad()`.

    Groups and state are those of the optimizer inside, so schedulers may be given either. So is
    every attribute that this class does not have itself.

    Args:
        optimizer: Any optimizer, of this package or another.
        encoder: The module inside the model that maps an input to its code, a tensor to a tensor.
        weight: Of the penalty.
        method: `"auto"`, `"exact"` or `"projection"`, see `contractive_penalty`.
        noise: Standard deviation of the noise for the penalty of the higher-order contractive
            autoencoder; None for the plain one. Wrap twice for both.
        n_noise: Noisy copies of each sample.
        n_projections: Random vectors for each sample, where there are projections.
        seed: Of noise and random vectors. All evaluations of a step see the same, and resumed
            training those that it would have seen.

    Attributes:
        optimizer: The optimizer inside.
        weight: Of the penalty; may be changed from step to step, and is part of checkpoints.

    Raises:
        TypeError: The optimizer is none, or the encoder no module.
        ValueError: An argument is out of range, or the optimizer has no parameter of the encoder.

    >>> encoder = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    >>> model = nn.Sequential(encoder, nn.Linear(3, 4))
    >>> optimizer = Contractive(torch.optim.Adam(model.parameters()), encoder, weight=0.1)
    >>> x = torch.rand(10, 4)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), x)
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> info = optimizer.info
    >>> abs(loss.item() - (info.loss + 0.1 * info.penalty)) < 1e-6
    True
    """

    _step_supports_amp_scaling = True  # else a `GradScaler` would not let itself be noticed

    def __init__(
        self,
        optimizer: Optimizer,
        encoder: nn.Module,
        weight: float,
        method: Literal["auto", "exact", "projection"] = "auto",
        *,
        noise: float | None = None,
        n_noise: int = 1,
        n_projections: int = 1,
        seed: int = 0,
    ) -> None:
        # Not `super().__init__()`: groups and state are those of the optimizer inside.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is what trains the model, got {type(optimizer).__name__}: make it "
                "first, as in Contractive(torch.optim.Adam(model.parameters()), ...)"
            )
        check_number("weight", weight, low=0.0)
        self.optimizer = optimizer
        self.penalty = EncoderPenalty(
            encoder, method, noise=noise, n_noise=n_noise, n_projections=n_projections
        )
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in encoder.parameters()):
            raise ValueError(
                "none of the encoder's parameters is among the optimizer's: give the encoder that "
                "is part of the model that the optimizer trains, not a copy"
            )
        self.weight = weight
        self._seed, self._steps = seed, 0
        self._penalized = Penalized(self.penalty)
        self._listen()

    def _listen(self) -> None:
        for name in OPTIMIZER_HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()
        self._recorder = Recorder(self.penalty.encoder)
        handle = self.penalty.encoder.register_forward_hook(self._recorder, with_kwargs=True)
        weakref.finalize(self, handle.remove)

    # What is the inner optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the optimizer inside."""
        return self.optimizer.state

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # while a copy or pickle is being put together
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer inside."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients, and what they were of.

        Args:
            set_to_none: See `torch.optim.Optimizer.zero_grad`.
        """
        self._recorder.inputs.clear()
        self.optimizer.zero_grad(set_to_none)

    # The step.

    @property
    def info(self) -> ContractiveInfo | None:
        """The report of the last step, None before the first."""
        if self._penalized.first is None:
            return None
        loss, penalty = (value.item() for value in self._penalized.first)
        weight, inner = float(self.weight), getattr(self.optimizer, "info", None)
        return ContractiveInfo(loss, penalty, weight, inner)

    def step(self, closure: Any = None, **more: Any) -> Any:
        """Performs a step of the optimizer inside, on loss and penalty.

        Args:
            closure: What the optimizer inside takes: the standard closure, a `FunctionalObjective`,
                or None where gradients are there already.
            **more: What else it takes; a `curvature_closure` gets the penalty as well.

        Returns:
            What the optimizer inside returns: the loss with the penalty, mostly.

        Raises:
            RuntimeError: The encoder was not called, or the loop has to pass a closure.
            TypeError: The encoder's input or output is no tensor.
            ValueError: See `contractive_penalty`; `weight` is out of range.
        """
        check_number("weight", self.weight, low=0.0)
        if closure is not None:
            Scaling(self).refuse_closure()
        elif not self._recorder.inputs and makes_state_only(self.param_groups):
            return self.optimizer.step(**more)
        params = [p for group in self.param_groups for p in group["params"]]
        sign = -1.0 if self.param_groups[0].get("maximize") else 1.0
        self._penalized.begin(params, sign * self.weight, self._seed + self._steps)
        self._recorder.active = False
        try:
            if closure is None:
                if not self._unscale(params):
                    return None
                penalty = self._add_to_gradients(params, sign)
                self._penalized.first = penalty.new_tensor(torch.nan), penalty
                result = self.optimizer.step(**more)
            else:
                if more.get("curvature_closure") is not None:
                    more["curvature_closure"] = self._penalized.closure(more["curvature_closure"])
                result = self.optimizer.step(self._penalized.closure(closure), **more)
        finally:
            self._recorder.active = True
            self._recorder.inputs.clear()
        self._steps += 1
        return result

    def _unscale(self, params: list[Tensor]) -> bool:
        """Takes out what a `GradScaler` has multiplied `p.grad` by; False where the step is not."""
        scaling = Scaling(self)
        if scaling.inverse is None:
            return True
        gradients = [p.grad for p in params if p.grad is not None]
        if any(g.grad_fn is not None for g in gradients):
            scaling.forget()
            raise RuntimeError(
                "the gradients have a graph, which a GradScaler's scale cannot be taken out of: "
                "train in bfloat16, which needs no scaler"
            )
        if bool(scaling.inverse.isnan()):
            return False
        for g in gradients:
            g.mul_(scaling.inverse.to(g.device))
        return True

    def _add_to_gradients(self, params: list[Tensor], sign: float) -> Tensor:
        """Adds the penalty of what the encoder has got to `p.grad`; returns its value."""
        inputs, calls, generator = self._recorder.inputs, Calls(), self._penalized.generator()
        if any(x.requires_grad for x in inputs):
            raise RuntimeError(
                "the encoder's inputs depend on parameters, and their graph is gone: without a "
                f"closure only data can be seen. Pass a closure:\n{STANDARD_CLOSURE}"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "with several processes the gradient of the penalty has to be there before "
                f"gradients are averaged. Pass a closure:\n{STANDARD_CLOSURE}"
            )
        with torch.enable_grad():
            for x in inputs:
                calls.add(len(x), self.penalty.at(x, generator=generator(x.device)))
            penalty = calls.take()
            if penalty is None:
                raise not_called()
            graph = any(p.grad is not None and p.grad.grad_fn is not None for p in params)
            (sign * self.weight * penalty).backward(create_graph=graph)
        return penalty.detach()

    # Checkpoints, pickling, copying.

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, with the weight and what random numbers depend on."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result: dict[str, Any] = dict(self.optimizer.state_dict())
        own: dict[str, Any] = {"weight": self.weight, "seed": self._seed, "steps": self._steps}
        if _NAME in result:
            own["inside"] = result[_NAME]
        result[_NAME] = own
        for group in result["param_groups"]:
            if group["params"]:  # all that distributed checkpoints leave of this
                group[_NAME] = dict(own)
                break
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a checkpoint of the optimizer inside alone.

        Raises:
            ValueError: The state does not fit the optimizer inside.
        """
        inner = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, inner)
            inner = inner if changed is None else dict(changed)
        groups = inner["param_groups"]
        found = [inner.pop(_NAME, None), *(group.get(_NAME) for group in groups)]
        own = next((dict(value) for value in found if value), None)
        inner["param_groups"] = [{k: v for k, v in g.items() if k != _NAME} for g in groups]
        if own is not None and "inside" in own:
            inner[_NAME] = own["inside"]
        self.optimizer.load_state_dict(inner)
        if own is not None:
            self.weight, self._seed, self._steps = own["weight"], own["seed"], own["steps"]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Neither hooks nor the `step` of a scheduler, as in torch: they are of this object.
        names = ("optimizer", "penalty", "weight", "_seed", "_steps", "_penalized")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._listen()

    def __repr__(self) -> str:
        return f"Contractive({self.optimizer!r}, weight={self.weight})"
