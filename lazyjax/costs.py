"""What a computation costs: operations counted in a jaxpr, and the rates of a backend.

`method="auto"` decides by these alone, never by a clock, so the same call takes the same way
everywhere.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn

from lazyjax.equations import Jaxpr, inner_jaxprs, lengths, settings


class Rates(NamedTuple):
    """How fast a backend is, roughly: only ratios of these matter."""

    products: float  # operations of a large float32 matrix product, a second
    rows: int  # of a matrix product, at which it runs at half that
    small: float  # operations of many small products, a second
    bytes: float  # bytes that elementwise operations make, a second
    fresh: float  # bytes of memory that is touched for the first time, a second
    cache: int  # bytes of intermediate results that stay close
    working: int  # bytes of intermediate results, up to which a batch is not worth a loop
    slow: int  # rows, or up to a quarter fewer, of a product with many weights that is slower than
    # two of half of them; 0 if there is none
    disk: float  # bytes written to a file and flushed, a second


_SLOW = 64 if jax.__version_info__ < (0, 11) else 0  # 0.10.1 has such a product, 0.12 has none

ALIVE = 0.05
"""Of all intermediate results, the share that XLA keeps at one moment."""

RATES = {
    "cpu": Rates(2e11, 60, 9e10, 2e10, 3e9, 8 * 2**20, 128 * 2**20, _SLOW, 1.5e9),
    "gpu": Rates(4e13, 500, 1e13, 2e12, 2e12, 2**28, 2**30, 0, 1.5e9),
    "tpu": Rates(4e13, 500, 1e13, 1e12, 1e12, 2**28, 2**30, 0, 1.5e9),
}
"""Of each backend of JAX; `python -m benchmarks.ntk.rates` measures those of a machine."""


_recorded: ContextVar[Rates | None] = ContextVar("lazyjax_rates", default=None)


def rates() -> Rates:
    """Give the rates of the default backend, or those that `using` has set."""
    return _recorded.get() or RATES.get(jax.default_backend(), RATES["gpu"])


@contextlib.contextmanager
def using(recorded: Rates) -> Iterator[None]:
    """Decide by other rates inside the `with` block, such as those that a store has recorded."""
    token = _recorded.set(recorded)
    try:
        yield
    finally:
        _recorded.reset(token)


def _walk(jaxpr: Jaxpr, weigh: Callable[[Any], float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [_walk(j, weigh) for j in inner_jaxprs(equation)]
        if name == "scan" and (scan := settings(equation)):
            total += scan.length * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif inner:  # jit, remat, custom rules; a while is counted as one turn
            total += sum(inner)
        else:
            total += weigh(equation)
    return total


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _operations(equation: JaxprEqn) -> float:
    name = equation.primitive.name
    size = sum(map(_size, equation.outvars))
    if name == "dot_general" and (product := settings(equation)):
        (contracted, _), _ = product.numbers
        shape = lengths(equation.invars[0])
        return size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated" and (convolution := settings(equation)):
        filters = lengths(equation.invars[1])
        features = filters[convolution.numbers.rhs_spec[0]]
        return size * math.prod(filters) // features
    return size


def _bytes(equation: JaxprEqn) -> float:
    def of(v: Any) -> int:
        return _size(v) * getattr(v.aval.dtype, "itemsize", 8)  # of a key

    return sum(map(of, equation.outvars))


def operations(jaxpr: Jaxpr) -> float:
    """Count the operations of one evaluation.

    Parameters
    ----------
    jaxpr : Jaxpr

    Returns
    -------
    float
        Multiply-adds of matrix products and convolutions, plus one for each element that any other
        primitive gives. A `scan` counts as often as it runs, a `while` once, a `cond` as its
        dearest branch.
    """
    return _walk(jaxpr, _operations)


def results(jaxpr: Jaxpr) -> float:
    """Count the bytes of all results of one evaluation, those inside a scan once a turn."""
    return _walk(jaxpr, _bytes)
