"""Structured derivatives: the kernel of a leaf from the two factors of its Jacobian.

For one example, J_k[b, p, q] = sum_s a[b, s, p] d_k[b, s, q], never formed unless that is cheapest.
The kernel of two examples has three orders of contraction, the rows of `ORDERS`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.kernels.costs import operations, rates, results
from lazyjax.kernels.rules import Use
from lazyjax.kernels.views import arrange, count
from lazyjax.kernels.walk import Part, Place, Structure, find, run, split_bias, zeros


class Factors(NamedTuple):
    """The factors of a part, for a batch of examples n and outputs k."""

    a: jax.Array | None  # (n, b, s, p), or tokens (n, s)
    d: jax.Array | None  # (n, k, b, s, q)
    a_swapped: jax.Array | None = None  # (n, b, s, q)
    d_swapped: jax.Array | None = None  # (n, k, b, s, p)


class Shape(NamedTuple):
    """The sizes of a part, of one example."""

    b: int
    s: int  # positions of all its uses
    p: int  # a bias counted
    q: int
    outputs: int
    tokens: int  # of a one-hot a, p is their number
    mixed: bool  # whether some uses are swapped


# --- factors of one example --------------------------------------------------------------------


def _prepared(use: Use, value: jax.Array) -> jax.Array:
    prepare = use.prepare
    for _ in use.view.levels:
        prepare = jax.vmap(prepare)
    return prepare(value)


def _factor_a(use: Use, value: jax.Array, dtype: Any, tokens: int) -> jax.Array:
    """Give a (b, s, x), or tokens (s,)."""
    value = _prepared(use, value)
    if tokens:
        return value.reshape(-1)
    if use.tokens:
        value = jax.nn.one_hot(value, use.tokens, dtype=dtype)
    return arrange(value.astype(dtype), use.a)


def _factor_d(use: Use, cotangents: jax.Array, dtype: Any) -> jax.Array:
    """Give d (k, b, s, x)."""
    found = jax.vmap(lambda d: arrange(d, use.d))(cotangents.astype(dtype))
    return found if use.view.factor == 1 else use.view.factor * found


def factors(
    part: Part,
    uses: dict[Place, Any],
    kept: dict[Place, Any],
    d: dict[Place, Any],
    dtype: Any,
    *,
    joined: bool,
) -> Factors:
    """Gather the factors of a part of one example, its uses along the positions.

    A bias is a column of ones of a, where it is `joined`.
    """

    def gather(places: Any) -> tuple[jax.Array | None, jax.Array | None]:
        chosen = [(uses[place][number], place, number) for place, number in places]
        if not chosen:
            return None, None
        left = [_factor_a(u, kept[place][i], dtype, part.tokens) for u, place, i in chosen]
        right = [_factor_d(u, d[place], dtype) for u, place, _ in chosen]
        axis = 0 if part.tokens else 1
        return jnp.concatenate(left, axis), jnp.concatenate(right, 2)

    a, cotangents = gather(part.straight)
    if part.bias is None or a is None:
        return Factors(a, cotangents, *gather(part.swapped))
    use = uses[part.straight[0][0]][part.straight[0][1]]
    one = jnp.full((*a.shape[:2], 1), 1 / use.view.factor, dtype)  # the bias has no factor
    if part.leaf is None:
        a = one
    elif joined:
        a = jnp.concatenate([a, one], 2)
    return Factors(a, cotangents, *gather(part.swapped))


def shape_of(part: Part, structure: Structure, avals: dict[Place, Any], outputs: int) -> Shape:
    """Give the sizes of a part from the shapes of its factors."""
    sizes = []
    for place, number in (*part.straight, *part.swapped):
        use = structure.uses[place][number]
        sizes.append(count(use.d, avals[place].shape))
    b, _, q = sizes[0]
    use = structure.uses[part.straight[0][0]][part.straight[0][1]]
    p = part.tokens
    if not p and part.leaf is not None:
        own = [atom for axis in use.a.axes for kind, atom in axis or () if kind == "x"]
        p = math.prod(atom.length for atom in own)
    p += part.bias is not None
    return Shape(b, sum(s for _, s, _ in sizes), p, q, outputs, part.tokens, bool(part.swapped))


# --- the three orders --------------------------------------------------------------------------


def _jacobian_of(f: Factors, shape: Shape) -> jax.Array:
    """Give J (k, P) of one example."""
    a, d = f.a, f.d
    if shape.tokens:
        summed = jax.vmap(
            lambda d: jax.ops.segment_sum(d, a, num_segments=shape.tokens)  # type: ignore
        )(d[:, 0])
        return summed.reshape(shape.outputs, -1)
    k, b, s, q = d.shape  # q before p: the larger side of the product first
    if s == 1:
        found = d[:, :, 0, :, None] * a[None, :, 0, None, :]
    elif b == 1:
        found = jnp.einsum("sp,ksq->kqp", a[0], d[:, 0])
    else:
        found = jnp.einsum("bsp,kbsq->kbqp", a, d)
    if f.d_swapped is not None:
        found = found + jnp.einsum("kbsp,bsq->kbqp", f.d_swapped, f.a_swapped).reshape(found.shape)
    return found.reshape(k, -1)


def _equal(one: jax.Array, other: jax.Array, dtype: Any) -> jax.Array:
    """Give the Gram of one-hot vectors, (b, n, s, m, t)."""
    same = (one[:, :, None, None] == other[None, None]) & (one >= 0)[:, :, None, None]
    return same.astype(dtype)[None]


def _gram_of_a(f1: Factors, f2: Factors, shape: Shape) -> jax.Array:
    if shape.tokens:
        return _equal(f1.a, f2.a, f1.d.dtype)
    return jnp.einsum("nbsp,mbtp->bnsmt", f1.a, f2.a)


_GRAM_OF_D = {
    "none": "nkbsq,mlbtq->bnksmlt",
    "diagonal": "nkbsq,mkbtq->bnksmt",
    "trace": "nkbsq,mkbtq->bnsmt",
    "sum": "nkbsq,mkbtq->bnsmt",
}


def _times(gram_a: jax.Array, gram_d: jax.Array, reduce: str) -> jax.Array:
    """Multiply two Grams and sum over what is shared and over the positions."""
    if reduce == "none":
        return jnp.sum(gram_a[:, :, None, :, :, None] * gram_d, (0, 3, 6))  # (n, k, m, l)
    if reduce == "diagonal":
        return jnp.sum(gram_a[:, :, None] * gram_d, (0, 3, 5))  # (n, k, m)
    return jnp.sum(gram_a * gram_d, (0, 2, 4))  # (n, m)


def _same_side(f1: Factors, f2: Factors, shape: Shape, reduce: str) -> jax.Array:
    gram_a = _gram_of_a(f1, f2, shape)
    return _times(gram_a, jnp.einsum(_GRAM_OF_D[reduce], f1.d, f2.d), reduce)


def _other_side(f1: Factors, f2: Factors, reduce: str) -> jax.Array:
    """Give the products of a use of one kind with one of the other: a with d', d with a'."""
    left = jnp.einsum("nbsp,mlbtp->bnsmlt", f1.a, f2.d)
    right = jnp.einsum("nkbsq,mbtq->bnksmt", f1.d, f2.a)
    if reduce == "none":
        return jnp.einsum("bnsmlt,bnksmt->nkml", left, right)
    found = jnp.einsum("bnsmkt,bnksmt->nkm", left, right)
    return found if reduce == "diagonal" else jnp.sum(found, 1)


def _gram(f1: Factors, f2: Factors, shape: Shape, reduce: str) -> jax.Array:
    """Multiply the Gram of a and that of d: N^2 S^2 (P + K^2 Q)."""
    found = _same_side(f1, f2, shape, reduce)
    if shape.mixed:
        one, other = (Factors(f.a_swapped, f.d_swapped) for f in (f1, f2))
        found = found + _same_side(one, other, shape, reduce)
        found = found + _other_side(f1, other, reduce) + _other_side(one, f2, reduce)
    return found


def _apply(f1: Factors, f2: Factors, shape: Shape, reduce: str) -> jax.Array:
    """Apply the Gram of a to d', then multiply by d: N^2 (S^2 (P + K Q) + S K^2 Q)."""

    def one(n: Any) -> jax.Array:
        a, d = n
        gram = _gram_of_a(Factors(a[None], d[None]), f2, shape)[:, 0]  # (b, s, m, t)
        spread = jnp.einsum("bsmt,mlbtq->mbslq", gram, f2.d)
        if reduce == "none":
            return jnp.einsum("kbsq,mbslq->kml", d, spread)
        found = jnp.einsum("kbsq,mbskq->km", d, spread)
        return found if reduce == "diagonal" else jnp.sum(found, 0)

    return jax.lax.map(one, (f1.a, f1.d))


