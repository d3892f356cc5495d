"""Kronecker factors against dense Gauss-Newton blocks, and what is made of them."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from tests.support.closures import closure_of
from tests.support.dense_operators import dense, seeded, smallest_eigenvalue
from tests.support.oracles import CASES, make_case
from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import FunctionalObjective, NewtonCG
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import Damped, Diagonal, Fisher, GaussNewton, LinearOperator
from torch_secondorder.globalization import TrustRegion
from torch_secondorder.solvers import CG, MINRES, resolve_preconditioner
from torch_secondorder.solvers.kfac import KFAC, _inverse

CPU = torch.device("cpu")


def gauss_newton(
    loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    scale: Sequence[float] | None = None,
    decay: float | tuple[float, ...] = 0.0,
) -> GaussNewton:
    vector = ParameterVector(params, scale)
    objective = ClosureObjective.for_step(loss, vector, Regularization(weight_decay=decay))
    return GaussNewton(objective.evaluate(curvature=True))


def refreshed(operator: LinearOperator, seed: int = 0, **arguments: Any) -> KFAC:
    kfac = KFAC(**arguments)
    kfac.refresh(operator, seeded(seed))
    return kfac


def random(*shape: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def squares(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The mean squared error of a model with one output for each row."""
    return lambda: F.mse_loss(model(x), torch.ones_like(x[..., :1]))


