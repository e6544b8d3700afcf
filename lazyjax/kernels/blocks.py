"""A kernel put together from tiles, of any sizes, the features of an example computed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.kernels.layouts import plain_convolutions


class Blocks(NamedTuple):
    """How a kernel is cut up."""

    rows: int  # examples of x1 in a tile
    columns: int  # examples of x2
    at_once: int  # examples whose features are computed at once
    kept: bool = True  # features are kept for all tiles; otherwise those of x2 are made for each


def check_batch_size(batch_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Require a whole number or a pair of them; give the pair."""
    if batch_size is None:
        return None
    if isinstance(batch_size, tuple | list):
        if len(batch_size) != 2:
            raise ValueError(
                f"`batch_size` must be a whole number or a pair of them, got {batch_size}. "
                "Use (examples of x1, examples of x2)."
            )
        b1, b2 = batch_size
    else:
        b1 = b2 = batch_size
    for size in (b1, b2):
        checks.whole("batch_size", size, least=1, cure="Use None to let ntk choose.")
    return int(b1), int(b2)


def even(n: int, size: int) -> int:
    """Give the size of blocks of at most `size`, evened out over n examples."""
    return -(-n // -(-n // max(1, min(size, n))))


def _starts(n: int, size: int) -> np.ndarray:
    """Where blocks begin; the last ends at n, and may overlap the one before."""
    return np.minimum(np.arange(-(-n // size)) * size, n - size)


def _take(x: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(jnp.asarray(a), start, size), x)


def in_blocks(function: Callable[[Any], Any], x: Any, size: int) -> Any:
    """Apply a function of a batch to blocks of it, one after the other.

    Parameters
    ----------
    function : callable
        From a pytree with the batch on axis 0 to another.
    x : pytree
    size : int
        Examples in a block.

    Returns
    -------
    pytree
        As `function(x)`.
    """
    n = checks.batch("x", x)
    if size >= n:
        return function(x)
    function = plain_convolutions(function)
    like = jax.eval_shape(lambda: function(_take(x, 0, size)))
    found = jax.tree.map(lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype), like)

    def block(found: Any, start: Any) -> tuple[Any, None]:
        new = function(_take(x, start, size))
        put = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), found, new
        )
        return put, None

    return jax.lax.scan(block, found, jnp.asarray(_starts(n, size)))[0]


def _mirrored(tile: jax.Array) -> jax.Array:
    """Swap the two examples, and the two outputs where a tile has them."""
    tile = jnp.swapaxes(tile, 0, 1)
    return jnp.swapaxes(tile, 2, 3) if tile.ndim == 4 else tile


def _symmetric(tile: jax.Array) -> jax.Array:
    return (tile + _mirrored(tile)) / 2  # symmetric to the last bit


def assemble(
    features: Callable[[Any], Any],
    contract: Callable[[Any, Any], Any],
    x1: Any,
    x2: Any | None,
    blocks: Blocks,
) -> Any:
    """Compute a kernel tile by tile.

    Parameters
    ----------
    features : callable
        From a batch to what the contraction needs of it, batch on axis 0 of every leaf.
    contract : callable
        From two features to a pytree of tiles (B1, B2), (B1, B2, C) or (B1, B2, C, C).
    x1, x2 : pytrees, batch on axis 0
        `x2=None`: the kernel is symmetric, to the last bit, and the tiles above the diagonal are
        those below it, mirrored.
    blocks : Blocks

    Returns
    -------
    pytree of (N1, N2), (N1, N2, C) or (N1, N2, C, C)
    """
    symmetric = x2 is None
    n1 = checks.batch("x1", x1)
    n2 = n1 if symmetric else checks.batch("x2", x2)
    rows, columns = (even(n, size) for n, size in ((n1, blocks.rows), (n2, blocks.columns)))
    if symmetric:
        rows = columns = min(rows, columns)

    def of(x: Any) -> Any:
        n = checks.batch("x", x)
        return in_blocks(features, x, even(n, blocks.at_once))

    if blocks.kept or (rows, columns) == (n1, n2):
        source1 = of(x1)
        source2 = source1 if symmetric else of(x2)
        made = lambda part: part  # noqa: E731
    else:
        source1, source2, made = x1, x1 if symmetric else x2, of

    if (rows, columns) == (n1, n2):
        found = contract(source1, source2)
        return jax.tree.map(_symmetric, found) if symmetric else found

    starts1, starts2 = _starts(n1, rows), _starts(n2, columns)
    if symmetric:
        pairs = [(i, j) for i in range(len(starts1)) for j in range(i)]
    else:
        pairs = [(i, j) for i in range(len(starts1)) for j in range(len(starts2))]

    def put(kernel: Any, tile: Any, start1: Any, start2: Any) -> Any:
        def one(whole: jax.Array, tile: jax.Array) -> jax.Array:
            at = (start1, start2) + (0,) * (whole.ndim - 2)
            return jax.lax.dynamic_update_slice(whole, tile, at)

        return jax.tree.map(one, kernel, tile)

    first1 = made(_take(source1, 0, rows))
    like = jax.eval_shape(lambda: contract(first1, made(_take(source2, 0, columns))))
    kernel = jax.tree.map(lambda a: jnp.zeros((n1, n2, *a.shape[2:]), a.dtype), like)

    def elsewhere(carry: Any, pair: Any) -> tuple[Any, None]:
        kernel, held = carry
        start1, start2, is_new = pair
        block1 = _take(source1, start1, rows)
        if not blocks.kept:
            held = jax.lax.cond(is_new, lambda: made(block1), lambda: held)
        f1 = block1 if blocks.kept else held
        tile = contract(f1, made(_take(source2, start2, columns)))
        kernel = put(kernel, tile, start1, start2)
        if symmetric:
            kernel = put(kernel, jax.tree.map(_mirrored, tile), start2, start1)
        return (kernel, held), None

    def on_diagonal(kernel: Any, start: Any) -> tuple[Any, None]:
        f = made(_take(source1, start, rows))
        return put(kernel, jax.tree.map(_symmetric, contract(f, f)), start, start), None

    if pairs:
        i, j = np.asarray(pairs).T
        is_new = np.diff(i, prepend=-1) != 0
        each = (jnp.asarray(starts1[i]), jnp.asarray(starts2[j]), jnp.asarray(is_new))
        (kernel, _), _ = jax.lax.scan(elsewhere, (kernel, None if blocks.kept else first1), each)
    if symmetric:  # last, as an overlapping tile beside the diagonal reaches into it
        kernel, _ = jax.lax.scan(on_diagonal, kernel, jnp.asarray(starts1))
    return kernel
