"""The mean over the examples taken away from derivatives, and weights of the examples.

C = diag(sqrt(w)) (I - 1 w^T / sum(w)) takes the rows of a Jacobian to those of the weighted sample
covariance, (C J)^T (C J) = sum_n w_n (J_n - mean J)^T (J_n - mean J), with mean J = sum_n w_n J_n /
sum(w). All that is linear in J follows by C and its transpose alone: nothing is differentiated
again. Without a mean taken away C = diag(sqrt(w)); without weights every w_n is 1.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.widening import widened


def check_weights(weights: Any, n: int, name: str = "weights") -> jax.Array | None:
    """Require a number for each of n examples, none negative and not all 0."""
    if weights is None:
        return None
    checks.floating(name, weights)
    if np.shape(weights) != (n,):
        raise ValueError(
            f"`{name}` must have shape ({n},), one for each example, got {np.shape(weights)}. "
            "Use None for equal ones."
        )
    checks.not_negative(name, weights)
    if checks.is_known(weights) and not np.any(np.asarray(weights)):
        raise ValueError(f"`{name}` must not all be 0. Use None for equal ones.")
    return jnp.asarray(widened(weights))


def _along(weights: jax.Array, array: jax.Array, axis: int) -> jax.Array:
    """Let a number for each example stand beside the entries of an array."""
    shape = [1] * array.ndim
    shape[axis] = len(weights)
    return weights.astype(array.dtype).reshape(shape)


def mean_over(array: jax.Array, weights: jax.Array | None, axis: int) -> jax.Array:
    """Take the weighted mean along an axis, which stays, of length 1."""
    if weights is None:
        return jnp.mean(array, axis, keepdims=True)
    share = _along(weights / jnp.sum(weights), array, axis)
    return jnp.sum(share * array, axis, keepdims=True)


def forth(array: jax.Array, weights: jax.Array | None, *, center: bool) -> jax.Array:
    """Apply C along axis 0, to (N, ...)."""
    if center:
        array = array - mean_over(array, weights, 0)
    return array if weights is None else _along(jnp.sqrt(weights), array, 0) * array


def back(array: jax.Array, weights: jax.Array | None, *, center: bool) -> jax.Array:
    """Apply the transpose of C along axis 0, to (N, ...)."""
    if weights is not None:
        array = _along(jnp.sqrt(weights), array, 0) * array
    if not center:
        return array
    total = jnp.sum(array, 0, keepdims=True)
    if weights is None:
        return array - total / len(array)
    return array - _along(weights / jnp.sum(weights), array, 0) * total


def _swapped(array: jax.Array) -> jax.Array:
    """Swap the two examples of a kernel, and the outputs that belong to them."""
    half = (array.ndim - 2) // 2
    return jnp.transpose(array, (1, 0, *range(2 + half, array.ndim), *range(2, 2 + half)))


def kernel(
    theta: jax.Array,
    weights: tuple[jax.Array | None, jax.Array | None],
    *,
    center: bool,
    mixed: bool,
    symmetric: bool,
) -> jax.Array:
    """Give C1 Theta C2^T.

    Parameters
    ----------
    theta : (N1, N2, *out, *out), (N1, N2, *out) or (N1, N2)
    weights : pair of (N1,) and (N2,) or None
    center : bool
    mixed : bool
        Whether the outputs stand there twice.
    symmetric : bool
        Whether both batches are one: the result then is symmetric to the last bit, if theta is.

    Returns
    -------
    array like `theta`
    """
    one, other = weights

    def swapped(array: jax.Array) -> jax.Array:
        return jnp.conj(_swapped(array) if mixed else jnp.swapaxes(array, 0, 1))

    if center:
        rows = jax.lax.optimization_barrier(mean_over(theta, other, 1))
        columns = swapped(rows) if symmetric else mean_over(theta, one, 0)
        middle = mean_over(rows, one, 0)
        if symmetric:
            middle = (middle + swapped(middle)) / 2
        theta = theta - (rows + columns) + middle
    roots = [
        _along(jnp.sqrt(w), theta, axis) for axis, w in enumerate(weights) if w is not None
    ]  # multiplied first, as their product does not know which came first
    return theta * math.prod(roots[1:], start=roots[0]) if roots else theta


def pair_of_weights(
    weights: Any, n1: int, n2: int | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Check the weights of one batch, or of two."""
    if n2 is None:
        one = check_weights(weights, n1)
        return one, one
    if weights is None:
        return None, None
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        raise ValueError(
            "`weights` must be a pair for the kernel of two batches, got "
            f"{type(weights).__name__}. Use (those of x1, those of x2); None for equal ones."
        )
    one = check_weights(weights[0], n1, "weights[0]")
    return one, check_weights(weights[1], n2, "weights[1]")
