"""The methods by name, and their options by the names that SciPy and the optimizers have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._optim.base import SecondOrderOptimizer
from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.optim.adahessian import AdaHessian
from torch_secondorder.optim.bfgs import BFGS
from torch_secondorder.optim.constrained import Constrained
from torch_secondorder.optim.lbfgs import LBFGS
from torch_secondorder.optim.levenberg_marquardt import LevenbergMarquardt
from torch_secondorder.optim.newton import Newton
from torch_secondorder.optim.newton_cg import NewtonCG
from torch_secondorder.optim.nonlinear_cg import NonlinearCG
from torch_secondorder.optim.sophia import Sophia


@dataclass(frozen=True)
class Method:
    """A method: an optimizer, with arguments that make it this method.

    Attributes:
        optimizer: The class.
        arguments: Those of its constructor that the name stands for; options replace them.
        twice: Whether it takes second derivatives.
    """

    optimizer: type[SecondOrderOptimizer]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    twice: bool = False

    @property
    def takes_bounds(self) -> bool:
        """True if the optimizer can keep parameters within bounds."""
        return bool(getattr(self.optimizer, "_takes_bounds", False))

    @property
    def takes_constraints(self) -> bool:
        """True if the method minimizes augmented Lagrangians: any function, in one step."""
        return self.iterates and not issubclass(self.optimizer, LevenbergMarquardt)

    def make(self, params: Any, *arguments: Mapping[str, Any]) -> Any:
        """The optimizer.

        Args:
            params: Parameters or groups.
            *arguments: Further arguments, the later ones first. Those that are numbers of the
                groups and not in the constructor's signature are put into the groups.
        """
        given = {k: v for part in (self.arguments, *arguments) for k, v in part.items()}
        taken = arguments_of(self.optimizer)
        known = {k: v for k, v in given.items() if k in taken or "**" in taken}
        make: Any = self.optimizer
        optimizer = make(params, **known)
        for group in optimizer.param_groups:
            group.update({k: v for k, v in given.items() if k not in known})
        return optimizer

    @property
    def iterates(self) -> bool:
        """True if one step of the optimizer makes all iterations."""
        return issubclass(self.optimizer, FlatOptimizer)


#: All methods. An optimizer becomes one by a row.
METHODS: dict[str, Method] = {
    "bfgs": Method(BFGS, {"update": "bfgs"}),
    "ssbfgs": Method(BFGS, {"update": "ssbfgs"}),
    "ssbroyden": Method(BFGS, {"update": "ssbroyden"}),
    "dfp": Method(BFGS, {"update": "dfp"}),
    "lbfgs": Method(LBFGS),
    "cg": Method(NonlinearCG),
    "newton": Method(Newton, twice=True),
    "newton-cg": Method(NewtonCG, twice=True),
    "lm": Method(
        LevenbergMarquardt, {"globalization": "trust_region", "scaling": "more"}, twice=True
    ),
    "trust-ncg": Method(
        NewtonCG, {"curvature": "hessian", "globalization": "trust_region"}, twice=True
    ),
    "adahessian": Method(AdaHessian, twice=True),
    "sophia": Method(Sophia, twice=True),
}
#: Other names, SciPy's among them.
ALIASES = {
    "l-bfgs": "lbfgs",
    "l-bfgs-b": "lbfgs",
    "levenberg-marquardt": "lm",
    "nonlinear-cg": "cg",
    "trust-exact": "newton",
}

#: SciPy's names for sequential quadratic programs and the like: the default method's work here.
CONSTRAINED_NAMES = ("slsqp", "trust-constr")

# The largest number of unknowns for which a dense matrix is the default. An update of the matrix
# costs some hundred microseconds there.
_DENSE = 1000


def default_method(size: int, *, bounded: bool, constrained: bool = False) -> str:
    """The name of the method that is used if none is given, for so many unknowns."""
    return "lbfgs" if (bounded and not constrained) or size > _DENSE else "bfgs"


def stands_for_default(method: Any) -> bool:
    """True for SciPy's names of methods for constraints, which the default does the work of."""
    return isinstance(method, str) and method.lower().replace("_", "-") in CONSTRAINED_NAMES


