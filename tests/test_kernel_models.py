"""Every method is the dense Jacobian's kernel on every kind of model.

One method runs on some of them, and every method on all `--thorough`.
"""

from functools import lru_cache
from itertools import cycle
from unittest.mock import patch

import jax
import numpy as np
import pytest
from kernel_models import MODELS
from kernel_reference import (
    ORDERED,
    check_leaves,
    check_symmetric,
    check_whole,
    jacobians,
    leaf_kernels,
    quickly,
)

from lazyjax.kernels import METHODS, check, kernel_and_pull, ntk

FORWARD_ONLY = {"while_loop"}
METHOD = "structured_derivatives"
ORDERS = dict(zip(MODELS, cycle(ORDERED)))  # of the whole kernel of a model; all of them thoroughly
EACH_TIME = {
    "products with and without their biases": "structured_derivatives by jacobian",
    "einsum to heads and back": "structured_derivatives by apply",
    "convolution: groups and stride": "structured_derivatives by slices",
    "tokens out of bounds, zero": METHOD,
    "a tied decoder": "structured_derivatives by gram",
    "scan over layers with remat": "auto",
    "fori_loop that picks its layer": "ntk_vector_products",
    "while_loop": "jacobian_contraction",
    "custom_jvp with a weight": METHOD,
    "cond that closes over weights": METHOD,
    "two slices of a weight that overlap": METHOD,
    "a gradient by x, an example at a time": METHOD,
}
PULLED_EACH_TIME = {
    "a tied decoder": "jacobian_contraction",
    "scan in scan": METHOD,
    "integers and unused parameters": METHOD,
}


def rows(names, methods, each_time):
    return [
        pytest.param(
            name,
            method,
            id=f"{name}, {method}",
            marks=[] if each_time.get(name) == method else pytest.mark.thorough,
        )
        for name in names
        for method in methods
    ]


WAYS = METHOD, *(m for m in METHODS if m != METHOD), "auto", *ORDERED
PULLED = [
    name
    for name in MODELS
    if name
    not in FORWARD_ONLY | {"pytree outputs", "a value and its gradient", "weights through float32"}
]


@pytest.fixture(autouse=True)
def _settings():
    """Flax layers promote their biases; no keys are used, and to check them takes time."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


@lru_cache(1)
def case_of(name):
    """Give a case and its Jacobians at x1 and at x2, computed once."""
    case = MODELS[name]()
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), case.x1, case.x2)
    dense = jacobians(case.f, case.params, both, forward=name in FORWARD_ONLY)
    n = len(jax.tree.leaves(case.x1)[0])
    return case, [[j[:n] for j in y] for y in dense], [[j[n:] for j in y] for y in dense]


@pytest.mark.parametrize(("name", "method"), rows(MODELS, WAYS, EACH_TIME))
def test_the_kernel_of_every_model_is_that_of_its_dense_jacobian(name, method):
    case, j1, j2 = case_of(name)

    whole_by = ORDERS[name] if method == METHOD else method

    def kernels(params, x1, x2):
        leaves = ntk(case.f, params, x1, x2, per_leaf=True, method=method)
        return leaves, ntk(case.f, params, x1, method=whole_by)  # biases go with their products

    with patch.dict(METHODS, ORDERED if "by" in whole_by else {}):
        if name in FORWARD_ONLY and method != "auto" and METHODS[method].needs_reverse:
            with pytest.raises(ValueError, match="`method` must not be .*while"):
                quickly(kernels, case.params, case.x1, case.x2)
            return
        leaves, whole = quickly(kernels, case.params, case.x1, case.x2)
    check_leaves(leaves, leaf_kernels(j1, j2))
    check_whole(whole, leaf_kernels(j1, j1))
    check_symmetric(whole)


@pytest.mark.parametrize(
    ("name", "method"), rows(PULLED, (METHOD, "jacobian_contraction"), PULLED_EACH_TIME)
)
def test_what_the_kernel_has_kept_gives_the_transposed_jacobian(name, method):
    case, j1, _ = case_of(name)
    c = np.random.default_rng(0).normal(size=(len(j1[0][0]), j1[0][0][0, ..., 0].size))

    def pulled(request, c):
        return kernel_and_pull(request)[1](c)

    found = quickly(pulled, check(case.f, case.params, case.x1, method=method), c)
    want = [np.einsum("nkp,nk->p", j.reshape(*c.shape, -1), c) for j in j1[0]]
    near = 1e-13 * max(np.abs(one).max() for one in want)
    for own, one in zip(found, want, strict=True):
        np.testing.assert_allclose(own.reshape(-1), one, rtol=1e-11, atol=near)
