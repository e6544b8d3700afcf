"""Kernels, operators and sketches of centred and weighted derivatives, against dense Jacobians."""

from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_reference import quickly
from thoroughness import few

import lazyjax
from lazyjax.operators import centered

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape)
    for name, shape in {"a": (3, 7), "b": (7,), "c": (7, 5), "d": (5, 2)}.items()
}
X, OTHER = RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))
WEIGHTS, OTHERS = jnp.asarray(np.arange(6.0) / 3), jnp.asarray([1.0, 2.0, 3.0, 0.5])
CASES = [(True, True), (True, False), (False, True), (False, False)]


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]) @ p["d"]


@lru_cache
def plain_jacobians():
    """Give J (N, K, P) at x and at the other inputs."""
    both = np.concatenate([X, OTHER])
    leaves = jax.tree.leaves(quickly(jax.jacobian(net), PARAMS, both))
    J = np.concatenate([j.reshape(len(both), 2, -1) for j in leaves], -1)
    return J[: len(X)], J[len(X) :]


def jacobian(x, weights, center):
    """Give C J, (N, K, P)."""
    J = plain_jacobians()[x is OTHER]
    if center:
        J = J - np.average(J, axis=0, weights=weights)
    return J if weights is None else np.sqrt(weights)[:, None, None] * J


def kernel(x=X, weights=None, center=False):
    """Give the matrix of a kernel of one batch."""
    J = jacobian(x, weights, center).reshape(2 * len(x), -1)
    return J @ J.T


def reduced(one, other, reduce):
    full = np.einsum("nkp,mlp->nmkl", one, other)
    return {
        "none": full,
        "diagonal": np.einsum("nmkk->nmk", full),
        "trace": np.einsum("nmkk->nm", full) / 2,
        "sum": np.einsum("nmkl->nm", full) / 2,
    }[reduce]


REDUCTIONS = ["none", "trace", "sum", "diagonal"]
ROWS = list(product(REDUCTIONS, CASES))
TWO = [ROWS[0], ROWS[13]]


@few(("reduce", "case"), sorted(ROWS, key=lambda row: row not in TWO), 2)
def test_the_kernel_is_that_of_the_sampled_derivatives(reduce, case):
    center, weighted = case
    weights, others = (WEIGHTS, OTHERS) if weighted else (None, None)
    one, other = jacobian(X, weights, center), jacobian(OTHER, others, center)
    pair = (weights, others) if weighted else None

    def kernels(p):
        own = lazyjax.ntk(net, p, X, reduce=reduce, center=center, weights=weights)
        return own, lazyjax.ntk(net, p, X, OTHER, reduce=reduce, center=center, weights=pair)

    found, between = quickly(kernels, PARAMS)
    expected = reduced(one, one, reduce)
    assert found.shape == expected.shape
    scale = np.max(np.abs(reduced(*[plain_jacobians()[0]] * 2, reduce)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)
    square = lazyjax.matrix(found) if reduce == "none" else np.moveaxis(found, (0, 1), (-2, -1))
    np.testing.assert_array_equal(square, np.swapaxes(square, -1, -2))
    np.testing.assert_allclose(between, reduced(one, other, reduce), rtol=0, atol=1e-12 * scale)


def test_leaves_add_up():
    own = lazyjax.ntk(net, PARAMS, X, center=True, weights=WEIGHTS, per_leaf=True)
    whole = reduced(*[jacobian(X, WEIGHTS, True)] * 2, "none")
    found = sum(np.asarray(leaf) for leaf in own.values())
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12 * np.max(whole))


def test_one_weight_of_a_pair_may_be_left_out():
    found = lazyjax.ntk(net, PARAMS, X, OTHER, center=True, weights=(None, OTHERS))
    expected = reduced(jacobian(X, None, True), jacobian(OTHER, OTHERS, True), "none")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.max(expected))


def test_weights_may_be_traced():
    found = jax.jit(lambda w: lazyjax.ntk(net, PARAMS, X, center=True, weights=w))(WEIGHTS)
    expected = reduced(*[jacobian(X, WEIGHTS, True)] * 2, "none")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.max(expected))


SECOND = {"itself": (X, None), "another": (OTHER, OTHER)}
OPERATORS = list(product(SECOND, ["trace", "none", "sum"], CASES))