#: Options by the names that SciPy has for them.
_SCIPY_NAMES = {
    "gtol": "tolerance_grad",
    "ftol": "tolerance_change",
    "xtol": "tolerance_change",
    "maxiter": "max_iter",
    "maxfun": "max_eval",
    "maxfev": "max_eval",
    "maxcor": "history_size",
}
#: Likewise with constraints. The first is COBYQA's, the others are COBYLA's and Ipopt's.
_CONSTRAINED_NAMES = {
    "feasibility_tol": "feasibility",
    "catol": "feasibility",
    "constr_viol_tol": "feasibility",
    "tolerance": "feasibility",
    "constraint_method": "method",
}
#: Arguments of `Constrained` that are no options.
_NO_CONSTRAINED = ("optimizer", "equalities", "inequalities", "method", "tolerance")
#: Arguments of constructors that are no options here, with the reason.
_NO_OPTIONS = {
    "params": "x0 is the parameter",
    "bounds": "bounds is an argument of minimize itself",
    "maximize": "minimize the negative of fun instead",
    "weight_decay": "add the penalty to fun instead",
}


def resolve_method(method: Any) -> tuple[str, Method]:
    """A method with its name, by its name in any case or by an optimizer class.

    Raises:
        TypeError: It is neither a string nor an optimizer class.
        ValueError: The name is unknown.
    """
    if isinstance(method, str):
        name = method.lower().replace("_", "-")
        name = ALIASES.get(name, name)
        if name not in METHODS:
            raise ValueError(
                f"unknown method {method!r}: choose one of {', '.join(map(repr, METHODS))}, or "
                "pass an optimizer class of torch_secondorder"
            )
        return name, METHODS[name]
    if isinstance(method, type) and issubclass(method, (FlatOptimizer, DiagonalOptimizer)):
        twice = any(
            known.twice for known in METHODS.values() if issubclass(method, known.optimizer)
        )
        return method.__name__, Method(method, twice=twice)
    if isinstance(method, torch.optim.Optimizer):
        name = type(method).__name__
        raise TypeError(
            f"method is an optimizer of parameters of its own, a {name}: pass the class {name}, "
            "and its arguments as options"
        )
    raise TypeError(
        f"method must be a name, one of {', '.join(map(repr, METHODS))}, or an optimizer class of "
        f"torch_secondorder, got {method!r}"
    )


def check_takes_constraints(name: str, method: Method) -> None:
    """Raises a ValueError if a method cannot take constraints."""
    if not method.takes_constraints:
        able = [repr(other) for other, row in METHODS.items() if row.takes_constraints]
        raise ValueError(
            f"method {name!r} cannot take constraints here; those that can: {', '.join(able)}, or "
            "make a torch_secondorder.Constrained of the optimizer, for a loop of your own"
        )


def check_bounds_fit(name: str, method: Method) -> None:
    """Raises a ValueError if a method cannot take bounds."""
    if not method.takes_bounds:
        able = [repr(other) for other, row in METHODS.items() if row.takes_bounds]
        raise ValueError(
            f"method {name!r} cannot take bounds; those that can: {', '.join(able) or 'none'}"
        )


def arguments_of(optimizer: Any) -> tuple[str, ...]:
    """The names of a constructor's arguments; `**` where it takes any."""
    names: tuple[str, ...] = _arguments_of(optimizer)
    return names


@cache
def _arguments_of(optimizer: Any) -> tuple[str, ...]:
    parameters = inspect.signature(optimizer).parameters.values()
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


