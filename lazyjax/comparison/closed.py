"""The closed form of one member's tangent model: from its kernel, or by products with it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax.comparison.optimizers import HeavyBall
from lazyjax.comparison.records import ClosedForm, mean_square, rms
from lazyjax.comparison.sizes import Amounts, spread
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.operators import NotConverged, ntk_operator
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.spectrum import critical_learning_rate, largest_eigenvalue
from lazyjax.tangent import linearize
from lazyjax.types import Dataset, ModelFunction, Params, PyTree

_PRODUCTS = 6  # times the root of the steps: what Krylov spaces take in all, about
_TIMES = 8  # at which kernel regression predicts, log-spaced
_POWER = 30  # products that the largest eigenvalue takes, about


@partial(jax.jit, static_argnames="momentum")
def _from_kernel(
    f: ModelFunction,
    start: Params,
    anchor: Params,
    data: Dataset,
    test_x: PyTree,
    steps: jax.Array,
    rate: jax.Array,
    momentum: float,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Predict outputs on the training points and on the test points, and the movement.

    The rate is that for the mean squared error, without 1/2; the last entry is its critical value.
    """
    f_lin = linearize(f, anchor)
    kernel = ntk(f, anchor, data.x)
    dynamics = gradient_descent(
        kernel, data.y, f_lin(start, data.x), learning_rate=rate, momentum=momentum
    )
    coefficients = dynamics.coefficients(steps)  # (G, N, *out)
    moved = dynamics.train(steps) - dynamics.train(jnp.zeros((1,), steps.dtype))
    inner = tuple(range(1, moved.ndim))
    square = jnp.sum(coefficients * moved, axis=inner)  # norm(J^T a)^2 = a^T Theta a
    test = None
    if test_x is not None:
        test = dynamics.test(steps, ntk(f, anchor, test_x, data.x), f_lin(start, test_x))
    movement = jnp.sqrt(jnp.maximum(square, 0.0)) / optax.tree.norm(start)
    outputs = 1 if kernel.ndim == 2 else None
    critical = critical_learning_rate(kernel, outputs=outputs, momentum=momentum)
    return dynamics.train(steps), test, movement, critical


@jax.jit
def _predicted(
    f: ModelFunction, start: Params, anchor: Params, moved: Params, x: PyTree
) -> tuple[jax.Array | None, jax.Array]:
    """Give the outputs on x and the movement of a tangent model whose weights were `moved`."""
    change = optax.tree.sub(moved, anchor)
    movement = optax.tree.norm(change) / optax.tree.norm(start)
    test = None if x is None else linearize(f, anchor)(optax.tree.add(start, change), x)
    return test, movement


def closed_form(
    f: Partial,
    start: Params,
    anchor: Params,
    data: Dataset,
    test_x: PyTree,
    steps: np.ndarray,
    tangent: np.ndarray,
    ball: HeavyBall,
    factor: float,
    alpha: Any,
    amounts: Amounts,
) -> tuple[ClosedForm | None, float, str]:
    """Predict the tangent model in closed form.

    Parameters
    ----------
    f, start, anchor, data, test_x
        Of one member.
    steps : (G,)
    tangent : (G, n, *out)
        Outputs of the tangent model, on the recorded examples.
    ball : HeavyBall
    factor : float
        How often the loss holds the squared error; it is divided by alpha^2.
    alpha : float
    amounts : Amounts

    Returns
    -------
    ClosedForm, or None
        With one member.
    critical : float
        Learning rate, in the units of the optimiser's.
    why : str
        If there is none.
    """
    own = np.asarray(ball.learning_rate, tangent.dtype)
    scale = np.asarray(alpha, tangent.dtype) ** 2 / factor  # of rates
    y, at = np.asarray(data.y), amounts.examples
    if amounts.dense:
        train, test, movement, critical = _from_kernel(
            f, start, anchor, data, test_x, steps, own / scale, ball.momentum
        )
        error = mean_square(np.asarray(train)[None] - y)
        train = np.asarray(train)[:, at]
        gap, times = rms((train - tangent)[None]), steps
        test = None if test is None else np.asarray(test)[None]
    else:
        if amounts.products >= _POWER:
            largest = float(largest_eigenvalue(f, anchor, data.x, tolerance=1e-3))
            critical = (1 + ball.momentum) * y.size / largest if largest > 0 else np.inf
        else:
            critical = np.nan
        needed = _PRODUCTS * steps[-1] ** 0.5
        if amounts.products < needed:
            why = (
                f"{needed:.0f} products with the kernel of {y.size:,} outputs cost more than their "
                f"share of so short a training, in which {amounts.products} may be taken"
            )
            return None, float(critical * scale), why
        which = spread(_TIMES, steps)
        times = steps[which]
        f0 = np.asarray(_evaluated(f, start, anchor, data.x))
        try:
            found = kernel_regression(
                ntk_operator(f, anchor, data.x, memory=amounts.memory),
                y.astype(f0.dtype),
                f0,
                t=times,
                learning_rate=float(own / scale),
                momentum=ball.momentum,
                products=amounts.products,
            )
        except (NotConverged, ValueError) as error:
            return None, float(critical * scale), f"kernel regression said: {error}"
        outputs = f0 + np.asarray(found.fit)
        error = mean_square((outputs - y)[None])
        train = outputs[:, at]
        gap = rms((train - tangent[which])[None])
        both = [
            _predicted(
                f, start, anchor, tangent_parameters(f, anchor, data.x, coefficients), test_x
            )
            for coefficients in found.coefficients
        ]
        movement = np.stack([np.asarray(moved) for _, moved in both])
        test = None if test_x is None else np.stack([np.asarray(t) for t, _ in both])[None]
    form = ClosedForm(
        steps=times,
        loss=error / scale,
        movement=np.asarray(movement)[None],
        train=train[None],
        test=test,
        gap=gap,
    )
    return form, float(critical * scale), ""


@jax.jit
def _evaluated(f: Partial, start: Params, anchor: Params, x: PyTree) -> jax.Array:
    return linearize(f, anchor)(start, x)
