"""Structured derivatives: the kernel of each leaf from the two factors of its Jacobian.

What is done with a leaf is planned from the shapes of its factors (`orders`); leaves that enter a
model in another way, or in too small a way to matter, have their plain Jacobian.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.kernels.costs import operations, rates, results
from lazyjax.kernels.factors import (
    Factors,
    Shape,
    bias_jacobian,
    bias_of,
    factors,
    shape_of,
    side_by_side,
)
from lazyjax.kernels.layouts import one_by_one
from lazyjax.kernels.orders import ORDERS, THROUGH_J, Pieces, jacobian_of, seconds, summed
from lazyjax.kernels.walk import Part, Structure, find, run, split_bias, zeros
from lazyjax.meshes import alike, directions

ALIVE = 0.05  # of all intermediate results, the share that XLA keeps at one moment
_SMALL = 4096  # numbers of a leaf, up to which Jacobians are joined to one


class Plan(NamedTuple):
    """What is done with each leaf, for one model and one pair of batches."""

    jaxpr: Any
    structure: Structure
    parts: tuple[Part, ...]
    shapes: tuple[Shape, ...]  # of the parts
    orders: tuple[str, ...]
    plain: tuple[int, ...]
    apart: bool  # leaves are kept apart

    def alike(self, i: int) -> list[int]:
        """Give the parts that are contracted as one with part i: of the same sizes and order."""
        if self.apart or self.shapes[i].tokens:
            return [i]
        own = (self.shapes[i], self.orders[i])
        return [j for j, o in enumerate(zip(self.shapes, self.orders, strict=True)) if o == own]


def trace(function: Callable[..., Any], w: Any, x: Any) -> Any:
    """Give the jaxpr of `(w, x) -> y (C,)` on one example, its inputs the leaves of w and x."""
    tree = jax.tree.structure(x)

    def flat(*leaves: Any) -> Any:
        return function(list(leaves[: len(w)]), tree.unflatten(leaves[len(w) :]))

    return jax.make_jaxpr(flat)(*w, *jax.tree.leaves(x))


def plan(jaxpr: Any, leaves: int, choose: Callable[[Shape], str], *, apart: bool) -> Plan:
    """Find the structure of a model and choose an order for each part.

    Parameters
    ----------
    jaxpr : ClosedJaxpr
        From `trace`.
    leaves : int
        How many of its inputs are leaves of the parameters.
    choose : callable
        From the sizes of a part to a row of `ORDERS`.
    apart : bool
        Whether leaves are kept apart. Otherwise all Jacobians are one array, and a bias goes with
        its product.

    Returns
    -------
    Plan
    """
    structure = find(jaxpr.jaxpr, leaves)
    parts = structure.parts
    if apart:
        parts = tuple(piece for part in parts for piece in split_bias(part))
    avals = jax.eval_shape(lambda: zeros(jaxpr.jaxpr, set(structure.uses)))
    outputs = jaxpr.out_avals[0].shape[0]
    shapes = tuple(shape_of(part, structure, avals, outputs) for part in parts)
    orders = tuple(choose(shape) for shape in shapes)
    plain = sorted(structure.plain)
    if not parts and not plain:  # features have a batch: a Jacobian of zeros, the smallest
        plain = [min(range(leaves), key=lambda leaf: jaxpr.in_avals[leaf].size)]
    return Plan(jaxpr, structure, parts, shapes, orders, tuple(plain), apart)


Features = dict[str, Any]
"""Of a batch, batch on axis 0: {order: {part: factors}} and {"jacobian": {-1 - i: (n, k, P)}}."""


def leaf_of(part: Part) -> int:
    """Give the leaf that a part is of."""
    return bias_of(part).leaf if part.leaf is None else part.leaf


def join(jacobians: dict[int, list[jax.Array]], *, apart: bool) -> dict[int, jax.Array]:
    """Join Jacobians (k, P): those of each leaf, -1 - leaf its name, or all small ones to one."""
    if apart:
        return {-1 - leaf: jnp.concatenate(js, -1) for leaf, js in jacobians.items()}
    every = [j for js in jacobians.values() for j in js]
    small = [j for j in every if j.shape[-1] <= _SMALL]
    large = [j for j in every if j.shape[-1] > _SMALL]
    joined = [*large, *([jnp.concatenate(small, -1)] if small else [])]
    return {-1 - i: j for i, j in enumerate(joined)}


def features(plan: Plan, w: Any, x: Any) -> Features:
    """Compute what the contraction needs of a batch.

    Parameters
    ----------
    plan : Plan
    w : list of arrays
    x : pytree, batch on axis 0

    Returns
    -------
    dict
    """
    structure, jaxpr = plan.structure, plan.jaxpr
    dtype = jaxpr.out_avals[0].dtype
    examples = one_by_one(jaxpr.jaxpr)

    def of_one(x: Any) -> Features:
        def model(added: Any, plain: Any) -> Any:
            leaves = list(w)
            for leaf, value in zip(plan.plain, plain, strict=True):
                leaves[leaf] = value
            inputs = [*leaves, *jax.tree.leaves(x)]
            (y,), kept = run(jaxpr, inputs, added, uses=structure.uses)
            return y, kept

        added = alike(zeros(jaxpr.jaxpr, set(structure.uses)), (w, x))
        y, pullback, kept = jax.vjp(
            examples.model(model), added, [w[i] for i in plan.plain], has_aux=True
        )
        d, plain = jax.vmap(pullback)(directions(y))
        rest = {
            leaf: [j.astype(dtype).reshape(y.size, -1)]
            for leaf, j in zip(plan.plain, plain, strict=True)
        }
        gathered: dict[int, list[Factors]] = {}
        for i, (part, shape, order) in enumerate(
            zip(plan.parts, plan.shapes, plan.orders, strict=True)
        ):
            through_j = order in THROUGH_J
            own = factors(part, structure.uses, kept, d, dtype, balanced=not through_j)
            if through_j and shape.bias:
                bias = bias_jacobian(own.d, own.bias)
                rest.setdefault(bias_of(part).leaf, []).append(bias)
                own = own._replace(bias=None)
            if order == "jacobian":
                rest.setdefault(leaf_of(part), []).append(jacobian_of(own, shape))
            else:
                gathered.setdefault(plan.alike(i)[0], []).append(own)
        found: Features = {}
        for i, every in gathered.items():
            found.setdefault(plan.orders[i], {})[i] = side_by_side(every)
        if rest:
            found["jacobian"] = join(rest, apart=plan.apart)
        return found

    return examples.each(of_one, x)


def contract(plan: Plan, order: str, f1: Any, f2: Any, reduce: str) -> dict[int, jax.Array]:
    """Compute the share of one order of the kernel between two batches.

    Parameters
    ----------
    plan : Plan
    order : str
    f1, f2 : dict
        The entries of `order` in `features`. With f2 = None it is f1 again, and the kernel is
        symmetric to the last bit.
    reduce : str

    Returns
    -------
    dict
        The kernel of each leaf, or {-1: the whole}: (n, k, m, l), (n, k, m) for "diagonal", (n, m)
        for "trace" and "sum", here summed over the outputs.
    """

    def shares() -> Iterator[tuple[int, Pieces]]:
        for i in f1:
            shape = None
            if i >= 0:
                shape = plan.shapes[i]
                shape = shape._replace(b=shape.b * len(plan.alike(i)))
            pieces = ORDERS[order].contract(f1[i], None if f2 is None else f2[i], shape, reduce)
            if not plan.apart:
                yield -1, pieces
            else:
                yield leaf_of(plan.parts[i]) if i >= 0 else -1 - i, pieces

    return summed(shares(), reduce, mirror=f2 is None)


class Work(NamedTuple):
    """What a plan costs."""

    seconds: float  # by the rates of the backend
    kept: int  # bytes of the features of one example
    working: float  # bytes of intermediate results for those, at one moment
    tiles: dict[str, float]  # of each order, numbers that a tile holds for a pair of examples


def cost(plan: Plan, w: Any, task: Any) -> Work:
    """Count what a plan costs."""
    jaxpr, itemsize = plan.jaxpr.jaxpr, plan.jaxpr.out_avals[0].dtype.itemsize
    rate = rates()
    forward = (1 + task.outputs) * operations(jaxpr)
    made = (1 + task.outputs) * results(jaxpr)
    plain = sum(w[leaf].size for leaf in plan.plain)
    time = task.examples * (2 * forward / rate.products + made / rate.bytes)
    time += task.tiles * task.pairs * 2 * plain / rate.products
    kept, working = task.outputs * plain, made * ALIVE + task.outputs * plain * itemsize
    out = task.pairs if task.reduce in ("none", "diagonal") else 1
    biases = any(
        shape.bias and order in THROUGH_J
        for shape, order in zip(plan.shapes, plan.orders, strict=True)
    )
    tiles = {"jacobian": float(out)} if plain or biases else {}
    for shape, order in zip(plan.shapes, plan.orders, strict=True):
        own = ORDERS[order].cost(shape, task.reduce)
        time += seconds(order, shape, task, itemsize)
        mine = shape.jacobian if order == "jacobian" else shape.factors
        kept += mine + (task.outputs * shape.b * shape.q if shape.bias else 0)
        working += (mine + shape.factors) * itemsize if order == "jacobian" else 0
        tiles[order] = max(tiles.get(order, 0.0), out, own.tile)
    return Work(time, kept * itemsize, working, tiles)
