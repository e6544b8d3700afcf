"""Every method is the dense Jacobian's kernel on every kind of model."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_models import MODELS
from kernel_reference import check_leaves, check_whole, jacobians, leaf_kernels, quickly

from lazyjax.kernels import METHODS, ntk

FORWARD_ONLY = {"while_loop"}


@pytest.fixture(autouse=True)
def _flax_layers_promote_their_biases():
    with jax.numpy_rank_promotion("allow"):
        yield


@cache
def case_of(name):
    """Give a case and its Jacobians at x1 and at x2, computed once."""
    case = MODELS[name]()
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), case.x1, case.x2)
    dense = jacobians(case.f, case.params, both, forward=name in FORWARD_ONLY)
    n = len(jax.tree.leaves(case.x1)[0])
    j1 = [[j[:n] for j in leaves] for leaves in dense]
    j2 = [[j[n:] for j in leaves] for leaves in dense]
    return case, j1, j2


def kernel(case, x2, **options):
    """Compute the kernel with as little compilation as possible."""
    return quickly(lambda *a: ntk(case.f, *a, **options), case.params, case.x1, x2)


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_of_a_batch_is_that_of_the_dense_jacobian_and_symmetric(name):
    case, j1, _ = case_of(name)
    found = kernel(case, None)
    check_whole(found, leaf_kernels(j1, j1))
    for theta in jax.tree.leaves(found):
        k = (theta.ndim - 2) // 2
        swap = (1, 0, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
        np.testing.assert_array_equal(theta, np.transpose(theta, swap))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_is_the_dense_jacobian_on_every_model(name, method):
    case, j1, j2 = case_of(name)
    if name in FORWARD_ONLY and METHODS[method].needs_reverse:
        with pytest.raises(ValueError, match="`method` must not be .*while"):
            kernel(case, case.x2, method=method)
        return
    check_whole(kernel(case, case.x2, method=method), leaf_kernels(j1, j2))


@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_of_the_leaves_are_those_of_their_jacobians_and_add_up(name):
    case, j1, j2 = case_of(name)
    found = kernel(case, case.x2, per_leaf=True)
    check_leaves(found, case.params, leaf_kernels(j1, j2))