def _outputs(shape: Shape, reduce: str) -> int:
    return shape.outputs**2 if reduce == "none" else shape.outputs


def _jacobian_cost(s: Shape, reduce: str) -> tuple[float, float]:
    return _outputs(s, reduce) * s.b * s.p * s.q, 0


def _gram_cost(s: Shape, reduce: str) -> tuple[float, float]:
    grams = s.b * s.s**2
    pairs = _outputs(s, reduce)
    entries = grams * (pairs if reduce in ("none", "diagonal") else 1)
    if s.mixed:
        return grams * (s.p + s.q) * (1 + s.outputs), 3 * grams * pairs
    return grams * ((0 if s.tokens else s.p) + pairs * s.q), entries if grams > 1 else entries / 4


def _apply_cost(s: Shape, reduce: str) -> tuple[float, float]:
    gram = s.b * s.s**2
    products = gram * ((0 if s.tokens else s.p) + s.outputs * s.q)
    return products + s.b * s.s * _outputs(s, reduce) * s.q, 2 * s.b * s.s * s.outputs * s.q


class Order(NamedTuple):
    """A row of `ORDERS`."""

    contract: Callable[[Factors, Factors, Shape, str], jax.Array] | None
    pair: Callable[[Shape, str], tuple[float, float]]  # multiply-adds, entries touched, of a pair
    admits: Callable[[Shape], bool]


