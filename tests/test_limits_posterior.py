from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.linalg import expm
from thoroughness import few

from lazyjax.limits import Infinite, infinite
from lazyjax.limits.posterior import gp
from lazyjax.operators import NotConverged, as_operator, nystrom, operator

N, M = 6, 4
TIMES = np.array([[0, 1, 2], [9, 100, 1000]])
RATE = 0.7


class Problem(NamedTuple):
    """Kernels of N training and then M test points, and targets."""

    nngp: np.ndarray
    ntk: np.ndarray
    y: np.ndarray

    def of(self, rows, columns):
        return Infinite(
            *(jnp.asarray(k[rows, columns]) for k in (self.nngp, self.ntk)), jnp.zeros(())
        )

    @property
    def train(self):
        return self.of(slice(N), slice(N))

    @property
    def test(self):
        return {
            "test_train": self.of(slice(N, None), slice(N)),
            "test": self.of(slice(N, None), slice(N, None)),
        }


def problem(out=(2,), *, rank=40):
    rng = np.random.default_rng(0)
    first, last = rng.normal(size=(N + M, rank)), rng.normal(size=(N + M, 15))
    last = last @ last.T / 15
    return Problem(last, last + first @ first.T / rank, rng.normal(size=(N, *out)))


def rate_of(p, eta=1.0):
    return 2 * eta / p.y.size


def stepwise(p, steps, *, eta, ridge):
    """The slow reference: f = A f0 + b at all points, through each step of the weights."""
    K, theta, y = p.nngp, p.ntk, p.y.reshape(N, -1)
    A, b = np.eye(N + M), np.zeros((N + M, y.shape[1]))
    means, covariances = [b], [K]
    for _ in range(steps):
        pull, force = A - np.eye(N + M), theta[:, :N] @ A[:N]
        A, b = (
            A - rate_of(p, eta) * (force + ridge * pull),
            b - rate_of(p, eta) * (theta[:, :N] @ (b[:N] - y) + ridge * b),
        )
        means.append(b)
        covariances.append(A @ K @ A.T)
    return np.array(means), np.array(covariances)


def both(p, **options):
    """Give the process at the training points, and at the test points."""
    return gp(p.train, p.y, **options), gp(p.train, p.y, **p.test, **options)


def near(found, mean, covariance, tolerance=1e-10):
    assert found.mean.shape == mean.shape
    assert found.covariance.shape == covariance.shape
    np.testing.assert_allclose(found.mean, mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.covariance, covariance, rtol=tolerance, atol=tolerance)


@few("ridge", [0.3, 0.0])
@few("out", [(3,), (1,)])
def test_descent_is_that_of_an_ensemble_step_by_step(out, ridge):
    p = problem(out)
    means, covariances = stepwise(p, 1000, eta=RATE, ridge=ridge)
    train, test = both(p, t=TIMES, learning_rate=RATE, ridge=ridge)
    near(train, means[TIMES][..., :N, :], covariances[TIMES][..., :N, :N])
    near(test, means[TIMES][..., N:, :], covariances[TIMES][..., N:, N:])
    assert np.abs(covariances[9] - covariances[0]).max() > 0.1


@pytest.mark.thorough
def test_an_ensemble_of_tangent_models_has_this_mean_and_covariance():
    rng = np.random.default_rng(1)
    J, features = rng.normal(size=(N + M, 30)), rng.normal(size=(N + M, 8))
    p = Problem(features @ features.T, J @ J.T, rng.normal(size=(N, 1)))
    eta, steps, members = 0.02, 50, 20_000
    f0 = features @ rng.normal(size=(8, members))
    w = np.zeros((30, members))  # each member's weights less those at its start
    for _ in range(steps):
        w = w - rate_of(p, eta) * J[:N].T @ (f0 + J @ w - np.pad(p.y, ((0, M), (0, 0))))[:N]
    outputs = (f0 + J @ w)[N:]
    found = gp(p.train, p.y, **p.test, t=steps, learning_rate=eta)
    spread = np.sqrt(np.diag(found.covariance))
    error = np.abs(outputs.mean(1) - found.mean[:, 0]) / spread
    assert error.max() < 5 / members**0.5
    sampled = (np.cov(outputs) - found.covariance) / np.outer(spread, spread)
    assert np.abs(sampled).max() < 8 / members**0.5


