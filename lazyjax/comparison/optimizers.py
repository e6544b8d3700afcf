"""What an optimiser does: is it gradient descent, with or without a heavy ball, of one rate?

An optimiser of Optax is a pair of functions that do not say what they are. So it is asked: random
gradients go in at random weights, one for each step of a run, and what comes out must be what a
heavy ball makes of them, at every step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lazyjax.types import Params

_ENTRIES = 2  # of a leaf that stands for a whole one


class HeavyBall(NamedTuple):
    """The rule m <- momentum m + gradient, w <- w - learning_rate m."""

    learning_rate: float
    momentum: float


def heavy_ball(
    optimizer: optax.GradientTransformation, params: Params, steps: int
) -> HeavyBall | None:
    """Tell learning rate and momentum of an optimiser that is a heavy ball all the way.

    Parameters
    ----------
    optimizer : optax.GradientTransformation
    params : pytree
        Its structure counts, as an optimiser may treat leaves apart.
    steps : int
        Of the run: a schedule that changes the rate before its end is found out.

    Returns
    -------
    HeavyBall, or None
        None for whatever is not: another rule, a schedule, decay, clipping, a rate for each leaf.

    References
    ----------
    Polyak 1964 (the heavy ball).

    Examples
    --------
    >>> import optax
    >>> heavy_ball(optax.sgd(0.25, momentum=0.5), {"w": jnp.ones(3)}, steps=10)
    HeavyBall(learning_rate=0.25, momentum=0.5)
    >>> heavy_ball(optax.adam(0.1), {"w": jnp.ones(3)}, steps=10)
    """
    leaves, structure = jax.tree.flatten(params)
    shape = max(steps, 3), len(leaves), _ENTRIES
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 8, shape[:1])[:, None, None]
    gradients[0], gradients[1] = 1, 0  # the first two updates are -rate and -rate momentum, exactly
    try:
        updates = np.asarray(_updates(optimizer, structure, gradients, rng.normal(size=shape)))
    except Exception:  # it asks for more than the gradient, or for leaves of other shapes
        return None
    rate = -updates[0].flat[0]
    if not np.isfinite(rate) or rate <= 0:
        return None
    momentum = updates[1].flat[0] / updates[0].flat[0]
    eps = float(jnp.finfo(updates.dtype).eps)
    velocity, size = np.zeros(shape[1:]), 0.0
    for gradient, update in zip(gradients, updates.astype(float), strict=True):
        velocity = momentum * velocity + gradient
        size = max(momentum * size, np.abs(gradient).max(), np.abs(velocity).max())
        if not np.all(np.abs(update + rate * velocity) <= 100 * eps * rate * size):
            return None
    return HeavyBall(float(rate), float(momentum)) if 0 <= momentum < 1 else None


@partial(jax.jit, static_argnames=("optimizer", "structure"))
def _updates(
    optimizer: optax.GradientTransformation, structure: Any, gradients: Any, weights: Any
) -> jax.Array:
    """Give what the optimiser makes of gradients (T, leaves, entries) at so many weights."""

    def tree(rows: jax.Array) -> Params:
        return structure.unflatten(list(rows))

    def step(state: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        gradient, w = at
        update, state = optimizer.update(tree(gradient), state, tree(w))
        return state, jnp.stack(jax.tree.leaves(update))

    return jax.lax.scan(step, optimizer.init(tree(weights[0])), (gradients, weights))[1]
