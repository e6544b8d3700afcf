"""The work of a store: the features of blocks, and tiles. Each device has rows of tiles of its own.

A tile is written before the next is begun, so a run that is killed loses one tile of each device.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lazyjax.kernels import Request
from lazyjax.store import files
from lazyjax.store.panels import Grid, Schedule, panels
from lazyjax.store.programs import Programs
from lazyjax.types import PyTree


class Hand(NamedTuple):
    """A device and its share."""

    device: Any
    programs: Programs
    request: Request  # of a few examples
    rows: list[int]  # rows of tiles
    blocks: list[tuple[int, int]]  # side and number of those whose features it spills
    held: int  # blocks of x1 whose features it holds at once, at most


@dataclass(frozen=True)
class Build:
    """A store that is being written, by all devices of this process."""

    path: Path
    array: Any  # the open array
    schedule: Schedule
    x: tuple[Any, ...]  # x1, and x2 where there is one, of numpy arrays
    timings: dict[str, dict[str, float]]  # of each kind of build, all devices of this process
    done: Callable[[str], None]  # called with "features" or "tiles" after each one on the disk
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def grid(self) -> Grid:
        """The tiles of the kernel."""
        return self.schedule.grid


def is_done(build: Build, row: int, column: int) -> bool:
    """Tell whether a tile is on the disk."""
    return files.is_done(build.path, build.grid, row, column, len(build.array.shape))


@contextlib.contextmanager
def _timed(build: Build, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    with build.lock:
        own = build.timings.setdefault(name, {"seconds": 0.0, "times": 0})
        own["seconds"] += time.perf_counter() - begin
        own["times"] += 1


def _block(build: Build, side: int, number: int) -> Any:
    """Give a block of examples; the last example again where there are too few."""
    part = build.grid.examples(side, number)
    missing = build.grid.tile[side] - (part.stop - part.start)

    def padded(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a[part], np.repeat(a[part.stop - 1 : part.stop], missing, 0)])

    return jax.tree.map(padded if missing else lambda a: a[part], build.x[side])


def _made(build: Build, hand: Hand, side: int, number: int) -> Any:
    x = jax.device_put(_block(build, side, number), hand.device)
    return jax.block_until_ready(hand.programs.features[side](hand.request.of(x)))


def _features(build: Build, hand: Hand, side: int, number: int) -> Any:
    with _timed(build, "features"):
        if not build.schedule.spilled:
            return _made(build, hand, side, number)
        read = files.read_features(
            files.features_file(build.path, side, number), hand.programs.shapes[side]
        )
        return jax.block_until_ready(jax.device_put(read, hand.device))


def spill(build: Build, hand: Hand) -> None:
    """Write the features of the blocks of a device to the disk, those that are not there yet."""
    for side, number in hand.blocks:
        file = files.features_file(build.path, side, number)
        if build.stop.is_set():
            return
        if not file.exists():
            with _timed(build, "features"):
                made = _made(build, hand, side, number)
                with files.on_disk(build.path):
                    files.write_features(file, made)
        build.done("features")


def compute_tile(build: Build, hand: Hand, f1: PyTree, f2: PyTree | None) -> jax.Array:
    """Compute one tile; `f2=None`: on the diagonal."""
    program = hand.programs.diagonal if f2 is None else hand.programs.tile
    with _timed(build, "contraction"):
        return jax.block_until_ready(program(hand.request, f1, f2))


def _mirrored(tile: np.ndarray, reduce: str) -> np.ndarray:
    """Swap the two examples, and the two outputs where a tile has them."""
    half = (tile.ndim - 2) // 2 if reduce == "none" else 0
    axes = [*range(2, tile.ndim)]
    return tile.transpose(1, 0, *axes[half:], *axes[:half])


def write_tile(build: Build, row: int, column: int, tile: jax.Array) -> None:
    """Write one tile, and its mirror image beyond the diagonal."""
    rows, columns = build.grid.examples(0, row), build.grid.examples(1, column)
    numbers = np.asarray(tile)[: rows.stop - rows.start, : columns.stop - columns.start]
    with _timed(build, "writing"), files.on_disk(build.path):
        build.array[rows, columns].write(numbers).result()
        if build.grid.symmetric and row != column:
            other = _mirrored(numbers, build.schedule.options.reduce)
            build.array[columns, rows].write(other).result()


def _panel(build: Build, hand: Hand, panel: list[int]) -> None:
    """Compute the tiles of some rows that are not on the disk, column by column."""
    grid, other = build.grid, len(build.x) - 1
    todo = [(r, c) for r in panel for c in grid.columns(r) if not is_done(build, r, c)]
    needed = {r for r, _ in todo}
    if grid.symmetric:
        needed |= {c for _, c in todo} & set(panel)
    held = {row: _features(build, hand, 0, row) for row in sorted(needed)}
    for column in sorted({c for _, c in todo}):
        own = grid.symmetric and column in held
        passing = held[column] if own else _features(build, hand, other, column)
        for row in (r for r, c in todo if c == column):
            if build.stop.is_set():
                return
            pair = held[row], None if grid.symmetric and row == column else passing
            write_tile(build, row, column, compute_tile(build, hand, *pair))
            build.done("tiles")
        pair = passing = None  # before the next is made
        save_timings(build)


def contract(build: Build, hand: Hand) -> None:
    """Compute the tiles of a device, panel by panel; features of one are held at a time."""
    for panel in panels(hand.rows, hand.held):
        _panel(build, hand, panel)


def save_timings(build: Build) -> None:
    """Write down what the work of this process has taken so far."""
    with build.lock, files.on_disk(build.path):
        files.write_json(files.timings_file(build.path), build.timings)


def everywhere(task: Callable[[Build, Hand], None], build: Build, hands: list[Hand]) -> None:
    """Run a task on every device of this process; the first error stops all of them."""
    if len(hands) == 1:
        return task(build, *hands)
    with ThreadPoolExecutor(len(hands)) as pool:
        futures = [pool.submit(task, build, hand) for hand in hands]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            build.stop.set()
            raise
