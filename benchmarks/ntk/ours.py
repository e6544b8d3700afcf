"""Ours: `lazyjax.ntk`, everything left to it."""

import time

import jax
import jax.numpy as jnp

from benchmarks.ntk import jitted
from benchmarks.ntk.cases import CASES, read
from benchmarks.ntk.worker import Contender, serve
from lazyjax import ntk


def rate(size: int) -> dict:
    """Time a float32 product, the best of several: the machine's rate at this moment."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - begin)
    return {"rate": 2 * size**3 / min(seconds[1:])}


def make(task: dict) -> Contender:
    case, data = CASES[task["case"]], read(task["data"])
    options = {} if task["block"] is None else {"batch_size": task["block"]}

    def kernel(params, x1, x2):
        return ntk(case.f, params, x1, x2, reduce=task["reduce"], **options)

    def operations() -> dict:
        from benchmarks.ntk.operations import counted_operations  # no count, no harm

        symmetric = task["symmetric"]
        return {"operations": counted_operations(data, case.f, task["reduce"], symmetric, options)}

    return jitted.contender(
        kernel,
        data.params,
        data.x1,
        None if task["symmetric"] else data.x2,
        rate=lambda: rate(256 if task["quick"] else 2048),
        operations=operations,
    )


if __name__ == "__main__":
    serve(make)
