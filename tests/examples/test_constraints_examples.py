"""The examples with constraints: they run, and multipliers are the prices of the bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import constrained_fit as fitting
import fair_classifier as fair
import spectral_norm_bound as spectral
from _constrained import Price, check_price
from tests.support.examples import run_example
from torch_secondorder import BFGS, LBFGS

DTYPE = torch.float64


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def price_rows(output: str) -> list[list[str]]:
    """The cells of the table of prices, without the names of the bounds."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("bound on")) + 2
    rows = []
    for line in lines[start:]:
        if "+-" not in line:
            break
        rows.append(line.split()[-6:])
    return rows


# Prices.


def test_a_price_is_the_slope_of_the_lowest_loss() -> None:
    # min x^2 subject to 1 + b - x <= 0: the loss is (1 + b)^2, and the multiplier 2 (1 + b)
    price = check_price("b", 0.5, 0.1, -3.0, lambda b: (1.0 + b) ** 2)
    assert price.predicted == pytest.approx(0.6) == price.measured
    assert price.error < 1e-12
    assert Price("b", 0.5, 0.1, -2.7, 1.96, 2.56).error == pytest.approx(0.1)


# The fair classifier.


@pytest.fixture(scope="module")
def patients() -> fair.Patients:
    return fair.load_patients("age")


PARITY = fair.Settings("parity", 0, 20, 0)


def test_the_gap_is_the_difference_of_rates(patients: fair.Patients) -> None:
    z = torch.linspace(-1.0, 1.0, len(patients.y), dtype=DTYPE)
    answers, old = z > 0, patients.group
    expected = answers[old].double().mean() - answers[~old].double().mean()
    assert fair.true_gap(z, patients, "parity") == pytest.approx(expected.item())
    ill = patients.y > 0
    expected = answers[old & ill].double().mean() - answers[~old & ill].double().mean()
    assert fair.true_gap(z, patients, "opportunity") == pytest.approx(expected.item())
    steep = fair.smooth_gap(1e6 * z, patients, "parity")
    assert steep.item() == pytest.approx(fair.true_gap(z, patients, "parity"), abs=1e-9)
    young = patients[~old]
    assert math.isfinite(fair.true_gap(z[~old], young, "parity"))  # a batch without old patients


def test_the_data_are_those_of_the_description(patients: fair.Patients) -> None:
    assert len(patients.y) == 442 and patients.group.sum() == 228
    assert patients.y.mean() == 0.5
    assert fair.load_patients("sex").group.sum() == 207
    held_out = torch.cat([test for _, test in fair.split(patients, 5, 0)])
    assert sorted(held_out.tolist()) == list(range(442))


@pytest.mark.parametrize("rate", fair.RATES)
def test_multipliers_are_prices_of_fairness(patients: fair.Patients, rate: str) -> None:
    settings = replace(PARITY, rate=rate)
    (price,) = fair.check_prices(patients, settings, [0.05])
    assert price.multiplier > 0.01
    assert price.error < 1e-4
    model = fair.train_full(patients, settings, 0.05).model
    gap = fair.smooth_gap(model(patients.x)[:, 0], patients, rate)
    assert gap.item() == pytest.approx(0.05, abs=1e-8)


def test_mini_batches_find_about_the_same_price(patients: fair.Patients) -> None:
    exact = fair.train_full(patients, PARITY, 0.05)
    batches = fair.train_batches(patients, replace(PARITY, epochs=60), 0.05)
    assert batches.price == pytest.approx(exact.price, rel=0.15)
    gap = fair.smooth_gap(batches.model(patients.x)[:, 0], patients, "parity")
    assert gap.item() == pytest.approx(0.05, abs=0.01)


def test_the_factor_of_a_penalty_follows_from_the_multiplier(patients: fair.Patients) -> None:
    factor, trainings = fair.tune_penalty(patients, PARITY, 0.05)
    price = fair.train_full(patients, PARITY, 0.05).price
    assert factor == pytest.approx(price / 0.1, rel=0.06)  # the gap is found to 2%
    assert trainings > 3


