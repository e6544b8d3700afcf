"""The tangent model trained to any time: by products with the kernel, in closed form, by training."""

import re
from contextlib import nullcontext
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_dynamics import singular
from test_operators import PARAMS, X1, X2, dense, gram, jacobian, model, normal

from lazyjax import gradient_descent, gradient_flow, linearize, matrix, ntk, train
from lazyjax.operators import NotConverged, as_operator, ntk_operator, nystrom
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.types import Dataset

Y = normal(20, 7, 3)
RIDGE = 0.05
TIMES = np.array([0.0, 1.0, 7.0, 200.0, np.inf])


@lru_cache
def setting():
    kernel = gram(jacobian()[:7], jacobian()[:7])
    largest = np.linalg.eigvalsh(dense("none", True))[-1] + RIDGE
    return kernel, as_operator(kernel, ridge=RIDGE), 0.9 * Y.size / largest


def near(found, wanted, tolerance=1e-7):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.thorough
def test_descent_by_products_is_the_closed_form():
    momentum = 0.7
    kernel, A, learning_rate = setting()
    f0 = model(PARAMS, X1)
    found = kernel_regression(A, Y, f0, t=TIMES, learning_rate=learning_rate, momentum=momentum)
    wanted = gradient_descent(
        kernel, Y, f0, learning_rate=learning_rate, momentum=momentum, ridge=RIDGE
    )
    near(found.coefficients, wanted.coefficients(TIMES))
    near(found.fit, wanted.train(TIMES) - f0[None])
    assert found.error < 2e-8


def test_the_flow_by_products_is_the_closed_form_and_its_end_the_ridge_regression():
    kernel, A, _ = setting()
    f0 = jax.jit(model)(PARAMS, X1)
    found = kernel_regression(A, Y, f0, t=TIMES[:, None])
    near(found.coefficients, gradient_flow(kernel, Y, f0, ridge=RIDGE).coefficients(TIMES[:, None]))
    solved = np.linalg.solve(dense("none", True) + RIDGE * np.eye(21), (Y - f0).reshape(-1))
    near(kernel_regression(A, Y, f0).coefficients, solved.reshape(7, 3))


@pytest.mark.thorough
def test_a_kernel_that_outputs_share_is_a_column_an_output():
    kernel, f0 = ntk(model, PARAMS, X1, reduce="trace"), model(PARAMS, X1)
    A = ntk_operator(model, PARAMS, X1, reduce="trace", ridge=RIDGE)
    found = kernel_regression(A, Y, f0, t=TIMES)
    near(found.fit, gradient_flow(kernel, Y, f0, ridge=RIDGE).train(TIMES) - f0[None])


@pytest.mark.thorough
def test_training_in_parameter_space_agrees():
    """By Optax, and by products: outputs on new points, and the parameters themselves."""
    _, _, learning_rate = setting()
    A = ntk_operator(model, PARAMS, X1)
    f_lin, f0 = linearize(model, PARAMS), model(PARAMS, X1)
    found = kernel_regression(A, Y, f0, t=300, learning_rate=learning_rate)
    params = tangent_parameters(model, PARAMS, X1, found.coefficients, batch_size=3)
    history = train(f_lin, PARAMS, Dataset(X1, Y), optax.sgd(learning_rate), steps=300)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(history.final), strict=True):
        near(one, np.asarray(other), 1e-6)
    near(f_lin(params, X2), f_lin(history.final, X2), 1e-6)
    cross = ntk_operator(model, PARAMS, X2, X1)
    by_kernel = model(PARAMS, X2) + (cross @ found.coefficients.reshape(-1)).reshape(5, 3)
    near(by_kernel, f_lin(params, X2), 1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-7, 1e-5])
def test_a_ridge_below_the_rounding_of_the_kernel_is_no_ridge(ridge, scale):
    """As in `dynamics`, and what a user makes of the coefficients is right at any time."""
    kernel, cross, y, least = singular(scale)
    size = np.float32(1e10 if scale > 1 else 1e-10)
    y = np.concatenate([y, size * y, 0 * y], 1)  # outputs that share it
    noise = 8 * np.finfo(np.float32).eps * np.linalg.eigvalsh(kernel.astype(float))[-1]
    A = as_operator(kernel, ridge=np.float32(scale * ridge))
    told = re.escape(f"N K eps lambda_max = {3 * noise:.1e}")
    t = np.array([1 / scale, 1e6 / scale, 1e9 / scale, np.inf])
    with pytest.warns(UserWarning, match=told) if ridge else nullcontext():
        found = kernel_regression(A, y, 0 * y, t=t)
    with pytest.warns(UserWarning, match=told) if ridge else nullcontext():
        run = gradient_flow(kernel, y, 0 * y, ridge=np.float32(scale * ridge))
    sizes = np.array([1, size, 1])
    near(np.float64(found.fit) / sizes, np.float64(run.train(t)) / sizes, 1e-5)
    outputs = np.float64(cross) @ np.float64(found.coefficients)
    wanted = np.float64(run.test(t, cross, np.zeros((2, 3), np.float32)))
    near(outputs / sizes, wanted / sizes, 3e-5)
    assert np.all(outputs[..., 2] == 0)
    np.testing.assert_allclose(outputs[-1][:, :1], least, atol=3e-5)
    end = np.float64(run.coefficients(np.inf)) * scale / sizes
    near(np.float64(found.coefficients[-1]) * scale / sizes, end, 1e-4)


