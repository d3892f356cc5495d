"""# Fitting a network to high precision: L-BFGS beside Adam

If the loss is the same function in every step, because all the data fit into one batch, noise is no
reason for small steps. Then a quasi-Newton method goes on where Adam has stopped improving. This
page fits a curve with a network of 673 parameters, and gives every method 1,000
evaluations of the loss.

This page was made by its script while the site was built.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import torch_secondorder

torch.set_default_dtype(torch.float64)

x = torch.linspace(-1, 1, 200).unsqueeze(1)
y = torch.sin(6 * x) * torch.exp(-(x**2)) + 0.3 * torch.tanh(10 * x)

# %%
# ## The same closure for each
#
# The closure counts how often it runs. That is the fair measure: a step of Adam evaluates the loss
# once, a step of an L-BFGS some 25 times.


def train(make_optimizer, evaluations=1000):
    torch.manual_seed(0)
    hidden = nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()
    network = nn.Sequential(*hidden, nn.Linear(24, 1))
    optimizer = make_optimizer(network.parameters())
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    while len(losses) < evaluations:
        optimizer.step(closure)
    return network, losses[:evaluations], optimizer


def torch_lbfgs(params):
    # With its default tolerances it stops at a loss of about 2e-5, without a word.
    return torch.optim.LBFGS(
        params, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )


runs = {
    "Adam": train(lambda params: torch.optim.Adam(params, lr=3e-3)),
    "torch.optim.LBFGS": train(torch_lbfgs),
    "LBFGS": train(torch_secondorder.LBFGS),
    'LBFGS(update="ssbroyden")': train(
        lambda params: torch_secondorder.LBFGS(params, update="ssbroyden")
    ),
    'BFGS(update="ssbroyden")': train(
        lambda params: torch_secondorder.BFGS(params, update="ssbroyden")
    ),
}
for name, (_, losses, _) in runs.items():
    print(f"{name:26s} {min(losses):.1e}")
assert min(runs["LBFGS"][1]) < 1e-2 * min(runs["Adam"][1])

# %%
# ## Loss against evaluations

figure, axes = plt.subplots(figsize=(7, 3.8))
for name, (_, losses, _) in runs.items():
    best = torch.tensor(losses).cummin(0).values
    axes.semilogy(range(1, 1001, 5), best[::5], label=name)
axes.set_title("Best loss so far")
axes.set_xlabel("evaluations of the closure")
axes.set_ylabel("mean squared error")
axes.grid(alpha=0.3)
axes.legend(loc="upper right")

# %%
# The self-scaled update pays in long runs, and `BFGS` keeps a whole matrix, which is affordable up
# to some ten thousand parameters. [Choosing an optimizer](../choosing.md) has the cases in which
# Adam is the right choice: above all, mini-batches.
#
# ## What the fit looks like
#
# In the picture both curves look alike. The difference is in the residual.

figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True)
above.plot(x[:, 0], y[:, 0], color="black", label="data")
for name, style in [("Adam", "C0"), ('LBFGS(update="ssbroyden")', "C3")]:
    with torch.no_grad():
        fit = runs[name][0](x)
    above.plot(x[:, 0], fit[:, 0], style, linestyle="--", label=name)
    below.semilogy(x[:, 0], (fit - y)[:, 0].abs() + 1e-16, style)
above.set_title("Fit and residual")
above.legend(loc="upper left")
below.set_ylabel("|residual|")
below.set_xlabel("x")

# %%
# ## What a step reports
#
# Every step says how it ended. Log it: the number of evaluations, the length of the step and the
# gradient tell at once whether a run still makes progress.

print(runs["LBFGS"][2].info)
