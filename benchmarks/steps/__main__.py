"""What do a diagonal and a metric cost? `python -m benchmarks.steps`

`ntk_diagonal` over the features that `ntk` makes of the same batch, and `ntk` with a number of a
metric for each leaf over `ntk` without; calls in turn, the least time of each, float32, compilation
excluded.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import lazyjax
from experiments.digits_kernel import CNN
from lazyjax.kernels import check, engine_of, jobs

SIZES = {"mlp": (784, 512, 512, 10), "ffn": (64, 256, 256, 1)}


def cases(examples: int) -> dict[str, tuple[Any, Any, jax.Array]]:
    """Give networks, their parameters and inputs."""
    found = {}
    for name, (inputs, *widths, outputs) in SIZES.items():
        x = jax.random.normal(jax.random.key(1), (examples, inputs))
        module = lazyjax.MLP(tuple(widths), outputs)
        found[name] = (*lazyjax.from_linen(module, jax.random.key(0), x[:1]), x)
    x = jax.random.normal(jax.random.key(1), (examples // 4, 8, 8, 1))
    found["cnn"] = (*lazyjax.from_linen(CNN((16, 32), 10), jax.random.key(0), x[:1]), x)
    return found


def least(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Time calls in turn; the first of each compiles."""
    seconds = [float("inf")] * len(calls)
    for turn in range(rounds + 1):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return seconds


def main(rounds: int = 8, quick: bool = False) -> None:
    """Print the table.

    Parameters
    ----------
    rounds
        calls of each
    quick
        small batches, twice
    """
    table = Table(title="seconds, and over what they stand on")
    for head in (
        "case",
        "reduce",
        "features",
        "diagonal",
        "ratio",
        "ntk",
        "with a metric",
        "ratio",
    ):
        table.add_column(head, justify="right")
    for name, (f, params, x) in cases(32 if quick else 256).items():
        metric = jax.tree.map(lambda w: jnp.float32(1 / w.size), params)
        for reduce in ("none", "trace"):
            request = check(f, params, x, reduce=reduce)

            @jax.jit
            def features(request: Any) -> Any:
                with request.options.in_force():
                    (job,) = jobs(request)
                    return engine_of(job, request.x1, "auto").features(request.x1)

            def of(function: Any, reduce: str = reduce, f: Any = f, **options: Any) -> Any:
                return jax.jit(lambda w, inputs: function(f, w, inputs, reduce=reduce, **options))

            own, plain = of(lazyjax.ntk_diagonal), of(lazyjax.ntk)
            scaled = of(lazyjax.ntk, metric=metric)
            arguments = params, x
            a, b, c, d = least(
                [
                    lambda r=request, g=features: g(r),
                    *(lambda g=g, w=arguments: g(*w) for g in (own, plain, scaled)),
                ],
                2 if quick else rounds,
            )
            row = [f"{a:.4f}", f"{b:.4f}", f"{b / a:.2f}", f"{c:.4f}", f"{d:.4f}", f"{d / c:.2f}"]
            table.add_row(name, reduce, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(main)
