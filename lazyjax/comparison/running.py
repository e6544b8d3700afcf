"""Networks and their tangent models, trained alike, beside the closed form: one, or an ensemble."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.comparison.optimizers import HeavyBall, heavy_ball
from lazyjax.comparison.records import ClosedForm, Comparison, Course
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk, same_examples
from lazyjax.metrics import kernel_alignment, relative_kernel_change
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import factor_of_squares, log_grid, scale_of_loss, train_ensemble
from lazyjax.types import Dataset, History, Loss, ModelFunction, Params, PyTree

_CURVE_POINTS = 600  # of a curve that is kept, log-spaced
_KERNEL_POINTS = 16  # steps at which the kernel is measured, log-spaced
_KERNEL_EXAMPLES = 1000  # of which kernels are computed, at most
_DENSE = 3000  # N K, up to which the closed form is computed


@partial(jax.jit, static_argnames=("factor", "momentum"))
def _closed_form(
    f: ModelFunction,
    start: Params,
    anchor: Params,
    data: Dataset,
    grid_x: PyTree,
    steps: jax.Array,
    learning_rate: jax.Array,
    factor: float,
    alpha: jax.Array,
    momentum: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Predict one member's tangent model at `steps`, and give its critical learning rate.

    Before that come the outputs on the training points and on the grid, and the movement. The loss
    is the squared error times `factor` / alpha^2.
    """
    f_lin = linearize(f, anchor)
    kernel = ntk(f, anchor, data.x)
    dynamics = gradient_descent(
        kernel,
        data.y,
        f_lin(start, data.x),
        learning_rate=learning_rate * factor / alpha**2,
        momentum=momentum,
    )
    coefficients = dynamics.coefficients(steps)  # (G, N, *out)
    moved = dynamics.train(steps) - dynamics.train(jnp.zeros((1,), steps.dtype))
    inner = tuple(range(1, moved.ndim))
    square = jnp.sum(coefficients * moved, axis=inner)  # norm(J^T a)^2 = a^T Theta a
    critical = alpha**2 / factor * critical_learning_rate(kernel, momentum=momentum)
    return (
        dynamics.train(steps),
        dynamics.test(steps, ntk(f, anchor, grid_x, data.x), f_lin(start, grid_x)),
        jnp.sqrt(jnp.maximum(square, 0.0)) / optax.tree.norm(start),
        critical,
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _kernels(f: ModelFunction, on_grid: Params, x: PyTree) -> tuple[jax.Array, ...]:
    """Compute the trace kernel of each member at each of its recorded parameters.

    Beside them their relative changes from the first, and their alignments with it.
    """
    kernels = jax.lax.map(lambda w: ntk(f, w, x, reduce="trace"), on_grid)
    return (
        kernels,
        jax.vmap(relative_kernel_change, (0, None))(kernels, kernels[0]),
        jax.vmap(kernel_alignment, (0, None))(kernels, kernels[0]),
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _outputs(f: ModelFunction, on_grid: Params, x: PyTree) -> jax.Array:
    """Compute the outputs of each member at each of its recorded parameters."""
    return jax.lax.map(lambda w: f(w, x), on_grid)


def _mean_square(difference: np.ndarray) -> np.ndarray:
    """Average over examples and outputs, (E, G, N, *out) -> (E, G)."""
    with np.errstate(over="ignore", invalid="ignore"):  # of what has diverged
        return np.mean(np.square(difference), axis=tuple(range(2, difference.ndim)))


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(_mean_square(difference))


def _course(history: History, at: np.ndarray, outputs: jax.Array, n: int) -> Course:
    """Give the course of an ensemble, whose outputs on the n training points come first."""
    diverged_at = history.diverged_at if isinstance(history.diverged_at, tuple) else ()
    values = np.asarray(outputs)
    return Course(
        loss=history.loss[:, at],
        movement=history.weight_movement[:, at],
        layer={leaf: curve[:, at] for leaf, curve in history.layer_movement.items()},
        diverged_at=np.array([-1 if t is None else t for t in diverged_at]),
        train=values[:, :, :n],
        grid=values[:, :, n:],
    )


def compare(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    test_x: PyTree | None = None,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    anchor: Params | None = None,
) -> Comparison:
    """Compare a network with its tangent model: both trained alike, and measured alike.

    Parameters
    ----------
    f : ModelFunction
        With one output array (N, *out).
    params : pytree of floats
        Where training starts.
    data : Dataset
        x (N, ...) and y, what the loss takes.
    optimizer, steps, loss, key, batch_size
        As in `train`. Network and tangent model have the same mini-batches.
    test_x : array (M, ...) or pytree, optional
        Inputs beside those of the data on which the two are compared; the data again by default.
    anchor : pytree, optional
        Where the tangent model expands, `params` by default.

    Returns
    -------
    Comparison
        With one member. `verdicts(comparison)` says in a word whether it was lazy.

    Raises
    ------
    TypeError, ValueError
        As `train`; ValueError also if `anchor` is no tree like `params`, or `test_x` holds other
        examples than `data.x`.

    Notes
    -----
    Beside the two trainings it takes the outputs on training and test points at about a hundred
    steps, and at sixteen the kernel of the mean of the outputs, of all examples or of 1000 of them,
    drawn once (`kernel_examples`). The closed form is added where it is known: for the squared
    error on the full batch under gradient descent with one rate and a heavy ball, however the
    optimiser was put together, and up to 3000 outputs of all examples together.

    References
    ----------
    Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming".

    Examples
    --------
    >>> import optax
    >>> from lazyjax.comparison import verdicts
    >>> data = Dataset(jnp.eye(3), jnp.ones((3, 1)))
    >>> f = lambda w, x: x @ w
    >>> compared = compare(f, jnp.zeros((3, 1)), data, optax.sgd(0.1), steps=50)
    >>> verdicts(compared)[0].word  # a linear model is its tangent model
    'lazy'
    """
    f = checks.model_function(f)
    checks.batch("data.x", data[0])
    if anchor is not None:
        checks.same_tree("anchor", anchor, params, "params")
    if test_x is None:
        test_x = data[0]
    checks.batch("test_x", test_x)
    same_examples(data[0], test_x, ("data.x", "test_x"))

    def alone(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.asarray(a)[None], tree)

    compared, _ = compare_ensemble(
        alone(f),
        alone(params),
        Dataset(*data),
        optimizer,
        steps=steps,
        grid_x=test_x,
        loss=alone(loss) if isinstance(loss, Partial) else loss,
        key=key,
        batch_size=batch_size,
        anchor=None if anchor is None else alone(anchor),
    )
    return compared


def compare_ensemble(
    f: ModelFunction,
    start: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    grid_x: PyTree,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    anchor: Params | None = None,
) -> tuple[Comparison, History]:
    """Train an ensemble and its tangent models alike, and predict the latter in closed form.

    Parameters
    ----------
    f : ModelFunction
        With one output array; one for all, or made under `jax.vmap`, one a member.
    start : pytree of (E, ...)
        Where training starts.
    data : Dataset
        x (N, ...), y (N, *out), the same for all members.
    optimizer, steps, loss, key, batch_size
        As in `lazyjax.train_ensemble`. The same mini-batches for networks and tangent models.
    grid_x : array (M, ...) or pytree
        Inputs beside those of the data, on which outputs are compared.
    anchor : pytree of (E, ...), optional
        Where the tangent models expand, `start` by default.

    Returns
    -------
    Comparison
        Its closed form is None where there is none, as `compare` says.
    history : History
        Of the networks.

    Raises
    ------
    TypeError, ValueError
        As `lazyjax.train_ensemble`.
    """
    members, n = jax.tree.leaves(start)[0].shape[0], checks.batch("data.x", data.x)
    anchor = start if anchor is None else anchor
    f = f if isinstance(f, Partial) else Partial(f)
    tangent = jax.vmap(linearize)(f, anchor)
    settings: dict[str, Any] = {"steps": steps, "loss": loss, "batch_size": batch_size}
    again = None if key is None else jax.random.clone(key)  # the same mini-batches
    history = train_ensemble(f, start, data, optimizer, key=key, label="network", **settings)
    of_tangent = train_ensemble(
        tangent, start, data, optimizer, key=again, label="tangent model", **settings
    )

    grid, at = history.steps, log_grid(steps, points=_CURVE_POINTS)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), data.x, grid_x)
    network = _course(history, at, _outputs(f, history.params, both), n)
    moved = _course(of_tangent, at, _outputs(tangent, of_tangent.params, both), n)

    closed, critical = None, np.full(members, np.nan)
    full = batch_size is None or batch_size >= n
    factor = factor_of_squares(loss) if full and network.train[0, 0].size <= _DENSE else None
    ball = None if factor is None else heavy_ball(optimizer, start, steps)
    if ball is not None and factor is not None:
        alpha = np.broadcast_to(np.asarray(scale_of_loss(loss), network.train.dtype), (members,))
        closed, critical = _closed(f, start, anchor, data, grid_x, grid, ball, factor, alpha, moved)

    which = np.unique(np.linspace(0, len(grid) - 1, _KERNEL_POINTS).astype(int))
    recorded = jax.tree.map(lambda w: w[:, which], history.params)
    few = np.sort(np.random.default_rng(0).choice(n, min(n, _KERNEL_EXAMPLES), replace=False))
    of_few = jax.tree.map(lambda a: np.asarray(a)[few], data.x)
    kernels, change, alignment = map(np.asarray, _kernels(f, recorded, of_few))
    compared = Comparison(
        x=data.x,
        y=data.y,
        grid_x=jax.tree.map(np.asarray, grid_x),
        steps=grid,
        curve_steps=at,
        kernel_steps=grid[which],
        kernel_examples=few,
        network=network,
        tangent=moved,
        closed=closed,
        gap_train=_rms(network.train - moved.train),
        gap_grid=_rms(network.grid - moved.grid),
        kernels=kernels,
        kernel_change=change,
        kernel_alignment=alignment,
        critical_learning_rate=critical,
    )
    return compared, history


def _closed(
    f: ModelFunction,
    start: Params,
    anchor: Params,
    data: Dataset,
    grid_x: PyTree,
    steps: np.ndarray,
    ball: HeavyBall,
    factor: float,
    alpha: np.ndarray,
    tangent: Course,
) -> tuple[ClosedForm, np.ndarray]:
    """Give the closed form of every member, and its critical learning rate."""
    form = partial(_closed_form, factor=factor, momentum=ball.momentum)

    def of_member(f: Any, start: Params, anchor: Params, alpha: Any) -> Any:
        rate = np.asarray(ball.learning_rate, tangent.train.dtype)
        return form(f, start, anchor, data, grid_x, steps, rate, alpha=alpha)

    train, grid, movement, critical = map(np.asarray, jax.vmap(of_member)(f, start, anchor, alpha))
    loss = factor * _mean_square(train - np.asarray(data.y)) / np.square(alpha)[:, None]
    gap = _rms(train - tangent.train)
    return ClosedForm(loss=loss, movement=movement, train=train, grid=grid, gap=gap), critical
