"""The network beside its tangent model and the closed form: one training of each, measured alike.

What the experiments that train a network share. Members are seeds, widths or alphas: one call
trains an ensemble.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax.comparison import ClosedForm, Comparison, Course
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.metrics import kernel_alignment, relative_kernel_change
from lazyjax.models import from_linen
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import log_grid, scale_loss, train_ensemble
from lazyjax.types import Dataset, History, ModelFunction, Params

_sgd = cache(optax.sgd)  # one object a rate: what is trained again is not compiled again

CURVE_POINTS = 600  # of a curve that is stored, log-spaced
KERNEL_POINTS = 16  # steps at which the kernel is measured, log-spaced


@partial(jax.jit, static_argnames=("momentum",))
def _closed_form(
    f: ModelFunction,
    start: Params,
    anchor: Params,
    data: Dataset,
    grid_x: jax.Array,
    steps: jax.Array,
    learning_rate: jax.Array,
    alpha: jax.Array,
    momentum: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Predict one member's tangent model at `steps`, and give its critical learning rate.

    Before that come the outputs on the training points and on the grid, and the movement.
    """
    f_lin = linearize(f, anchor)
    kernel = ntk(f, anchor, data.x)
    dynamics = gradient_descent(
        kernel,
        data.y,
        f_lin(start, data.x),
        learning_rate=learning_rate / alpha**2,
        momentum=momentum,
    )
    coefficients = dynamics.coefficients(steps)  # (G, N, K)
    moved = dynamics.train(steps) - dynamics.train(jnp.zeros((1,), steps.dtype))
    square = jnp.sum(coefficients * moved, axis=(1, 2))  # norm(J^T a)^2 = a^T Theta a
    critical = alpha**2 * critical_learning_rate(kernel, momentum=momentum)
    return (
        dynamics.train(steps),
        dynamics.test(steps, ntk(f, anchor, grid_x, data.x), f_lin(start, grid_x)),
        jnp.sqrt(jnp.maximum(square, 0.0)) / optax.tree.norm(start),
        critical,
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _kernels(f: ModelFunction, on_grid: Params, x: jax.Array) -> tuple[jax.Array, ...]:
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
def _outputs(f: ModelFunction, on_grid: Params, x: jax.Array) -> jax.Array:
    """Compute the outputs of each member at each of its recorded parameters."""
    return jax.lax.map(lambda w: f(w, x), on_grid)


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(difference), axis=(-2, -1)))


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
    start: Params,
    data: Dataset,
    *,
    learning_rate: float,
    steps: int,
    grid_x: jax.Array,
    momentum: float = 0.0,
    anchor: Params | None = None,
    alphas: jax.Array | None = None,
) -> tuple[Comparison, History]:
    """Train an ensemble and its tangent models alike, and predict the latter in closed form.

    Parameters
    ----------
    f : ModelFunction
        One for all, or made under `jax.vmap`, one a member.
    start : pytree of (E, ...)
        Where training starts.
    data : Dataset
        x (N, 1), y (N, 1), the same for all members.
    learning_rate : float
        Of gradient descent on the mean squared error (over alpha^2, if there are `alphas`).
    steps : int
    grid_x : (M, 1)
        Where functions are drawn.
    momentum : float
        Of the heavy ball.
    anchor : pytree of (E, ...), optional
        Where the tangent models expand, `start` by default.
    alphas : (E,), optional
        The output scales that `f` has; the loss is divided by alpha^2.

    Returns
    -------
    Comparison
    history : History
        Of the networks.
    """
    members = jax.tree.leaves(start)[0].shape[0]
    anchor = start if anchor is None else anchor
    f = f if isinstance(f, Partial) else Partial(f)
    # numpy: each little operation of jnp would cost a compilation
    order = np.argsort(np.asarray(data.x[:, 0]))
    data = Dataset(np.asarray(data.x)[order], np.asarray(data.y)[order])
    scales = np.ones(members, data.y.dtype) if alphas is None else np.asarray(alphas)

    optimizer = _sgd(learning_rate, momentum or None)
    loss = scale_loss(optax.losses.squared_error, scales)  # one alpha a member
    settings: dict[str, Any] = {"steps": steps, "loss": loss}
    tangent = jax.vmap(linearize)(f, anchor)
    network_history = train_ensemble(f, start, data, optimizer, label="network", **settings)
    tangent_history = train_ensemble(
        tangent, start, data, optimizer, label="tangent model", **settings
    )

    grid, n = network_history.steps, len(data.x)
    at = log_grid(steps, points=CURVE_POINTS)
    both = np.concatenate([data.x, grid_x])
    network = _course(network_history, at, _outputs(f, network_history.params, both), n)
    moved = _course(tangent_history, at, _outputs(tangent, tangent_history.params, both), n)

    closed = partial(_closed_form, momentum=momentum)
    rate = np.asarray(learning_rate, data.y.dtype)
    train, on_grid, movement, critical = map(
        np.asarray,
        jax.vmap(closed, (0, 0, 0, None, None, None, None, 0))(
            f, start, anchor, data, grid_x, grid, rate, scales
        ),
    )
    squares = np.mean(np.square(train - data.y), axis=(-2, -1))

    which = np.unique(np.linspace(0, len(grid) - 1, KERNEL_POINTS).astype(int))
    recorded = jax.tree.map(lambda w: w[:, which], network_history.params)
    kernels, change, alignment = map(np.asarray, _kernels(f, recorded, data.x))
    compared = Comparison(
        x=data.x,
        y=data.y,
        grid_x=np.asarray(grid_x),
        steps=grid,
        curve_steps=at,
        kernel_steps=grid[which],
        network=network,
        tangent=moved,
        closed=ClosedForm(
            loss=squares / np.square(scales)[:, None],
            movement=movement,
            train=train,
            grid=on_grid,
            gap=_rms(train - moved.train),
        ),
        gap_train=_rms(network.train - moved.train),
        gap_grid=_rms(network.grid - moved.grid),
        kernels=kernels,
        kernel_change=change,
        kernel_alignment=alignment,
        critical_learning_rate=critical,
    )
    return compared, network_history