@few("ridge", [0.3, 0.0])
def test_the_flow_is_the_matrix_exponential(ridge):
    p = problem()
    times = np.array([0.0, 0.5, 20.0])
    theta, K = p.ntk[:N, :N] + ridge * np.eye(N), p.nngp
    train, test = both(p, t=times, ridge=ridge)
    assert train.mean.shape == (3, N, 2)
    for i, t in enumerate(times):
        S = (np.eye(N) - expm(-rate_of(p) * t * theta)) @ np.linalg.inv(theta)
        P = p.ntk[:, :N] @ S
        A = np.eye(N + M) - np.pad(P, ((0, 0), (0, M)))
        mean, covariance = P @ p.y, A @ K @ A.T
        near(jax.tree.map(lambda a, i=i: a[i], train), mean[:N], covariance[:N, :N])
        near(jax.tree.map(lambda a, i=i: a[i], test), mean[N:], covariance[N:, N:])


def test_descent_of_small_steps_meets_the_flow_with_slope_one():
    p = problem()
    flow = gp(p.train, p.y, **p.test, t=4.0)
    steps = np.array([40, 80, 160, 320])
    errors = []
    for s in steps:
        descent = gp(p.train, p.y, **p.test, t=int(s), learning_rate=4.0 / s)
        errors.append(float(jnp.linalg.norm(descent.covariance - flow.covariance)))
    np.testing.assert_allclose(np.diff(np.log(errors)) / np.diff(np.log(4.0 / steps)), 1, atol=0.05)


@few("ridge", [0.3, 0.0])
@few("rate", [None, RATE])
def test_the_start_is_the_nngp_process(rate, ridge):
    p = problem()
    train, test = both(p, t=0, learning_rate=rate, ridge=ridge)
    near(train, np.zeros((N, 2)), p.nngp[:N, :N], 1e-14)
    near(test, np.zeros((M, 2)), p.nngp[N:, N:], 1e-14)


@pytest.mark.thorough
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rate", [None, RATE])
def test_the_end_is_a_solve(rate, ridge):
    p = problem()
    P = np.linalg.solve(p.ntk[:N, :N] + ridge * np.eye(N), p.ntk[:N]).T
    A = np.eye(N + M) - np.pad(P, ((0, 0), (0, M)))
    mean, covariance = P @ p.y, A @ p.nngp @ A.T
    train, test = both(p, learning_rate=rate, ridge=ridge)
    near(train, mean[:N], covariance[:N, :N])
    near(test, mean[N:], covariance[N:, N:])
    late, far = both(p, t=np.array([10**6, np.inf]), learning_rate=rate, ridge=ridge)
    near(jax.tree.map(lambda a: a[0], late), train.mean, train.covariance)
    near(jax.tree.map(lambda a: a[1], far), test.mean, test.covariance, 1e-13)
    if ridge == 0:
        near(train, p.y, np.zeros((N, N)))


@few("ridge", [0.5, 0.0, 1e-3], 2)
def test_the_posterior_is_that_of_the_textbook(ridge):
    p = problem()
    K = p.nngp
    inner = np.linalg.inv(K[:N, :N] + ridge * np.eye(N))
    mean, covariance = K[:, :N] @ inner @ p.y, K - K[:, :N] @ inner @ K[:N]
    train, test = both(p, by="nngp", ridge=ridge)
    near(train, mean[:N], covariance[:N, :N], 1e-9)
    near(test, mean[N:], covariance[N:, N:], 1e-9)


def test_the_posterior_without_noise_is_the_last_layer_trained_alone():
    p = problem()
    bayes = both(p, by="nngp")
    trained = both(p._replace(ntk=p.nngp))
    for a, b in zip(bayes, trained, strict=True):
        near(a, b.mean, b.covariance, 1e-12)


def test_the_posterior_needs_no_ntk_and_takes_leading_axes():
    p = problem()
    bare = {name: record._replace(ntk=None) for name, record in p.test.items()}
    t = np.full((2, 1), np.inf)
    found = gp(p.train._replace(ntk=None), p.y, **bare, by="nngp", ridge=0.1, t=t)
    once = gp(p.train, p.y, **p.test, by="nngp", ridge=0.1)
    near(found, np.tile(once.mean, (2, 1, 1, 1)), np.tile(once.covariance, (2, 1, 1, 1)))


