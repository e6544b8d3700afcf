"""The stages of a training run, its chunks, and what it has so far, on the host."""

from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np

from lazyjax import checks, loop
from lazyjax.types import Params

_BLOCK_STEPS = 64  # enough to spread what a block costs over its steps
_BLOCK_NUMBERS = 2**20  # weights of a block, at most: they stay in the cache
_UNROLL = 2  # a third less time for the steps of a small model, and little more to compile
_UNROLL_NUMBERS = 2**12
_CHUNK_STEPS = 5000
_CHUNK_NUMBERS = 2**26  # weights stepped over in a chunk: large models report after few steps


def log_grid(steps: int, *, points: int = 100) -> np.ndarray:
    """Give steps spaced evenly in log(1 + step), from 0 to `steps`, both included.

    Parameters
    ----------
    steps : int
        The last step, 1 or more.
    points : int
        How many points to aim at; equal ones are merged, so that short runs give fewer.

    Returns
    -------
    (G,) array of int

    Raises
    ------
    TypeError, ValueError
        If `steps` < 1 or `points` < 2, or they are no whole numbers.

    Examples
    --------
    >>> log_grid(1000, points=8).tolist()
    [0, 2, 6, 18, 51, 138, 372, 1000]
    """
    checks.whole("steps", steps, least=1)
    checks.whole("points", points, least=2)
    grid = np.expm1(np.linspace(0.0, np.log1p(steps), points))
    return np.unique(np.append(np.rint(grid).astype(int), steps))


def _grid(record: int | np.ndarray | None, steps: int) -> np.ndarray:
    if record is None:
        return log_grid(steps)
    if isinstance(record, int):
        return log_grid(steps, points=record)
    grid = np.asarray(record)
    whole = np.issubdtype(grid.dtype, np.integer) and grid.ndim == 1 and grid.size > 0
    if not whole or np.any(np.diff(grid) <= 0) or grid[0] < 0 or grid[-1] > steps:
        raise ValueError(
            f"`record` must be whole steps that rise from 0 to at most `steps` = {steps}, got "
            f"{record}. Use np.arange(0, steps + 1, 100), a number of points, or None."
        )
    return np.union1d(grid, [0, steps])


class Settings(NamedTuple):
    """How it is trained, as `train` and `train_ensemble` say."""

    steps: int
    batch_size: int | None
    record: int | np.ndarray | None
    chunk_steps: int | None
    checkpoint: str | PathLike[str] | None
    label: str | None
    members: int | None = None  # None: one run
    data_axis: int | None = None


class Stages(NamedTuple):
    """The chunks of a run, and what is recorded in each.

    The loop takes a row for each of the steps 0 .. `steps`, the last one only for its loss.
    """

    steps: int
    chunk: loop.Chunk
    grid: np.ndarray  # (G,) steps at which parameters are recorded
    edges: np.ndarray  # (chunks + 1,) where in the grid the points of each chunk begin

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.edges) - 1

    def rows(self, number: int) -> slice:
        """Give the steps of a chunk."""
        size = self.chunk.steps
        return slice(number * size, min((number + 1) * size, self.steps + 1))

    def points(self, number: int) -> slice:
        """Give the points of the grid that are in a chunk."""
        return slice(self.edges[number], self.edges[number + 1])

    def where(self, number: int) -> tuple[Any, ...]:
        """Give the arguments of the compiled chunk that say which one it is."""
        local = self.grid[self.points(number)] - number * self.chunk.steps
        blocks = self.chunk.block * np.arange(self.chunk.blocks + 1)
        bounds = np.searchsorted(local, blocks).astype(np.int32)
        local = np.pad(local, (0, self.chunk.capacity - len(local))).astype(np.int32)
        return np.int32(number * self.chunk.steps), bounds, local


def stages_of(params: Params, settings: Settings) -> Stages:
    """Choose the sizes of blocks and chunks.

    The chunks are as equal as blocks allow, so that little is stepped in vain.
    """
    rows, chunk_steps = settings.steps + 1, settings.chunk_steps
    numbers = max(1, sum(w.size for w in jax.tree.leaves(params)))
    if chunk_steps is None:
        chunk_steps = int(np.clip(_CHUNK_NUMBERS // numbers, 8, _CHUNK_STEPS))
    rows_of_chunk = -(-rows // -(-rows // chunk_steps))
    block = int(np.clip(_BLOCK_NUMBERS // numbers, 1, min(_BLOCK_STEPS, rows_of_chunk)))
    chunk = loop.Chunk(
        block=block,
        unroll=min(block, _UNROLL) if numbers <= _UNROLL_NUMBERS else 1,
        blocks=-(-rows_of_chunk // block),
        capacity=0,
        batch_size=settings.batch_size,
        members=settings.members,
        data_axis=settings.data_axis,
    )
    grid = _grid(settings.record, settings.steps)
    chunks = -(-rows // chunk.steps)
    edges = np.searchsorted(grid, chunk.steps * np.arange(chunks + 1))
    capacity = int(np.max(np.diff(edges)))
    return Stages(settings.steps, chunk._replace(capacity=capacity), grid, edges)


class Kept(NamedTuple):
    """What a run has so far: the chunks that are done, the state, and the records, on the host."""

    done: int
    state: loop.State
    loss: np.ndarray
    movement: np.ndarray
    params: Params


def empty(stages: Stages, params: Params, state: loop.State) -> Kept:
    """Give what a run has before its first chunk."""
    lead = () if stages.chunk.members is None else (stages.chunk.members,)
    rows, leaves = stages.steps + 1, jax.tree.leaves(params)

    def recorded(w: jax.Array) -> np.ndarray:
        return np.zeros((*lead, len(stages.grid), *w.shape[len(lead) :]), w.dtype)

    return Kept(
        done=0,
        state=state,
        loss=np.full((*lead, rows), np.nan),  # of the dtypes of the first chunk, once it is there
        movement=np.full((*lead, rows, len(leaves)), np.nan),
        params=jax.tree.map(recorded, params),
    )


def with_chunk(kept: Kept, stages: Stages, state: loop.State, records: loop.Records) -> Kept:
    """Add what a chunk has left."""
    at = (slice(None),) * (stages.chunk.members is not None)
    rows, points = stages.rows(kept.done), stages.points(kept.done)
    loss, movement = kept.loss, kept.movement
    if kept.done == 0:
        loss = loss.astype(records.loss.dtype)
        movement = movement.astype(records.movement.dtype)
    wanted = slice(rows.stop - rows.start)
    loss[(*at, rows)] = np.asarray(records.loss)[(*at, wanted)]
    movement[(*at, rows)] = np.asarray(records.movement)[(*at, wanted)]
    _put(kept.params, records.params, (*at, points), (*at, slice(points.stop - points.start)))
    return Kept(kept.done + 1, state, loss, movement, kept.params)


def to_the_end(kept: Kept, stages: Stages) -> Kept:
    """Leave the rest of a run that has diverged at the last finite weights."""
    at = (slice(None),) * (stages.chunk.members is not None)
    last = jax.tree.map(lambda w: np.asarray(w)[(*at, None)], kept.state.last_finite)
    points = slice(stages.points(kept.done).start, len(stages.grid))
    _put(kept.params, last, (*at, points), (*at, slice(None)))
    return kept._replace(done=stages.chunks)


def _put(kept: Params, new: Params, where: Any, which: Any) -> None:
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(new), strict=True):
        a[where] = np.asarray(b)[which]
