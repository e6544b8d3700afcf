"""The orders in which the kernel of a part is contracted from its factors.

For one example J_k[b, p, q] = sum_s a[b, s, p] d_k[b, s, q]. The kernel of two examples is the
product of their Jacobians, or a sum over positions of the Grams of a and of d.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lazyjax.costs import rates
from lazyjax.factors import Factors, Shape, Treatment
from lazyjax.kernels.task import Task
from lazyjax.meshes import may_be_shared_out, zeros

_LEAST_WIDTH = 256  # of a slice of the parameters, so that the product of two is worth its call
_LEAST_ROWS = 160  # of a block of a symmetric kernel, likewise
_BLOCKS = 4  # in a row of one: 10 of 16 are computed


# --- through Jacobians -------------------------------------------------------------------------


def _product(j1: jax.Array, j2: jax.Array, reduce: str) -> jax.Array:
    """Multiply Jacobians (n, k, P) and (m, k, P): (n, k, m, l), (n, k, m) or (n, m)."""
    n, k, size = j1.shape
    m, other, _ = j2.shape
    if reduce == "none":
        return (j1.reshape(n * k, size) @ j2.reshape(m * other, size).T).reshape(n, k, m, other)
    if reduce == "diagonal":
        return jnp.einsum("nkp,mkp->nkm", j1, j2)
    return j1.reshape(n, k * size) @ j2.reshape(m, k * size).T


Triangle = list[list[jax.Array]]
"""Rows of blocks of a kernel; of a symmetric one, up to the diagonal."""


def _parts(n: int, k: int, reduce: str) -> list[slice]:
    """Cut the examples of a symmetric kernel, so that a block is worth a product."""
    rows = n * k if reduce == "none" else n
    count = max(1, min(rows // _LEAST_ROWS, n, _BLOCKS))
    return [slice(*ends) for ends in pairwise(n * i // count for i in range(count + 1))]


def _over_slices(
    one: Callable[[Any, slice], jax.Array],
    other: Callable[[Any, slice], jax.Array] | None,
    slices: int,
    reduce: str,
) -> Triangle:
    """Sum the products of slices of Jacobians, so that they are read while they are at hand.

    Functions give a slice of the Jacobians of some examples. `other=None` is `one` again: only the
    blocks on and below the diagonal are multiplied.
    """
    every = slice(None)
    n, k, _ = jax.eval_shape(lambda: one(0, every)).shape

    def products(c: Any) -> Triangle:
        if other is not None:
            return [[_product(one(c, every), other(c, every), reduce)]]
        js = [one(c, part) for part in _parts(n, k, reduce)]
        return [[_product(j, i, reduce) for i in js[: row + 1]] for row, j in enumerate(js)]

    if slices == 1:
        return products(0)
    return jax.lax.fori_loop(
        0,
        slices,
        lambda c, sums: jax.tree.map(jnp.add, sums, products(c)),
        [[zeros(a.shape, a) for a in row] for row in jax.eval_shape(products, 0)],
    )


def _mirrored(piece: jax.Array, reduce: str) -> jax.Array:
    """Swap the two sides."""
    axes = {"none": (2, 3, 0, 1), "diagonal": (2, 1, 0)}.get(reduce, (1, 0))
    return piece.transpose(axes)


def symmetric(square: jax.Array, reduce: str) -> jax.Array:
    """Give above the diagonal what is below it.

    On one device by a gather, symmetric to the last bit: for a choice of two arrays XLA may compute
    an entry twice, and round it differently. On several devices by that choice, as a gather would
    bring every row to every device.
    """
    if may_be_shared_out():
        n = jnp.arange(len(square)).reshape(-1, *(1,) * (square.ndim - 1))
        m, other = _mirrored(n, reduce), _mirrored(square, reduce)
        return jnp.where(n > m, square, jnp.where(n < m, other, (square + other) / 2))
    n, k = square.shape[:2] if reduce in ("none", "diagonal") else (len(square), 1)
    size = n * k if reduce == "none" else n
    one, other = (jax.lax.broadcasted_iota(int, (size, size), axis) for axis in (0, 1))
    below = jnp.maximum(one, other), jnp.minimum(one, other)
    if reduce == "diagonal":  # (n, k, m)
        below = below[0][:, None], jnp.arange(k)[None, :, None], below[1][:, None]
    flat = square.reshape(size, size) if reduce == "none" else square
    return flat.at[below].get(mode="promise_in_bounds").reshape(square.shape)


def _whole(pieces: Triangle, reduce: str) -> jax.Array:
    """Put the pieces of a symmetric kernel together, each beside its mirror image."""
    axis = {"none": 2, "diagonal": 2}.get(reduce, 1)  # of the other examples
    rows = [
        [*row[:-1], symmetric(row[-1], reduce)]
        + [_mirrored(below[i], reduce) for below in pieces[i + 1 :]]
        for i, row in enumerate(pieces)
    ]
    return jnp.concatenate([jnp.concatenate(row, axis) for row in rows])


def summed(
    shares: Iterable[tuple[int, Triangle]], reduce: str, *, mirror: bool
) -> dict[int, jax.Array]:
    """Add up what belongs to the same leaf; `mirror` the kernel of a batch with itself."""
    sums: dict[int, Triangle] = {}
    for leaf, pieces in shares:
        sums[leaf] = jax.tree.map(jnp.add, sums[leaf], pieces) if leaf in sums else pieces
    return {leaf: _whole(p, reduce) if mirror else p[0][0] for leaf, p in sums.items()}


def _slices(length: int, entries: int, itemsize: int) -> tuple[int, int]:
    """Cut an axis: how many slices, and how long, when one of its indices makes `entries`."""
    size = max(1, min(length, rates().cache // (2 * entries * itemsize)))
    count = max(1, -(-length // size))  # a leaf may be empty
    return count, -(-length // count)


def _slice(array: jax.Array, c: Any, size: int, axis: int) -> jax.Array:
    """Take slice c of an axis; the last one ends with it, and is 0 where the one before was."""
    length = array.shape[axis]
    if size == length:
        return array
    start = jnp.minimum(c * size, length - size)
    taken = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    if length % size == 0:
        return taken
    index = jnp.arange(size).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    return jnp.where(index + start >= c * size, taken, 0)


def of_jacobians(j1: jax.Array, j2: jax.Array | None, reduce: str) -> Triangle:
    """Contract two Jacobians (n, k, P) and (m, l, P), or one with itself.

    Returns
    -------
    blocks (n, k, m, l), (n, k, m) for "diagonal", (n, m) for "trace" and "sum"
    """
    n, k, length = j1.shape
    rows = n * k + (0 if j2 is None else j2.shape[0] * k)
    slices, size = _slices(length, rows, j1.dtype.itemsize)
    if size < _LEAST_WIDTH:
        slices, size = _slices(length, 1, j1.dtype.itemsize)

    def sliced(j: jax.Array) -> Callable[[Any, slice], jax.Array]:
        return lambda c, examples: _slice(j[examples], c, size, 2)

    return _over_slices(sliced(j1), None if j2 is None else sliced(j2), slices, reduce)


def _formed(f1: Factors, f2: Factors | None, shape: Shape, reduce: str) -> Triangle:
    """Form the Jacobians slice by slice, over b and q, and multiply them."""
    n = f1.d.shape[0] + (0 if f2 is None else f2.d.shape[0])
    count, size = _slices(shape.q, n * shape.outputs * shape.p, f1.d.dtype.itemsize)

    def formed(f: Factors) -> Callable[[Any, slice], jax.Array]:
        def one(c: Any, examples: slice) -> jax.Array:
            i = c // count
            a = jax.lax.dynamic_index_in_dim(f.a[examples], i, 1, keepdims=False)
            d = jax.lax.dynamic_index_in_dim(f.d[examples], i, 2, keepdims=False)
            d = _slice(d, c % count, size, 3)
            j = jnp.einsum("nksq,nsp->nkqp", d, a)
            return j.reshape(*j.shape[:2], -1)

        return one

    other = None if f2 is None else formed(f2)
    return _over_slices(formed(f1), other, shape.b * count, reduce)


# --- through Grams -----------------------------------------------------------------------------


def _gram_of(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """Compute `jnp.einsum`; without a batch as one product of matrices, which spares a copy."""
    inputs, result = subscripts.split("->")
    left, right = inputs.split(",")
    sizes = dict(zip(left + right, one.shape + other.shape, strict=True))
    shared = [c for c in left if c in right and c not in result]
    if any(sizes[c] > 1 for c in left if c in right and c in result):
        return jnp.einsum(subscripts, one, other)

    def rows(letters: str, array: jax.Array) -> jax.Array:
        last = [letters.index(c) for c in shared]
        array = jnp.moveaxis(array, last, range(-len(last), 0))
        return array.reshape(-1, math.prod(sizes[c] for c in shared))

    return (rows(left, one) @ rows(right, other).T).reshape([sizes[c] for c in result])


def _equal(one: jax.Array, other: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Give the Gram of one-hot vectors, (b, n, s, m, t)."""
    same = (one[:, :, None, None] == other[None, None]) & (one >= 0)[:, :, None, None]
    return same.astype(dtype)[None]


