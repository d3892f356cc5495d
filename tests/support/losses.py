"""Standard losses by their arguments and shapes, and pairs that are the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.oracles import labels, numbers


def ce(**options: Any) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        given = dict(options)
        if given.pop("weighted", False):
            given["weight"] = numbers(z[0] if z.dim() == 2 else z[0, :, 0])
        target = labels(z)
        if given.pop("probabilities", False):
            target = numbers(z)  # need not add up to one
        value = F.cross_entropy(z, target, **given)
        return (value * numbers(value)).sum() if given.get("reduction") == "none" else value

    return loss


def bce(**options: Any) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        given = dict(options)
        for name in given.keys() & {"weight", "pos_weight"}:
            given[name] = numbers(z[0], 0.5, 3.0)
        value = F.binary_cross_entropy_with_logits(z, numbers(z, 0, 1), **given)
        return (value * numbers(value)).sum() if given.get("reduction") == "none" else value

    return loss


def mse(**options: Any) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        value = F.mse_loss(z, numbers(z), **options)
        return (value * numbers(value)).sum() if value.dim() else value

    return loss


CLOSED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "ce": ((5, 4), ce()),
    "ce of one sample": ((4,), ce()),
    "ce sum": ((5, 4), ce(reduction="sum")),
    "ce none": ((5, 4), ce(reduction="none")),
    "ce of one sample, none": ((4,), ce(reduction="none")),
    "ce of images": ((2, 4, 3), ce()),
    "ce of images, none": ((2, 4, 3), ce(reduction="none")),
    "ce weights": ((5, 4), ce(weighted=True)),
    "ce ignore": ((5, 4), ce(ignore_index=2)),
    "ce smoothing": ((5, 4), ce(label_smoothing=0.2)),
    "ce bytes": ((5, 4), lambda z: F.cross_entropy(z, labels(z).to(torch.uint8))),
    "ce all": ((3, 4, 3), ce(weighted=True, ignore_index=2, label_smoothing=0.2)),
    "ce all, none": ((3, 4, 3), ce(weighted=True, label_smoothing=0.2, reduction="none")),
    "ce probabilities": ((5, 4), ce(probabilities=True)),
    "ce probabilities, all": (
        (2, 4, 3),
        ce(probabilities=True, weighted=True, label_smoothing=0.2),
    ),
    "ce scaled": ((5, 4), lambda z: 3 * ce()(z)),
    "ce negative": ((5, 4), lambda z: -ce()(z)),
    "bce": ((5, 3), bce()),
    "bce sum, weight": ((5, 3), bce(reduction="sum", weight=True)),
    "bce pos_weight": ((5, 3), bce(pos_weight=True)),
    "bce all, none": ((5, 3), bce(reduction="none", weight=True, pos_weight=True)),
    "mse": ((5, 3), mse()),
    "mse of a number": ((), mse()),
    "mse sum": ((5, 3), mse(reduction="sum")),
    "mse none": ((5, 3), mse(reduction="none")),
    "mse the other way": ((5, 3), lambda z: F.mse_loss(numbers(z), z)),
    "gaussian": ((5, 3), lambda z: F.gaussian_nll_loss(z, numbers(z), numbers(z, 0.5, 2.0))),
}


def on_sigmoid(z: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), numbers(z, 0, 1), weight=numbers(z[0], 0.5, 3.0))


def nll(z: Tensor, **options: Any) -> Tensor:
    return F.nll_loss(z.log_softmax(1), labels(z), **options)


EQUAL = {
    "bce": (on_sigmoid, bce(weight=True), (5, 3)),
    "nll": (nll, ce(), (5, 4)),
    "nll sum of images": (lambda z: nll(z, reduction="sum"), ce(reduction="sum"), (2, 4, 3)),
    "nll ignore": (lambda z: nll(z, ignore_index=2), ce(ignore_index=2), (5, 4)),
    "nll weights": (lambda z: nll(z, weight=numbers(z[0])), ce(weighted=True), (5, 4)),
    "kl": (
        lambda z: F.kl_div(z.log_softmax(1), numbers(z).softmax(1), reduction="batchmean"),
        lambda z: F.cross_entropy(z, numbers(z).softmax(1)),
        (5, 4),
    ),
}