@few(
    ("second", "reduce", "case"),
    sorted(OPERATORS, key=lambda row: row != ("itself", "none", (True, True))),
)
def test_an_operator_multiplies_as_its_kernel(second, reduce, case):
    center, weighted = case
    other, x2 = SECOND[second]
    weights = WEIGHTS if weighted else None
    others = (OTHERS if x2 is OTHER else WEIGHTS) if weighted else None
    options = {"reduce": reduce, "center": center, "weights": weights}
    if x2 is OTHER and weighted:
        options["weights"] = weights, others
    one, two = jacobian(X, weights, center), jacobian(other, others, center)
    dense = reduced(one, two, reduce)
    if reduce == "none":
        dense = dense.transpose(0, 2, 1, 3).reshape(2 * len(X), 2 * len(other))
    v, u = (np.cos(np.arange(size * 2.0)).reshape(size, 2) for size in dense.shape[::-1])
    k = 2 if reduce == "none" else 1

    def products(p):
        A = lazyjax.ntk_operator(net, p, X, x2, **options)
        assert A.outputs == k
        assert A.psd == (x2 is None)
        found = A @ v, A.T @ u, A.rows_of(jnp.array([2, 0]))
        if x2 is not None:
            return found
        return *found, lazyjax.ntk_operator(net, p, X, ridge=0.5, **options).diagonal()

    of_v, of_u, rows, *diagonal = quickly(products, PARAMS)
    np.testing.assert_allclose(of_v, dense @ v, rtol=0, atol=1e-11)
    np.testing.assert_allclose(of_u, dense.T @ u, rtol=0, atol=1e-11)
    chosen = [2 * k + i for i in range(k)] + list(range(k))
    np.testing.assert_allclose(rows, dense[np.array(chosen)], rtol=0, atol=1e-11)
    if x2 is None:
        np.testing.assert_allclose(diagonal[0], np.diag(dense) + 0.5, rtol=0, atol=1e-11)


def test_a_kernel_in_memory_is_centered_as_an_operator():
    def matrix(p):
        A = lazyjax.as_operator(lazyjax.ntk(net, p, X))
        return centered(A, weights=WEIGHTS) @ np.eye(12)

    dense = kernel(weights=WEIGHTS, center=True)
    np.testing.assert_allclose(quickly(matrix, PARAMS), dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda A: centered(A + 1.0), ValueError, "`A` must have no shift"),
        (lambda A: centered(jnp.eye(2)), TypeError, "`A` must be a KernelOperator"),
        (lambda A: centered(A, weights=jnp.ones(3)), ValueError, "`weights` must have shape"),
        (lambda A: centered(A, center=1), TypeError, "`center` must be True or False"),
        (
            lambda A: lazyjax.ntk_operator(net, PARAMS, X, weights=-WEIGHTS),
            ValueError,
            "`weights` must be 0 or more",
        ),
    ],
)
def test_bad_input_of_operators_is_refused(make, kind, text):
    with pytest.raises(kind, match=text):
        make(lazyjax.as_operator(jnp.eye(4)))


@pytest.mark.thorough
@pytest.mark.parametrize("reduce", ["diagonal", "none", "trace", "sum"])
def test_the_diagonal_is_that_of_the_kernel(reduce):
    def kernels(p):
        return (
            lazyjax.ntk(net, p, X, reduce=reduce, per_leaf=True),
            lazyjax.ntk_diagonal(net, p, X, reduce=reduce, per_leaf=True, batch_size=4),
            lazyjax.ntk_diagonal(net, p, X, reduce=reduce),
        )

    whole, found, together = quickly(kernels, PARAMS)
    for name, own in found.items():
        expected = np.stack([whole[name][i, i] for i in range(len(X))])
        assert own.shape == expected.shape
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12 * np.max(np.abs(expected)))
    np.testing.assert_allclose(sum(found.values()), together, rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(("center", "weighted"), CASES)
def test_sketches_are_those_of_the_sampled_derivatives(center, weighted):
    """Linear in the derivatives: those of C J are C times those of J, with the same hashes."""
    weights = WEIGHTS if weighted else None
    key = jax.random.key(0)
    sampled = lazyjax.sketch(
        jax.random.clone(key), net, PARAMS, X, dimension=40, center=center, weights=weights
    )
    z = np.asarray(lazyjax.sketch(key, net, PARAMS, X, dimension=40).features)
    if center:
        z = z - np.average(z, axis=0, weights=weights)
    if weighted:
        z = np.sqrt(weights)[:, None, None] * z
    np.testing.assert_allclose(sampled.features, z, rtol=0, atol=1e-12)


@pytest.mark.thorough
def test_a_stored_kernel_is_centered_as_an_operator(tmp_path):
    stored = lazyjax.kernel_store(net, PARAMS, X, path=tmp_path / "kernel", memory="1GiB")
    A = centered(stored.operator(), weights=WEIGHTS)
    dense = kernel(weights=WEIGHTS, center=True)
    np.testing.assert_allclose(A @ np.eye(12), dense, rtol=0, atol=1e-11)


def test_a_shift_that_is_traced_is_no_part_of_the_kernel():
    A = lazyjax.as_operator(jnp.diag(jnp.arange(1.0, 5.0)))
    multiply = jax.jit(lambda A: centered(A) @ jnp.eye(4))
    np.testing.assert_allclose(multiply(A), centered(A) @ jnp.eye(4), rtol=1e-12)
    assert np.all(np.isnan(multiply(A + 1.0)))
    held = jax.jit(lambda v: centered(A) @ v)(jnp.eye(4))
    np.testing.assert_allclose(held, centered(A) @ jnp.eye(4), rtol=1e-12)