ORDERS = {
    "jacobian": Order(None, _jacobian_cost, lambda s: True),
    "gram": Order(_gram, _gram_cost, lambda s: True),
    "apply": Order(_apply, _apply_cost, lambda s: not s.mixed),
}
"""How the kernel of a part is contracted: through J, by two Grams, or by one Gram and d."""


def _forming(s: Shape) -> float:
    """Count the multiply-adds that form J of one example."""
    return s.outputs * s.b * s.q * (s.s if s.tokens else s.s * s.p)


def seconds(name: str, s: Shape, task: Any, itemsize: int) -> float:
    """Predict how long a part takes, by the rates of the backend."""
    products, entries = ORDERS[name].pair(s, task.reduce)
    time = task.tiles * (2 * products / rates().products + entries * itemsize / rates().bytes)
    if name == "jacobian":
        touched = s.outputs * s.b * s.p * s.q
        forming = 2 * _forming(s) / rates().products + 2 * touched * itemsize / rates().bytes
        time += task.examples * forming
    return time


def cheapest_order(s: Shape, task: Any, itemsize: int) -> str:
    """Name the order that takes the least time for a part."""
    allowed = [name for name, order in ORDERS.items() if order.admits(s)]
    return min(allowed, key=lambda name: seconds(name, s, task, itemsize))


# --- the whole model ---------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is done with each leaf, for one model and one pair of batches."""

    jaxpr: Any
    structure: Structure
    parts: tuple[Part, ...]
    shapes: tuple[Shape, ...]  # of the parts
    orders: tuple[str, ...]
    plain: tuple[int, ...]
    apart: bool  # leaves are kept apart


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
    return Plan(jaxpr, structure, parts, shapes, orders, tuple(sorted(structure.plain)), apart)


