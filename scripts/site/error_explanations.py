"""Causes and fixes of messages that need more than the message itself says."""

#: Explanations by a part of the message.
EXPLANATIONS = {
    # Arguments
    "the closure must be callable": "Pass the function itself, without parentheses after it.",
    "must be one of <listed>": "The argument takes one of the names listed, spelled exactly so.",
    "must be <allowed>, got <type>": "Where a function is expected, pass the "
    "function itself, without parentheses after it.",
    "must be a finite number above <least>, got": "A number of zero or below, infinite or NaN was "
    "given. A learning rate schedule that reaches zero exactly has the same effect where zero is "
    "excluded.",
    "elements, <gib><also>, and <gib> are free": "The method would keep a matrix or a Jacobian "
    "that does not fit into memory. The end of the message names the option, or the method that "
    "needs products or a limited history only.",
    # Compilation and CUDA graphs
    "goes with the backend 'inductor' only": "Leave `backend` out of `compile`, or `mode` out of "
    "the call: other backends have no modes. See [Compiled objectives](compiled.md).",
    "pass either mode=<mode> or compile=": "The mode stands in both. Keep one of them.",
    "run without CUDA graphs": "Training goes on as usual. The reason names what keeps the step "
    "from being recorded, often an `item()` in the closure. See [GPUs](gpu.md#cuda-graphs).",
    # Parameters
    "there is no parameter to optimize": "Often `model.parameters()` was a generator that had been "
    "consumed before: call `model.parameters()` again, or make a list of it.",
    "is not initialized yet": "A lazy module gets its shapes in the first forward pass.",
    "does not broadcast to <place>": "A bound has to have the shape of the parameter, or one "
    "that broadcasts to it; bounds of single parameters of a group are a list.",
    "optimizer is what trains the model": "A wrapper takes an optimizer that exists already, not "
    "its class.",
    # Closures
    "the closure must return the loss, got": "The closure has no `return`, returns `loss.item()`, "
    "or returns a pair. Return the loss as a tensor, after `loss.backward()`. See "
    "[The closure contract](closure_contract.md).",
    "the closure must return a real scalar loss": "The loss has one entry for each sample, or is "
    'complex. Leave `reduction="none"` out, or end with `.mean()` or `.sum()`.',
    "no gradient reached any of the optimizer's parameters: the closure must": "Common causes: "
    "the optimizer was made before `model` was replaced or moved by a copy; the loss was computed "
    "under `torch.no_grad()` or from `.detach()`ed outputs; `loss.backward()` is missing; all "
    "parameters have `requires_grad=False`.",
    "the closure made gradients without loss.backward()": "An optimizer that needs curvature sees "
    "the call of `loss.backward()` inside the closure, and no other way to gradients.",
    "evaluates the loss more than once and needs a closure": "`optimizer.step()` was called as "
    "for Adam. Put the forward pass and `loss.backward()` into a closure, and pass it to `step`. "
    "[Mini-batches and loops without closures](without_closures.md) has the optimizers that need "
    "none.",
    "the closure adds to gradients from before this step, and curvature": "`zero_grad()` is "
    "missing in the closure, or gradients of several micro-batches are accumulated around it.",
    "this evaluation belongs to an earlier point": "Operators such as `Hessian` multiply at the "
    "point of their evaluation. After a step, evaluate again and make a new operator.",
    # Second derivatives
    "an operation inside the closure has no second derivative: <operation>. Use": "Curvature is "
    "made by differentiating the gradient. Some fused kernels and many custom "
    "`torch.autograd.Function`s have no derivative of their backward pass. The message names the "
    "operation.",
    "a module compiled by torch.compile has no second derivative": "See "
    "[Compiled objectives](compiled.md).",
    "the input of a linear layer was changed in place since": "An operation such as `x += 1` or "
    "`relu(x, inplace=True)` has overwritten what the layer took. Write it out of place.",
    "the closure moves parameters that its graph has saved": "The closure changes parameters "
    "itself, for instance by weight clipping, after the forward pass. Do that between steps.",
    # Loops without closures
    "no gradient reached any of the optimizer's parameters: without a closure": "`step()` was "
    "called before `loss.backward()`, after `zero_grad()`, or with gradients of other parameters.",
    "was called by a GradScaler": "Train in bfloat16: it has the range of float32, and needs no "
    "scaler.",
    # Outputs and residuals
    "no model output was found that the loss depends on": "The loss is none of `torch.nn` and "
    "`torch.nn.functional`, or it was computed outside of the closure. Mark the outputs with "
    "`mark_outputs`. See [PINNs and residuals](residuals.md).",
    "the loss shows no residuals": "`LevenbergMarquardt` needs the single residuals, not their sum "
    "of squares. See [PINNs and residuals](residuals.md).",
    "this operator multiplies shapes": "Operators work on flat vectors, all parameters one after "
    "the other, or on matrices with such vectors as columns.",
    "takes a vector of shape (<size>,)": "The vector has to have one entry for each residual or "
    "parameter; the shape is in the message.",
    "in none of the residuals, and more than a penalty": "Mark the residuals of every term of the "
    "loss that is a sum of squares.",
    # Globalization
    "gain ratios need 0 < poor < good": "The gain ratio is the actual over the predicted decrease: "
    "below `poor` damping grows, above `good` it shrinks.",
    "gain ratios need 0 <= accept < poor": "The gain ratio is the actual over the predicted "
    "decrease: steps above `accept` are taken, the radius shrinks below `poor` and grows above "
    "`good`.",
    # Solvers
    "the preconditioner is not positive definite": "Conjugate gradients and MINRES need a "
    "symmetric positive definite preconditioner. Check your own for symmetry and sign; an "
    "approximation of an inverse Hessian may need damping.",
    "the preconditioner returned numbers that are not finite": "Check your preconditioner for "
    "divisions by zero; a small damping on its diagonal is the usual remedy.",
    "the preconditioner must return a tensor of shape": "The preconditioner is a function of a "
    "flat vector and returns one of the same shape.",
    "a Kronecker factor or the diagonal was not finite": "Activations or gradients overflowed. "
    "`NewtonCG` goes on without the preconditioner; if you call it yourself, evaluate where the "
    "loss is finite, or in a wider dtype.",
    "the diagonal was not finite": "Gradients overflowed. `NewtonCG` goes on without the "
    "preconditioner; if you call it yourself, evaluate where the loss is finite.",
    "a product of the Nystrom sketch was not finite": "Products with the operator overflow or have "
    "no value at this point. `NewtonCG` goes on without the preconditioner; if you call it "
    "yourself, evaluate elsewhere, or in float64.",
    "b must be finite, but its norm is": "The right-hand side, often a gradient, has an infinite "
    "or NaN entry, or its norm overflows: compute it where the loss is finite, or scale it.",
    "x0 must be finite": "The start of the solver has an infinite or NaN entry.",
    "the product in step <number>": "The operator returned an infinite or NaN entry. Evaluate it "
    "where the loss has a second derivative, or in float64.",
    "start must be finite and not zero": "Leave `start` out for a random one.",
    "start must have shape": "The start is a flat vector with an entry for each parameter.",
    "the preconditioner is of size": "Preconditioner and operator were made for different "
    "parameters.",
    # Data sets
    "the loader gave other batches than before in the same step": "See "
    "[Whole data sets](datasets.md).",
    # Constraints
    "the gradient of the loss is not finite here": "The conditions of Karush, Kuhn and Tucker are "
    "about gradients, which have no value here: certify another point, or keep logarithms and "
    "roots away from zero with a `clamp()`.",
    "of the constraint <name> is not finite here": "The constraint has no value or no derivative "
    "at this point: keep roots, norms and logarithms away from zero with a `clamp()`.",
    "the loss is <loss> here, and nothing can be said about it": "Certify a point at which the "
    "loss is finite.",
    "is a set of tensors, got": "Give the set a tensor to project or to measure.",
    "is a set of floating-point tensors": "Convert the tensor, for instance with `.float()`.",
    "Orthogonal is a set of matrices": "Give `Orthogonal` to parameters of two or more dimensions.",
    "has no empty tensor": "The tensor has a dimension of length zero: leave it out.",
    "a Box needs a lower or an upper bound": "Pass `low`, `high` or both.",
    "a bound of shape <shape> does not broadcast to a tensor": "Give a number, or a tensor of the "
    "parameter's shape.",
    "has two sets": "Each parameter has one set. For the intersection of two, keep one by "
    "`Constrained`.",
    # Penalties
    "the encoder is the module inside the model": "Pass the submodule, as in "
    "`Contractive(optimizer, model.encoder)`.",
    # minimize and relatives
    "lb and ub of <name> have shapes": "Give bounds of one shape, or numbers.",
    "x0 has <number> entries, and bounds has": "Give one pair (min, max) for each entry of `x0`.",
    "returns values of shape <shape>, to which its bounds": "The bounds of a constraint are "
    "numbers, or have the shape of its values.",
    "returned a gradient of shape": "The gradient has to have the shape and the dtype of `x0`.",
    "returned a gradient <its>, but x0 is": "The gradient has to be a tree like `x0`.",
    "ydata has no entries": "Pass at least as many data as `f` has parameters.",
    "is no option of minimize": "The message says what takes the place of the option of SciPy.",
    "is no option of least_squares": "The message says what takes the place of the option of "
    "SciPy.",
    "curve_fit has no argument": "The message says what takes the place of the argument of SciPy.",
    "<name> has no entries": "Pass a start with at least one number.",
    "fun returned no residuals": "Return at least one residual, as a tensor of one dimension.",
    "the fit has not converged": "SciPy's `curve_fit` raises the same. Start closer, raise "
    "`max_nfev`, or scale the parameters to similar sizes.",
    "the covariance of the parameters could not be estimated": "The Jacobian at the solution has "
    "less than full rank, or there are as many parameters as data: the data do not determine all "
    "parameters. Fix some, or measure where they matter.",
    "sigma is not a positive definite covariance matrix": "A matrix `sigma` is a covariance: "
    "symmetric with positive eigenvalues. Standard deviations are a vector.",
    "A of <name> must be a matrix": "`A` of a linear constraint is an array of numbers, one row "
    "for each constraint.",
    # Linear least squares
    "<name> has entries that are not finite": "Remove or replace rows with infinite or NaN "
    "entries.",
    # Functions
    "is a tree <structure>, but what it multiplies is": "A vector for a Hessian or Jacobian "
    "product has the same structure as what it multiplies: the same dict keys or list lengths.",
    "but has to be <shape> <dtype>": "A vector for a Hessian or Jacobian product has the shapes "
    "and dtypes of what it multiplies.",
    "which has no derivatives": "Functions have to return real floating-point tensors.",
    "x or f(x) has no entries": "Check derivatives at a point with at least one entry.",
    # Diagnostics
    "directions must have shape": "Give one flat vector, or a matrix with one in each column.",
    "directions must be finite and not zero": "A direction of zeros or with NaN has no curvature.",
    "expected a vector of shape": "Vectors are flat, all parameters one after the other.",
    "the loss is <loss> here, and has no curvature": "Look at the model where the loss is finite: "
    "at the start, or before the run diverged.",
    "the loss is <value> here, but its gradient is not finite": "A norm or a root at zero has no "
    "derivative: add a small number inside of it.",
    "direction must be finite": "The direction has an infinite or NaN entry.",
    "subspace must be at least": "Raise `subspace`, or leave it out.",
    "the observed information is not positive definite: it has a curvature": "Train to a minimum "
    "of the negative log-likelihood first: its gradient has to be near zero. "
    "[Curvature diagnostics](diagnostics.md) shows how to look.",
    "the outputs at the other point have other shapes": "The number of residuals must not depend "
    "on the parameters.",
    "no curvature before step": "`CurvatureMonitor` skips a measurement that fails and trains on; "
    "the rest of the message is the error.",
    # Trainers
    "cannot train with these settings": "Each line after it names a setting of the Trainer that "
    "hides closure, graph or parameters from the optimizer, with what to set in its place. See "
    "[Trainers](trainers.md).",
    "is not a LightningModule": "Pass the module that the Trainer fits.",
    "training_step returned no loss": "Return the loss, or a dict with the entry `loss`.",
    "has no module <name> to penalize": "Give the name that `named_modules()` has for the "
    "submodule.",
    # Several processes
    "curvature of one's own is made from a retained graph": "See [DDP and FSDP2](distributed.md).",
    # Checkpoints
    "this is no state of": "The checkpoint was saved from another optimizer class. Make the "
    "optimizer that it was saved from, or start with a fresh state.",
    "this history is of vectors of length": "The checkpoint is of a model of another size, or "
    "other parameters were frozen when it was saved.",
    "this inverse Hessian is of vectors of length": "The checkpoint is of a model of another "
    "size, or other parameters were frozen when it was saved.",
    # Reports
    "an OptimizeResult has no <name>": "The fields are listed in the message. Fields such as "
    "`hess_inv` belong to methods that have them.",
    # Renamed
    "is internal and will be gone": "Copy the function into your code if you need it.",
}
