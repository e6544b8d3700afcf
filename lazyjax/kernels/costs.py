"""Operations of a function, counted in its jaxpr: what `method="auto"` decides by."""

import math
from collections.abc import Callable
from typing import Any

import jax

from lazyjax.derivatives import inner_jaxprs


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, settings = equation.primitive.name, equation.params
        size = sum(math.prod(v.aval.shape) for v in equation.outvars)
        inner = [_count(j) for value in settings.values() for j in inner_jaxprs(value)]
        if name == "dot_general":
            (contracted, _), _ = settings["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            filters = equation.invars[1].aval.shape
            features = filters[settings["dimension_numbers"].rhs_spec[0]]
            total += size * math.prod(filters) // features
        elif name == "scan":
            total += settings["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif inner:  # jit, remat, custom rules; a while is counted as one turn
            total += sum(inner)
        else:
            total += size
    return total


def operations(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the operations of one evaluation.

    Parameters
    ----------
    function : callable
        Any traceable function.
    *arguments : pytrees
        Where to trace it; only shapes and dtypes matter.

    Returns
    -------
    int
        Multiply-adds of matrix products and convolutions, plus one for each element that any other
        primitive gives. A `scan` counts as often as it runs, a `while` once, a `cond` as its
        dearest branch.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)
