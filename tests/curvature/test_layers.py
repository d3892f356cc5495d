"""Layers found in graphs, and their Kronecker factors, against explicit sums over samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.kfac_reference import recorded, rows_of
from torch_secondorder._autograd.graph import Overwritten
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import GaussNewton
from torch_secondorder.curvature._layer_factors import (
    Bases,
    KroneckerEstimator,
    KroneckerWatch,
)
from torch_secondorder.curvature._layers import layers_of

DOUBLE = torch.float64


def names_of(
    params: dict[str, Tensor], output: Callable[[], Tensor]
) -> dict[str, tuple[str | None, bool]]:
    """For each layer found the name of its bias, and whether its inputs come first."""
    names = list(params)
    found = layers_of([output()], list(params.values()))
    return {
        names[layer.weight]: (
            None if layer.bias is None else names[layer.bias],
            layer.inputs_first,
        )
        for layer in found.layers
    }


def test_layers_are_found_whatever_they_are_written_with() -> None:
    x = torch.randn(5, 3)
    w, v, b = (torch.randn(*s, requires_grad=True) for s in ((4, 3), (3, 4), (4,)))
    c = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    params = {"w": w, "v": v, "b": b, "c": c}
    cases: dict[Callable[[], Tensor], dict[str, tuple[str | None, bool]]] = {
        lambda: F.linear(x, w, b): {"w": ("b", False)},
        lambda: F.linear(x.expand(2, 5, 3), w): {"w": (None, False)},
        lambda: torch.addmm(b, x, w.t()): {"w": ("b", False)},
        lambda: x @ w.T: {"w": (None, False)},
        lambda: x @ w.mT: {"w": (None, False)},
        lambda: (w @ x.T).T: {"w": (None, False)},
        lambda: torch.addmm(b, w, x[:4].T): {"w": (None, False)},  # a bias of the samples
        lambda: x @ v: {"v": (None, True)},
        lambda: x @ v + b: {"v": (None, True)},
        lambda: x @ v.double().float(): {"v": (None, True)},
        lambda: F.linear(x, w, c.float()): {"w": (None, False)},
        lambda: F.linear(x, w, b) + F.linear(2 * x, w, b): {"w": ("b", False)},
        lambda: F.linear(x, w, b) + F.linear(2 * x, w): {"w": (None, False)},
        lambda: F.linear(x, w, b) + b: {"w": (None, False)},
        lambda: torch.addmm(b, x, w.t(), alpha=2): {},
        lambda: F.linear(x, w) @ w: {},  # both ways round
        lambda: F.linear(x, 2 * w): {},
        lambda: F.linear(x, w[:2]): {},
        lambda: F.linear(x, w) + w.sum(): {},
    }
    for output, expected in cases.items():
        assert names_of(params, output) == expected


def test_penalties_leave_the_layers_of_other_parameters() -> None:
    x = torch.randn(5, 3)
    w, v, b = (torch.randn(*s, requires_grad=True) for s in ((4, 3), (3, 4), (4,)))
    hidden = F.linear(x, w, b)
    for penalty, expected in ((2 * w, {1}), (v.abs(), {0}), (w @ v, set()), (b + 1, {0, 1})):
        found = layers_of([F.linear(hidden, v), penalty], [w, v, b])
        assert {layer.weight for layer in found.layers} == expected
        assert all((layer.bias == 2) is (penalty.shape == (3, 4)) for layer in found.layers)
    assert not layers_of([2 * w], [w]).layers


def test_convolutions_are_found_in_one_group_only() -> None:
    x = torch.randn(2, 4, 6, 6)
    w, g, t = (
        torch.randn(*s, requires_grad=True) for s in ((4, 4, 3, 3), (4, 2, 3, 3), (4, 4, 2, 2))
    )
    b = torch.randn(4, requires_grad=True)
    params = {"w": w, "g": g, "t": t, "b": b}
    assert names_of(params, lambda: F.conv2d(x, w, b)) == {"w": ("b", False)}
    assert names_of(params, lambda: F.conv2d(x, g, b, groups=2)) == {}
    assert names_of(params, lambda: F.conv_transpose2d(x, t)) == {}


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (7, 4)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
            nn.Softplus(),
            nn.Conv2d(3, 2, 2, bias=False),
            nn.Flatten(),
            nn.LazyLinear(2),
        ),
        (6, 2, 6, 5),
    ),
}


class Case:
    """A model with its data, and a watch that has seen a backward pass."""

    def __init__(self, name: str, *, bases: bool = False, seed: int = 0) -> None:
        torch.manual_seed(5)
        make, shape = NETS[name]
        self.model = make().to(DOUBLE)
        self.x = torch.randn(shape, dtype=DOUBLE)
        self.y = torch.randn(self.model(self.x).shape, dtype=DOUBLE)
        self.params = list(self.model.parameters())
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        vector = ParameterVector(self.params)
        self.watch = KroneckerEstimator().watch(vector, generator)
        assert isinstance(self.watch, KroneckerWatch)
        self.bases: dict[int, Bases] = {}
        dims = [p.dim() for p in self.params] + [0]
        for i, p in enumerate(self.params):
            if bases and dims[i] > 1:
                sizes = p.shape[0], p[0].numel() + (dims[i + 1] == 1)
                random = (torch.randn(n, n, dtype=DOUBLE) for n in sizes)
                self.bases[i] = Bases(*(torch.linalg.qr(matrix)[0] for matrix in random))
        self.watch.bases = self.bases
        evaluation = ClosureObjective(self.loss, self.params).evaluate(curvature=True)
        self.watch.observe(evaluation.linearization.graph, True)
        self.diagonal = self.watch.diagonal()

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)


@pytest.mark.parametrize("name", NETS)
def test_factors_are_sums_over_samples_and_places(name: str) -> None:
    case = Case(name)
    found, _ = recorded(case.model, case.loss, torch.Generator().manual_seed(case.seed))
    assert len(case.watch.layers) == len(found)
    by_weight = {id(layer.weight): calls for layer, calls in found.items()}
    modules = {id(m.weight): m for m in found}
    for factors in case.watch.layers:
        weight = case.params[factors.weight]
        (call,) = by_weight[id(weight)]
        x, d = rows_of(modules[id(weight)], *call)
        left, right, count = 0.0, 0.0, 0
        for xs, ds in zip(x.flatten(0, 1), d.flatten(0, 1), strict=True):
            left, right, count = left + torch.outer(ds, ds), right + torch.outer(xs, xs), count + 1
        torch.testing.assert_close(factors.left, left)
        torch.testing.assert_close(factors.right, right / count)


@pytest.mark.parametrize("name", NETS)
def test_moments_are_those_of_single_samples_in_the_bases(name: str) -> None:
    case = Case(name, bases=True)
    found, _ = recorded(case.model, case.loss, torch.Generator().manual_seed(case.seed))
    pieces = dict(
        zip(
            map(id, case.params), case.diagonal.split([p.numel() for p in case.params]), strict=True
        )
    )
    for layer, ((x, d),) in ((m, calls) for m, calls in found.items()):
        place = next(i for i, p in enumerate(case.params) if p is layer.weight)
        left, right = case.bases[place]
        xs, ds = rows_of(layer, x, d)
        expected = sum((left.T @ (b.T @ a) @ right) ** 2 for a, b in zip(xs, ds, strict=True))
        width = layer.weight[0].numel()
        torch.testing.assert_close(
            pieces[id(layer.weight)].view(len(left), -1), expected[:, :width]
        )
        if layer.bias is not None:
            torch.testing.assert_close(pieces[id(layer.bias)], expected[:, -1])


def test_the_block_of_one_sample_is_that_of_the_gauss_newton_matrix() -> None:
    """The mean over drawn labels; with one sample the factors are exact."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(DOUBLE)
    x, y = torch.randn(1, 3, dtype=DOUBLE), torch.randn(1, 2, dtype=DOUBLE)
    params = list(model.parameters())

    def loss() -> Tensor:
        return F.mse_loss(model(x), y, reduction="sum")

    evaluation = ClosureObjective(loss, params).evaluate(curvature=True)
    total = torch.zeros(8, 8, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        watch = KroneckerEstimator().watch(ParameterVector(params), generator)
        watch.observe(evaluation.linearization.graph, True)
        watch.diagonal()
        (found,) = watch.layers
        total += torch.kron(found.left, found.right) / 400
    dense = GaussNewton(evaluation).dense()
    order = [0, 1, 2, 6, 3, 4, 5, 7]  # rows of the weight with their bias
    torch.testing.assert_close(total, dense[order][:, order], rtol=0.0, atol=0.6)


def test_many_places_are_sampled_without_bias() -> None:
    """Evenly spaced samples stand for those in between, exactly if all samples are alike."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3).to(DOUBLE)
    x = torch.randn(1, 1, 12, 12, dtype=DOUBLE).expand(96, 1, 12, 12).contiguous()
    z = conv(x)
    found = layers_of([z], list(conv.parameters()))
    delta = torch.randn(1, *z.shape[1:], dtype=DOUBLE).expand_as(z)
    (layer,) = found.layers
    parts = list(found.rows(layer, [delta]))
    assert sum(len(part.left) for part in parts) == 32 * 100
    left = sum(part.left.T @ part.left for part in parts)
    rows = delta[0].flatten(1)
    torch.testing.assert_close(left, 96 * rows @ rows.T)


def test_checkpointed_layers_have_the_same_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(6, 4)
    z = checkpoint(model, x, use_reentrant=False)
    params = list(model.parameters())
    found = layers_of([z], params)
    edges, weight = found.edges(), torch.randn_like(z)
    gradients = torch.autograd.grad(z, [*edges, *params], weight, retain_graph=True)
    for layer, gradient in zip(found.layers, gradients, strict=False):
        (rows,) = found.rows(layer, [gradient])
        expected = gradients[len(edges) + layer.weight]
        torch.testing.assert_close((rows.left.T @ rows.right)[:, :-1], expected)


def test_inputs_that_were_overwritten_are_refused() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    z = layer(x)
    found = layers_of([z], list(layer.parameters()))
    x.add_(1)
    with pytest.raises(Overwritten):
        list(found.rows(found.layers[0], [torch.ones_like(z)]))


def test_bad_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        KroneckerEstimator("guessed")  # type: ignore[arg-type]
