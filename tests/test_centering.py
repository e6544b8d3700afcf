"""Kernels, operators and sketches of centred and weighted derivatives, against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax
from lazyjax.operators import centered

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape))
    for name, shape in {"a": (3, 7), "b": (7,), "c": (7, 5), "d": (5, 2)}.items()
}
X, OTHER = jnp.asarray(RNG.normal(size=(6, 3))), jnp.asarray(RNG.normal(size=(4, 3)))
WEIGHTS, OTHERS = jnp.arange(6.0) / 3, jnp.asarray([1.0, 2.0, 3.0, 0.5])
CASES = [(False, False), (False, True), (True, False), (True, True)]


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]) @ p["d"]


def jacobian(x, weights, center):
    """Give C J, (N, K, P)."""
    leaves = jax.tree.leaves(jax.jacobian(lambda p: net(p, x))(PARAMS))
    J = np.concatenate([np.asarray(j).reshape(len(x), 2, -1) for j in leaves], -1)
    if center:
        J = J - np.average(J, axis=0, weights=weights)
    return J if weights is None else np.sqrt(weights)[:, None, None] * J


def reduced(one, other, reduce):
    full = np.einsum("nkp,mlp->nmkl", one, other)
    return {
        "none": full,
        "diagonal": np.einsum("nmkk->nmk", full),
        "trace": np.einsum("nmkk->nm", full) / 2,
        "sum": np.einsum("nmkl->nm", full) / 2,
    }[reduce]


@pytest.mark.parametrize(("center", "weighted"), CASES)
@pytest.mark.parametrize("reduce", ["none", "diagonal", "trace", "sum"])
def test_the_kernel_is_that_of_the_sampled_derivatives(center, weighted, reduce):
    weights, others = (WEIGHTS, OTHERS) if weighted else (None, None)
    one, other = jacobian(X, weights, center), jacobian(OTHER, others, center)
    found = lazyjax.ntk(net, PARAMS, X, reduce=reduce, center=center, weights=weights)
    expected = reduced(one, one, reduce)
    assert found.shape == expected.shape
    scale = np.max(np.abs(reduced(jacobian(X, None, False), jacobian(X, None, False), reduce)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)
    square = lazyjax.matrix(found) if reduce == "none" else jnp.moveaxis(found, (0, 1), (-2, -1))
    np.testing.assert_array_equal(square, jnp.swapaxes(square, -1, -2))
    pair = (weights, others) if weighted else None
    found = lazyjax.ntk(net, PARAMS, X, OTHER, reduce=reduce, center=center, weights=pair)
    np.testing.assert_allclose(found, reduced(one, other, reduce), rtol=0, atol=1e-12 * scale)


def test_leaves_add_up():
    own = lazyjax.ntk(net, PARAMS, X, center=True, weights=WEIGHTS, per_leaf=True)
    whole = lazyjax.ntk(net, PARAMS, X, center=True, weights=WEIGHTS)
    np.testing.assert_allclose(sum(own.values()), whole, rtol=0, atol=1e-12 * np.max(whole))


def test_one_weight_of_a_pair_may_be_left_out():
    found = lazyjax.ntk(net, PARAMS, X, OTHER, center=True, weights=(None, OTHERS))
    expected = reduced(jacobian(X, None, True), jacobian(OTHER, OTHERS, True), "none")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.max(expected))


def test_weights_may_be_traced():
    found = jax.jit(lambda w: lazyjax.ntk(net, PARAMS, X, center=True, weights=w))(WEIGHTS)
    expected = reduced(*[jacobian(X, WEIGHTS, True)] * 2, "none")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.max(expected))


@pytest.mark.parametrize(("center", "weighted"), CASES)
@pytest.mark.parametrize("reduce", ["none", "trace", "sum"])
def test_an_operator_multiplies_as_its_kernel(center, weighted, reduce):
    weights, pair = (WEIGHTS, (WEIGHTS, OTHERS)) if weighted else (None, None)
    for x2, own in ((None, weights), (OTHER, pair)):
        options = {"reduce": reduce, "center": center, "weights": own}
        dense = lazyjax.matrix(lazyjax.ntk(net, PARAMS, X, x2, **options))
        A = lazyjax.ntk_operator(net, PARAMS, X, x2, **options)
        v, u = (jnp.cos(jnp.arange(size * 2.0)).reshape(size, 2) for size in A.shape[::-1])
        np.testing.assert_allclose(A @ v, dense @ v, rtol=0, atol=1e-11)
        np.testing.assert_allclose(A.T @ u, dense.T @ u, rtol=0, atol=1e-11)
        k = A.outputs
        rows = np.asarray(A.rows_of(jnp.array([2, 0])))
        chosen = [2 * k + i for i in range(k)] + list(range(k))
        np.testing.assert_allclose(rows, dense[np.array(chosen)], rtol=0, atol=1e-11)
        if x2 is None:
            shifted = lazyjax.ntk_operator(net, PARAMS, X, ridge=0.5, **options)
            np.testing.assert_allclose(shifted.diagonal(), np.diag(dense) + 0.5, rtol=0, atol=1e-11)
            assert A.psd


def test_a_kernel_in_memory_is_centered_as_an_operator():
    theta = lazyjax.ntk(net, PARAMS, X)
    A = centered(lazyjax.as_operator(theta), weights=WEIGHTS)
    dense = lazyjax.matrix(lazyjax.ntk(net, PARAMS, X, center=True, weights=WEIGHTS))
    np.testing.assert_allclose(A @ jnp.eye(12), dense, rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("reduce", ["none", "diagonal", "trace", "sum"])
def test_the_diagonal_is_that_of_the_kernel(reduce):
    whole = lazyjax.ntk(net, PARAMS, X, reduce=reduce, per_leaf=True)
    found = lazyjax.ntk_diagonal(net, PARAMS, X, reduce=reduce, per_leaf=True, batch_size=4)
    for name, own in found.items():
        expected = np.stack([np.asarray(whole[name])[i, i] for i in range(len(X))])
        assert own.shape == expected.shape
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12 * np.max(np.abs(expected)))
    together = lazyjax.ntk_diagonal(net, PARAMS, X, reduce=reduce)
    np.testing.assert_allclose(sum(found.values()), together, rtol=1e-12)


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


def test_a_stored_kernel_is_centered_as_an_operator(tmp_path):
    stored = lazyjax.kernel_store(net, PARAMS, X, path=tmp_path / "kernel", memory="1GiB")
    A = centered(stored.operator(), weights=WEIGHTS)
    dense = lazyjax.matrix(lazyjax.ntk(net, PARAMS, X, center=True, weights=WEIGHTS))
    np.testing.assert_allclose(A @ jnp.eye(12), dense, rtol=0, atol=1e-11)


def test_a_shift_that_is_traced_is_no_part_of_the_kernel():
    A = lazyjax.as_operator(jnp.diag(jnp.arange(1.0, 5.0)))
    multiply = jax.jit(lambda A: centered(A) @ jnp.eye(4))
    np.testing.assert_allclose(multiply(A), centered(A) @ jnp.eye(4), rtol=1e-12)
    assert np.all(np.isnan(multiply(A + 1.0)))
    held = jax.jit(lambda v: centered(A) @ v)(jnp.eye(4))
    np.testing.assert_allclose(held, centered(A) @ jnp.eye(4), rtol=1e-12)
