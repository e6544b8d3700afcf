"""The closed form of one member's tangent model: from its kernel, or by products with it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax.comparison.members import Member, outputs
from lazyjax.comparison.optimizers import HeavyBall
from lazyjax.comparison.records import ClosedForm, mean_square, rms
from lazyjax.comparison.sizes import Amounts, spread
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.operators import NotConverged, ntk_operator
from lazyjax.regression import kernel_regression, tangent_parameters
from lazyjax.spectrum import critical_learning_rate, largest_eigenvalue
from lazyjax.tangent import linearize
from lazyjax.training import factor_of_squares, scale_of_loss
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
    train = dynamics.train(steps)
    moved = train - dynamics.f0[None]
    inner = tuple(range(1, moved.ndim))
    square = jnp.sum(coefficients * moved, axis=inner)  # norm(J^T a)^2 = a^T Theta a
    test = None
    if test_x is not None:
        test = dynamics.test(steps, ntk(f, anchor, test_x, data.x), f_lin(start, test_x))
    movement = jnp.sqrt(jnp.maximum(square, 0.0)) / optax.tree.norm(start)
    outputs = 1 if kernel.ndim == 2 else None
    critical = critical_learning_rate(kernel, outputs=outputs, momentum=momentum)
    return train, test, movement, critical


@jax.jit
def _predicted(
    tangent: Partial, start: Params, anchor: Params, moved: Params, x: PyTree
) -> tuple[jax.Array | None, jax.Array]:
    """Give the outputs on x and the movement of a tangent model whose weights were `moved`."""
    change = optax.tree.sub(moved, anchor)
    movement = optax.tree.norm(change) / optax.tree.norm(start)
    test = None if x is None else tangent(optax.tree.add(start, change), x)
    return test, movement


class _Prediction(NamedTuple):
    """Of one member; outputs on all training points."""

    steps: np.ndarray
    train: np.ndarray
    test: np.ndarray | None
    movement: np.ndarray


def _by_products(
    member: Member, ball: HeavyBall, steps: np.ndarray, rate: float, amounts: Amounts
) -> _Prediction | str:
    """Predict by products with the kernel, at a few steps; or say why not."""
    x, y = member.data.x, np.asarray(member.data.y)
    needed = _PRODUCTS * steps[-1] ** 0.5
    if amounts.products < needed:
        return (
            f"{needed:.0f} products with the kernel of {y.size:,} outputs cost more than their "
            f"share of so short a training, in which {amounts.products} may be taken"
        )
    f0 = np.asarray(outputs(member.tangent, member.start, x))
    times = steps[spread(_TIMES, steps)]
    try:
        found = kernel_regression(
            ntk_operator(member.f, member.anchor, x, memory=amounts.memory),
            y.astype(f0.dtype),
            f0,
            t=times,
            learning_rate=rate,
            momentum=ball.momentum,
            products=amounts.products,
        )
    except (NotConverged, ValueError) as error:
        return f"kernel regression said: {error}"
    test_x = None if member.test is None else member.test.x
    test, movement = [], []
    for coefficients in found.coefficients:
        moved = tangent_parameters(member.f, member.anchor, x, coefficients)
        there, far = _predicted(member.tangent, member.start, member.anchor, moved, test_x)
        test.append(there)
        movement.append(far)
    return _Prediction(
        times,
        f0 + np.asarray(found.fit),
        None if test_x is None else np.asarray(test),
        np.asarray(movement),
    )


def closed_form(
    member: Member, ball: HeavyBall, steps: np.ndarray, tangent: np.ndarray, amounts: Amounts
) -> tuple[ClosedForm | None, float, str]:
    """Predict the tangent model in closed form.

    Parameters
    ----------
    member : Member
    ball : HeavyBall
        What its optimiser is.
    steps : (G,)
    tangent : (G, n, *out)
        Outputs of the tangent model, on the recorded examples.
    amounts : Amounts

    Returns
    -------
    ClosedForm, or None
        With one member.
    critical : float
        Learning rate, in the units of the optimiser's; NaN where it was not measured.
    why : str
        If there is none.
    """
    y = np.asarray(member.data.y)
    # the loss is the mean squared error over this
    scale = np.asarray(scale_of_loss(member.loss), tangent.dtype) ** 2
    scale = scale / (factor_of_squares(member.loss) or 1.0)
    rate = np.asarray(ball.learning_rate, tangent.dtype) / scale
    if amounts.dense:
        test_x = None if member.test is None else member.test.x
        start, anchor = member.start, member.anchor
        train, test, movement, critical = _from_kernel(
            member.f, start, anchor, member.data, test_x, steps, rate, ball.momentum
        )
        test = None if test is None else np.asarray(test)
        predicted = _Prediction(steps, np.asarray(train), test, np.asarray(movement))
    else:
        critical = np.nan
        if amounts.products >= _POWER:
            largest = float(
                largest_eigenvalue(member.f, member.anchor, member.data.x, tolerance=1e-3)
            )
            critical = (1 + ball.momentum) * y.size / largest if largest > 0 else np.inf
        predicted = _by_products(member, ball, steps, float(rate), amounts)
    critical = float(critical * scale)
    if isinstance(predicted, str):
        return None, critical, predicted
    recorded = predicted.train[:, amounts.examples]
    form = ClosedForm(
        steps=predicted.steps,
        loss=mean_square(predicted.train[None] - y) / scale * member.alpha**2,
        movement=predicted.movement[None],
        train=recorded[None],
        test=None if predicted.test is None else predicted.test[None],
        gap=rms((recorded - tangent[np.searchsorted(steps, predicted.steps)])[None]),
    )
    return form, critical, ""
