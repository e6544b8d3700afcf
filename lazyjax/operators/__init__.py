"""The kernel as a linear operator: products, solves, eigenpairs, traces and log-determinants."""

from lazyjax.operators.algebra import KernelOperator, as_operator
from lazyjax.operators.products import ntk_operator

__all__ = ["KernelOperator", "as_operator", "ntk_operator"]
