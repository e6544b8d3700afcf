import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax.kernels import matrix, ntk
from lazyjax.spectrum import (
    critical_learning_rate,
    effective_rank,
    eigenvalues,
    largest_eigenvalue,
    numerical_rank,
    wishart_edge,
)


def model(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (2, 6), "b": (6, 6), "c": (6, 3)}
    params = {
        name: jax.random.normal(k, s) for (name, s), k in zip(shapes.items(), keys, strict=False)
    }
    return params, jax.random.normal(keys[3], (7, 2))


def test_eigenvalues_are_those_of_the_matrix_of_the_kernel(problem):
    kernel = ntk(model, *problem)
    assert eigenvalues(kernel).shape == (21,)
    np.testing.assert_allclose(eigenvalues(kernel), np.linalg.eigvalsh(matrix(kernel)), rtol=1e-12)


def test_the_numerical_rank_counts_what_rounding_cannot_explain():
    a = np.asarray(jax.random.normal(jax.random.key(1), (30, 8)))
    assert numerical_rank(jnp.asarray(a @ a.T)) == 8
    assert numerical_rank(jnp.eye(5)) == 5


@pytest.mark.parametrize(
    ("values", "rank"), [([1.0, 1, 1, 1], 4), ([5.0, 0, 0], 1), ([2.0, 2, 0], 2)]
)
def test_the_effective_rank_counts_equal_eigenvalues(values, rank):
    assert effective_rank(jnp.diag(jnp.array(values))) == pytest.approx(rank)


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    p = np.array([0.7, 0.2, 0.1])
    assert effective_rank(3 * jnp.diag(jnp.asarray(p))) == pytest.approx(np.exp(-(p @ np.log(p))))


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.0, True), (0.5, False), (0.9, False), (0.9, True)]
)
def test_descent_is_stable_just_below_the_critical_learning_rate_and_not_above(
    momentum, nesterov, problem
):
    kernel = ntk(model, *problem)
    theta = matrix(kernel)
    critical = critical_learning_rate(kernel, momentum=momentum, nesterov=nesterov)
    start = jnp.linalg.eigh(theta)[1][:, -1]

    def size(rate):
        optimizer = optax.sgd(rate, momentum=momentum, nesterov=nesterov)

        def step(carry, _):
            f, state = carry  # preconditioned: f moves by Theta times the update of a
            updates, state = optimizer.update(2 / 21 * theta @ f, state)
            return (f + updates, state), None

        (f, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=4000)
        return jnp.linalg.norm(f)

    assert size(0.99 * critical) < 1e-3
    assert not size(1.01 * critical) < 1e3


def test_ridge_and_outputs_enter_the_critical_learning_rate(problem):
    kernel = ntk(model, *problem)
    top = eigenvalues(kernel)[-1]
    rate = critical_learning_rate(kernel, ridge=3.0)
    assert rate == pytest.approx(float(21 / (top + 3)))
    shared = ntk(model, *problem, reduce="trace")
    rate = critical_learning_rate(shared, outputs=3)
    assert rate == pytest.approx(float(21 / jnp.linalg.eigvalsh(shared)[-1]))


@pytest.mark.parametrize("batched", [False, True])
def test_power_iteration_meets_the_largest_eigenvalue_from_below(problem, batched):
    params, x = problem
    exact = float(eigenvalues(ntk(model, params, x))[-1])
    found = float(largest_eigenvalue(model, params, x))
    if batched:
        stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
        found = float(jax.vmap(lambda w: largest_eigenvalue(model, w, x))(stacked)[0])
    assert exact * (1 - 1e-4) < found < exact * (1 + 1e-10)


def test_power_iteration_needs_no_forward_rule(problem):
    @jax.custom_vjp
    def sine(h):
        return jnp.sin(h)

    sine.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))
    params, x = problem
    a = largest_eigenvalue(lambda w, x: sine(model(w, x)), params, x)
    b = largest_eigenvalue(lambda w, x: jnp.sin(model(w, x)), params, x)
    assert a == pytest.approx(float(b), rel=1e-6)


def test_a_model_without_derivative_has_eigenvalue_zero(problem):
    assert largest_eigenvalue(lambda w, x: jax.lax.stop_gradient(model(w, x)), *problem) == 0


def test_the_edge_of_the_wishart_spectrum_is_marchenko_and_pasturs():
    assert wishart_edge(100, 100).edge == pytest.approx(4.0)
    found = wishart_edge(100, 5000)
    assert found.edge == pytest.approx((1 + 0.02**0.5) ** 2)
    assert found.mean == pytest.approx(found.edge - 1.2065335745820 * found.scale)
    assert found.scale == pytest.approx(0.00783, rel=1e-3)


BAD = {
    "a long kernel": (lambda: eigenvalues(jnp.zeros((2, 3))), ValueError, r"got \(2, 3\)"),
    "half the outputs": (
        lambda: eigenvalues(jnp.zeros((2, 2, 3))),
        ValueError,
        "`kernel` must have",
    ),
    "no outputs": (
        lambda: critical_learning_rate(jnp.eye(2)),
        ValueError,
        "`outputs` must be given",
    ),
    "other outputs": (
        lambda: critical_learning_rate(jnp.zeros((2, 2, 3, 3)), outputs=2),
        ValueError,
        "`outputs` must be 3, as the kernel has it, got 2",
    ),
    "momentum 1": (
        lambda: critical_learning_rate(jnp.eye(2), outputs=1, momentum=1.0),
        ValueError,
        r"`momentum` must be in \[0, 1\), got 1.0",
    ),
    "a negative ridge": (
        lambda: critical_learning_rate(jnp.eye(2), outputs=1, ridge=-1.0),
        ValueError,
        "`ridge` must be 0 or more",
    ),
    "integer parameters": (
        lambda: largest_eigenvalue(lambda w, x: w * x, jnp.ones((), int), jnp.ones((2, 1))),
        TypeError,
        "`params` must hold floats",
    ),
    "no iterations": (
        lambda: largest_eigenvalue(lambda w, x: w * x, 1.0, jnp.ones((2, 1)), iterations=0),
        ValueError,
        "`iterations` must be at least 1",
    ),
    "no tolerance": (
        lambda: largest_eigenvalue(lambda w, x: w * x, 1.0, jnp.ones((2, 1)), tolerance=0.0),
        ValueError,
        "`tolerance` must be positive",
    ),
    "no rows": (lambda: wishart_edge(0, 5), ValueError, "`p` must be at least 1, got 0"),
    "half a column": (lambda: wishart_edge(5, 0.5), TypeError, "`n` must be a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
