"""What holds no number on the host runs on tensors that have none.

Under `FakeTensorMode` tensors have shape, dtype and device, but no memory: reading a number raises,
and so does an operation on tensors of two devices. Backward passes of fake tensors need a device
that is there, so these tests run on a GPU or on the test device. The simulated `cuda` of
`test_host_reads.py` counts the reads of the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import functional as F

from tests.support import device_backend
from torch_secondorder import (
    KFAC,
    LBFGS,
    SOAP,
    AdaHessian,
    FunctionalObjective,
    Shampoo,
    Sophia,
    func,
    penalties,
)
from torch_secondorder._optim.diagonal import blocks
from torch_secondorder._optim.diagonal.update import FiniteCheck
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.constraints import Box, NormBall, Simplex, UnitNorm
from torch_secondorder.curvature import (
    Damped,
    Diagonal,
    Fisher,
    GaussNewton,
    GaussNewtonBartlett,
    Hessian,
    Hutchinson,
    InverseBFGS,
)
from torch_secondorder.solvers import NystromApproximation
from torch_secondorder.solvers.lanczos import orthogonalized, three_terms
from torch_secondorder.solvers.preconditioners import _NystromInverse

# Whether gradients are still where a step has put them is told by their addresses.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module")
def fake_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    try:
        return device_backend.load()
    except device_backend.Unavailable as unavailable:
        pytest.skip(f"neither a GPU nor a test device: {unavailable}")


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):  # a constant of the host may be real
        yield


class Model:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.net = nn.Sequential(nn.Linear(4, 5, device=device), nn.Tanh())
        self.net.append(nn.Linear(5, 3, device=device))
        self.params = list(self.net.parameters())
        self.x = torch.randn(6, 4, device=device)
        self.y = torch.zeros(6, dtype=torch.long, device=device)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    def evaluation(self) -> Any:
        names = [name for name, _ in self.net.named_parameters()]

        def function(params: list[Tensor]) -> Tensor:
            named = dict(zip(names, params, strict=True))
            return F.cross_entropy(torch.func.functional_call(self.net, named, self.x), self.y)

        self.objective = FunctionalObjective(function, self.params)
        return self.objective.evaluate(curvature=True)

    def vector(self) -> Tensor:
        return torch.randn(sum(p.numel() for p in self.params), device=self.device)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device)


UPDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaHessian": (AdaHessian, {}),
    "AdaHessian, labels": (AdaHessian, {"estimator": "gnb", "update_period": 2}),
    "Sophia": (Sophia, {}),
    "Sophia, Hutchinson": (Sophia, {"estimator": "hutchinson", "update_period": 2}),
    "SOAP": (SOAP, {"update_period": 2}),
    "Shampoo": (Shampoo, {"update_period": 2}),
    "Shampoo, Newton": (Shampoo, {"root_method": "newton", "update_period": 9}),
    "KFAC": (KFAC, {"update_period": 2}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name: str, fake_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first step looks at its counts, the second whether the first has moved anything.
    of_count = lambda x: 0.0 if isinstance(x, Tensor) else float(x)  # noqa: E731
    monkeypatch.setattr(blocks, "float", of_count, raising=False)
    monkeypatch.setattr(FiniteCheck, "moved", True)
    kind, options = UPDATES[name]
    with_closure = name in ("AdaHessian", "Sophia, Hutchinson", "SOAP", "KFAC")
    model = Model(fake_device)
    optimizer = kind(model.params, weight_decay=0.1, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    for _ in range(3):
        if not with_closure:
            closure()
        optimizer.step(closure if with_closure else None)
    for p in model.params:
        for entry, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.dim():
                assert value.device == fake_device, entry


def parts(model: Model) -> dict[str, Callable[[], Any]]:
    """Computations by name."""
    v, w, x = model.vector(), model.vector(), torch.randn(6, 4, device=model.device)
    several = torch.stack((v, w), 1)

    def products(A: Any) -> Any:
        return [A @ v, A.matmat(several)]

    def history() -> Any:
        H, found = InverseBFGS(len(v), 3, device=model.device), []
        for _ in range(5):
            H.push(v, w, 0.5)
            found.append(H.direction(w))
        return [*found, H.matmat(several)]

    def vector() -> Any:
        flat = ParameterVector(model.params, [1.0, 2.0, 1.0, 0.5])
        position = flat.read()
        flat.write(flat.scaled(position))
        return [position, *flat.split(position)]

    def nystrom() -> Any:
        sketch = NystromApproximation(torch.stack((v, w), 1), torch.ones(2, device=model.device))
        return [sketch @ v, _NystromInverse(sketch, 0.1) @ v]

    hessian = lambda: Hessian(model.evaluation())  # noqa: E731
    gauss_newton = lambda: GaussNewton(model.evaluation())  # noqa: E731
    smooth = lambda a: (a.sin() * a.flip(0)).sum()  # noqa: E731
    return {
        "direction": history,
        "flat vector": vector,
        "Krylov vectors": lambda: [
            three_terms(v, w, w, v.clone(), 0.5),
            orthogonalized(v, several.T),
        ],
        "Nystrom": nystrom,
        "Diagonal": lambda: products(Diagonal(w)),
        "Damped": lambda: products(Damped(Diagonal(w), 0.1)),
        "Hessian": lambda: products(hessian()),
        "Gauss-Newton": lambda: products(gauss_newton()),
        "Fisher": lambda: products(Fisher(model.evaluation(), generator=model.generator())),
        "Hutchinson": lambda: Hutchinson(2)(hessian(), model.generator()),
        "Gauss-Newton-Bartlett": lambda: GaussNewtonBartlett()(
            model.evaluation(), model.generator()
        ),
        "jacobian": lambda: func.jacobian(torch.sin, v[:4]),
        "batch_jacobian": lambda: func.batch_jacobian(model.net, x),
        "module_jacobian": lambda: func.module_jacobian(model.net, x, "parameters"),
        "hvp": lambda: func.hvp(smooth, v, w),
        "vhp": lambda: func.vhp(smooth, v, w),
        "ggnvp": lambda: func.ggnvp(torch.sin, lambda z: z.exp().sum(), v, w),
        "hessian_diagonal": lambda: func.hessian_diagonal(smooth, v[:4]),
        "jacobian penalty": lambda: penalties.jacobian_penalty(model.net, x),
        "jacobian penalty, projections": lambda: penalties.jacobian_penalty(
            model.net, x, "projection", 2, model.generator()
        ),
        "contractive penalty": lambda: penalties.contractive_penalty(model.net[:2], x),
        "contractive penalty, noise": lambda: penalties.contractive_penalty(
            model.net[:2], x, noise=0.1, generator=model.generator()
        ),
        **{
            f"project on {type(s).__name__}": lambda s=s: s.project(x)
            for s in (Box(-1.0, 1.0), NormBall(), Simplex(), UnitNorm(1))
        },
    }


PARTS = list(parts(Model(torch.device("meta"))))


@pytest.mark.parametrize("name", PARTS)
def test_parts(name: str, fake_device: torch.device) -> None:
    model = Model(fake_device)
    results = parts(model)[name]()
    found = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]
    assert found and all(isinstance(t, FakeTensor) for t in found)
    assert {t.device for t in found} == {fake_device}


def test_numbers_cannot_be_read(fake_device: torch.device) -> None:
    """A line search decides on the host."""
    model = Model(fake_device)
    optimizer = LBFGS(model.params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    with pytest.raises(DataDependentOutputException):
        optimizer.step(closure)
