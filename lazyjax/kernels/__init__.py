"""The empirical neural tangent kernel: its methods, and what they will do and cost."""

from lazyjax.kernels.budgets import operations_of, within_budget
from lazyjax.kernels.computation import (
    Job,
    diagonals,
    engine_of,
    finished,
    jobs,
    kernel_and_pull,
    kernels,
    whole,
)
from lazyjax.kernels.empirical import matrix, ntk, ntk_diagonal
from lazyjax.kernels.estimates import Estimate, estimate, explain, explanation
from lazyjax.kernels.methods import METHODS, Engine
from lazyjax.kernels.orders import symmetric
from lazyjax.kernels.request import (
    Options,
    Request,
    check,
    check_batch_size,
    only_output,
    same_examples,
)
from lazyjax.kernels.task import COPIES, REDUCTIONS
from lazyjax.kernels.tiles import choose_blocks, contract, features

__all__ = [
    "COPIES",
    "METHODS",
    "REDUCTIONS",
    "Engine",
    "Estimate",
    "Job",
    "Options",
    "Request",
    "check",
    "check_batch_size",
    "choose_blocks",
    "contract",
    "diagonals",
    "engine_of",
    "estimate",
    "explain",
    "explanation",
    "features",
    "finished",
    "jobs",
    "kernel_and_pull",
    "kernels",
    "matrix",
    "ntk",
    "ntk_diagonal",
    "only_output",
    "operations_of",
    "same_examples",
    "symmetric",
    "whole",
    "within_budget",
]