def _gram_of_a(f1: Factors, f2: Factors, shape: Shape) -> jax.Array:
    if shape.tokens:
        gram = _equal(f1.a, f2.a, f1.d.dtype)
    else:
        gram = _gram_of("nbsp,mbtp->bnsmt", f1.a, f2.a)
    if f1.bias is None:
        return gram
    left, right = f1.bias.T[:, :, None, None, None], f2.bias.T[:, None, None, :, None]
    return gram + left * right


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
    return _times(gram_a, _gram_of(_GRAM_OF_D[reduce], f1.d, f2.d), reduce)


def _other_side(f1: Factors, f2: Factors, reduce: str) -> jax.Array:
    """Give the products of a use of one kind with one of the other: a with d', d with a'."""
    left = jnp.einsum("nbsp,mlbtp->bnsmlt", f1.a, f2.d)
    right = jnp.einsum("nkbsq,mbtq->bnksmt", f1.d, f2.a)
    if reduce == "none":
        return jnp.einsum("bnsmlt,bnksmt->nkml", left, right)
    kernel = jnp.einsum("bnsmkt,bnksmt->nkm", left, right)
    return kernel if reduce == "diagonal" else jnp.sum(kernel, 1)


def _gram(f1: Factors, f2: Factors | None, shape: Shape, reduce: str) -> Triangle:
    """Multiply the Gram of a and that of d: N^2 S^2 (P + K^2 Q)."""
    f2 = f1 if f2 is None else f2
    kernel = _same_side(f1, f2, shape, reduce)
    if shape.mixed:
        one, other = (
            Factors(f.a_swapped, f.d_swapped) for f in (f1, f2)
        )  # of several uses: no bias
        kernel = kernel + _same_side(one, other, shape, reduce)
        kernel = kernel + _other_side(f1, other, reduce) + _other_side(one, f2, reduce)
    return [[kernel]]


