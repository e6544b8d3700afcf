"""A kernel put together from blocks, of any sizes, with one compiled body for all of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks

Block = Callable[[Any, Any | None], jax.Array]
"""`block(x1, x2) -> (B1, B2), (B1, B2, C) or (B1, B2, C, C)`; `x2=None` is x1 again."""


def block_sizes(batch_size: int | tuple[int, int] | None, n1: int, n2: int | None) -> Any:
    """Give the sizes of a block, at most those asked for, evened out over the blocks.

    Parameters
    ----------
    batch_size : int, pair of int, or None
        For x1 and x2; None is all in one block.
    n1, n2 : int
        Examples; `n2=None` for a symmetric kernel, whose blocks are square, of the smaller size.

    Returns
    -------
    pair of int

    Raises
    ------
    TypeError
        If `batch_size` is no whole number nor a pair of them.
    ValueError
        If it is below 1, or no pair.
    """
    if batch_size is None:
        return n1, n1 if n2 is None else n2
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
        checks.whole("batch_size", size, least=1, cure="Use None for one block.")
    if n2 is None:
        n2, b1, b2 = n1, min(b1, b2), min(b1, b2)
    return tuple(-(-n // -(-n // b)) for n, b in ((n1, b1), (n2, b2)))


def mirrored(block: jax.Array) -> jax.Array:
    """Swap the two examples, and the two outputs where a block has them."""
    block = jnp.swapaxes(block, 0, 1)
    return jnp.swapaxes(block, 2, 3) if block.ndim == 4 else block


def _on_itself(block: Block, x: Any) -> jax.Array:
    found = block(x, None)
    return (found + mirrored(found)) / 2  # symmetric to the last bit


def _in_blocks(x: Any, n: int, size: int) -> Any:
    """Reshape to (blocks, size, ...), the last example repeated where n is no multiple."""
    index = np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)
    return jax.tree.map(lambda a: jnp.asarray(a)[index], x)


def assemble(block: Block, x1: Any, x2: Any | None, sizes: tuple[int, int]) -> jax.Array:
    """Compute a kernel block by block.

    Parameters
    ----------
    block : callable
    x1, x2 : pytrees, batch on axis 0
        `x2=None`: the kernel is symmetric, to the last bit, and the blocks above the diagonal are
        those below it, mirrored.
    sizes : pair of int
        From `block_sizes`.

    Returns
    -------
    (N1, N2), (N1, N2, C) or (N1, N2, C, C)
    """
    symmetric = x2 is None
    n1 = checks.batch("x1", x1)
    n2 = n1 if symmetric else checks.batch("x2", x2)
    if sizes == (n1, n2):
        return _on_itself(block, x1) if symmetric else block(x1, x2)

    b1, b2 = sizes
    blocks1 = _in_blocks(x1, n1, b1)
    blocks2 = blocks1 if symmetric else _in_blocks(x2, n2, b2)
    count1, count2 = math.ceil(n1 / b1), math.ceil(n2 / b2)

    def at(blocks: Any, i: jax.Array | int) -> Any:
        return jax.tree.map(lambda a: a[i], blocks)

    def put(kernel: jax.Array, found: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        starts = (i * b1, j * b2) + (0,) * (kernel.ndim - 2)
        return jax.lax.dynamic_update_slice(kernel, found, starts)

    def on_diagonal(kernel: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return put(kernel, _on_itself(block, at(blocks1, i)), i, i), None

    def elsewhere(kernel: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, j = pair
        found = block(at(blocks1, i), at(blocks2, j))
        kernel = put(kernel, found, i, j)
        return (put(kernel, mirrored(found), j, i) if symmetric else kernel), None

    like = jax.eval_shape(lambda: block(at(blocks1, 0), at(blocks2, 0)))
    kernel = jnp.zeros((count1 * b1, count2 * b2, *like.shape[2:]), like.dtype)
    if symmetric:
        kernel, _ = jax.lax.scan(on_diagonal, kernel, jnp.arange(count1))
        pairs = np.tril_indices(count1, -1)
    else:
        pairs = np.divmod(np.arange(count1 * count2), count2)
    if pairs[0].size:
        pairs = (jnp.asarray(pairs[0]), jnp.asarray(pairs[1]))
        kernel, _ = jax.lax.scan(elsewhere, kernel, pairs)
    return kernel[:n1, :n2]
