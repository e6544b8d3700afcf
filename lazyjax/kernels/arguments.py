"""What `ntk` is given, checked before any work, and the model on one example that comes of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.kernels.methods import Model, Weights
from lazyjax.kernels.structured import trace
from lazyjax.norms import widened
from lazyjax.types import Params


def _real(name: str, tree: Any) -> list[bool]:
    """Tell which leaves are real floats; refuse complex ones."""
    real = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"`{name}`{jax.tree_util.keystr(path)} must be an array, got "
                f"{type(leaf).__name__}. Keep what is no array in f, as in params, static = "
                "eqx.partition(model, eqx.is_array) of Equinox."
            )
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"`{name}`{jax.tree_util.keystr(path)} must be real, got {dtype}. "
                "Split it into a real and an imaginary part inside f."
            )
        real.append(jnp.issubdtype(dtype, jnp.floating))
    return real


def path_of(path: Any) -> str:
    """Write the path of a leaf as `Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def differentiated(params: Params, wrt: Any) -> tuple[bool, ...]:
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
        If a leaf is no array or complex, or the mask holds anything but bool.
    ValueError
        If nothing is left, or the mask does not fit.
    """
    real = _real("params", params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(real):
        raise ValueError(
            "`params` must hold at least one array of floats to differentiate by, got "
            f"{[str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)]}. "
            "Convert it: jnp.asarray(params, jnp.float32)."
        )
    if wrt is None:
        return tuple(real)
    is_tree = not jax.tree_util.treedef_is_leaf(jax.tree.structure(wrt))
    if callable(wrt) and (not is_tree or isinstance(wrt, Partial)):
        mask = [wrt(path_of(path)) for path in paths]
    else:
        try:
            full = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), wrt, params)
        except ValueError as error:
            raise ValueError(
                "`wrt` must be a function of a path, or a mask with the structure of `params` or "
                f"of the upper part of it, {jax.tree.structure(params)}, got "
                f"{jax.tree.structure(wrt)}. Use lambda path: 'kernel' in path."
            ) from error
        mask = jax.tree.leaves(full)
    for value in mask:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"`wrt` must say True or False of each leaf, got {value!r}. Use bool(...)."
            )
    chosen = tuple(bool(m) and r for m, r in zip(mask, real, strict=True))
    if not any(chosen):
        raise ValueError(
            "`wrt` must leave at least one leaf of floats to differentiate by, got none of "
            f"{[path_of(path) for path in paths]}. Choose some of these."
        )
    return chosen


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


def _on_one(f: Partial, params: Params, x: Any) -> Any:
    """Evaluate the model on one example, as a batch of one; give outputs in float32 at least."""
    y = f(params, jax.tree.map(lambda a: a[None], x))
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    if not shapes or any(shape[:1] != (1,) or not math.prod(shape) for shape in shapes):
        raise ValueError(
            "`f` must return at least one output, with the batch on axis 0, and for a batch of one "
            f"it gave shapes {shapes}. Return y (N, *out)."
        )
    return jax.tree.map(lambda leaf: leaf[0], widened(y))


@jax.jit
def _outputs_of_one(f: Partial, params: Params, x: Any) -> Any:
    return _on_one(f, params, jax.tree.map(lambda a: a[0], x))


def output_shapes(f: Partial, params: Params, x: Any) -> Any:
    """Give the shapes and dtypes of the outputs of one example; traced once, then cached."""
    try:
        out = _outputs_of_one.eval_shape(f, params, x)
    except Exception as error:
        if str(error).startswith("`f` must"):
            raise
        raise ValueError(
            "`params` and `x1` must fit the model: f(params, x) failed for one example of x1, of "
            f"shapes {[np.shape(leaf)[1:] for leaf in jax.tree.leaves(x)]}. Pass parameters and "
            f"inputs of the same model. It said: {error}"
        ) from error
    if not all(_real("f(params, x)", out)):
        raise TypeError(
            "`f` must return floats, got "
            f"{[str(leaf.dtype) for leaf in jax.tree.leaves(out)]}. Return y before it is rounded."
        )
    return out


def chosen_outputs(outputs: Sequence[int] | jax.Array | None, out: Any) -> np.ndarray | None:
    """Check the indices of outputs against every leaf."""
    if outputs is None:
        return None
    if not checks.is_known(outputs):
        raise TypeError(
            "`outputs` must be known where the kernel is called, got a traced array. "
            "Pass a tuple of ints."
        )
    index = np.asarray(outputs)
    if index.ndim != 1 or not index.size:
        raise ValueError(
            f"`outputs` must be a list of at least one index, got shape {index.shape}. "
            "Use None for all outputs."
        )
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"`outputs` must be whole numbers, got {index.dtype}. Use indices.")
    size = min(math.prod(leaf.shape) for leaf in jax.tree.leaves(out))
    wrong = sorted({int(i) for i in index if not 0 <= i < size})
    if wrong:
        raise ValueError(
            f"`outputs` must be indices from 0 to {size - 1} into the flattened output, "
            f"got {wrong}. Drop those."
        )
    if len(np.unique(index)) < index.size:
        raise ValueError(
            f"`outputs` must be distinct, got {index.tolist()}. Drop those that come twice."
        )
    return index


def check_batch_size(
    batch_size: int | tuple[int, int] | None, name: str = "batch_size"
) -> tuple[int, int] | None:
    """Require a whole number or a pair of them; give the pair."""
    if batch_size is None:
        return None
    if isinstance(batch_size, tuple | list):
        if len(batch_size) != 2:
            raise ValueError(
                f"`{name}` must be a whole number or a pair of them, got {batch_size}. "
                "Use (examples of x1, examples of x2)."
            )
        b1, b2 = batch_size
    else:
        b1 = b2 = batch_size
    for size in (b1, b2):
        checks.whole(name, size, least=1, cure="Use None to have it chosen.")
    return int(b1), int(b2)


def same_examples(x1: Any, x2: Any) -> None:
    shapes = [
        (jax.tree.structure(x), [np.shape(leaf)[1:] for leaf in jax.tree.leaves(x)])
        for x in (x1, x2)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`x2` must hold examples like those of `x1`, of shapes "
            f"{shapes[0][1]} in {shapes[0][0]}, got {shapes[1][1]} in {shapes[1][0]}. "
            "Pass inputs of the same model."
        )


def check_precision(precision: str) -> None:
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise ValueError(
            "`precision` must be a name that jax.default_matmul_precision knows, got "
            f"{precision!r}. Use 'highest', 'high' or 'default'."
        ) from error


def model_of(
    f: Partial,
    params: Params,
    x: Any,
    wrt: tuple[bool, ...],
    *,
    leaf: int,
    outputs: Any,
    summed: bool,
) -> Model:
    """Give output leaf `leaf` on one example, flat, with the outputs that are asked for."""
    w, rebuild = split(params, wrt)

    def function(w: Weights, x: Any) -> jax.Array:
        y = jax.tree.leaves(_on_one(f, rebuild(w), x))[leaf].reshape(-1)
        y = y if outputs is None else y[outputs]
        return jnp.sum(y, keepdims=True) if summed else y

    def backward(w: Weights, x: Any) -> Any:
        y, pullback = jax.vjp(lambda w: function(w, x), w)
        return pullback(jnp.ones_like(y))

    def forward(w: Weights, x: Any) -> Any:  # jax.jvp would not raise at a custom_vjp
        return jvp(lambda w: function(w, x), w, w)

    one = jax.tree.map(lambda a: jnp.asarray(a)[0], x)
    jaxpr = trace(function, w, one)
    try:
        jax.eval_shape(backward, w, one)
    except Exception as error:  # a while, or a rule that cannot be transposed
        try:
            jax.eval_shape(forward, w, one)
        except Exception:
            raise ValueError(
                "`f` must have a derivative in reverse or in forward mode by its parameters, and "
                f"has neither. Give it a jax.custom_vjp. Reverse mode said: {error}"
            ) from error
        return Model(function, w, False, jaxpr)
    return Model(function, w, True, jaxpr)


def require_reverse(model: Model, purpose: str) -> Model:
    """Refuse a model that has forward mode only."""
    if not model.reverse:
        raise ValueError(
            f"`f` must have a derivative in reverse mode for {purpose}, and has forward mode only "
            "(a while loop). Use ntk(f, params, x)."
        )
    return model
