"""Which leaves of the parameters are differentiated, and how to take them out and put them back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.types import Params, PyTree, Weights, Wrt
from lazyjax.widening import widened


def of_floats(name: str, tree: PyTree) -> list[bool]:
    """Tell which leaves hold floats, complex ones included; refuse what is no array."""
    floats = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"`{name}`{jax.tree_util.keystr(path)} must be an array, got "
                f"{type(leaf).__name__}. Keep what is no array in f, as in params, static = "
                "eqx.partition(model, eqx.is_array) of Equinox."
            )
        floats.append(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))
    return floats


def path_of(path: Any) -> str:
    """Write the path of a leaf as `Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _of_each_leaf(name: str, value: Any, params: Params, has: str, cure: str) -> list[Any]:
    """Give what a function says of each path, or a tree, perhaps a prefix, of each leaf."""
    is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if callable(value) and (not is_tree or isinstance(value, Partial)):
        return [value(path_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    try:
        full = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), value, params)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a function of a path, or {has} the structure of `params` or of the "
            f"upper part of it, {jax.tree.structure(params)}, got {jax.tree.structure(value)}. "
            f"{cure}"
        ) from error
    return jax.tree.leaves(full)


def differentiated(params: Params, wrt: Wrt | None) -> tuple[bool, ...]:
    """Tell for each leaf of `params` whether it is differentiated.

    Parameters
    ----------
    params : pytree
    wrt : None, callable or pytree of bool
        All floats, those whose path (`Dense_0/kernel`) the function says True of, or a mask, which
        may be a prefix of `params`. A pytree that can be called, such as a filter specification of
        Equinox, is a mask.

    Returns
    -------
    tuple of bool

    Raises
    ------
    TypeError
        If a leaf is no array, or the mask holds anything but bool.
    ValueError
        If nothing is left, or the mask does not fit.
    """
    floats = of_floats("params", params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(floats):
        raise ValueError(
            "`params` must hold at least one array of floats to differentiate by, got "
            f"{[str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)]}. "
            "Convert it: jnp.asarray(params, jnp.float32)."
        )
    if wrt is None:
        return tuple(floats)
    mask = _of_each_leaf("wrt", wrt, params, "a mask with", "Use lambda path: 'kernel' in path.")
    for value in mask:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"`wrt` must say True or False of each leaf, got {value!r}. Use bool(...)."
            )
    chosen = tuple(bool(m) and r for m, r in zip(mask, floats, strict=True))
    if not any(chosen):
        raise ValueError(
            "`wrt` must leave at least one leaf of floats to differentiate by, got none of "
            f"{[path_of(path) for path in paths]}. Choose some of these."
        )
    return chosen


def numbers_of_leaves(
    metric: Any, params: Params, wrt: tuple[bool, ...]
) -> tuple[jax.Array, ...] | None:
    """Give the numbers of a diagonal metric, of each leaf that is differentiated.

    Parameters
    ----------
    metric : None, callable or pytree
        Positive numbers: one, or an array of its shape, for each leaf of `params`, in a tree that
        may be the upper part of that of `params`; or a function of the path of a leaf.
    params : pytree
    wrt : tuple of bool

    Returns
    -------
    tuple of () or of the leaf's shape

    Raises
    ------
    TypeError, ValueError
        If the metric does not fit, or holds anything but positive numbers.
    """
    if metric is None:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(params)
    cure = "Use lambda path: 0.1 if 'kernel' in path else 1.0."
    numbers = _of_each_leaf("metric", metric, params, "have", cure)
    scales = []
    for number, (path, leaf), moves in zip(numbers, leaves, wrt, strict=True):
        if not moves:
            continue
        name = f"metric of {path_of(path) or 'params'}"
        number = jnp.asarray(number, float) if isinstance(number, int) else number
        checks.floating(name, number)
        checks.positive(name, number)
        if np.ndim(number) and np.shape(number) != np.shape(leaf):
            raise ValueError(
                f"`{name}` must be one number or have the shape of the leaf, {np.shape(leaf)}, got "
                f"{np.shape(number)}. Use jnp.broadcast_to."
            )
        real = jnp.real(jnp.zeros((), jnp.result_type(leaf))).dtype
        scales.append(jnp.asarray(number, jnp.promote_types(real, jnp.float32)))
    return tuple(scales)


def split(params: Params, wrt: tuple[bool, ...]) -> tuple[Weights, Callable[[Weights], Params]]:
    """Give the leaves that are differentiated, and how to put the tree together again.

    Those of half precision are given in float32, so that sums of derivatives are, and go back to
    their own dtype in the tree.
    """
    leaves, structure = jax.tree.flatten(params)

    def rebuild(w: Weights) -> Params:
        new = iter(w)
        return structure.unflatten(
            [
                next(new).astype(jnp.result_type(leaf)) if moves else leaf
                for leaf, moves in zip(leaves, wrt, strict=True)
            ]
        )

    moving = [jnp.asarray(leaf) for leaf, moves in zip(leaves, wrt, strict=True) if moves]
    return widened(moving), rebuild
