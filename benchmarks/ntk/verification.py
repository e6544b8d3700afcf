"""What does `verify` cost? `python -m benchmarks.ntk.verification`

For an MLP (a), a CNN (c) and a transformer (e) of `benchmarks.ntk.cases`, float32, a few examples:
the first call, which compiles both sides, a second call, and beside them one product with the
kernel (J^T v, then J u, nothing kept) and the kernel itself.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.ntk.cases import CASES
from lazyjax import ntk, ntk_operator, verify


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    cases: tuple[str, ...] = ()
    """Rows of `cases.CASES`; a, c and e if none is named."""
    examples: int = 16
    """Examples of each."""
    repeats: int = 5
    """Calls, of which the median is shown."""
    quick: bool = False
    """Case a, a call of each, tiny sizes: does everything run? No times to report."""


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def main(config: Config) -> None:
    """Print the table."""
    repeats = 1 if config.quick else config.repeats
    table = Table(title=f"verify on {config.examples} examples, seconds", title_justify="left")
    for column in ("case", "first call", "a call", "a kernel", "a product", "error / tolerance"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in config.cases or (("a",) if config.quick else ("a", "c", "e")):
        case = CASES[name]
        data = case.draw(np.random.default_rng(0), config.quick)
        params, x = jax.tree.map(jnp.asarray, (data.params, data.x1[: config.examples]))
        first = _seconds(lambda f=case.f, p=params, x=x: tuple(verify(f, p, x).whole), 1)
        found = verify(case.f, params, x)
        each = _seconds(lambda f=case.f, p=params, x=x: verify(f, p, x).whole, repeats)
        kernel = jax.jit(lambda p, x, f=case.f: ntk(f, p, x))
        jax.block_until_ready(kernel(params, x))
        A = ntk_operator(case.f, params, x, keep="nothing")
        v = jnp.ones(A.shape[1])
        product = jax.jit(lambda A, v: A @ v)
        jax.block_until_ready(product(A, v))
        times = (
            _seconds(lambda k=kernel, p=params, x=x: k(p, x), repeats),
            _seconds(lambda r=product, A=A, v=v: r(A, v), repeats),
        )
        ratio = max(c.error / c.tolerance for c in (found.whole, *found.leaves.values()))
        numbers = (*(f"{seconds:.3g}" for seconds in (first, each, *times)), f"{ratio:.2f}")
        table.add_row(f"{name}: {case.title}", *numbers)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
