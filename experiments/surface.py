"""The practical's hilly surface of two variables, and descents on it: what `flow_vs_descent` runs.

The points of all starts and learning rates are one ensemble of `lazyjax.training`: the parameters
are the point, and the model's output is the value there.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.training import train_ensemble
from lazyjax.types import Dataset, History


def surface(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute sin(x + 4) (cos(3 y - 5) + 0.3) + 0.5 cos(2 (x + 2) (y - 4)^2)."""
    waves = jnp.sin(x + 4) * (jnp.cos(3 * y - 5) + 0.3)
    return waves + 0.5 * jnp.cos(2 * (x + 2) * jnp.square(y - 4))


def _value(point: jax.Array) -> jax.Array:
    return surface(point[0], point[1])


def _model(point: jax.Array, x: jax.Array) -> jax.Array:
    """Give the value at the point, whatever x (1, 1) is, as a model with one output."""
    return _value(point).reshape(x.shape)


def _value_at_rate(rate: jax.Array, prediction: jax.Array, y: jax.Array) -> jax.Array:
    """Give rate times the value: a step of rate 1 on it is a step of `rate` on the value."""
    return rate * (prediction - y)  # y is 0


_one = optax.sgd(1.0)  # one object, so that a second call finds the compiled loop of the first


def descend(
    starts: jax.Array | np.ndarray,
    learning_rates: jax.Array | np.ndarray,
    steps: int,
    record: int | np.ndarray | None = None,
) -> History:
    """Descend the surface from every start with every learning rate, all in one ensemble.

    Parameters
    ----------
    starts : (E, 2)
        Points (x, y).
    learning_rates : (R,)
    steps : int
    record : int or array of int, optional
        The steps at which points are kept, as in `train`: about 100, log-spaced, by default.

    Returns
    -------
    History
        Of R E members, the first learning rate's first. `loss` holds the values of the surface,
        `params` (R E, G, 2) the points.

    Raises
    ------
    ValueError
        If the shapes are others, or a learning rate is not positive and finite.

    Notes
    -----
    The learning rate is held in the loss, so that all rates share one compiled loop.
    """
    # numpy: each little operation of jnp would cost a compilation
    starts, rates = np.asarray(starts), np.asarray(learning_rates)
    if starts.ndim != 2 or starts.shape[1] != 2:
        raise ValueError(f"`starts` must have shape (E, 2), got {starts.shape}. Use starts[None].")
    if rates.ndim != 1:
        raise ValueError(
            f"`learning_rates` must have shape (R,), got {rates.shape}. Use [rate] for one."
        )
    checks.positive("learning_rates", rates)
    per_member = np.repeat(rates.astype(starts.dtype), len(starts))
    zero = jnp.asarray(np.zeros((1, 1), starts.dtype))
    history = train_ensemble(
        _model,
        np.tile(starts, (len(rates), 1)),
        Dataset(zero, zero),
        _one,
        steps=steps,
        loss=Partial(_value_at_rate, per_member),
        record=record,
        label="descent",
    )
    scale = per_member[:, None]
    return replace(history, loss=history.loss / scale, data_loss=history.data_loss / scale)


def _euler(step: jax.Array, points: jax.Array) -> jax.Array:
    return points - step * jax.vmap(jax.grad(_value))(points)


def _runge_kutta(step: jax.Array, points: jax.Array) -> jax.Array:
    """Take a classical step of order 4 along the flow."""

    def slope(at: jax.Array) -> jax.Array:
        return -jax.vmap(jax.grad(_value))(at)

    k1 = slope(points)
    k2 = slope(points + step / 2 * k1)
    k3 = slope(points + step / 2 * k2)
    k4 = slope(points + step * k3)
    return points + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@partial(jax.jit, static_argnames=("method", "intervals"))
def integrate(
    method: str, starts: jax.Array, interval: jax.Array, substeps: jax.Array, *, intervals: int
) -> jax.Array:
    """Follow the flow from `starts` (E, 2) and give the points at multiples of `interval`.

    Parameters
    ----------
    method : "euler" or "runge_kutta"
    starts : (E, 2)
    interval, substeps : scalars
        The flow time between two of the points returned, and the steps in it.
    intervals : int

    Returns
    -------
    (intervals + 1, E, 2)
    """
    advance = {"euler": _euler, "runge_kutta": _runge_kutta}[method]
    step = interval / substeps

    def one(points: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        points = jax.lax.fori_loop(0, substeps, lambda _, p: advance(step, p), points)
        return points, points

    _, path = jax.lax.scan(one, starts, length=intervals)
    return jnp.concatenate([starts[None], path])


@jax.jit
def curvature(points: jax.Array) -> jax.Array:
    """Compute the largest eigenvalue of the Hessian at points (..., 2)."""
    flat = points.reshape(-1, 2)
    hessians = jax.vmap(jax.hessian(_value))(flat)
    return jnp.linalg.eigvalsh(hessians)[:, -1].reshape(points.shape[:-1])


@jax.jit
def values(points: jax.Array) -> jax.Array:
    """Compute the surface at points (..., 2)."""
    return surface(points[..., 0], points[..., 1])


@jax.jit
def steepness(points: jax.Array) -> jax.Array:
    """Compute the norm of the gradient at points (E, 2)."""
    return jnp.linalg.norm(jax.vmap(jax.grad(_value))(points), axis=-1)