@pytest.mark.thorough
@pytest.mark.parametrize("by", ["nngp", "ntk"])
@pytest.mark.parametrize("ridge", [1e-2, 0.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_covariances_are_symmetric_and_positive(by, ridge, dtype):
    p = Problem(*(a.astype(dtype) for a in problem()))
    eps = np.finfo(dtype).eps
    for options in ({}, *({"t": TIMES, "learning_rate": r} for r in (None, RATE) if by == "ntk")):
        for found in both(p, by=by, ridge=ridge, **options):
            assert found.mean.dtype == found.covariance.dtype == dtype
            covariance = np.asarray(found.covariance)
            np.testing.assert_array_equal(covariance, covariance.swapaxes(-1, -2))
            least = np.linalg.eigvalsh(covariance.astype(float)).min()
            assert least > -20 * eps * np.linalg.norm(p.nngp)


def test_a_direction_without_kernel_stays_as_it_was_at_the_start():
    p = problem(rank=1)
    p = p._replace(ntk=p.ntk - p.nngp)  # of rank one
    value, vector = np.linalg.norm(p.ntk[:N, :N]), np.linalg.eigh(p.ntk[:N, :N])[1][:, -1]
    P = p.ntk[:, :N] @ np.outer(vector, vector) / value
    A = np.eye(N + M) - np.pad(P, ((0, 0), (0, M)))
    mean, covariance = P @ p.y, A @ p.nngp @ A.T
    for t in (1e9, np.inf):
        train, test = both(p, t=t)
        near(train, mean[:N], covariance[:N, :N])
        near(test, mean[N:], covariance[N:, N:])
    with pytest.warns(UserWarning, match="`ridge` is 1.0e-18, below the rounding of the kernel"):
        gp(p.train, p.y, ridge=1e-18)


def test_outputs_may_have_several_axes_or_none():
    p = problem((2, 3))
    flat = p._replace(y=p.y.reshape(N, 6))
    found, other = (gp(q.train, q.y, **q.test, t=[1.0, 7.0]) for q in (p, flat))
    near(found, other.mean.reshape(2, M, 2, 3), other.covariance, 1e-14)
    bare = p._replace(y=p.y[:, 0, 0])
    column = bare._replace(y=bare.y[:, None])
    near(
        gp(bare.train, bare.y, t=3.0),
        gp(column.train, column.y, t=3.0).mean[:, 0],
        gp(column.train, column.y, t=3.0).covariance,
        1e-14,
    )


@pytest.mark.thorough
def test_it_works_under_jit_and_vmap_and_widens_half_precision():
    p = problem()

    @jax.jit
    def at(train, y, t, rate, ridge):
        return gp(train, y, **p.test, t=t, learning_rate=rate, ridge=ridge)

    rates, t = jnp.array([0.2, RATE]), jnp.array([3.0, jnp.inf])
    every = jax.vmap(at, (None, None, None, 0, None))(p.train, p.y, t, rates, 0.1)
    for i, rate in enumerate(rates):
        one = gp(p.train, p.y, **p.test, t=np.array([3, np.inf]), learning_rate=rate, ridge=0.1)
        near(jax.tree.map(lambda a, i=i: a[i], every), one.mean, one.covariance)
    bayes = jax.jit(partial(gp, by="nngp", ridge=0.2))(p.train, p.y)
    near(bayes, *gp(p.train, p.y, by="nngp", ridge=0.2))
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16), (p.train, p.y))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    assert gp(*half, t=2.0).covariance.dtype == jnp.float32
    near(gp(*half, t=2.0), *gp(*wide, t=2.0))


def matrix_free(kernel):
    """Give an operator that is known by products alone."""
    product = Partial(lambda square, v: square @ v, jnp.asarray(kernel))
    return operator(product, product, shape=kernel.shape, dtype=kernel.dtype, psd=True)


