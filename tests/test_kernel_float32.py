"""In float32 every method is right to rounding: nothing is lost on the way but the last digits."""

from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_models import ROUNDED
from kernel_reference import check_whole, jacobians, leaf_kernels, quickly
from thoroughness import few

from lazyjax.kernels import METHODS, ntk


@pytest.fixture(autouse=True)
def _settings():
    """Flax layers promote their biases; no keys are used, and to check them takes time."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


def in_float64(tree):
    return jax.tree.map(
        lambda a: np.asarray(a, float if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype), tree
    )


@lru_cache(1)
def rounded_case_of(name):
    """Give a case in its own dtypes and its Jacobians in float64."""
    case = ROUNDED[name]()
    params, x1, x2 = in_float64((case.params, case.x1, case.x2))
    dense = jacobians(case.f, params, np.concatenate([x1, x2]))
    return case, *([[j[rows] for j in y] for y in dense] for rows in np.s_[: len(x1), len(x1) :])


FIRST = [
    ("recurrence by scan, in float32", "structured_derivatives"),
    ("a weight through float32", "jacobian_contraction"),
]
ROWS = sorted(product(ROUNDED, METHODS), key=lambda row: row not in FIRST)


@few(("name", "method"), ROWS, len(FIRST))
def test_in_float32_the_kernel_is_that_of_float64_to_rounding(name, method):
    case, j1, j2 = rounded_case_of(name)

    def kernel(params, x1, x2):
        return ntk(case.f, params, x1, x2, method=method)

    arguments = case.params, case.x1, case.x2
    if method == "structured_derivatives" and "transformer" in name:  # compiled as for everyone
        found = jax.tree.map(np.asarray, kernel(*arguments))
    else:
        found = quickly(kernel, *arguments)
    check_whole(found, leaf_kernels(j1, j2), 1e-5)
