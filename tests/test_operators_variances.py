"""The variance of a Gaussian process by solves is that of the dense equation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_operators import PARAMS, X1, X2, gram, jacobian, model
from thoroughness import few

from lazyjax import matrix, ntk_operator
from lazyjax.operators import NotConverged, as_operator, nystrom, posterior_variance

NOISE = 0.3
J1, J2 = np.split(jacobian(), [7])
TRAIN, CROSS, TEST = gram(J1, J1), gram(J2, J1), gram(J2, J2)
A = as_operator(TRAIN, ridge=NOISE)
DIAGONAL = np.diag(matrix(TEST))


def dense(noise=NOISE):
    train, cross = np.asarray(matrix(TRAIN)), np.asarray(matrix(CROSS))
    solved = np.linalg.solve(train + noise * np.eye(21), cross.T)
    return np.diag(np.asarray(matrix(TEST)) - cross @ solved)


@few("block", [6, 1, 4, 64])
@few("rank", [0, 9])
def test_it_is_that_of_the_dense_equation(block, rank):
    """15 rows, three an example: blocks of one, one, two (which overlap at the end) and all."""
    P = nystrom(jax.random.key(0), A, rank=rank) if rank else None
    found = posterior_variance(A, CROSS, DIAGONAL, preconditioner=P, block=block, tolerance=1e-9)
    assert found.shape == (15,)
    np.testing.assert_allclose(found, dense(), rtol=1e-9)
    assert np.all(found > 0)
    assert np.all(found < DIAGONAL)


@pytest.mark.thorough
def test_kernels_may_be_operators():
    C = ntk_operator(model, PARAMS, X1, ridge=NOISE)
    cross = ntk_operator(model, PARAMS, X2, X1)
    diagonal = ntk_operator(model, PARAMS, X2).diagonal()
    found = posterior_variance(C, cross, diagonal, block=6, tolerance=1e-9)
    np.testing.assert_allclose(found, dense(), rtol=1e-9)


def test_no_more_rows_are_made_than_a_block_has():
    seen = []
    cross = as_operator(CROSS)
    rows = cross.rows
    watched = replace(cross, rows=Partial(lambda at: seen.append(at.shape) or rows(at)))
    posterior_variance(A, watched, DIAGONAL, block=6)
    assert seen == [(2,)] * 3


@pytest.mark.thorough
def test_it_is_not_clipped():
    """A diagonal of another kernel is seen."""
    found = posterior_variance(A, CROSS, 0.5 * DIAGONAL, tolerance=1e-9)
    np.testing.assert_allclose(found, dense() - 0.5 * DIAGONAL, rtol=1e-8)
    assert np.any(found < 0)


def test_a_loose_solve_makes_it_too_large():
    exact = dense()
    for tolerance in (0.3, 0.1, 0.01):
        found = posterior_variance(A, CROSS, DIAGONAL, tolerance=tolerance)
        assert np.all(found > exact - 1e-12)
    assert np.any(posterior_variance(A, CROSS, DIAGONAL, tolerance=0.3) > exact + 1e-6)


@pytest.mark.thorough
def test_without_noise_training_points_are_known():
    square = jnp.asarray(np.diag(np.arange(1.0, 5)))
    found = posterior_variance(as_operator(square), square, jnp.diagonal(square), tolerance=1e-12)
    np.testing.assert_allclose(found, 0, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": TRAIN}, TypeError, "`A` must be a KernelOperator"),
        ({"A": as_operator(CROSS)}, ValueError, "`A` must be symmetric"),
        ({"k_test_train": TEST}, ValueError, "`k_test_train` must have 21 columns, as `A` has, got shape (15, 15)"),
        ({"k_test_train": np.ones((2, 21), int)}, TypeError, "`k_test_train` must hold floats"),
        ({"k_test_diagonal": np.ones(5)}, ValueError, "`k_test_diagonal` must have shape (15,), got (5,)"),
        ({"k_test_diagonal": np.ones(15, int)}, TypeError, "`k_test_diagonal` must hold floats"),
        ({"block": 0}, ValueError, "`block` must be at least 1"),
        ({"block": 1.5}, TypeError, "`block` must be a whole number"),
        ({"iterations": 1}, NotConverged, "after 1 iterations"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be positive"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_arguments_are_refused(change, error, message):
    every = {"A": A, "k_test_train": CROSS, "k_test_diagonal": DIAGONAL} | change
    positional = [every.pop(name) for name in ("A", "k_test_train", "k_test_diagonal")]
    with pytest.raises(error) as caught:
        posterior_variance(*positional, **every)
    assert message in str(caught.value)
