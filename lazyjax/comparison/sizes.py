"""How much is measured beside two trainings: all of it where that is little, else a share of them.

Decided by operations counted in the model's jaxpr and by a budget of memory, never by a clock: the
same call measures the same everywhere.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from lazyjax import checks
from lazyjax.costs import operations, results
from lazyjax.kernels import Request, operations_of
from lazyjax.memory import bytes_of
from lazyjax.traces import one_example
from lazyjax.types import PyTree

FREE = 3e9
"""Operations that each kind of measurement may take whatever training takes: below a second."""

SHARE = 0.05
"""Of the operations of training, which each kind of measurement may take beyond that."""

_STEP = 9  # evaluations that a step of both trainings costs: three, and six of a tangent model
_OUTPUTS = 3  # and to evaluate both
_CURVATURE = 24 * 12  # and a sharpness, by 24 products with the Hessian
_PRODUCT = 6  # and a product with the kernel, J J^T
_POINTS = 100  # steps at which outputs are recorded, log-spaced
_OUTPUTS_OF = ((16, 256), (8, 128))  # steps and examples to which they are cut, first and last
_KERNEL_POINTS = 16
_KERNEL_EXAMPLES = 1000
_FEWEST = 64  # examples, below which fewer steps are measured rather than still fewer examples


class Amounts(NamedTuple):
    """How much of what is measured."""

    points: int  # steps at which outputs are recorded
    examples: np.ndarray  # training examples of which they are
    kernel_points: int
    kernel_examples: np.ndarray
    sharpness_points: int
    block: int  # examples that are evaluated at once
    dense: bool  # whether the kernel of all outputs is formed
    products: int  # with the kernel, for a closed form without it; 0: none
    kappa: bool
    memory: int  # bytes
    tight: bool  # whether the kernel's features may need more than that


def _sample(n: int, size: int) -> np.ndarray:
    """Draw examples once and for all: the same of the same number."""
    if size >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, size, replace=False))


def _kernel_amounts(request: Request, allowed: float) -> tuple[int, int]:
    """Choose how many examples' kernels at how many steps."""
    n, points = min(request.n1, _KERNEL_EXAMPLES), _KERNEL_POINTS

    def cost(size: int) -> float:
        few = jax.tree.map(lambda a: a[:size], request.x1)
        return operations_of(request.of(few))

    whole = cost(n)
    if points * whole <= allowed or n < 2:
        return n, points
    small = max(1, n // 8)
    # features are linear in the examples, and contractions quadratic
    linear = max(0.0, (cost(small) * n**2 - whole * small**2) / (small * n**2 - n * small**2))
    square = max(0.0, (whole - linear * n) / n**2)
    while n > _FEWEST and points * (linear * n + square * n**2) > allowed:
        n = max(_FEWEST, n // 2)
    while points > 4 and points * (linear * n + square * n**2) > allowed:
        points //= 2
    return n, points


def amounts(
    request: Request,
    tests: int,
    *,
    steps: int,
    batch_size: int | None,
    memory: int | float | str,
    members: int,
) -> Amounts:
    """Decide by the kernel that is asked for, of one member's start and of all training points."""
    budget, n, params = bytes_of(memory), request.n1, request.params
    one = jax.make_jaxpr(request.f)(params, one_example(request.x1)).jaxpr
    evaluation, held = operations(one), results(one)
    out = math.prod(request.shapes[0].shape)
    numbers = sum(w.size for w in jax.tree.leaves(params))
    size = max(np.dtype(jax.numpy.result_type(w)).itemsize for w in jax.tree.leaves(params))
    training = steps * min(batch_size or n, n) * _STEP * evaluation
    allowed = max(FREE, SHARE * training)

    kept = 2 * members * numbers * size  # the weights of both, at one step
    points = int(np.clip(budget / 2 / kept, 4, _POINTS))
    examples, per_point = n, _OUTPUTS * evaluation
    for fewest, least in _OUTPUTS_OF:
        while points > fewest and points * (examples + tests) * per_point > allowed:
            points = max(fewest, points // 2)
        while examples > least and points * (examples + tests) * per_point > allowed:
            examples = max(least, examples // 2)
    kernel_examples, kernel_points = _kernel_amounts(request, allowed)
    curvature = _CURVATURE * evaluation * kernel_examples
    sharpness_points = kernel_points
    while sharpness_points and sharpness_points * curvature > allowed:
        sharpness_points //= 2
    everything = n * out
    return Amounts(
        points=points,
        examples=_sample(n, examples),
        kernel_points=kernel_points,
        kernel_examples=_sample(n, kernel_examples),
        sharpness_points=sharpness_points,
        block=max(1, min(n, int(budget / 2 / held))) if held else n,
        dense=4 * everything**2 * size <= budget and 10 * everything**3 <= allowed,
        products=int(2 * allowed / (_PRODUCT * evaluation * n)) if evaluation else 0,
        kappa=3 * numbers * n * everything * evaluation <= FREE,
        memory=budget,
        tight=kernel_examples * out * (4 * held + numbers * size) > budget,
    )


def spread(count: int, steps: np.ndarray) -> np.ndarray:
    """Give indices of so many of the recorded steps, spread evenly, the last among them."""
    return np.unique(np.linspace(0, len(steps) - 1, count).astype(int)) if count else np.array([])


def pieces(x: PyTree, size: int) -> list[Any]:
    """Cut a batch into pieces of so many examples, at most."""
    n = checks.batch("x", x)
    return [jax.tree.map(lambda a, at=at: a[at : at + size], x) for at in range(0, n, size)]
