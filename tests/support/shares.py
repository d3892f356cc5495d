"""A model and a batch of which each rank has its part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


class Share:
    """A model and the part of a batch that one rank has; one of one is the whole."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(7)
        self.plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        x, y = torch.randn(16, 4).to(dtype), torch.randint(3, (16,))
        self.x, self.y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        self.model = self.plain if ranks == 1 else DistributedDataParallel(self.plain)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.plain.parameters()]

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.plain.parameters()]
