"""How far do solves, eigenpairs and log-determinants reach? `python -m benchmarks.large.solves`

The kernel of scikit-learn's digits for a convolutional network and an MLP of 10 outputs, at their
initial weights, in float64, with a ridge of 1e-6 of the largest eigenvalue: the traced kernel
(order N) in memory, and the kernel of all outputs (order 10 N) by its products alone. Right-hand
sides are the one-hot labels minus the outputs at the start.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import lazyjax
from lazyjax.models import from_linen
from lazyjax.operators import NotConverged, as_operator, ntk_operator, nystrom, solve
from lazyjax.operators.algebra import KernelOperator
from lazyjax.operators.spectra import top_eigenpairs
from lazyjax.operators.trace_estimates import logdet

RIDGE, TOLERANCE, SEEDS = 1e-6, 1e-8, 100
CONSOLE = Console(width=110)


class CNN(nn.Module):
    """Two convolutions, the second of stride 2, and a mean over positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), param_dtype=x.dtype)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, param_dtype=x.dtype)(x))
        return nn.Dense(10, param_dtype=x.dtype)(x.mean((1, 2)))


class MLP(nn.Module):
    """64-256-256-10."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for width in (256, 256):
            x = nn.relu(nn.Dense(width, param_dtype=x.dtype)(x))
        return nn.Dense(10, param_dtype=x.dtype)(x)


MODELS = {"CNN": CNN, "MLP": MLP}


def problem(name: str, images: int) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Give f, params, x (N, 8, 8, 1) and y - f(params, x) (N, 10)."""
    digits: Any = load_digits()
    x = jnp.asarray(digits.images[:images, :, :, None] / 16)
    f, params = from_linen(MODELS[name](), jax.random.key(0), x[:1])
    y = jax.nn.one_hot(digits.target[:images], 10, dtype=x.dtype)
    return f, params, x, y - f(params, x)


def timed(call: Callable, warm_up: Callable) -> tuple[Any, float]:
    """Give the result and its seconds, after a warm-up that compiles what it needs."""
    with contextlib.suppress(NotConverged):
        jax.block_until_ready(warm_up())
    begin = time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - begin


def table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def largest(A: KernelOperator) -> jax.Array:
    return top_eigenpairs(jax.random.key(0), A, 1, tolerance=1e-6).values[0]


def solves(rows: Table, name: str, A: KernelOperator, b: jax.Array, ranks: list[int]) -> None:
    """Add plain and preconditioned conjugate gradients, the set-up in their seconds."""

    def run(rank: int, iterations: int = 20_000):
        P = nystrom(jax.random.key(1), A, rank=rank) if rank else None
        return solve(A, b, preconditioner=P, tolerance=TOLERANCE, iterations=iterations)

    plain, plain_seconds = timed(lambda: run(0), lambda: run(0, 1))
    rows.add_row(
        name, str(A.shape[0]), str(b.shape[1:]), "-", str(plain.iterations), "1.0",
        f"{plain_seconds:.2f}", "1.0", f"{plain.residuals[-1].max():.1e}",
    )  # fmt: skip # to be read as a table
    for rank in ranks:
        found, seconds = timed(partial(run, rank), partial(run, rank, 1))
        fewer = plain.iterations / found.iterations
        rows.add_row(
            "", "", "", str(rank), str(found.iterations), f"{fewer:.1f}",
            f"{seconds:.2f}", f"{plain_seconds / seconds:.1f}", f"{found.residuals[-1].max():.1e}",
        )  # fmt: skip # to be read as a table


def eigenpairs(rows: Table, name: str, A: KernelOperator, values: np.ndarray) -> None:
    """Add the distance of the 20 largest eigenvalues from the dense ones, ascending."""
    call = partial(top_eigenpairs, jax.random.key(2), A, 20)
    found, seconds = timed(call, call)
    error = np.abs(found.values / values[::-1][:20] - 1).max()
    residual = found.residuals.max() / values[-1]
    rows.add_row(name, str(A.shape[0]), f"{seconds:.2f}", f"{error:.1e}", f"{residual:.1e}")


def logdets(
    rows: Table, name: str, A: KernelOperator, true: float, *, probes: int, rank: int, seeds: int
) -> None:
    """Add how often [lower - 3 error, upper + 3 error] holds log det (K / ridge + I)."""
    held, widths, depths = 0, [], set()
    begin = time.perf_counter()
    for key in jax.random.split(jax.random.key(3), seeds):
        found = logdet(key, A / A.shift, probes=probes, rank=rank)
        low, high = found.lower - 3 * found.error, found.upper + 3 * found.error
        held += bool(low <= true <= high)
        widths.append(float(high - low) / true)
        depths.add(found.depth)
    seconds = (time.perf_counter() - begin) / seeds
    rows.add_row(
        name, str(A.shape[0]), str(probes), str(rank), "/".join(map(str, sorted(depths))),
        f"{true:.1f}", f"{held} of {seeds}", f"{100 * np.mean(widths):.2f}",
        f"{100 * max(widths):.2f}", f"{seconds:.2f}",
    )  # fmt: skip # to be read as a table


def main(traced: bool = False, quick: bool = False) -> None:
    """Print the tables.

    Parameters
    ----------
    traced : bool
        Leave out the kernel of all outputs.
    quick : bool
        The MLP alone, few images and seeds: does it run? No numbers to report.
    """
    jax.config.update("jax_enable_x64", True)
    images, parts = (24, (6,)) if quick else (1797, (24, 12, 6))  # of the order, for a rank
    estimates = {images // 6: 2} if quick else {images // 6: SEEDS, 0: SEEDS // 10}  # {rank: seeds}
    for name in ("MLP",) if quick else MODELS:
        solved = table(
            f"To a relative residual of {TOLERANCE:.0e}", "kernel", "order", "columns", "rank",
            "iterations", "fewer", "seconds", "faster", "residual",
        )  # fmt: skip # to be read as a table
        paired = table(
            "The 20 largest eigenvalues", "kernel", "order", "seconds", "against dense",
            "residual / lambda_max",
        )  # fmt: skip # to be read as a table
        logged = table(
            "log det (K / ridge + I): bracket plus 3 standard errors", "kernel", "order", "probes",
            "rank", "depth", "true", "holds it", "width %", "widest %", "seconds",
        )  # fmt: skip # to be read as a table
        f, params, x, b = problem(name, images)
        K = lazyjax.ntk(f, params, x, reduce="trace")
        values = np.linalg.eigvalsh(K)
        ridge = RIDGE * values[-1]
        A = as_operator(K, ridge=ridge)
        true = float(np.sum(np.log1p(np.maximum(values, 0) / ridge)))
        solves(solved, f"{name}, traced", A, b, [images // part for part in parts])
        eigenpairs(paired, f"{name}, traced", A, values + ridge)
        for rank, seeds in estimates.items():
            logdets(logged, f"{name}, traced", A, true, probes=64, rank=rank, seeds=seeds)
        if not traced:
            base = ntk_operator(f, params, x)
            A = base + RIDGE * largest(base)
            ranks = [10 * images // part for part in parts[::2]]
            solves(solved, f"{name}, all", A, b.reshape(-1), ranks)
        for each in (solved, paired, logged):
            CONSOLE.print(each)
    CONSOLE.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float64")


if __name__ == "__main__":
    tyro.cli(main)