@few("by", ["ntk", "nngp"])
@few("ridge", [0.3, 0.0])
@few("make", [matrix_free, as_operator])
def test_an_operator_gives_what_the_arrays_give(by, ridge, make):
    p = problem()
    dense = gp(p.train, p.y, **p.test, by=by, ridge=ridge)
    operators = p.train._replace(nngp=make(p.train.nngp), ntk=make(p.train.ntk))
    found = gp(operators, p.y, **p.test, by=by, ridge=ridge, tolerance=1e-11)
    near(found, dense.mean, dense.covariance, 1e-8)
    t = np.full(3, np.inf)
    repeated = gp(operators, p.y, **p.test, by=by, ridge=ridge, t=t, tolerance=1e-11)
    near(repeated, np.tile(found.mean, (3, 1, 1)), np.tile(found.covariance, (3, 1, 1)))
    mixed = p.train._replace(ntk=make(p.train.ntk))
    near(gp(mixed, p.y, **p.test, by=by, ridge=ridge, tolerance=1e-11), *dense, 1e-8)


@pytest.mark.thorough
def test_a_preconditioner_and_a_number_of_products_reach_the_solve():
    p = problem()
    operators = p.train._replace(ntk=as_operator(p.train.ntk))
    P = nystrom(jax.random.key(0), as_operator(p.train.ntk, ridge=0.1), rank=N)
    dense = gp(p.train, p.y, **p.test, ridge=0.1)
    options = {"ridge": 0.1, "iterations": 3, "tolerance": 1e-10}
    near(gp(operators, p.y, **p.test, **options, preconditioner=P), *dense, 1e-8)
    with pytest.raises(NotConverged, match="after 3 iterations"):
        gp(operators, p.y, **p.test, **options)


@pytest.mark.thorough
def test_it_takes_the_kernels_of_a_network():
    def f(w, x):
        return jnp.maximum(x @ w[0] / 3**0.5, 0) @ w[1] / 8

    w = jnp.zeros((3, 64)), jnp.zeros((64, 2))
    x, x_test = (jax.random.normal(jax.random.key(i), (n, 3)) for i, n in ((0, N), (1, M)))
    kernels = partial(infinite, f, w, variance=2.0)
    train, pair = kernels(x), {"test_train": kernels(x_test, x), "test": kernels(x_test)}
    y = jnp.stack([x[:, 0], x[:, 1] * x[:, 2]], axis=1)
    end = gp(train, y)
    near(end, y, np.zeros((N, N)), 1e-9)
    far = gp(train, y, **pair)
    assert far.mean.shape == (M, 2)
    before, after = np.diag(pair["test"].nngp), np.diag(far.covariance)
    assert np.all(after > 0)
    assert after.sum() < before.sum()


P0 = problem()
BLIND = Infinite(np.eye(N), np.eye(N), np.zeros(()))
SKEW = np.eye(N) + np.eye(N, k=1)
OPERATORS = BLIND._replace(nngp=as_operator(np.eye(N)), ntk=as_operator(np.eye(N)))


def changed(name, **fields):
    return P0.test | {name: P0.test[name]._replace(**fields)}


