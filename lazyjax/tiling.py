"""A kernel of two batches put together from tiles; the half of it where the two are one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.blocks import even, starts, take
from lazyjax.meshes import zeros

Kernels = Any
"""(N1, N2), (N1, N2, C) or (N1, N2, C, C); or a pytree of them."""


def mirrored(tile: jax.Array) -> jax.Array:
    """Swap the two examples, and the two outputs of a tile; conjugate what is complex."""
    tile = jnp.conj(jnp.swapaxes(tile, 0, 1))
    return jnp.swapaxes(tile, 2, 3) if tile.ndim == 4 else tile


def tiled(
    contract: Callable[[Any, Any], Kernels],
    one: Any,
    other: Any | None,
    *,
    rows: int,
    columns: int,
    prepare: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
) -> Kernels:
    """Compute a kernel tile by tile.

    Parameters
    ----------
    contract : callable
        From two features to kernels (B1, B2), (B1, B2, C) or (B1, B2, C, C). The second is None for
        the first again, and the kernel then symmetric to the last bit.
    one, other : pytrees, batch on axis 0
        `other=None`: the kernel is symmetric, to the last bit, and the tiles above the diagonal are
        those below it, mirrored.
    rows, columns : int
        Examples in a tile, at most.
    prepare : pair of callables, optional
        From a block of `one`, and of `other`, to its features: of `one` once a row of tiles, of
        `other` for each tile. None if they are features.

    Returns
    -------
    pytree of (N1, N2), (N1, N2, C) or (N1, N2, C, C)
    """
    symmetric = other is None
    n1 = checks.batch("x1", one)
    n2 = n1 if symmetric else checks.batch("x2", other)
    if symmetric:
        rows = columns = min(rows, columns)
    rows, columns = even(n1, rows), even(n2, columns)

    ready1, ready2 = prepare or (lambda part: part,) * 2
    if (rows, columns) == (n1, n2):
        return contract(ready1(one), None if symmetric else ready2(other))

    starts1, starts2 = starts(n1, rows), starts(n2, columns)
    if symmetric:
        other = one
        pairs = [(i, j) for i in range(len(starts1)) for j in range(i)]
    else:
        pairs = [(i, j) for i in range(len(starts1)) for j in range(len(starts2))]

    def put(kernel: Any, tile: Any, start1: Any, start2: Any) -> Any:
        def one(whole: jax.Array, tile: jax.Array) -> jax.Array:
            at = (start1, start2) + (0,) * (whole.ndim - 2)
            return jax.lax.dynamic_update_slice(whole, tile, at)

        return jax.tree.map(one, kernel, tile)

    def row(start: Any) -> Any:
        return ready1(take(one, start, rows))

    def column(start: Any) -> Any:
        return ready2(take(other, start, columns))

    like = jax.eval_shape(lambda: contract(row(0), column(0)))
    kernel = jax.tree.map(lambda a: zeros((n1, n2, *a.shape[2:]), a), like)

    def elsewhere(carry: Any, pair: Any) -> tuple[Any, None]:
        kernel, held = carry
        start1, start2, is_new = pair
        if prepare is None:
            f1 = row(start1)
        else:
            held = f1 = jax.lax.cond(is_new, lambda: row(start1), lambda: held)
        tile = contract(f1, column(start2))
        kernel = put(kernel, tile, start1, start2)
        if symmetric:
            kernel = put(kernel, jax.tree.map(mirrored, tile), start2, start1)
        return (kernel, held), None

    def diagonal(kernel: Any, start: Any) -> tuple[Any, None]:
        return put(kernel, contract(row(start), None), start, start), None

    if pairs:
        i, j = np.asarray(pairs).T
        is_new = np.diff(i, prepend=-1) != 0
        each = (jnp.asarray(starts1[i]), jnp.asarray(starts2[j]), jnp.asarray(is_new))
        held = None if prepare is None else row(0)
        (kernel, _), _ = jax.lax.scan(elsewhere, (kernel, held), each)
    if symmetric:  # last, as an overlapping tile beside the diagonal reaches into it
        kernel, _ = jax.lax.scan(diagonal, kernel, jnp.asarray(starts1))
    return kernel
