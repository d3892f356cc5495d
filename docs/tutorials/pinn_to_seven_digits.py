"""# A physics-informed network to seven digits

Networks that solve differential equations are often trained with Adam, and stay at an error of a
percent or more. The loss is badly conditioned, not the network too small. Here a network of 129
parameters solves Poisson's equation on the unit square, $u_{xx} + u_{yy} = f$ with $u = 0$ on the
boundary. The source $f$ is chosen such that the solution is known: $u = \\sin(\\pi x) \\sin(\\pi
y)$.

This page was made by its script while the site was built, on one thread.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

from torch_secondorder import LBFGS, LevenbergMarquardt

torch.set_default_dtype(torch.float64)

# %%
# ## The equation
#
# The residual is evaluated at 400 points inside and 88 on the boundary. Use float64: with float32,
# rounding ends the descent early, whatever the optimizer is.

line = torch.linspace(0, 1, 22)
zero, one = torch.zeros_like(line), torch.ones_like(line)
inside = torch.cartesian_prod(line[1:-1], line[1:-1])
edges = [(line, zero), (line, one), (zero, line), (one, line)]
boundary = torch.cat([torch.stack(edge, dim=1) for edge in edges])


def solution(points):
    return (math.pi * points).sin().prod(dim=1, keepdim=True)


source = -2 * math.pi**2 * solution(inside)


def laplacian(network, points):
    points = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(points).sum(), points, create_graph=True)
    columns = [
        torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)[0][:, i : i + 1]
        for i in range(2)
    ]
    return columns[0] + columns[1]


def loss_of(network):
    on_boundary = network(boundary)
    equation = mse_loss(laplacian(network, inside), source)
    return equation + mse_loss(on_boundary, torch.zeros_like(on_boundary))


# %%
# ## One loop for all
#
# The closure is the one that `torch.optim.LBFGS` takes. `LevenbergMarquardt` needs the residuals,
# not only their sum of squares. It finds them by itself: `mse_loss` is a sum of squares, and the
# optimizer sees the graph of the loss.

axis = torch.linspace(0, 1, 51)
grid = torch.cartesian_prod(axis, axis)
exact = solution(grid)


def error_of(network):
    with torch.no_grad():
        return ((network(grid) - exact).norm() / exact.norm()).item()


def train(make_optimizer, steps):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = make_optimizer(network.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        return loss

    seconds, errors, start = [], [], time.perf_counter()
    for _ in range(steps):
        optimizer.step(closure)
        seconds.append(time.perf_counter() - start)
        errors.append(error_of(network))
    return network, seconds, errors


runs = {
    "Adam": train(lambda params: torch.optim.Adam(params, lr=5e-3), steps=1000),
    "LBFGS": train(lambda params: LBFGS(params, update="ssbroyden"), steps=60),
    "LevenbergMarquardt": train(LevenbergMarquardt, steps=200),
}

# %%
# ## The result

for name, (_, _, errors) in runs.items():
    print(f"{name:20s} relative L2 error {min(errors):.0e} after {len(errors)} steps")
assert min(runs["LevenbergMarquardt"][2]) < 1e-6 < 1e-2 < min(runs["Adam"][2])

# %%
# The errors against time. A step of `LBFGS` has up to 20 iterations, as in torch.

figure, axes = plt.subplots(figsize=(7, 3.6))
for name, (_, seconds, errors) in runs.items():
    every = max(1, len(errors) // 200)
    axes.semilogy(seconds[::every], errors[::every], label=name)
axes.set_title("Poisson's equation: error against time")
axes.set_xlabel("seconds")
axes.set_ylabel("relative L2 error")
axes.grid(alpha=0.3)
axes.legend()

# %%
# The solution, and what is left to the exact one. It is largest near the boundary.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
network = runs["LevenbergMarquardt"][0]
with torch.no_grad():
    found = network(grid)
for axes, values, title in [(left, found, "solution"), (right, found - exact, "error")]:
    picture = axes.imshow(values.reshape(51, 51).T.numpy(), origin="lower", extent=(0, 1, 0, 1))
    axes.set_title(title)
    figure.colorbar(picture, ax=axes)

# %%
# ## Your own equation
#
# Write the loss as a sum of `mse_loss` terms, or as `residuals.square().mean()`; then
# `LevenbergMarquardt` is the first thing to try up to some ten thousand parameters. Beyond, or if
# the loss is no sum of squares, use `LBFGS(update="ssbroyden")`. The same with more equations and
# a command line: [pinn_poisson.py](../../examples/pinn_poisson.py),
# [pinn_burgers.py](../../examples/pinn_burgers.py) and
# [pinn_convection.py](../../examples/pinn_convection.py).
