"""The Jacobian of residuals by the parameters, and the kernel `JJ'`, in gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap

from torch_secondorder import ClosureObjective

from .harness import alternate, load_ours, progress, say
from .networks import Case as Classifier
from .networks import mlp
from .registry import Options
from .report import Report, Table, number, seconds
from .residual_cases import Case, cases

Dense = Callable[[], Tensor]

# Ways that take a pass for each row are timed on so many, and the time is multiplied.
ROWS = 64
# Columns at once in `jacfwd`, and most columns for which it is tried.
COLUMNS, MOST_COLUMNS = 64, 300
BASE = "vmap(jacrev)"
OURS, FROM_GRAPH = "ours", "ours, graph given"


def evaluator(closure: Callable[[], Tensor], params: list[nn.Parameter]) -> Callable[[], Any]:
    """Makes evaluations that keep their graph, as an optimizer does.

    What is learned about the graph is kept from one evaluation to the next.
    """
    return partial(ClosureObjective(closure, params).evaluate, curvature="jacobian")


def by_samples(case: Case) -> Tensor:
    """`vmap(jacrev)` over the samples of each term."""
    parameters, found = case.detached(), []
    for term in case.terms:
        rows = vmap(jacrev(partial(case.sample, term)), (None, 0))(parameters, term.inputs)
        found.append(case.columns(rows))
    return torch.cat(found)


def _chosen(case: Case) -> list[int]:
    """The rows that are timed where each takes a pass, spread over all."""
    count = min(ROWS, case.rows)
    return [place * case.rows // count for place in range(count)]


def _reverse(case: Case, rows: list[int]) -> Tensor:
    """`jacrev` of all residuals at once."""
    return case.columns(jacrev(lambda parameters: case.every(parameters)[rows])(case.detached()))


def _forward(case: Case) -> Tensor:
    """`jacfwd`, some columns at a time, as it has no limit of its own."""
    names = [name for name, _ in case.model.named_parameters()]

    def every(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in case.params])
        parts = (piece.view_as(p) for piece, p in zip(pieces, case.params, strict=True))
        return case.every(dict(zip(names, parts, strict=True)))

    flat = torch.cat([p.reshape(-1) for p in case.detached().values()])
    identity = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)

    def column(v: Tensor) -> Tensor:
        result: Tensor = jvp(every, (flat,), (v,))[1]
        return result

    result: Tensor = vmap(column, chunk_size=COLUMNS)(identity)
    return result.T


def flat_residuals(case: Case) -> Tensor:
    """All scaled residuals with their graph, shape `(N,)`."""
    pairs = zip(case.terms, case.residuals(), strict=True)
    return torch.cat([(term.scale * r).reshape(-1) for term, r in pairs])


def _batched(case: Case, residuals: Tensor, rows: list[int]) -> Tensor:
    cotangents = torch.eye(case.rows, dtype=residuals.dtype, device=residuals.device)[rows]
    found = torch.autograd.grad(
        residuals, case.params, cotangents, retain_graph=True, is_grads_batched=True
    )
    return torch.cat([g.reshape(len(rows), -1) for g in found], dim=1)


def _passes(case: Case, residuals: Tensor, rows: list[int]) -> Tensor:
    """One backward pass for each row."""
    made = []
    for row in rows:
        found = torch.autograd.grad(
            residuals[row], case.params, retain_graph=True, allow_unused=True
        )
        pairs = zip(found, case.params, strict=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        made.append(torch.cat([g.reshape(-1) for g in parts]))
    return torch.stack(made)


def _agree(name: str, found: Tensor, exact: Tensor, most: float = 1e-9) -> None:
    difference = ((found - exact).norm() / exact.norm()).item()
    if not difference <= most:
        raise AssertionError(f"{name}: the Jacobian differs by {difference:.1e}")


def _candidates(case: Case, jacobian: Any) -> tuple[dict[str, Dense], dict[str, float]]:
    """The ways to the Jacobian, and for some what their time is multiplied by."""
    rows = _chosen(case)
    residuals = flat_residuals(case)
    whole: dict[str, Dense] = {BASE: partial(by_samples, case)}
    if jacobian is not None:
        evaluate = evaluator(case.closure, case.params)
        evaluation = evaluate()
        whole[OURS] = lambda: jacobian(evaluate()).dense()
        whole[FROM_GRAPH] = lambda: jacobian(evaluation).dense()
    if case.size <= MOST_COLUMNS:
        whole["jacfwd"] = partial(_forward, case)
    by_row: dict[str, Dense] = {
        "jacrev": partial(_reverse, case, rows),
        "is_grads_batched": partial(_batched, case, residuals, rows),
        "backward passes": partial(_passes, case, residuals, rows),
    }
    exact = whole[BASE]()
    for name, call in whole.items():
        _agree(f"{case.name}, {name}", call(), exact)
    for name, call in by_row.items():
        _agree(f"{case.name}, {name}", call(), exact[rows])
    return whole | by_row, dict.fromkeys(by_row, case.rows / len(rows))


def run_jacobian(options: Options, report: Report) -> None:
    """Every way to the Jacobian of each network."""
    jacobian = load_ours("torch_secondorder.curvature", "ResidualJacobian")
    names = [OURS, FROM_GRAPH, BASE, "jacfwd", "jacrev", "is_grads_batched", "backward passes"]
    table = Table(
        "The Jacobian of all residuals, in gradients", ["network", "N x n", "gradient", *names]
    )
    bars = {}
    for case in progress(cases(options.device, options.quick), "Jacobians"):
        calls, factors = _candidates(case, jacobian)
        timings = alternate({"gradient": case.gradient, **calls}, options.repeat, options.device)
        unit = timings["gradient"].median
        costs = {n: factors.get(n, 1.0) * timings[n].median / unit for n in calls}
        cells = [number(costs[name]) if name in costs else "-" for name in names]
        table.add(case.name, f"{case.rows:,} x {case.size:,}", seconds(unit), *cells)
        found: dict[str, Any] = {"rows": case.rows, "size": case.size, "gradients": costs}
        if jacobian is not None:
            made = jacobian(evaluator(case.closure, case.params)())
            found |= {"method": made.method, "reason": made.reason}
            bars[case.name] = made.method, made.reason, costs
        report.record(f"residuals.jacobian.{case.name}", found)
    report.show(table)
    say(f"jacrev, is_grads_batched, backward passes: time of {ROWS} rows, times N / {ROWS}")
    for name, (method, reason, costs) in bars.items():
        why = f" ({reason})" if reason else ""
        shares = " and ".join(number(costs[way] / costs[BASE]) for way in (FROM_GRAPH, OURS))
        parts = " and ".join(number(costs[way]) for way in (FROM_GRAPH, OURS))
        say(
            f"{name}: from the graph and with the evaluation {parts} gradients, "
            f"{shares} of {BASE}, by {method}{why}"
        )


def _kernel_by_jacobian(case: Classifier, root: Tensor) -> Tensor:
    """`JJ'` of the cross-entropy's residuals from the outputs' Jacobian, layer by layer."""
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    jacobian = vmap(jacrev(lambda p, x: functional_call(case.model, p, (x[None],))[0]), (None, 0))(
        parameters, case.inputs
    )
    total: Tensor | float = 0.0
    for part in jacobian.values():
        rows = torch.einsum("nkc,nkp->ncp", root, part.flatten(2)).flatten(0, 1)
        total = total + rows @ rows.T
    assert isinstance(total, Tensor)
    return total


def _root(case: Classifier) -> Tensor:
    """The symmetric root of the cross-entropy's curvature by the outputs, `(n, 10, 10)`."""
    with torch.no_grad():
        root = case.model(case.inputs).softmax(1).sqrt()
    identity = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    projected = identity - root[:, :, None] * root[:, None, :]
    result: Tensor = root[:, :, None] * projected / math.sqrt(len(root))
    return result


