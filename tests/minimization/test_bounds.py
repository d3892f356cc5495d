"""Bounds in all the forms that `minimize` takes."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from torch_secondorder import minimize
from torch_secondorder.minimization._bounds import resolve_bounds
from torch_secondorder.minimization._methods import METHODS

START = torch.tensor([-1.2, 1.0], dtype=torch.float64)
# "lm" is for functions that show residuals, see test_least_squares.py.
BOUNDED = [name for name, row in METHODS.items() if row.takes_bounds and name != "lm"]
inf = float("inf")


def rosenbrock(x: Tensor) -> Tensor:
    a, b = x.unbind()
    return 100.0 * (b - a * a).square() + (1.0 - a).square()


def resolved(bounds: Any) -> Any:
    ((low, high),) = resolve_bounds(bounds, [START], ["x0"], None)
    return tuple(v.tolist() if isinstance(v, Tensor) else v for v in (low, high))


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        ((0, 1), (0, 1)),
        ((None, 2.0), (None, 2.0)),
        ((torch.tensor([0, 1]), None), ([0, 1], None)),
        ((torch.tensor(0.5), 2), ([0.5, 0.5], 2)),
        (([0.0, 1.0], [2.0, 3.0]), ([0.0, 2.0], [1.0, 3.0])),  # two entries: SciPy's pairs
        ([(0, 1), (None, 3)], ([0.0, -inf], [1.0, 3.0])),
        (((0, None), (None, None)), ([0.0, -inf], [inf, inf])),
        (scipy.optimize.Bounds([0, -inf], 5), ([0.0, -inf], [5.0, 5.0])),
        (scipy.optimize.Bounds(-1, [1, 2]), ([-1.0, -1.0], [1.0, 2.0])),
    ],
)
def test_forms(bounds: Any, wanted: Any) -> None:
    assert resolved(bounds) == wanted


def test_bounds_of_a_tree() -> None:
    leaves, names = [torch.zeros(2), torch.zeros(())], ["x0['a']", "x0['b']"]
    _, structure = torch.utils._pytree.tree_flatten({"a": 0, "b": 0})
    (first, second) = resolve_bounds(
        (-1, {"a": torch.ones(2), "b": None}), leaves, names, structure
    )
    assert first[0] == second[0] == -1 and second[1] is None
    assert torch.equal(first[1], torch.ones(2))
    _, pair = torch.utils._pytree.tree_flatten((0, 0))  # a tree of two looks like pairs
    assert resolve_bounds(((0, 1), (2, 3)), leaves, names, pair) == [(0, 2), (1, 3)]
    shared = resolve_bounds((torch.tensor(0.0), 1), leaves, names, structure)
    assert shared[0][0].shape == (2,) and shared[1][0].shape == ()
    for bounds, message in (
        (({"a": 1}, None), "the low bound is a tree .* but x0 is"),
        ((None, torch.ones(2)), r"the high bound is a tensor of shape \(2,\), and x0 is a tree"),
        ((None, {"a": torch.ones(3), "b": 1}), r"high bound of x0\['a'\] has shape \(3,\)"),
        (({"a": "x", "b": 1}, None), r"the low bound of x0\['a'\] is str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            resolve_bounds(bounds, leaves, names, structure)


@pytest.mark.parametrize(
    ("bounds", "kind", "message"),
    [
        (3, TypeError, "bounds must be .low, high..*; got int"),
        ((1, 2, 3), TypeError, "bounds must be .low, high..*; got tuple"),
        ([(0, 1)] * 3, ValueError, r"x0 has 2 entries, and bounds has 3 pairs \(min, max\)"),
        ((torch.zeros(3), None), ValueError, r"low bound of x0 has shape \(3,\), which does not"),
        ((None, "a"), TypeError, "the high bound of x0 is str"),
        ((0, True), TypeError, "a number, a tensor, .*; the high bound of x0 is a bool"),
        (([0.0, 0.0], None), TypeError, "a number, a tensor, .*; the low bound of x0 is a list"),
    ],
)
def test_forms_that_do_not_fit(bounds: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolved(bounds)


def test_pairs_need_one_dimension() -> None:
    with pytest.raises(ValueError, match=r"1-d x0, which has shape \(2, 1\)"):
        resolve_bounds([(0, 1), (0, 1)], [START.view(2, 1)], ["x0"], None)


@pytest.mark.parametrize("method", BOUNDED)
@pytest.mark.parametrize("jac", [None, "2-point", "3-point"])
def test_agrees_with_scipy(method: str, jac: Any) -> None:
    if jac and METHODS[method].twice:
        pytest.skip("it takes second derivatives")
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return rosenbrock(x)

    low, high = torch.tensor([-2.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    result = minimize(function, START, method, bounds=(low, high), jac=jac)
    theirs = scipy.optimize.minimize(
        lambda x: rosenbrock(torch.from_numpy(x)).item(),
        START.numpy(),
        method="L-BFGS-B",
        bounds=[(-2, 0.5), (-2, 3)],
    )
    assert result.success, result
    assert result.x.numpy() == pytest.approx(theirs.x, abs=1e-4)
    assert result.x[0] == 0.5 and result.jac[0] < 0
    assert all(((low <= x) & (x <= high)).all() for x in seen)


@pytest.mark.parametrize("method", BOUNDED)
def test_each_leaf_has_its_bounds(method: str) -> None:
    tree = {"a": torch.zeros(2).double(), "b": torch.zeros(()).double()}
    result = minimize(
        lambda p: (p["a"] - 3).square().sum() + (p["b"] + p["a"].sum()).square(),
        tree,
        method,
        bounds=({"a": 0, "b": -1.5}, {"a": torch.tensor([1.0, 2.0]), "b": None}),
    )
    assert result.success
    assert result.x["a"].tolist() == pytest.approx([1.0, 1.75])
    assert result.x["b"].item() == pytest.approx(-1.5)


@pytest.mark.parametrize("method", BOUNDED)
@pytest.mark.parametrize("bounds", [(1, 0), (float("nan"), 1)])
def test_bounds_that_make_no_sense(method: str, bounds: Any) -> None:
    with pytest.raises(ValueError, match="bound"):
        minimize(rosenbrock, START, method, bounds=bounds)


@pytest.mark.parametrize(
    ("high", "message"),
    [
        (-1, r"bounds of x0\['b'\]\[0\] leave no number: they are 0 and -1"),
        (torch.tensor([1.0, float("nan")]), r"a bound of x0\['b'\]\[0\] is NaN"),
        (torch.tensor([True, False]), "got a tensor of torch.bool"),
    ],
)
def test_errors_name_the_leaf(high: Any, message: str) -> None:
    def never(tree: Any) -> Tensor:
        raise AssertionError("the function was called")

    tree = {"a": torch.zeros(()), "b": [torch.zeros(2)]}
    with pytest.raises((TypeError, ValueError), match=message):
        minimize(never, tree, bounds=(0, {"a": None, "b": [high]}))


def test_complex_leaves_have_no_bounds_beside_others_that_have() -> None:
    tree = {"a": torch.zeros(1).double(), "z": torch.zeros(1, dtype=torch.complex128)}

    def function(p: Any) -> Tensor:
        return (p["a"] - 3).square().sum() + (p["z"] - 1j).abs().square().sum()

    with pytest.raises(ValueError, match=r"x0\['z'\] is complex.*view_as_real, or leave it with"):
        minimize(function, tree, bounds=(0, 1))
    result = minimize(function, tree, bounds=(None, {"a": 1, "z": None}))
    assert result.success and result.x["a"].item() == 1.0
    assert result.x["z"].item() == pytest.approx(1j)


@pytest.mark.parametrize("method", BOUNDED)
def test_bounds_in_a_wider_precision_hold_in_that_precision(method: str) -> None:
    low = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    x0, one = torch.ones(3), torch.ones(3, dtype=torch.float64)
    result = minimize(lambda x: x.square().sum(), x0, method, bounds=(low, one))
    assert (result.x.double() >= low).all() and torch.allclose(result.x.double(), low)
    fixed = minimize(lambda x: x.square().sum(), x0, method, bounds=(low, low))
    assert torch.equal(fixed.x, low.float())


@pytest.mark.parametrize("method", BOUNDED)
def test_a_start_outside_is_projected(method: str) -> None:
    result = minimize(lambda x: x.square().sum(), START, method, bounds=(2, None))
    assert result.success and torch.allclose(result.x, torch.full_like(START, 2.0))
