"""The folder of a stored kernel: a zarr array, and beside it what it is and how far it is.

zarr.json, c/...   the array, a chunk for each tile, no compression
recipe.json        what was asked for, and how it is computed
timings.json       seconds spent
features/...       features of blocks, until the kernel is finished
done.json          the kernel is finished
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from lazyjax.checkpoints import write_whole
from lazyjax.store.panels import Grid

RECIPE, TIMINGS, DONE, FEATURES = "recipe.json", "timings.json", "done.json", "features"
_ALIGNED = 64  # bytes; arrays that begin there are taken over by the CPU backend without a copy


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what a disk says when it takes no more into one error with the cure."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises each of them
        raise OSError(
            f"`path` must be on a disk that can be written and has room, got {path}: "
            f"{str(error).splitlines()[0]}. What is there is whole: mend that, and the same call "
            "goes on."
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file, or give None where there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def timings_file(path: Path) -> Path:
    """Name the file of the seconds of this process."""
    number = jax.process_index()
    return path / (f"timings.{number}.json" if number else TIMINGS)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


# --- the array ---------------------------------------------------------------------------------


def _spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "store_data_equal_to_fill_value": True,  # a chunk that exists is a tile that is done
    }


def begin(path: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe."""
    with on_disk(path):
        path.mkdir(exist_ok=True)
        write_json(path / RECIPE, recipe)


def open_array(path: Path, recipe: dict[str, Any] | None = None) -> Any:
    """Open the array; with a recipe, to write, and it is created if it is not there, all NaN."""
    if recipe is None:
        return tensorstore.open(_spec(path), read=True).result()
    metadata = {
        "shape": recipe["shape"],
        "data_type": recipe["dtype"],
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [*recipe["tile"], *recipe["shape"][2:]]},
        },
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    spec = {**_spec(path), "metadata": metadata}
    with on_disk(path):
        return tensorstore.open(spec, open=True, create=True).result()


def finish(path: Path) -> None:
    """Say that all tiles are there, and remove what is needed no more."""
    if not (path / DONE).exists():
        with on_disk(path):
            write_json(path / DONE, {})
    shutil.rmtree(path / FEATURES, ignore_errors=True)


def chunk(path: Path, row: int, column: int, axes: int) -> Path:
    """Name the file of a chunk."""
    return path.joinpath("c", str(row), str(column), *["0"] * (axes - 2))


def is_done(path: Path, grid: Grid, row: int, column: int, axes: int) -> bool:
    """Tell whether a tile is on the disk, its mirror image included: files are whole or missing."""
    places = {(row, column), (column, row)} if grid.symmetric else {(row, column)}
    return all(chunk(path, *place, axes).exists() for place in places)


# --- features ----------------------------------------------------------------------------------


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def features_file(path: Path, side: int, block: int) -> Path:
    """Name the file of the features of a block of x1 (side 0) or of x2 (side 1)."""
    return path / FEATURES / f"{side}.{block}"


def write_features(file: Path, features: Any) -> None:
    """Write arrays one after the other, whole or not at all."""
    parts: list[Any] = []
    for leaf in map(np.asarray, jax.tree.leaves(features)):
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        parts += [flat.data, bytes(_aligned(flat.size) - flat.size)]
    file.parent.mkdir(exist_ok=True)
    write_whole(file, *parts)


def read_features(file: Path, shapes: Any) -> Any:
    """Read them again, into memory that the CPU backend takes over."""
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [math.prod(a.shape) * a.dtype.itemsize for a in leaves]
    total = sum(map(_aligned, sizes))
    memory = np.empty(total + _ALIGNED, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNED :][:total]
    with file.open("rb", buffering=0) as opened:
        begin = 0
        while begin < total:
            read = opened.readinto(memory[begin:].data)
            if not read:
                raise OSError(f"{file} is not whole. Delete it")
            begin += read
    arrays, begin = [], 0
    for leaf, size in zip(leaves, sizes, strict=True):
        arrays.append(memory[begin : begin + size].view(leaf.dtype).reshape(leaf.shape))
        begin += _aligned(size)
    return structure.unflatten(arrays)
