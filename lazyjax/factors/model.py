"""A model on single examples: its outputs, its jaxpr, its plain Jacobian."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax.convolutions import one_by_one
from lazyjax.derivatives import jvp
from lazyjax.equations import Jaxpr
from lazyjax.holomorphy import is_complex
from lazyjax.leaves import of_floats, split
from lazyjax.meshes import directions
from lazyjax.types import Params, PyTree, Weights
from lazyjax.widening import widened

_COLUMNS_AT_ONCE = 64


class Model(NamedTuple):
    """One output leaf of the model function, on single examples."""

    function: Callable[[Weights, Any], jax.Array]  # w, x (...) -> y (C,)
    w: Weights
    reverse: bool  # whether reverse mode works
    jaxpr: Jaxpr  # of the function; its inputs are the leaves of w and x
    roots: tuple[jax.Array, ...] | None = None  # what derivatives by each leaf are multiplied by

    @property
    def dtype(self) -> np.dtype:
        """That of derivatives: complex where a leaf or the outputs are."""
        return dtype_of(self.jaxpr, self.w)

    @property
    def entrywise(self) -> tuple[int, ...]:
        """Leaves whose derivatives have a number for each entry."""
        return tuple(i for i, root in enumerate(self.roots or ()) if root.ndim)


def dtype_of(jaxpr: Jaxpr, w: Weights) -> np.dtype:
    """Give the dtype of derivatives."""
    complex_ones = (leaf.dtype for leaf in w if is_complex(leaf))
    return np.result_type(jaxpr.out_avals[0].dtype, *complex_ones)


def by_directions(pullback: Callable[[jax.Array], Any], y: jax.Array) -> Any:
    """Pull each direction of the outputs (C,) back: the derivatives by what was differentiated.

    Of complex y by complex w the derivative dy / dw of a holomorphic function; by real w, of which
    a pullback gives the real part alone, that of Re y and i times that of Im y. Of real y by
    complex w dy / dRe w - i dy / dIm w.
    """
    each = jax.vmap(pullback)
    derivative = each(directions(y))
    if not is_complex(y):
        return derivative
    turned = each(-1j * directions(y))
    return jax.tree.map(lambda a, b: a if is_complex(a) else a + 1j * b, derivative, turned)


def _by_rows(model: Model, x: PyTree) -> Weights:
    examples = one_by_one(model.jaxpr.jaxpr)

    def rows(x: PyTree) -> Weights:
        y, pullback = jax.vjp(examples.model(lambda w: model.function(w, x)), model.w)
        return by_directions(lambda cotangent: pullback(cotangent)[0], y)

    return [j.reshape(*j.shape[:2], -1) for j in examples.each(rows, x)]


def _by_columns(model: Model, x: PyTree) -> Weights:
    def outputs(w: Weights) -> jax.Array:
        return jax.vmap(model.function, (None, 0))(w, x)  # (B, C)

    def columns(leaf: int) -> jax.Array:
        size, shape = model.w[leaf].size, model.w[leaf].shape

        def along(p: jax.Array, unit: complex) -> jax.Array:
            direction = [jnp.zeros_like(w) for w in model.w]
            own = unit * jax.nn.one_hot(p, size, dtype=direction[leaf].dtype)
            direction[leaf] = own.reshape(shape)
            return jvp(outputs, model.w, direction)[1]

        def column(p: jax.Array) -> jax.Array:
            derivative = along(p, 1)
            if is_complex(derivative) or not is_complex(model.w[leaf]):
                return derivative
            return derivative - 1j * along(p, 1j)

        every = jax.lax.map(column, jnp.arange(size), batch_size=min(size, _COLUMNS_AT_ONCE))
        return jnp.moveaxis(every, 0, -1)

    return [columns(leaf) for leaf in range(len(model.w))]


def jacobian(model: Model, x: PyTree) -> Weights:
    """Compute the Jacobian of each example, (B, C, size) a leaf.

    By rows in reverse mode, or by columns in forward mode where that is the only one (a `while`).
    """
    by_leaf = (_by_rows if model.reverse else _by_columns)(model, x)
    if model.roots is None:
        return by_leaf
    return [times(j, root.reshape(-1)) for j, root in zip(by_leaf, model.roots, strict=True)]


def times(derivative: jax.Array, root: jax.Array) -> jax.Array:
    """Multiply derivatives (.., *leaf) by one number, or by those of a leaf."""
    if root.size == 1:
        return derivative * root.reshape(())
    return derivative * root[(None,) * (derivative.ndim - root.ndim)]


def trace(function: Callable[..., Any], w: Any, x: PyTree) -> Jaxpr:
    """Give the jaxpr of `(w, x) -> y (C,)` on one example, its inputs the leaves of w and x."""
    tree = jax.tree.structure(x)

    def flat(*leaves: Any) -> Any:
        return function(list(leaves[: len(w)]), tree.unflatten(leaves[len(w) :]))

    return jax.make_jaxpr(flat)(*w, *jax.tree.leaves(x))


def _on_one(f: Partial, params: Params, x: PyTree) -> Any:
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
def _outputs_of_one(f: Partial, params: Params, x: PyTree) -> Any:
    return _on_one(f, params, jax.tree.map(lambda a: a[0], x))


def output_shapes(f: Partial, params: Params, x: PyTree) -> Any:
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
    if not all(of_floats("f(params, x)", out)):
        raise TypeError(
            "`f` must return floats, got "
            f"{[str(leaf.dtype) for leaf in jax.tree.leaves(out)]}. Return y before it is rounded."
        )
    return out


def model_of(
    f: Partial,
    params: Params,
    x: PyTree,
    wrt: tuple[bool, ...],
    *,
    leaf: int,
    outputs: Any,
    summed: bool,
    metric: tuple[jax.Array, ...] | None = None,
) -> Model:
    """Give output leaf `leaf` on one example, flat, with the outputs that are asked for."""
    roots = None if metric is None else tuple(map(jnp.sqrt, metric))
    w, rebuild = split(params, wrt)

    def function(w: Weights, x: PyTree) -> jax.Array:
        y = jax.tree.leaves(_on_one(f, rebuild(w), x))[leaf].reshape(-1)
        y = y if outputs is None else y[outputs]
        return jnp.sum(y, keepdims=True) if summed else y

    def backward(w: Weights, x: PyTree) -> Any:
        y, pullback = jax.vjp(lambda w: function(w, x), w)
        return pullback(jnp.ones_like(y))

    def forward(w: Weights, x: PyTree) -> Any:  # jax.jvp would not raise at a custom_vjp
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
        return Model(function, w, False, jaxpr, roots)
    return Model(function, w, True, jaxpr, roots)


def require_reverse(model: Model, purpose: str) -> Model:
    """Refuse a model that has forward mode only."""
    if not model.reverse:
        raise ValueError(
            f"`f` must have a derivative in reverse mode for {purpose}, and has forward mode only "
            "(a while loop). Use ntk(f, params, x)."
        )
    return model