Features = dict[str, Any]
"""Of a batch: `jacobians` {leaf: (n, k, P)}, or {-1: ...} of all leaves, and `factors` {part: ...}."""


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

    def of_one(x: Any) -> Features:
        def model(added: Any, plain: Any) -> Any:
            leaves = list(w)
            for leaf, value in zip(plan.plain, plain, strict=True):
                leaves[leaf] = value
            inputs = [*leaves, *jax.tree.leaves(x)]
            (y,), kept = run(jaxpr, inputs, added, uses=structure.uses)
            return y, kept

        added = zeros(jaxpr.jaxpr, set(structure.uses))
        y, pullback, kept = jax.vjp(model, added, [w[i] for i in plan.plain], has_aux=True)
        d, plain = jax.vmap(pullback)(jnp.eye(y.size, dtype=y.dtype))
        jacobians: dict[Any, list[jax.Array]] = {
            leaf: [j.astype(dtype).reshape(y.size, -1)]
            for leaf, j in zip(plan.plain, plain, strict=True)
        }
        contracted = {}
        for i, (part, shape) in enumerate(zip(plan.parts, plan.shapes, strict=True)):
            through_j = plan.orders[i] == "jacobian"
            found = factors(part, structure.uses, kept, d, dtype, joined=not through_j)
            if through_j:
                leaf = part.bias if part.leaf is None else part.leaf
                jacobians.setdefault(leaf, []).append(_jacobian_of(found, shape))
                if part.bias is not None and part.leaf is not None:  # its other factor is 1
                    use = structure.uses[part.straight[0][0]][part.straight[0][1]]
                    summed = jnp.sum(found.d, 2).reshape(y.size, -1) / use.view.factor
                    jacobians[leaf].append(summed)
            else:
                contracted[i] = found
        if not plan.apart:
            jacobians = {-1: [j for js in jacobians.values() for j in js]} if jacobians else {}
        joined = {leaf: jnp.concatenate(js, 1) for leaf, js in jacobians.items()}
        return {"jacobians": joined, "factors": contracted}

    return jax.vmap(of_one)(x)


def contract(plan: Plan, f1: Features, f2: Features, reduce: str) -> dict[int, jax.Array]:
    """Compute the kernel between two batches from their features.

    Parameters
    ----------
    plan : Plan
    f1, f2 : dict
        From `features`.
    reduce : str

    Returns
    -------
    dict
        The kernel of each leaf, or {-1: the whole}: (n, k, m, l), (n, k, m) for "diagonal", (n, m)
        for "trace" and "sum", here summed over the outputs.
    """
    found: dict[int, jax.Array] = {
        leaf: of_jacobians(j, f2["jacobians"][leaf], reduce) for leaf, j in f1["jacobians"].items()
    }
    for i, factors in f1["factors"].items():
        part, order = plan.parts[i], ORDERS[plan.orders[i]]
        assert order.contract is not None
        kernel = order.contract(factors, f2["factors"][i], plan.shapes[i], reduce)
        leaf = (part.bias if part.leaf is None else part.leaf) if plan.apart else -1
        found[leaf] = found[leaf] + kernel if leaf in found else kernel
    return found


def of_jacobians(j1: jax.Array, j2: jax.Array, reduce: str) -> jax.Array:
    """Contract two Jacobians (n, k, P) and (m, l, P), in the layout of `contract`."""
    if reduce == "diagonal":
        return jnp.einsum("nkp,mkp->knm", j1, j2).transpose(1, 0, 2)
    if reduce == "none":
        return jnp.einsum("nkp,mlp->nkml", j1, j2)
    return j1.reshape(j1.shape[0], -1) @ j2.reshape(j2.shape[0], -1).T


def cost(plan: Plan, w: Any, task: Any) -> tuple[float, int, float]:
    """Give what `methods.Engine` wants to know: operations, entries of a pair, working bytes."""
    jaxpr, itemsize = plan.jaxpr.jaxpr, plan.jaxpr.out_avals[0].dtype.itemsize
    counted = task.examples * (1 + task.outputs) * operations(jaxpr)
    working = (1 + task.outputs) * results(jaxpr)
    pairs = task.pairs if task.reduce in ("none", "diagonal") else 1
    entries = [pairs]
    for leaf in plan.plain:
        counted += (
            (task.examples + task.tiles * task.pairs / task.outputs) * task.outputs * w[leaf].size
        )
        working += task.outputs * w[leaf].size * itemsize
    for shape, order in zip(plan.shapes, plan.orders, strict=True):
        counted += task.tiles * ORDERS[order].pair(shape, task.reduce)[0]
        if order == "jacobian":
            counted += task.examples * _forming(shape)
            working += 2 * task.outputs * shape.b * shape.p * shape.q * itemsize
            working += shape.b * shape.s * shape.p * itemsize
        else:
            grams = shape.b * shape.s**2 * (shape.outputs if shape.mixed else 1)
            entries.append(grams * pairs)
    return counted, max(entries), working
