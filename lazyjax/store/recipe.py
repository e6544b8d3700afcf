"""The recipe of a stored kernel: what was asked for, which must match, and how it is computed."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lazyjax import checks
from lazyjax.checkpoints import fingerprint
from lazyjax.costs import Rates
from lazyjax.equations import constants
from lazyjax.factors import jacobian
from lazyjax.kernels import Options, Request, jobs
from lazyjax.meshes import on_one_device
from lazyjax.store.panels import Grid, Schedule
from lazyjax.store.programs import Cut
from lazyjax.types import PyTree, leaf_names

_HASHED = 2**26  # bytes of inputs that are hashed at once


def _model(request: Request) -> str:
    """Hash the jaxpr of the Jacobian of one example, which holds rules of derivatives too.

    Its constants count, and those of each `jit` in it, and the arrays that f holds.
    """

    def derivative(request: Request) -> Any:
        (job,) = jobs(request)
        return jacobian(job.model, request.x1)

    one = jax.tree.map(lambda a: a[:1], request.x1)
    with on_one_device():
        jaxpr = jax.make_jaxpr(derivative)(request.of(one))
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))  # addresses differ from process to process
    return fingerprint(text, constants(jaxpr), jax.tree.leaves(request.f))


def _inputs(x: PyTree) -> str:
    """Hash inputs block by block, so that those on the disk need not fit in memory."""
    n = checks.batch("x", x)
    size = max(1, _HASHED * n // max(1, sum(a.nbytes for a in jax.tree.leaves(x))))
    shapes = str([(a.shape, str(a.dtype)) for a in jax.tree.leaves(x)])
    blocks = (jax.tree.map(lambda a, i=i: a[i : i + size], x) for i in range(0, n, size))
    return fingerprint(shapes, *blocks)


def asked(request: Request, x: tuple[Any, ...], shape: tuple[int, ...], dtype: str) -> dict:
    """Tell a kernel from any other: what the array depends on.

    Parameters
    ----------
    request : Request
        With a few of the examples.
    x : tuple of one or two pytrees of numpy arrays
        All of them.
    shape, dtype
        Of the array.

    Returns
    -------
    dict
        Of what JSON holds.
    """
    options = request.options
    names = leaf_names(request.params)
    return {  # what decides the others first: an error names the first that differs
        "dtype": dtype,
        "precision": options.precision,
        "reduce": options.reduce,
        "wrt": [name for name, moves in zip(names, options.wrt, strict=True) if moves],
        "outputs": None if request.outputs is None else np.asarray(request.outputs).tolist(),
        "x1": _inputs(x[0]),
        "x2": _inputs(x[1]) if x[1:] else None,
        "params": fingerprint(request.params),
        "shape": list(shape),
        "backend": jax.default_backend(),
        **{package: version(package) for package in ("lazyjax", "jax", "jaxlib")},
        "model": _model(request),
    }


def written_down(schedule: Schedule, wrt: list[str], rows: int) -> dict:
    """Write down how a kernel is computed; `rows`: those of an example in the matrix view."""
    return {
        "method": schedule.options.method,
        "orders": [[wrt[leaf], order] for leaf, order in schedule.leaves],
        "tile": list(schedule.cut.tile),
        "at_once": schedule.cut.at_once,
        "spilled": schedule.spilled,
        "rates": schedule.options.rates._asdict(),
        "rows": rows,
    }


def replayed(recorded: dict, options: Options, n1: int, n2: int, *, symmetric: bool) -> Schedule:
    """Give the schedule that was written down."""
    options = options._replace(method=recorded["method"], rates=Rates(**recorded["rates"]))
    rows, columns = recorded["tile"]
    orders = tuple(order for _, order in recorded["orders"])
    cut = Cut(orders, (rows, columns), recorded["at_once"])
    grid = Grid(n1, n2, cut.tile, symmetric)
    return Schedule(grid, options, cut, (), recorded["spilled"], 0.0, 0.0)


def require_same(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a store of another kernel, by the name of what differs."""
    for name, value in wanted.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"`path` must hold this very kernel, got {path}, a store with another `{name}`: "
                f"{_short(recorded.get(name))} is recorded, {_short(value)} is asked for. "
                "Delete it, or name another path."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