@dataclass
class Settings:
    """The options of a call.

    Attributes:
        max_iter: Most iterations.
        max_eval: Most evaluations of the function.
        tolerance_grad: None for the default.
        tolerance_change: None for the default.
        disp: Whether a line is printed at the end.
        rel_step: The relative step of finite differences; None for SciPy's rule.
        at_once: Whether `torch.func.vmap` evaluates the points of a difference in one call.
        arguments: Further arguments of the optimizer's constructor.
        feasibility: The largest violation of a constraint at a solution; None for the default.
        constrained: Further arguments of `Constrained`.
    """

    max_iter: int | None = None
    max_eval: int | None = None
    tolerance_grad: float | None = None
    tolerance_change: float | None = None
    disp: bool = False
    rel_step: float | None = None
    at_once: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    feasibility: float | None = None
    constrained: dict[str, Any] = field(default_factory=dict)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_iter": lambda name, value: check_integer(name, value, whole_floats=True, optional=True),
    "max_eval": lambda name, value: check_integer(name, value, whole_floats=True, optional=True),
    "tolerance_grad": lambda name, value: check_number(name, value, low=0.0, optional=True),
    "tolerance_change": lambda name, value: check_number(name, value, low=0.0, optional=True),
    "rel_step": lambda name, value: check_number(name, value, above=0.0, optional=True),
    "feasibility": lambda name, value: check_number(name, value, low=0.0, optional=True),
}


def read_options(
    options: Mapping[str, Any] | None,
    tol: float | None,
    name: str,
    method: Method,
    *,
    constrained: bool = False,
) -> Settings:
    """The settings that options stand for.

    Args:
        options: As given to `minimize`.
        tol: Likewise.
        name: Of the method, for errors.
        method: The method.
        constrained: Whether there are constraints, and so the options for them.

    Raises:
        TypeError: The options are no mapping.
        ValueError: An option is unknown, is given twice, or has a wrong value.
    """
    if not isinstance(options, (Mapping, type(None))):
        raise TypeError(f"options must be a dict, got {type(options).__name__}")
    check_number("tol", tol, low=0.0, optional=True)
    settings = Settings(tolerance_grad=tol)
    taken = arguments_of(method.optimizer)
    names = _SCIPY_NAMES
    further: tuple[str, ...] = ()
    if constrained:
        names = names | _CONSTRAINED_NAMES
        further = tuple(n for n in arguments_of(Constrained) if n not in _NO_CONSTRAINED)
    spelled: dict[str, str] = {} if tol is None else {"tolerance_grad": "tol"}
    for option, value in (options or {}).items():
        own = "rel_step" if option == "finite_diff_rel_step" else names.get(option, option)
        if {option, spelled.get(own)} == {"ftol", "xtol"}:
            # Both must hold, so the smaller one is the tolerance of both.
            value = min(value, settings.tolerance_change or 0.0)
        elif own in spelled and spelled[own] != "tol":
            raise ValueError(f"options {spelled[own]!r} and {option!r} are the same: give one")
        if own in _NO_OPTIONS:
            raise ValueError(f"{option!r} is no option of minimize: {_NO_OPTIONS[own]}")
        spelled[own] = option
        if own in _CHECKS:
            _CHECKS[own](f"options[{option!r}]", value)
            setattr(settings, own, value)
        elif own == "disp":
            settings.disp = bool(value)
        elif own == "finite_diff_vmap":
            settings.at_once = bool(value)
        elif own in further or (constrained and option == "constraint_method"):
            settings.constrained[own] = value
        elif own in taken or ("**" in taken and option not in _SCIPY_NAMES):
            settings.arguments[own] = value
        else:
            raise ValueError(
                f"unknown option {option!r} of method {name!r}; it has "
                f"{', '.join(_known_options(taken, further))}"
            )
    return settings


def _known_options(taken: tuple[str, ...], further: tuple[str, ...]) -> list[str]:
    common = ["gtol", "ftol", "xtol", "maxiter", "maxfun", "disp"]
    common += ["finite_diff_rel_step", "finite_diff_vmap"]
    if further:
        common += ["feasibility_tol", "constraint_method", *further]
    own = [n for n in taken if n not in _NO_OPTIONS and n not in _CHECKS and n != "**"]
    return common + own