def test_the_fair_classifier(tmp_path: Path) -> None:
    done = run_example("--quick", cwd=tmp_path, script="fair_classifier.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "442 patients, 228 50 or older" in lines[0]
    free, _, tight = (line.split() for line in lines[3:6])
    assert float(free[3]) > 0.15  # the smooth gap
    assert float(tight[3]) == float(tight[5]) == 0.05  # the bound, and the smooth gap
    assert all(float(row[-1]) < 1e-3 for row in price_rows(done.stdout))
    assert "trainings; multiplier / (2 bound) = " in done.stdout
    assert is_picture(tmp_path / "fair_classifier.png")


# The network of bounded spectral norm.


@pytest.fixture(scope="module")
def images() -> spectral.Images:
    return spectral.load("digits", 200, None, 0)


SMALL = spectral.Settings(bound=1.0, units=8, epochs=1, evaluations=400, seed=0)


def test_the_parametrization_makes_the_norm_equal_to_the_bound(images: spectral.Images) -> None:
    model = spectral.parametrized(spectral.make_network(images, 8, 0), 1.5)
    for _ in range(300):  # of its power iterations, two in each call
        model(images.train_x[:1])
    model.eval()
    norms = spectral.Trained("", model, 0, 0.0, {}).norms
    assert norms == pytest.approx([1.5] * 3, rel=1e-4)


def test_no_change_within_the_certified_radius_changes_an_answer(images: spectral.Images) -> None:
    trained = spectral.train_full("", images, SMALL, [1.5] * 3, 200)
    radii = spectral.measure(trained, images).radii
    x = images.test_x.clone().requires_grad_()
    outputs = trained.model(x)
    first, second = outputs.topk(2, dim=1).values.unbind(1)
    steepest = torch.autograd.grad((first - second).sum(), x)[0]
    moves = nn.functional.normalize(steepest, dim=1) * radii[:, None]
    certain = radii > 0
    answers = trained.model((images.test_x - moves)[certain]).argmax(1)
    assert certain.sum() > 100
    assert torch.equal(answers, images.test_y[certain])


def test_multipliers_are_prices_of_spectral_norms(images: spectral.Images) -> None:
    found = spectral.train_full("", images, SMALL, [1.0] * 3, SMALL.evaluations)
    assert max(found.norms) < 1.02
    sums = [y.sum().item() for y in found.multipliers.values()]
    # A factor can move from layer to layer, so all bounds have one price.
    assert min(sums) > 0.0 and max(sums) < 1.1 * min(sums)
    assert all((y > 0).sum() > 1 for y in found.multipliers.values())
    price, *_ = spectral.check_prices(images, SMALL, found)
    assert price.multiplier > 0.0 and price.error < 0.05


@pytest.mark.slow
def test_the_spectral_norm_bound(tmp_path: Path) -> None:
    done = run_example("--quick", cwd=tmp_path, script="spectral_norm_bound.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "network 64-10-10-10; spectral norms up to 1" in lines[0]
    free, *_, adam, lbfgs = (line.split() for line in lines[3:8])
    # The products of norms.
    assert float(free[2]) > 2.0
    assert float(adam[2]) < 1.2 and float(lbfgs[2]) < 1.1
    rows = price_rows(done.stdout)
    assert len(rows) == 3 and all(float(row[-1]) < 0.2 for row in rows)
    assert is_picture(tmp_path / "spectral_norm_bound.png")


# The constrained fit.


@pytest.fixture(scope="module")
def known() -> fitting.Known:
    return fitting.Known(0.0, 0.0, 0.8, torch.zeros(20, dtype=DTYPE))


def task(model: fitting.Curve, decay: float) -> fitting.Task:
    return fitting.make_task(model, 24, 0.1, decay, 0)


def slopes_by_differences(model: fitting.Curve, x: Tensor) -> Tensor:
    h = 1e-6
    return (model(x + h) - model(x - h)) / (2 * h)


@pytest.mark.parametrize("model", [fitting.Polynomial(6), fitting.Network(5, 0)])
def test_slopes_are_derivatives(model: fitting.Curve) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.linspace(0.1, 0.9, 7, dtype=DTYPE)
    torch.testing.assert_close(model.slope(x), slopes_by_differences(model, x), rtol=0, atol=1e-7)


def test_the_polynomial_is_the_one_of_chebyshev() -> None:
    model = fitting.Polynomial(4)
    with torch.no_grad():
        model.coefficients.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25]))
    x = torch.linspace(0.0, 1.0, 9, dtype=DTYPE)
    expected = np.polynomial.chebyshev.Chebyshev(model.coefficients.detach(), domain=[0, 1])
    torch.testing.assert_close(model(x).detach(), torch.from_numpy(expected(x.numpy())))


