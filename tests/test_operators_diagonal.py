"""The diagonal of an operator is that of its matrix, whatever it is made of."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from kernel_reference import quickly
from test_operators import PARAMS, X1, X2, model
from thoroughness import few

from lazyjax import matrix, ntk
from lazyjax.operators import as_operator, ntk_operator
from lazyjax.operators.algebra import operator

N, K = 25, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N * K, 90))
PSD = FEATURES @ FEATURES.T
SKEW = RNG.normal(size=(N * K, N * K))


def by_products(square, **options):
    return operator(
        lambda v: square @ v,
        lambda v: square.T @ v,
        shape=square.shape,
        dtype=square.dtype,
        outputs=K,
        **options,
    )


def by_rows(square, **options):
    every = jnp.asarray(square).reshape(N, K, N * K)
    return by_products(
        square, rows=Partial(lambda a, at: a[at].reshape(-1, N * K), every), **options
    )


def by_entries(square, **options):
    return by_products(square, entries=Partial(jnp.diagonal, jnp.asarray(square)), **options)


def of_array(square, **_):
    return as_operator(square.reshape(N, K, N, K).transpose(0, 2, 1, 3))


MADE = {"array": of_array, "products": by_products, "rows": by_rows, "entries": by_entries}


SQUARE = {"symmetric": PSD, "not symmetric": SKEW}
ROWS = [("rows", "not symmetric"), ("products", "symmetric"), ("entries", "not symmetric")]
ROWS += [row for row in product(MADE, SQUARE) if row not in ROWS]


@few(("made", "kind"), ROWS, 3)
def test_the_diagonal_is_that_of_the_matrix(made, kind):
    """75 rows of three outputs: two blocks, of which the second overlaps the first."""
    square = SQUARE[kind]
    A = 2.0 * MADE[made](square, psd=square is PSD) + 0.25
    wanted = 2 * np.diag(square) + 0.25
    for B in (A, A.T):
        found = B.diagonal()
        assert found.shape == (N * K,)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=1e-13)
    np.testing.assert_allclose(jax.jit(lambda A: A.diagonal())(A), wanted, rtol=1e-13)


def test_entries_are_asked_where_there_are_any():
    A = by_products(PSD, entries=lambda: jnp.arange(N * K, dtype=np.float64))
    np.testing.assert_array_equal((A * 2 + 1).diagonal(), 2 * np.arange(N * K) + 1)


def test_a_diagonal_never_makes_all_rows_at_once():
    seen = []

    def rows(at):
        seen.append(at.shape)
        return jnp.zeros((at.size * K, N * K))

    by_products(PSD, rows=rows).diagonal()
    assert set(seen) == {(21,)}  # 63 rows


def test_a_product_of_operators_has_a_diagonal():
    A = as_operator(PSD) @ as_operator(SKEW)
    np.testing.assert_allclose(A.diagonal(), np.diag(PSD @ SKEW), atol=1e-9)


@few("reduce", ["sum", "none", "trace"])
def test_an_empirical_kernel_has_its_diagonal(reduce):
    square = quickly(lambda p: matrix(ntk(model, p, X1, reduce=reduce)), PARAMS)
    wanted = np.diag(square) + 0.5
    A = ntk_operator(model, PARAMS, X1, reduce=reduce, ridge=0.5)
    found = A.diagonal()
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda A: A.diagonal())(A), wanted, rtol=1e-12)


def test_a_diagonal_of_float32_is_float32():
    A = by_products(PSD.astype(np.float32), psd=True) + 1.0
    assert A.diagonal().dtype == np.float32
    np.testing.assert_allclose(A.diagonal(), np.diag(PSD) + 1, rtol=1e-6)


def test_rows_without_rows_are_products_with_unit_vectors():
    at = jnp.array([7, 2])
    for A in (by_products(SKEW), by_rows(SKEW), of_array(SKEW)):
        found = quickly(lambda A: (A * 3.0).rows_of(at), A)
        wanted = 3 * SKEW.reshape(N, K, -1)[np.asarray(at)].reshape(-1, N * K)
        np.testing.assert_allclose(found, wanted, atol=1e-13)


def test_two_batches_have_no_diagonal():
    with pytest.raises(
        ValueError, match=r"`diagonal` must be of a square operator, got shape .21, 15."
    ):
        ntk_operator(model, PARAMS, X1, X2).diagonal()
