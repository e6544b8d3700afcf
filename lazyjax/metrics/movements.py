"""How far weights moved: as a whole, by layers, by steps, and across the kinks of ReLUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lazyjax import checks
from lazyjax.metrics.sizes import floats, not_zero
from lazyjax.norms import norm
from lazyjax.types import Params, PyTree, leaf_names


def _moved(params: Params, params0: Params) -> tuple[Any, Any, jax.Array]:
    """Give both trees as real floats, and norm(w0), which is not zero."""
    checks.same_tree("params", params, params0, "params0")
    params, params0 = floats((params, params0))
    size = not_zero("params0", norm(params0), "Measure from weights that are not all zero.")
    return params, params0, size


def relative_weight_movement(params: Params, params0: Params) -> jax.Array:
    """Compute norm(w - w0) / norm(w0) over all parameters.

    Parameters
    ----------
    params, params0 : pytrees
        Of one structure.

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the trees differ, or `params0` is zero.
    """
    params, params0, everything = _moved(params, params0)
    return norm(jax.tree.map(jnp.subtract, params, params0)) / everything


def layer_movement(params: Params, params0: Params) -> dict[str, jax.Array]:
    """Compute the relative movement of each leaf.

    Parameters
    ----------
    params, params0 : pytrees
        Of one structure.

    Returns
    -------
    dict of () arrays
        By the path of the leaf, as in `hidden_0/kernel`. A leaf whose norm at w0 is 0 is divided by
        the norm of all of w0.

    Raises
    ------
    ValueError
        If the trees differ, or `params0` is zero.
    """
    params, params0, everything = _moved(params, params0)
    movements = []
    for w, w0 in zip(jax.tree.leaves(params), jax.tree.leaves(params0), strict=True):
        own = norm(w0)
        movements.append(norm(w - w0) / jnp.where(own > 0, own, everything))
    return dict(zip(leaf_names(params0), movements, strict=True))


def step_sizes(params: Params) -> jax.Array:
    """Compute the size of successive steps, norm(w_{i+1} - w_i) / norm(w_{i+1}).

    Parameters
    ----------
    params : pytree of (G, ...)
        The parameters of a history, one run.

    Returns
    -------
    (G - 1,) array

    Raises
    ------
    ValueError
        If the leaves have no common first axis of 2 or more, or the weights after a step are zero.
    """
    if checks.batch("params", params) < 2:
        raise ValueError(
            "`params` must hold the weights of at least 2 steps, got 1. Record more steps."
        )
    params = floats(params)
    after = jax.vmap(norm)(jax.tree.map(lambda w: w[1:], params))
    not_zero("params", jnp.min(after), "Leave out the steps at which all weights are zero.")
    steps = jax.tree.map(lambda w: w[1:] - w[:-1], params)
    return jax.vmap(norm)(steps) / after


def pattern_change(
    preactivations: Callable[[Params, Any], Any], params: Params, params0: Params, x: PyTree
) -> jax.Array:
    """Compute the share of ReLU units whose sign differs between two sets of weights.

    Parameters
    ----------
    preactivations : callable
        `(params, x)` -> pytree of (N, width); see `lazyjax.models.preactivations`.
    params, params0 : pytrees
    x : array (N, ...) or pytree

    Returns
    -------
    () array
        Over all units and examples, from 0 to 1.

    Raises
    ------
    ValueError
        If the trees differ.
    """
    checks.same_tree("params", params, params0, "params0")
    now, then = preactivations(params, x), preactivations(params0, x)
    changed = jax.tree.map(lambda a, b: jnp.ravel((a > 0) != (b > 0)), now, then)
    return jnp.mean(jnp.concatenate(jax.tree.leaves(changed)))