@pytest.mark.thorough
def test_a_ridge_above_the_rounding_is_the_linear_system():
    kernel, _, y, _ = singular()
    found = kernel_regression(as_operator(kernel, ridge=1e-2), y, 0 * y, tolerance=1e-5)
    near(found.coefficients, np.linalg.solve(kernel + 1e-2 * np.eye(8), y), 1e-4)


@pytest.mark.thorough
def test_half_precision_is_trained_in_float32():
    (
        kernel,
        _,
        _,
    ) = setting()
    half = matrix(kernel).astype(jnp.bfloat16)
    y, f0 = Y.astype(jnp.bfloat16), (0.5 * Y + 1).astype(jnp.bfloat16)
    for t in (2.0, np.inf):
        found = kernel_regression(as_operator(half, ridge=1.0), y, f0, t=t)
        wide = kernel_regression(
            as_operator(half.astype(jnp.float32), ridge=1.0),
            y.astype(jnp.float32),
            f0.astype(jnp.float32),
            t=t,
        )
        assert found.fit.dtype == found.coefficients.dtype == jnp.float32
        near(found.fit, np.asarray(wide.fit), 1e-5)


@pytest.mark.thorough
def test_nothing_to_learn_is_nothing_learnt():
    for ridge in (0.0, 0.5):
        A = as_operator(matrix(setting()[0]), ridge=ridge)
        found = kernel_regression(A, Y, Y, t=TIMES)
        assert not np.any(found.coefficients)
        assert not np.any(found.fit)


@pytest.mark.thorough
def test_parameters_in_blocks_are_for_examples_that_are_alone():
    x, c = normal(30, 30, 5), normal(31, 30, 3)
    w = {"a": normal(32, 5, 8), "b": normal(33, 8, 3)}

    def alone(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"]

    def centred(w, x):
        return alone(w, x) - alone(w, x).mean(0, keepdims=True)

    def gram(w, x):
        return alone(w, x) @ alone(w, x).T

    for f, a in ((centred, c), (gram, normal(34, 30, 30))):
        (exact,) = jax.vjp(lambda w: f(w, x), w)[1](a)  # noqa: B023 (used before f is another)
        for one, base, gradient in zip(
            *map(jax.tree.leaves, (tangent_parameters(f, w, x, a), w, exact)), strict=True
        ):
            near(one - base, np.asarray(gradient), 1e-12)
        with pytest.raises(ValueError, match="`f` must treat each example alone|batch"):
            tangent_parameters(f, w, x, a, batch_size=7)
    with pytest.raises(TypeError, match="`f` must return one array, got 2"):
        tangent_parameters(lambda w, x: (alone(w, x), alone(w, x)), w, x, c)


@pytest.mark.thorough
def test_a_preconditioner_serves_the_end_of_training():
    _, A, _ = setting()
    f0 = model(PARAMS, X1)
    helped = kernel_regression(A, Y, f0, preconditioner=nystrom(jax.random.key(0), A, rank=21))
    alone = kernel_regression(A, Y, f0)
    near(helped.coefficients, alone.coefficients)
    assert helped.products < alone.products


@pytest.mark.thorough
def test_what_does_not_converge_fails_and_keeps_what_there_is():
    rough = jnp.diag(jnp.logspace(-8, 0, 400))
    A = as_operator(rough, ridge=1e-9)
    y = jnp.ones((400, 1))
    with pytest.raises(
        NotConverged, match="Krylov space was last enlarged, to 20 products"
    ) as told:
        kernel_regression(A, y, 0 * y, t=1e9, products=20)
    assert told.value.solution[0].shape == (1, 400, 1)
    with pytest.raises(NotConverged):
        kernel_regression(A, y, 0 * y, products=20)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": np.ones((7, 3), int)}, TypeError, "`y` must hold floats"),
        ({"f0": np.ones((7, 3), int)}, TypeError, "`f0` must hold floats"),
        ({"y": np.ones((7, 2))}, ValueError, "`y` must have the shape of `f0`"),
        ({"y": np.ones((6, 3)), "f0": np.ones((6, 3))}, ValueError, "`y` must have shape .* with N or N K = 21"),
        ({"y": np.full((7, 3), np.nan)}, ValueError, "`y` must be finite"),
        ({"f0": np.full((7, 3), np.inf)}, ValueError, "`f0` must be finite"),
        ({"t": -1.0}, ValueError, "`t` must be 0 or more"),
        ({"t": 1.5, "learning_rate": 0.1}, ValueError, "`t` must be whole steps"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"learning_rate": 0.1, "momentum": 1.0}, ValueError, "`momentum` must be in"),
        ({"learning_rate": 1e3}, ValueError, "`t` must be finite above the critical learning rate"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be positive"),
        ({"products": 0}, ValueError, "`products` must be at least 1"),
        ({"A": np.eye(21)}, TypeError, "`A` must be"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_input_is_refused(change, error, message):
    options = {"A": setting()[1], "y": Y, "f0": 0 * Y} | change
    A, y, f0 = (options.pop(name) for name in ("A", "y", "f0"))
    with pytest.raises(error, match=message):
        kernel_regression(A, y, f0, **options)


def test_bad_coefficients_are_refused():
    with pytest.raises(ValueError, match=r"`coefficients` must have the shape of f\(params0, x\)"):
        tangent_parameters(model, PARAMS, X1, jnp.ones((7, 2)))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        tangent_parameters(model, PARAMS, X1, Y, batch_size=0)
