"""The kernel as a linear operator: products, solves, eigenpairs, traces and log-determinants.

`algebra` has the operator itself, `products` makes one of a kernel from the maps J and J^T of
`jacobians`, on one device or many. `krylov` is Lanczos' method, on which stand `spectra`
(eigenpairs, densities) and `trace_estimates` (traces, log-determinants); `measures` has norms,
alignments, changes and effective ranks. `iterations` has the steps of conjugate gradients, on which
stand `solves` and the `variances` of a Gaussian process, `preconditioners` what speeds them up.
"""

from lazyjax.operators.algebra import KernelOperator, as_operator, operator, require_symmetric
from lazyjax.operators.iterations import Iterate, conjugate_gradients
from lazyjax.operators.jacobians import by_evaluation
from lazyjax.operators.krylov import lanczos
from lazyjax.operators.measures import (
    Estimate,
    alignment,
    effective_rank,
    frobenius_norm,
    relative_change,
)
from lazyjax.operators.preconditioners import Nystrom, nystrom
from lazyjax.operators.products import ntk_operator
from lazyjax.operators.sampling import centered
from lazyjax.operators.solves import NotConverged, Solution, solve
from lazyjax.operators.spectra import Eigenpairs, SpectralDensity, spectral_density, top_eigenpairs
from lazyjax.operators.trace_estimates import TraceEstimate, inverse_trace, logdet, trace
from lazyjax.operators.variances import posterior_variance

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Iterate",
    "KernelOperator",
    "NotConverged",
    "Nystrom",
    "Solution",
    "SpectralDensity",
    "TraceEstimate",
    "alignment",
    "as_operator",
    "by_evaluation",
    "centered",
    "conjugate_gradients",
    "effective_rank",
    "frobenius_norm",
    "inverse_trace",
    "lanczos",
    "logdet",
    "ntk_operator",
    "nystrom",
    "operator",
    "posterior_variance",
    "relative_change",
    "require_symmetric",
    "solve",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
