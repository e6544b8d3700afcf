"""Store the kernel of N examples, and tell what it took: `store_worker N MEMORY FOLDER`."""

import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.large.case import draw
from benchmarks.ntk.rates import seconds
from lazyjax.costs import operations
from lazyjax.kernels import check
from lazyjax.store import StoredKernel, files, kernel_store, recipe
from lazyjax.store.programs import features, tile


def rate() -> float:
    """Measure the operations of a large matrix product, a second."""
    large = jnp.ones((2048, 2048), jnp.float32)
    return 2 * 2048**3 / seconds(jnp.matmul, large, large)


def counted(stored: StoredKernel, n: int, times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Count the operations of all features and of all tiles, as often as they were computed."""
    f, params, x = draw(4)
    request = check(f, params, x, reduce="trace")
    schedule = recipe.replayed(stored.recipe, request.options, n, n, symmetric=True)
    request = replace(request, options=schedule.options)
    of_block, of_tile = (partial(made, cut=schedule.cut) for made in (features, tile))
    block = request.of(jax.ShapeDtypeStruct((schedule.cut.tile[0], *x.shape[1:]), x.dtype))
    made = jax.eval_shape(of_block, block)
    pair, diagonal = (
        operations(jax.make_jaxpr(of_tile)(request, made, other).jaxpr) for other in (made, None)
    )
    blocks, tiles = schedule.grid.blocks[0], schedule.grid.tiles
    often = blocks if schedule.spilled else times["features"]["times"]
    return {
        "features": 2 * often * operations(jax.make_jaxpr(of_block)(block).jaxpr),
        "contraction": 2 * (blocks * diagonal + (tiles - blocks) * pair),
    }


def main(n: int, memory: str, path: str) -> None:
    before = rate()
    begin = time.perf_counter()
    stored = kernel_store(*draw(n), path=path, memory=memory, reduce="trace")
    whole = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    timings = json.loads((Path(path) / files.TIMINGS).read_text())
    found = {
        "peak": int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20,
        "seconds": {name: one["seconds"] for name, one in timings.items()} | {"whole": whole},
        "operations": counted(stored, n, timings),
        "rates": [before, rate()],
        "tile": stored.recipe["tile"][0],
        "spilled": stored.recipe["spilled"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