def ensemble(
    module: nn.Module, key: jax.Array, x: jax.Array, members: int
) -> tuple[ModelFunction, Params]:
    """Initialise a Flax module `members` times: f, and parameters with the members on axis 0."""
    params = jax.vmap(lambda k: from_linen(module, k, x)[1])(jax.random.split(key, members))
    first = jax.tree.map(lambda w: w[0], params)
    f, _ = from_linen(module, None, x, variables={"params": first})
    return f, params


def member_summary(compared: Comparison, index: int) -> dict[str, float]:
    """Give the numbers to conclude from for one member."""
    network, tangent, closed = compared.network, compared.tangent, compared.closed
    gap = compared.gap_train[index, -1]
    numbers = {
        "final loss of the network": network.loss[index, -1],
        "final loss of the tangent model": tangent.loss[index, -1],
        "final loss in closed form": closed.loss[index, -1],
        "relative weight movement of the network": network.movement[index, -1],
        "relative weight movement of the tangent model": tangent.movement[index, -1],
        "gap between network and tangent model, training points": gap,
        "gap between network and tangent model, grid": compared.gap_grid[index, -1],
        "the same over the change of the network": gap
        / _rms(network.train[index, -1] - network.train[index, 0]),
        "largest gap between tangent model and closed form": np.max(closed.gap[index]),
        "relative kernel change": compared.kernel_change[index, -1],
        "kernel alignment": compared.kernel_alignment[index, -1],
        "critical learning rate": compared.critical_learning_rate[index],
    }
    return {name: float(value) for name, value in numbers.items()}


def summarise(compared: Comparison, labels: list[str]) -> dict[str, dict[str, float]]:
    """Give `member_summary` for each member by its label."""
    return {label: member_summary(compared, i) for i, label in enumerate(labels)}


def range_of(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Give median, least and most of a number over the members."""
    least, median, most = np.min(values), np.median(values), np.max(values)
    return {"median": float(median), "least": float(least), "most": float(most)}


def spread(compared: Comparison) -> dict[str, dict[str, float]]:
    """Give `range_of` every number of `member_summary`."""
    members = [member_summary(compared, i) for i in range(compared.members)]
    return {name: range_of([member[name] for member in members]) for name in members[0]}
