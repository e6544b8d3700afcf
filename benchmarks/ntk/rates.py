"""The rates of this machine, as in `lazyjax.costs.RATES`: `python -m benchmarks.ntk.rates`

Each is the best of several calls, of one computation that is limited by it.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from lazyjax.checkpoints import write_whole
from lazyjax.costs import rates

CALLS = 8


def seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Time one call, the best of `CALLS`."""
    compiled = jax.jit(function).lower(*arguments).compile()
    found = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.perf_counter() - begin)
    return min(found)


def to_disk(array: np.ndarray) -> float:
    """Time a file that is written and flushed in the folder for temporary files, likewise."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(CALLS):
            begin = time.perf_counter()
            write_whole(Path(folder) / "array", array.data.cast("B"))
            found.append(time.perf_counter() - begin)
    return min(found)


def measured(shrink: int = 1) -> dict[str, float]:
    """Measure the rates that can be measured, with the longest axes divided by `shrink`."""
    side, long = 2048 // shrink, 2**16 // shrink
    with jax.default_matmul_precision("highest"):
        large = jnp.ones((side, side), jnp.float32)
        products = 2 * side**3 / seconds(jnp.matmul, large, large)
        thin = jnp.ones((32, long), jnp.float32)
        rate = 2 * 32**2 * long / seconds(lambda a: a @ a.T, thin)
        d, a = jnp.ones((32, 10, 64, 16), jnp.float32), jnp.ones((32, 64, 128), jnp.float32)
        formed = seconds(lambda d, a: jnp.einsum("nksq,nsp->nkqp", d, a), d, a)
        weights = jnp.ones((2 * side, 2 * side), jnp.float32)
        rows = {n: seconds(jnp.matmul, weights[:n], weights) for n in (32, 64, 128, 256)}
    near = jnp.ones(2**22 // shrink, jnp.float32)
    turns = 20
    loop = seconds(lambda x: jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x) + 0.5, x), near)
    far = jnp.ones(2**26 // shrink, jnp.float32)
    return {
        "products": products,
        "rows": 32 * (products / rate - 1),
        "small": 2 * 32 * 10 * 64 * 16 * 128 / formed,
        "bytes": turns * near.nbytes / loop,
        "fresh": far.nbytes / seconds(lambda x: x + 1, far),
        "slow": next((n for n in (64, 128, 256) if rows[n] > 2 * rows[n // 2]), 0),
        "disk": far.nbytes / to_disk(np.asarray(far)),
    }


def main(quick: bool = False) -> None:
    """Print them beside those of the table.

    Parameters
    ----------
    quick : bool
        Small arrays: does it run? No rates to report.
    """
    table = Table(title=f"Rates of {jax.default_backend()}, of this machine and of the table")
    for column in ("rate", "measured", "table"):
        table.add_column(column, justify="left" if column == "rate" else "right")
    for name, value in measured(16 if quick else 1).items():
        table.add_row(name, f"{value:.2g}", f"{getattr(rates(), name):.2g}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
