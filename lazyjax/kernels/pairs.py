"""The kernel between two model functions of the same parameters, J_f(x1) J_g(x2)^T.

A leaf that enters both as the same kind of product is contracted from the factors of each; of any
other leaf both have the plain Jacobian, whose entries are in the same order.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lazyjax import centering, factors
from lazyjax.factors import JACOBIAN, Plan, Shape, Treatment
from lazyjax.holomorphy import is_complex
from lazyjax.kernels.computation import Job, by_leaves, finished, jobs, whole
from lazyjax.kernels.methods import METHODS, Engine, Kernels
from lazyjax.kernels.orders import ORDERS, of_jacobians, summed, treatment
from lazyjax.kernels.request import Request
from lazyjax.kernels.task import WHOLE, Task
from lazyjax.kernels.tiles import choose_blocks, contract, put_together
from lazyjax.types import PyTree


def _plan(job: Job, treatments: Iterable[Treatment] = (), plainly: tuple[int, ...] = ()) -> Plan:
    """Plan what is kept of each part, its Jacobian where nothing is said."""
    model, each = job.model, iter(treatments)
    return factors.plan(
        model.jaxpr, len(model.w), lambda _: next(each, JACOBIAN), apart=True, plainly=plainly
    )


def _alone(plan: Plan) -> dict[int, tuple[Any, Shape]]:
    """Give the leaves that have one part, with what its factors cover, and its sizes."""
    leaves = [factors.leaf_of(part) for part in plan.parts]
    return {
        leaf: (factors.covered(plan, i), plan.shapes[i])
        for i, leaf in enumerate(leaves)
        if leaves.count(leaf) == 1
    }


def _cheaper(one: Shape, other: Shape) -> str:
    """Choose between two Grams and two Jacobians, by multiply-adds for a pair of examples."""
    grams = one.s * other.s * one.b * (one.p + one.outputs * other.outputs * one.q)
    jacobians = one.outputs * other.outputs * one.b * one.p * one.q
    return "jacobian" if one.mixed or other.mixed or jacobians <= grams else "gram"


def _plans(one: Job, other: Job) -> tuple[Plan, Plan]:
    """Let two plans keep of each leaf what can be contracted with each other."""
    ours, theirs = _alone(_plan(one)), _alone(_plan(other))
    fitting = {
        leaf
        for leaf in ours.keys() & theirs.keys()
        if ours[leaf][0] == theirs[leaf][0] and leaf not in one.model.entrywise
    }
    orders = {leaf: _cheaper(ours[leaf][1], theirs[leaf][1]) for leaf in fitting}
    plainly = tuple(leaf for leaf in range(len(one.model.w)) if leaf not in fitting)

    def ordered(job: Job) -> Plan:
        leaves = map(factors.leaf_of, _plan(job, plainly=plainly).parts)
        return _plan(job, [treatment(orders.get(leaf, "jacobian")) for leaf in leaves], plainly)

    return ordered(one), ordered(other)


def _by_leaf(plan: Plan, kept: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Give the factors of parts the numbers of their leaves, as Jacobians have."""
    leaves = {i: factors.leaf_of(part) for i, part in enumerate(plan.parts)}
    return {
        group: own if group == "jacobian" else {leaves[i]: f for i, f in own.items()}
        for group, own in kept.items()
    }


def _engines(one: Job, other: Job, x1: PyTree, x2: PyTree, task: Task, method: str) -> Any:
    """Give the features of each side, and an engine that contracts them."""
    models = one.model, other.model
    roots = one.model.roots
    structured = method != "jacobian_contraction" and all(m.reverse for m in models)
    structured = structured and not task.signs
    if structured:
        plans = _plans(one, other)
        shapes = {
            factors.leaf_of(part): shape
            for part, shape in zip(plans[0].parts, plans[0].shapes, strict=True)
        }
        sides = [
            lambda x, p=plan, m=model: _by_leaf(p, factors.features(p, m.w, x, roots=roots))
            for plan, model in zip(plans, models, strict=True)
        ]
        groups = {"jacobian", *(kept.group for kept in plans[0].treatments)}
    else:
        row = METHODS["jacobian_contraction"]
        sides = [
            row.engine(job.model, x, task._replace(apart=True)).features
            for job, x in ((one, x1), (other, x2))
        ]
        shapes, groups = {}, {"jacobian"}

    def between(group: str) -> Any:
        def contracted(f1: dict[int, Any], f2: dict[int, Any]) -> Kernels:
            if task.signs:
                f2 = jax.tree.map(jnp.sign, f2)
            shares = (
                (
                    leaf if task.apart else WHOLE,
                    of_jacobians(f1[leaf], f2[leaf], task.reduce)
                    if group == "jacobian"
                    else ORDERS[group].contract(f1[leaf], f2[leaf], shapes[leaf], task.reduce),
                )
                for leaf in sorted(f1.keys() & f2.keys())
            )
            return summed(shares, task.reduce, mirror=False)

        return contracted

    measured = METHODS["structured_derivatives" if structured else "jacobian_contraction"]
    sizes = measured.engine(one.model, x1, task)
    dtype = jnp.result_type(one.model.dtype, other.model.dtype)
    outputs_are_real = not is_complex(one.shape.dtype)
    engine = Engine(
        features=sides[0],
        contract={group: between(group) for group in groups},
        seconds=0.0,
        kept=sizes.kept,
        working=sizes.working,
        weights=sizes.weights,
        tiles={group: float(task.pairs * _positions(shapes)) for group in groups},
        conjugated=is_complex(dtype),
        real=is_complex(dtype) and outputs_are_real,
    )
    return engine, engine._replace(features=sides[1])


def _positions(shapes: dict[int, Shape]) -> int:
    """Give the pairs of positions of the largest part, which a tile of Grams holds."""
    return max((shape.b * shape.s**2 for shape in shapes.values()), default=1)


@jax.jit
def kernels_between(one: Request, other: Request) -> Any:
    """Compute the kernel between the outputs of two model functions.

    Parameters
    ----------
    one, other : Request
        Of f and x1, and of g and x2, with the same options.

    Returns
    -------
    (N1, N2, *out_f, *out_g), (N1, N2, *out) or (N1, N2), or with `per_leaf` a tree of them
    """
    options = one.options
    with options.in_force():
        (ours,), (theirs,) = jobs(one), jobs(other)
        outputs = max(math.prod(ours.out), math.prod(theirs.out))
        task = ours.task._replace(
            n2=other.n1,
            symmetric=False,
            outputs=1 if options.reduce == "sum" else outputs,
        )
        left, right = _engines(ours, theirs, one.x1, other.x1, task, options.method)
        left, right = (finished(engine, math.prod(ours.out)) for engine in (left, right))
        blocks = choose_blocks(left, task, options.batch_size, options.level)

        def of_features(f1: Any, f2: Any) -> Kernels:
            shared = {g: c for g, c in left.contract.items() if g in f1 and g in f2}
            engine = left._replace(contract=shared)
            return contract(engine, task, f1, f2, blocks.rows, blocks.columns)

        by_leaf = put_together(of_features, (left, right), one.x1, other.x1, blocks)

        def of(leaf: int) -> jax.Array:
            job = ours._replace(task=task)
            theta = whole(by_leaf, job, leaf, theirs.out)
            mixed = options.reduce == "none"
            weights = one.weights[0], other.weights[0]
            return centering.kernel(
                theta, weights, center=options.center, mixed=mixed, symmetric=False
            )

        return by_leaves(of, one)