def block_of(operator: GaussNewton, factors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Flat places `(out, in)` of a layer, and its factors with the scale of the work space."""
    slots, a, s = operator.slots(), factors.inputs, factors.outputs
    n = len(s)
    weight = slots[factors.weight]
    columns = [torch.arange(weight.start, weight.stop).view(n, -1)]
    scale = torch.full((columns[0].shape[1],), weight.scale, dtype=a.dtype)
    if factors.bias is not None:
        bias = slots[factors.bias]
        columns.append(torch.arange(bias.start, bias.stop)[:, None])
        scale = torch.cat([scale, torch.tensor([bias.scale], dtype=a.dtype)])
    scale = scale.to(a.device)
    return torch.cat(columns, dim=1).to(a.device), scale[:, None] * a * scale, s


def assembled(operator: GaussNewton, damping: float, seed: int = 0) -> Tensor:
    """What `KFAC.inverse` stands for, from the factors, as one matrix."""
    generator, slots = seeded(seed), operator.slots()
    met = operator.factors(generator)
    result = torch.zeros(operator.size, operator.size, dtype=operator.dtype, device=operator.device)
    covered = {i for f in met for i in (f.weight, f.bias)}
    if not covered.issuperset(range(len(slots))):
        entries = operator.diagonal(1, generator)
        parts = [entries[s.start : s.stop] for s in slots]
        means = torch.cat([part.mean().expand_as(part) for part in parts])
        entries = (entries + means) / 2
        result = (1 / (entries + damping).clamp(min=1e-4 * float(entries.mean()))).diag()
    for f in met:
        places, a, s = block_of(operator, f)
        balance = math.sqrt((a.trace() / len(a)) / (s.trace() / len(s)))
        share = max(1e-4, 10 * torch.finfo(a.dtype).eps * len(a) * len(s))
        smallest_eigenvalue = share * float(a.trace() / len(a) * s.trace() / len(s))
        root = math.sqrt(max(damping + slots[f.weight].decay, smallest_eigenvalue))
        inverses = [
            torch.linalg.inv(m + shift * torch.eye(len(m), dtype=m.dtype, device=m.device))
            for m, shift in ((s, root / balance), (a, root * balance))
        ]
        flat = places.flatten()
        result[flat] = 0.0
        result[flat[:, None], flat] = torch.kron(*inverses)
    return result


# Factors against the exact matrix. Where all rows are the same and the output is one number the
# approximation is none, in every layer.

ARRANGED: dict[str, Callable[[nn.Sequential], list[Tensor]]] = {
    "as they come": lambda net: [*net.parameters()],
    "backwards": lambda net: [*net.parameters()][::-1],
    "biases first": lambda net: sorted(net.parameters(), key=lambda p: p.dim()),
    "weights only": lambda net: [p for p in net.parameters() if p.dim() > 1],
    "one weight frozen": lambda net: [*net.parameters()][1:],
    "one bias frozen": lambda net: [p for i, p in enumerate(net.parameters()) if i != 1],
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("arrangement", ARRANGED)
def test_factors_are_the_blocks_of_the_matrix(
    arrangement: str, sequences: bool, scaled: bool, device: torch.device
) -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False), nn.Sigmoid(), nn.Linear(2, 1)
    )
    net.to(device, torch.float64)
    chosen = ARRANGED[arrangement](net)
    x = random(3, device=device).expand(*((2, 3, 3) if sequences else (5, 3)))
    scale = [1.0 / (i + 1) for i in range(len(chosen))] if scaled else None
    decay = tuple(0.1 * i for i in range(len(chosen)))
    operator = gauss_newton(squares(net, x), chosen, scale, decay)
    plain = gauss_newton(squares(net, x), chosen, scale)
    exact = dense(plain)
    met = operator.factors(seeded())
    weights = [i for i, p in enumerate(chosen) if p.dim() == 2]
    biases = [i for i, p in enumerate(chosen) if p.dim() == 1]
    assert sorted(f.weight for f in met) == weights
    if arrangement == "one weight frozen":  # its bias goes by the diagonal
        biases = biases[1:]
    assert sorted(f.bias for f in met if f.bias is not None) == biases
    for f in met:
        places, a, s = block_of(operator, f)
        assert places.shape == (len(s), len(a))
        expected = exact[places.flatten()[:, None], places.flatten()]
        torch.testing.assert_close(torch.kron(s, a), expected, rtol=1e-12, atol=1e-14)
    # A damped product of factors, dense. Regularization is in the damping.
    for damping in (1e-3, 1.0):
        found = dense(refreshed(operator).inverse(damping))
        torch.testing.assert_close(found, assembled(operator, damping), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lr", [1.0, 0.09])
@pytest.mark.parametrize("bias", [False, True])
def test_the_inverse_is_that_of_the_matrix(bias: bool, lr: float, device: torch.device) -> None:
    """Independent inputs, one output: all of the matrix is one Kronecker product."""
    layer = nn.Linear(4, 1, bias=bias).to(device, torch.float64)
    params = [*layer.parameters()][::-1]
    scale = [math.sqrt(lr), 1.0][: len(params)]
    operator = gauss_newton(squares(layer, random(30, 4, device=device)), params, scale)
    inverse = dense(refreshed(operator).inverse(0.0))
    # Undamped up to a ten-thousandth of the mean eigenvalue, which both factors share.
    both = torch.linalg.eigvals(inverse @ dense(operator)).real
    assert float(both.min()) > 0.8 and float(both.max()) < 1
    far = dense(refreshed(operator).inverse(1e8)) * 1e8
    eye = torch.eye(operator.size, dtype=torch.float64, device=device)
    torch.testing.assert_close(far, eye, rtol=0, atol=1e-3)


def test_groups_of_an_optimizer(device: torch.device) -> None:
    """Weights and biases in groups of their own, each with a rate and a decay."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device, torch.float64)
    loss = squares(net, random(6, 3, device=device))
    made: list[GaussNewton] = []

    def factory(evaluation: Any) -> GaussNewton:
        made.append(GaussNewton(evaluation))
        return made[-1]

    groups = [
        {"params": [p for p in net.parameters() if p.dim() == 1], "lr": 0.25, "weight_decay": 0.2},
        {"params": [p for p in net.parameters() if p.dim() == 2], "weight_decay": 0.3},
    ]
    kfac = KFAC()
    optimizer = NewtonCG(groups, curvature=factory, preconditioner=kfac)
    optimizer.step(closure_of(loss, *net.parameters()))
    slots = made[0].slots()
    assert [(s.scale, s.decay) for s in slots] == [(0.5, 0.05)] * 2 + [(1.0, 0.3)] * 2
    assert [(s.start, s.stop) for s in slots] == [(0, 4), (4, 5), (5, 17), (17, 21)]
    assert [f[:2] for f in kfac._factors] == [(2, 0), (3, 1)]
    assert optimizer.info.loss_after < optimizer.info.loss


def test_the_other_way_in(device: torch.device) -> None:
    """`functional_call` on a pure function gives what a closure gives."""
    case = make_case("mlp", device)
    named = dict(case.model.named_parameters())
    closure = gauss_newton(case.value, case.params())

    def function(params: dict[str, Tensor]) -> Tensor:
        return case.loss(functional_call(case.model, params, (case.x,)), case.y)

    pure = GaussNewton(FunctionalObjective(function, named).evaluate(curvature=True))
    met = [operator.factors(seeded()) for operator in (closure, pure)]
    assert len(met[0]) == 2
    for f, g in zip(*met, strict=True):
        assert (f.weight, f.bias) == (g.weight, g.bias)
        torch.testing.assert_close((f.inputs, f.outputs), (g.inputs, g.outputs))


def test_fisher_matrices_have_factors_of_their_own_labels(device: torch.device) -> None:
    case = make_case("mlp", device)
    evaluation = ClosureObjective(case.value, case.params()).evaluate(curvature=True)
    operator = Fisher(evaluation, labels="empirical")
    last = operator.factors(seeded())[-1]
    z = case.model(case.x)
    d = (z.softmax(1) - F.one_hot(case.y, 3)) / len(z)  # gradients of the loss, sample by sample
    torch.testing.assert_close(last.outputs, len(z) * d.T @ d)


# Layers that are called in all kinds of ways. With one sample and one output the factors are known
# from the gradients of that output.


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.square, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(3):
            h = torch.tanh(self.square(h))
        return self.last(h)


class Loop(nn.Module):
    """A recurrent network; what it says on the way does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last, self.other = nn.Linear(5, 2), nn.Linear(2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 2)
        for step in x.expand(4, *x.shape) * torch.arange(4).view(4, 1, 1).to(x):
            h = torch.sigmoid(self.cell(torch.cat([step, h], 1)))
            self.other(h)
        return self.last(h)


class Averaged(nn.Module):
    """`(batch, time, features)`, averaged over the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        times = torch.arange(4).to(x)[:, None]
        return self.last(torch.tanh(self.first(torch.sin(x[:, None] * times)))).mean(1)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(bias=self.first.bias, weight=self.first.weight, input=x)
        return F.linear(torch.relu_(h), self.last.weight, bias=self.last.bias)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        times = torch.arange(4).to(x)[:, None]
        return self.last(self.layer(self.first(torch.sin(x[:, None] * times)))).mean(1)


CALLED: dict[str, Callable[[], nn.Module]] = {
    "twice": Twice,
    "loop": Loop,
    "sequence": Averaged,
    "keywords": Keywords,
    "encoder": Encoder,
}


def met_by_hooks(model: nn.Module, x: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Second moments of what went through each linear layer, by the place of its weight."""
    places = {id(p): i for i, p in enumerate(model.parameters())}
    calls: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        calls[places[id(module.weight)]].append((arguments[0], output))
        return output * 1

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(hook).remove)
        z = model(x)
    found = {}
    for place, pairs in calls.items():
        inputs, outputs = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(z, outputs, retain_graph=True, allow_unused=True)
        if gradients[0] is not None:
            a, d = (torch.cat([t.flatten(0, -2) for t in ts]) for ts in (inputs, gradients))
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
            found[place] = a.T @ a / len(a), 2 * d.T @ d
    return found


@pytest.mark.parametrize("name", CALLED)
def test_all_calls_of_a_layer_count(name: str, device: torch.device) -> None:
    model = CALLED[name]().to(device, torch.float64)
    x = random(1, 3, device=device)
    if name == "keywords":  # hooks of modules see none of it
        plain = nn.Sequential(model.first, nn.ReLU(), model.last)
        expected = met_by_hooks(plain, x)
    else:
        expected = met_by_hooks(model, x)
    operator = gauss_newton(squares(model, x), [*model.parameters()])
    met = {f.weight: f for f in operator.factors(seeded())}
    assert met.keys() == expected.keys() and len(met) >= 2
    for place, (a, s) in expected.items():
        assert met[place].bias == place + 1
        torch.testing.assert_close((met[place].inputs, met[place].outputs), (a, s))
    inverse = refreshed(operator).inverse(0.1)
    torch.testing.assert_close(dense(inverse), assembled(operator, 0.1), rtol=1e-9, atol=1e-9)


def sharing(kind: str, device: torch.device) -> tuple[list[Tensor], Callable[[], Tensor]]:
    v, w, b = (nn.Parameter(random(*s, device=device)) for s in ((4, 4), (4, 4), (4,)))
    one, x = nn.Parameter(random(1, device=device)), random(6, 4, device=device)
    c = nn.Parameter(random(4, 4, device=device) * (1 + 1j))
    models: dict[str, tuple[list[Tensor], Callable[[], Tensor]]] = {
        "one bias for two weights": (
            [v, w, b],
            lambda: F.linear(F.linear(x, v, b).tanh(), w, b),
        ),
        "now with a bias, now without": ([w, b], lambda: F.linear(F.linear(x, w, b).tanh(), w)),
        "a bias for each use": ([w, b, one], lambda: F.linear(F.linear(x, w, b).tanh(), w, one)),
        "a bias that is broadcast": ([w, one], lambda: F.linear(x, w, one)),
        "a vector for a weight": ([b], lambda: F.linear(x, b)),
        "complex": ([c], lambda: F.linear(x + 0j, c).abs()),
        "sparse inputs": ([w], lambda: F.linear(x.to_sparse(), w)),
        "a weight transposed": ([w], lambda: F.linear(x, w.T)),
    }
    params, model = models[kind]
    return params, lambda: F.mse_loss(model(), torch.ones_like(x[0, 0]).expand(model().shape))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("one bias for two weights", [(0, None), (1, None)]),
        ("now with a bias, now without", [(0, None)]),
        ("a bias for each use", [(0, None)]),
        ("a bias that is broadcast", [(0, None)]),
        ("a vector for a weight", []),
        ("complex", []),
        ("sparse inputs", []),
        ("a weight transposed", []),
    ],
)
def test_no_parameter_is_in_two_blocks(
    kind: str, layers: list[tuple[int, int | None]], device: torch.device
) -> None:
    params, loss = sharing(kind, device)
    operator = gauss_newton(loss, params)
    assert [(f.weight, f.bias) for f in operator.factors(seeded())] == layers
    inverse = dense(refreshed(operator).inverse(0.1))
    torch.testing.assert_close(inverse, inverse.T)
    torch.testing.assert_close(inverse, assembled(operator, 0.1), rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0


@pytest.mark.parametrize("transform", ["vmap", "grad", "both"])
def test_functions_that_use_transforms(transform: str) -> None:
    """Layers inside `torch.func` stand in no graph that can be differentiated: the diagonal."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = random(5, 2)

    def total(x: Tensor) -> Tensor:
        return net(x).sum()

    def loss() -> Tensor:
        run = {
            "vmap": torch.func.vmap(net),
            "grad": torch.func.grad(total),
            "both": torch.func.vmap(torch.func.grad(total)),
        }[transform]
        z = run(x)
        return F.mse_loss(z, torch.ones_like(z))

    operator = gauss_newton(loss, [*net.parameters()])
    inverse = refreshed(operator).inverse(0.1)
    torch.testing.assert_close(dense(inverse), assembled(operator, 0.1), rtol=1e-9, atol=1e-9)


# The expectation.


def test_factors_of_cross_entropy_are_unbiased(device: torch.device) -> None:
    case, draws = make_case("mlp", device), 1000
    operator = gauss_newton(case.value, case.params())
    generator = seeded(3)
    met = [operator.factors(generator) for _ in range(draws)]
    h = case.model[:2](case.x)
    p = case.model[2](h).softmax(1)
    by_logits = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    slopes = case.model[2].weight * (1 - h[:, None, :] ** 2)  # of the logits by the first layer
    exact = [m.detach().sum(0) for m in (slopes.mT @ by_logits @ slopes, by_logits)]
    for layer, expected in enumerate(exact):
        drawn = torch.stack([m[layer].outputs for m in met])
        # With 45 entries five standard errors are exceeded once in 40,000 seeds.
        error = 5 * drawn.std(0) / draws**0.5 + 1e-12
        assert bool(((drawn.mean(0) - expected).abs() <= error).all())
        assert float(error.max()) < 0.1 * float(expected.abs().max())  # it says something
        assert all(torch.equal(m[layer].inputs, met[0][layer].inputs) for m in met)


def test_micro_batches_make_the_factors_of_the_whole(device: torch.device) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device, torch.float64)
    x = random(6, 3, device=device)
    parts = (x[:1], 1 / 6), (x[1:4], 3 / 6), (x[4:], 2 / 6)

    def several() -> Tensor:
        for rows, share in parts:
            (share * squares(net, rows)()).backward()
        return torch.zeros((), device=device)

    params = [*net.parameters()]
    for f, g in zip(
        gauss_newton(several, params).factors(seeded()),
        gauss_newton(squares(net, x), params).factors(seeded(1)),
        strict=True,
    ):
        # One output: the signs that are drawn cancel in S, sample by sample.
        torch.testing.assert_close((f.inputs, f.outputs), (g.inputs, g.outputs))


# The inverse.


@pytest.mark.parametrize("damping", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("name", [*sorted(CASES), "layernorm"])
def test_the_rest_goes_by_the_diagonal(name: str, damping: float, device: torch.device) -> None:
    case = make_case("mlp" if name == "layernorm" else name, device)
    if name == "layernorm":
        case.model.insert(1, nn.LayerNorm(6, device=device, dtype=torch.float64))
        case.model.insert(3, nn.LayerNorm(6, device=device, dtype=torch.float64))
    params = case.params()
    scale = [1 / (i + 1) for i in range(len(params))]
    operator = gauss_newton(case.value, params, scale, tuple(0.01 * i for i in range(len(params))))
    inverse = refreshed(operator).inverse(damping)
    found = dense(inverse)
    torch.testing.assert_close(found, found.T, rtol=1e-10, atol=1e-10 * float(found.max()))
    torch.testing.assert_close(
        found, assembled(operator, damping), rtol=1e-8, atol=1e-9 * float(found.max())
    )
    assert smallest_eigenvalue(inverse) > 0
    eye = torch.eye(operator.size, dtype=torch.float64, device=device)
    torch.testing.assert_close(inverse @ eye, found)
    assert inverse.size == operator.size and inverse.dtype == operator.dtype


def test_no_entry_is_close_to_zero_by_chance(device: torch.device) -> None:
    """The square of one random number is below a hundredth of its mean one time in twelve."""
    case = make_case("cnn", device)
    operator = gauss_newton(case.value, case.params())
    weight = operator.slots()[0]
    for seed in range(5):
        diagonal = refreshed(operator, seed)._diagonal
        assert diagonal is not None
        part = diagonal[weight.start : weight.stop]
        assert float(part.min()) > 0.4 * float(part.mean())


def test_what_has_no_curvature_at_all(device: torch.device) -> None:
    """Undamped, a trust radius must still bound what does not reach the loss."""
    model = Loop().to(device, torch.float64)
    operator = gauss_newton(squares(model, random(6, 3, device=device)), [*model.parameters()])
    kfac = refreshed(operator)
    unused = operator.slots()[4]
    assert [name for name, _ in model.named_parameters()][4] == "other.weight"
    entries = dense(kfac.inverse(0.0)).diagonal()[unused.start : unused.stop]
    assert kfac._diagonal is not None
    expected = torch.full_like(entries, 1e4 / float(kfac._diagonal.mean()))
    torch.testing.assert_close(entries, expected)


def test_a_model_without_linear_layers(device: torch.device) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 2)).to(device).double()
    x = random(3, 1, 4, 4, device=device)
    operator = gauss_newton(lambda: F.mse_loss(net(x).sum(), x[0, 0, 0, 0]), [*net.parameters()])
    assert operator.factors(seeded()) == []
    kfac = KFAC(period=3)
    assert [kfac.refresh(operator, seeded()) for _ in range(7)] == [1, 0, 0, 1, 0, 0, 1]
    found = dense(kfac.inverse(0.1))
    torch.testing.assert_close(found, assembled(operator, 0.1))


