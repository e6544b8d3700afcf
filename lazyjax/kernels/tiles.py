"""A kernel put together from tiles of any sizes; features are kept while there is room."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lazyjax import checks
from lazyjax.blocks import even, in_blocks
from lazyjax.costs import rates
from lazyjax.kernels.methods import Engine, Kernels
from lazyjax.kernels.orders import ORDERS
from lazyjax.kernels.task import Task
from lazyjax.tiling import tiled
from lazyjax.types import PyTree

_TILES = 8  # into which a symmetric kernel is cut, to save nearly half of it
_ROWS = 640  # of a matrix product, below which it slows down
_KEPT = 2  # the last level of memory saved at which features are kept


class Blocks(NamedTuple):
    """How a kernel is cut up."""

    rows: int  # examples of x1 in a tile, at most
    columns: int  # examples of x2
    at_once: int  # examples whose features are computed at once
    kept: bool = True  # features are kept for all tiles; otherwise those of x2 are made for each


def _sides(engine: Engine, group: str, task: Task) -> int:
    """Give the side of the tiles of a group, so that their results stay in a cache."""
    order = ORDERS.get(group)  # None: of a method that has no orders
    if order and order.through_j:
        return max(task.n1, task.n2)
    side = max(1, int((rates().cache / 8 / engine.tiles[group]) ** 0.5))
    if task.symmetric:
        rows = 1 if order and order.one_by_one else _ROWS // task.rows
        side = min(side, max(-(-task.n1 // _TILES), rows, 1))
    return side


def levels(n: int) -> int:
    """Give the last level of `choose_blocks` for n examples."""
    return _KEPT + max(1, (n - 1).bit_length())


def _side(n: int, level: int) -> int:
    return max(1, -(-n // 2 ** max(0, level - _KEPT)))


def passes(n: int, asked: tuple[int, int] | None, level: int) -> int:
    """Count the tiles in a row of them."""
    side = _side(n, level) if asked is None else min(asked[0], _side(n, level))
    return -(-n // side)


def choose_blocks(engine: Engine, task: Task, asked: tuple[int, int] | None, level: int) -> Blocks:
    """Choose how a kernel is cut up.

    Parameters
    ----------
    engine : Engine
    task : Task
    asked : pair of int or None
        The most examples of x1 and of x2 in a tile.
    level : int
        0 is fastest. Each of the next two differentiates a quarter of the examples at once; beyond
        them features are not kept, but made for each tile, and a tile has half the side each time.

    Returns
    -------
    Blocks
    """
    n, working = max(task.n1, task.n2), max(engine.working, 1)
    if n * working > rates().working:  # in a loop a block's results stay closer
        n = int(max(rates().working / 4, engine.weights) // working)
    elif engine.weights > rates().cache and 0.75 * rates().slow < n <= rates().slow:  # 49 to 64
        n = -(-n // 2)
    at_once = max(1, n // 4 ** min(level, _KEPT))
    sides = (_side(task.n1, level), _side(task.n2, level))
    rows, columns = (min(a, b) for a, b in zip(asked or sides, sides, strict=True))
    return Blocks(rows, columns, min(at_once, max(rows, columns)), level <= _KEPT)


def features(engine: Engine, x: PyTree, at_once: int) -> Any:
    """Compute the features of a batch, so many examples at once."""
    return in_blocks(engine.features, x, even(checks.batch("x", x), at_once))


def contract(engine: Engine, task: Task, f1: PyTree, f2: PyTree | None, *sides: int) -> Kernels:
    """Contract features, each group of them in tiles of its own.

    Parameters
    ----------
    engine : Engine
    task : Task
    f1, f2 : from `features`
        `f2=None`: the kernel is symmetric to the last bit.
    *sides : int
        Examples of x1 and of x2 in a tile, at most.

    Returns
    -------
    pytree of (N1, N2), (N1, N2, C) or (N1, N2, C, C)
    """
    kernel: Kernels = {}
    for group, of_group in engine.contract.items():
        rows, columns = (min(_sides(engine, group, task), side) for side in sides)
        other = None if f2 is None else f2[group]
        tiles = tiled(of_group, f1[group], other, rows=rows, columns=columns)
        for leaf, tile in tiles.items():
            kernel[leaf] = kernel[leaf] + tile if leaf in kernel else tile
    return kernel


def assemble(engine: Engine, task: Task, x1: PyTree, x2: PyTree | None, blocks: Blocks) -> Kernels:
    """Compute a kernel: features in blocks, then each group of them in tiles of its own.

    Parameters
    ----------
    engine : Engine
    task : Task
    x1, x2 : pytrees, batch on axis 0
        `x2=None`: the kernel is symmetric to the last bit.
    blocks : Blocks

    Returns
    -------
    pytree of (N1, N2), (N1, N2, C) or (N1, N2, C, C)
    """

    def of_features(f1: PyTree, f2: PyTree | None) -> Kernels:
        return contract(engine, task, f1, f2, blocks.rows, blocks.columns)

    return put_together(of_features, (engine, engine), x1, x2, blocks)


def put_together(
    of_features: Callable[[PyTree, PyTree | None], Kernels],
    engines: tuple[Engine, Engine],
    x1: PyTree,
    x2: PyTree | None,
    blocks: Blocks,
) -> Kernels:
    """Contract the features of x1, by the first engine, with those of x2, by the second.

    They are kept for all tiles, or made for each of them, as the blocks say.
    """

    def prepare(engine: Engine) -> Callable[[PyTree], Any]:
        return lambda x: features(engine, x, blocks.at_once)

    one, other = map(prepare, engines)
    if blocks.kept:
        return of_features(one(x1), None if x2 is None else other(x2))
    rows, columns = blocks.rows, blocks.columns
    return tiled(of_features, x1, x2, rows=rows, columns=columns, prepare=(one, other))
