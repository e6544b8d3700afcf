"""Structured derivatives: the kernel of each leaf from the two factors of its Jacobian.

The order of contraction of a leaf is chosen from the sizes of its factors (`orders`); leaves that
enter a model in another way, or in too small a way to matter, have their plain Jacobian.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lazyjax.costs import ALIVE, operations, rates, results
from lazyjax.factors import JACOBIAN, Plan, dtype_of, leaf_of
from lazyjax.kernels.orders import ORDERS, Triangle, seconds, summed
from lazyjax.kernels.task import WHOLE, Task
from lazyjax.types import PyTree


def contract(plan: Plan, order: str, f1: PyTree, f2: PyTree, reduce: str) -> dict[int, jax.Array]:
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
        The kernel of each leaf, or {WHOLE: kernel}: (n, k, m, l), (n, k, m) for "diagonal", (n, m)
        for "trace" and "sum", here summed over the outputs.
    """

    def shares() -> Iterator[tuple[int, Triangle]]:
        for i in f1:
            shape, leaf = None, i
            if order != JACOBIAN.group:
                shape, leaf = plan.shapes[i], leaf_of(plan.parts[i])
                shape = shape._replace(b=shape.b * len(plan.alike(i)))
            other = None if f2 is None else f2[i]
            yield leaf if plan.apart else WHOLE, ORDERS[order].contract(f1[i], other, shape, reduce)

    return summed(shares(), reduce, mirror=f2 is None)


class PlanCost(NamedTuple):
    """What a plan costs."""

    seconds: float  # by the rates of the backend
    kept: int  # bytes of the features of one example
    working: float  # bytes of intermediate results for those, at one moment
    tiles: dict[str, float]  # of each order, numbers that a tile holds for a pair of examples


def cost(plan: Plan, w: Any, task: Task) -> PlanCost:
    """Count what a plan costs."""
    jaxpr, itemsize = plan.jaxpr.jaxpr, dtype_of(plan.jaxpr, w).itemsize
    rate = rates()
    forward = (1 + task.outputs) * operations(jaxpr)
    made = (1 + task.outputs) * results(jaxpr)
    plain = sum(w[leaf].size for leaf in plan.plain)
    time = task.examples * (2 * forward / rate.products + made / rate.bytes)
    time += task.tiles * task.pairs * 2 * plain / rate.products
    kept, working = task.outputs * plain, made * ALIVE + task.outputs * plain * itemsize
    out = task.pairs if task.reduce in ("none", "diagonal") else 1
    biases = any(
        shape.bias and treatment.through_j
        for shape, treatment in zip(plan.shapes, plan.treatments, strict=True)
    )
    tiles = {"jacobian": float(out)} if plain or biases else {}
    for shape, treatment in zip(plan.shapes, plan.treatments, strict=True):
        order = treatment.group
        own = ORDERS[order].cost(shape, task.reduce)
        time += seconds(order, shape, task, itemsize)
        mine = shape.jacobian if treatment.formed else shape.factors
        kept += mine + (task.outputs * shape.b * shape.q if shape.bias else 0)
        working += (mine + shape.factors) * itemsize if treatment.formed else 0
        tiles[order] = max(tiles.get(order, 0.0), out, own.tile)
    return PlanCost(time, kept * itemsize, working, tiles)