@pytest.mark.parametrize(("largest", "layers"), [(3, 0), (4, 1), (5, 2), (6, 3)])
def test_layers_wider_than_the_largest(largest: int, layers: int) -> None:
    """By the larger of inputs and outputs, the bias not counted."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 6)).double()
    net.append(nn.Softmax(1))
    operator = gauss_newton(
        lambda: F.mse_loss(net(random(7, 4)), torch.zeros(7, 6).double()), [*net.parameters()]
    )
    kfac = KFAC(largest=largest)
    products = kfac.refresh(operator, seeded())
    assert len(kfac._factors) == layers == len(operator.factors(seeded(), largest))
    assert products == (2 if 0 < layers < 3 else 1)
    assert (kfac._diagonal is None) is (layers == 3)
    assert smallest_eigenvalue(kfac.inverse(0.1)) > 0


def test_factors_that_are_too_large_are_never_made() -> None:
    """Those of a vocabulary would not fit anywhere."""
    head = nn.Linear(3, 2_000_000, bias=False)
    operator = gauss_newton(
        lambda: F.mse_loss(head(torch.ones(1, 3)), torch.zeros(1, 2_000_000)), [head.weight]
    )
    assert refreshed(operator)._factors == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("width", [3, 40, 400])
def test_factors_that_are_almost_singular(
    width: int, spread: float, damping: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Inputs that hardly differ, and outputs that all say the same."""
    layer = nn.Linear(width, 3).to(device, dtype)
    x = (1 + spread * random(width + 100, width, device=device)).to(dtype)
    operator = gauss_newton(
        lambda: F.mse_loss(layer(x).sum(1), x[:, 0]), [layer.weight, layer.bias]
    )
    inverse = refreshed(operator).inverse(damping)
    assert isinstance(inverse, LinearOperator)
    (block,) = inverse._blocks  # type: ignore[attr-defined]
    for factor in (block.inputs, block.outputs):
        values = torch.linalg.eigvalsh(factor.double())
        assert bool(values.isfinite().all()) and float(values[0]) > 0
        torch.testing.assert_close(factor, factor.T)
    b = torch.ones(operator.size, dtype=dtype, device=device)
    result = CG(20)(Damped(operator, damping), b, preconditioner=inverse)
    assert bool(result.x.isfinite().all()) and result.decrease > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["inputs", "outputs", "both"])
