"""Norms and eigenvalues that neither overflow nor vanish; norms in float32 at least.

Squares of half precision and of very large or small numbers leave the range of their dtype. A power
of two is divided out before they are taken, which costs no digit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.types import PyTree
from lazyjax.widening import widened


def _power_of_two(largest: jax.Array) -> jax.Array:
    """Keep of a number that is not negative its exponent alone; 1 where it is 0 or not finite."""
    kind = jnp.finfo(largest.dtype)
    bits = jnp.dtype(f"uint{kind.bits}")
    exponents = np.asarray((2**kind.nexp - 1) << kind.nmant, bits)
    kept = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(largest), bits) & exponents
    usable = (kept > 0) & (kept < exponents)
    power = jnp.where(usable, jax.lax.bitcast_convert_type(kept, largest.dtype), 1)
    return jnp.minimum(power, 2.0**-kind.minexp)  # XLA multiplies by the reciprocal


@partial(jax.jit, static_argnames="axis", inline=True)  # one program where nothing is traced
def scale_of(array: jax.Array, axis: Any = None) -> jax.Array:
    """Give the power of two below the largest magnitude: `array / scale` is in [-2, 2] or so.

    Parameters
    ----------
    array : (...)
        Floats.
    axis : int or tuple of int, optional
        Axes to take the largest over, which are kept with length 1. None: all, and gives ().

    Returns
    -------
    array
        1 where the largest is 0 or not finite, and never so large that its reciprocal is lost. Its
        derivative is 0.
    """
    return _power_of_two(jnp.max(jnp.abs(array), axis, keepdims=axis is not None, initial=0.0))


@partial(jax.jit, inline=True)
def _common_scale(tree: PyTree) -> jax.Array:
    """Give the power of two below the largest magnitude of all entries of a tree."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]
    largest = [jnp.max(jnp.abs(leaf)) for leaf in leaves] or [jnp.zeros((), jnp.float32)]
    return _power_of_two(jnp.max(jnp.stack(largest)))


def scaled(function: Callable[[Any], Any], x: PyTree) -> Any:
    """Apply a linear function to x over a power of two, which its result is multiplied by.

    Inside it may go through half precision, whose range is small.

    Parameters
    ----------
    function : callable
        Linear, from a pytree of floats to another.
    x : pytree

    Returns
    -------
    pytree
        `function(x)`.
    """
    scale = _common_scale(x)
    y = function(jax.tree.map(lambda a: a / scale.astype(a.dtype), x))
    return jax.tree.map(lambda b: b * scale.astype(b.dtype), y)


@partial(jax.jit, inline=True)
def norm(tree: PyTree) -> jax.Array:
    """Compute the root of the sum of squares of all entries of a tree.

    Parameters
    ----------
    tree : pytree of floats

    Returns
    -------
    () array
        In float32 at least.
    """
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(widened(tree))]
    scale = _common_scale(leaves)
    return scale * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / scale)) for leaf in leaves))


@jax.jit
def asymmetry(square: jax.Array) -> jax.Array:
    """Compute norm(A - A^T) / norm(A) of a matrix (n, n) of any size of entries; 0 for zeros."""
    square = square / scale_of(square)  # a norm may be beyond the range
    size = norm(square)
    return norm(square - square.T) / jnp.where(size > 0, size, 1)


@partial(jax.jit, inline=True)
def eigh(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the eigenvalues and eigenvectors of symmetric matrices of any size of entries.

    Parameters
    ----------
    square : (..., n, n)
        Floats, each matrix symmetric.

    Returns
    -------
    (..., n), (..., n, n)
        As `jnp.linalg.eigh`: eigenvalues ascending, eigenvectors in columns.
    """
    scale = scale_of(square, (-2, -1))
    values, vectors = jnp.linalg.eigh(square / scale)
    return scale[..., 0] * values, vectors
