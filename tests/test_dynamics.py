from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from thoroughness import few

from lazyjax.dynamics import gradient_descent, gradient_flow
from lazyjax.spectrum import critical_learning_rate


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def jacobian(n, k, condition, *, parameters=60):
    """Give J (N K, P) with Theta = J J^T of this condition."""
    m = n * k
    u = np.linalg.qr(np.asarray(normal(0, (m, m))))[0]
    v = np.linalg.qr(np.asarray(normal(1, (parameters, m))))[0]
    singular = np.logspace(0, -np.log10(condition) / 2, m)
    return (u * singular) @ v.T


def kernel_of(j, n, k):
    theta = (j @ j.T).reshape(n, k, n, k).transpose(0, 2, 1, 3)
    return (theta + theta.transpose(1, 0, 3, 2)) / 2


def problem(n=10, k=2):
    y = normal(2, (n, k))
    return y, normal(3, (n, k))


def by_hand(j, y, f0, *, eta, momentum=0.0, ridge=0.0, steps):
    """The slow reference: gradient descent on the parameters, as a numpy loop."""
    r0 = (np.asarray(f0) - np.asarray(y)).reshape(-1)
    delta = np.zeros(j.shape[1])
    m = np.zeros_like(delta)
    trajectory = [delta]
    for _ in range(steps):
        gradient = 2 / r0.size * (j.T @ (r0 + j @ delta) + ridge * delta)
        m = momentum * m + gradient
        delta = delta - eta * m
        trajectory.append(delta)
    return np.array(trajectory)


def distance(a, b, start):
    a, b = np.asarray(a), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b - start)


@few("condition", [1e16, 1e6])
@few("momentum", [0.9, 0.0, 0.5], 2)
@few(("n", "k"), [(10, 2), (30, 1), (10, 3)])
def test_descent_meets_the_loop_over_ten_thousand_steps(condition, momentum, n, k):
    j = jacobian(n, k, condition)
    y, f0 = problem(n, k)
    kernel = kernel_of(j, n, k)
    # eigenvalues are right to n k eps lambda_max, which costs c t / (1 - momentum) times that; of the
    # largest, c lambda_max is 1 here
    eta = 0.5 * float(critical_learning_rate(kernel))
    steps = np.array([0, 1, 2, 10, 100, 1000, 10_000])
    delta = by_hand(j, y, f0, eta=eta, momentum=momentum, steps=10_000)[steps]
    run = gradient_descent(kernel, y, f0, learning_rate=eta, momentum=momentum)

    outputs = np.asarray(f0) + (delta @ j.T).reshape(-1, n, k)
    assert run.train(steps).shape == outputs.shape
    coefficients = np.asarray(run.coefficients(steps))
    assert coefficients.shape == (7, n, k)
    for t in range(1, 7):
        rounding = 1e-14 + n * k * 2.2e-16 * steps[t] / (1 - momentum)
        assert distance(run.train(steps)[t], outputs[t], np.asarray(f0)) < rounding
        assert distance(coefficients[t].reshape(-1) @ j, delta[t], 0) < min(rounding, 1e-10)
    np.testing.assert_array_equal(run.train(0), f0)


@few("ridge", [1e-3, 0.0, 0.3])
@few("momentum", [0.9, 0.0])
def test_ridge_pulls_to_the_start_on_training_and_test_points(ridge, momentum):
    j, j_test = jacobian(10, 2, 1e4), np.asarray(normal(4, (8, 60)))
    y, f0 = problem()
    kernel, f0_test = kernel_of(j, 10, 2), normal(5, (4, 2))
    cross = jnp.asarray((j_test @ j.T).reshape(4, 2, 10, 2).transpose(0, 2, 1, 3))
    eta = 0.5 * float(critical_learning_rate(kernel, momentum=momentum, ridge=ridge))
    run = gradient_descent(kernel, y, f0, learning_rate=eta, momentum=momentum, ridge=ridge)
    delta = by_hand(j, y, f0, eta=eta, momentum=momentum, ridge=ridge, steps=300)
    for t in (1, 17, 300):
        expected = np.asarray(f0_test) + (j_test @ delta[t]).reshape(4, 2)
        assert distance(run.test(t, cross, f0_test), expected, np.asarray(f0_test)) < 1e-10
    r0 = np.asarray(y - f0).reshape(-1)
    limit = j_test @ j.T @ np.linalg.solve(j @ j.T + ridge * np.eye(20), r0)
    expected = np.asarray(f0_test) + limit.reshape(4, 2)
    assert distance(run.test(np.inf, cross, f0_test), expected, np.asarray(f0_test)) < 1e-8


