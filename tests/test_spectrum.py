import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from thoroughness import few

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
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 6), "b": (6, 6), "c": (6, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(7, 2)))


def test_eigenvalues_are_those_of_the_matrix_of_the_kernel(problem):
    kernel = ntk(model, *problem)
    assert eigenvalues(kernel).shape == (21,)
    np.testing.assert_allclose(eigenvalues(kernel), np.linalg.eigvalsh(matrix(kernel)), rtol=1e-12)


def test_the_numerical_rank_counts_what_rounding_cannot_explain():
    a = np.random.default_rng(1).normal(size=(30, 8))
    assert numerical_rank(jnp.asarray(a @ a.T)) == 8
    assert numerical_rank(jnp.eye(5)) == 5


@few("values, rank", [([2.0, 2, 0], 2), ([1.0, 1, 1, 1], 4), ([5.0, 0, 0], 1)])
def test_the_effective_rank_counts_equal_eigenvalues(values, rank):
    assert effective_rank(np.diag(values)) == pytest.approx(rank)


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    p = np.array([0.7, 0.2, 0.1])
    assert effective_rank(3 * np.diag(p)) == pytest.approx(np.exp(-(p @ np.log(p))))


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


@few("batched", [False, True])
def test_power_iteration_meets_the_largest_eigenvalue_from_below(problem, batched):
    params, x = problem
    exact = float(eigenvalues(ntk(model, params, x))[-1])
    found = float(largest_eigenvalue(model, params, x))
    if batched:
        stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
        found = float(jax.vmap(lambda w: largest_eigenvalue(model, w, x))(stacked)[0])
    assert exact * (1 - 1e-4) < found < exact * (1 + 1e-10)


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_ranks_and_rates_are_free_of_scale_in_float32(scale):
    a = np.random.default_rng(1).normal(size=(30, 8))
    plain, scaled = (jnp.asarray(c * (a @ a.T), jnp.float32) for c in (1.0, scale))
    assert numerical_rank(scaled) == 8
    assert effective_rank(scaled) == pytest.approx(float(effective_rank(plain)), rel=1e-4)
    rates = [float(critical_learning_rate(k, outputs=1)) for k in (plain, scaled)]
    assert rates[1] * scale == pytest.approx(rates[0], rel=1e-5)
    top = np.float64(eigenvalues(scaled)[-1]) / scale
    assert top == pytest.approx(float(eigenvalues(plain)[-1]), rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e25])
def test_power_iteration_is_free_of_scale_in_float32(scale, problem):
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), problem)
    one = largest_eigenvalue(model, params, x)
    found = largest_eigenvalue(lambda w, x: np.float32(scale**0.5) * model(w, x), params, x)
    assert found.dtype == jnp.float32
    assert np.float64(found) / scale == pytest.approx(float(one), rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_power_iteration_in_half_precision_is_as_right_as_its_products(dtype, problem):
    rounded = jax.tree.map(lambda a: a.astype(dtype), problem)
    params, x = jax.tree.map(lambda a: a.astype(float), rounded)
    # the norm of many small numbers in half precision stops where a term is below its rounding;
    # outputs of 100 make eigenvalues that float16 cannot hold
    many = jnp.tile(x, (60, 1))
    large = lambda w, x: jnp.asarray(100, dtype) * model(w, x)  # noqa: E731 (a function of one line)
    exact = float(largest_eigenvalue(lambda w, x: 100 * model(w, x), params, many))
    found = largest_eigenvalue(large, rounded[0], many.astype(dtype))
    assert found.dtype == jnp.float32
    # three layers forward and back: some roundings of eps / 2 for each
    assert found == pytest.approx(exact, rel=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_spectra_of_half_precision_are_taken_in_float32(dtype):
    values = jnp.array([4.0, 2.0, 1.0, 0.0])
    kernel = jnp.diag(values).astype(dtype)
    assert eigenvalues(kernel).dtype == effective_rank(kernel).dtype == jnp.float32
    np.testing.assert_allclose(eigenvalues(kernel), values[::-1], atol=1e-6)
    assert numerical_rank(kernel) == 3
    assert critical_learning_rate(kernel, outputs=1) == pytest.approx(1.0)
    p = np.array([4, 2, 1]) / 7
    assert effective_rank(kernel) == pytest.approx(np.exp(-(p @ np.log(p))), rel=1e-5)


def test_the_rank_of_half_precision_does_not_count_its_rounding():
    a = np.random.default_rng(1).normal(size=(30, 3))
    assert numerical_rank(jnp.asarray(a @ a.T, jnp.float16)) == 3


def test_a_kernel_of_zeros_has_rank_zero_and_every_rate_is_stable():
    nothing = jnp.zeros((3, 3))
    assert numerical_rank(nothing) == 0
    for almost in (nothing, -nothing, -1e-20 * jnp.eye(3)):  # rounding below zero
        assert critical_learning_rate(almost, outputs=2) == jnp.inf
    assert critical_learning_rate(nothing, outputs=2, ridge=0.5) == 12
    with pytest.raises(ValueError, match="`kernel` must have a positive eigenvalue, got none"):
        effective_rank(nothing)


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