def test_factors_of_zero(
    kind: str, damping: float, dtype: torch.dtype, device: torch.device
) -> None:
    layer = nn.Linear(3, 4, bias=False).to(device, dtype)
    x = torch.ones(5, 3, device=device, dtype=dtype) * (kind == "outputs")
    factor = float(kind == "inputs")
    operator = gauss_newton(
        lambda: F.mse_loss(factor * layer(x), torch.ones_like(layer(x))), [layer.weight]
    )
    (f,) = operator.factors(seeded())
    assert bool(f.inputs.any()) is (kind == "outputs") and bool(f.outputs.any()) is bool(factor)
    inverse = dense(refreshed(operator).inverse(damping)).double()
    assert bool(inverse.isfinite().all())
    assert float(torch.linalg.eigvalsh(inverse / inverse.max())[0]) > 0


# Precisions.


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_low_precision(kind: str, device: torch.device) -> None:
    """Factors are made in float32."""
    case = make_case("mlp", device, torch.float32)
    case.model[2].bias = None
    reference = gauss_newton(case.value, case.params()).factors(seeded())
    if kind == "bfloat16":
        case.model.bfloat16()
        case.x = case.x.bfloat16()

    def value() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind == "autocast"):
            z = case.model(case.x)
        return F.cross_entropy(z.float(), case.y)

    operator = gauss_newton(value, case.params())
    assert operator.dtype == torch.float32
    met = operator.factors(seeded())
    assert len(met) == len(reference) == 2
    for f, g in zip(met, reference, strict=True):
        assert f.inputs.dtype == f.outputs.dtype == torch.float32
        torch.testing.assert_close(f.inputs, g.inputs, rtol=0.05, atol=0.02)
        torch.testing.assert_close(f.outputs, g.outputs, rtol=0.1, atol=0.01)
    optimizer = NewtonCG(case.params(), preconditioner="kfac")
    closure = closure_of(value, *case.params())
    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