def test_the_flow_is_the_matrix_exponential():
    y, f0 = problem()
    kernel = kernel_of(jacobian(10, 2, 1e3), 10, 2)
    theta = np.asarray(kernel.transpose(0, 2, 1, 3).reshape(20, 20))
    run = gradient_flow(kernel, y, f0, ridge=0.0)
    r0 = np.asarray(f0 - y).reshape(-1)
    times = np.array([[0.0, 0.3], [5.0, 400.0]])
    found = run.train(times)
    assert found.shape == (2, 2, 10, 2)
    for index in np.ndindex(2, 2):
        expected = np.asarray(y) + (expm(-2 / 20 * theta * times[index]) @ r0).reshape(10, 2)
        np.testing.assert_allclose(found[index], expected, rtol=1e-10, atol=1e-12)


def test_euler_meets_the_flow_with_slope_one():
    y, f0 = problem()
    kernel = kernel_of(jacobian(10, 2, 1e3), 10, 2)
    flow = gradient_flow(kernel, y, f0).train(8.0)
    steps = np.array([80, 160, 320, 640])
    errors = [
        float(
            jnp.linalg.norm(gradient_descent(kernel, y, f0, learning_rate=8.0 / s).train(s) - flow)
        )
        for s in steps
    ]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(8.0 / steps))
    np.testing.assert_allclose(slopes, 1.0, atol=0.02)


@pytest.mark.thorough
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_singular_kernel_gives_numbers_and_the_right_ones(momentum):
    n, rank = 30, 8
    a = np.asarray(normal(0, (n, rank)))
    j_test = np.asarray(normal(1, (5, rank)))
    y, f0 = problem(n, 1)
    kernel, cross = jnp.asarray(a @ a.T)[:, :, None, None], jnp.asarray(j_test @ a.T)
    eta = 0.5 * float(critical_learning_rate(kernel, momentum=momentum))
    run = gradient_descent(kernel, y, f0, learning_rate=eta, momentum=momentum)
    delta = by_hand(a, y, f0, eta=eta, momentum=momentum, steps=10_000)
    f0_test = jnp.zeros((5, 1))
    cross = cross[:, :, None, None]
    for t in (1, 100, 10_000):
        expected = (j_test @ delta[t])[:, None]
        assert distance(run.test(t, cross, f0_test), expected, 0) < 1e-10
        assert distance(np.asarray(run.coefficients(t))[:, 0] @ a, delta[t], 0) < 1e-10
    least = np.linalg.lstsq(a, np.asarray(y - f0), rcond=None)[0]
    assert distance(run.test(np.inf, cross, f0_test), j_test @ least, 0) < 1e-9
    values, vectors = np.linalg.eigh(a @ a.T)
    dropped = vectors[:, values < 1e-10].T @ np.asarray(run.coefficients(np.inf))
    assert np.abs(dropped).max() < 1e-10


@few("momentum", [0.9, 0.0, 0.5])
def test_a_direction_of_eigenvalue_zero_grows_as_the_recurrence(momentum):
    kernel, y, f0 = np.diag([1.0, 0.0, 0.0]), np.ones((3, 1)), np.zeros((3, 1))
    run = gradient_descent(kernel, y, f0, learning_rate=0.3, momentum=momentum)
    a, m, recurrence = 0.0, 0.0, []
    for _ in range(59):
        m = momentum * m - 2 * 0.3 / 3
        a -= m
        recurrence.append(a)
    *found, late, end = np.asarray(run.coefficients(np.r_[1:60, 10**6, np.inf]))[:, 1, 0]
    np.testing.assert_allclose(found, recurrence, rtol=1e-12)
    assert late / 10**6 == pytest.approx(0.2 / (1 - momentum), rel=1e-4)
    assert end == 0


