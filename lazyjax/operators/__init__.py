"""The kernel as a linear operator: products, solves, eigenpairs, traces and log-determinants.

`algebra` has the operator itself, `products` makes one of a kernel from the maps J and J^T of
`jacobians`, on one device or many. `krylov` is Lanczos' method, on which stand `spectra`
(eigenpairs, densities) and `trace_estimates` (traces, log-determinants); `solves` has conjugate
gradients and their preconditioner.
"""

from lazyjax.operators.algebra import KernelOperator, as_operator, operator
from lazyjax.operators.jacobians import by_evaluation
from lazyjax.operators.krylov import lanczos
from lazyjax.operators.products import ntk_operator
from lazyjax.operators.solves import (
    NotConverged,
    Nystrom,
    Solution,
    nystrom,
    require_symmetric,
    solve,
)
from lazyjax.operators.spectra import Eigenpairs, SpectralDensity, spectral_density, top_eigenpairs
from lazyjax.operators.trace_estimates import TraceEstimate, inverse_trace, logdet, trace

__all__ = [
    "Eigenpairs",
    "KernelOperator",
    "NotConverged",
    "Nystrom",
    "Solution",
    "SpectralDensity",
    "TraceEstimate",
    "as_operator",
    "by_evaluation",
    "inverse_trace",
    "lanczos",
    "logdet",
    "ntk_operator",
    "nystrom",
    "operator",
    "require_symmetric",
    "solve",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
