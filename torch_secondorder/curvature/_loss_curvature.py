"""The Hessian of the loss in output space: in closed form where known, by autodiff elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.graph import Output
from torch_secondorder.curvature._likelihoods import Likelihood, likelihood_of
from torch_secondorder.curvature._output_space import OutputSpace, Tensors


class LossCurvature:
    """The second derivative `B` of the loss by the outputs, block by block.

    An output has a likelihood of its own where one standard loss took it, the total loss is linear
    in what that loss returned, and depends on the output in no other way. All other outputs form
    one block, whose products are taken by differentiating the loss twice at the outputs.

    Args:
        space: The outputs.

    Attributes:
        likelihoods: One for each output; None for those of the common block.
        coefficients: For each output what the total loss is multiplied by where it is linear in
            what the standard loss returned, of that shape; None for all other outputs.
        bypassed: Whether the loss depends on the parameters in other ways than through the outputs.
    """

    def __init__(self, space: OutputSpace) -> None:
        self._space = space
        self.coefficients, self.bypassed = _coefficients(space)
        self.likelihoods: list[Likelihood | None] = []
        self._rest: list[int] = []  # outputs without a likelihood, and their tensors
        self._tensors: list[Tensor] = []
        with torch.no_grad():
            for i, (output, c) in enumerate(zip(space.outputs, self.coefficients, strict=True)):
                found = None
                if c is not None and _separates(output, space):
                    found = likelihood_of(output, c)
                if found is None:
                    self._rest.append(i)
                    self._tensors.append(space.tensors[i])
                self.likelihoods.append(found)
        self._gradient = space.gradient(self._tensors) if self._rest else ()

    @property
    def unknown(self) -> bool:
        """True if the curvature by some outputs is not in closed form."""
        return bool(self._rest)

    def product(self, tangents: Tensors, batched: bool = False) -> Tensors:
        """`B t`, shaped like the outputs; with `batched` each with a leading dimension."""
        result: list[Tensor | None] = [None] * len(tangents)
        for i, (likelihood, tangent) in enumerate(zip(self.likelihoods, tangents, strict=True)):
            if likelihood is not None and tangent is not None:
                result[i] = likelihood.product(tangent).to(tangent.dtype)
        if self._rest:
            chosen = [tangents[i] for i in self._rest]
            products = self._space.product_at_fixed_parameters(
                self._gradient, self._tensors, chosen, batched
            )
            for i, product in zip(self._rest, products, strict=True):
                result[i] = product
        return result


def _coefficients(space: OutputSpace) -> tuple[list[Tensor | None], bool]:
    values = [o.value for o in space.outputs if o.value is not None]
    directly, bypassed = space.reaches(values)
    by_value = dict(zip(map(id, values), space.gradient(values), strict=True))
    coefficients = []
    for output, direct in zip(space.outputs, directly, strict=True):
        c = None if direct else by_value.get(id(output.value))
        # One that depends on the outputs is none: the loss is not linear in the value.
        linear = c is not None and not space.depends(c, values)
        coefficients.append(c.detach() if c is not None and linear else None)
    return coefficients, bypassed


def _separates(output: Output, space: OutputSpace) -> bool:
    """True if the information has no entries between this output and others."""
    if len(space.outputs) == 1:
        return True
    together = {o.argument for o in space.outputs if o.value is output.value}
    # Mean and variance are orthogonal.
    return len(together) == 1 or (
        output.loss is F.gaussian_nll_loss and together == {"input", "var"}
    )
