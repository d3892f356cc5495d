"""K-FAC: gradients times the inverse of Kronecker-factored curvature, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._closure.runner import without_autocast
from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.private_torch import any_autocast_enabled
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.diagonal.blocks import Block, Number, narrowed
from torch_secondorder._optim.diagonal.report import DiagonalInfo
from torch_secondorder._optim.diagonal.update import StepInputs
from torch_secondorder._optim.layer_state import (
    LayerMatrix,
    SideMatrices,
    damped_inverses,
    eigenbasis,
    largest_side,
    moments_in,
    transformed,
)
from torch_secondorder._optim.state import Count, declare
from torch_secondorder._optim.state import Number as NumberField
from torch_secondorder._params.space import is_distributed
from torch_secondorder.curvature._layer_factors import (
    Bases,
    KroneckerEstimator,
    KroneckerWatch,
    LayerFactors,
)
from torch_secondorder.curvature.diagonal import DiagonalWatch
from torch_secondorder.curvature.fisher import Labels

__all__ = ["KFAC", "KFACInfo"]


@dataclass(frozen=True, slots=True)
class KFACInfo(DiagonalInfo):
    """Report of one step of `KFAC`.

    Attributes:
        unclipped: What `kl_clip` has left of the step: a factor, one for all of it. None for a step
            without an update, or without `kl_clip`.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = KFAC(layer.parameters(), kl_clip=None)
    >>> torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name, optimizer.info.unclipped
    ('MOVED', None)
    """

    unclipped: float | None = None


class KFAC(DiagonalOptimizer):
    """Kronecker-factored approximate curvature (K-FAC), for networks on mini-batches.

    For each linear or convolutional layer, the Gauss-Newton matrix (the Fisher matrix of the
    model's distribution) is approximated by a Kronecker product `L (x) R`: the second moment of the
    gradients by the layer's results, and that of its inputs (Martens and Grosse 2015, "Optimizing
    neural networks with Kronecker-factored approximate curvature"; Grosse and Martens 2016, "A
    Kronecker-factored approximate Fisher matrix for convolution layers"). A step multiplies the
    gradient `G` of a layer by the damped inverse from both sides:

        D = (L + sqrt(damping) / pi)^-1 G (R + pi sqrt(damping))^-1,  pi^2 = mean(R) / mean(L)
        D <- D min(1, sqrt(kl_clip / <D, G>)), with `<D, G>` summed over all parameters
        M = momentum M + D
        theta <- (1 - lr weight_decay) theta - lr M

    with the means of the factors' eigenvalues. A bias that is added to one layer alone is a column
    of its weight. All other parameters (norms, embeddings, convolutions in groups, weights that
    are used in several ways) get `g / (h + damping)`, where `h` averages the diagonal of the same
    matrix.

    The layers are found in the graph of the loss: nothing is registered on the model, and any
    module or function will do. Factors and diagonal are taken while `backward()` runs, by one more
    backward pass from the outputs for labels drawn from the model, every `update_period`-th step.
    For this the outputs have to be known: use a standard loss of `torch.nn.functional`, or mark
    them with `mark_outputs`. `torch_secondorder.solvers.KFAC`, which has the same name, is no
    optimizer: it preconditions the linear systems of `NewtonCG`.

    Args:
        params: Parameters or groups.
        lr: Learning rate. While `kl_clip` is in effect, the length of a step in the space of the
            model's predictions. Larger losses (sums over many outputs) want larger rates.
        momentum: Decay rate of the sum of directions.
        damping: Added to the curvature; in units of the loss. Less lets steps follow flat
            directions further.
        weight_decay: Decoupled weight decay, multiplied by `lr` as in `torch.optim.AdamW`.
        kl_clip: The bound of `<D, G>`, about twice the Kullback-Leibler divergence that a step with
            `lr=1` would make; None for no bound. Elsewhere it often bounds `lr^2 <D, G>`: then `lr`
            has no effect on a clipped step.
        ekfac: Whether layers are divided by second moments in the factors' eigenbases (George et
            al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
            eigenbasis"), instead of the inverses. A step takes about twice as many products.
        factor_decay: Decay rate of the averages of factors and diagonal; the first estimates have
            equal weights.
        update_period: Steps from one estimate to the next. The first steps, ten at most, all
            estimate.
        basis_period: Steps from one inversion, or eigendecomposition, of the factors to the next,
            at steps that estimate. They are more frequent at the start.
        max_precond_dim: Longer sides of a layer have no factor; None for no bound. The other side's
            eigenbasis is used, with second moments as for `ekfac`.
        labels: `"sampled"` for labels drawn from the model, or `"empirical"` for those of the data,
            as in `torch_secondorder.curvature.Fisher`.
        seed: The seed of the labels, see `AdaHessian`.
        accumulation_steps: See `AdaHessian`.
        maximize: Whether to maximize the loss.
        capturable: See `AdaHessian`. Steps that make new inverses or bases wait for the device.
        watch: See `AdaHessian`.

    `kl_clip`, `ekfac`, `factor_decay`, `update_period`, `basis_period` and `seed` are read from the
    first group.

    Attributes:
        estimator: The estimator of factors and diagonal.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: An argument is out of range, or the parameters are sharded.

    If a gradient or the loss is not finite, nothing changes. If an estimate is not finite, the last
    one stays in use. `info.status` reports both. If directions overflow, no parameter moves.

    >>> layer = torch.nn.Linear(2, 1)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 30.0]]), torch.tensor([[1.0], [-60.0]])
    >>> optimizer = KFAC(layer.parameters(), lr=1.0, momentum=0.0, damping=1e-6, kl_clip=None)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(layer(x), y)
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(3):  # Newton steps, whatever the scales
    ...     loss = optimizer.step(closure)
    >>> bool(closure() < 1e-3)
    True
    """

    info: KFACInfo | None
    _info_type = KFACInfo
    _recognized_by = "kl_clip"
    _warm_up = 10
    _decouples_weight_decay = True  # it is no part of the loss
    # `layer`: zero without factors, else one and the number of the bias from one; below zero for
    # inverses in the place of bases.
    _state_fields = declare(
        layer=Count(on_host=True),
        factor=SideMatrices(),
        basis=SideMatrices(scale=1.0),
        basis_step=NumberField(-1),
    )
    _basis_step: int  # the last step that made new bases
    # What follows from the state, and what the coming update needs.
    _layers: list[LayerMatrix] | None
    _divisors: dict[int, tuple[float, Tensor]]
    _found: tuple[Sequence[LayerFactors], Number]
    _unclipped: Tensor | None
    _set_by_steps = ("_unclipped",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        kl_clip: float | None = 1e-3,
        ekfac: bool = False,
        factor_decay: float = 0.95,
        update_period: int = 10,
        basis_period: int = 100,
        max_precond_dim: int | None = 1024,
        labels: Labels = "sampled",
        seed: int = 0,
        accumulation_steps: int = 1,
        maximize: bool = False,
        capturable: bool | None = None,
        watch: bool = True,
    ) -> None:
        self._forget_layers()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "kl_clip": kl_clip,
            "ekfac": ekfac,
            "factor_decay": factor_decay,
            "update_period": update_period,
            "basis_period": basis_period,
            "max_precond_dim": max_precond_dim,
            "seed": seed,
            "accumulation_steps": accumulation_steps,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, KroneckerEstimator(labels), watch=watch)

    def _check_group(self, group: dict[str, Any]) -> None:
        if any(is_distributed(p) for p in group["params"][:1]):
            raise ValueError(
                "KFAC takes the inputs of layers from the graph of whole parameters, which "
                "fully_shard cuts apart: use DistributedDataParallel"
            )
        super()._check_group(group)
        check_number("momentum", group["momentum"], low=0.0, below=1.0)
        check_number("damping", group["damping"], above=0.0)
        check_number("kl_clip", group["kl_clip"], above=0.0, optional=True)
        check_number("factor_decay", group["factor_decay"], low=0.0, below=1.0)
        check_integer("basis_period", group["basis_period"], whole_floats=True)
        check_integer("max_precond_dim", group["max_precond_dim"], optional=True)

    # Layers and their estimates.

    def _known_layers(self) -> list[LayerMatrix]:
        """The layers that have factors."""
        if self._layers is None:
            params, found = self._parameters, []
            for p in params:
                state = self.state.get(p, {})
                code = int(state.get("layer", 0))
                if code:
                    bias = params[abs(code) - 2] if abs(code) > 1 else None
                    found.append(LayerMatrix(p, bias, code > 0, state))
            self._layers = found
        return self._layers

    def _group_of(self) -> dict[int, dict[str, Any]]:
        """The group of each parameter, by its id."""
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _forget_layers(self) -> None:
        """Drops what follows from the state."""
        self._layers, self._divisors, self._unclipped = None, {}, None
        self._found = (), 1.0

    def _reset_state(self) -> None:
        super()._reset_state()
        self._forget_layers()

    @property
    def _uses_graphs(self) -> bool:
        return False

    def _has_decisions(self, step: int, group: dict[str, Any]) -> bool:
        return self.curvature_due  # layers may come and go, and bases are made on the host

    def _prepare_capture(self) -> None:
        self._divisors = {}  # an estimate makes new ones: the graph has to compute its own

    def _watch(self, params: Sequence[Tensor]) -> DiagonalWatch:
        watch = super()._watch(params)
        assert isinstance(watch, KroneckerWatch)
        places = {id(p): i for i, p in enumerate(params)}
        groups = self._group_of()
        watch.largest = [largest_side(groups[id(p)]) for p in params]
        watch.bases = {
            places[id(layer.weight)]: Bases(*layer.sides_like_now("basis"))
            for layer in self._known_layers()
            if layer.rotates and id(layer.weight) in places
        }
        return watch

    def _finished_estimate(
        self, watch: DiagonalWatch | None, factor: Tensor | float | None
    ) -> Tensor | None:
        diagonal = super()._finished_estimate(watch, factor)
        if isinstance(watch, KroneckerWatch):
            self._found = watch.layers, 1.0 if factor is None else factor
        return diagonal

    # The update.

    def _update_all(self, steps: Iterable[tuple[Block, StepInputs]]) -> None:
        pairs = list(steps)
        if not pairs:
            return
        if any_autocast_enabled():
            with without_autocast(self._trainable):
                self._update_pairs(pairs, self._trainable)
        else:
            self._update_pairs(pairs, self._trainable)

    def _update_pairs(
        self, pairs: Sequence[tuple[Block, StepInputs]], params: Sequence[Tensor]
    ) -> None:
        blocks = [block for block, _ in pairs]
        moments = _pieces(blocks, [block.exp_hessian for block in blocks], params)
        if pairs[0][1].estimate is not None:
            self._learn(pairs, moments, params)
        gradients = [inputs.gradient for _, inputs in pairs]
        directions = [
            torch.div(gradient, block.exp_hessian + block.group["damping"])
            for block, gradient in zip(blocks, gradients, strict=True)
        ]
        before, after = (_pieces(blocks, vectors, params) for vectors in (gradients, directions))
        groups = self._group_of()
        for layer in self._known_layers():
            if layer.is_in(after):
                divisor = self._divisor(layer, moments, groups[id(layer.weight)]["damping"])
                layer.write(after, _solved(layer, layer.read(before), divisor))
        scale = self._scale(before, after, pairs[0][1].on_device)
        if not isinstance(scale, Tensor) and scale == 0:
            return
        for (block, inputs), direction in zip(pairs, directions, strict=True):
            factor = narrowed(scale, direction)
            direction.mul_(factor)
            if isinstance(factor, Tensor):  # zero times infinity
                direction = torch.where(factor > 0, direction, 0.0)
            self._move(block, inputs, direction)

    def _update(self, block: Block, inputs: StepInputs) -> None:
        raise NotImplementedError  # `_update_all` takes its place

    def _divisor(
        self, layer: LayerMatrix, moments: dict[int, Tensor], damping: float
    ) -> Tensor | None:
        """The damped second moments of a layer in its basis; None for inverses."""
        if not layer.rotates:
            return None
        key = id(layer.weight)
        found = self._divisors.get(key)
        if found is None or found[0] != damping:
            found = self._divisors[key] = damping, layer.read(moments) + damping
        return found[1]

    def _scale(
        self, gradients: dict[int, Tensor], directions: dict[int, Tensor], on_device: bool
    ) -> Number:
        """The factor that `kl_clip` multiplies the directions by; zero if they overflow."""
        bound = self.param_groups[0]["kl_clip"]
        # Parameter by parameter, so that the sum does not depend on how they are grouped.
        products = torch._foreach_mul(list(gradients.values()), list(directions.values()))
        device = products[0].device
        total = torch.stack([t.sum().double().to(device) for t in products]).sum()
        scale = torch.ones_like(total)
        if bound is not None:
            scale = (bound / total.clamp(min=bound)).sqrt()
        scale = torch.where(total.isfinite(), scale, 0.0)
        self._unclipped = None if bound is None else scale
        return scale if on_device else float(scale)

    def _move(self, block: Block, inputs: StepInputs, direction: Tensor) -> None:
        group, lr = block.group, inputs.lr
        if group["weight_decay"]:
            block.decay(1 - lr * group["weight_decay"])
        if group["momentum"]:
            kept = 1 - (1 - group["momentum"]) * inputs.weight
            block.exp_avg.mul_(narrowed(kept, direction)).add_(direction)
            direction.copy_(block.exp_avg)
        block.move(-lr if group["maximize"] else lr, direction)

    def _shares(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self._unclipped is None:
            return {}
        return {"unclipped": (self._unclipped, torch.ones_like(self._unclipped))}

    # Learning.

    def _learn(
        self,
        pairs: Sequence[tuple[Block, StepInputs]],
        moments: dict[int, Tensor],
        params: Sequence[Tensor],
    ) -> None:
        """Takes in an estimate: factors, moments, and bases if they are due."""
        (found, factor), self._found = self._found, ((), 1.0)
        self._divisors = {}
        group = self.param_groups[0]
        new = _pieces([b for b, _ in pairs], [i.estimate for _, i in pairs], params)
        weights: dict[int, Number] = {}
        for block, inputs in pairs:
            weight = _weight(inputs, group["factor_decay"])
            weights |= {id(params[place]): weight for place in block.places}
        found = [f._replace(left=f.left * factor) for f in found]
        layers = [self._layer(factors, params) for factors in found]
        inside = {id(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
        for key, piece in new.items():
            if key not in inside:
                # Among the squares of one random vector some are close to zero by chance.
                piece.lerp_(piece.mean(), 0.5)
            moments[key].lerp_(piece, narrowed(weights[key], piece))
        known = {id(layer.weight): layer for layer in self._known_layers()}
        self._drop_layers(known, layers, moments, new)
        due = self._bases_due(int(group["basis_period"]))
        for layer, factors in zip(layers, found, strict=True):
            if not layer.is_in(new):
                continue
            before = known.get(id(layer.weight))
            fresh = before is None or not _alike(before, layer) or not _fits(layer, factors)
            if fresh:
                self._enter(layer)
                known[id(layer.weight)] = layer
            weight = weights[id(layer.weight)]
            if isinstance(weight, Tensor):  # what is not finite may not even be multiplied by zero
                sides = (torch.where(weight > 0, side, 0.0) for side in factors[2:])
                factors = LayerFactors(factors.weight, factors.bias, *sides)
            _take_factors(layer, factors, weight, fresh)
            if fresh or due:
                _renew(layer, factors, moments, group["damping"], fresh)
        self._layers = list(known.values())

    def _layer(self, found: LayerFactors, params: Sequence[Tensor]) -> LayerMatrix:
        weight = params[found.weight]
        bias = None if found.bias is None else params[found.bias]
        rotates = self.param_groups[0]["ekfac"] or min(found.left.dim(), found.right.dim()) < 2
        return LayerMatrix(weight, bias, rotates, self.state[weight])

    def _enter(self, layer: LayerMatrix) -> None:
        """Notes a layer in the state, with matrices as at first."""
        code = 1
        if layer.bias is not None:
            code += 1 + next(i for i, p in enumerate(self._parameters) if p is layer.bias)
        layer.state["layer"].fill_(code if layer.rotates else -code)
        for field in self._parameter_fields:
            if isinstance(field, SideMatrices):
                field.begin(layer.state, layer.weight, self._group_of()[id(layer.weight)])

    def _drop_layers(
        self,
        known: dict[int, LayerMatrix],
        layers: Sequence[LayerMatrix],
        moments: dict[int, Tensor],
        new: dict[int, Tensor],
    ) -> None:
        """Lets go of what is no such layer any more: its moments are in other coordinates."""
        now = {id(layer.weight): layer for layer in layers}
        for key, layer in list(known.items()):
            own = [id(p) for p in (layer.weight, layer.bias) if p is not None]
            if key in now and _alike(layer, now[key]):
                continue
            # One that was not called has no gradient, or zeros.
            if key in now or any(bool(new[k].any()) for k in own if k in new):
                layer.state["layer"].zero_()
                del known[key]
                for k in own:
                    if k in new:
                        moments[k].copy_(new[k])

    def _bases_due(self, period: int) -> bool:
        """True if bases are to be made anew: at steps 0, 1, 2, 4, 8 and so on up to the period."""
        steps, last = self._schedule.steps, self._basis_step
        due = steps - last >= min(period, max(last, 1))
        if due:
            self._basis_step = steps
        return due


def _alike(one: LayerMatrix, other: LayerMatrix) -> bool:
    return one.bias is other.bias and one.rotates is other.rotates and one.state is other.state


def _fits(layer: LayerMatrix, found: LayerFactors) -> bool:
    """True if the state has matrices for just the sides that have factors."""
    sides = zip(layer.sides("factor"), (found.left, found.right), strict=True)
    return all((held is None) is (new.dim() < 2) for held, new in sides)


def _weight(inputs: StepInputs, decay: float) -> Number:
    """The weight of a new estimate in the averages: the first ones count alike."""
    count = inputs.curvature_step
    if isinstance(count, Tensor):
        return (1 / count).clamp(min=1 - decay) * inputs.estimate_weight
    return max(1 - decay, 1 / count) * inputs.estimate_weight


def _pieces(
    blocks: Sequence[Block], vectors: Sequence[Tensor | None], params: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Views of vectors over blocks, by the ids of the parameters."""
    found: dict[int, Tensor] = {}
    for block, vector in zip(blocks, vectors, strict=True):
        if vector is not None:
            pieces = block.pieces(vector)
            found |= {id(params[i]): t for i, t in zip(block.places, pieces, strict=True)}
    return found