def _apply(f1: Factors, f2: Factors | None, shape: Shape, reduce: str) -> Triangle:
    """Apply the Gram of a to d', then multiply by d: N^2 (S^2 (P + K Q) + S K^2 Q)."""
    f2 = f1 if f2 is None else f2

    def one(n: Any) -> jax.Array:
        a, d, bias = n
        alone = Factors(a[None], d[None], None if bias is None else bias[None])
        gram = _gram_of_a(alone, f2, shape)[:, 0]  # (b, s, m, t)
        spread = jnp.einsum("bsmt,mlbtq->mbslq", gram, f2.d)
        if reduce == "none":
            return jnp.einsum("kbsq,mbslq->kml", d, spread)
        kernel = jnp.einsum("kbsq,mbskq->km", d, spread)
        return kernel if reduce == "diagonal" else jnp.sum(kernel, 0)

    return [[jax.lax.map(one, (f1.a, f1.d, f1.bias))]]


# --- what they cost ----------------------------------------------------------------------------


class Cost(NamedTuple):
    """What one order costs."""

    example: float  # multiply-adds for the features of an example
    pair: float  # multiply-adds for a pair of examples
    touched: float  # entries of intermediate results for a pair
    made: int  # numbers for each example: its features, and copies of them
    tile: float  # numbers that a tile holds at once, for a pair; of the largest intermediate
    skinny: bool = False  # a product with as many rows as examples and outputs


def pairs(shape: Shape, reduce: str) -> int:
    """Count the entries of the kernel of two examples that are computed."""
    return shape.outputs ** (2 if reduce == "none" else 1)


