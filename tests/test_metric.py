"""Kernels in a diagonal metric, against dense Jacobians."""

from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernel_reference import quickly
from thoroughness import few

import lazyjax
from lazyjax.kernels import METHODS

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 7), "b": (7,), "c": (7, 7), "d": (7, 2), "e": (2,)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
NUMBERS = {name: float(i + 1) / 3 for i, name in enumerate(SHAPES)}
ARRAYS = {name: RNG.uniform(0.1, 2, size=shape) for name, shape in SHAPES.items()}
METRICS = {
    "numbers": NUMBERS,
    "arrays": ARRAYS,
    "both": {**NUMBERS, "b": ARRAYS["b"], "c": ARRAYS["c"]},
    "a bias alone": {**NUMBERS, "e": ARRAYS["e"]},
    "one number": 3,
}
X, OTHER = RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))


def net(p, x):  # c is tied, and used transposed
    h = jnp.tanh(x @ p["a"] + p["b"][None])
    h = jnp.tanh(h @ p["c"]) @ p["c"].T
    return h @ p["d"] + p["e"][None]


@lru_cache
def jacobians():
    """Give dy / dw (N, K, P) of each leaf at x and at the other inputs."""
    both = np.concatenate([X, OTHER])
    tree = quickly(jax.jacobian(net), PARAMS, both)
    found = {name: j.reshape(len(both), 2, -1) for name, j in tree.items()}
    return [{name: j[rows] for name, j in found.items()} for rows in np.s_[: len(X), len(X) :]]


def expected(metric, between=False):
    full = metric if isinstance(metric, dict) else dict.fromkeys(SHAPES, metric)
    one, other = jacobians() if between else [jacobians()[0]] * 2
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


def rows(first):
    return sorted(product(METRICS, METHODS), key=lambda row: row != first)


@few(("name", "method"), rows(("a bias alone", "structured_derivatives")))
def test_the_kernel_is_that_of_the_metric(name, method):
    metric = METRICS[name]

    def kernels(p, x2):
        return [lazyjax.ntk(net, p, X, x, metric=metric, method=method) for x in (None, x2)]

    own, between = quickly(kernels, PARAMS, OTHER)
    close(own, sum(expected(metric).values()))
    close(between, sum(expected(metric, between=True).values()))


@few(("name", "method"), rows(("both", "structured_derivatives")))
def test_the_kernels_of_the_leaves_are_those_of_the_metric(name, method):
    metric = METRICS[name]

    def kernels(p, x2):
        return [
            lazyjax.ntk(net, p, X, x, metric=metric, method=method, per_leaf=True)
            for x in (None, x2)
        ]

    own, between = quickly(kernels, PARAMS, OTHER)
    for found, wanted in ((own, expected(metric)), (between, expected(metric, between=True))):
        for leaf, kernel in found.items():
            close(kernel, wanted[leaf])


@few(("name", "method"), rows(("numbers", "jacobian_contraction")))
def test_a_kernel_in_a_metric_is_reduced(name, method):
    metric = METRICS[name]
    trace = lazyjax.ntk(net, PARAMS, X, metric=metric, method=method, reduce="trace")
    close(trace, np.einsum("nmkk->nm", sum(expected(metric).values())) / 2)


def test_a_metric_is_a_change_of_variables():
    """The kernel of f(sqrt(M) v) at v = M^(-1/2) w."""
    scaled = {name: np.sqrt(m) for name, m in ARRAYS.items()}
    v = {name: jnp.asarray(np.asarray(w) / scaled[name]) for name, w in PARAMS.items()}
    moved = lazyjax.ntk(lambda v, x: net(jax.tree.map(jnp.multiply, v, scaled), x), v, X)
    close(lazyjax.ntk(net, PARAMS, X, metric=ARRAYS), np.asarray(moved))


def test_it_is_the_kernel_of_one_small_step_of_adam():
    """With its moments frozen, outputs move by -eta Theta_M dL/df: an order of convergence."""
    metric = {name: jnp.asarray(1 / (np.sqrt(v) + 1e-8)) for name, v in ARRAYS.items()}

    def outputs(p):
        return net(p, X)

    y, pullback = jax.vjp(jax.jit(outputs), PARAMS)
    residual = np.asarray(y) - 1.0
    (gradient,) = pullback(residual)
    kernel = lazyjax.ntk(net, PARAMS, X, metric=metric)
    first = -np.einsum("nmkl,ml->nk", kernel, residual)
    errors = []
    for rate in (1e-3, 5e-4):
        step = {name: -rate * np.asarray(m) * gradient[name] for name, m in metric.items()}
        moved = jax.jit(outputs)(optax.apply_updates(PARAMS, step)) - y
        errors.append(float(np.max(np.abs(moved / rate - first))))
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_a_metric_may_be_a_function_of_the_path():
    found = lazyjax.ntk(net, PARAMS, X, metric=lambda path: NUMBERS[path])
    close(found, sum(expected(NUMBERS).values()))


def test_a_metric_may_be_traced():
    found = jax.jit(lambda m: lazyjax.ntk(net, PARAMS, X, metric=m))(ARRAYS)
    close(found, sum(expected(ARRAYS).values()))


SIGNS = [(OTHER, {}), (None, {"batch_size": 4}), (None, {"reduce": "sum"})]


@few(("x2", "options"), SIGNS)
def test_the_kernel_of_sign_descent_has_the_signs_of_one_side(x2, options):
    one, other = (np.concatenate(list(j.values()), -1) for j in jacobians())
    other = one if x2 is None else other
    if "reduce" in options:
        expected = one.sum(1) @ np.sign(other.sum(1)).T / 2
    else:
        expected = np.einsum("nkp,mlp->nmkl", one, np.sign(other))
    close(lazyjax.ntk(net, PARAMS, X, x2, metric="sign", **options), expected)


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
