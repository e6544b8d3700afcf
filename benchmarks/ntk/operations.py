"""How many multiply-adds ours needs."""

from typing import Any

import jax

from lazyjax import ntk
from lazyjax.costs import operations


def counted_operations(data: Any, f: Any, reduce: str, symmetric: bool, options: dict) -> float:
    """Count the multiply-adds of `ntk` on the data of a case, in the jaxpr of the call."""
    x2 = None if symmetric else data.x2
    call = jax.make_jaxpr(lambda p, a, b: ntk(f, p, a, b, reduce=reduce, **options))
    return operations(call(data.params, data.x1, x2).jaxpr)
