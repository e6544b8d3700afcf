"""The tangent model trained to any time: by products with the kernel, in closed form, by training."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_operators import PARAMS, X1, X2, model, normal

from lazyjax import gradient_descent, gradient_flow, linearize, matrix, ntk, train
from lazyjax.operators import NotConverged, as_operator, ntk_operator, nystrom
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.types import Dataset

Y = normal(20, 7, 3)
RIDGE = 0.05
TIMES = np.array([0.0, 1.0, 7.0, 200.0, np.inf])


@lru_cache
def setting():
    kernel = ntk(model, PARAMS, X1)
    largest = np.linalg.eigvalsh(matrix(kernel))[-1] + RIDGE
    return kernel, ntk_operator(model, PARAMS, X1, ridge=RIDGE), 0.9 * Y.size / largest


def near(found, wanted, tolerance=1e-7):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


def test_descent_by_products_is_the_closed_form():
    momentum = 0.7
    kernel, A, learning_rate = setting()
    f0 = model(PARAMS, X1)
    found = kernel_regression(A, Y, f0, t=TIMES, learning_rate=learning_rate, momentum=momentum)
    dense = gradient_descent(
        kernel, Y, f0, learning_rate=learning_rate, momentum=momentum, ridge=RIDGE
    )
    near(found.coefficients, dense.coefficients(TIMES))
    near(found.fit, dense.train(TIMES) - f0[None])
    assert found.error < 2e-8


def test_the_flow_by_products_is_the_closed_form_and_its_end_the_ridge_regression():
    kernel, A, _ = setting()
    f0 = model(PARAMS, X1)
    found = kernel_regression(A, Y, f0, t=TIMES[:, None])
    near(found.coefficients, gradient_flow(kernel, Y, f0, ridge=RIDGE).coefficients(TIMES[:, None]))
    solved = np.linalg.solve(matrix(kernel) + RIDGE * np.eye(21), (Y - f0).reshape(-1))
    near(kernel_regression(A, Y, f0).coefficients, solved.reshape(7, 3))


def test_a_kernel_that_outputs_share_is_a_column_an_output():
    kernel, f0 = ntk(model, PARAMS, X1, reduce="trace"), model(PARAMS, X1)
    A = ntk_operator(model, PARAMS, X1, reduce="trace", ridge=RIDGE)
    found = kernel_regression(A, Y, f0, t=TIMES)
    near(found.fit, gradient_flow(kernel, Y, f0, ridge=RIDGE).train(TIMES) - f0[None])


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


def test_a_preconditioner_serves_the_end_of_training():
    _, A, _ = setting()
    f0 = model(PARAMS, X1)
    helped = kernel_regression(A, Y, f0, preconditioner=nystrom(jax.random.key(0), A, rank=21))
    alone = kernel_regression(A, Y, f0)
    near(helped.coefficients, alone.coefficients)
    assert helped.products < alone.products


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
        ({"y": jnp.ones((7, 3), int)}, TypeError, "`y` must hold floats"),
        ({"f0": jnp.ones((7, 3), int)}, TypeError, "`f0` must hold floats"),
        ({"y": jnp.ones((7, 2))}, ValueError, "`y` must have the shape of `f0`"),
        ({"y": jnp.ones((6, 3)), "f0": jnp.ones((6, 3))}, ValueError, "`y` must have shape .* with N or N K = 21"),
        ({"y": jnp.full((7, 3), jnp.nan)}, ValueError, "`y` must be finite"),
        ({"f0": jnp.full((7, 3), jnp.inf)}, ValueError, "`f0` must be finite"),
        ({"t": -1.0}, ValueError, "`t` must be 0 or more"),
        ({"t": 1.5, "learning_rate": 0.1}, ValueError, "`t` must be whole steps"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"learning_rate": 0.1, "momentum": 1.0}, ValueError, "`momentum` must be in"),
        ({"learning_rate": 1e3}, ValueError, "`t` must be finite above the critical learning rate"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be positive"),
        ({"products": 0}, ValueError, "`products` must be at least 1"),
        ({"A": jnp.eye(21)}, TypeError, "`A` must be"),
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