def test_the_flow_is_the_mean_velocity() -> None:
    nodes, weights = fitting.quadrature()
    assert (weights @ fitting.truth(nodes)).item() == pytest.approx(0.8, abs=1e-14)


@pytest.mark.parametrize("inner", [LBFGS, BFGS])
def test_the_fit_is_feasible_to_rounding_error(inner: type, known: fitting.Known) -> None:
    job = task(fitting.Polynomial(11), 0.0)
    found = fitting.fit(job, known, "", fitting.constrain(inner))
    assert found.violation < 1e-10
    assert found.report.largest < 1e-7
    free = fitting.fit(job, known, "", fitting.penalize)
    assert free.loss < found.loss and free.violation > 1.0
    compromise = fitting.fit(job, known, "", fitting.penalize, 1e2)
    assert free.loss < compromise.loss < found.loss
    assert compromise.violation > 1e-3 and compromise.evaluations > 3 * found.evaluations


def test_multipliers_are_prices_of_knowledge(known: fitting.Known) -> None:
    job = task(fitting.Polynomial(11), 0.0)
    found = fitting.fit(job, known, "", fitting.constrain(BFGS))
    checked = fitting.prices(job, known, found)
    assert [p.name for p in checked[:3]] == ["wall", "middle", "flow"]
    assert len(checked) == 5 and all(p.name.startswith("fall at") for p in checked[3:])
    assert all(p.error < 1e-4 for p in checked)
    # A constraint with slack costs nothing.
    idle = [i for i in range(20) if i not in fitting.active(found)]
    assert found.multipliers["fall"][idle].abs().max() < 1e-6
    # The flow meter that fits the measurements best has no price.
    best = fitting.fit(job, replace(known, flow=0.745), "", fitting.constrain(BFGS))
    assert abs(best.multipliers["flow"].item()) < abs(found.multipliers["flow"].item())


def test_the_constrained_fit(tmp_path: Path) -> None:
    done = run_example("--penalties", "1e2", cwd=tmp_path, script="constrained_fit.py")
    assert done.returncode == 0, done.stderr
    assert "3 equalities, 40 inequalities" in done.stdout
    assert "KKTReport: all conditions hold" in done.stdout
    rows = price_rows(done.stdout)
    assert len(rows) == 5 and all(float(row[-1]) < 1e-4 for row in rows)
    assert is_picture(tmp_path / "constrained_fit.png")


@pytest.mark.slow
def test_the_constrained_fit_of_a_network(known: fitting.Known) -> None:
    found = fitting.fit(task(fitting.Network(4, 0), 1e-3), known, "", fitting.constrain(BFGS))
    assert found.violation < 1e-8
    assert found.report.largest < 1e-6


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (fair, ["--bounds", "0.1,0"], "0 is not a positive number"),
        (fair, ["--rate", "calibration"], "invalid choice: 'calibration'"),
        (spectral, ["--bound", "-1"], "-1 is not a positive number"),
        (spectral, ["--out", "picture"], "picture does not end in .png"),
        (fitting, ["--penalties", "x"], "invalid numbers value: 'x'"),
        (fitting, ["--noise", "0"], "0 is not a positive number"),
    ],
)
def test_bad_arguments(
    module: object,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["example.py", *arguments])
    with pytest.raises(SystemExit):
        module.parse_arguments()  # type: ignore[attr-defined]
    assert message in capsys.readouterr().err