class OutOfRange(nn.Module):
    """Values and slopes are small enough for float32, the squares of inputs are not."""

    def __init__(self, kind: str, device: torch.device) -> None:
        super().__init__()
        weight = torch.full((1, 4), 1e-20, device=device)
        self.weight = nn.Parameter(weight if kind == "factor" else weight[0])
        self.kind = kind
        self.x = torch.full((1, 4), 3e19, device=device)

    def forward(self) -> Tensor:
        if self.kind == "factor":
            return F.linear(self.x, self.weight)
        return (self.x * self.weight).sum(1, keepdim=True)


@pytest.mark.parametrize("globalization", ["damping", "trust_region", "line_search"])
@pytest.mark.parametrize("kind", ["factor", "diagonal"])
def test_factors_that_are_not_finite(kind: str, globalization: str, device: torch.device) -> None:
    model = OutOfRange(kind, device)

    def loss() -> Tensor:
        return F.mse_loss(model(), torch.full((1, 1), 1.21, device=device))

    kfac = KFAC(decay=0.5)
    optimizer = NewtonCG(model.parameters(), preconditioner=kfac, globalization=globalization)
    closure = closure_of(loss, model.weight)
    optimizer.step(closure)
    info = optimizer.info
    assert info.repair == "what the preconditioner is made of was not finite, it was left out"
    assert info.loss_after < info.loss and bool(model.weight.isfinite().all())
    with pytest.raises(FloatingPointError, match="a Kronecker factor or the diagonal was not fini"):
        refreshed(gauss_newton(loss, [model.weight]))
    # Nothing of it is remembered.
    model.x.fill_(2.0)
    optimizer.step(closure)
    assert optimizer.info.loss_after < optimizer.info.loss
    assert all(bool(m.isfinite().all()) for f in kfac._factors for m in f[2:])
    assert kfac._diagonal is None or bool(kfac._diagonal.isfinite().all())


# Training.


def normalized() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Linear(3, 5)), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)
    )


