"""Kernels in a diagonal metric, against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lazyjax
from lazyjax.kernels import METHODS

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 7), "b": (7,), "c": (7, 7), "d": (7, 2), "e": (2,)}
PARAMS = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
NUMBERS = {name: float(i + 1) / 3 for i, name in enumerate(SHAPES)}
ARRAYS = {name: jnp.asarray(RNG.uniform(0.1, 2, size=shape)) for name, shape in SHAPES.items()}
METRICS = {
    "numbers": NUMBERS,
    "arrays": ARRAYS,
    "both": {**NUMBERS, "b": ARRAYS["b"], "c": ARRAYS["c"]},
    "a bias alone": {**NUMBERS, "e": ARRAYS["e"]},
    "one number": 3,
}
X, OTHER = jnp.asarray(RNG.normal(size=(6, 3))), jnp.asarray(RNG.normal(size=(4, 3)))


def net(p, x):  # c is tied, and used transposed
    h = jnp.tanh(x @ p["a"] + p["b"][None])
    h = jnp.tanh(h @ p["c"]) @ p["c"].T
    return h @ p["d"] + p["e"][None]


def jacobians(x):
    tree = jax.jacobian(lambda p: net(p, x))(PARAMS)
    return {name: np.asarray(j).reshape(len(x), 2, -1) for name, j in tree.items()}


def expected(metric, x1, x2):
    full = metric if isinstance(metric, dict) else dict.fromkeys(SHAPES, metric)
    one, other = jacobians(x1), jacobians(x2)
    return {
        name: np.einsum(
            "nkp,p,mlp->nmkl",
            one[name],
            np.broadcast_to(full[name], SHAPES[name]).reshape(-1),
            other[name],
        )
        for name in SHAPES
    }


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("method", METHODS)
def test_the_kernel_is_that_of_the_metric(name, method):
    metric = METRICS[name]
    for x2 in (None, OTHER):
        wanted = expected(metric, X, X if x2 is None else x2)
        found = lazyjax.ntk(net, PARAMS, X, x2, metric=metric, method=method)
        close(found, sum(wanted.values()))
        own = lazyjax.ntk(net, PARAMS, X, x2, metric=metric, method=method, per_leaf=True)
        for leaf, kernel in own.items():
            close(kernel, wanted[leaf])
    trace = lazyjax.ntk(net, PARAMS, X, metric=metric, method=method, reduce="trace")
    close(trace, np.einsum("nmkk->nm", sum(expected(metric, X, X).values())) / 2)


def test_a_metric_is_a_change_of_variables():
    """The kernel of f(sqrt(M) v) at v = M^(-1/2) w."""
    scaled = {name: jnp.sqrt(m) for name, m in ARRAYS.items()}
    v = jax.tree.map(lambda w, r: w / r, PARAMS, scaled)
    moved = lazyjax.ntk(lambda v, x: net(jax.tree.map(jnp.multiply, v, scaled), x), v, X)
    close(lazyjax.ntk(net, PARAMS, X, metric=ARRAYS), moved)


def test_it_is_the_kernel_of_one_small_step_of_adam():
    """With its moments frozen, outputs move by -eta Theta_M dL/df: an order of convergence."""
    state = ARRAYS
    metric = jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + 1e-8), state)
    residual = net(PARAMS, X) - 1.0
    gradient = jax.vjp(lambda p: net(p, X), PARAMS)[1](residual)[0]
    kernel = lazyjax.ntk(net, PARAMS, X, metric=metric)
    first = -jnp.einsum("nmkl,ml->nk", kernel, residual)
    errors = []
    for rate in (1e-3, 5e-4):
        step = jax.tree.map(lambda g, m, rate=rate: -rate * m * g, gradient, metric)
        moved = net(optax.apply_updates(PARAMS, step), X) - net(PARAMS, X)
        errors.append(float(jnp.max(jnp.abs(moved / rate - first))))
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_a_metric_may_be_a_function_of_the_path():
    found = lazyjax.ntk(net, PARAMS, X, metric=lambda path: NUMBERS[path])
    close(found, sum(expected(NUMBERS, X, X).values()))


def test_a_metric_may_be_traced():
    found = jax.jit(lambda m: lazyjax.ntk(net, PARAMS, X, metric=m))(ARRAYS)
    close(found, sum(expected(ARRAYS, X, X).values()))


def test_the_kernel_of_sign_descent_has_the_signs_of_one_side():
    one, other = (np.concatenate(list(jacobians(x).values()), -1) for x in (X, OTHER))
    found = lazyjax.ntk(net, PARAMS, X, OTHER, metric="sign")
    close(found, np.einsum("nkp,mlp->nmkl", one, np.sign(other)))
    found = lazyjax.ntk(net, PARAMS, X, metric="sign", batch_size=4)
    close(found, np.einsum("nkp,mlp->nmkl", one, np.sign(one)))
    summed = one.sum(1)
    found = lazyjax.ntk(net, PARAMS, X, metric="sign", reduce="sum")
    close(found, summed @ np.sign(summed).T / 2)


@pytest.mark.parametrize(
    ("metric", "options", "kind", "text"),
    [
        ("adam", {}, ValueError, "`metric` must be numbers for each leaf, or 'sign'"),
        ("sign", {"method": "structured_derivatives"}, ValueError, "`method` must be jacobian_con"),
        ("sign", {"complex": "real"}, ValueError, "`complex` must be None for metric='sign'"),
        (-1.0, {}, ValueError, "`metric of a` must be positive"),
        ({**NUMBERS, "c": 0.0}, {}, ValueError, "`metric of c` must be positive"),
        ({**NUMBERS, "c": jnp.ones(7)}, {}, ValueError, "`metric of c` must be one number or have"),
        ({**NUMBERS, "c": 1j}, {}, TypeError, "`metric of c` must be real"),
        ({"a": 1.0}, {}, ValueError, "`metric` must be a function of a path, or have"),
    ],
)
def test_bad_metrics_are_refused(metric, options, kind, text):
    with pytest.raises(kind, match=text):
        lazyjax.ntk(net, PARAMS, X, metric=metric, **options)