@few("momentum", [0.9, 0.1, 0.5])
def test_the_heavy_ball_is_right_at_and_around_double_roots(momentum):
    root = momentum**0.5
    centres = np.array([(1 - root) ** 2, (1 + root) ** 2])
    offsets = np.array([-0.1, -1e-3, -1e-7, -1e-12, 0.0, 1e-12, 1e-7, 1e-3, 0.02])
    q = np.sort((centres[:, None] * (1 + offsets)).reshape(-1))
    kernel, y, f0 = np.diag(q), np.ones((len(q), 1)), np.zeros((len(q), 1))
    run = gradient_descent(kernel, y, f0, learning_rate=len(q) / 2, momentum=momentum)  # c = 1
    a, m = np.zeros_like(q), np.zeros_like(q)
    trajectory = [a]
    for _ in range(399):
        m = momentum * m + q * a - 1
        a = a - m
        trajectory.append(a)
    steps = np.array([1, 2, 7, 50, 399])
    found = run.coefficients(steps)[..., 0]
    np.testing.assert_allclose(found, np.array(trajectory)[steps], rtol=1e-9, atol=1e-11)


def test_tiny_eigenvalues_keep_their_digits():
    values = np.array([1.0, 1e-9, 1e-12])
    kernel, y, f0 = np.diag(values), np.ones((3, 1)), np.zeros((3, 1))
    t = np.array([1.0, 1e3, 1e9])
    flow = gradient_flow(kernel, y, f0).coefficients(t)[..., 0]
    expected = -np.expm1(-2 / 3 * values * t[:, None]) / values
    np.testing.assert_allclose(flow, expected, rtol=1e-12)
    run = gradient_descent(kernel, y, f0, learning_rate=1.0).coefficients(t)[..., 0]
    expected = -np.expm1(t[:, None] * np.log1p(-2 / 3 * values)) / values
    np.testing.assert_allclose(run, expected, rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make",
    [partial(gradient_descent, learning_rate=3.0, momentum=0.3), gradient_flow],
)
def test_a_kernel_of_the_points_alone_is_the_same_for_every_output(make):
    j = jacobian(10, 1, 1e3)
    y, f0 = problem()
    small = j @ j.T
    cross, f0_test = np.asarray(normal(4, (4, 10))), np.zeros((4, 2))
    full, full_cross = (k[:, :, None, None] * np.eye(2) for k in (small, cross))
    a, b = make(small, y, f0), make(full, y, f0)
    for t in (0, 5, 100, np.inf):
        assert a.train(t).shape == (10, 2)
        np.testing.assert_allclose(a.train(t), b.train(t), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(
            a.test(t, cross, f0_test), b.test(t, full_cross, f0_test), rtol=1e-7, atol=1e-9
        )


@pytest.mark.thorough
def test_outputs_may_have_several_axes_or_none():
    j = jacobian(4, 6, 100.0)
    kernel = kernel_of(j, 4, 6)
    y, f0 = problem(4, 6)
    flat = gradient_flow(kernel, y, f0).train(3.0)
    shaped = gradient_flow(
        kernel.reshape(4, 4, 2, 3, 2, 3), y.reshape(4, 2, 3), f0.reshape(4, 2, 3)
    )
    np.testing.assert_allclose(shaped.train(3.0), flat.reshape(4, 2, 3), rtol=1e-12)
    bare = gradient_flow(kernel[:, :, 0, 0], y[:, 0], f0[:, 0])
    assert bare.train(jnp.array([1.0, 2.0])).shape == (2, 4)


@pytest.mark.thorough
def test_it_works_under_jit_and_vmap_and_keeps_float32():
    y, f0 = problem()
    kernel = kernel_of(jacobian(10, 2, 1e3), 10, 2)

    @jax.jit
    def at(rate, t):
        return gradient_descent(kernel, y, f0, learning_rate=rate, momentum=0.5).train(t)

    rates = jnp.array([0.1, 2.0])
    both = jax.vmap(at, (0, None))(rates, jnp.array([3.0, jnp.inf]))
    for i, rate in enumerate(rates):
        run = gradient_descent(kernel, y, f0, learning_rate=rate, momentum=0.5)
        np.testing.assert_allclose(both[i], run.train(np.array([3, np.inf])), rtol=1e-10)
    single = gradient_flow(*(a.astype(jnp.float32) for a in (kernel, y, f0)))
    assert single.train(1.0).dtype == jnp.float32


RANK = 3


def singular(scale=1.0, dtype=np.float32):
    """Give a kernel of rank 3 of 8, that of 2 points with it, targets, and the least squares."""
    rng = np.random.default_rng(0)
    a, a_test, y = rng.normal(size=(8, RANK)), rng.normal(size=(2, RANK)), rng.normal(size=(8, 1))
    least = a_test @ np.linalg.lstsq(a, y, rcond=None)[0]
    return *((scale * k).astype(dtype) for k in (a @ a.T, a_test @ a.T)), y.astype(dtype), least


@pytest.mark.thorough
@pytest.mark.parametrize("t", [np.inf, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("ridge", [1e-5, 0.0, 1e-12, 1e-9, 1e-7])
@pytest.mark.parametrize("descent", [True, False])
def test_a_ridge_below_the_rounding_of_the_kernel_is_no_ridge(descent, ridge, t):
    kernel, cross, y, least = singular()
    make = partial(gradient_descent, learning_rate=0.1, momentum=0.5) if descent else gradient_flow
    noise = 8 * np.finfo(np.float32).eps * np.linalg.eigvalsh(kernel.astype(float))[-1]
    assert ridge < noise
    told = f"`ridge` is {ridge:.1e}, .* N K eps lambda_max = {noise:.1e}"
    with pytest.warns(UserWarning, match=told) if ridge else nullcontext():
        run = make(kernel, y, 0 * y, ridge=ridge)
    assert np.sum(run.eigenvalues != 0) == RANK
    found = run.test(t, cross, jnp.zeros((2, 1), np.float32))
    # the ridge itself moves them by ridge / lambda_3, rounding by eps lambda_1 / lambda_3
    np.testing.assert_allclose(found, least, atol=3e-5)
    fit = kernel @ np.linalg.pinv(kernel.astype(float), 1e-5) @ y
    np.testing.assert_allclose(run.train(t), fit, atol=3e-5)
    if t == np.inf:
        coefficients = np.asarray(run.coefficients(t))
        np.testing.assert_allclose(np.linalg.norm(coefficients), 0.4, atol=0.4)


@few("ridge", [1e-2, 1e-4])
def test_a_ridge_above_the_rounding_counts_everywhere(ridge):
    kernel, cross, y, _ = singular()
    run = gradient_flow(kernel, y, 0 * y, ridge=ridge)
    exact = np.linalg.solve(kernel.astype(float) + ridge * np.eye(8), y)
    rounding = 8 * np.finfo(np.float32).eps * np.linalg.eigvalsh(kernel)[-1] / ridge
    near = rounding * np.abs(exact).max()
    np.testing.assert_allclose(run.coefficients(np.inf), exact, atol=near)
    found = run.test(np.inf, cross, jnp.zeros((2, 1), np.float32))
    low_rank = np.linalg.pinv(kernel.astype(float), 1e-5)  # cross @ exact has rounding / ridge
    shrunk = cross @ np.linalg.solve(np.eye(8) + ridge * low_rank, low_rank @ y)
    np.testing.assert_allclose(found, shrunk, atol=3e-5)


def test_no_direction_lost_no_warning():
    kernel, y = 2 * np.eye(8, dtype=np.float32), np.ones((8, 1), np.float32)
    run = gradient_flow(kernel, y, 0 * y, ridge=1e-9)
    np.testing.assert_allclose(run.train(np.inf), 1, rtol=1e-6)


@few(
    "scale, targets",
    [(1e-30, 1.0), (1.0, 1e25), (1e-30, 1e-30), (1.0, 1e-22), (1e25, 1.0), (1e25, 1e25)],
)
def test_dynamics_are_free_of_scale_in_float32(scale, targets):
    kernel, cross, y, least = singular(scale)
    goal = (targets * y).astype(np.float32)
    run = gradient_flow(kernel, goal, 0 * goal)
    found = np.float64(run.test(np.inf, cross, jnp.zeros((2, 1), np.float32)))
    np.testing.assert_allclose(found / targets, least, atol=3e-5)
    found = np.float64(run.train(np.float32(1 / scale)))
    plain = gradient_flow(singular()[0], y, 0 * y).train(1.0)
    np.testing.assert_allclose(found / targets, plain, atol=3e-5)
    with pytest.raises(ValueError, match="`kernel` must be symmetric"):
        gradient_flow(np.triu(kernel), y, 0 * y)


def test_a_kernel_of_zeros_leaves_everything_at_the_start():
    nothing, y = np.zeros((8, 8), np.float32), np.ones((8, 1), np.float32)
    for ridge in (0.0, 0.5):
        run = gradient_flow(nothing, y, 2 * y, ridge=ridge)
        for t in (0.0, 1.0, np.inf):
            np.testing.assert_array_equal(run.train(t), 2 * y)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_trained_in_float32(dtype):
    half = [jnp.asarray(a, dtype) for a in (kernel_of(jacobian(5, 2, 10), 5, 2), *problem(5, 2))]
    wide = [a.astype(jnp.float32) for a in half]
    cross = normal(4, (3, 5, 2, 2)).astype(dtype), normal(5, (3, 2)).astype(dtype)
    for make in (gradient_flow, partial(gradient_descent, learning_rate=2.0)):
        a, b = make(*half), make(*wide)
        assert a.train(3.0).dtype == a.test(3.0, *cross).dtype == jnp.float32
        np.testing.assert_array_equal(a.train(3.0), b.train(3.0))
        np.testing.assert_allclose(
            a.test(3.0, *cross), b.test(3.0, *(c.astype(jnp.float32) for c in cross)), rtol=1e-5
        )


EYE, ONE, ZERO = np.eye(3), np.ones((3, 1)), np.zeros((3, 1))
DESCENT = {"learning_rate": 0.1}
BAD = {
    "targets of shape (n,)": ((EYE, ONE[:, 0], ZERO), DESCENT, ValueError, "Use y.:, None"),
    "targets of integers": (
        (EYE, ONE.astype(int), ZERO),
        DESCENT,
        TypeError,
        "`y` must hold floats",
    ),
    "a kernel of integers": (
        (EYE.astype(int), ONE, ZERO),
        DESCENT,
        TypeError,
        "`kernel` must hold",
    ),
    "a kernel of other points": ((np.eye(4), ONE, ZERO), DESCENT, ValueError, "`kernel` must have"),
    "NaN in the kernel": (
        (EYE * np.nan, ONE, ZERO),
        DESCENT,
        ValueError,
        "`kernel` must be finite",
    ),
    "NaN in targets": ((EYE, ONE * np.nan, ZERO), DESCENT, ValueError, "`y` must be finite"),
    "a skew kernel": ((EYE + np.eye(3, k=1), ONE, ZERO), DESCENT, ValueError, "must be symmetric"),
    "no learning rate": (
        (EYE, ONE, ZERO),
        {"learning_rate": 0.0},
        ValueError,
        "`learning_rate` mu",
    ),
    "a negative rate": ((EYE, ONE, ZERO), {"learning_rate": -1.0}, ValueError, "got -1.0"),
    "momentum 1": (
        (EYE, ONE, ZERO),
        DESCENT | {"momentum": 1.0},
        ValueError,
        "`momentum` must be in",
    ),
    "a negative ridge": (
        (EYE, ONE, ZERO),
        DESCENT | {"ridge": -1.0},
        ValueError,
        "`ridge` must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_problems_are_refused(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        gradient_descent(*arguments, **options)


def test_bad_times_are_refused():
    slow = gradient_descent(EYE, ONE, ZERO, learning_rate=0.1)
    fast = gradient_descent(EYE, ONE, ZERO, learning_rate=3.1)
    flow = gradient_flow(EYE, ONE, ZERO)
    with pytest.raises(ValueError, match="`t` must be 0 or more"):
        slow.train(-1)
    with pytest.raises(ValueError, match="`t` must be 0 or more"):
        flow.train(jnp.nan)
    with pytest.raises(ValueError, match="`t` must be whole steps.*or gradient_flow for times"):
        slow.coefficients(1.5)
    with pytest.raises(ValueError, match="`t` must be finite above the critical learning rate"):
        fast.train(np.inf)
    assert np.all(np.isfinite(fast.train(5)))
    assert np.isfinite(flow.train(1.5)).all()


def test_bad_test_points_are_refused():
    run = gradient_flow(EYE[:, :, None, None], ONE, ZERO)
    with pytest.raises(
        ValueError, match=r"`kernel_test_train` must have shape \(2, 3, 1, 1\), got"
    ):
        run.test(1.0, jnp.zeros((3, 2, 1, 1)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="`f0_test` must have shape"):
        run.test(1.0, jnp.zeros((2, 3, 1, 1)), jnp.zeros((2, 2)))