def _solved(layer: LayerMatrix, gradient: Tensor, divisor: Tensor | None) -> Tensor:
    """The inverse of a layer's curvature times its gradient."""
    sides = layer.sides("basis")
    if divisor is None:
        return transformed(gradient, sides)
    return transformed(transformed(gradient, sides).div_(divisor), sides, back=True)


def _take_factors(layer: LayerMatrix, found: LayerFactors, weight: Number, fresh: bool) -> None:
    for held, new in zip(layer.sides("factor"), (found.left, found.right), strict=True):
        if held is None:
            continue
        if fresh:
            held.copy_(new)
        else:
            held.lerp_(new.to(held), narrowed(weight, held))


def _renew(
    layer: LayerMatrix,
    found: LayerFactors,
    moments: dict[int, Tensor],
    damping: float,
    fresh: bool,
) -> None:
    """Makes new bases, or inverses, from the factors."""
    factors, bases = layer.sides("factor"), layer.sides("basis")
    if not layer.rotates:
        left, right = factors
        assert left is not None
        assert right is not None
        for basis, inverse in zip(bases, damped_inverses(left, right, damping), strict=True):
            assert basis is not None
            basis.copy_(inverse)
        return
    changes: list[Tensor | None] = []
    values: list[Tensor] = []
    for factor, basis, new in zip(factors, bases, (found.left, found.right), strict=True):
        if factor is None or basis is None:
            changes.append(None)
            values.append(new)
            continue
        known, vectors = eigenbasis(factor)
        changes.append(basis.mT @ vectors)
        values.append(known)
        basis.copy_(vectors)
    if fresh:
        layer.write(moments, torch.outer(*values))
    else:
        layer.write(moments, moments_in(layer.read(moments), changes))
