"""neural-tangents 0.6.5, its three implementations, in an environment of its own.

The blocks are `nt.batch`, timed on fewer examples and scaled by the number of pairs of blocks.
"""

# pyright: reportMissingImports=false

import sys
import types

# Imports what an old tensorflow needs; nothing of it is used here.
sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")

import jax  # noqa: E402 (after the stand-in)
import neural_tangents as nt  # noqa: E402 (after the stand-in)
import numpy as np  # noqa: E402 (after the stand-in)

from benchmarks.ntk import jitted  # noqa: E402 (after the stand-in)
from benchmarks.ntk.cases import CASES, read  # noqa: E402 (after the stand-in)
from benchmarks.ntk.worker import Contender, serve  # noqa: E402 (after the stand-in)


def make(task: dict) -> Contender:
    data = read(task["data"])
    theirs = nt.empirical_ntk_fn(
        CASES[task["case"]].f,
        trace_axes=() if task["reduce"] == "none" else (-1,),
        vmap_axes=0,
        implementation=nt.NtkImplementation[task["method"]],
    )
    if task["block"] is not None:
        return in_blocks(theirs, data, task["block"], task["timed"])

    def kernel(params, x1, x2):
        return theirs(x1, x2, params)

    x2 = None if task["symmetric"] else data.x2
    return jitted.contender(kernel, data.params, data.x1, x2)


def in_blocks(kernel, data, block: int, timed: int) -> Contender:
    """Serve `nt.batch`; it compiles in its first call, which is left to the parent's warm-up."""
    batched = nt.batch(kernel, batch_size=block, device_count=0)
    x = jax.device_put(data.x1[:timed])
    params = jax.tree_util.tree_map(jax.device_put, data.params)
    scale = (-(-len(data.x1) // block) / -(-timed // block)) ** 2

    def compile_() -> None:
        jax.block_until_ready(batched(x, None, params))

    def call():
        return jax.block_until_ready(batched(x, None, params))

    return Contender(compile_, call, np.asarray, {"scale": lambda: {"scale": scale}})


if __name__ == "__main__":
    serve(make)
