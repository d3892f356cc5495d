"""The loss as half a sum of squared residuals: roots of its curvature by the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder.curvature._likelihoods import Independent
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace

__all__ = ["ResidualBlock", "residual_blocks"]


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """The residuals that one output gives: `channels` of them for each of its samples.

    The loss by this output is `|r|^2 / 2` up to third order: with the root `Q` of the curvature
    `B = Q Q'` by the output, the residuals have the Jacobian `Q' dz/dtheta`, and `Q r` is the
    gradient of the loss by the output.

    Attributes:
        output: The index of the output among those of the `OutputSpace`.
        values: `r`, shape `(samples, channels)`.
        root: Gives for a channel the entries of `Q` that belong to it, shaped like the output: the
            cotangent whose pullback, taken sample by sample, is that channel's rows of the Jacobian.
    """

    output: int
    values: Tensor
    root: Callable[[int], Tensor]

    @property
    def samples(self) -> int:
        """The number of samples, entries of the first dimension of the output."""
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        """The number of residuals of a sample."""
        return self.values.shape[1]


def residual_blocks(space: OutputSpace, curvature: LossCurvature) -> list[ResidualBlock]:
    """The residuals of a loss, one block for each output.

    Args:
        space: The outputs.
        curvature: The curvature of the loss by them.
    """
    blocks = []
    for i, z in enumerate(space.values):
        likelihood = curvature.likelihoods[i]
        ones = [torch.ones_like(z) if k == i else None for k in range(len(space.values))]
        if likelihood is None:
            (diagonal,) = [p for k, p in enumerate(curvature.product(ones)) if k == i]
        elif isinstance(likelihood, Independent):
            diagonal = likelihood.product(torch.ones_like(z))
        else:
            raise NotImplementedError
        assert diagonal is not None
        (gradient,) = space.gradient([space.tensors[i]])
        assert gradient is not None
        scale = diagonal.detach().sqrt()
        samples = z.shape[0] if z.dim() else 1
        values = (gradient.detach() / scale).reshape(samples, -1)

        def root(channel: int, scale: Tensor = scale, samples: int = samples) -> Tensor:
            chosen = torch.zeros_like(scale).reshape(samples, -1)
            chosen[:, channel] = scale.reshape(samples, -1)[:, channel]
            return chosen.reshape(scale.shape)

        blocks.append(ResidualBlock(i, values, root))
    return blocks
