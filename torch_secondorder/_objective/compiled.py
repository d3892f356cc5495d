"""A pure function compiled as a whole: loss and gradient, and products with its curvature.

`torch.compile` makes no second derivatives. Here what the package does without it is written down
operation by operation, once, with the derivatives as operations like all others, and that is
compiled. Of a product, what does not depend on the direction is done once for each point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from torch_secondorder._autograd.graph import Graph, MissingSecondDerivative, Multiply
from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._closure.validation import differentiable, scalar
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._foundation.private_torch import dynamo_error, pytree, traces_autograd
from torch_secondorder._objective.tracing import not_compiled, split, traced

#: The error of what needs model outputs.
NO_OUTPUTS = (
    "a compiled function does not show the model's outputs, which preconditioner='kfac' or "
    "'martens', curvature='fisher', estimator='gnb' and residuals need: use "
    "preconditioner='nystrom', curvature='ggn', 'hessian' or 'empirical_fisher', "
    "estimator='hutchinson', or leave compile out"
)

#: The modes of `torch.compile`.
CompileModeName: TypeAlias = Literal[
    "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]
# Those that put results into memory that the next call overwrites, on a GPU.
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def check_mode(mode: CompileModeName, options: Mapping[str, Any], *, compiles: bool) -> None:
    """Raises unless a mode is known and goes with the other arguments.

    Args:
        mode: The mode.
        options: Other arguments of `torch.compile`.
        compiles: Whether anything is compiled.
    """
    check_choice("mode", mode, CompileModeName)
    if not compiles:
        raise ValueError(f"mode={mode!r} is one of compilation: pass compile=True as well")
    backend = options.get("backend", "inductor")
    if backend != "inductor":
        raise ValueError(f"mode={mode!r} goes with the backend 'inductor' only, got {backend!r}")
    for name in ("mode", "options"):
        if options.get(name) is not None:
            raise ValueError(f"pass either mode={mode!r} or compile={{{name!r}: ...}}")


class CompiledFunction:
    """Loss, gradient and products of a pure function, compiled.

    Compiled code is found again by what the function is made of: another instance with the same
    function uses the same code, and data that the function refers to may change. Other shapes are
    compiled anew.

    Args:
        function: Takes a tree of tensors, returns the loss.
        options: Of `torch.compile`: `backend`, `mode`, `options`.
    """

    def __init__(self, function: Callable[[Any], Tensor], options: Mapping[str, Any]) -> None:
        self._function = function
        self._options = {"dynamic": False, "fullgraph": True, **options}
        self._front = _front_of(function)

    def __call__(
        self, tree: Any, pieces: Sequence[Tensor], curvature: bool
    ) -> tuple[Tensor, CompiledGraph]:
        """Evaluates.

        Args:
            tree: What the function takes.
            pieces: The tensors in it to differentiate with respect to, leaves.
            curvature: Whether products are going to be asked for.

        Returns:
            The loss, and what has its gradients.

        Raises:
            RuntimeError: The function cannot be compiled as a whole, draws random numbers, or
                changes tensors in place.
        """
        program, inputs = self._received(tree)
        by_identity = {id(t): i for i, t in enumerate(inputs)}
        places = tuple(by_identity.get(id(piece)) for piece in pieces)
        code = program.code_for(places, self._options)
        return code.evaluate([t.detach() for t in inputs], pieces, curvature)

    def _received(self, tree: Any) -> tuple[_Program, Sequence[Tensor]]:
        """The program that runs for this tree now, and what it is given."""
        _thread.received = None
        try:
            with torch.enable_grad(), traces_autograd():
                result = self._front(self._function, tree)
        except dynamo_error("FailOnRecompileLimitHit") as error:
            raise not_compiled(
                "it has become another one too often (torch._dynamo.config.recompile_limit); "
                "numbers and objects that it refers to and that change have to be tensors"
            ) from error
        except dynamo_error("TorchDynamoException") as error:
            raise not_compiled(str(error).strip().partition("\n\n")[0]) from error
        if _thread.received is None:  # there was nothing to compute
            differentiable(scalar(result))
        received: tuple[_Program, Sequence[Tensor]] = _thread.received
        _thread.received = None
        return received


class CompiledGraph(Graph):
    """Stands for the retained graph of a compiled evaluation: it multiplies, and shows nothing.

    Args:
        params: See `Graph`.
        gradients: Of the loss.
        product: Gives the product of a kind, see `compiled`.
    """

    __slots__ = ("_product",)

    def __init__(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        product: Callable[[Hashable, Callable[[Graph], Multiply]], Multiply],
    ) -> None:
        self.params, self.gradients = params, [tuple(gradients)]
        self.losses, self.weights, self.linear = [], [], []
        self.suspects, self.curving, self.twice = [], [], True
        self._product = product

    @property
    def outputs(self) -> Any:  # type: ignore[override]
        """Not there."""
        raise RuntimeError(NO_OUTPUTS)

    def check_once(self, known: set[Hashable], twice: bool = True) -> None:
        """Nothing: the operations were looked over when they were compiled."""

    def compiled(self, kind: Hashable, build: Callable[[Graph], Multiply]) -> Multiply:
        """See `Graph.compiled`."""
        return self._product(kind, build)

    def hessian_product(
        self, tangents: Sequence[Tensor], batched: bool = False, *, retain: bool = True
    ) -> tuple[Tensor | None, ...]:
        """See `Graph.hessian_product`."""
        return tuple(self._product("hessian", _hessian)(tangents, batched))


def _hessian(graph: Graph) -> Multiply:
    return graph.hessian_product


# From the function to a program: torch.compile says what the function does with which tensors, and
# knows when that has changed.

_thread = threading.local()
_fronts: WeakKeyDictionary[Any, Callable[..., Any]] = WeakKeyDictionary()


def _loss(function: Callable[[Any], Any], tree: Any) -> Any:
    loss = function(tree)
    # Dynamo does not return what was made with derivatives inside, so the graph loses this again.
    return loss.detach() if isinstance(loss, Tensor) else loss


def _front_of(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """`_loss`, compiled: one for each code of a function, for torch limits how often."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    code = getattr(inner, "__code__", type(inner))
    if code not in _fronts:
        torch.compiler.allow_in_graph(mark_outputs)
        own = FunctionType(_loss.__code__.replace(), _loss.__globals__)
        _fronts[code] = torch.compile(own, backend=_Program, fullgraph=True, dynamic=False)
    return _fronts[code]