def _forming(s: Shape) -> float:
    """Count the multiply-adds that form J of one example."""
    return s.outputs * s.b * s.q * (s.s if s.tokens else s.s * s.p)


def _jacobian_cost(s: Shape, reduce: str) -> Cost:
    return Cost(_forming(s), pairs(s, reduce) * s.b * s.p * s.q, 0, s.jacobian, 0, True)


def _slices_cost(s: Shape, reduce: str) -> Cost:
    return Cost(_forming(s), pairs(s, reduce) * s.b * s.p * s.q, 0, s.factors, 0, True)


def _gram_cost(s: Shape, reduce: str) -> Cost:
    grams = s.b * s.s**2
    out = pairs(s, reduce)
    tile = grams * (out if reduce in ("none", "diagonal") else 1)
    if s.mixed:
        work = grams * (s.p + s.q) * (1 + s.outputs)
        return Cost(0, work, 3 * grams * out, s.factors, grams * s.outputs * out)
    work = grams * ((0 if s.tokens else s.p) + out * s.q)
    copied = 2 if s.s > 1 else 1  # k and s change places
    return Cost(0, work, tile if grams > 1 else tile / 4, copied * s.factors, tile)


def _apply_cost(s: Shape, reduce: str) -> Cost:
    gram, spread = s.b * s.s**2, s.b * s.s * s.outputs * s.q
    work = gram * ((0 if s.tokens else s.p) + s.outputs * s.q)
    return Cost(0, work + s.b * s.s * pairs(s, reduce) * s.q, 6 * spread, s.factors, 0)


class Order(NamedTuple):
    """A row of `ORDERS`."""

    label: str  # in the table of `explain`
    contract: Callable[[Any, Any, Any, str], Triangle]
    cost: Callable[[Shape, str], Cost]
    admits: Callable[[Shape], bool]
    through_j: bool  # the parameters are cut, not the examples, and a symmetric kernel is halved
    one_by_one: bool = False  # examples are multiplied one at a time
    formed_again: bool = False  # the Jacobian is formed for each tile that an example is in


ORDERS = {
    "jacobian": Order(
        label="Jacobian, formed once",
        contract=lambda j1, j2, _, reduce: of_jacobians(j1, j2, reduce),
        cost=_jacobian_cost,
        admits=lambda s: True,
        through_j=True,
    ),
    "slices": Order(
        label="Jacobian, in slices",
        contract=_formed,
        cost=_slices_cost,
        admits=lambda s: not s.mixed and not s.tokens and s.s > 1,
        through_j=True,
        formed_again=True,
    ),
    "gram": Order(
        label="two Grams",
        contract=_gram,
        cost=_gram_cost,
        admits=lambda s: True,
        through_j=False,
    ),
    "apply": Order(
        label="Gram of a, on d",
        contract=_apply,
        cost=_apply_cost,
        admits=lambda s: not s.mixed,
        through_j=False,
        one_by_one=True,
    ),
}
"""How the kernel of a part is contracted: through J, which is kept ("jacobian") or formed again in
slices ("slices"); by two Grams ("gram"); or by one Gram, applied to d ("apply")."""


def treatment(name: str) -> Treatment:
    """Give what an order wants kept of a part."""
    return Treatment(name, ORDERS[name].through_j)


def efficiency(rows: int) -> float:
    """Give the share of the rate that a product with that many rows has."""
    return rows / (rows + rates().rows)


def seconds(name: str, s: Shape, task: Task, itemsize: int) -> float:
    """Predict how long a part takes, by the rates of the backend."""
    order, rate = ORDERS[name], rates()
    cost = order.cost(s, task.reduce)
    rows = min(task.n1, task.n2) * task.rows
    products = rate.products * (efficiency(rows) if cost.skinny else 1)
    formed = task.passes if order.formed_again else 1
    return task.tiles * (2 * cost.pair / products + cost.touched * itemsize / rate.bytes) + (
        task.examples * (2 * formed * cost.example / rate.small + cost.made * itemsize / rate.fresh)
    )


def cheapest_order(s: Shape, task: Task, itemsize: int) -> str:
    """Name the order that takes the least time for a part."""
    allowed = [name for name, order in ORDERS.items() if order.admits(s)]
    return min(allowed, key=lambda name: seconds(name, s, task, itemsize))
