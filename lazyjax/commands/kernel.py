"""`python -m lazyjax kernel MODULE:FACTORY --data x.npz --out K.zarr`: a kernel in a file."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from lazyjax.commands.arguments import Factory, arrays_of, model
from lazyjax.memory import format_bytes
from lazyjax.store import kernel_store


def kernel(
    factory: Factory,
    *,
    data: Path,
    out: Path,
    reduce: str = "none",
    memory: str = "4GiB",
    tile: int | None = None,
    resume: bool = False,
) -> None:
    """Compute the empirical neural tangent kernel of a model and write it to the disk.

    The result is a zarr array. JAX_ENABLE_X64=1 in the environment computes in float64.

    Parameters
    ----------
    factory
        a function that gives (f, params), in a module that can be imported from here
    data
        an npz file with x, or with x1 and x2; or an npy file with x, which may be larger than
        memory
    out
        the folder of the kernel, a new one
    reduce
        none, diagonal, trace or sum: what is kept of the outputs
    memory
        budget of each device
    tile
        examples in a tile, at most
    resume
        go on with what is in the folder
    """
    if out.exists() and not resume:
        raise ValueError(f"`--out` must be new, got {out}. Name another, or add --resume.")
    f, params = model(factory)
    x1, x2 = _inputs(data)
    begin = time.perf_counter()
    stored = kernel_store(f, params, x1, x2, path=out, memory=memory, reduce=reduce, tile=tile)
    size = format_bytes(math.prod(stored.shape) * stored.dtype.itemsize)
    seconds = time.perf_counter() - begin
    print(f"{out}: {stored.shape} {stored.dtype}, {size}, {seconds:.1f} s")


def _inputs(path: Path) -> tuple[Any, Any]:
    """Read x1, and x2 or None."""
    found = arrays_of(path, "np.savez(path, x=x)")
    if isinstance(found, np.ndarray):
        return found, None
    names = set(found)
    if names not in ({"x"}, {"x1"}, {"x1", "x2"}):
        raise ValueError(
            f"`--data` must hold x, or x1 and x2, got {sorted(names)} in {path}. "
            "Use np.savez(path, x=x)."
        )
    return found["x" if "x" in names else "x1"], found.get("x2")