def _closure(case: Classifier) -> Tensor:
    for p in case.params:
        p.grad = None
    loss = case.value()
    loss.backward()
    return loss


def run_kernel(options: Options, report: Report) -> None:
    """The kernel `JJ'` of a classifier that is far too large for a Jacobian."""
    jacobian = load_ours("torch_secondorder.curvature", "ResidualJacobian")
    if jacobian is None:
        return
    batch, most = (16, 16) if options.quick else (256, 64)
    case = mlp(options.device, batch=batch)
    evaluate = evaluator(partial(_closure, case), case.params)
    evaluation = evaluate()

    calls: dict[str, Callable[[], object]] = {
        "gradient": partial(_closure, case),
        OURS: lambda: jacobian(evaluate()).kernel(),
        FROM_GRAPH: lambda: jacobian(evaluation).kernel(),
    }
    timings = alternate(calls, options.repeat, options.device)
    made = jacobian(evaluation)
    # The outputs' Jacobian takes 5 GB, so the peer has fewer samples; its cost grows with them.
    fewer = mlp(options.device, batch=most)
    peer = alternate(
        {
            "gradient": partial(_closure, fewer),
            BASE: partial(_kernel_by_jacobian, fewer, _root(fewer)),
        },
        max(1, options.repeat // 2),
        options.device,
        min_seconds=0.0,
    )
    _same_spectrum(fewer, jacobian)
    unit = timings["gradient"].median
    costs = {name: timings[name].median / unit for name in (OURS, FROM_GRAPH)}
    costs[f"{BASE}, batch {most}"] = peer[BASE].median / peer["gradient"].median
    table = Table(
        f"The kernel JJ' of {case.name}, batch {batch}, {made.rows:,} rows, cross-entropy",
        ["way", "gradients"],
    )
    table.add(f"a gradient takes {seconds(unit)}", 1)
    for name, cost in costs.items():
        table.add(name, number(cost))
    report.show(table)
    report.record(
        "residuals.kernel",
        {"rows": made.rows, "size": made.size, "method": made.method, "gradients": costs},
    )


def _same_spectrum(case: Classifier, jacobian: Any) -> None:
    """Compares eigenvalues, as roots of the same curvature give other residuals."""
    mine = jacobian(evaluator(partial(_closure, case), case.params)()).kernel().double()
    other = _kernel_by_jacobian(case, _root(case)).double()
    # Equal eigenvalues: the trace, and that of the square.
    for measure in (torch.trace, torch.linalg.matrix_norm):
        _agree("the kernel", measure(mine), measure(other), 1e-4)
