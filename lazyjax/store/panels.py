"""How a kernel too large for memory is cut: blocks of examples, tiles, and panels of blocks.

The features of the blocks of x1 in a panel are held while all columns, the blocks of x2, pass by. A
column comes once for each panel, from the disk or made again.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax

from lazyjax.blocks import even
from lazyjax.costs import rates
from lazyjax.kernels import METHODS, Job, Options, Request, choose_blocks, engine_of, jobs
from lazyjax.memory import format_bytes, too_little
from lazyjax.store.programs import Cut, Programs, compile_programs

OF_A_DEVICE, SMALLER = "each device of this kernel", "a smaller `tile`"  # in a refusal
_SIDES = tuple(2**i for i in range(13, -1, -1))  # of tiles, in examples
_MOST = 1000  # blocks of a side: a file for each pair of them
_LARGEST = 2**28  # bytes of a tile
_APART = 0.02  # seconds that a tile takes beside its products
_INTERRUPTIONS = 3  # of a run, each of which costs a tile


class Grid(NamedTuple):
    """The tiles of a kernel; those of a symmetric one on and below the diagonal."""

    n1: int
    n2: int
    tile: tuple[int, int]
    symmetric: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of x1 and of x2."""
        return -(-self.n1 // self.tile[0]), -(-self.n2 // self.tile[1])

    def columns(self, row: int) -> range:
        """Give the tiles of a row."""
        return range(row + 1 if self.symmetric else self.blocks[1])

    def examples(self, side: int, block: int) -> slice:
        """Give the examples of a block of x1 (side 0) or of x2 (side 1)."""
        size, n = self.tile[side], (self.n1, self.n2)[side]
        return slice(block * size, min((block + 1) * size, n))

    def sides(self) -> list[tuple[int, int]]:
        """Give the blocks that have features of their own: side and number."""
        sides = range(1 if self.symmetric else 2)
        return [(side, block) for side in sides for block in range(self.blocks[side])]

    @property
    def tiles(self) -> int:
        """Tiles that are computed."""
        return sum(len(self.columns(row)) for row in range(self.blocks[0]))


def grid_of(n1: int, n2: int, asked: tuple[int, int], *, symmetric: bool) -> Grid:
    """Cut a kernel into tiles of at most so many examples, evened out."""
    sides = (min(asked),) * 2 if symmetric else asked
    return Grid(n1, n2, (even(n1, sides[0]), even(n2, sides[1])), symmetric)


def dealt(grid: Grid, hands: int) -> list[list[int]]:
    """Deal the rows of tiles out so that each hand has about as many tiles.

    Examples
    --------
    >>> dealt(Grid(6, 6, (1, 1), True), 2)
    [[0, 3, 4], [1, 2, 5]]
    """
    hands_of_rows: list[list[int]] = [[] for _ in range(hands)]
    work = [0] * hands
    for row in reversed(range(grid.blocks[0])):
        least = work.index(min(work))
        hands_of_rows[least].insert(0, row)
        work[least] += len(grid.columns(row))
    return sorted(hands_of_rows)


def panels(rows: list[int], held: int) -> list[list[int]]:
    """Cut rows of tiles into panels of at most so many, evened out."""
    size = even(len(rows), held) if rows else 1
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def passing(grid: Grid, panel: list[int]) -> list[int]:
    """Give the columns that a panel needs, those of its own blocks left out."""
    columns = grid.columns(panel[-1])
    return [j for j in columns if not (grid.symmetric and j in panel)]


class Schedule(NamedTuple):
    """How a kernel is computed."""

    grid: Grid
    options: Options  # with a row of `METHODS`, and the rates by which products are sliced
    cut: Cut
    leaves: tuple[tuple[int, str], ...]  # leaf and order of each part
    spilled: bool  # features are written to the disk; otherwise made again where they are needed
    seconds: float  # by the rates
    least: float  # bytes of parameters and of the features of two blocks


def _scheduled(job: Job, request: Request, grid: Grid, memory: int, devices: int) -> Schedule:
    """Predict what a method takes with tiles of one size."""
    rate, x, method = rates(), request.x1, request.options.method
    task = job.task._replace(
        n1=grid.n1, n2=grid.n2, symmetric=grid.symmetric, passes=grid.blocks[1]
    )
    whole = engine_of(job._replace(task=task), x, method)
    task = task._replace(passes=1, orders=tuple(order for _, order in whole.orders))
    side = min(grid.tile)

    def seconds(n2: int) -> float:
        own = task._replace(n1=side, n2=n2, symmetric=False)
        return engine_of(job._replace(task=own), x, method).seconds

    # with e an example and p a pair: 2 side e + side^2 p, and 3 side e + 2 side^2 p
    square, wide = seconds(side), seconds(2 * side)
    of_example = max(0.0, (2 * square - wide) / side)
    of_pair = (square / side - 2 * of_example) / side
    contraction = max(whole.seconds - task.examples * of_example, task.tiles * of_pair)

    block = max(1.0, whole.kept * max(grid.tile))
    held = max(1, int((memory - whole.weights) / block) - 1)
    every = [panel for rows in dealt(grid, devices) for panel in panels(rows, held)]
    again = grid.tile[1] * sum(len(passing(grid, panel)) for panel in every)
    uses = grid.n1 + again  # of the features of an example
    made = uses * of_example
    read = task.examples * of_example + (task.examples + uses) * whole.kept / rate.disk
    several = uses > sum(grid.tile[side] for side, _ in grid.sides())
    spilled = several and whole.kept > 0 and read < made

    own = task._replace(n1=grid.tile[0], n2=grid.tile[1], symmetric=False)
    blocks = choose_blocks(engine_of(job._replace(task=own), x, method), own, None, 0)
    cut = Cut(task.orders, grid.tile, blocks.at_once)
    of_tile = contraction / grid.tiles + _APART
    total = (read if spilled else made) + contraction + grid.tiles * _APART
    total = total / devices + _INTERRUPTIONS * of_tile
    least = whole.weights + 2 * block
    return Schedule(grid, request.options, cut, whole.orders, spilled, total, least)


def _schedules(request: Request, grids: list[Grid], memory: int, devices: int) -> list[Schedule]:
    """Schedule every method with every grid, the fastest first; nothing runs."""
    schedules: list[Schedule] = []
    asked = request.options.method

    def trace(request: Request) -> None:
        (job,) = jobs(request)
        for name in [asked] if asked != "auto" else METHODS:
            if asked == "auto" and METHODS[name].needs_reverse and not job.model.reverse:
                continue
            own = request.having(method=name)
            schedules.extend(_scheduled(job, own, grid, memory, devices) for grid in grids)

    with request.options.in_force():
        jax.eval_shape(trace, request.of(request.x1))
    return sorted(schedules, key=lambda schedule: schedule.seconds)


def _grids(
    n1: int, n2: int, numbers: int, asked: tuple[int, int] | None, *, symmetric: bool
) -> list[Grid]:
    """Give the grids to choose from, of the largest tiles first."""
    if asked is not None:
        return [grid_of(n1, n2, asked, symmetric=symmetric)]
    most = max(n1, n2)
    small = [s for s in _SIDES if s < 2 * most and s**2 * numbers <= _LARGEST] or [1]
    sides = [s for s in small if s * _MOST >= most] or small[:1]
    grids = [grid_of(n1, n2, (side, side), symmetric=symmetric) for side in sides]
    return list(dict.fromkeys(grids))


def choose(
    request: Request,
    n1: int,
    n2: int,
    *,
    numbers: int,
    memory: int,
    asked: tuple[int, int] | None,
    devices: list[Any],
) -> tuple[Schedule, Programs]:
    """Choose what is fastest within a budget, by the rates and by what XLA says of the memory.

    Parameters
    ----------
    request : Request
        With a few of the examples.
    n1, n2 : int
        All of them.
    numbers : int
        Bytes of the kernel of two examples.
    memory : int
        Bytes of each device.
    asked : pair of int or None
        The most examples of x1 and of x2 in a tile.
    devices : list of Device

    Returns
    -------
    Schedule, and the programs for the first device

    Raises
    ------
    ValueError
        If nothing fits; the message says what would.
    """
    grids = _grids(n1, n2, numbers, asked, symmetric=request.x2 is None)
    every = _schedules(request, grids, memory, len(devices))
    smallest = {own.options.method: own for own in every}
    for own in every:
        method = own.options.method
        smallest[method] = min(smallest[method], own, key=lambda own: own.grid.tile)
    likely = [own for own in every if own.least <= memory]
    least = []
    for own in dict.fromkeys([*likely, *smallest.values()]):
        programs = compile_programs(replace(request, options=own.options), own.cut, devices[0])
        least.append(programs.memory(1))
        if least[-1] <= memory:
            return own, programs
    raise too_little(min(least), OF_A_DEVICE, format_bytes(memory), SMALLER)
