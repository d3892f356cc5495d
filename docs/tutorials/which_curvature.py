"""# Which curvature does my network have?

The eigenvalues of the Hessian say how badly a loss is conditioned, whether the point is a minimum,
and how large a learning rate may be. No matrix is needed for that: products with the Hessian
suffice, and each costs about two gradients. This page looks at a small classifier before and after
training.

This page was made by its script while the site was built.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from torch_secondorder import diagnostics

# %%
# ## A classifier
#
# Three classes of points in the plane, as arms of a spiral, and a network of 1,283 parameters.

torch.manual_seed(0)
labels = torch.arange(3).repeat_interleave(100)
radius = torch.linspace(0.1, 1, 100).repeat(3)
angle = 4 * radius + 2.1 * labels + 0.2 * torch.randn(300)
points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

network = nn.Sequential(
    *(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()), nn.Linear(32, 3)
)
loss_fn = nn.CrossEntropyLoss()


def look(title):
    """Prints what the Hessian looks like, and returns its spectrum."""
    problem = diagnostics.from_model(network, loss_fn, [(points, labels)])
    top = diagnostics.eigenpairs(problem, k=3)
    bottom = diagnostics.eigenpairs(problem, k=1, which="smallest", tolerance=1e-2)
    trace = diagnostics.trace(problem)
    with torch.no_grad():
        print(f"{title}: loss {loss_fn(network(points), labels):.3f}")
    print(f"  largest eigenvalues  {[round(value, 2) for value in top.values.tolist()]}")
    print(f"  smallest eigenvalue  {bottom.values.item():.3f}")
    print(f"  trace                {trace.value:.1f} ± {trace.standard_error:.1f}")
    print(f"  products             {top.products + bottom.products + trace.products}")
    return diagnostics.spectral_density(problem, n_vectors=4, n_steps=60)


before = look("before training")

# %%
# A negative eigenvalue means that the point is no minimum: along its eigenvector the loss bends
# downwards. That is usual for a network at its start, and the reason why Newton's method needs a
# safeguard.
#
# ## After training

optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    loss_fn(network(points), labels).backward()
    optimizer.step()
after = look("after training")

# %%
# ## The spectrum
#
# Most eigenvalues are close to zero, and a few are large: about as many as there are classes,
# times a few. Gradient descent is stable up to a learning rate of two over the largest, and at
# that rate directions with an eigenvalue a thousand times smaller hardly move. This is the gap
# that second-order methods close.

figure, axes = plt.subplots(figsize=(7, 3.6))
for spectrum, name in [(before, "before training"), (after, "after training")]:
    spectrum.plot(ax=axes)
    axes.lines[-1].set_label(name)
axes.set_title("Density of the Hessian's eigenvalues")
axes.grid(alpha=0.3)
axes.legend()

# %%
# ## The loss along the sharpest direction
#
# Along the eigenvector of the largest eigenvalue $\lambda$, the loss is close to the parabola $f +
# t\, g^T v + \tfrac{1}{2} \lambda t^2$ for small $t$. How soon the two part tells for how long a
# step the quadratic model can be trusted.

problem = diagnostics.from_model(network, loss_fn, [(points, labels)])
sharpest = diagnostics.eigenpairs(problem, k=1)
direction = sharpest.vectors[:, 0]
start = nn.utils.parameters_to_vector(network.parameters()).detach()
gradient = torch.autograd.grad(loss_fn(network(points), labels), list(network.parameters()))
slope = nn.utils.parameters_to_vector(gradient) @ direction

steps = torch.linspace(-1, 1, 81)
losses = []
with torch.no_grad():
    for step in steps:
        nn.utils.vector_to_parameters(start + step * direction, network.parameters())
        losses.append(loss_fn(network(points), labels).item())
    nn.utils.vector_to_parameters(start, network.parameters())
center = losses[40]
parabola = center + slope * steps + sharpest.values.float() / 2 * steps**2

figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot(steps, losses, label="loss")
axes.plot(steps, parabola, "--", label="quadratic model")
axes.set_title("Along the eigenvector of the largest eigenvalue")
axes.set_xlabel("step")
axes.set_ylabel("loss")
axes.legend()
axes.grid(alpha=0.3)

# %%
# All of this works for a whole data set that does not fit into memory: pass a `DataLoader` in
# place of the list. In Lightning, `CurvatureMonitor` logs it during training. [The
# mathematics](../mathematics/hessian.md) explains the Hessian and the products.
