"""A batch in blocks, one after the other, so that what is made on the way stays close."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.convolutions import plain_convolutions
from lazyjax.costs import ALIVE, rates, results
from lazyjax.equations import Jaxpr
from lazyjax.meshes import zeros
from lazyjax.types import PyTree


def even(n: int, size: int) -> int:
    """Give the size of blocks of at most `size`, evened out over n examples."""
    return -(-n // -(-n // max(1, min(size, n))))


def starts(n: int, size: int) -> np.ndarray:
    """Where blocks begin; the last ends at n, and may overlap the one before."""
    return np.minimum(np.arange(-(-n // size)) * size, n - size)


def take(x: PyTree, start: Any, size: int) -> Any:
    """Give a block of a batch; `start` may be traced."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, size), x)


def in_blocks(function: Callable[[Any], Any], x: PyTree, size: int) -> Any:
    """Apply a function of a batch to blocks of it, one after the other.

    Parameters
    ----------
    function : callable
        From a pytree with the batch on axis 0 to another.
    x : pytree
    size : int
        Examples in a block.

    Returns
    -------
    pytree
        As `function(x)`.
    """
    n = checks.batch("x", x)
    if size >= n:
        return function(x)
    function = plain_convolutions(function)
    like = jax.eval_shape(lambda: function(take(x, 0, size)))
    every = jax.tree.map(lambda a: zeros((n, *a.shape[1:]), a), like)

    def block(every: Any, start: Any) -> tuple[Any, None]:
        new = function(take(x, start, size))
        put = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), every, new
        )
        return put, None

    return jax.lax.scan(block, every, jnp.asarray(starts(n, size)))[0]


def in_close_blocks(features: Callable[[Any], Any], x: PyTree, jaxpr: Jaxpr) -> Any:
    """Compute features of a model in blocks whose intermediate results stay close.

    Parameters
    ----------
    features : callable
        From a pytree with the batch on axis 0 to another.
    x : pytree
    jaxpr : ClosedJaxpr
        Of the model on one example, (C,) its outputs.

    Returns
    -------
    pytree
        As `features(x)`.
    """
    made = ALIVE * (1 + jaxpr.out_avals[0].shape[0]) * results(jaxpr.jaxpr)
    at_once = max(1, int(rates().working / 4 // max(1.0, made)))
    return in_blocks(features, x, even(checks.batch("x", x), at_once))
