"""The methods that compute a kernel, as rows of one table.

Outputs that are chosen, or summed, are so in the model that a method is given: it has C outputs,
and a method takes all of them. A method makes the features of a batch, and from two features the
kernel between the batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax import factors
from lazyjax.convolutions import one_by_one
from lazyjax.costs import ALIVE, operations, rates, results
from lazyjax.derivatives import linearization
from lazyjax.factors import Model, Shape, Treatment, jacobian
from lazyjax.holomorphy import is_complex
from lazyjax.kernels import structured
from lazyjax.kernels.orders import (
    ORDERS,
    cheapest_order,
    efficiency,
    of_jacobians,
    summed,
    symmetric,
    treatment,
)
from lazyjax.kernels.task import WHOLE, Task
from lazyjax.meshes import directions
from lazyjax.norms import scaled
from lazyjax.types import PyTree, Weights

Kernels = dict[int, jax.Array]  # {leaf: kernel}, or {WHOLE: kernel}


class Engine(NamedTuple):
    """A method at work on one model and task.

    Features and contractions come in groups, which are cut into tiles each in its own way.
    """

    features: Callable[[Any], dict[str, Any]]  # of a batch, batch on axis 0
    contract: dict[str, Callable[[Any, Any], Kernels]]  # of f1 and f2; None: f1 again, symmetric
    seconds: float  # by the rates of the backend
    kept: float  # bytes of the features of one example
    working: float  # bytes of intermediate results for those
    weights: float  # bytes of all weights
    tiles: dict[str, float]  # numbers that a tile of a group holds for a pair of examples
    orders: tuple[tuple[int, str], ...] = ()  # leaf and order of each part
    conjugated: bool = False  # features are complex, and those of x2 enter as their conjugates
    real: bool = False  # of complex products the real part is the kernel
    pull: Callable[[dict[str, Any], jax.Array], Weights] | None = None  # features, c (n, k): J^T c


def _for_complex(engine: Engine, model: Model) -> Engine:
    """Say what becomes of complex features: J J^H, or its real part where outputs are real."""
    conjugated = is_complex(model.dtype)
    real = conjugated and not is_complex(model.jaxpr.out_avals[0].dtype)
    return engine._replace(conjugated=conjugated, real=real)


class Method(NamedTuple):
    """A row of the table."""

    engine: Callable[[Model, Any, Task], Engine]
    needs_reverse: bool
    real_only: bool = False  # it knows no complex outputs
    label: str | None = None  # what becomes of a leaf; None: as the order of each part says


# --- Jacobian contraction ----------------------------------------------------------------------


def _contraction(model: Model, x: PyTree, task: Task) -> Engine:
    dtype, rate = model.dtype, rates()
    forward, made = operations(model.jaxpr.jaxpr), results(model.jaxpr.jaxpr)
    parameters = sum(w.size for w in model.w)

    def features(x: PyTree) -> dict[str, Any]:
        leaves = {i: [j.astype(dtype)] for i, j in enumerate(jacobian(model, x))}
        return {"jacobian": factors.join(leaves, apart=task.apart)}

    def contract(f1: PyTree, f2: PyTree) -> Kernels:
        if task.signs:
            f2 = jax.tree.map(jnp.sign, f1 if f2 is None else f2)
        shares = (
            (
                leaf if task.apart else WHOLE,
                of_jacobians(j, None if f2 is None else f2[leaf], task.reduce),
            )
            for leaf, j in f1.items()
        )
        return summed(shares, task.reduce, mirror=f2 is None)

    rows = min(task.n1, task.n2) * task.rows
    featured = task.examples * (1 + 2 * task.outputs) * forward
    contracted = task.tiles * task.pairs * parameters
    kept = task.outputs * parameters * dtype.itemsize
    engine = Engine(
        features,
        {"jacobian": contract},
        seconds=2 * featured / rate.small
        + 2 * contracted / (rate.products * efficiency(rows))
        + task.examples * (made * (1 + task.outputs) / rate.bytes + kept / rate.fresh),
        kept=kept,
        working=made * (1 + task.outputs) * ALIVE + kept,
        weights=parameters * dtype.itemsize,
        tiles={"jacobian": task.pairs if task.reduce in ("none", "diagonal") else 1},
        pull=lambda f, c: factors.pull_jacobians(model.w, f["jacobian"], c, apart=task.apart),
    )
    return _for_complex(engine, model)


# --- NTK-vector products -----------------------------------------------------------------------

_FROM_PRODUCTS = {"none": "lnk->nkl", "diagonal": "lnl->nl", "trace": "lnl->n", "sum": "lnl->n"}


def _products(model: Model, x: PyTree, task: Task) -> Engine:
    forward, made = operations(model.jaxpr.jaxpr), results(model.jaxpr.jaxpr)
    leaves: list[list[int]] = (
        [[i] for i in range(len(model.w))] if task.apart else [list(range(len(model.w)))]
    )

    examples = one_by_one(model.jaxpr.jaxpr)

    def of_leaves(chosen: list[int], x1: PyTree, x2: PyTree) -> jax.Array:
        @examples.model
        def function(moving: Weights, x: PyTree) -> jax.Array:
            w = list(model.w)
            for i, value in zip(chosen, moving, strict=True):
                w[i] = value
            return model.function(w, x)

        start = [model.w[i] for i in chosen]
        _, product = linearization(
            lambda w: jax.vmap(function, (None, 0))(w, x1), start
        )  # v -> J1 v (B1, C), its residuals stored once

        def against(x: PyTree) -> jax.Array:  # one example of x2
            y, pullback = jax.vjp(lambda w: function(w, x), start)
            # XLA would join constants of both passes, and 1e-20 twice is 0 in float32
            rows = jax.vmap(lambda u: jax.tree.map(jnp.conj, pullback(u)[0]))(directions(y))
            if model.roots is not None:
                squares = [model.roots[i] ** 2 for i in chosen]
                rows = list(map(factors.times, rows, squares))
            rows = jax.lax.optimization_barrier(rows)
            products = examples.each(partial(scaled, product), rows)  # (C, B1, C)
            return jnp.einsum(_FROM_PRODUCTS[task.reduce], products)

        kernel = jnp.moveaxis(jax.lax.map(against, x2), 0, 1)
        return (
            kernel.transpose(0, 2, 1, 3)
            if task.reduce == "none"
            else (kernel.transpose(0, 2, 1) if task.reduce == "diagonal" else kernel)
        )

    def contract(x1: PyTree, x2: PyTree) -> Kernels:
        other = x1 if x2 is None else x2
        by_leaf = {c[0] if task.apart else WHOLE: of_leaves(c, x1, other) for c in leaves}
        if x2 is None:
            return {leaf: symmetric(kernel, task.reduce) for leaf, kernel in by_leaf.items()}
        return by_leaf

    counted = (
        task.n2 * (1 + 2 * task.outputs) * forward
        + task.n1 * forward
        + 2 * task.tiles * task.outputs * 2 * forward
    )
    return Engine(
        lambda x: {"products": x},
        {"products": contract},
        seconds=2 * counted / rates().small + task.tiles * task.outputs * 2 * made / rates().bytes,
        kept=0,
        working=made,
        weights=0,
        tiles={"products": task.pairs},
    )


# --- structured derivatives --------------------------------------------------------------------


def _structured(model: Model, x: PyTree, task: Task, order: str | None = None) -> Engine:
    """Choose an order for each part, or take the given one where it admits the part."""
    itemsize = model.dtype.itemsize
    settled = iter(task.orders)

    def choose(shape: Shape) -> Treatment:
        given = next(settled, order)
        if given is not None and ORDERS[given].admits(shape):
            return treatment(given)
        return treatment(cheapest_order(shape, task, itemsize))

    plan = factors.plan(
        model.jaxpr, len(model.w), choose, apart=task.apart, plainly=model.entrywise
    )
    work = structured.cost(plan, model.w, task)

    def contract(order: str) -> Callable[[Any, Any], Kernels]:
        return lambda f1, f2: structured.contract(plan, order, f1, f2, task.reduce)

    engine = Engine(
        partial(factors.features, plan, model.w, roots=model.roots),
        {order: contract(order) for order in work.tiles},
        seconds=work.seconds,
        kept=work.kept,
        working=work.working,
        weights=sum(w.size for w in model.w) * itemsize,
        tiles=work.tiles,
        orders=tuple(
            (factors.leaf_of(part), kept.group)
            for part, kept in zip(plan.parts, plan.treatments, strict=True)
        ),
        pull=partial(factors.pull, plan, model.w),
    )
    return _for_complex(engine, model)


METHODS = {
    "structured_derivatives": Method(_structured, True),
    "jacobian_contraction": Method(_contraction, False, label="plain Jacobian"),
    "ntk_vector_products": Method(_products, True, True, "products, example by example"),
}
"""The methods, as Novak, Sohl-Dickstein, Schoenholz 2022 name them.

`structured_derivatives` keeps the factors of the Jacobian of each product, and forms a Jacobian
only where that is cheapest (`lazyjax.kernels.structured`).
`jacobian_contraction` forms the Jacobians, B C P numbers for each side, and multiplies them:
N C (forward) + N^2 C^2 P operations (N^2 C P where outputs are not mixed).
`ntk_vector_products` takes J1 (J2^T e) for every output of every example of x2, one example at a
time: N^2 C (forward) operations, and memory for C P numbers and C evaluations of x1.
"""


def admits(method: Method, model: Model) -> bool:
    """Tell whether a method can take a model."""
    hermitian = is_complex(model.jaxpr.out_avals[0].dtype)
    return (model.reverse or not method.needs_reverse) and not (hermitian and method.real_only)


def cheapest(model: Model, x: PyTree, task: Task) -> str:
    """Name the method that takes the least time among those that the model admits."""
    allowed = [name for name, m in METHODS.items() if admits(m, model)]
    return min(allowed, key=lambda name: METHODS[name].engine(model, x, task).seconds)
