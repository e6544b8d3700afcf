"""The variances of the weights at the start: as they are given, or as a Flax module has them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.leaves import path_of
from lazyjax.types import Params


def of_each_leaf(variance: Any, params: Params) -> tuple[float | None, ...]:
    """Give the variance of each leaf of `params`, None for what is not random.

    Parameters
    ----------
    variance : float, callable or pytree
        A number, a function of path and shape, or a tree that may be the upper part of `params`.
    params : pytree

    Returns
    -------
    tuple of float or None

    Raises
    ------
    TypeError
        If a variance is no number.
    ValueError
        If one is negative, or the tree does not fit.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if callable(variance):
        values = [variance(path_of(path), tuple(np.shape(leaf))) for path, leaf in leaves]
    elif variance is None or isinstance(variance, int | float | np.number):
        values = [variance] * len(leaves)
    else:
        try:
            full = jax.tree.map(
                lambda v, p: [v] * len(jax.tree.leaves(p)),
                variance,
                params,
                is_leaf=lambda v: v is None,
            )
        except ValueError as error:
            raise ValueError(
                "`variance` must be a number, a function of path and shape, or have the structure "
                f"of `params` or of the upper part of it, {jax.tree.structure(params)}, got "
                f"{jax.tree.structure(variance)}. Use variances(module, x) for a Flax module."
            ) from error
        values = jax.tree.leaves(full, is_leaf=lambda v: v is None)
    return tuple(_checked(v, path_of(p), leaf) for v, (p, leaf) in zip(values, leaves, strict=True))


def _checked(value: Any, path: str, leaf: Any) -> float | None:
    if value is None or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return None
    if (
        isinstance(value, bool)
        or np.ndim(value)
        or not isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    ):
        raise TypeError(
            f"`variance` of {path or 'params'} must be one number, or None, got {value!r}. "
            "Give the variance of its entries."
        )
    number = float(value)
    if not (np.isfinite(number) and number >= 0):
        raise ValueError(
            f"`variance` of {path or 'params'} must be 0 or more, and finite, got {number}. "
            "Give the variance of its entries."
        )
    return number
