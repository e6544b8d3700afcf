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
_FEWEST = 64  # steps that are asked of, however short the run: sizes of gradients are random
_AT_ONCE = 4096


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
        Its structure counts, and the number of axes of each leaf, as an optimiser may treat leaves
        apart.
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
    axes = tuple(np.ndim(leaf) for leaf in leaves)
    rng = np.random.default_rng(0)
    updates_of = partial(_updates, optimizer, structure, axes)
    state, before, ball = None, None, None
    for begin in range(0, max(steps, _FEWEST), _AT_ONCE):
        shape = min(_AT_ONCE, max(steps, _FEWEST) - begin), len(leaves), _ENTRIES
        sizes = 10.0 ** rng.uniform(-8, 8, shape[:1])
        gradients = rng.normal(size=shape) * sizes[:, None, None]
        gradients[:, [n == 0 for n in axes]] = gradients[:, [n == 0 for n in axes], :1]
        if begin == 0:
            gradients[0], gradients[1] = 1, 0  # -rate and -rate momentum come of them, exactly
        try:
            updates, state = updates_of(state, gradients, rng.normal(size=shape))
        except Exception:  # it asks for more than the gradient, or for leaves of other shapes
            return None
        eps, updates = float(jnp.finfo(updates.dtype).eps), np.asarray(updates, float)
        if ball is None or before is None:
            rate, before = -updates[0].flat[0], np.zeros(shape[1:])
            if not np.isfinite(rate) or rate <= 0:
                return None
            ball = HeavyBall(float(rate), float(updates[1].flat[0] / updates[0].flat[0]))
        # u_t = momentum u_{t-1} - rate g_t
        kept = ball.momentum * np.concatenate([before[None], updates[:-1]])
        new = ball.learning_rate * gradients
        sizes = np.maximum(np.abs(kept), np.abs(new))
        if not np.all(np.abs(updates - kept + new) <= 100 * eps * sizes):
            return None
        before = updates[-1]
    return ball if ball is not None and 0 <= ball.momentum < 1 else None


@partial(jax.jit, static_argnames=("optimizer", "structure", "axes"))
def _updates(
    optimizer: optax.GradientTransformation,
    structure: Any,
    axes: tuple[int, ...],
    state: Any,
    gradients: Any,
    weights: Any,
) -> tuple[jax.Array, Any]:
    """Give what the optimiser makes of gradients (T, leaves, entries) at so many weights."""

    def tree(rows: jax.Array) -> Params:
        """Give leaves of as many axes as they have; a number is one entry."""
        return structure.unflatten(
            [
                row.reshape(-1, *(1,) * (n - 1)) if n else row[0]
                for row, n in zip(rows, axes, strict=True)
            ]
        )

    def step(state: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        gradient, w = at
        update, state = optimizer.update(tree(gradient), state, tree(w))
        rows = [jnp.broadcast_to(u.reshape(-1), _ENTRIES) for u in jax.tree.leaves(update)]
        return state, jnp.stack(rows)

    first = optimizer.init(tree(weights[0])) if state is None else state
    state, updates = jax.lax.scan(step, first, (gradients, weights))
    return updates, state