class _Program:
    """A function as a graph of torch's functions; called with the tensors that it uses."""

    def __init__(self, module: fx.GraphModule, _: Any) -> None:
        (end,) = (node for node in module.graph.nodes if node.op == "output")
        detached = end.args[0][0]
        end.args = ((detached.args[0], *end.args[0][1:]),)
        module.recompile()
        self._module = module
        self._codes: dict[Hashable, _Code] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        _thread.received = self, inputs
        return (torch.empty(()),)

    def code_for(self, places: tuple[int | None, ...], options: Mapping[str, Any]) -> _Code:
        """The compiled code, made where it is needed first."""
        key = places, repr(sorted(options.items()))
        if key not in self._codes:
            self._codes[key] = _Code(self._module, places, options)
        return self._codes[key]


class _Code:
    """A program with derivatives by some of its inputs.

    Args:
        module: The program.
        places: Which inputs these are; None for what the loss does not depend on.
        options: Of `torch.compile`.
    """

    def __init__(
        self, module: fx.GraphModule, places: Sequence[int | None], options: Mapping[str, Any]
    ) -> None:
        self._module = module
        self._places = places
        self._options = options
        # By kind: what is done once at a point, and what for each direction.
        self._made: dict[Hashable, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._usual: Hashable = None  # the kind that was asked for last

    @torch.no_grad()
    def evaluate(
        self, inputs: list[Tensor], pieces: Sequence[Tensor], curvature: bool
    ) -> tuple[Tensor, CompiledGraph]:
        kind = self._usual if curvature else None
        at_point, _ = self._make(kind, None, inputs, pieces)
        (loss, *gradients), kept = at_point(*inputs)
        known = {kind: kept}

        def product(kind: Hashable, build: Callable[[Graph], Multiply]) -> Multiply:
            return lambda tangents, batched: multiply(kind, build, tangents, batched)

        @torch.no_grad()
        def multiply(
            kind: Hashable,
            build: Callable[[Graph], Multiply],
            tangents: Sequence[Tensor],
            batched: bool,
        ) -> Sequence[Tensor | None]:
            if batched:
                raise NotImplementedError("compiled products are made one by one")
            at_point, along = self._make(kind, build, inputs, pieces)
            if kind not in known:
                self._usual = kind
                known[kind] = at_point(*inputs)[1]
            products: Sequence[Tensor | None] = along(*known[kind], *tangents)
            return products

        return loss, CompiledGraph(pieces, gradients, product)

    def _make(
        self,
        kind: Hashable,
        build: Callable[[Graph], Multiply] | None,
        inputs: Sequence[Tensor],
        tangents: Sequence[Tensor],
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if kind not in self._made:
            if build is not None:
                _check_functions(self._module)
            directions = [t.detach() for t in tangents]
            whole = traced(self._module, self._places, build, inputs, directions)
            parts = split(whole, len(inputs), 1 + len(tangents))
            compiled = [torch.compile(part, **self._options) for part in parts]
            if _overwrites_results(self._options, inputs):
                compiled = [_keeping_results(function) for function in compiled]
            self._made[kind] = compiled[0], compiled[1]
        return self._made[kind]


def _overwrites_results(options: Mapping[str, Any], inputs: Sequence[Tensor]) -> bool:
    """True if compiled code puts its results into the same memory at each call."""
    if not any(t.is_cuda for t in inputs):
        return False
    in_options = (options.get("options") or {}).get("triton.cudagraphs", False)
    return (
        bool(in_options)
        or options.get("mode") in _WITH_CUDA_GRAPHS
        or options.get("backend") == "cudagraphs"
    )


def _keeping_results(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with results in memory of their own: CG keeps them over many calls."""

    def run(*inputs: Tensor) -> Any:
        given = {t.data_ptr() for t in inputs}
        return pytree.tree_map(
            lambda t: t.clone() if isinstance(t, Tensor) and t.data_ptr() not in given else t,
            function(*inputs),
        )

    return run


def _check_functions(module: fx.GraphModule) -> None:
    """Raises where there is a custom autograd function, whose second derivative would be lost."""
    for node in module.graph.nodes:
        if "autograd_function_apply" in str(node.target):
            raise MissingSecondDerivative.of(
                "a custom autograd function, in a function that is compiled",
                "Leave compile out, where such functions are examined one by one, or use an "
                "implementation without them",
            )
