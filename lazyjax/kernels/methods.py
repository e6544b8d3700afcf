"""The methods that compute a block of the kernel, as rows of one table.

A block is the kernel between the examples `x1 (B1, ...)` and `x2 (B2, ...)`, from the Jacobians of
single examples. Outputs that are chosen, or summed, are so in the model that a method is given: it
has C outputs, and a method takes all of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.derivatives import jvp, linearization

Weights = list[jax.Array]  # the leaves that are differentiated

REDUCTIONS = {
    "none": "nkp,mlp->nmkl",
    "diagonal": "nkp,mkp->nmk",
    "trace": "nkp,mkp->nm",
    "sum": "nkp,mkp->nm",  # of a model with one output, the sum
}
"""The reductions, and how two Jacobians (B, C, P) are contracted for each."""

_FROM_PRODUCTS = {"none": "lnk->nkl", "diagonal": "lnl->nl", "trace": "lnl->n", "sum": "lnl->n"}
_COLUMNS_AT_ONCE = 64


class Model(NamedTuple):
    """One output leaf of the model function, on single examples."""

    function: Callable[[Weights, Any], jax.Array]  # w, x (...) -> y (C,)
    w: Weights
    reverse: bool  # whether reverse mode works


class Sizes(NamedTuple):
    """What the operations of a method depend on."""

    n1: int
    n2: int
    symmetric: bool
    outputs: int  # C
    mixed: bool  # whether pairs of different outputs are asked for
    parameters: int  # P, those that are differentiated
    forward: int  # operations of one evaluation on one example


class Method(NamedTuple):
    """A row of the table: the block, its operations, and what it asks of the model."""

    block: Callable[[Model, Any, Any | None, str], jax.Array]
    operations: Callable[[Sizes], int]
    needs_reverse: bool


def _by_rows(model: Model, x: Any) -> Weights:
    def rows(x: Any) -> Weights:
        y, pullback = jax.vjp(lambda w: model.function(w, x), model.w)
        return jax.vmap(lambda cotangent: pullback(cotangent)[0])(jnp.eye(y.size, dtype=y.dtype))

    return [j.reshape(*j.shape[:2], -1) for j in jax.vmap(rows)(x)]


def _by_columns(model: Model, x: Any) -> Weights:
    def outputs(w: Weights) -> jax.Array:
        return jax.vmap(model.function, (None, 0))(w, x)  # (B, C)

    def columns(leaf: int) -> jax.Array:
        size, shape = model.w[leaf].size, model.w[leaf].shape

        def column(p: jax.Array) -> jax.Array:
            direction = [jnp.zeros_like(w) for w in model.w]
            direction[leaf] = jax.nn.one_hot(p, size, dtype=direction[leaf].dtype).reshape(shape)
            return jvp(outputs, model.w, direction)[1]

        found = jax.lax.map(column, jnp.arange(size), batch_size=min(size, _COLUMNS_AT_ONCE))
        return jnp.moveaxis(found, 0, -1)

    return [columns(leaf) for leaf in range(len(model.w))]


def jacobian(model: Model, x: Any) -> Weights:
    """Compute the Jacobian of each example, (B, C, size) a leaf.

    By rows in reverse mode, or by columns in forward mode where that is the only one (a `while`).
    """
    return (_by_rows if model.reverse else _by_columns)(model, x)


def _jacobian_contraction(model: Model, x1: Any, x2: Any | None, reduce: str) -> jax.Array:
    j1 = jacobian(model, x1)
    j2 = j1 if x2 is None else jacobian(model, x2)
    one = jax.tree.map(lambda a: a[0], x1)
    dtype = jax.eval_shape(model.function, model.w, one).dtype
    return sum(
        (
            jnp.einsum(REDUCTIONS[reduce], a.astype(dtype), b.astype(dtype))
            for a, b in zip(j1, j2, strict=True)
        ),
        start=jnp.zeros((), dtype),
    )


def _ntk_vector_products(model: Model, x1: Any, x2: Any | None, reduce: str) -> jax.Array:
    _, product = linearization(
        lambda w: jax.vmap(model.function, (None, 0))(w, x1), model.w
    )  # v -> J1 v (B1, C), its residuals stored once

    def against(x: Any) -> jax.Array:  # one example of x2
        y, pullback = jax.vjp(lambda w: model.function(w, x), model.w)
        cotangents = jnp.eye(y.size, dtype=y.dtype)
        products = jax.vmap(lambda u: product(pullback(u)[0]))(cotangents)  # (C, B1, C)
        return jnp.einsum(_FROM_PRODUCTS[reduce], products)

    return jnp.moveaxis(jax.lax.map(against, x1 if x2 is None else x2), 0, 1)


def _contraction_operations(s: Sizes) -> int:
    examples = s.n1 if s.symmetric else s.n1 + s.n2
    jacobians = examples * (1 + 2 * s.outputs) * s.forward
    pairs = s.outputs**2 if s.mixed else s.outputs
    return jacobians + s.n1 * s.n2 * pairs * s.parameters


def _products_operations(s: Sizes) -> int:
    pullbacks = s.n2 * (1 + 2 * s.outputs) * s.forward
    return s.n1 * s.forward + pullbacks + s.n1 * s.n2 * s.outputs * 2 * s.forward


METHODS = {
    "jacobian_contraction": Method(_jacobian_contraction, _contraction_operations, False),
    "ntk_vector_products": Method(_ntk_vector_products, _products_operations, True),
}
"""The methods, as Novak, Sohl-Dickstein, Schoenholz 2022 name them.

`jacobian_contraction` forms the Jacobians, B C P numbers for each side, and multiplies them:
N C (forward) + N^2 C^2 P operations (N^2 C P where outputs are not mixed).
`ntk_vector_products` takes J1 (J2^T e) for every output of every example of x2, one example at a
time: N^2 C (forward) operations, and memory for C P numbers and C evaluations of x1.
"""


def parameter_count(w: Weights) -> int:
    """Count the parameters that are differentiated."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in w)


def cheapest(sizes: Sizes, *, reverse: bool) -> str:
    """Name the method with the fewest operations among those that the model admits."""
    allowed = [name for name, method in METHODS.items() if reverse or not method.needs_reverse]
    return min(allowed, key=lambda name: METHODS[name].operations(sizes))