BAD = {
    "no such kernel": (BLIND, {"by": "ntks"}, ValueError, "`by` must be one of ntk, nngp"),
    "a negative ridge": (BLIND, {"ridge": -1.0}, ValueError, "`ridge` must be 0 or more"),
    "a negative rate": (BLIND, {"learning_rate": -1.0}, ValueError, "`learning_rate` must be pos"),
    "a negative time": (BLIND, {"t": -1.0}, ValueError, "`t` must be 0 or more"),
    "half a step": (
        BLIND,
        {"t": 0.5, "learning_rate": 0.1},
        ValueError,
        "`t` must be whole steps.*or no `learning_rate` for times",
    ),
    "an end that is not reached": (
        BLIND,
        {"learning_rate": 2.1 * N * 2 / 2},
        ValueError,
        "`t` must be finite above the critical.*or use no `learning_rate`",
    ),
    "a time of the posterior": (
        BLIND,
        {"by": "nngp", "t": 1.0},
        ValueError,
        "`t` must be infinity, and `learning_rate` None, of the posterior, got 1.0 and None",
    ),
    "a rate of the posterior": (
        BLIND,
        {"by": "nngp", "learning_rate": 0.1},
        ValueError,
        "of the posterior, got inf and 0.1",
    ),
    "a time with operators": (
        OPERATORS,
        {"t": 1.0} | P0.test,
        ValueError,
        "`t` must be infinity, .* with operators, got 1.0 and None. Use arrays",
    ),
    "a rate with operators": (
        OPERATORS,
        {"learning_rate": 0.1} | P0.test,
        ValueError,
        "with operators, got inf and 0.1",
    ),
    "test points alone": (
        BLIND,
        {"test": P0.test["test"]},
        ValueError,
        "`test_train` and `test` must be given both.*got NoneType and Infinite",
    ),
    "test points halfway": (
        BLIND,
        {"test_train": P0.test["test_train"]},
        ValueError,
        "must be given both.*got Infinite and NoneType",
    ),
    "operators without test points": (OPERATORS, {}, ValueError, "where `train` has arrays, got"),
    "a kernel of other points": (
        BLIND._replace(ntk=np.eye(N + 1)),
        {},
        ValueError,
        r"`train.ntk` must have shape \(6, 6\), got \(7, 7\). Use infinite\(f, params, x_train",
    ),
    "a kernel of integers": (
        BLIND._replace(nngp=np.eye(N, dtype=int)),
        {},
        TypeError,
        "`train.nngp` must hold floats",
    ),
    "NaN in the kernel": (
        BLIND._replace(nngp=np.nan * np.eye(N)),
        {},
        ValueError,
        "`train.nngp` must be finite",
    ),
    "a skew NTK": (BLIND._replace(ntk=SKEW), {}, ValueError, "`train.ntk` must be symmetric"),
    "a skew NNGP": (BLIND._replace(nngp=SKEW), {}, ValueError, "`train.nngp` must be symmetric"),
    "a skew kernel beside an operator": (
        OPERATORS._replace(nngp=SKEW),
        P0.test,
        ValueError,
        "`train.nngp` must be symmetric",
    ),
    "a transposed kernel": (
        BLIND,
        changed("test_train", ntk=np.ones((N, M))),
        ValueError,
        r"`test_train.ntk` must have shape \(4, 6\), got \(6, 4\). Use .* x_test, x_train",
    ),
    "a row of test points": (
        BLIND,
        changed("test", nngp=np.ones(M)),
        ValueError,
        r"`test.nngp` must have shape \(4, 4\), got \(4,\)",
    ),
    "no test points": (
        BLIND,
        changed("test", nngp=np.ones(())),
        ValueError,
        r"`test_train.nngp` must have shape \(1, 6\)",
    ),
    "an operator of test points": (
        OPERATORS,
        changed("test_train", nngp=as_operator(np.ones((M, N)))),
        TypeError,
        "`test_train.nngp` must be an array, got a KernelOperator",
    ),
    "an operator of other points": (
        OPERATORS._replace(ntk=as_operator(np.eye(N + 1))),
        P0.test,
        ValueError,
        r"`train.ntk` must have shape \(6, 6\) and be positive semi-definite, got \(7, 7\)",
    ),
    "an operator that is not positive": (
        OPERATORS._replace(nngp=-1 * as_operator(np.eye(N))),
        P0.test,
        ValueError,
        "`train.nngp` must have .* psd=False",
    ),
    "a ridge inside the operator": (
        OPERATORS._replace(ntk=as_operator(np.eye(N), ridge=0.5)),
        P0.test,
        ValueError,
        "`train.ntk` must be without a shift, got 0.5. Pass it as `ridge`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_problems_are_refused(name):
    train, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        gp(train, P0.y, **options)


def test_bad_targets_are_refused():
    with pytest.raises(TypeError, match="`y` must hold floats"):
        gp(BLIND, np.ones((N, 1), int))
    with pytest.raises(ValueError, match="`y` must be finite, got 6 values"):
        gp(BLIND, np.full((N, 1), np.nan))
    with pytest.raises(ValueError, match="`y` must have the batch on axis 0"):
        gp(BLIND, np.float64(1.0))
    with pytest.raises(ValueError, match=r"`train.nngp` must have shape \(5, 5\)"):
        gp(BLIND, np.ones((5, 1)))


def test_what_is_traced_is_refused_where_it_has_to_be_known():
    with pytest.raises(TypeError, match="`train` must be known to gp with operators"):
        jax.jit(lambda y: gp(OPERATORS, y, **P0.test))(P0.y)
    with pytest.raises(ValueError, match="`t` must be infinity"):
        jax.jit(lambda t: gp(BLIND, P0.y, by="nngp", t=t))(np.inf)