TRAINED = {**CALLED, "spectral norm": normalized}


@pytest.mark.parametrize("globalization", ["damping", "trust_region", "line_search"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_step_goes_down(name: str, globalization: str, device: torch.device) -> None:
    model = TRAINED[name]().to(device, torch.float64)
    x = random(12, 3, device=device)
    params = [p for n, p in model.named_parameters() if not n.startswith("other")]
    damping = {} if globalization == "trust_region" else {"damping": 0.1}
    optimizer = NewtonCG(params, globalization=globalization, preconditioner="kfac", **damping)
    y = torch.sin(x.sum(1, keepdim=True))

    def value() -> Tensor:
        return F.mse_loss(model(x), y)

    closure = closure_of(value, *model.parameters())
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.info.loss_after < optimizer.info.loss


def test_parametrized_weights_are_not_those_of_layers(device: torch.device) -> None:
    """What the layer multiplies by is made from the parameter."""
    model = normalized().to(device, torch.float64).eval()
    params = [*model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    operator = gauss_newton(squares(model, random(6, 3, device=device)), params)
    met = [(names[f.weight], names[f.bias or 0]) for f in operator.factors(seeded())]
    assert met == [("3.weight", "3.bias")]


@pytest.mark.parametrize("solver", ["cg", MINRES(50, 1e-3)], ids=["cg", "minres"])
@pytest.mark.parametrize("arguments", [{}, {"period": 4}, {"decay": 0.8}, {"largest": 5}], ids=str)
def test_strategies(arguments: dict[str, Any], solver: Any, device: torch.device) -> None:
    case = make_case("mlp", device)
    optimizer = NewtonCG(case.params(), preconditioner=KFAC(**arguments), solver=solver)
    losses = [optimizer.step(case.closure()).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def curves() -> Tensor:
    """Strokes on ten times ten pixels, after the data set of Hinton and Salakhutdinov 2006."""
    grid = torch.linspace(0, 1, 10, dtype=torch.float64)
    across, down = torch.meshgrid(grid, grid, indexing="ij")
    t = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    p = random(200, 3, 2, seed=1).sigmoid()[:, :, None]
    c = (1 - t) ** 2 * p[:, 0] + 2 * t * (1 - t) * p[:, 1] + t**2 * p[:, 2]
    square = (across - c[..., 0, None, None]) ** 2 + (down - c[..., 1, None, None]) ** 2
    return torch.exp(-200 * square.amin(1)).flatten(1)


class Autoencoder:
    """The problem of Martens 2010, small."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        sizes = [100, 60, 30, 6, 30, 60, 100]
        layers: list[nn.Module] = []
        for rows, columns in pairwise(sizes):
            layers += [nn.Linear(rows, columns), nn.Sigmoid()]
            nn.init.normal_(layers[-2].weight, std=2 / rows**0.5)
            nn.init.zeros_(layers[-2].bias)
        self.net = nn.Sequential(*layers[:-1]).to(device, torch.float64)
        self.x = curves().to(device)

    def value(self) -> Tensor:
        z = self.net(self.x)
        return F.binary_cross_entropy_with_logits(z, self.x, reduction="sum") / len(self.x)

    def train(self, products: int, goal: float = 0.0, **arguments: Any) -> tuple[float, int]:
        """The loss after some products, evaluations included, or how many a goal takes."""
        optimizer = NewtonCG(self.net.parameters(), **arguments)
        done, loss = 0, math.inf
        closure = closure_of(self.value, *self.net.parameters())
        while done < products and loss > goal:
            optimizer.step(closure)
            info = optimizer.info
            done, loss = done + info.products + info.evaluations, info.loss_after
        return loss, done


def test_a_deep_autoencoder_takes_fewer_products(device: torch.device) -> None:
    goal, plain = Autoencoder(device).train(700, preconditioner=None)
    loss, helped = Autoencoder(device).train(700, goal, preconditioner="kfac")
    assert loss <= goal and helped < 0.75 * plain


def test_a_system_takes_several_times_fewer_iterations(device: torch.device) -> None:
    problem = Autoencoder(device)
    problem.train(300, damping=1.0, preconditioner=None)
    params = [*problem.net.parameters()]
    evaluation = ClosureObjective(problem.value, params).evaluate(curvature=True)
    operator, damping = GaussNewton(evaluation), 1e-5
    system = Damped(operator, damping)
    helped, plain = (
        CG(1000, progress=1e-4)(system, -evaluation.grad, preconditioner=inverse)
        for inverse in (refreshed(operator).inverse(damping), None)
    )
    assert 3 * helped.iterations < plain.iterations
    assert helped.decrease > 0.99 * plain.decrease


# Its life.


def test_one_set_of_factors_serves_several_operators(device: torch.device) -> None:
    case = make_case("cnn", device)
    kfac = KFAC(period=3)
    made, inverses = [], []
    for step in range(7):
        with torch.no_grad():
            case.x.add_(0.1)
        made.append(kfac.refresh(gauss_newton(case.value, case.params()), seeded(step)))
        inverses.append(dense(kfac.inverse(0.1)))
    assert made == [2, 0, 0, 2, 0, 0, 2]
    same = [torch.equal(a, b) for a, b in pairwise(inverses)]
    assert same == [True, True, False, True, True, False]


def test_factors_are_averaged(device: torch.device) -> None:
    case = make_case("cnn", device)
    kfac, expected = KFAC(decay=0.75), None
    for step in range(3):
        with torch.no_grad():
            case.x.mul_(1.5)
        operator = gauss_newton(case.value, case.params())
        kfac.refresh(operator, seeded(step))
        fresh = refreshed(operator, step)
        new = [*fresh._factors[0][2:], fresh._diagonal]
        if expected is None:
            expected = new
        expected = [0.75 * a + 0.25 * b for a, b in zip(expected, new, strict=True)]
    torch.testing.assert_close([*kfac._factors[0][2:], kfac._diagonal], expected)
    assert expected is not None and not torch.allclose(expected[0], new[0], rtol=0.1)


@pytest.mark.parametrize("arguments", [{"period": 5}, {"decay": 0.9}], ids=str)
def test_factors_of_another_layout_are_dropped(
    arguments: dict[str, Any], device: torch.device
) -> None:
    kfac = KFAC(**arguments)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(device, torch.float64)
    x = random(7, 4, device=device)
    params = [*net.parameters()]
    for chosen, scale, dtype in (
        (params, None, torch.float64),
        (params[2:], None, torch.float64),  # the same places, other shapes
        (params[:2], None, torch.float64),
        (params, [1.0, 1.0, 0.5, 0.5], torch.float64),
        (params, [1.0, 1.0, 0.5, 0.25], torch.float64),
    ):
        net.to(dtype)
        y = torch.zeros(7, 3, dtype=dtype, device=device)
        operator = gauss_newton(lambda d=dtype, y=y: F.mse_loss(net(x.to(d)), y), chosen, scale)
        assert kfac.refresh(operator, seeded()) > 0
        expected = refreshed(operator).inverse(0.1)
        torch.testing.assert_close(dense(kfac.inverse(0.1)), dense(expected), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{"period": 5}, {"decay": 0.9}], ids=str)
def test_the_precision_may_change(arguments: dict[str, Any], device: torch.device) -> None:
    kfac, case = KFAC(**arguments), make_case("cnn", device)
    for dtype in (torch.float64, torch.float32):
        case = make_case("cnn", device, dtype)
        kfac.refresh(gauss_newton(case.value, case.params()), seeded())
        state = kfac.state_dict()
        kfac = KFAC(**arguments)
        kfac.load_state_dict(state)
    kfac.refresh(gauss_newton(case.value, case.params()), seeded())
    assert dense(kfac.inverse(0.1)).dtype == torch.float32
    state["diagonal"] = state["diagonal"].cpu()  # where a checkpoint was loaded to
    state["factors"] = [[w, b, a.cpu(), s.cpu()] for w, b, a, s in state["factors"]]
    kfac.load_state_dict(state)
    kfac.refresh(gauss_newton(case.value, case.params()), seeded())
    assert dense(kfac.inverse(0.1)).device.type == device.type


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_its_state() -> None:
    case = make_case("cnn", CPU)
    operator = gauss_newton(case.value, case.params())
    assert KFAC(period=3).state_dict() == {}
    assert refreshed(operator).state_dict() == {}  # it is made anew each time
    one = refreshed(operator, period=3)
    other = KFAC(period=3)
    other.load_state_dict(saved(one.state_dict()))
    for seed in range(5):
        made = [kfac.refresh(operator, seeded(seed)) for kfac in (one, other)]
        assert made == [0 if seed != 2 else 2] * 2
        assert torch.equal(*(dense(kfac.inverse(0.1)) for kfac in (one, other)))
    other.load_state_dict({})
    assert other.state_dict() == {} and other.refresh(operator, seeded()) == 2


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("arguments", [{}, {"period": 3}, {"decay": 0.9}], ids=str)
def test_resuming_bit_for_bit(
    arguments: dict[str, Any], name: str, steps: int, device: torch.device
) -> None:
    made, again = make_case(name, device), make_case(name, device)
    optimizer = NewtonCG(made.params(), preconditioner=KFAC(**arguments))
    for _ in range(steps):
        optimizer.step(made.closure())
    weights, state = saved((made.model.state_dict(), optimizer.state_dict()))
    twin_model, twin = copy.deepcopy((made, optimizer))
    resumed = NewtonCG(again.params(), preconditioner=KFAC(**arguments))
    again.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for o, m in ((optimizer, made), (resumed, again), (twin, twin_model)):
        for _ in range(5):
            o.step(m.closure())
    for other in (again, twin_model):
        assert all(torch.equal(a, b) for a, b in zip(made.params(), other.params(), strict=True))
    assert optimizer.info == resumed.info == twin.info


@pytest.mark.parametrize("change", ["freeze", "lr", "load and freeze", "load with another lr"])
@pytest.mark.parametrize("arguments", [{"period": 50}, {"decay": 0.9}], ids=str)
def test_resuming_with_other_parameters(arguments: dict[str, Any], change: str) -> None:
    """What is in a checkpoint may be of other parameters; a trust region keeps no direction."""
    made = make_case("mlp", CPU)
    kfac = KFAC(**arguments)

    def optimizer_of(kfac: KFAC) -> NewtonCG:
        groups = [{"params": made.params()[:2]}, {"params": made.params()[2:]}]
        return NewtonCG(groups, preconditioner=kfac, globalization=TrustRegion())

    optimizer = optimizer_of(kfac)
    for _ in range(2):
        optimizer.step(made.closure())
    if change.startswith("load"):
        state, kfac = saved(optimizer.state_dict()), KFAC(**arguments)
        optimizer = optimizer_of(kfac)
        optimizer.load_state_dict(state)
    if change.endswith("freeze"):
        for p in made.params()[:2]:
            p.requires_grad_(False)
    else:
        optimizer.param_groups[0]["lr"] = 0.25
    generator = torch.Generator()
    states = optimizer.state_dict()["state"].values()  # whole-model state is where training is
    generator.set_state(next(state["generator"] for state in states if "generator" in state))
    fresh, original = KFAC(), kfac.refresh
    inverses: list[Tensor] = []

    def refresh(operator: LinearOperator, given: torch.Generator | None) -> int:
        fresh.refresh(operator, generator)
        products = original(operator, given)
        inverses.extend(dense(one.inverse(0.1)) for one in (fresh, kfac))
        return products

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfac, "refresh", refresh)
        optimizer.step(made.closure())
    assert torch.equal(*inverses)
    assert optimizer.info.loss_after < optimizer.info.loss


# Memory.


def test_outputs_of_layers_are_not_kept() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    seen: list[weakref.ref[Tensor]] = []

    def note(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output))

    handle = net[0].register_forward_hook(note)
    operator = gauss_newton(squares(net, random(5, 3)), [*net.parameters()])
    handle.remove()
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None  # ReLU keeps its result, not its argument
    assert len(operator.factors(seeded())) == 2


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("arguments", [{}, {"period": 3}, {"decay": 0.9}], ids=str)
def test_memory_is_flat_over_steps(arguments: dict[str, Any]) -> None:
    made = make_case("cnn", CPU)
    optimizer = NewtonCG(made.params(), preconditioner=KFAC(**arguments))
    counts = []
    for _ in range(9):
        optimizer.step(made.closure())
        counts.append(alive())
    assert len({*counts[2:]}) == 1


# Several ranks.


class Share:
    """A model and one rank's part of a batch; one of one is the whole."""

    def __init__(self, rank: int, ranks: int) -> None:
        torch.manual_seed(7)
        self.plain = nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)
        ).double()
        x = torch.randn(16, 4, dtype=torch.float64)
        self.x = x.chunk(ranks)[rank]
        self.y = torch.sin(3 * self.x.sum(1, keepdim=True))
        self.model = self.plain if ranks == 1 else DistributedDataParallel(self.plain)

    def value(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)


def train_ranks(rank: int, ranks: int, arguments: dict[str, Any]) -> list[Any]:
    share = Share(rank, ranks)
    optimizer = NewtonCG(share.model.parameters(), preconditioner=KFAC(**arguments))
    closure = closure_of(share.value, *share.plain.parameters())
    losses = [optimizer.step(closure).item() for _ in range(8)]
    return [losses, [p.detach().clone() for p in share.plain.parameters()]]


def factors_of_ranks(rank: int, ranks: int) -> list[Any]:
    share = Share(rank, ranks)
    operator = gauss_newton(share.value, [*share.plain.parameters()])
    return [(f.weight, f.bias, f.inputs, f.outputs) for f in operator.factors(seeded())]


def runs_and_factors(rank: int, ranks: int) -> list[Any]:
    runs = [train_ranks(rank, ranks, a) for a in ({}, {"period": 3}, {"decay": 0.5})]
    return [*runs, factors_of_ranks(rank, ranks)]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ranks_agree(tmp_path: Path) -> None:
    *runs, factors = on_both(run_on_ranks([runs_and_factors], tmp_path), "runs_and_factors")
    for losses, _ in runs:
        assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(factors, factors_of_ranks(0, 1), rtol=1e-12, atol=1e-12)


# Names and errors.


def test_its_name() -> None:
    assert isinstance(resolve_preconditioner("kfac"), KFAC)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KFAC(0), ValueError, "period must be an integer of at least 1, got 0"),
        (lambda: KFAC(2.5), ValueError, "period must be an integer of at least 1, got 2.5"),
        (lambda: KFAC(largest=0), ValueError, "largest must be an integer .* at least 1, got 0"),
        (lambda: KFAC(decay=1.0), ValueError, r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: KFAC(decay=-0.1), ValueError, r"decay must lie in \[0, 1\), got -0.1"),
        (lambda: KFAC(decay=math.nan), ValueError, r"decay must lie in \[0, 1\), got nan"),
        (
            lambda: KFAC().refresh(Diagonal(torch.ones(2)), None),
            TypeError,
            "'kfac' is made from model outputs, which Diagonal does not know; use curvature='ggn'",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_curvature_without_outputs() -> None:
    layer = nn.Linear(2, 1).double()
    optimizer = NewtonCG(layer.parameters(), curvature="hessian", preconditioner="kfac")
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError, match="which Hessian does not know; use curvature='ggn'"):
        optimizer.step(closure_of(squares(layer, random(4, 2)), *layer.parameters()))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("matrix", [[[1.0, 2.0], [2.0, 1.0]], [[3e38, 3e38], [3e38, 3e38]]])
def test_a_factor_that_cannot_be_inverted(matrix: list[list[float]]) -> None:
    """Its diagonal is better than an error in the middle of a step."""
    inverse = _inverse(torch.tensor(matrix), torch.tensor(1.0))
    assert bool(inverse.isfinite().all()) and float(torch.linalg.eigvalsh(inverse)[0]) >= 0
