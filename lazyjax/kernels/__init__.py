"""The empirical neural tangent kernel: one public function, a table of methods."""

from lazyjax.kernels.empirical import matrix, ntk
from lazyjax.kernels.estimates import Estimate, estimate, explain
from lazyjax.kernels.methods import METHODS, REDUCTIONS

__all__ = ["METHODS", "REDUCTIONS", "Estimate", "estimate", "explain", "matrix", "ntk"]
