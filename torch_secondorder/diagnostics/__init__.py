"""The curvature of a loss: eigenvalues, trace, spectrum, definiteness, information."""

from torch_secondorder.diagnostics.convexity import Definiteness, definiteness
from torch_secondorder.diagnostics.eigenvalues import Eigenpairs, eigenpairs
from torch_secondorder.diagnostics.information import ObservedInformation, observed_information
from torch_secondorder.diagnostics.problem import Problem, Source, from_closure, from_model
from torch_secondorder.diagnostics.spectrum import SpectralDensity, spectral_density
from torch_secondorder.diagnostics.taylor import SecondOrderModel, second_order_model
from torch_secondorder.diagnostics.trace_estimation import TraceEstimate, trace

__all__ = [
    "Definiteness",
    "Eigenpairs",
    "ObservedInformation",
    "Problem",
    "SecondOrderModel",
    "Source",
    "SpectralDensity",
    "TraceEstimate",
    "definiteness",
    "eigenpairs",
    "from_closure",
    "from_model",
    "observed_information",
    "second_order_model",
    "spectral_density",
    "trace",
]


def __dir__() -> list[str]:
    return __all__
