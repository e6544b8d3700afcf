"""Is the limit where wide networks go, on average? `python -m benchmarks.infinite.monte_carlo`

Networks of three widths n are drawn with Gaussian weights, and their kernels averaged: `ntk` over
the outputs, and the NNGP kernel by its expectation over the last weights, in which f is linear:
E f f' = sum_p var_p df/dw_p df'/dw_p. In float64, the 10 pairs of 4 examples.

The gap of a mean to `infinite`, over the mean of the limit's diagonal, is fitted by a + c / n, with
least squares weighted by standard errors. Tested is a = 0: |a| against t times its standard error.
There t takes the place of 3 for one entry: that any entry of any network is beyond has a chance of
0.27 % at most (Student's t, Bonferroni). Printed are the largest |a| over what is allowed, so that
above 1 the limit is not what `infinite` says; what is allowed, in % of the kernel; and, over the
same t, how far the three means are from a line (the root of chi squared, one degree of freedom).

In standard parametrisation the limit grows with n and is taken at each. What is tested is then its
leading order; what is 1 / n of it, as the share of the first layer, goes into c.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.infinite.models import MODELS, Model, N, Network
from lazyjax import infinite, ntk
from lazyjax.leaves import path_of
from lazyjax.limits.initialisers import of_each_leaf

PAIRS = np.tril_indices(N)
ROUNDING = 1e-6  # where nothing varies from draw to draw
QUICK = ("own derivative",)


def kernels_of_one(network: Network, key: jax.Array) -> jax.Array:
    """Draw weights; give both kernels of this network, (2, pairs)."""
    leaves, tree = jax.tree.flatten(network.params)
    own = of_each_leaf(network.variance, network.params)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(network.params)]
    weights = [
        leaf
        if v is None
        else v**0.5 * jax.random.normal(k, leaf.shape, jnp.float32).astype(leaf.dtype)
        for k, leaf, v in zip(jax.random.split(key, len(leaves)), leaves, own, strict=True)
    ]
    found = ntk(network.f, tree.unflatten(weights), network.x, reduce="trace", per_leaf=True)
    each = jax.tree.leaves(found)
    last = [v * k for k, v, p in zip(each, own, paths, strict=True) if v and p.startswith("out")]
    return jnp.stack([sum(last), sum(each)])[:, *PAIRS]


def of_many(network: Network, key: jax.Array, draws: int) -> np.ndarray:
    """Give the kernels of many networks, (draws, 2, pairs)."""
    run = jax.jit(lambda keys: jax.lax.map(lambda key: kernels_of_one(network, key), keys))
    return np.asarray(run(jax.random.split(key, draws)))


class Line(NamedTuple):
    """The fit a + c / n of each entry, (2, pairs)."""

    a: np.ndarray
    error: np.ndarray  # standard, of a
    rest: np.ndarray  # the root of chi squared, of one degree of freedom


def line(widths: tuple[int, ...], means: np.ndarray, errors: np.ndarray) -> Line:
    """Fit the means at three widths, (3, 2, pairs), that have these standard errors."""
    w, x = 1 / np.square(errors), 1 / np.reshape(widths, (-1, 1, 1))
    s, sx, sxx, sy, sxy = ((w * v).sum(0) for v in (x**0, x, x**2, means, x * means))
    determinant = s * sxx - sx**2
    a, c = (sxx * sy - sx * sxy) / determinant, (s * sxy - sx * sy) / determinant
    chi = (w * np.square(means - a - c * x)).sum(0) ** 0.5
    return Line(a, np.sqrt(sxx / determinant), chi)


def measure(
    model: Model, key: jax.Array, *, quick: bool
) -> tuple[tuple[int, ...], tuple[int, ...], Line]:
    """Draw networks of three widths; give these, the draws, and the line through their gaps."""
    largest, draws = (64, 100) if quick else (model.largest, model.draws)
    widths, counts = (largest // 4, largest // 2, largest), (2 * draws, 2 * draws, draws)
    means, errors, limit = [], [], None
    for n, count, own in zip(widths, counts, jax.random.split(key, 3), strict=True):
        network = model.make(n)
        if limit is None or model.grows:
            found = infinite(network.f, network.params, network.x, variance=network.variance)
            limit = np.stack([found.nngp, found.ntk])
        size = np.trace(limit, axis1=1, axis2=2)[:, None] / N
        gaps = (of_many(network, own, count) - limit[:, *PAIRS]) / size
        means.append(gaps.mean(0))
        errors.append(np.maximum(gaps.std(0, ddof=1) / count**0.5, ROUNDING))
    return widths, counts, line(widths, np.stack(means), np.stack(errors))


def main(quick: bool = False) -> None:
    """Print the table; leave with status 1 if any limit is not where networks go.

    Parameters
    ----------
    quick
        one network, narrow, few of it
    """
    jax.config.update("jax_enable_x64", True)
    models = {name: MODELS[name] for name in (QUICK if quick else MODELS)}
    keys = jax.random.split(jax.random.key(0), len(models))
    with ThreadPoolExecutor(2) as pool:  # to compile takes one core
        measured = pool.map(partial(measure, quick=quick), models.values(), keys)
        found = dict(zip(models, measured, strict=True))
    table = Table(title="gaps at infinite width, over what is allowed, and that in % of the kernel")
    for head in ("network", "holds", "widths", "draws"):
        table.add_column(head)
    for head in ("nngp", "%", "ntk", "%", "line"):
        table.add_column(head, justify="right")
    entries, beyond = 2 * len(PAIRS[0]) * len(models), []
    for name, (widths, counts, fit) in found.items():
        t = stats.t.isf(stats.norm.sf(3) / entries, min(counts) - 1)
        allowed = t * fit.error
        cells = []
        for ratio, percent in zip(np.abs(fit.a) / allowed, 100 * allowed, strict=True):
            cells += [f"{ratio.max():.2f}", f"{percent.max():.1f}"]
            if not ratio.max() <= 1 and name not in beyond:
                beyond.append(name)
        sizes = (" ".join(map(str, each)) for each in (widths, counts))
        table.add_row(name, models[name].holds, *sizes, *cells, f"{fit.rest.max() / t:.2f}")
    console = Console(width=140)
    console.print(table)
    console.print(
        f"Beyond what is allowed: {', '.join(beyond) or 'none'}, of {len(models)} networks"
    )
    sys.exit(1 if beyond else 0)


if __name__ == "__main__":
    tyro.cli(main)
