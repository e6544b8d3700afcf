"""Checks of arguments, made before any work: the argument, the rule, what came, the cure.

Shapes and dtypes are checked under `jit` too; values only where they are known.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from lazyjax.types import ModelFunction, Params, PyTree


def is_known(value: Any) -> bool:
    """Tell whether every leaf is a concrete value, not a tracer."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def known(name: str, value: Any, function: str) -> None:
    """Require concrete values, for a function that works on the host."""
    if not is_known(value):
        raise TypeError(
            f"`{name}` must be known to {function}, got traced arrays. Call {function} outside of "
            "jit, vmap and shard_map; arrays that are sharded over a mesh may be given as they are."
        )


def model_function(f: ModelFunction) -> Partial:
    """Require a function; give it as a pytree, whose arrays travel as arguments of `jit`."""
    if not callable(f):
        raise TypeError(
            f"`f` must be a model function f(params, x) -> y, got {type(f).__name__}. "
            "Use lazyjax.models.from_linen or from_nnx for a Flax module."
        )
    return f if isinstance(f, Partial) else Partial(f)


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Require a name from a table; the error offers the near ones."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.5)
        cure = f"Did you mean {' or '.join(near)}?" if near else "Use one of these."
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}. {cure}")


def positive(name: str, value: Any, cure: str = "Use a value above 0.") -> None:
    """Require a finite number above 0."""
    if is_known(value) and not (np.all(np.isfinite(value)) and np.all(np.asarray(value) > 0)):
        raise ValueError(f"`{name}` must be positive and finite, got {value}. {cure}")


def not_negative(name: str, value: Any, cure: str = "Use 0 or more.") -> None:
    """Require a finite number of 0 or more."""
    if is_known(value) and not (np.all(np.isfinite(value)) and np.all(np.asarray(value) >= 0)):
        raise ValueError(f"`{name}` must be 0 or more, and finite, got {value}. {cure}")


def whole(name: str, value: Any, *, least: int, cure: str = "") -> None:
    """Require a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"`{name}` must be a whole number, got {value!r}. Use an int of {least} or more."
        )
    if value < least:
        raise ValueError(
            f"`{name}` must be at least {least}, got {value}. {cure or f'Use {least} or more.'}"
        )


def flag(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {value!r}. Use bool(...).")


def floating(name: str, tree: PyTree) -> None:
    """Require arrays of real floats in every leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, dtype = f"`{name}`{jax.tree_util.keystr(path)}", jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            inside = " inside f" if name.startswith("params") else ""
            raise TypeError(
                f"{where} must be real, got {dtype}. "
                f"Split it into a real and an imaginary part{inside}."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} must hold floats, got {dtype}. "
                f"Convert it: jnp.asarray({name}, jnp.float32)."
            )


def finite(name: str, tree: PyTree) -> None:
    """Require that no value is NaN or infinite."""
    for leaf in jax.tree.leaves(tree):
        if not is_known(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        bad = np.size(leaf) - np.count_nonzero(np.isfinite(np.asarray(leaf)))
        if bad:
            raise ValueError(
                f"`{name}` must be finite, got {bad} values that are NaN or infinite. "
                "Drop those examples or mend them."
            )


def same_tree(name: str, tree: PyTree, like: PyTree, like_name: str) -> None:
    """Require the structure, and in each leaf the shape, of another tree."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"`{name}` must have the structure of `{like_name}`, {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(tree)}. Pass parameters of the same model."
        )
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        if np.shape(leaf) != np.shape(other):
            raise ValueError(
                f"`{name}`{jax.tree_util.keystr(path)} must have shape {np.shape(other)}, as in "
                f"`{like_name}`, got {np.shape(leaf)}. Pass parameters of the same model."
            )


def batch(name: str, x: PyTree) -> int:
    """Require a batch on axis 0, the same in every leaf; give its size."""
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"`{name}` must have the batch on axis 0 of every leaf, got shapes "
            f"{[np.shape(leaf) for leaf in jax.tree.leaves(x)]}. Use x[None] for one example."
        )
    size = sizes.pop()
    if size == 0:
        raise ValueError(f"`{name}` must hold at least one example, got 0. Pass a larger batch.")
    assert size is not None
    return size


def outputs(f: ModelFunction, params: Params, x: PyTree) -> Any:
    """Require that `params` and `x` fit the model; give the shapes of `f(params, x)`."""
    try:
        return jax.eval_shape(f, params, x)
    except Exception as error:
        raise ValueError(
            "`params` and `x` must fit the model: f(params, x) failed for x of shape "
            f"{[np.shape(leaf) for leaf in jax.tree.leaves(x)]}. Pass parameters and inputs of the "
            f"same model. It said: {error}"
        ) from error


def targets(f: ModelFunction, params: Params, x: PyTree, y: PyTree) -> None:
    """Require that `y` has the shape of `f(params, x)`."""
    out = outputs(f, params, x)
    if jax.tree.structure(out) != jax.tree.structure(y):
        raise ValueError(
            f"`y` must have the structure of f(params, x), {jax.tree.structure(out)}, "
            f"got {jax.tree.structure(y)}. Pass one target for each output."
        )
    for want, got in zip(jax.tree.leaves(out), jax.tree.leaves(y), strict=True):
        if want.shape != np.shape(got):
            column = want.shape == (*np.shape(got), 1)
            cure = "Use y[:, None]." if column else "Pass targets of the shape of f(params, x)."
            raise ValueError(f"`y` must have shape {want.shape}, got {np.shape(got)}. {cure}")
